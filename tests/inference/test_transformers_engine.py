"""Replies of the in-process engine against transformers' own `generate`, and what requests may not do to each other."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from nemo_cpt.checkpoint import import_hf
from nemo_cpt.errors import CptError
from nemo_cpt.evaluation.bits_per_byte import documents_loss
from nemo_cpt.inference import Sampling, hugging_face_folder, open_engine, transformers_engine
from nemo_cpt.inference.asked_as import end_ids
from nemo_cpt.inference.decoding import Decoder, Request, _Detokenizer, _until_stop
from nemo_cpt.inference.transformers_engine import TransformersEngine
from tests.inference.conftest import SHAPES

PROMPTS = [
    "京都",
    "The old town of Kyoto lies in a valley, and its temples",
    "a",
    "鴨川は京都市を流れる。" * 3,
    "One two three",
]


@pytest.fixture(scope="module")
def engine(make_model: Callable[[str], Path]) -> TransformersEngine:
    return TransformersEngine(make_model("llama"))


def plain_reply(folder: Path, prompt: str, max_tokens: int) -> tuple[str, int]:
    """Text and number of tokens of transformers' greedy reply to one prompt alone."""
    tokenizer, network = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.inference_mode():
        whole = network.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False)
    reply = whole[0, ids.shape[1] :]
    return tokenizer.decode(reply, skip_special_tokens=True), len(reply)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_batch_of_mixed_lengths_equals_each_prompt_alone(shape: str, make_model: Callable[[str], Path]) -> None:
    folder = make_model(shape)
    replies = dict(TransformersEngine(folder).generate(PROMPTS, Sampling(max_tokens=40)))
    for index, prompt in enumerate(PROMPTS):
        text, tokens = plain_reply(folder, prompt, 40)
        assert replies[index].text.rstrip("\ufffd") == text.rstrip("\ufffd")
        assert replies[index].completion_tokens == tokens
        assert replies[index].finish_reason == ("length" if tokens == 40 else "stop")


def test_requests_that_join_and_leave_between_steps_disturb_no_other(engine: TransformersEngine) -> None:
    alone = dict(engine.generate(PROMPTS, Sampling(max_tokens=30)))
    decoder, requests = (
        engine.decoder(),
        [Request(engine.encode(prompt), Sampling(max_tokens=30)) for prompt in PROMPTS],
    )
    decoder.add(requests[:1])
    for joining in requests[1:]:  # each two steps after the one before
        decoder.step()
        decoder.step()
        decoder.add([joining])
    decoder.cancel(requests[3])
    while decoder.rows:
        decoder.step()
    assert requests[3].finish_reason == "cancelled"
    for index in (0, 1, 2, 4):
        assert requests[index].reply().text == alone[index].text


def test_a_seeded_reply_does_not_depend_on_its_company(engine: TransformersEngine) -> None:
    sampling = Sampling(max_tokens=20, temperature=1.3, top_k=50, top_p=0.9, seed=5)
    alone = "".join(piece.text for piece in engine.stream(PROMPTS[1], sampling))
    decoder = engine.decoder()
    together = [Request(engine.encode(prompt), sampling) for prompt in PROMPTS]
    decoder.add(together)
    while decoder.rows:
        decoder.step()
    assert together[1].reply().text == alone
    other = "".join(piece.text for piece in engine.stream(PROMPTS[1], Sampling(max_tokens=20, temperature=1.3, seed=6)))
    assert other != alone


def test_equal_prompts_are_drawn_apart(engine: TransformersEngine) -> None:
    replies = dict(engine.generate([PROMPTS[1]] * 4, Sampling(max_tokens=12, temperature=1.5)))
    assert len({reply.text for reply in replies.values()}) > 1


def test_the_stream_is_the_reply_and_never_half_a_character(engine: TransformersEngine) -> None:
    sampling = Sampling(max_tokens=60, temperature=2.0, seed=3)
    pieces = list(engine.stream(PROMPTS[0], sampling))
    ((_, reply),) = engine.generate([PROMPTS[0]], sampling)
    assert "".join(piece.text for piece in pieces) == reply.text
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].finish_reason == reply.finish_reason


