import json

import nemo_run as run
import pytest

from nemo_cpt import CptError
from nemo_cpt.cli import jobs
from nemo_cpt.executors import local


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
