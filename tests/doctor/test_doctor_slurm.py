"""Slurm's commands and partitions: a real cluster where one can be started, scripts in sinfo's place elsewhere."""

import math

import pytest

from nemo_cpt import CptError, executors
from nemo_cpt.doctor import Examination, Job, Place
from nemo_cpt.doctor.slurm import COMMANDS, cores, memory, saving_in_time, slurm
from nemo_cpt.executors.examination import place_of
from nemo_cpt.launching.description import place
from nemo_cpt.planning import Workload
from nemo_cpt.planning.memory import host_memory
from tests.support.slurm_cluster import SlurmCluster, missing

GPU_LINES = "gpu*|up|4|gpu:h100:8\\ncpu|up|9|(null)\\nold|down|2|gpu:v100:4\\n"


def submitted(partition=None, **changes):
    job = Job("r", **{"gpus_per_node": 8} | changes, place=Place("slurm", here=False, slurm=True, partition=partition))
    return slurm(Examination(job))


EIGHT_B = Workload(
    num_layers=32, hidden_size=4096, ffn_hidden_size=14336, num_attention_heads=32, num_query_groups=8, kv_channels=128,
    vocab_size=128256, global_batch_size=1024, gpus=8, tensor_model_parallel_size=2, sequence_parallel=True,
)  # fmt: skip


def saved(planned=lambda: EIGHT_B, **place):
    """What the doctor finds of a job of Llama-3.1-8B's, whose workload takes half a minute to read from its recipe."""
    where = Place("slurm", here=False, **place)
    return saving_in_time(Examination(Job("r", gpus_per_node=8, place=where, planned=planned)))


@pytest.fixture
def sinfo(tmp_path, monkeypatch):
    def make(lines=GPU_LINES, code=0):
        for command in COMMANDS:
            script = tmp_path / command
            script.write_text(f'#!/bin/sh\nprintf "{lines}"\nexit {code}\n' if not code else f"#!/bin/sh\n{lines}\n")
            script.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))

    return make


def test_partitions(sinfo, monkeypatch):
    monkeypatch.setenv("SINFO_PARTITION", "debug")  # a user's, by which sinfo hides the others
    sinfo(f"${{SINFO_PARTITION-{GPU_LINES}}}")
    assert submitted().found == "partition gpu: up, 4 nodes, gres gpu:h100:8"
    assert submitted("gpu,cpu").state == "ok"
    assert submitted("gup").found == "there is no partition gup; it has partitions gpu*, cpu, old"
    assert submitted("old").found == "partition old is down"
    assert submitted("gpu", num_nodes=5).found == "partition gpu has 4 nodes, the job takes 5"
    assert submitted("gpu,cpu", num_nodes=10).found == "partition gpu,cpu has 9 nodes, the job takes 10"
    assert submitted("cpu").state == "warning"
    assert submitted("cpu", gpus_per_node=0).state == "ok"
    assert slurm(Examination()).found == "partitions gpu*, cpu, old"


def test_no_default_partition(sinfo):
    sinfo("cpu|up|9|(null)\\n")
    assert (submitted().state, submitted().cure) == ("error", "give executor.partition=")