def test_a_stop_string_ends_the_reply_and_is_not_in_it(engine: TransformersEngine) -> None:
    ((_, whole),) = engine.generate([PROMPTS[1]], Sampling(max_tokens=40))
    middle = len(whole.text) // 2
    stop = whole.text[middle : middle + 5]
    ((_, cut),) = engine.generate([PROMPTS[1]], Sampling(max_tokens=40, stop=(stop, "never said")))
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.completion_tokens < whole.completion_tokens


@given(st.lists(st.text("ab", max_size=4), max_size=12), st.lists(st.text("ab", min_size=1, max_size=3), max_size=2))
@settings(max_examples=300, deadline=None)
def test_stop_strings_are_found_however_the_text_is_cut(parts: list[str], stop: list[str]) -> None:
    given_text, held = "", ""
    ended = False
    for part in parts:
        new, held, ended = _until_stop(held + part, tuple(stop))
        given_text += new
        if ended:
            break
    whole = "".join(parts)
    places = [(whole.find(each) + len(each), whole.find(each)) for each in stop if each in whole]
    assert ended == bool(places)
    if not places:
        assert given_text + held == whole
    else:
        assert whole.startswith(given_text)
        assert not any(each in given_text for each in stop)


def test_logprobs_are_the_models(engine: TransformersEngine) -> None:
    ((_, reply),) = engine.generate([PROMPTS[2]], Sampling(max_tokens=5, logprobs=3))
    assert len(reply.logprobs) == reply.completion_tokens
    ids = torch.tensor([engine.encode(PROMPTS[2])])
    with torch.inference_mode():
        wanted = engine.network(ids).logits[0, -1].log_softmax(-1)
    first = reply.logprobs[0]
    assert first.logprob == pytest.approx(float(wanted.max()), abs=1e-4)
    assert [value for _, value in first.top] == pytest.approx(wanted.topk(3).values.tolist(), abs=1e-4)


def test_logprobs_have_the_bytes_of_tokens_that_are_parts_of_characters(engine: TransformersEngine) -> None:
    ((_, reply),) = engine.generate([PROMPTS[0]], Sampling(max_tokens=40, logprobs=2, min_tokens=40))
    written = b"".join(each.content for each in reply.logprobs).decode(errors="replace")
    for special in engine.tokenizer.added_tokens_decoder.values():
        written = written.replace(special.content, "")
    assert written.rstrip("\ufffd") == reply.text.rstrip("\ufffd")
    assert any("\ufffd" in each.text for each in reply.logprobs)


def test_a_temperature_next_to_nothing_is_greedy(engine: TransformersEngine) -> None:
    greedy, cold = (dict(engine.generate(PROMPTS[:2], Sampling(12, temperature=each))) for each in (0.0, 1e-45))
    assert [greedy[at].text for at in range(2)] == [cold[at].text for at in range(2)]


@pytest.mark.parametrize("temperature", [1e39, 10**400])
def test_a_temperature_beyond_fp32_draws_among_all_tokens_that_may_be(
    temperature: float, engine: TransformersEngine
) -> None:
    sampling = Sampling(12, temperature=temperature, min_tokens=12, top_k=399)
    assert [reply.completion_tokens for _, reply in engine.generate(PROMPTS, sampling)] == [12] * len(PROMPTS)


@pytest.mark.parametrize("end_ids", [[], [400]])
def test_min_tokens_of_a_model_without_an_end(end_ids: list[int], engine: TransformersEngine) -> None:
    """None is named, or one that the model has no row for."""
    decoder, request = Decoder(engine.network, engine.tokenizer, end_ids, 256), Request([5], Sampling(3, min_tokens=2))
    decoder.add([request])
    while decoder.rows:
        decoder.step()
    assert (request.tokens, request.finish_reason) == (3, "length")


def test_a_special_token_as_a_stop_string_ends_the_reply(engine: TransformersEngine) -> None:
    """Such tokens are no part of a reply's text, in which the string is looked for."""
    ((_, whole),) = engine.generate(["a"], Sampling(max_tokens=40, logprobs=0))
    said = [each.text for each in whole.logprobs]
    stop = next(each for each in said if each in ("<|user|>", "<|assistant|>", "<|system|>"))
    ((_, cut),) = engine.generate(["a"], Sampling(max_tokens=40, stop=("never said", stop)))
    assert (cut.finish_reason, cut.completion_tokens) == ("stop", said.index(stop) + 1)
    assert whole.text.startswith(cut.text)


