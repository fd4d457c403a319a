"""Every mixture of parts that do not belong together is refused: bases, models, tokenizers, datasets, checkpoints."""

import contextlib
import importlib
import itertools
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import nemo_run as run
import pytest
from nemo.collections import llm
from nemo_run.core.serialization.yaml import YamlSerializer

from nemo_cpt import catalog, compatibility
from nemo_cpt.checkpoint import import_hf
from nemo_cpt.checkpoint.architecture import read_architecture
from nemo_cpt.checkpoint.context import RUN_JSON, write_context
from nemo_cpt.checkpoint.model_config import constants_of, constants_of_nemo
from nemo_cpt.checkpoint.weights_digest import BASE_WEIGHTS, weights_digest
from nemo_cpt.compatibility import (
    check_data,
    check_model,
    check_resumed,
    check_tokenizer,
    read_base,
)
from nemo_cpt.corpus import Blend, prepare
from nemo_cpt.doctor import Examination, Job, inputs
from nemo_cpt.errors import CptError
from nemo_cpt.launching import yaml_file
from nemo_cpt.launching.description import describe
from nemo_cpt.recipe_models import model_config, recipe_modules
from nemo_cpt.recipes import llama31_8b, parts, smollm2, tiny
from nemo_cpt.training import guards
from tests.support import small_models

# Of one size, so that nothing but their content tells them apart.
KIN: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("llama2", {"num_key_value_heads": 2}),
    "llama3": ("llama3", {}),
    "llama31": ("llama31", {"rms_norm_eps": 1e-5}),
    "llama32_tied": ("llama32", {"head_dim": 12, "rms_norm_eps": 1e-5}),
    "linear_rope": ("linear_rope", {}),
    "mistral": ("mistral", {"head_dim": 12}),
    "mistral_window": ("mistral_window", {"rope_theta": 1e6}),
    "qwen2": ("qwen2", {}),
    "qwen2_tied_padded": ("qwen25", {"vocab_size": 256}),
}


