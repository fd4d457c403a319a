"""A workflow as jobs of a real cluster, each behind those that it needs; skipped where Slurm is not installed."""

import json
import shutil
from importlib.resources import files
from pathlib import Path

import pytest

from nemo_cpt import CptError
from nemo_cpt.checkpoint import make_untrained
from nemo_cpt.vocabulary import train as train_tokenizer
from nemo_cpt.workflow import Chosen, Step, Workflow, as_yaml, evaluate, run, split, train
from nemo_cpt.workflow.cluster import _light, submit
from nemo_cpt.workflow.dry_run import dry_run
from nemo_cpt.workflow.files import load
from nemo_cpt.workflow.standing import inputs_of
from nemo_cpt.workflow.state import STOPPED, Record, State
from tests.workflow.conftest import chain, make_folder, own

CORPUS = str(files("nemo_cpt.demo") / "corpus" / "en.jsonl")
OPTIONS = ["time=5"]


def write(workflow: Workflow) -> Path:
    path = workflow.folder / "w.yaml"
    path.write_text(as_yaml(workflow))
    return path


def states(folder: Path) -> dict[str, str]:
    record = json.loads((folder / "light.workflow/record.json").read_bytes())
    return {name: step["state"] for name, step in record["steps"].items() if step}


def test_steps_are_jobs_behind_those_that_they_need(slurm_here, project: Path) -> None:
    make_folder(project)
    found = submit(write(chain(project)), Chosen(until="two"), "slurm", OPTIONS)
    assert list(found["jobs"]) == ["one", "two"]
    assert (project / "out/two.txt").read_text() == "a+a"
    assert states(project) == {"one": "done", "two": "done"}
    # What is done is no job; what fails ends what waits for it, and says why.
    steps = chain(project).steps | {"three": own("three", "crash", ["b.txt"], "three.txt")}
    with pytest.raises(CptError, match="three was killed by SIGKILL"):
        submit(write(Workflow("light", list(steps.values()), project)), Chosen(), "slurm", OPTIONS)
    assert not (project / "four.txt").exists()
    left = {each.step.name: each.why for each in dry_run(load(project / "w.yaml"), Chosen()).standings if not each.done}
    assert left == {"three": "failed", "four": "new"}


def test_what_trains_nothing_is_one_process_and_holds_no_gpu_that_it_does_not_use(slurm_here, project: Path) -> None:
    make_folder(project)
    text = split("text", inputs=CORPUS, output_folder="text", validation=0.1)
    report = evaluate("report", model="nowhere", output="report", losses=["en=text/validation.jsonl"])
    workflow = Workflow("light", [text, own("one", "join", ["a.txt"], "one.txt"), report], project)
    size = ["nodes=2", "gpus_per_node=2", "cpus_per_gpu=3", "mem_per_gpu=100"]
    found = submit(write(workflow), Chosen(until="text"), "slurm", [*OPTIONS, *size])
    found["jobs"] |= submit(write(workflow), Chosen(until="one"), "slurm", [*OPTIONS, *size])["jobs"]
    assert states(project) == {"text": "done", "one": "done"}

    def holds(name: str) -> dict[str, str]:
        shown = slurm_here.run("scontrol", "show", "job", "-o", found["jobs"][name].rpartition("/")[2])
        return {key: value for key, value in (pair.partition("=")[::2] for pair in shown.split())
                if key in ("NumNodes", "NumTasks", "NumCPUs", "TresPerNode", "MinMemoryNode")}  # fmt: skip

    # With what its GPU would have brought: cores, and memory.
    assert holds("text") == {"NumNodes": "1", "NumTasks": "1", "NumCPUs": "3", "MinMemoryNode": "100M"}
    # Of a function of the user's nobody knows that it takes none.
    one = {"NumNodes": "1", "NumTasks": "1", "NumCPUs": "3", "MinMemoryNode": "0", "TresPerNode": "gres:gpu:1"}
    assert holds("one") == one

    def gpus(step: Step, trains: bool, *options: str) -> tuple[int | None, str | None]:
        light = _light(step, "slurm", [*OPTIONS, *options], trains)
        assert (light.nodes, light.ntasks_per_node) == (1, 1)
        return light.gpus_per_node, light.gres

    steps = workflow.steps
    # A model is asked on a GPU, where trainings by the same options take theirs, or where GPUs are asked for.
    assert gpus(steps["report"], True) == gpus(steps["report"], False, "gpus_per_node=8") == (1, None)
    assert gpus(steps["report"], False) == gpus(steps["report"], True, "tasks_per_node=8") == (None, None)
    assert gpus(steps["report"], False, "gres=gpu:h100:8,lscratch:4") == (None, "lscratch:4,gpu:h100:1")
    assert gpus(steps["text"], True, "gres=gpu:h100:8,lscratch:4") == (None, "lscratch:4")
    assert gpus(steps["text"], True) == gpus(steps["one"], True) == (None, None)
    # Where a partition takes no job without one.
    assert _light(steps["text"], "slurm", ["gpus=1", "cpus_per_gpu=8"], True).additional_parameters.items() >= {
        ("gpus", 1), ("cpus_per_gpu", 8)
    }  # fmt: skip
    on_cpu = evaluate("report", model="nowhere", output="report", device="cpu")
    assert gpus(on_cpu, True, "gpus_per_node=8") == (None, None)
    (project / "mine.py").write_text(
        "from nemo_cpt.executors import local\n\n\ndef eight():\n    return local(processes=8, gpus=0)\n"
    )
    here = _light(steps["text"], f"{project}/mine.py:eight", [], True)
    assert (here.ntasks_per_node, here.launcher) == (1, None)