def test_a_long_prompt_and_many_short_ones_stay_within_the_batch(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every row of a batch takes the columns of its longest one."""
    monkeypatch.setattr(transformers_engine, "BATCH_TOKENS", 400)
    step, taken = Decoder.step, list[tuple[int, int]]()

    def counted(decoder: Decoder) -> object:
        pieces = step(decoder)
        taken.append((len(decoder.rows), decoder._mask.shape[1]))
        return pieces

    monkeypatch.setattr(Decoder, "step", counted)
    sampling = Sampling(max_tokens=20, min_tokens=20)
    prompts = ["鴨川は京都市を流れる。" * 4, *["a"] * 30]
    replies = dict(engine.generate(prompts, sampling))
    assert max(rows * columns for rows, columns in taken) <= 400
    assert max(rows for rows, _ in taken) > 10
    assert {reply.completion_tokens for reply in replies.values()} == {20}


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_model_that_computes_nan_says_so(temperature: float, make_model: Callable[[str], Path]) -> None:
    engine = TransformersEngine(make_model("gpt2"))
    engine.network.lm_head.weight.data[3] = float("nan")
    with pytest.raises(CptError, match=r"the model computes NaN: its weights hold NaN .* overflow in torch.float32"):
        list(engine.generate(["a"], Sampling(4, temperature=temperature)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_prompt_of_which_the_model_computes_nan_ends_no_other_reply(
    value: float, make_model: Callable[[str], Path]
) -> None:
    engine = TransformersEngine(make_model("llama"))
    alone = dict(engine.generate(["a"], Sampling(max_tokens=9)))[0]
    (token,) = set(engine.encode("Z")) - set(engine.encode(""))
    assert token not in engine.tokenizer(alone.text).input_ids
    engine.network.get_input_embeddings().weight.data[token] = value
    sound, broken = (Request(engine.encode(text), Sampling(max_tokens=9, temperature=each)) for text, each in
                     (("a", 0), ("Z", 1)))  # fmt: skip
    decoder = engine.decoder()
    pieces = decoder.add([sound, broken])
    assert (broken.finish_reason, pieces[1][1].text, "the model computes NaN" in str(broken.error)) == (
        "cancelled", "", True,
    )  # fmt: skip
    while decoder.rows:
        decoder.step()
    assert (sound.reply().text, sound.error) == (alone.text, None)
    with pytest.raises(CptError, match="the model computes NaN"):
        list(engine.stream("Z", Sampling(max_tokens=9)))


def test_repetition_penalty_and_min_tokens_are_transformers_own(engine: TransformersEngine) -> None:
    ids = torch.tensor([engine.encode(PROMPTS[1])])
    sampling = Sampling(max_tokens=30, repetition_penalty=1.7, min_tokens=25)
    ((_, reply),) = engine.generate([PROMPTS[1]], sampling)
    with torch.inference_mode():
        whole = engine.network.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, min_new_tokens=25, repetition_penalty=1.7,
            do_sample=False,
        )  # fmt: skip
    wanted = engine.tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
    assert reply.text.rstrip("\ufffd") == wanted.rstrip("\ufffd")
    assert reply.completion_tokens >= 25


@pytest.fixture(scope="module")
def byte_fallback() -> PreTrainedTokenizerFast:
    """Llama-2's and Gemma's form: what has no token of its own is written in tokens of single bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁a", "日", "▁日"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@given(st.lists(st.integers(3, 263), min_size=1, max_size=9), st.lists(st.integers(3, 263), max_size=12))
@settings(max_examples=300, deadline=None)
@example([35, 100, 116, 125], [75, 232, 49, 44, 166, 261])  # a wrong byte behind characters that were given already
def test_any_bytes_that_a_model_says_become_text(
    byte_fallback: PreTrainedTokenizerFast, prompt: list[int], reply: list[int]
) -> None:
    detokenizer = _Detokenizer(byte_fallback, prompt)
    texts = [detokenizer.step(token) for token in [*reply, 261]]  # a word's token ends whatever bytes there were
    assert texts[-1].endswith(" a")
    if all(token > 258 for token in reply) and prompt[-1] > 258:
        assert "".join(texts) == byte_fallback.decode([*reply, 261])


def test_a_reply_is_what_the_model_said(make_model: Callable[[str], Path], tmp_path: Path) -> None:
    """Not what transformers makes of it where the tokenizer asks for that, as Llama-3's does."""
    folder = Path(shutil.copytree(make_model("llama"), tmp_path / "model"))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"clean_up_tokenization_spaces": True}))
    tokenizer = TransformersEngine(folder).tokenizer
    assert tokenizer.decode(tokenizer("a , b .", add_special_tokens=False).input_ids) == "a , b ."


