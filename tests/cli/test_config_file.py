"""`nemo-cpt run FILE.yaml`: what is written is read back, what is wrong in a file is said, the command line wins."""

import contextlib
import string
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

import nemo_cpt
from nemo_cpt import CptError, catalog
from nemo_cpt.catalog.build import build_recipe
from nemo_cpt.cli.recipe_arguments import from_file
from nemo_cpt.launching.config_file import ConfigFile, read_config, written

TEXTS = some.text(string.printable + "日本「」é", max_size=12).filter(lambda text: text.isprintable() and text.strip())
NAMES = some.text(string.ascii_letters + "日本/_-.", min_size=1, max_size=8)
DATA = some.fixed_dictionaries(
    {"train": some.dictionaries(NAMES, some.floats(0.01, 9), min_size=1, max_size=3)},
    optional={"validation": some.dictionaries(NAMES, NAMES, max_size=2)},
)
SLURM = """
recipe: smollm2
base: checkpoints/SmolLM2
data:
  train: {ds/ja: 0.75, ds/en: 0.25}
  validation: {ja: ds/ja_validation}
max_steps: 30
lr: 1e-4
trainer.log_every_n_steps: 5
executor: slurm
executor.partition: gpu
executor.time: 4:00:00
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "my.yaml"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(base=TEXTS, name=TEXTS, data=DATA, lr=some.floats(1e-9, 1), time=TEXTS, field=TEXTS)
def test_what_is_written_is_read_back(
    base: str, name: str, data: dict[str, Any], lr: float, time: str, field: str, file: Path
) -> None:
    function = catalog.recipe("smollm2")
    pairs = [f"base={base}", f"name={name}", f"data={data}", f"lr={lr!r}", f"log.name={field}", f"executor.time={time}"]
    with contextlib.suppress(CptError):  # of values that the command line refuses as well
        expected = catalog.split(function.name, pairs)
        file.write_text(written(function, pairs, "slurm"), "utf-8")
        config = read_config(file)
        assert (config.recipe, config.executor) == (function.name, "slurm")
        assert catalog.split(config.recipe, config.pairs) == expected


@pytest.mark.parametrize("recipe", list(catalog.recipes()))
def test_every_recipe_can_be_written_and_its_comments_are_settings(recipe: str, file: Path) -> None:
    function = catalog.recipe(recipe)
    required = {"base": "base=b", "data": "data={train: {d: 1.0}}"}
    pairs = [required[name] for name, each in function.parameters.items() if each.default is None]
    text = written(function, pairs)
    commented = {f"# {name}: " for name in function.parameters}
    lines = text.splitlines()
    file.write_text("\n".join(line[2:] if any(map(line.startswith, commented)) else line for line in lines), "utf-8")
    config = read_config(file) if "by default" not in text else None
    file.write_text(text, "utf-8")
    _, arguments, _, _ = catalog.split(recipe, read_config(file).pairs)
    assert set(arguments) <= {"base", "data"}
    if config:
        assert set(catalog.split(recipe, config.pairs)[1]) == set(function.parameters)


def test_the_command_line_wins(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text(SLURM)
    recipe, pairs, executor = from_file(str(file), ["max_steps=7", "executor.partition=cpu"])
    function, arguments, fields, options = catalog.split(recipe, pairs)
    assert (function.name, executor) == ("smollm2.continual_pretrain", "slurm")
    assert (arguments["max_steps"], arguments["lr"]) == (7, 1e-4)
    assert fields == ["trainer.log_every_n_steps=5"]
    assert catalog.parse(catalog.executor("slurm"), options) == {"partition": "cpu", "time": "4:00:00"}
    _, pairs, executor = from_file(str(file), None, "local")
    assert (executor, [pair for pair in pairs if pair.startswith("executor")]) == ("local", [])
    assert "left away for local: executor.partition=gpu, executor.time=4:00:00" in capsys.readouterr().err


def test_what_a_file_leaves_open_the_command_line_fills_in(file: Path) -> None:
    recipe = next(name for name, each in catalog.recipes().items() if each.parameters["data"].default is None)
    required = [name for name, each in catalog.recipe(recipe).parameters.items() if each.default is None]
    file.write_text(written(catalog.recipe(recipe), []) + "executor.partition:\n", "utf-8")
    pairs = [*(f"{name}=there" for name in required), "executor.partition=gpu"]
    with pytest.raises(CptError, match="has no value"):
        from_file(str(file), pairs[1:])
    # As without a file.
    found = from_file(str(file), pairs, "slurm")
    assert found == (recipe, pairs, "slurm")
    assert (
        nemo_cpt.load_config(written_without(file, "executor"), *pairs[:-1])[0].data
        == build_recipe(recipe, catalog.split(recipe, pairs)[1], []).data
    )


def written_without(file: Path, key: str) -> Path:
    lines = file.read_text("utf-8").splitlines(keepends=True)
    file.write_text("".join(line for line in lines if not line.startswith(key)), "utf-8")
    return file


def test_yamls_null_is_none_and_the_word_in_quotes_is_a_word(file: Path) -> None:
    file.write_text("recipe: smollm2\nbase: b\ntokenizer: null\nname: 'null'\nmodel: ~\n")
    assert read_config(file).pairs == ["base=b", "tokenizer=None", "name=null", "model=None"]
    function = catalog.recipe("smollm2.continual_pretrain")
    assert "name: 'null'" in written(function, ["base=b", "name=null"])


def test_python_takes_the_same_file(file: Path) -> None:
    file.write_text(SLURM)
    recipe, executor = nemo_cpt.load_config(file, "max_steps=7")
    same = {"base": "checkpoints/SmolLM2", "max_steps": 7, "lr": 1e-4}
    data = {"train": {"ds/ja": 0.75, "ds/en": 0.25}, "validation": {"ja": "ds/ja_validation"}}
    assert recipe == build_recipe("smollm2.continual_pretrain", same | {"data": data}, ["trainer.log_every_n_steps=5"])
    assert (executor.partition, executor.time) == ("gpu", "4:00:00")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("recipe: smollm2\nbase: b\nbase: c\n", "base stands twice"),
        ("recipe: smollm2\nbase:\n", "base has no value"),
        ("reciep: smollm2\n", "names no recipe: .*; near: reciep"),
        ("- a\n", "holds no lines `key: value`"),
        ("recipe: [a\n", "is no YAML: "),
        ("? [a]\n: b\n", "is no key"),
        ("_target_: nemo.collections.llm.pretrain\n", "`nemo llm pretrain --yaml"),
    ],
)
def test_a_file_that_says_nothing_is_refused(text: str, says: str, file: Path) -> None:
    file.write_text(text)
    with pytest.raises(CptError, match=says):
        read_config(file)


def test_commands_take_it_and_say_what_is_misspelt(file: Path) -> None:
    def nemo_cpt(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "nemo_cpt.cli", *arguments], capture_output=True, text=True, cwd=file.parent
        )

    assert nemo_cpt("copy", "smollm2", "my.yaml").stdout == "wrote my.yaml; edit it, then: nemo-cpt run my.yaml\n"
    assert read_config(file) == ConfigFile("smollm2.continual_pretrain", "local", read_config(file).pairs)
    shown = nemo_cpt("show", "my.yaml", "--config", "max_steps=7").stdout
    assert "\nmax_steps: 7\n" in shown
    assert "--executor is for --config" in nemo_cpt("show", "my.yaml", "-e", "slurm").stderr
    file.write_text(SLURM.replace("max_steps", "max_step"))
    for command in ("run", "plan", "doctor"):
        done = nemo_cpt(command, "my.yaml")
        assert (done.returncode, "no parameter max_step; near: max_steps" in done.stderr) == (2, True)
    assert "nosuch.yaml cannot be read: No such file" in nemo_cpt("run", "nosuch.yaml").stderr