def test_no_slurm_and_no_controller(sinfo, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert submitted().found == "not here: sbatch, squeue, sinfo, scontrol"
    assert slurm(Examination()).state == "skipped"
    sinfo("echo 'slurm_load_partitions: Unable to contact slurm controller' >&2; exit 1", code=1)
    assert submitted().found == "slurm_load_partitions: Unable to contact slurm controller"
    assert submitted().state == "error"
    assert slurm(Examination()).state == "skipped"


def test_time_to_save(sinfo, tmp_path):
    sinfo()
    (tmp_path / "scontrol").write_text(
        "#!/bin/sh\n"
        'case "$*" in *config) echo "KillWait                = 30 sec" ;; *)\n'
        'echo "PartitionName=gpu AllowGroups=ALL Default=YES GraceTime=0 Hidden=NO PreemptMode=OFF State=UP"\n'
        'echo "PartitionName=spot AllowGroups=ALL Default=NO GraceTime=600 Hidden=NO PreemptMode=REQUEUE State=UP"\n'
        'echo "PartitionName=scraps AllowGroups=ALL Default=NO GraceTime=0 Hidden=NO PreemptMode=REQUEUE State=UP"\n'
        "esac\n"
    )
    found = saved(slurm=True, limit_seconds=4 * 3600)
    assert found.state == "ok"
    assert "a checkpoint (112 GB at 1 GB/s)" in found.found
    assert found.found.endswith("Slurm leaves 900 s ahead of the limit, 30 s when it is cancelled or requeued")
    short = saved(slurm=True, limit_seconds=4 * 3600, preempt_seconds=120)
    assert (short.state, short.cure) == ("warning", "give executor.preempt_seconds=900, and time for it")
    assert saved(slurm=True, limit_seconds=600).state == "warning"  # of which half is taken
    assert "630 s when the job is preempted" in saved(slurm=True, partition="spot").found
    assert saved(slurm=True, partition="spot").state == "ok"
    preempted = saved(slurm=True, partition="spot,scraps")
    assert (preempted.state, "steps since the last checkpoint" in preempted.cure) == ("warning", True)
    assert saved(slurm=False).state == "skipped"


def test_a_rank_has_more_than_one_core(sinfo, tmp_path):
    sinfo()
    (tmp_path / "scontrol").write_text(
        "#!/bin/sh\n"
        'case "$*" in *config) echo "SelectType              = select/cons_tres" ;; *)\n'
        'echo "PartitionName=gpu Default=YES JobDefaults=(null) OverSubscribe=NO State=UP"\n'
        'echo "PartitionName=kind Default=NO JobDefaults=DefCpuPerGPU=16 OverSubscribe=NO State=UP"\n'
        'echo "PartitionName=whole Default=NO JobDefaults=(null) OverSubscribe=EXCLUSIVE State=UP"\n'
        "esac\n"
    )

    def found(gpus=8, **place):
        return cores(Examination(Job("r", gpus_per_node=gpus, place=Place("slurm", here=False, **place))))

    assert found(slurm=True).state == found(slurm=True, partition="kind,gpu").state == "warning"
    assert found(slurm=True).cure.startswith("give executor.cpus_per_task=8")
    assert found(slurm=True, partition="kind").state == found(slurm=True, partition="whole").state == "ok"
    assert found(slurm=True, asks_for_cores=True).state == "ok"
    assert found(slurm=False).state == found(0, slurm=True).state == "skipped"
    for given in (["cpus_per_task=8"], ["exclusive=true"], []):
        assert place("slurm", given).asks_for_cores is bool(given)
    for directives in ({"cpus_per_task": 8}, {"exclusive": True}, {}):
        assert place_of(executors.slurm(**directives)).asks_for_cores is bool(directives)
    job = executors.slurm()
    job.cpus_per_task = 4
    assert place_of(job).asks_for_cores


def test_a_default_of_memory_is_compared_with_the_plan(sinfo, tmp_path):
    sinfo()
    (tmp_path / "scontrol").write_text(
        "#!/bin/sh\n"
        f'echo "$*" >> {tmp_path}/asked\n'
        f'case "$*" in *config) /bin/cat {tmp_path}/config ;; *)\n'
        'echo "PartitionName=gpu Default=YES JobDefaults=(null) OverSubscribe=NO DefMemPerCPU=4096 MaxMemPerNode=0"\n'
        'echo "PartitionName=kind Default=NO JobDefaults=DefCpuPerGPU=16 OverSubscribe=NO DefMemPerCPU=4096"\n'
        'echo "PartitionName=cards Default=NO JobDefaults=DefMemPerGPU=65536 DefMemPerNode=UNLIMITED"\n'
        'echo "PartitionName=whole Default=NO JobDefaults=(null) OverSubscribe=EXCLUSIVE DefMemPerCPU=4096"\n'
        'echo "PartitionName=plain Default=NO JobDefaults=(null) OverSubscribe=NO DefMemPerNode=UNLIMITED"\n'
        "esac\n"
    )

    def found(partition=None, gpus=8, config="DefMemPerNode           = UNLIMITED", shared="CR_CORE_MEMORY", **place):
        (tmp_path / "config").write_text(f"{config}\nSelectTypeParameters    = {shared}\n")
        where = Place("slurm", here=False, **{"slurm": True, "partition": partition} | place)
        examination = Examination(Job("r", gpus_per_node=gpus, place=where, planned=lambda: EIGHT_B))
        return memory(examination), examination

    short, examination = found()
    needed = host_memory(EIGHT_B).total / 2**30
    assert (short.state, short.found) == (
        "warning",
        f"of a node's memory Slurm gives the job 32 GiB by default, and its plan takes {needed:.0f} GiB",
    )
    assert short.cure == f"give executor.mem={math.ceil(needed / 0.9)}G, or 0 for the node's whole"
    for partition, more in (("kind", {}), ("cards", {}), ("whole", {}), ("plain", {}), ("gpu", {"cores_of_task": 8})):
        assert found(partition, **more)[0].state == "ok", partition
    assert found("plain", config="DefMemPerNode           = 8192")[0].found.startswith(
        "of a node's memory Slurm gives the job 8"
    )
    assert found(shared="CR_CORE")[0].state == found(asks_for_memory=True)[0].state == "ok"
    assert found(gpus=0)[0].state == found(slurm=False)[0].state == "skipped"
    # What several checks want to know is asked once.
    (tmp_path / "asked").unlink()
    for check in (cores, memory, saving_in_time):
        check(examination)
    assert not (tmp_path / "asked").exists()
    for given in ({"mem": "64G"}, {"mem": "0"}, {"mem_per_gpu": "8G"}, {}):
        assert place_of(executors.slurm(**given)).asks_for_memory is bool(given)
        assert place("slurm", [f"{name}={value}" for name, value in given.items()]).asks_for_memory is bool(given)
    assert place("slurm", ["cpus_per_task=4"]).cores_of_task == 4


@pytest.mark.skipif(bool(missing()), reason=missing() or "-")
def test_the_default_of_memory_is_what_a_real_slurm_gives(tmp_path, monkeypatch):
    defaults = {
        "by_core": ["DefMemPerCPU=10240"],
        "by_gpu": ["JobDefaults=DefMemPerGPU=30720"],
        "more_cores": ["DefMemPerCPU=10240", "JobDefaults=DefCpuPerGPU=2"],
        "by_node": ["DefMemPerNode=71680"],
        "none": [],
    }
    sizes = (([], {}), (["--cpus-per-task=3"], {"cores_of_task": 3, "asks_for_cores": True}))
    with SlurmCluster(tmp_path, shares="CR_Core_Memory", memory=400 << 10) as cluster:
        for name, value in cluster.environ.items():
            monkeypatch.setenv(name, value)
        given, said = [], []
        for partition, own in defaults.items():
            cluster.run("scontrol", "create", f"PartitionName={partition}", "Nodes=ALL", "MaxTime=60", *own)
            for size, asked in sizes:
                job = [f"--partition={partition}", "--gpus-per-node=2", "--ntasks-per-node=2", *size, "--time=1"]
                number = cluster.run("sbatch", "--wait", "--parsable", "--output=/dev/null", *job, "--wrap=true")
                shown = cluster.run("scontrol", "show", "job", "-o", number)
                given.append(int(shown.partition(",mem=")[2].partition("G")[0]))
                where = Place("slurm", here=False, slurm=True, partition=partition, **asked)
                found = memory(Examination(Job("r", gpus_per_node=2, place=where, planned=lambda: EIGHT_B)))
                said.append(found.found)
    assert given == [20, 60, 60, 60, 40, 60, 70, 70, 400, 400]
    assert [each for each in said if "no default" in each] == said[-2:]
    for gib, each in zip(given[:-2], said, strict=False):
        assert f"Slurm gives the job {gib} GiB by default" in each


def test_a_recipe_that_cannot_be_planned_does_not_stop_a_launch(sinfo):
    def unreadable():
        raise CptError("no such layer")

    sinfo()
    found = saved(unreadable, slurm=True)
    assert (found.state, "no such layer" in found.found) == ("warning", True)


@pytest.mark.skipif(bool(missing()), reason=missing() or "-")
def test_a_real_cluster(tmp_path_factory, monkeypatch):
    with SlurmCluster(tmp_path_factory.mktemp("slurm")) as cluster:
        for name, value in cluster.environ.items():
            monkeypatch.setenv(name, value)
        assert submitted().found == "partition cpu: up, 2 nodes, gres gpu:2"
        assert submitted("urgent").state == "ok"
        assert submitted("gpu").found == "there is no partition gpu; it has partitions cpu*, patient, short, urgent"
        assert submitted(num_nodes=3).state == "error"
        found = saved(slurm=True, partition="patient").found
        assert found.endswith("50 s when the job is preempted, 20 s when it is cancelled or requeued")