def test_bos_stands_once(engine: TransformersEngine) -> None:
    for prompt in ("abc", "<bos>abc", [{"role": "user", "content": "abc"}]):
        ids = engine.encode(prompt)  # type: ignore[arg-type]
        assert ids[0] == 0
        assert ids.count(0) == 1


@pytest.mark.parametrize(
    ("prompt", "sampling", "says"),
    [
        ("a" * 900, Sampling(max_tokens=10), r"^prompt 1, 'a{40}\.\.\.': the prompt .* the model's context is 256"),
        ("a", Sampling(max_tokens=300), r"the reply up to 300; the model's context is 256"),
        ([], Sampling(), "messages is empty"),
        ([{"role": "robot", "content": "a"}], Sampling(), r"messages\[0\] has the role 'robot'"),
        ([{"role": "user", "content": ["a"]}], Sampling(), r"messages\[0\] has content of type list"),
        ([{"role": "assistant", "content": "a"}], Sampling(), "the last message is the assistant's"),
        ("a\ud800", Sampling(), r"^prompt 1, 'a\\ud800': the prompt holds the lone surrogate U\+D800"),
        ([{"role": "user", "content": "\udcff"}], Sampling(), r"messages\[0\] holds the lone surrogate U\+DCFF"),
        ([1, 2], Sampling(), r"^prompt 1, \[1, 2\]: messages\[0\] is of type int; it must be a dict"),
        ({"role": "user", "content": "a"}, Sampling(), "a prompt is of type dict: give text, or a list of messages"),
        (b"a", Sampling(), "a prompt is of type bytes"),
        (5, Sampling(), "^prompt 1, 5: a prompt is of type int"),
    ],
)
def test_what_cannot_be_answered(engine: TransformersEngine, prompt: object, sampling: Sampling, says: str) -> None:
    with pytest.raises(CptError, match=says):
        list(engine.generate([prompt], sampling))  # type: ignore[list-item]


@pytest.mark.parametrize(
    "settings",
    [
        {"max_tokens": 0},
        {"temperature": -1},
        {"top_p": 0},
        {"top_k": -2},
        {"stop": ("",)},
        {"stop": ("a", "\udc00")},
        {"logprobs": 21},
        {"repetition_penalty": 1e-45},
    ],
)
def test_settings_out_of_range(settings: dict) -> None:
    with pytest.raises(CptError, match=next(iter(settings))):
        Sampling(**settings)


def test_messages_need_a_template(make_model: Callable[[str], Path], tmp_path: Path) -> None:
    import shutil

    shutil.copytree(make_model("llama"), tmp_path / "bare")
    (tmp_path / "bare" / "chat_template.jinja").unlink()
    engine = TransformersEngine(tmp_path / "bare")
    with pytest.raises(CptError, match="has no chat template"):
        engine.encode([{"role": "user", "content": "a"}])
    named = TransformersEngine(tmp_path / "bare", chat_template="{{ messages[0]['content'] }}")
    assert named.encode([{"role": "user", "content": "a"}]) == named.tokenizer("a", add_special_tokens=False).input_ids


def test_models_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(CptError, match=r"no model at meta-llama/Llama-3.1-8B; .* nemo-cpt download"):
        open_engine("meta-llama/Llama-3.1-8B")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(CptError, match=r"neither a Hugging Face folder.*it holds notes\.txt"):
        open_engine(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CptError, match="cannot be loaded by transformers"):
        open_engine(tmp_path)