@pytest.fixture(scope="module")
def kin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `NAME` (NeMo), `NAME_hf` and `ds/NAME` for each of `KIN`, each with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("kin")
    texts = [" ".join(f"t{number}" for number in range(first, first + 40)) for first in range(5, 200, 5)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for number, (name, (shape, changes)) in enumerate(KIN.items()):
        hf = small_models.make(shape, folder / f"{name}_hf", **changes)
        permute_tokens(hf, seed=number)
        import_hf(hf, folder / name)
        prepare(folder / "text.jsonl", folder / "ds" / name, hf, workers=1, quiet=True)
    return folder


def permute_tokens(hf: Path, seed: int) -> None:
    """Give the ordinary tokens of a tokenizer other ids, the size and the special tokens staying what they are."""
    path = hf / "tokenizer.json"
    content = json.loads(path.read_text())
    words = [word for word, number in content["model"]["vocab"].items() if number >= 5]
    content["model"]["vocab"] |= dict(zip(random.Random(seed).sample(words, len(words)), range(5, 250), strict=True))
    content["model"]["vocab"] |= {"Hello": content["model"]["vocab"].pop(f"t{100 + seed}")}  # so that a probe is known
    path.write_text(json.dumps(content))


def test_of_all_mixtures_of_base_model_and_data_only_the_right_ones_pass(kin: Path) -> None:
    bases = {name: read_base(kin / name) for name in KIN}
    models = {name: parts.model_like(str(kin / name), seq_length=64).config for name in KIN}
    passed = set()
    for base, model, data in itertools.product(KIN, repeat=3):
        with contextlib.suppress(CptError):
            assert compatibility.check(bases[base], models[model], None, [str(kin / "ds" / data)]) == []
            passed.add((base, model, data))
    assert passed == {(name, name, name) for name in KIN}


def test_of_all_mixtures_of_checkpoint_and_model_only_the_right_ones_are_resumed(kin: Path, tmp_path: Path) -> None:
    models = {name: parts.model_like(str(kin / name), seq_length=64).config for name in KIN}
    for checkpoint in KIN:
        trained = as_a_checkpoint(kin / checkpoint, tmp_path / checkpoint)
        for model in KIN:
            if model == checkpoint:
                check_resumed(trained, kin / model, models[model])
                continue
            with pytest.raises(CptError, match=r"was trained as another model .* or give the run another name"):
                check_resumed(trained, kin / model, models[model])


def as_a_checkpoint(base: Path, dest: Path) -> Path:
    """What a training leaves of its base: weights, and a context that carries the small files."""
    shutil.copytree(base, dest, ignore=shutil.ignore_patterns("hf"))
    return dest


@pytest.mark.parametrize("name", KIN)
def test_the_model_that_a_base_describes_is_the_bases(kin: Path, name: str) -> None:
    made = parts.model_like(str(kin / name), seq_length=64)
    stated, wanted = constants_of_nemo(made.config), constants_of(read_architecture(kin / f"{name}_hf"))
    rows = {"vocab_size"}  # which a class of NeMo's may have of another model; the job sets the base's
    assert {name: stated[name] for name in wanted.keys() - rows} == {
        name: wanted[name] for name in wanted.keys() - rows
    }
    assert made.config.seq_length == 64
    check_model(read_base(kin / name), made.config)


def test_what_the_source_of_a_recipe_says_of_its_model_is_what_it_makes() -> None:
    assert {"llama31_8b", "llama31_70b", "qwen3_8b", "mistral_7b", "smollm2", "tiny"} < {
        path.stem for path in recipe_modules()
    }
    for path in recipe_modules():
        made = importlib.import_module(f"nemo_cpt.recipes.{path.stem}").model()
        assert constants_of_nemo(model_config(path)) == constants_of_nemo(made.config)


@pytest.fixture(scope="module")
def smollm2_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of SmolLM2-135M's config.json, without its weights."""
    return small_models.describe(
        "smollm2", tmp_path_factory.mktemp("smollm2"), hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, vocab_size=49152, rms_norm_eps=1e-5,
    )  # fmt: skip


def test_a_135m_base_for_the_8b_recipe_is_refused_everywhere_in_the_same_words(smollm2_base: Path) -> None:
    words = (
        rf"the recipe's model is not that of its base {smollm2_base}, num_hidden_layers \(NeMo: num_layers\) is 32 in "
        r"the recipe and 30 in the base; hidden_size is 4096 in the recipe and 576 in the base; .* run smollm2, whose"
    )
    for recipe in (llama31_8b.continual_pretrain, llama31_8b.continual_pretrain_single_gpu):
        with pytest.raises(CptError, match=words):
            recipe(str(smollm2_base))
    made = llama31_8b.continual_pretrain()
    made.resume.base = str(smollm2_base)
    with pytest.raises(CptError, match=words):
        guards.check_belonging(made)
    (module,) = (path for path in recipe_modules() if path.stem == "llama31_8b")
    found = inputs.base(Examination(Job("r", base=str(smollm2_base), model=model_config(module))))
    assert found.state == "error"
    assert made_of(found) == message_of(lambda: guards.check_belonging(made))
    smollm2.continual_pretrain(str(smollm2_base))


def made_of(finding: Any) -> str:
    return f"{finding.found}: {finding.cure}"


def test_a_recipe_takes_its_bases_shape_also_by_a_word(kin: Path) -> None:
    """As a command line can say it, where the recipe's own model is another one: what the refusal advises."""
    base, data = str(kin / "qwen2"), Blend(train={str(kin / "ds" / "qwen2"): 1.0})
    with pytest.raises(CptError, match="give model=base, which takes the base's shape"):
        llama31_8b.continual_pretrain(base, data, seq_length=64)
    arguments = catalog.parse(catalog.recipe("llama31_8b"), [f"base={base}", "model=base", "seq_length=64"])
    made = llama31_8b.continual_pretrain(**arguments, data=data)
    assert made.model == parts.fused(parts.model_like(base, 64))
    told = describe(catalog.recipe("llama31_8b"), arguments, [], "local", [])
    check_model(read_base(base), told.model)
    changed = describe(catalog.recipe("llama31_8b"), arguments, ["model.config.num_layers=7"], "local", [])
    with pytest.raises(CptError, match=r"num_hidden_layers .* is 7 in the recipe"):
        check_model(read_base(base), changed.model)
    with pytest.raises(CptError, match="model=bsae: give base, for the base's own shape, or one of llama31_70b, "):
        describe(catalog.recipe("llama31_8b"), arguments | {"model": "bsae"}, [], "local", [])
    named = smollm2.model(64)
    del named.config.vocab_size  # which a base that is here says
    assert parts.model_of("smollm2", base, 64) == named


def message_of(action: Any) -> str:
    with pytest.raises(CptError) as caught:
        action()
    return str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "name"),
    [
        ("rotary_base", 5e6, "rope_theta"),
        ("scale_factor", 32.0, "rope_scaling"),
        ("layernorm_epsilon", 1e-6, "rms_norm_eps"),
        ("window_size", (63, 0), "sliding_window"),
    ],
)
def test_a_constant_is_changed_on_purpose_or_not_at_all(
    kin: Path, tmp_path: Path, field: str, value: Any, name: str
) -> None:
    kind = "mistral" if name == "sliding_window" else "llama31"
    base, data = str(kin / kind), Blend(train={str(kin / "ds" / kind): 1.0})
    made = tiny.continual_pretrain(base, data, model=parts.model_like(base, 64), seq_length=64)
    setattr(made.model.config, field, value)
    with pytest.raises(CptError, match=rf"{name} \(NeMo: .*; if the change is meant, .* unlike_base=\['{name}'\]"):
        guards.check(made)
    made = tiny.continual_pretrain(base, data, model=parts.model_like(base, 64), seq_length=64, unlike_base=[name])
    setattr(made.model.config, field, value)
    guards.check(made)
    (tmp_path / "recipe.yaml").write_text(YamlSerializer().serialize(made))
    guards.check(yaml_file.load(tmp_path / "recipe.yaml"))
    made.model.config.kv_channels = 24
    with pytest.raises(CptError, match=r"head_dim \(NeMo: kv_channels\) is 24 in the recipe and 12 in the base: give"):
        guards.check(made)


