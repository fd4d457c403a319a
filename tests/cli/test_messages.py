"""What the command line makes of what people mean: options of other tools, forms of data, names of hubs, completion."""

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from nemo_cpt import CptError, catalog, cli
from nemo_cpt.cli.recipe_arguments import from_file
from nemo_cpt.corpus import Blend
from nemo_cpt.training.preconditions import check_base


def nemo_cpt(*arguments: str, cwd: Path | None = None, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "import sys; sys.argv[0] = 'nemo-cpt'; from nemo_cpt.cli import main; main()"]
    every = os.environ | environ
    return subprocess.run([*command, *arguments], capture_output=True, text=True, env=every, cwd=cwd)


def test_one_prefix_is_a_blend_of_one() -> None:
    recipe = catalog.recipe("tiny")
    assert catalog.parse(recipe, ["data=ds/ja"])["data"] == Blend(train={"ds/ja": 1.0})
    assert catalog.parse(recipe, ["data=/data/ja text/v1.5_text_document"])["data"].prefixes() == [
        "/data/ja text/v1.5_text_document"
    ]
    assert catalog.parse(recipe, ["data={train: {ds/ja: 1}}"])["data"] == Blend(train={"ds/ja": 1})


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "tiny", "base=b", "data={train: {a: 1}, validaton: {}}"], "Blend has no field validaton; near: valid"),
        (["run", "tiny", "base=b", "data={validation: {}}"], "Blend needs train: {PREFIX: WEIGHT, ...}"),
        (["run", "tiny", "base=b", "data=ds/ja, ds/en"], "{train: {ds/ja: 1.0, ds/en: 1.0}, validation: "),
        (["run", "tiny", "base=b", "data=[ds/ja]"], "a Blend is one dataset's prefix, the name of a .yaml file, or {"),
        (["run", "tiny", "--max_steps", "5"], "--max_steps: recipes' parameters have no dashes: max_steps=5"),
        (["plan", "--max-steps=5", "tiny"], "recipes' parameters have no dashes: max_steps=5"),
        (["show", "tiny", "--lr"], "recipes' parameters have no dashes: lr=VALUE"),
        (["doctor", "tiny", "--trainer.max_steps", "5"], "trainer.max_steps=5"),
        (["run", "tiny", "--dry-runs"], "Possible options: --dry-run, --dryrun"),
        (["run", "tiny", "base=b", "data=d", "-e", "slrum"], "no executor 'slrum' (near: slurm): docker, "),
        (["run", "tiny", "base=b", "data=d", "lr=-1"], "settings: lr=-1; a peak learning rate is above 0"),
        (["run", "tiny", "base=b", "data=d", "trainer.max_steps=0"], "settings: max_steps=0; give max_steps=1 or more"),
        (
            ["run", "smollm2", "data=d", "gpus_per_node=2", "tensor_model_parallel_size=2"],
            "num_attention_heads 9 cannot",
        ),
        (["run", "tiny", "base=meta-llama/L", "data=d"], "`nemo-cpt import models/L checkpoints/L`"),
        (["run", "tiny", "base=b", "data=d", "name="], "name= has no value: give one, or leave name= away"),
        (["run", "tiny", "base=b", "data=d", "name=a/b"], "name=a/b: give the run a name that is one folder's"),
        (["run", "gpt.pretrain"], "There is no ds/train_text_document"),
        (["run", "gpt.pretrain"], "make it with `nemo-cpt init checkpoints/gpt_124m --tokenizer TOKENIZER`"),
        (["run", "README.md"], "there is no recipe 'README.md' (nemo-cpt recipes lists all)"),
        (["plan", "tiny", "--tokens", "-5"], "'--tokens'"),
        (["serve", "m", "--port", "-1"], "'--port'"),
        (["init", "m", "-t", "t", "--seed", "-1"], "'--seed'"),
        (["run", "tiny", "base=b", "data=d", "max_steps=3", "max_steps=4"], "stands twice: max_steps=3, max_steps=4;"),
        (["run", "tiny", "base=b", "data={train: {ds/ja: 0.75}"], "no YAML (while parsing a flow mapping"),
        (["run", "tiny", "base=b", "data=d", "-e", "e.py"], "which function of it makes the executor? Give e.py:FUNC"),
        (["run", "tiny", "base=b", "data=d", "-e", "f.py:g"], "executor f.py: there is no such file"),
        (
            ["run", "tiny", "base=b", "data=d", "stop_when=en"],
            "| None, such as stop_when='{NAME: VALUE}'",
        ),
        (["run", "tiny", "base=b", "data=d", "processes=0"], "gpus_per_node=1 or more (processes= of a recipe for the"),
        (["run", "e.py"], "e.py is no recipe, and no configuration file: the name of one ends in .yaml"),
        (["copy", "tiny", "x.json"], "x.json: give a name that ends in .py, for a script, or in .yaml or .yml"),
        (["plan", "llama31_8b", "--gpu", "H1000"], "no GPU 'H1000' (near: H100"),
        (["plan", "gpt.pretrain"], "the base checkpoints/gpt_124m is not there"),
        (["import", "nemo", "out"], "nemo is a NeMo checkpoint already: give it to a recipe as it is, base=nemo"),
        (["chat", "model", "--against", "modle"], "there is no model at modle; near: model"),
        (["serve", "modle"], "there is no model at modle; near: model"),
        (["tokenizer", "train", "e.py", "-o", "t", "--vocabulary-size", "-5"], "a vocabulary of -5 has no room"),
        (
            ["tokenizer", "grow", "toks/mien", "e.py", "-o", "t", "--tokens", "9"],
            "There is no tokenizer folder toks/mien; near: toks/mine",
        ),
    ],
)
def test_what_was_meant_is_said(arguments: list[str], says: str, tmp_path: Path) -> None:
    (tmp_path / "e.py").touch()
    for folder in ("nemo/weights", "model", "toks/mine"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "model/config.json").touch()
    done = nemo_cpt(*arguments, cwd=tmp_path, HF_HUB_OFFLINE="1")
    assert done.returncode == 2
    assert says in done.stderr


