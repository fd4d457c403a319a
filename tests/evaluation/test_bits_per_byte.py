"""Loss and bits per byte: an oracle's, lm-evaluation-harness', and what is refused."""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from nemo_cpt.errors import CptError
from nemo_cpt.evaluation import bits_per_byte
from nemo_cpt.evaluation.bits_per_byte import documents_loss, rolling_windows, sequences_loss
from nemo_cpt.inference.transformers_engine import TransformersEngine


@pytest.fixture(scope="module")
def engine(world: Path) -> TransformersEngine:
    return TransformersEngine(world / "base_hf", device="cpu")


# get_rolling_token_windows of EleutherAI's lm-evaluation-harness 0.4.13, lm_eval/utils.py (MIT)
def harness_windows(
    token_list: list[int], prefix_token: int, max_seq_len: int, context_len: int
) -> Iterator[tuple[list[int], list[int]]]:
    assert 1 <= context_len <= max_seq_len
    if not token_list:
        return
    pred_len = max_seq_len - context_len + 1
    predicted = 0
    first_seq_len = min(max_seq_len, len(token_list))
    yield [prefix_token, *token_list[: first_seq_len - 1]], token_list[:first_seq_len]
    predicted += first_seq_len
    while predicted < len(token_list):
        window_pred_len = min(len(token_list) - predicted, pred_len)
        window_end = predicted + window_pred_len
        yield (
            token_list[window_end - max_seq_len - 1 : window_end - 1],
            token_list[window_end - window_pred_len : window_end],
        )
        predicted += window_pred_len


def test_the_windows_are_the_harness() -> None:
    for length in range(30):
        for window in (1, 2, 5, 8, 40):
            for overlap in range(1, window + 1):
                ids = list(range(100, 100 + length))
                ours = list(rolling_windows(ids, 7, window, overlap))
                assert ours == list(harness_windows(ids, 7, window, overlap))


@pytest.mark.parametrize(("window", "overlap"), [(16, 1), (64, 1), (64, 40), (512, 1)])
def test_documents_have_the_harness_log_likelihood(
    engine: TransformersEngine, documents: list[str], window: int, overlap: int
) -> None:
    texts = [*documents[:3], "", "x", documents[3]]
    found = documents_loss(engine, texts, window=window, overlap=overlap)
    wanted = [_harness_nats(engine, text, window, overlap) for text in texts]
    assert found.nats == pytest.approx(wanted, abs=1e-4 * max(wanted))
    assert found.bytes == [len(text.encode()) for text in texts]
    assert found.bits_per_byte == pytest.approx(sum(wanted) / math.log(2) / sum(found.bytes), rel=1e-5)
    assert found.first_token == "<|begin_of_text|> (0), once before each document"


@torch.inference_mode()
def _harness_nats(engine: TransformersEngine, text: str, window: int, overlap: int) -> float:
    ids = engine.tokenizer.encode(text, add_special_tokens=False)
    total = 0.0
    for given, predicted in harness_windows(ids, engine.tokenizer.bos_token_id, window, overlap):
        logprobs = engine.network(torch.tensor([given])).logits[0].log_softmax(-1)[-len(predicted) :]
        total -= logprobs[range(len(predicted)), predicted].sum().item()
    return total


def test_lm_eval_itself_finds_the_same(engine: TransformersEngine, world: Path, documents: list[str]) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install '.[eval]'")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    # Left to itself, version 0.4.13 puts the tokenizer's own BOS behind the one that its windows begin with.
    harness = HFLM(
        pretrained=str(world / "base_hf"), device="cpu", dtype="float32", batch_size=1, max_length=64,
        add_bos_token=False,
    )  # fmt: skip
    requests = [
        Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=0) for text in documents[:3]
    ]
    wanted = [-value for value in harness.loglikelihood_rolling(requests, disable_tqdm=True)]
    found = documents_loss(engine, documents[:3], window=64)
    assert [value / size for value, size in zip(found.nats, found.bytes, strict=True)] == pytest.approx(
        [value / len(text.encode()) for value, text in zip(wanted, documents[:3], strict=True)], abs=1e-4
    )


