"""The tiny recipe over the real cluster: preempted, it comes back at its step and reaches the unbroken run's loss."""

import nemo_run as run
import pytest
from helpers import losses, recipe_arguments, wait_until

from nemo_cpt.executors import slurm


def task(material, directory, processes):
    from nemo_cpt.cli.task import run_recipe

    arguments = recipe_arguments(material, directory, processes)
    return run.Partial(run_recipe, recipe="tiny.continual_pretrain", arguments=arguments, overrides=[])


def submit(task, executor):
    with run.Experiment("t", executor=executor, enable_goodbye_message=False) as experiment:
        experiment.add(task, name="t")
        experiment.run(detach=True)
    return experiment, experiment.jobs[0].handle.rpartition("/")[2]


@pytest.mark.timeout(900)
def test_preempted_it_reaches_the_unbroken_runs_loss(slurm_here, project, material, tmp_path):
    """The unbroken run is two nodes of one task, the preempted one node of two: data parallel over gloo both."""
    from test_slurm import log_of

    _, unbroken = submit(task(material, tmp_path / "unbroken", 1), slurm(nodes=2, tasks_per_node=1, time="20"))
    broken, job = submit(task(material, tmp_path / "broken", 2), slurm(nodes=1, tasks_per_node=2, time="20"))
    wait_until(lambda: list((tmp_path / "broken").rglob("steps.jsonl")) and len(losses(tmp_path / "broken")) > 3, 240)
    slurm_here.run("scontrol", "requeue", job)
    for each in (unbroken, job):
        assert slurm_here.wait_for(each, "COMPLETED", "FAILED", timeout=300) == "COMPLETED"
    log = log_of(broken)
    assert "Preemption detected, saving checkpoint and exiting" in log
    steps = [step for step, _ in losses(tmp_path / "broken")]
    assert steps == sorted(set(steps))  # it went on at the next step; none was repeated or left out
    assert losses(tmp_path / "broken")[-1] == pytest.approx(losses(tmp_path / "unbroken")[-1], abs=1e-4)
