import json
import subprocess
import sys
from pathlib import Path

import nemo_run as run
import pytest

from nemo_cpt import CptError
from nemo_cpt.executors import local


def test_import_takes_neither_torch_nor_nemo():
    code = "import sys, nemo_cpt.executors; print([m for m in ('torch', 'nemo', 'nemo_run') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_one_process_inherits_the_secret_and_the_interpreter(project, tmp_path, monkeypatch):
    import tasks

    monkeypatch.setenv("HF_TOKEN", "planted-secret")
    run.run(
        run.Partial(tasks.report, path=str(tmp_path / "seen")), executor=local(env={"COLOUR": "dark red"}), name="t"
    )
    seen = json.loads((tmp_path / "seen.0").read_text())
    assert seen["env"]["HF_TOKEN"] == "planted-secret"
    assert seen["env"]["COLOUR"] == "dark red"
    assert seen["env"]["PATH"].startswith(str(Path(sys.executable).parent))
    assert "LOCAL_RANK" not in seen["env"]
    assert seen["cwd"] == str(project)


def test_two_processes_under_torchrun(project, tmp_path):
    import tasks

    run.run(run.Partial(tasks.report, path=str(tmp_path / "seen")), executor=local(processes=2), name="t")
    worlds = [json.loads((tmp_path / f"seen.{rank}").read_text())["env"]["WORLD_SIZE"] for rank in (0, 1)]
    assert worlds == ["2", "2"]


def test_a_failed_task_raises_with_its_last_lines_and_path(project):
    import tasks

    with pytest.raises(CptError, match="planted failure") as raised:
        run.run(run.Partial(tasks.fail, message="planted failure"), executor=local(2), name="t")
    path = str(raised.value).partition("last lines of ")[2].partition(":\n")[0]
    assert "planted failure" in Path(path).read_text()


def test_upstream_still_ends_quietly_after_a_failure(project, monkeypatch):
    """The cure `raise_when_a_task_failed` can go once this fails."""
    import tasks

    executor = local()
    monkeypatch.setattr(run.Experiment, "__exit__", run.Experiment.__exit__.__wrapped__)
    run.run(run.Partial(tasks.fail, message="x"), executor=executor, name="t")


def test_gpus_are_the_first_of_the_visible_ones(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,7")
    assert local(gpus=2).env_vars["CUDA_VISIBLE_DEVICES"] == "3,5"
    assert local(gpus=2).ntasks_per_node == 2
    assert local(gpus=0).env_vars["CUDA_VISIBLE_DEVICES"] == ""
    assert "CUDA_VISIBLE_DEVICES" not in local().env_vars
    with pytest.raises(CptError, match="shows only 3"):
        local(gpus=4)


def test_two_nodes_by_hand_meet_at_the_master(project, monkeypatch):
    import tasks

    for name, value in {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29400", "NODE_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with run.Experiment("t", executor=local(processes=4, nodes=2)) as experiment:
        experiment.add(run.Partial(tasks.report, path="seen"), name="t")
        experiment.dryrun(log=False, delete_exp_dir=False)
        (command,) = experiment.jobs[0]._dryrun_info.request.role_params["t"]
    flags = dict(zip(command.args, command.args[1:], strict=False))
    assert flags["--rdzv-endpoint"] == "10.0.0.1:29400"
    assert (flags["--nnodes"], flags["--nproc-per-node"], flags["--node-rank"]) == ("2", "4", "1")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"processes": 0}, "at least one process"),
        ({"nodes": 0}, "at least one node"),
        ({"gpus": -1}, "0 to hide"),
        ({"env": {"HF_TOKEN": "x"}}, "HF_TOKEN looks like a secret"),
        ({"env": {"MY_API_KEY": "x"}}, "looks like a secret"),
        ({"env": {"A B": "x"}}, "not the name"),
        ({"nodes": 2}, "MASTER_ADDR, MASTER_PORT, NODE_RANK"),
    ],
)
def test_bad_input(arguments, says, monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(CptError, match=says):
        local(**arguments)
