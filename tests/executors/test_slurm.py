"""Against a real cluster of two nodes; skipped, with the reason, where Slurm is not installed."""

import base64
import json
import re
import subprocess
import time
import zlib
from pathlib import Path

import nemo_run as run
from nemo_cpt.executors import slurm


def submit(task, executor):
    """Submit without waiting; returns the experiment and its job's id."""
    with run.Experiment("t", executor=executor, enable_goodbye_message=False) as experiment:
        experiment.add(task, name="t")
        experiment.run(detach=True)
    return experiment, experiment.jobs[0].handle.rpartition("/")[2]


def log_of(experiment):
    """Everything the tasks printed, over all starts; empty before the first."""
    return "".join(log.read_text() for log in Path(experiment._exp_dir).glob("t/log-*.out"))


def test_two_nodes_run_the_code_on_disk_and_the_log_is_followed(slurm_here, project, tmp_path, monkeypatch, capfd):
    """Uncommitted changes travel; the tasks run in the folder they were submitted from; the secret is in no file."""
    monkeypatch.setenv("HF_TOKEN", "planted-secret")
    (project / "extra.py").write_text("VALUE = 1\n")
    (project / "tasks.py").write_text((project / "tasks.py").read_text() + "\nimport extra\n")
    import tasks

    executor = slurm(nodes=2, tasks_per_node=1, time="5", env={"COLOUR": "dark red"})
    run.run(run.Partial(tasks.report, path=str(tmp_path / "seen")), executor=executor, name="t")
    seen = [json.loads((tmp_path / f"seen.{rank}").read_text()) for rank in (0, 1)]
    assert {each["env"]["SLURMD_NODENAME"] for each in seen} == {"cpt1", "cpt2"}
    assert {each["env"]["HF_TOKEN"] for each in seen} == {"planted-secret"}
    assert {each["env"]["COLOUR"] for each in seen} == {"dark red"}
    assert {each["cwd"] for each in seen} == {str(project)}
    assert all(each["file"].endswith("/t/code/tasks.py") for each in seen)
    assert seen[0]["env"]["WANDB_RUN_ID"].startswith("t_")
    assert "reported rank 1" in capfd.readouterr().out
    assert_no_secret(tmp_path, b"planted-secret", allowed="seen.")


def assert_no_secret(folder, secret, allowed):
    """Look into every file, and into what NeMo-Run stores compressed."""
    for file in folder.rglob("*"):
        if not file.is_file() or file.name.startswith(allowed):
            continue
        content = file.read_bytes()
        for packed in re.findall(rb"[A-Za-z0-9_=-]{60,}", content):
            try:
                content += zlib.decompress(base64.urlsafe_b64decode(packed))
            except (ValueError, zlib.error):
                continue
        assert secret not in content, file


def test_secret_stands_in_one_file_of_mode_600_while_the_job_runs(slurm_here, project, tmp_path, monkeypatch):
    import tasks

    monkeypatch.setenv("MY_KEY", "planted 'secret'")
    counter = tmp_path / "counter"
    experiment, job = submit(
        run.Partial(tasks.count, path=str(counter), until=1000), slurm(tasks_per_node=1, time="5", secrets=["MY_KEY"])
    )
    wait_until(counter.exists)
    (file,) = Path(experiment._exp_dir).rglob("secrets.env")
    assert file.stat().st_mode & 0o777 == 0o600
    assert_no_secret(tmp_path, b"planted", allowed="secrets.env")
    assert "planted" not in subprocess.run(["ps", "axww", "-o", "args"], capture_output=True, text=True).stdout
    experiment.cancel("t")
    assert slurm_here.wait_for(job, "CANCELLED") == "CANCELLED"
    time.sleep(2)
    assert slurm_here.jobs() == []  # it saved on SIGTERM, and must not come back


def wait_until(true, timeout=60):
    deadline = time.time() + timeout
    while not true():
        assert time.time() < deadline
        time.sleep(0.3)


def test_a_preempted_job_comes_back_and_goes_on(slurm_here, project, tmp_path):
    """The signal ahead of the limit is Slurm's own, sent by hand; then an administrator's requeue."""
    import tasks

    counter = tmp_path / "counter"
    experiment, job = submit(
        run.Partial(tasks.count, path=str(counter), until=60), slurm(tasks_per_node=1, time="5", preempt_seconds=60)
    )
    wait_until(lambda: counter.exists() and int(counter.read_text()) > 3)
    slurm_here.run("scancel", "--signal=TERM", job)
    slurm_here.wait_for(job, "PENDING")
    wait_until(lambda: "stopped at" in log_of(experiment) and log_of(experiment).count("starting at") == 2, 180)
    slurm_here.run("scontrol", "requeue", job)
    slurm_here.wait_for(job, "PENDING")
    slurm_here.wait_for(job, "COMPLETED", timeout=240)
    log = log_of(experiment)
    starts = [int(line.rpartition(" ")[2]) for line in log.splitlines() if line.startswith("starting at")]
    stops = [int(line.rpartition(" ")[2]) for line in log.splitlines() if line.startswith("stopped at")]
    assert starts == [0, *stops]
    assert "counted to 60" in log
