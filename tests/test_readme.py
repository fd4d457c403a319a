"""README's commands run as they stand there, with a small model, by `model=base`, where Llama-3.1-8B would be."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import nemo_run as run
import pytest

from nemo_cpt.checkpoint import import_hf
from nemo_cpt.executors.examination import examine_before_launch
from nemo_cpt.training.metrics import append_metrics
from tests.support import small_models
from tests.support.corpus_helpers import write_jsonl

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)
SKIPPED = {  # what a command begins with, and why it is not run
    "make ": "makes an environment; tests/test_makefile.py looks at it",
    "nemo-cpt download": "needs the hub and access to a gated model; tests/checkpoint/test_hub.py has a local one",
    "nemo-cpt chat": "waits for what a person types",
    "nemo-cpt serve": "serves until it is stopped",
    "nemo-cpt watch": "ends with the job, which is none here; tests/watching has its own",
    "nemo-cpt evaluate": "asks the 8B many questions; tests/evaluation has its own",
    "nemo-cpt run": "needs a Slurm cluster; tests/executors/test_slurm_training.py has one",
    "nemo llm": "NeMo's own command; takes a minute to import",
    "tensorboard": "serves until it is stopped",
}
IN_PLACE = {"hf:wikimedia/wikipedia@20231101.en": "en.jsonl"}  # there is no network
OF_THE_RECIPE = ("nemo-cpt plan", "nemo-cpt show", "nemo-cpt doctor")  # which compare its model with the base
EXIT_CODES = {"nemo-cpt doctor": 3}  # for this machine has no GPUs


def commands() -> list[str]:
    lines = [line.partition(" #")[0].strip() for kind, block in BLOCKS if not kind for line in block.splitlines()]
    return [line for line in lines if line]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what README's reader brings: texts, the downloaded model; and what the job leaves: a run."""
    folder = tmp_path_factory.mktemp("readme")
    for language, text in (("ja", "これは{}番目の文書です。"), ("en", "This is document number {}.")):
        write_jsonl(folder / f"{language}.jsonl", [text.format(number) * 5 for number in range(600)])
    for number in range(100):
        turns = [{"role": "user", "content": f"{number}は？"}, {"role": "assistant", "content": f"{number}です。"}]
        with (folder / "chats.jsonl").open("a", encoding="utf-8") as chats:
            chats.write(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")
    model = small_models.make("llama31", folder / "models/Llama-3.1-8B")
    saved = folder / "results/llama31_8b_cpt/checkpoints"
    import_hf(model, folder / "imported")
    for step in (135, 150):
        shutil.copytree(folder / "imported", saved / f"steps={step}")
        (saved / f"steps={step}/run.json").write_text(
            json.dumps({"step": step, "settings": {"schedule": {"max_steps": 150}}})
        )
        append_metrics(saved.parent, {"step": step, "val_loss_ja": 2.0})
    return folder


def test_every_command_is_run_or_skipped_for_a_reason(world: Path) -> None:
    """In their order, because each reads what those before it have written."""
    ran = []
    environ = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environ |= {"NEMORUN_HOME": str(world / "home")}
    (world / "home/experiments/t/t_1/t/configs").mkdir(parents=True)
    (world / "home/experiments/t/t_1/_TASKS").touch()
    for command in commands():
        if command.startswith(tuple(SKIPPED)):
            continue
        words = [IN_PLACE.get(word, word) for word in shlex.split(command)]
        assert words[0] == "nemo-cpt", f"README has a command that this test neither runs nor skips: {command}"
        words += ["model=base"] * command.startswith(OF_THE_RECIPE)
        words[:1] = [sys.executable, "-m", "nemo_cpt.cli"]
        done = subprocess.run(words, cwd=world, env=environ, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        expected = next((code for begin, code in EXIT_CODES.items() if command.startswith(begin)), 0)
        assert done.returncode == expected, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        ran.append(command)
    assert len(ran) > 15
    for kept in (
        "checkpoints/Llama-3.1-8B",
        "ds/en_validation_text_document.idx",
        "sft/ja_validation_conversations.mask",
        "models/Llama-3.1-8B-ja",
        "my_run.py",
    ):
        assert (world / kept).exists()


def test_what_is_skipped_is_there() -> None:
    assert all(any(command.startswith(begin) for command in commands()) for begin in SKIPPED)


def test_the_recipe_is_built_as_it_stands(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python block, up to the launch: its recipe, its edit and its executor."""
    examine_before_launch()  # puts itself around NeMo-Run's `run`, once a process: not around this test's
    launched = []
    monkeypatch.setattr(run, "run", lambda recipe, executor: launched.append((recipe, executor)))
    monkeypatch.chdir(world)
    (code,) = (block for kind, block in BLOCKS if kind == "python")
    code = code.replace("continual_pretrain(", 'continual_pretrain(model="base",')
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    ((recipe, executor),) = launched
    assert recipe.trainer.max_steps == 300
    assert recipe.resume.base == "checkpoints/Llama-3.1-8B"
    assert (executor.nodes, executor.time) == (1, "12:00:00")