def test_an_array_would_do_each_step_as_often_as_it_has_tasks(project: Path) -> None:
    make_folder(project)
    file, chosen = write(chain(project)), Chosen(until="two")
    with pytest.raises(CptError, match=r"executor\.array=0-1: every task of it would do the whole of each step"):
        submit(file, chosen, "slurm", [*OPTIONS, "array=0-1"])
    (project / "mine.py").write_text("from nemo_cpt.executors import local\n\ndef here():\n    return local()\n")
    with pytest.raises(CptError, match="NeMo-Run waits for those of LocalExecutor"):
        submit(file, chosen, f"{project}/mine.py:here", [], detach=True)
    assert not (project / "out").exists()


def test_jobs_that_were_left_to_themselves_are_not_started_twice(slurm_here, project: Path) -> None:
    make_folder(project)
    file = write(Workflow("light", [own("one", "wait", ["a.txt"], "one.txt", until="go")], project))
    found = submit(file, Chosen(), "slurm", OPTIONS, detach=True)
    for again in (lambda: submit(file, Chosen(), "slurm", OPTIONS), lambda: run(load(file))):
        with pytest.raises(
            CptError, match=rf"experiment {found['experiment']} runs this workflow \(one\): wait for it"
        ):
            again()
    (project / "go").touch()
    slurm_here.wait_for(found["jobs"]["one"].rpartition("/")[2], "COMPLETED")
    assert run(load(file))["steps"]["one"]["starts"] == 1


def test_a_training_is_a_job_of_its_own_between_its_beginning_and_its_end(slurm_here, project: Path) -> None:
    """One that was stopped when it had done its last step, so that its job has nothing to import NeMo for."""
    make_folder(project)
    train_tokenizer(CORPUS, project / "tokenizer", 512)
    make_untrained(project / "base", project / "tokenizer", "tiny")
    saved = project / "results/tiny_cpt/checkpoints/steps=2"
    shutil.copytree(project / "base", saved)
    (saved / "run.json").write_text(json.dumps({"step": 2}))
    step = train("train", recipe="tiny.continual_pretrain", base="base", data="ds/en", model="base", max_steps=2)
    for ending in (".bin", ".idx"):
        (project / "ds").mkdir(exist_ok=True)
        (project / f"ds/en_text_document{ending}").touch()
    workflow = Workflow("light", [step], project)
    trained, state = workflow.steps["train"], State(workflow)
    stopped = Record("train", "train", trained.parameters, state=STOPPED, inputs=inputs_of(trained))
    with state.held():
        state.write(stopped.replace(outputs={path: {} for path in trained.writes}))
    found = submit(write(workflow), Chosen(force=True), "slurm", OPTIONS)
    assert list(found["jobs"]) == ["train-begin", "train", "train-end"]
    assert states(project) == {"train": "done"}
    record = json.loads((project / "light.workflow/steps/train.json").read_bytes())
    assert record["starts"] == 2
    assert any("steps=2" in name for name in record["outputs"]["results/tiny_cpt"])