@pytest.mark.parametrize("command", ["run", "plan", "doctor"])
def test_what_is_wrong_in_a_file_names_it(command: str, tmp_path: Path) -> None:
    for line, says in {
        "trainer:\n  log_every_n_steps: 1": "trainer holds lines of its own: write each with its path, such as "
        "trainer.log_every_n_steps: 1",
        "max_stepz: 1": "tiny.continual_pretrain has no parameter max_stepz; near: max_steps",
        "lr: fast": "lr=fast: expected float",
        "data: {trian: {d: 1}}": "Blend has no field trian",
        "executor: slrum": "there is no executor 'slrum' (near: slurm)",
        "executor.gups: 1": "local has no parameter executor.gups; near: gpus",
    }.items():
        (tmp_path / "my.yaml").write_text(f"recipe: tiny\nbase: b\n{line}\n")
        with pytest.raises(CptError) as refused:
            from_file(str(tmp_path / "my.yaml"), None)
        assert refused.value.message.startswith(f"{tmp_path}/my.yaml: ")
        assert says in refused.value.message
    done = nemo_cpt(command, "my.yaml", cwd=tmp_path)
    assert (done.returncode, done.stderr.startswith("nemo-cpt: my.yaml: ")) == (2, True)


def test_a_recipe_of_other_data_has_them_wherever_it_is_written(tmp_path: Path) -> None:
    assert catalog.default_data(catalog.recipe("gpt.pretrain")).train == {"ds/train": 1.0}
    for name in ("g.py", "g.yaml"):
        assert nemo_cpt("copy", "gpt.pretrain", name, cwd=tmp_path).returncode == 0
    assert "data=default_data()," in (tmp_path / "g.py").read_text()
    for name, data in {
        "tiny": 'Blend.replay("ds/ja", "ds/en", share=0.25, ',
        "tiny.instruction_tune": "Conversations(train={",
    }.items():
        assert str(catalog.data_example(catalog.recipe(name))).startswith(data)
    assert "ds/train: 1.0" in (tmp_path / "g.yaml").read_text()


def test_a_base_that_is_no_checkpoint_names_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CptError, match=r"download meta/L models/L`, `nemo-cpt import models/L checkpoints/L`"):
        check_base("meta/L")
    Path("meta").mkdir()  # a folder of this machine, in which a checkpoint is missing
    with pytest.raises(CptError, match="is not there: import it first"):
        check_base("meta/L")
    Path("meta/L").mkdir()
    Path("meta/L/config.json").write_text("{}")
    with pytest.raises(CptError, match=r"is a Hugging Face model: `nemo-cpt import meta/L checkpoints/L`"):
        check_base("meta/L")