def test_numbers_that_fp32_does_not_tell_apart_are_one(kin: Path) -> None:
    """As a GGUF file has 1e-5."""
    made = parts.model_like(str(kin / "llama31"), seq_length=64).config
    made.layernorm_epsilon = 9.999999747378752e-06
    check_model(read_base(kin / "llama31"), made)
    made.layernorm_epsilon = 1.00001e-05
    with pytest.raises(CptError, match="rms_norm_eps"):
        check_model(read_base(kin / "llama31"), made)


def test_what_cannot_be_exported_cannot_be_meant(kin: Path) -> None:
    made = parts.model_like(str(kin / "llama31"), seq_length=64).config
    made.window_size = (63, 0)
    with pytest.raises(CptError, match=r"sliding_window .* is 64 in the recipe and none .*: give model=[^;]*$"):
        check_model(read_base(kin / "llama31"), made)
    with pytest.raises(CptError, match=r"no config\.json of model_type llama can say that: the run could not be exp"):
        check_model(read_base(kin / "llama31"), made, ["sliding_window"])


def test_what_cannot_be_changed_cannot_be_meant(kin: Path) -> None:
    with pytest.raises(CptError, match="unlike_base names head_dim: what can be changed is rope_theta, rope_scaling"):
        check_model(read_base(kin / "llama3"), None, ["head_dim"])


def test_a_model_of_another_kind_is_refused(kin: Path) -> None:
    with pytest.raises(
        CptError, match=r"model is nemo\.collections\.llm\.gpt\.model\.gemma\.GemmaConfig2B in the recipe"
    ):
        check_model(read_base(kin / "llama3"), run.Config(llm.GemmaConfig2B))


def test_an_import_that_is_not_its_config_json_is_refused(kin: Path, tmp_path: Path) -> None:
    """As 0.1.0 imported Mistral: a window that config.json does not have."""
    shutil.copytree(kin / "mistral_window", tmp_path / "base")
    config = json.loads((tmp_path / "base/hf/config.json").read_text()) | {"sliding_window": None}
    (tmp_path / "base/hf/config.json").write_text(json.dumps(config))
    with pytest.raises(
        CptError, match=r"sliding_window .* is 8 in its context and none in config\.json: import it again"
    ):
        read_base(tmp_path / "base")


