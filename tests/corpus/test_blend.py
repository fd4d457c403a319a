"""Blends: their form, their arithmetic, and what Megatron makes of them."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from nemo_cpt.conversations import Conversations
from nemo_cpt.corpus import Blend, prepare, presets, read_index
from nemo_cpt.errors import CptError
from tests.support.corpus_helpers import write_jsonl, write_reference


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory, texts: list[str], small: Path) -> dict[str, str]:
    """Datasets `ja` (twice the documents), `en` and `val`, by the prefix that `prepare` would have been given."""
    folder = tmp_path_factory.mktemp("sets")
    parts = {"ja": texts[:60], "en": texts[60:90], "val": texts[90:95]}
    for name, part in parts.items():
        write_reference(folder / f"{name}_text_document", part, small)
    return {name: str(folder / name) for name in parts}


def test_paths_are_what_megatron_reads(sets: dict[str, str]) -> None:
    from megatron.core.datasets.utils import get_blend_from_list

    blend = Blend.replay(sets["ja"], sets["en"] + "_text_document", share=0.25, validation={"ja": sets["val"]})
    blend.check()
    prefixes, weights = get_blend_from_list([str(item) for item in blend.paths()])
    assert prefixes == [sets["ja"] + "_text_document", sets["en"] + "_text_document"]
    assert weights == [0.75, 0.25]
    assert blend.validation_paths() == {"ja": sets["val"] + "_text_document"}


def test_weights_by_tokens_and_documents(sets: dict[str, str]) -> None:
    tokens = {name: read_index(prefix).tokens for name, prefix in sets.items()}
    train = {sets["ja"]: 1.0, sets["en"]: 2.0}
    by_tokens = Blend(train=train, weighting="tokens").shares()[sets["en"] + "_text_document"]
    assert by_tokens == pytest.approx(2 * tokens["en"] / (tokens["ja"] + 2 * tokens["en"]))
    assert list(Blend(train=train, weighting="documents").shares().values()) == pytest.approx([0.5, 0.5])
    assert list(Blend(train=train).shares().values()) == pytest.approx([1 / 3, 2 / 3])


def test_report_counts_epochs_and_steps(sets: dict[str, str]) -> None:
    blend = Blend.replay(sets["ja"], sets["en"], share=0.5, validation={"ja": sets["val"]})
    tokens = blend.tokens()
    smallest = min(tokens.values())
    steps = blend.steps(global_batch_size=4, seq_length=64)
    assert steps == 2 * (smallest - 1) // (4 * 64)
    report = blend.report(4, 64)
    assert (report.steps, report.train_tokens) == (steps, steps * 4 * 64)
    assert max(entry["epochs"] for entry in report.sets) == pytest.approx(1, abs=0.02)
    assert {entry["dtype"] for entry in report.sets} == {"uint16"}
    assert report.warnings == []
    many = blend.report(4, 64, steps=5 * steps)
    assert [warning for warning in many.warnings if "times; beyond 4 epochs" in warning]
    with pytest.raises(CptError, match="less than one step of 4096 x 8192"):
        blend.steps(4096, 8192)


def test_steps_leave_the_last_token_to_be_predicted(sets: dict[str, str]) -> None:
    """Megatron would begin a second pass for the label of the last sequence, and draw an order of both."""
    (tokens,) = (alone := Blend(train={sets["en"]: 1.0})).tokens().values()
    assert alone.steps(1, tokens - 1) == 1
    with pytest.raises(CptError, match="less than one step"):
        alone.steps(1, tokens)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            dict(train="{train:[1.0,ds/ja],validation:[ds/val]}"),
            r"a dictionary written as a string.*Blend\(train=\{'ds/ja'",
        ),
        (dict(train="ds/ja"), "train is a string, 'ds/ja'"),
        (dict(train=["ds/ja"]), r"train is a list, "),
        (dict(train={}), "no training data"),
        (dict(train={"ds/ja": 0}), "weight of 'ds/ja' in the blend is 0; it must be a positive"),
        (dict(train={"ds/ja": float("nan")}), "is nan"),
        (dict(train={"ds/ja": "0.5"}), "is '0.5'"),
        (dict(**yaml.safe_load("train: {ds/ja: 1e-3}")), r"is '1e-3'.*YAML takes it for text: write 1\.0e-3"),
        (dict(train={"ds/ja": True}), "is True"),
        (dict(train={"ds/ja": 1.0}, weighting="size"), "weighting is 'size'"),
        (dict(train={"ds/ja": 1.0, "ds/ja_text_document": 1.0}), "names one dataset twice"),
        (dict(train={"ds/ja": 1.0}, validation={"ja": 0.5}), "validation maps 'ja' to 0.5"),
        (dict(train={"ds/ja": 1.0}), "There is no ds/ja_text_document.idx"),
    ],
)
def test_slips_are_explained(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(CptError, match=message):
        Blend(**fields).check()


@pytest.mark.parametrize("train", ["ds/ja", ["ds/ja"], None])
def test_a_blend_of_another_form_is_not_made(train: Any) -> None:
    with pytest.raises(CptError, match=r"The blend's train is .*Write a dictionary"):
        Blend(train=train)


@pytest.mark.parametrize("kind", [Blend, Conversations])
def test_paths_and_numpys_numbers_are_plain_ones(kind: Any) -> None:
    given = kind(train={Path("ds/ja"): np.float32(0.75), "ds/en": np.int64(1)}, validation={"ja": Path("ds/v")})
    assert given == kind(train={"ds/ja": 0.75, "ds/en": 1}, validation={"ja": "ds/v"})
    given.check_form()
    with pytest.raises(CptError, match="maps PosixPath"):
        kind(train={Path("ds/ja"): 1, "ds/ja": 2}).check_form()


def test_a_missing_bin_is_named(sets: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "x_text_document.idx").write_bytes(Path(sets["ja"] + "_text_document.idx").read_bytes())
    with pytest.raises(CptError, match=r"no .*x_text_document\.bin"):
        Blend(train={str(tmp_path / "x"): 1.0}).check()


def test_what_is_trained_on_is_not_held_out_under_any_name(sets: dict[str, str], tmp_path: Path) -> None:
    ja, en = sets["ja"], sets["en"]
    (tmp_path / "link").symlink_to(Path(ja).parent)
    for end in (".idx", ".bin"):
        shutil.copy(f"{ja}_text_document{end}", tmp_path / f"copy_text_document{end}")
    names = [ja, f"{ja}_text_document", f"{tmp_path}/link/ja", str(tmp_path / "copy")]
    for part in ("validation", "test"):
        for name in names:
            with pytest.raises(CptError, match=rf"The {part} set 'held' \({name}\) is also trained on.* held-out one"):
                Blend({ja: 1.0, en: 1.0}, **{part: {"held": name}}).check()
    for name in names[2:]:
        with pytest.raises(CptError, match=f"trains on one dataset twice: {name} is a copy of {ja}"):
            Blend({ja: 1.0, name: 1.0}).check()
    Blend({ja: 1.0, en: 1.0}, validation={"held": sets["val"]}, test={"held": sets["val"]}).check()


def test_a_held_out_set_of_a_file_that_is_trained_on(tmp_path: Path, small: Path, texts: list[str]) -> None:
    """Not the same dataset: its file is one of those that the training set was made of."""
    halves = {"a": texts[::2], "b": texts[1::2]}
    for name, half in halves.items():
        write_jsonl(tmp_path / f"{name}.jsonl", half)
    shutil.copy(tmp_path / "b.jsonl", tmp_path / "copy.jsonl")
    made = {"all": ["a.jsonl", "b.jsonl"], "a": ["a.jsonl"], "b": ["b.jsonl"], "copy": ["copy.jsonl"]}
    for name, files in made.items():
        prepare([tmp_path / file for file in files], tmp_path / name, small, quiet=True)
    for name in ("b", "copy"):
        with pytest.raises(
            CptError, match=rf"'held' .*is also trained on: it was made of .*/{name}\.jsonl, and so was"
        ):
            Blend({f"{tmp_path}/all": 1.0}, validation={"held": f"{tmp_path}/{name}"}).check()
    Blend({f"{tmp_path}/a": 1.0}, validation={"held": f"{tmp_path}/b"}).check()
    # Each with an empty shard, which says nothing of the others.
    for name in ("a", "b"):
        (tmp_path / f"empty_{name}.jsonl").touch()
        files = [tmp_path / f"{name}.jsonl", tmp_path / f"empty_{name}.jsonl"]
        prepare(files, tmp_path / f"with_empty_{name}", small, on_error="skip", quiet=True)
    Blend({f"{tmp_path}/with_empty_a": 1.0}, validation={"held": f"{tmp_path}/with_empty_b"}).check()


def test_an_unfinished_dataset_is_not_replaced_by_its_validation_set(sets: dict[str, str], tmp_path: Path) -> None:
    for end in (".idx", ".bin"):
        shutil.copy(f"{sets['val']}_text_document{end}", tmp_path / f"ja_validation_text_document{end}")
    blend = Blend.replay(f"{tmp_path}/ja", sets["en"], validation={"ja": f"{tmp_path}/ja_validation"})
    assert f"{tmp_path}/ja_text_document" in blend.shares()
    with pytest.raises(CptError, match=r"There is no .*/ja_text_document\.idx"):
        blend.check()


@pytest.mark.parametrize("share", [0, 1, -0.1, 25])
def test_a_replay_share_lies_between_0_and_1(share: float) -> None:
    with pytest.raises(CptError, match=f"share is {share}"):
        Blend.replay("ja", "en", share=share)


@pytest.mark.parametrize("other", ["ds/ja", "ds/ja_text_document"])
def test_one_dataset_under_two_names_is_refused(other: str) -> None:
    blends = (
        lambda: Blend.replay("ds/ja", other),
        lambda: presets.ibrahim_weak(other, "ds/ja"),
        lambda: presets.swallow_v0_1("ds/ja", "ds/en", other),
        lambda: presets.swallow_v0_2("ds/ja", "ds/en", "ds/code", parallel=other),
    )
    for make in blends:
        with pytest.raises(CptError, match=r"names one dataset twice: .* are both ds/ja_text_document"):
            make()


def test_presets_name_their_source(sets: dict[str, str]) -> None:
    v1 = presets.swallow_v0_1("ja", "en", "code", parallel="ja-en")
    assert v1.shares()["ja_text_document"] == pytest.approx(0.54, abs=0.001)
    assert sum(v1.shares().values()) == pytest.approx(1)
    assert presets.swallow_v0_2("ja", "en", "code").shares()["ja_text_document"] == pytest.approx(0.689, abs=0.001)
    assert presets.ibrahim_weak("ja", "en").shares()["en_text_document"] == pytest.approx(0.05)
    assert presets.ibrahim_strong("ja", "en").shares()["en_text_document"] == pytest.approx(0.25)
    assert all("Swallow" in blend.note for blend in (v1, presets.swallow_v0_2("a", "b", "c")))
    alone = presets.japanese_wikipedia_alone(sets["ja"], validation={"ja": sets["val"]})
    assert [warning for warning in alone.report(1, 64).warnings if "forget English" in warning]


def test_a_blend_stands_in_a_config() -> None:
    import nemo_run as run
    from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer

    config = run.Config(Blend, train={"ds/ja": 0.75, "ds/en": 0.25}, validation={"ja": "ds/val"})
    serializer = ZlibJSONSerializer()
    from fiddle import build

    again = build(serializer.deserialize(serializer.serialize(config)))
    assert again == Blend(train={"ds/ja": 0.75, "ds/en": 0.25}, validation={"ja": "ds/val"})


def test_importing_is_light() -> None:
    code = (
        "import sys; from nemo_cpt.corpus import Blend, prepare, split, fetch, inspect, presets; b = Blend({'a': 1.0})"
    )
    heavy = "torch numpy transformers tokenizers nemo megatron pyarrow datasets"
    check = f"{code}; print([m for m in {heavy.split()} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", check], capture_output=True, text=True).stdout.strip() == "[]"