def test_the_field_with_the_text_is_named(tmp_path: Path) -> None:
    line = {"id": "1", "content": "A long text.", "the title": "T"}
    (tmp_path / "a.jsonl").write_text(json.dumps(line) + "\n")
    done = nemo_cpt("split", "a.jsonl", "--output", "out", "--validation", "0.1", cwd=tmp_path)
    assert done.returncode == 2
    assert "it has 'id', 'content', 'the title'; --json-key content takes its longest text" in done.stderr
    for conversation, key in (({"messages": []}, "messages"), ({"instruction": "a", "output": "b"}, "instruction")):
        (tmp_path / "a.jsonl").write_text(json.dumps(conversation) + "\n")
        done = nemo_cpt("split", "a.jsonl", "--output", "out", "--validation", "0.1", cwd=tmp_path)
        assert f"prepare takes it with --template, split with --json-key {key})" in done.stderr


def test_help_and_version() -> None:
    assert "Continual pretraining with NeMo" in nemo_cpt("-h").stdout
    assert "--executor" in nemo_cpt("run", "-h").stdout
    assert nemo_cpt("--version").stdout.startswith("nemo-cpt 0.")


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("nemo-cpt pla", ["plan"]),
        ("nemo-cpt run smol", ["smollm2.continual_pretrain"]),
        ("nemo-cpt plan tiny max_", ["max_steps="]),
        ("nemo-cpt run tiny -e sl", ["slurm"]),
        ("nemo-cpt run tiny -e slurm executor.part", ["executor.partition="]),
        ("nemo-cpt run nothing max_", []),
    ],
)
def test_the_shell_completes(line: str, offered: list[str]) -> None:
    words = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1), "_NEMO_CPT_COMPLETE": "complete_bash"}
    found = nemo_cpt(**words).stdout.split()
    assert set(offered) <= set(found)
    assert bool(offered) == bool(found)


def test_the_recipes_that_are_made_for_a_base(tmp_path: Path) -> None:
    from tests.doctor.conftest import TINY
    from tests.support import small_models

    small_models.make("llama31", tmp_path / "small", **TINY)
    small_models.make("llama31", tmp_path / "deeper", **TINY | {"num_hidden_layers": 5})
    found = json.loads(nemo_cpt("recipes", "--base", "small", "--json", cwd=tmp_path).stdout)
    assert {name for name, each in found.items() if each["fits"]} == {
        "tiny.continual_pretrain",
        "tiny.instruction_tune",
    }
    assert "num_hidden_layers 32 (the base's: 4), hidden_size" in found["llama31_8b.continual_pretrain"]["why_not"]
    lines = nemo_cpt("recipes", "--base", "deeper", cwd=tmp_path).stdout.splitlines()
    assert "tiny.continual_pretrain\tCPU\tno\tnum_hidden_layers 4 (the base's: 5)" in lines
    assert lines[-1].startswith("the others train it too, with model=base")
    for wrong, says in {"nowhere": "there is no folder nowhere", ".": "does not say what model it is"}.items():
        assert says in nemo_cpt("recipes", "--base", wrong, cwd=tmp_path).stderr


@pytest.mark.parametrize("function", [*catalog.recipes().values(), *map(catalog.executor, catalog.executors())],
                         ids=lambda function: function.name)  # fmt: skip
def test_every_parameter_has_its_meaning_and_its_default_as_a_value(function: catalog.Function) -> None:
    for parameter in function.parameters.values():
        assert parameter.help, parameter
        assert not parameter.help.startswith("see `"), parameter
        default = parameter.default or ""
        assert not (default.isidentifier() and default.isupper()), parameter  # a constant's name


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    (tmp_path / "results/one/checkpoints").mkdir(parents=True)
    assert "as in `nemo-cpt rm one --keep 1`" in nemo_cpt("rm", "one", cwd=tmp_path).stderr
    exported = nemo_cpt("export", "results/on", "out", cwd=tmp_path)
    assert (exported.returncode, exported.stderr) == (2, "nemo-cpt: there is no folder results/on; near: results/one\n")