def test_a_checkpoint_as_base_is_what_it_was_trained_as(kin: Path, tmp_path: Path) -> None:
    trained = as_a_checkpoint(kin / "llama3", tmp_path / "trained")
    folder = tmp_path / "other"
    write_context(folder, replace(read_base(kin / "llama3").architecture, rope_theta=5e6), kin / "llama3_hf")
    shutil.copy(folder / "io.json", trained / "context/io.json")
    longer = parts.model_like(str(trained), seq_length=64)
    assert longer.config.rotary_base == 5e6
    check_model(read_base(trained), longer.config)
    with pytest.raises(CptError, match="rope_theta"):
        check_model(read_base(trained), parts.model_like(str(kin / "llama3"), 64).config)


class TestTokenizers:
    def test_of_one_size_are_not_one(self, kin: Path) -> None:
        base = read_base(kin / "llama3")
        with pytest.raises(CptError, match=r"llama2_hf is not that of the base, .*\(.Hello.* begins with the ids"):
            check_tokenizer(base, str(kin / "llama2_hf"))
        assert check_tokenizer(base, str(kin / "llama3_hf")) == check_tokenizer(base, None) == []

    def test_that_are_not_here_are_not_silently_right(self, kin: Path) -> None:
        (warning,) = check_tokenizer(read_base(kin / "llama3"), "meta-llama/Llama-3.1-8B")
        assert "meta-llama/Llama-3.1-8B is no folder here: it is not compared" in warning

    @pytest.mark.parametrize(
        ("words", "special", "difference"),
        [
            ({"one_more": 250}, 1, "250 tokens against 251"),
            ({"t1": 9}, 9, "'t1' is 1 against 9"),
            ({"Hello": 7}, 1, "Hello, .* begins with the ids"),
        ],
    )
    def test_that_differ_a_little_differ(
        self, kin: Path, tmp_path: Path, words: dict[str, int], special: int, difference: str
    ) -> None:
        shutil.copytree(kin / "llama3_hf", tmp_path / "hf")
        content = json.loads((tmp_path / "hf/tokenizer.json").read_text())
        content["model"]["vocab"] |= words
        content["added_tokens"][1]["id"] = special
        (tmp_path / "hf/tokenizer.json").write_text(json.dumps(content))
        settings = json.loads((tmp_path / "hf/tokenizer_config.json").read_text())
        del settings["added_tokens_decoder"]
        (tmp_path / "hf/tokenizer_config.json").write_text(json.dumps(settings))
        other = replace(read_base(kin / "llama3"), tokenizer=tmp_path / "hf")
        with pytest.raises(CptError, match=f"ds/llama3 was made with the tokenizer .* not the base's .*{difference}"):
            check_data(other, [str(kin / "ds/llama3")])

    def test_of_other_settings_are_known_by_their_ids(self, kin: Path, tmp_path: Path) -> None:
        shutil.copytree(kin / "llama3_hf", tmp_path / "hf")
        path = tmp_path / "hf/tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": "{{ messages }}"}))
        other = replace(read_base(kin / "llama3"), tokenizer=tmp_path / "hf")
        assert check_data(other, [str(kin / "ds/llama3")]) == []


