"""The tiny recipe over the real cluster: whatever stops it, it comes back and ends as the run that nothing stopped."""

import nemo_run as run
import pytest

from nemo_cpt.executors import slurm
from nemo_cpt.training.metrics import read_metrics
from tests.executors.test_slurm import log_of, submit
from tests.support.executor_jobs import recipe_arguments, wait_until

STEPS, INTERVAL = 25, 5
AS_ON_GPUS = ["data.num_workers=2", "data.persistent_workers=true", "trainer.strategy.ckpt_async_save=true"]
RUN = "tiny_cpt"


class Job:
    """A training that waits at chosen steps until the test has done something to it."""

    def __init__(self, cluster, material, directory, waits=(), fields=(), **options):
        import tasks

        self.cluster, self.directory = cluster, directory
        directory.mkdir(exist_ok=True)
        self.executor = slurm(time="30", preempt_seconds=60, **options)
        arguments = recipe_arguments(material, directory, self.executor.ntasks_per_node)
        arguments |= {"max_steps": STEPS, "val_check_interval": INTERVAL}
        self.task = run.Partial(
            tasks.train, arguments=arguments, fields=list(fields), folder=str(directory), waits=list(waits)
        )
        self.submit()

    def submit(self):
        self.experiment, self.id = submit(self.task, self.executor)

    def wait_at(self, step):
        """Wait until it waits at a step."""
        wait_until(lambda: (self.directory / f"at.{step}").exists() or not self.is_underway(), every=0.5)
        assert self.is_underway(), self.log

    def told(self, number):
        """Wait until it was told to stop so many times, over all its starts; then let it go on, which is to save."""
        wait_until(lambda: self.log.count("saving at the end of the step") == number)

    def go_on(self, step):
        (self.directory / f"go.{step}").touch()

    def stop(self, step, number, *command):
        """At a step, have Slurm stop it by one of its commands."""
        self.wait_at(step)
        self.cluster.run(*command)
        self.told(number)
        self.go_on(step)

    def is_underway(self):
        return self.cluster.state(self.id) in ("PENDING", "RUNNING", "COMPLETING")

    @property
    def log(self):
        return log_of(self.experiment)

    def ends(self, *states):
        assert self.cluster.wait_for(self.id, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT") in states, self.log


def measured(job, prefix):
    """The values of one kind, by step."""
    lines = read_metrics(job.directory / RUN)
    return {(line["step"], name): value for line in lines for name, value in line.items() if name.startswith(prefix)}


def checkpoints(job):
    return sorted(
        path.name for path in (job.directory / RUN / "checkpoints").glob("*") if "unfinished" not in path.name
    )


@pytest.mark.timeout(2400)
def test_stopped_in_every_way_it_ends_as_the_run_that_nothing_stopped(slurm_here, project, material, tmp_path):
    """Before and after the first checkpoint; by signals that reach every process of the job, also what it started."""
    unbroken = Job(slurm_here, material, tmp_path / "unbroken", tasks_per_node=1, nodelist="cpt1")
    slurm_here.run("scontrol", "create", "PartitionName=training", "Nodes=ALL", "MaxTime=60", "GraceTime=30")
    on_other = {"tasks_per_node": 1, "nodelist": "cpt2", "partition": "training"}
    one = Job(slurm_here, material, tmp_path / "one", (3, 8, 18), AS_ON_GPUS, **on_other)
    two = Job(slurm_here, material, tmp_path / "two", (7, 13, 22), tasks_per_node=2, nodelist="cpt1")
    urgent = (
        "sbatch",
        "--partition=urgent",
        "--nodelist=cpt2",
        "--exclusive",
        "--output=/dev/null",
        "--wrap=true",
    )
    one.stop(3, 1, *urgent)  # with a grace period: only the tasks are signalled
    two.stop(7, 1, "scontrol", "requeue", two.id)
    one.stop(8, 2, "scancel", "--signal=TERM", one.id)  # as Slurm does ahead of the limit
    two.wait_at(13)
    slurm_here.set_minutes_left(two.id, 1)  # told 60 s ahead
    two.told(2)
    slurm_here.set_minutes_left(two.id, 20)
    two.go_on(13)
    slurm_here.run("scontrol", "update", "PartitionName=training", "GraceTime=0")
    one.stop(18, 3, *urgent)
    two.stop(22, 3, "scancel", two.id)
    two.ends("CANCELLED")
    two.submit()
    for job in (unbroken, one, two):
        job.ends("COMPLETED")
    for name in ("reduced_train_loss", "lr", "val_loss"):
        assert measured(one, name) == measured(unbroken, name)
        assert measured(two, name) == pytest.approx(measured(unbroken, name), abs=1e-4)  # summed over two processes
    assert checkpoints(one) == checkpoints(two) == checkpoints(unbroken)


def test_a_second_job_in_the_same_folder_is_refused(slurm_here, project, material, tmp_path):
    first = Job(slurm_here, material, tmp_path / "results", (2,), tasks_per_node=1)
    first.wait_at(2)
    second = Job(slurm_here, material, tmp_path / "results", tasks_per_node=1)
    second.ends("FAILED")
    assert "is in use by process" in second.log
    first.go_on(2)
    first.ends("COMPLETED")