@pytest.fixture
def checkpoint(make_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A NeMo checkpoint, whose exports go into a cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    import_hf(make_model("llama"), tmp_path / "nemo")
    return tmp_path / "nemo"


def test_a_nemo_checkpoint_is_exported_into_the_cache_once(
    make_model: Callable[[str], Path], checkpoint: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    folder = hugging_face_folder(checkpoint, say=said.append)
    assert hugging_face_folder(checkpoint, say=said.append) == folder
    assert [line.split()[0] for line in said] == ["exporting", "its"]
    replies = [
        [reply.text for _, reply in TransformersEngine(each).generate(PROMPTS[:1], Sampling(max_tokens=9))]
        for each in (folder, make_model("llama"))
    ]
    assert replies[0] == replies[1]
    import_hf(make_model("qwen2_tied"), tmp_path / "other")
    assert hugging_face_folder(tmp_path / "other") != folder


def test_an_export_in_the_cache_is_made_again_where_a_small_file_changed(checkpoint: Path, tmp_path: Path) -> None:
    """As where a warning says to add an end to generation_config.json, which is no weight."""
    before = hugging_face_folder(checkpoint)
    for name in ("context/nemo_tokenizer", "hf"):
        (checkpoint / name / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    after = hugging_face_folder(checkpoint)
    assert after != before
    assert end_ids(after) == [2, 7]
    shutil.move(checkpoint, tmp_path / "moved")
    assert hugging_face_folder(tmp_path / "moved") == after


def test_an_export_of_another_version_is_made_again(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = hugging_face_folder(checkpoint)
    monkeypatch.setattr("nemo_cpt.inference.models.__version__", "99")
    assert hugging_face_folder(checkpoint) != before


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("config.json", "max_position_embeddings", "256"),
        ("config.json", "eos_token_id", "<eos>"),
        ("generation_config.json", "eos_token_id", [1, "<eos>"]),
    ],
)
def test_a_field_of_another_type_is_named(
    name: str, field: str, value: object, make_model: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(make_model("llama"), tmp_path / "model"))
    if name == "config.json":
        (folder / "generation_config.json").unlink()
    (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | {field: value}))
    with pytest.raises(CptError, match=rf"{name}: {field} cannot be "):
        TransformersEngine(folder)


def test_a_prompt_with_a_token_that_the_model_has_no_row_for(make_model: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(make_model("llama"), tmp_path / "small")
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    network.resize_token_embeddings(300)
    network.save_pretrained(tmp_path / "small")
    engine = TransformersEngine(tmp_path / "small")
    text = next(each for each in PROMPTS if max(engine.encode(each)) >= 300)
    with pytest.raises(CptError, match=r"^prompt 2, .*: the prompt holds the token \d+, outside of 0 to 299"):
        list(engine.generate(["a", text], Sampling(max_tokens=4)))
    with pytest.raises(CptError, match=r"^document 2 holds the token \d+, outside of 0 to 299"):
        documents_loss(engine, ["a", text])
    with pytest.raises(CptError, match=r"^document 1 holds the lone surrogate U\+D800"):
        documents_loss(engine, ["\ud800"])


def test_a_model_that_lacks_weights_is_not_filled_with_random_ones(
    make_model: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(make_model("llama"), tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "layers.1.mlp" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    says = r"lacks 3 of its model's tensors \(model\.layers\.1\.mlp\.down_proj\.weight, .*\): make or fetch it again"
    with pytest.raises(CptError, match=says):
        open_engine(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_file_that_is_cut_short(name: str, make_model: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(make_model("llama"), tmp_path / "model"))
    (folder / name).write_bytes((folder / name).read_bytes()[:9000])
    with pytest.raises(CptError, match="cannot be loaded by transformers"):
        open_engine(folder)


def test_a_model_without_its_tokenizer(make_model: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(make_model("llama"), tmp_path / "model"))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CptError, match="holds no tokenizer"):
        open_engine(folder)


@pytest.mark.parametrize("device", ["gpu", "cuda:x"])
def test_a_device_that_is_none_is_named(device: str, tmp_path: Path) -> None:
    with pytest.raises(CptError, match=f"device is '{device}': give cpu, cuda"):
        TransformersEngine(tmp_path, device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_here_is_named(tmp_path: Path) -> None:
    with pytest.raises(CptError, match="PyTorch sees no GPU here"):
        TransformersEngine(tmp_path, device="cuda")