class TestData:
    @pytest.fixture
    def copy(self, kin: Path, tmp_path: Path) -> Path:
        """A dataset of llama3's, to be changed."""
        for end in (".bin", ".idx", ".json"):
            shutil.copy(kin / f"ds/llama3_text_document{end}", tmp_path / f"x_text_document{end}")
        return tmp_path / "x"

    def edit(self, copy: Path, *removed: str, **changed: Any) -> None:
        path = Path(f"{copy}_text_document.json")
        manifest = json.loads(path.read_text()) | changed
        path.write_text(json.dumps({name: value for name, value in manifest.items() if name not in removed}))

    def test_of_an_older_version_are_compared_as_far_as_they_can_be(self, kin: Path, copy: Path) -> None:
        self.edit(copy, "probes", "largest")
        assert check_data(read_base(kin / "llama3"), [str(copy)]) == []
        (warning,) = check_data(read_base(kin / "llama2"), [str(copy)])
        assert "its manifest, of an older version, cannot tell whether the ids are the same" in warning
        tokenizer = json.loads(Path(f"{copy}_text_document.json").read_text())["tokenizer"]
        self.edit(copy, tokenizer=tokenizer | {"vocabulary_size": 200})
        with pytest.raises(CptError, match="200 tokens against 250"):
            check_data(read_base(kin / "llama2"), [str(copy)])

    def test_without_a_manifest_are_said_to_be_unknown(self, kin: Path, copy: Path) -> None:
        Path(f"{copy}_text_document.json").unlink()
        (warning,) = check_data(read_base(kin / "llama3"), [str(copy)])
        assert "no one knows which tokenizer made it" in warning

    def test_replaced_by_hand_are_not_what_their_manifest_says(self, kin: Path, copy: Path) -> None:
        self.edit(copy, tokens=7)
        with pytest.raises(CptError, match=r"its manifest tells of 39 and 7: remove .*x_text_document\.json"):
            check_data(read_base(kin / "llama3"), [str(copy)])

    def test_with_ids_beyond_the_rows(self, kin: Path, copy: Path) -> None:
        self.edit(copy, largest=255)
        padded = read_base(kin / "qwen2_tied_padded")
        check_data(replace(padded, tokenizer=kin / "llama3_hf"), [str(copy)])
        with pytest.raises(CptError, match="holds the token id 255, but the base has 250 rows"):
            check_data(read_base(kin / "llama3"), [str(copy)])

    @pytest.mark.parametrize(
        ("eod", "message"),
        [
            (["t1", 1], r"end with 't1' \(1\), but .* with 2 or 3 or 4 .*, with which texts begin there: .*--eod"),
            (["t9", 9], r"end with 't9' \(9\), but .*config.json\): prepare it again"),
        ],
    )  # fmt: skip
    def test_with_another_end_of_document(self, kin: Path, copy: Path, eod: Any, message: str) -> None:
        self.edit(copy, markers={"eod": eod, "bos": None})
        base = read_base(kin / "llama3")
        with pytest.raises(CptError, match=message):
            check_data(base, [str(copy)])
        assert check_data(base, [str(copy)], unlike_base=["eos_token_id"]) == []

    def test_with_one_of_several_ends_or_none(self, kin: Path, copy: Path) -> None:
        base = read_base(kin / "llama3")
        self.edit(copy, markers={"eod": ["t4", 4], "bos": None})
        assert check_data(base, [str(copy)]) == []
        self.edit(copy, markers={"eod": None, "bos": None})
        (warning,) = check_data(base, [str(copy)])
        assert "no end-of-document tokens" in warning

    def test_where_begin_and_end_are_one_token(self, kin: Path, copy: Path) -> None:
        """As of SmolLM2's and Qwen2.5's bases, whose texts end and begin with <|endoftext|>."""
        base = read_base(kin / "llama3")
        base = replace(base, ends=frozenset([1]), config=dict(base.config) | {"bos_token_id": 1})
        self.edit(copy, markers={"eod": ["t1", 1], "bos": None})
        assert check_data(base, [str(copy)]) == []


def test_a_base_without_config_json_is_compared_by_its_context(kin: Path, tmp_path: Path) -> None:
    """As NeMo's own importer leaves it."""
    shutil.copytree(kin / "llama31", tmp_path / "base", ignore=shutil.ignore_patterns("hf", "config.json"))
    base = read_base(tmp_path / "base")
    assert (base.config, base.rows) == ({}, 250)
    check_model(base, parts.model_like(str(kin / "llama31"), 64).config)
    with pytest.raises(CptError, match="rope_scaling"):
        check_model(base, parts.model_like(str(kin / "llama3"), 64).config)
    with pytest.raises(
        CptError, match=r"carries no config\.json of Llama, Mistral, Qwen or GPT-2: write its model= by hand"
    ):
        parts.model_like(str(tmp_path / "base"), 64)


