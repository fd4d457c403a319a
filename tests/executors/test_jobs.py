import json
import os
import subprocess
import sys
from pathlib import Path

import nemo_run as run
import pytest

from nemo_cpt import CptError
from nemo_cpt.executors import local
from nemo_cpt.launching import jobs
from tests.support.executor_jobs import recipe_arguments


def test_a_failed_experiment_is_found_again(project):
    import tasks

    with pytest.raises(CptError, match="there are no experiments"):
        jobs.status(None)
    with pytest.raises(CptError, match="planted failure"):
        run.run(run.Partial(tasks.fail, message="planted failure"), executor=local(), name="t")
    found = jobs.status(None)
    assert [task["status"] for task in found["tasks"]] == ["FAILED"]
    assert json.loads(json.dumps(found)) == found
    logs = jobs.logs(found["experiment"], 2)
    assert logs.startswith("The last lines of ")
    assert "planted failure" in logs
    assert len(logs.splitlines()) == 3
    with pytest.raises(CptError, match="there is no experiment 't_1' in"):
        jobs.logs("t_1", 2)


def test_json_alone_is_on_stdout(material, tmp_path):
    """A dry run's holds what NeMo-Run says, a job's log is on stderr; of a run, its state and its cancellation too."""

    def printed(*arguments, says=""):
        command = [Path(sys.executable).with_name("nemo-cpt"), *arguments, "--json"]
        environ = os.environ | {"NEMORUN_HOME": str(tmp_path / "home")}
        done = subprocess.run(command, env=environ, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, done.stderr
        assert says in done.stderr
        return json.loads(done.stdout)

    given = recipe_arguments(material, tmp_path / "results", 1) | {"max_steps": 1, "val_check_interval": 1}
    pairs = [f"{name}={json.dumps(each) if name == 'data' else each}" for name, each in given.items()]
    planned = printed("run", "tiny", *pairs, "--dryrun")
    assert "Entering Experiment" in planned["submitted"]
    assert planned["experiment"] == "tiny-continual_pretrain"  # there is none, which would have a number
    assert list((tmp_path / "home" / "experiments").glob("*")) == []
    ran = printed("run", "tiny", *pairs, says="`Trainer.fit` stopped: `max_steps=1` reached")
    assert ran["jobs"][0].startswith("local")
    listed = printed("status")["experiments"]
    assert [each["tasks"][0]["status"] for each in listed] == ["SUCCEEDED"]  # a dry run is none
    assert printed("status", ran["experiment"])["tasks"] == listed[0]["tasks"]
    cancelled = printed("cancel", ran["experiment"])
    assert (cancelled["experiment"], cancelled["tasks"]) == (ran["experiment"], [])  # it had ended
    assert list(cancelled["ended"].values()) == ["SUCCEEDED"]