def test_batches_change_nothing_and_hold_little(
    engine: TransformersEngine, documents: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = documents_loss(engine, documents, window=48)
    monkeypatch.setattr(bits_per_byte, "MOST_TOKENS", 100)
    monkeypatch.setattr(bits_per_byte, "SORTED_WINDOWS", 5)
    assert documents_loss(engine, iter(documents), window=48).nats == pytest.approx(whole.nats, rel=1e-5)


def test_the_bytes_of_sequences_are_those_of_the_documents(
    engine: TransformersEngine, world: Path, documents: list[str]
) -> None:
    """Every label but the first document's first token: sequences of one token go through the whole text."""
    found = sequences_loss(engine, world / "ds/ja_validation", seq_length=1)
    assert 0 < len("".join(documents).encode()) - sum(found.bytes) <= 4
    assert found.unit == "sequence"
    assert "no BOS token" in found.first_token


def sentencepiece_like(folder: Path, texts: list[str], world: Path) -> Path:
    """A model with a tokenizer that puts a blank before a text and falls back to bytes, as Llama 2's."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=special, limit_alphabet=80)
    tokenizer.train_from_iterator(texts, trainer)
    saved = json.loads(tokenizer.to_str())
    saved["added_tokens"] = [each for each in saved["added_tokens"] if each["id"] < 3]  # bytes are ordinary tokens
    tokenizer = Tokenizer.from_str(json.dumps(saved))
    AutoModelForCausalLM.from_pretrained(world / "base_hf").save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


def test_bytes_of_a_tokenizer_that_prepends_a_blank(world: Path, tmp_path: Path, documents: list[str]) -> None:
    from nemo_cpt.evaluation.bits_per_byte import ByteCounter

    # A letter of Maltese, which spells the byte of a blank elsewhere.
    folder = sentencepiece_like(tmp_path / "model", [*documents, "Ġ" * 500], world)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert "Ġ" in tokenizer.get_vocab()
    counter = ByteCounter(tokenizer)
    for text in ("日本語 and English, 🍣 too", documents[0]):
        ids = tokenizer.encode(text, add_special_tokens=False)
        row = torch.tensor([[tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]])
        tokens, labels = row[:, :-1], row[:, 1:]
        assert counter(tokens, labels, torch.ones_like(labels, dtype=torch.bool)) == [len(text.encode())]


def test_bytes_of_a_tokenizer_whose_special_tokens_hold_sentencepieces_blank(world: Path, documents: list[str]) -> None:
    """As DeepSeek's, whose distilled Llamas and Qwens are byte-level."""
    tokenizer = AutoTokenizer.from_pretrained(world / "base_hf")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<｜begin▁of▁sentence｜>"]})
    ids = torch.tensor([tokenizer(documents[0], add_special_tokens=False).input_ids])
    assert bits_per_byte.ByteCounter(tokenizer)(ids, ids, torch.ones_like(ids).bool()) == [len(documents[0].encode())]


def test_a_tokenizer_that_hides_its_bytes_is_refused(world: Path, tmp_path: Path, documents: list[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(world / "base_hf")
    tokenizer.backend_tokenizer.decoder = decoders.Sequence(
        [tokenizer.backend_tokenizer.decoder, decoders.Replace("a", "")]
    )
    with pytest.raises(CptError, match=r"are counted wrong\): give the text itself"):
        bits_per_byte.ByteCounter(tokenizer)


def test_a_model_that_computes_nan_is_named(world: Path, documents: list[str]) -> None:
    """A loss of NaN would be kept as null, on which the next run of the same evaluation broke."""
    engine = TransformersEngine(world / "base_hf", device="cpu")
    engine.network.lm_head.weight.data[5] = float("nan")
    with pytest.raises(CptError, match=r"base_hf is not finite: its weights hold NaN"):
        documents_loss(engine, documents[:1])
    with pytest.raises(CptError, match=r"base_hf is not finite: its weights hold NaN"):
        sequences_loss(engine, world / "ds/ja_validation", seq_length=16, samples=1)


def test_a_document_that_brings_its_bos_along(engine: TransformersEngine) -> None:
    with pytest.raises(CptError, match=r"document 2 begins with '<\|begin_of_text\|>', which every document is given"):
        documents_loss(engine, ["ok", "<|begin_of_text|>Two of them"])


def test_a_dataset_with_two_bos(world: Path, tmp_path: Path) -> None:
    from nemo_cpt.corpus import prepare

    (tmp_path / "twice.jsonl").write_text('{"text": "<|begin_of_text|>Hello, how are you today?"}\n' * 8)
    prepare(tmp_path / "twice.jsonl", tmp_path / "twice", world / "base_hf", prepend_bos=True, workers=1, quiet=True)
    with pytest.raises(CptError, match=r"begin with '<\|begin_of_text\|>' \(0\) twice"):
        sequences_loss(TransformersEngine(world / "base_hf", device="cpu"), tmp_path / "twice", seq_length=16)


def test_text_of_another_tokenizer(world: Path, tmp_path: Path) -> None:
    model, tokenizer = (each.from_pretrained(world / "base_hf") for each in (AutoModelForCausalLM, AutoTokenizer))
    model.save_pretrained(tmp_path)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(CptError, match=r"which is not the base's \(512 tokens against 513\)"):
        sequences_loss(TransformersEngine(tmp_path, device="cpu"), world / "ds/ja_validation", seq_length=64)


def test_an_id_beyond_the_rows(world: Path, tmp_path: Path) -> None:
    for end in (".idx", ".bin"):  # without a manifest that would know of it
        shutil.copy(world / f"ds/ja_validation_text_document{end}", tmp_path / f"ja_text_document{end}")
    model = AutoModelForCausalLM.from_pretrained(world / "base_hf")
    model.resize_token_embeddings(300)
    model.save_pretrained(tmp_path / "hf")
    for path in (world / "base_hf").glob("*token*"):
        shutil.copy(path, tmp_path / "hf")
    with pytest.raises(CptError, match=r"holds the token id \d+, but the base has 300 rows"):
        sequences_loss(TransformersEngine(tmp_path / "hf", device="cpu"), tmp_path / "ja", seq_length=64)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"seq_length": 0, "samples": 2}, "seq_length 0"),
        ({"seq_length": 64, "samples": 0}, "samples 0"),
        ({"seq_length": 10**6, "samples": 2}, r"1,000,000 tokens of a sequence do not fit .* whose context is"),
        ({"seq_length": 10**6}, "not enough for one sequence of 1,000,000"),
    ],
)
def test_numbers_that_cannot_be(engine: TransformersEngine, world: Path, numbers: dict[str, Any], message: str) -> None:
    with pytest.raises(CptError, match=message):
        sequences_loss(engine, world / "ds/ja_validation", **numbers)


@pytest.mark.parametrize("numbers", [{"window": 0}, {"window": 10**6}, {"window": 8, "overlap": 9}, {"overlap": 0}])
def test_windows_that_cannot_be(engine: TransformersEngine, numbers: dict[str, int]) -> None:
    with pytest.raises(CptError, match=r"window|context"):
        documents_loss(engine, ["text"], **numbers)


def test_nothing_to_measure(engine: TransformersEngine) -> None:
    with pytest.raises(CptError, match="2 documents, none with a token"):
        documents_loss(engine, ["", ""])
