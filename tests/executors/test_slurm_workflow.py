"""A workflow as jobs of a real cluster, each behind those that it needs; skipped where Slurm is not installed."""

import json
from pathlib import Path

import pytest

from nemo_cpt import CptError
from nemo_cpt.workflow import Chosen, as_yaml
from nemo_cpt.workflow.cluster import submit
from nemo_cpt.workflow.dry_run import dry_run
from nemo_cpt.workflow.files import load
from tests.workflow.conftest import chain, make_folder, own

OPTIONS = ["time=5"]


def test_steps_are_jobs_behind_those_that_they_need(slurm_here, project, tmp_path: Path) -> None:
    make_folder(project)
    (project / "w.yaml").write_text(as_yaml(chain(project)))
    found = submit(project / "w.yaml", Chosen(until="two"), "slurm", OPTIONS)
    assert list(found["jobs"]) == ["one", "two"]
    assert (project / "out/two.txt").read_text() == "a+a"
    record = json.loads((project / "light.workflow/record.json").read_bytes())
    assert [name for name, step in record["steps"].items() if step and step["state"] == "done"] == ["one", "two"]
    # What is done is no job; what fails ends what waits for it, and says why.
    fails = own("three", "crash", ["b.txt"], "three.txt")
    workflow = chain(project)
    (project / "w.yaml").write_text(as_yaml(type(workflow)("light", [*list(workflow.steps.values())[:1],
                                    fails, *list(workflow.steps.values())[2:]], project)))  # fmt: skip
    with pytest.raises(CptError, match="three was killed by SIGKILL"):
        submit(project / "w.yaml", Chosen(), "slurm", OPTIONS)
    assert not (project / "four.txt").exists()
    left = {each.step.name: each.why for each in dry_run(load(project / "w.yaml"), Chosen()).standings if not each.done}
    assert left == {"three": "failed", "four": "new"}