def test_the_hubs_attempts_are_one_line(tmp_path: Path) -> None:
    import logging

    from nemo_cpt.hub import retries_told_once

    logger, told = logging.getLogger("huggingface_hub.utils._http"), []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logger.addHandler(handler)
    with retries_told_once():
        for number in (1, 2):
            logger.warning("'(MaxRetryError(...))' thrown while requesting HEAD http://h")
            logger.warning(f"Retrying in {number}s [Retry {number}/5].")
    logger.warning("another")
    logger.removeHandler(handler)
    assert told == ["the Hugging Face hub does not answer; trying for another half a minute", "another"]


def test_a_card_of_a_size_is_one_that_the_planner_knows() -> None:
    from nemo_cpt.planning.hardware import of_size

    assert [getattr(of_size(size), "name", None) for size in (24, 48, 80, 141, 96)] == [
        "RTX 4090", "RTX 6000 Ada", "H100", "H200", None
    ]  # fmt: skip


def test_a_locale_that_is_not_utf_8_changes_no_name_and_no_text(tmp_path: Path) -> None:
    (tmp_path / "文書.jsonl").write_text("".join(f'{{"text": "Text {n}."}}\n' for n in range(9)), "utf-8")
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = nemo_cpt("split", "文書.jsonl", "-o", "分割", "--validation", "0.3", cwd=tmp_path, **ascii_only)
    assert done.returncode == 0, done.stderr
    assert "分割/train.jsonl" in done.stdout
    assert (tmp_path / "分割/train.jsonl").is_file()


@pytest.mark.parametrize("stream", ["<", ">", "2>"])
def test_a_standard_stream_that_is_closed_changes_no_exit_code(stream: str) -> None:
    command = f"{sys.executable} -m nemo_cpt.cli recipes {stream}&-"
    assert subprocess.run(command, shell=True, capture_output=True).returncode == 0


def test_what_the_machine_refuses_is_one_line(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "nemo_cpt.cli", "recipes", "--json"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (2, "nemo-cpt: No space left on device\n")
    (tmp_path / "file").touch()
    name = "n" * 300 + ".yaml"
    done = nemo_cpt("copy", "tiny", name, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, f"nemo-cpt: {name}: File name too long\n")


def test_what_means_the_same_goes_by_the_same_names_in_every_command() -> None:
    for module in {each.name for each in pkgutil.iter_modules(cli.__path__)} - {"__main__", "plugin"}:
        importlib.import_module(f"nemo_cpt.cli.{module}")
    commands = [get_command(cli.app)]
    names = set()
    for command in commands:
        commands += getattr(command, "commands", {}).values()
        names |= {tuple(sorted(option.opts)) for option in command.params}
    for together in ("--licence --license", "--chat-template --template", "--output -o"):
        for name in together.split():
            ways = {each for each in names if name in each}
            assert all(set(together.split()) <= set(each) for each in ways), ways


def test_figures_are_shown_as_people_read_them() -> None:
    from nemo_cpt.cli.checkpoint import shown
    from nemo_cpt.output import span

    fields = {
        134_515_008: "134,515,008",
        True: "yes",
        None: "-",
        "": "none",
        (): "none",
        ("a", "b"): "a, b",
        0.25: "0.25",
    }
    assert {value: shown(value) for value in fields} == fields
    assert shown(0.0) == "0.0"  # a difference of logits
    assert [span(seconds) for seconds in (45.5, 3600, 17_280, 17_280_000)] == ["46 s", "60 min", "4.8 h", "4,800.0 h"]


def test_a_terminal_too_narrow_for_a_table_loses_no_value() -> None:
    row = ("steps=300-val_loss=1.2345", "300", "ja 1.2345, en 2.3456", "whole")
    columns = ("checkpoint", "step", "validation loss, nats", "state")
    printing = f"from nemo_cpt.cli.tables import print_table; print_table({columns}, [{row}])"
    for width, rules in ((100, True), (40, False)):
        ours, its = os.openpty()
        environ = os.environ | {"COLUMNS": str(width), "TERM": "xterm"}
        assert subprocess.run([sys.executable, "-c", printing], stdout=its, env=environ).returncode == 0
        os.close(its)
        printed = os.read(ours, 65536).decode()
        os.close(ours)
        assert ("━" in printed) == rules
        assert all(cell in printed for cell in row)