def test_a_base_that_does_not_say_what_it_is_is_said_to_be_unknown(kin: Path, tmp_path: Path) -> None:
    shutil.copytree(kin / "llama31", tmp_path / "base", ignore=shutil.ignore_patterns("hf", "context"))
    (warning,) = check_model(read_base(tmp_path / "base"), parts.model_like(str(kin / "llama3"), 64).config)
    assert "does not say what model it is" in warning
    assert read_base(tmp_path / "base").rows == 250


def test_a_run_of_too_few_rows_is_not_resumed(kin: Path, tmp_path: Path) -> None:
    trained = as_a_checkpoint(kin / "qwen2", tmp_path / "trained")
    for path in trained.glob("context/*/config.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 300}))
    with pytest.raises(CptError, match=r"was trained with 250 of the 300 rows of its base .* under another name"):
        check_resumed(trained, None)


def test_a_run_is_resumed_with_the_base_that_it_began_with_wherever_that_is(kin: Path, tmp_path: Path) -> None:
    base, trained = shutil.copytree(kin / "llama3", tmp_path / "base"), as_a_checkpoint(kin / "llama3", tmp_path / "t")
    (trained / RUN_JSON).write_text(json.dumps({BASE_WEIGHTS: weights_digest(base)}))
    import_hf(kin / "llama3_hf", tmp_path / "again")
    import_hf(small_models.make("llama3", tmp_path / "other_hf", seed=1), tmp_path / "other")
    for named in (base, tmp_path / "again", tmp_path / "gone", None):
        check_resumed(trained, named)
    with pytest.raises(CptError, match=r"another base's than .*other up to .*, which has other weights: name"):
        check_resumed(trained, tmp_path / "other")
    # Adapters are added to the weights that they record: another model may stand there by now.
    (trained / "weights/adapter_metadata.json").write_text(json.dumps({"model_ckpt_path": str(base)}))
    check_resumed(trained, base)
    shutil.rmtree(base)
    check_resumed(trained, tmp_path / "again")
    (tmp_path / "other").rename(base)
    for named in (base, tmp_path / "again", None):
        with pytest.raises(CptError, match=r"another base's than .*base up to .*, which has other weights: name"):
            check_resumed(trained, named)


def test_trainings_of_one_base_are_told_apart_by_their_files(kin: Path, tmp_path: Path) -> None:
    one, two = (as_a_checkpoint(kin / "llama3", tmp_path / name) for name in ("one", "two"))
    assert weights_digest(one) == weights_digest(two) != weights_digest(kin / "llama3")
    changed = next(two.glob("weights/*.distcp"))
    changed.write_bytes(changed.read_bytes()[:-1] + b"x")
    assert weights_digest(one) != weights_digest(two)


def test_adapters_are_resumed_on_their_own_base_only(kin: Path, tmp_path: Path) -> None:
    shutil.copytree(kin / "llama3", tmp_path / "base")
    trained = as_a_checkpoint(kin / "llama3", tmp_path / "trained")
    record = trained / "weights/adapter_metadata.json"
    record.write_text(json.dumps({"model_ckpt_path": str(tmp_path / "base")}))
    shutil.copytree(tmp_path / "base", tmp_path / "copy")
    hf = small_models.make("llama3", tmp_path / "other_hf", seed=1)
    import_hf(hf, tmp_path / "other")
    for _ in ("by the imports' sums", "by samples of the files"):
        for base in (tmp_path / "base", tmp_path / "copy", tmp_path / "gone", None):
            check_resumed(trained, base)
        with pytest.raises(CptError, match=r"another base.s than .*other up to .*, which has other weights: name"):
            check_resumed(trained, tmp_path / "other")
        for sums in tmp_path.glob("*/hf/.weights.json"):
            sums.unlink()
    with pytest.raises(CptError, match=r"another base's than .*qwen2 up to .*attention_bias .* is False in the check"):
        check_resumed(trained, kin / "qwen2")
    with pytest.raises(
        CptError, match=r"holds a run.s adapters \(LoRA or DoRA\), not a model: merge them with `nemo-cpt merge"
    ):
        guards.check_base(trained)
