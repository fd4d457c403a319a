"""Slurm's commands and partitions: a real cluster where one can be started, scripts in sinfo's place elsewhere."""

import pytest
from slurm_cluster import SlurmCluster, missing

from nemo_cpt.doctor import Examination, Job, Place
from nemo_cpt.doctor.slurm import COMMANDS, slurm

GPU_LINES = "gpu*|up|4|gpu:h100:8\\ncpu|up|9|(null)\\nold|down|2|gpu:v100:4\\n"


def submitted(partition=None, **changes):
    job = Job("r", **{"gpus_per_node": 8} | changes, place=Place("slurm", here=False, slurm=True, partition=partition))
    return slurm(Examination(job))


@pytest.fixture
def sinfo(tmp_path, monkeypatch):
    def make(lines=GPU_LINES, code=0):
        for command in COMMANDS:
            script = tmp_path / command
            script.write_text(f'#!/bin/sh\nprintf "{lines}"\nexit {code}\n' if not code else f"#!/bin/sh\n{lines}\n")
            script.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))

    return make


def test_partitions(sinfo):
    sinfo()
    assert submitted().found == "partition gpu: up, 4 nodes, gres gpu:h100:8"
    assert submitted("gpu,cpu").state == "ok"
    assert submitted("gup").found == "there is no partition gup; it has partitions gpu*, cpu, old"
    assert submitted("old").found == "partition old is down"
    assert submitted("gpu", num_nodes=5).found == "partition gpu has 4 nodes, the job takes 5"
    assert submitted("cpu").state == "warning"
    assert submitted("cpu", gpus_per_node=0).state == "ok"
    assert slurm(Examination()).found == "partitions gpu*, cpu, old"


def test_no_default_partition(sinfo):
    sinfo("cpu|up|9|(null)\\n")
    assert (submitted().state, submitted().cure) == ("error", "give executor.partition=")


def test_no_slurm_and_no_controller(sinfo, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert submitted().found == "not here: sbatch, squeue, sinfo"
    assert slurm(Examination()).state == "skipped"
    sinfo("echo 'slurm_load_partitions: Unable to contact slurm controller' >&2; exit 1", code=1)
    assert submitted().found == "slurm_load_partitions: Unable to contact slurm controller"
    assert submitted().state == "error"
    assert slurm(Examination()).state == "skipped"


@pytest.mark.skipif(bool(missing()), reason=missing() or "-")
def test_a_real_cluster(tmp_path_factory, monkeypatch):
    cluster = SlurmCluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        for name, value in cluster.environ.items():
            monkeypatch.setenv(name, value)
        assert submitted().found == "partition cpu: up, 2 nodes, gres gpu:2"
        assert submitted("urgent").state == "ok"
        assert submitted("gpu").found == "there is no partition gpu; it has partitions cpu*, patient, short, urgent"
        assert submitted(num_nodes=3).state == "error"
    finally:
        cluster.stop()
