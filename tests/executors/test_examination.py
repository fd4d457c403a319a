"""What Python launches is examined as what the command line does, whichever way it is launched."""

import json
import os
import re
import runpy
import subprocess
import sys
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import nemo_run as run
import pytest
from nemo_run.cli.api import RunContext

from nemo_cpt import CptError, catalog
from nemo_cpt.catalog.build import build_recipe
from nemo_cpt.corpus import Blend
from nemo_cpt.doctor import Examination, Place, containers, inputs
from nemo_cpt.doctor.built import job_of
from nemo_cpt.executors import docker, examination, local, nemo_run_patches, slurm
from nemo_cpt.launching.description import describe
from nemo_cpt.launching.executor import make_executor
from tests.support.commands import python
from tests.support.servers import serving

SCRIPT = """
import nemo_run as run
from nemo_cpt.corpus import Blend
from nemo_cpt.executors import local
from nemo_cpt.recipes import smollm2

if __name__ == "__main__":
    data = Blend(train={{"{folder}/en": 1.0}}, validation={{"en": "{folder}/held_out"}})
    recipe = smollm2.continual_pretrain("{folder}/base", data, model="base", max_steps=2)
    run.run(recipe, executor=local())
"""
TORCH_SAYS = ("FutureWarning: The pynvml package", "  import pynvml")  # in `import nemo_run`, before we are there


@pytest.fixture
def given(material):
    """Arguments of any recipe, for the tiny base."""
    data = {"train": {str(material / "en"): 1.0}, "validation": {"en": str(material / "held_out")}}
    return {"base": str(material / "base"), "data": data, "model": "base", "max_steps": 2, "seq_length": 64}


def test_a_script_that_launches_a_gpu_recipe_without_a_gpu_says_so_in_five_lines(material, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(folder=material))
    environ = os.environ | {"CUDA_VISIBLE_DEVICES": "-1", "NEMORUN_HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, script], env=environ, capture_output=True, text=True, cwd=tmp_path)
    lines = [line for line in done.stderr.splitlines() if not any(each in line for each in TORCH_SAYS)]
    refusal = [line for line in lines if "nemo_cpt: warning: " not in line]  # of the data
    assert refusal[0] == "nemo_cpt: smollm2_cpt is not launched (NEMO_CPT_FORCE=1 launches it all the same):"
    assert [line for line in refusal if line.startswith("  GPUs: none") and "smollm2_cpt takes 1" in line]
    assert len(refusal) <= 5
    assert len(done.stdout.splitlines()) == 1  # NeMo-Run's, which names the experiment
    assert done.returncode == 2


SHELL = """
import nemo_run as run
from nemo_cpt.executors import local
run.run(run.Script(inline="touch seen"), executor=local(), name="t")
"""
UNGUARDED = """
import nemo_run as run, tasks
from nemo_cpt.executors import local
def launch():
    run.run(run.Partial(tasks.report, path="seen"), executor=local(), name="t")
launch()
"""


def test_a_script_that_would_launch_again_in_its_own_job_is_refused(project, tmp_path):
    script = project / "launch.py"
    script.write_text(UNGUARDED)
    environ = os.environ | {"NEMORUN_HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, script], env=environ, capture_output=True, text=True, cwd=project)
    assert done.returncode == 2
    assert f'{script}, line 6, launches a job outside `if __name__ == "__main__":`. The job runs' in done.stderr
    assert not (project / "seen.0").exists()


def test_a_script_is_not_refused_for_what_its_job_would_not_execute(project):
    (project / "package").mkdir()
    (project / "package" / "guard.py").write_text(
        "from nemo_cpt.executors.examination import check_guarded as launch\n"
    )
    (project / "package" / "__main__.py").write_text("from .guard import launch\nlaunch()\n")
    runpy.run_module("package", run_name="__main__", alter_sys=True)
    (project / "launch.py").write_text("from package.guard import launch\nlaunch()\n")
    with pytest.raises(CptError, match="line 2, launches a job outside"):
        runpy.run_path("launch.py", run_name="__main__")
    # Of a shell script's job it is no Python that runs.
    (project / "launch.py").write_text(SHELL)
    runpy.run_path("launch.py", run_name="__main__")
    assert (project / "seen").exists()


@pytest.mark.parametrize("launch", [run.run, lambda recipe: run.run(recipe, executor=local(), direct=True)])
def test_a_run_in_this_process_is_refused_before_anything_is_built(given, launch):
    recipe = build_recipe("tiny.continual_pretrain", given | {"base": "nowhere", "model": "tiny"})
    with pytest.raises(CptError, match=r"tiny_cpt is not launched (.|\n)*base: the base nowhere is not there"):
        launch(recipe)


def test_what_fails_under_an_executor_of_nemo_runs_own_is_no_success(project):
    at_home = f"from nemo_run.config import set_nemorun_home\nset_nemorun_home({str(project.parent / 'home')!r})"
    launch = "run.run(run.Script(inline='exit 3'), executor=run.LocalExecutor(), name='t')"
    done = python(f"import nemo_run as run\nfrom nemo_cpt.recipes import tiny\n{at_home}\n{launch}")
    assert done.returncode != 0
    assert "CptError: task t ended as FAILED" in done.stderr


def test_what_is_forced_is_said_and_goes_on(given, monkeypatch, capsys):
    recipe = build_recipe("tiny.continual_pretrain", given | {"base": "nowhere", "model": "tiny"})
    monkeypatch.setenv("NEMO_CPT_FORCE", "1")
    examination.examine_task(recipe, Place())
    assert "nemo_cpt: error: base: the base nowhere is not there; import it first" in capsys.readouterr().err


def test_a_dry_run_says_what_would_refuse_it_and_prints_the_batch_script_as_it_is(given, project, capsys):
    recipe = build_recipe("tiny.continual_pretrain", given | {"base": "nowhere", "model": "tiny", "name": "cpt_of_ja"})
    run.run(recipe, executor=slurm("llm", "cpu", time="1:00:00"), dryrun=True)
    said = capsys.readouterr()
    assert "nemo_cpt: error: base: the base nowhere is not there; import it first" in said.err
    script = said.out.partition("#!/bin/bash")[2].splitlines()
    assert "#SBATCH --account=llm" in script
    (output,) = (line for line in script if line.startswith("#SBATCH --output="))
    assert output.endswith("sbatch_cpt.cpt_of_ja_%j.out")  # over 80 columns, and not broken; by the run's name
    recipe.log.name = "8b"  # as no cluster of SkyPilot's may be called, which takes the experiment's name
    run.run(fn_or_script=recipe, executor=slurm("llm", "cpu", time="1:00:00"), dryrun=True)
    assert "#SBATCH --job-name=cpt.nemo.collections.llm.api.pretrain" in capsys.readouterr().out
    with pytest.raises(CptError, match="base: the base nowhere is not there"):  # in this process, which would build it
        run.run(recipe, dryrun=True)


def test_a_dry_run_of_nemos_command_says_what_would_refuse_it(given, project, tmp_path, monkeypatch, capsys):
    recipe = build_recipe("tiny.continual_pretrain", given | {"base": "nowhere", "model": "tiny"})
    # As `nemo_cpt.cli.plugin` has it in `nemo`, whose own process ends with it.
    monkeypatch.setattr(run, "dryrun_fn", run.dryrun_fn)
    monkeypatch.setattr(RunContext, "_execute_task", RunContext._execute_task)
    nemo_run_patches.examine_dry_runs.__wrapped__()
    monkeypatch.setattr(RunContext, "parse_fn", lambda *_: recipe)
    before = set(tmp_path.rglob("*"))
    context = RunContext(name="pretrain", dryrun=True)
    context.executor = slurm("llm", "cpu")
    with pytest.raises(CptError, match="base: the base nowhere is not there; import it first"):
        context._execute_task(None, [])
    assert "Dry run for pretrain" in capsys.readouterr().out
    monkeypatch.setenv("NEMO_CPT_FORCE", "1")
    context._execute_task(None, [])
    assert "nemo_cpt: error: base: the base nowhere is not there" in capsys.readouterr().err
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("executor", "says"), [("local", "is 'local'"), (local, "is local, not called")])
def test_what_is_no_executor_is_told(given, executor, says, project):
    import tasks

    with pytest.raises(CptError, match=f"the executor {says}: give what a function of nemo_cpt.executors returns"):
        run.run(run.Partial(tasks.fail, message="never"), executor=executor, name="t")


def test_a_group_of_tasks_is_refused_where_it_would_be_no_job_of_their_size(given, project):
    import tasks

    both = [build_recipe("tiny.continual_pretrain", given), run.Partial(tasks.fail, message="never")]
    with run.Experiment("t") as experiment:
        for executor in (slurm("llm", "cpu"), [slurm("llm", "cpu"), local()]):
            with pytest.raises(CptError, match="which SlurmJob does not make: add each by its own"):
                experiment.add(both, executor=executor, name="both")
        assert experiment.add(both, executor=local(), name="both") == "both"
        assert [experiment.add(each, executor=slurm("llm", "cpu"), name="one") for each in both] == ["one", "one_1"]


def test_docker_without_an_engine_is_one_sentence(project, monkeypatch):
    import tasks

    monkeypatch.setenv("DOCKER_HOST", f"unix://{project}/no.sock")
    with pytest.raises(CptError, match=r"no Docker engine answers here \(.*\): install it, or start it"):
        run.run(run.Partial(tasks.fail, message="never"), executor=docker(), name="t")


class Engine(BaseHTTPRequestHandler):
    """Docker's engine as far as its version, and one image that it has."""

    def log_message(self, *args): ...

    def do_GET(self):
        answers = {"/version": {"ApiVersion": "1.44"}, "/v1.44/images/localhost/there/json": {"Id": "sha256:1"}}
        found = answers.get(self.path)
        data = json.dumps(found or {"message": "No such image"}).encode()
        self.send_response(200 if found else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def test_an_image_that_was_not_built_is_not_asked_of_a_registry(monkeypatch):
    with serving(ThreadingHTTPServer(("127.0.0.1", 0), Engine)) as server:
        monkeypatch.setenv("DOCKER_HOST", f"tcp://127.0.0.1:{server.server_address[1]}")
        with pytest.raises(
            CptError, match=r"there is no image localhost/nemo-cpt here: build it .*`docker build --tag"
        ):
            containers.check_engine("localhost/nemo-cpt")
        containers.check_engine("localhost/there")
        containers.check_engine("registry.example/pulled:1")


def test_a_task_that_waits_for_others_is_examined_without_the_files_that_they_may_make(given, project):
    recipe = build_recipe("tiny.continual_pretrain", given | {"base": "nowhere", "model": "tiny"})
    with run.Experiment("t", executor=local()) as experiment:
        for name in ("first", "second"):
            experiment.add(recipe, name=name)
        orders = {
            sequential: [comes_first for _, _, comes_first in examination.tasks_of(experiment, sequential)]
            for sequential in (False, True)
        }
    assert orders == {False: [True, True], True: [True, False]}
    examination.examine_task(recipe, Place(), comes_first=False)
    with pytest.raises(CptError, match="is not launched"):
        examination.examine_task(recipe, Place())


def test_what_trains_nothing_is_not_examined(project, tmp_path):
    import tasks

    run.run(run.Partial(tasks.report, path=str(tmp_path / "seen")))
    assert (tmp_path / "seen.0").exists()


@pytest.mark.parametrize(
    ("recipe", "wrong", "says"),
    [
        ("tiny", {"stop_when": {"jp": "+3%"}}, "stop_when names jp, and the run validates on en"),
        ("tiny", {"stop_when": {"en": 3}}, r"stop_when\['en'\] is 3: give by how many percent"),
        ("tiny", {"precision": "fp9"}, "precision=fp9: give bf16, fp8, fp8_blockwise"),
        ("tiny", {"bf16_layers": 2}, "give bf16_layers with fp8 only"),
        ("tiny", {"precision": "fp8", "bf16_layers": -1}, "bf16_layers=-1: give bf16_layers=0 or more"),
        ("tiny", {"grown_rows_first": 0}, "grown_rows_first is 0: give 1 or more"),
        ("tiny", {"grown_rows_first": 2}, "has not grown"),
        ("tiny", {"extend": "more"}, "extend is 'more': give one of rewarm"),
        (
            "tiny",
            {"unlike_base": ["rope"], "base": "elsewhere", "model": "tiny"},
            "unlike_base names rope: what can",
        ),
        ("tiny", {"export_keep": 1}, "give both, or neither"),
        ("tiny", {"export_every": 3, "val_check_interval": 2}, "export_every 3 is not a multiple of the 2 steps"),
        ("tiny.instruction_tune", {"replay_share": 0.1}, "replay_share is 0.1 with no replay"),
        (
            "tiny.instruction_tune",
            {"replay": Blend(train={"ds/en": 1.0}, validation={"ja": "ds/ja"})},
            "conversations and replay both have a validation set 'ja'",
        ),
        ("llama31_8b.continual_pretrain_single_gpu", {"state_precision": "bf16"}, "is for training every parameter"),
        ("llama31_8b.continual_pretrain_single_gpu", {"peft_scheme": "ia3"}, "peft_scheme is 'ia3': it can be lora or"),
        (
            "llama31_8b.continual_pretrain_single_gpu",
            {"grown_rows_first": 2, "base": "elsewhere", "model": "llama31_8b"},
            "the output layer are frozen",
        ),
        ("gpt.pretrain", {"params": "7B"}, "params is '7B'; it can be 124M"),
    ],
)
def test_python_and_the_command_line_refuse_the_same_option(given, recipe, wrong, says, tmp_path):
    function = catalog.recipe(recipe)
    given = given | {"directory": str(tmp_path)} | wrong
    if recipe == "tiny.instruction_tune":
        given["data"] = {"train": {"sft/ja": 1.0}, "validation": {"ja": "sft/held_out"}}
    if recipe == "gpt.pretrain":
        given.pop("model")
    kind = catalog.mixture_of(function.parameters["data"].annotation)
    with pytest.raises(CptError, match=says) as told:
        describe(function, given | {"data": kind(**given["data"])}, [], "local", [])
    with pytest.raises(CptError, match=says) as refused:
        build_recipe(function.name, given)
    assert told.value.message == refused.value.message


EIGHT = {"gpus_per_node": 8, "base": "x", "data": Blend(train={"ds/en": 1.0})}
ON_KUBERNETES = ["image=i", "workdir_pvc=w", "gpus_per_node=8"]


@pytest.mark.parametrize(
    ("executor", "options", "says"),
    [
        ("slurm", ["gpus_per_node=4"], "for 8 processes on each machine .*, and slurm starts 4: give both the same"),
        ("slurm", ["gpus_per_node=8", "nodes=2"], ""),  # the trainer takes the job's nodes
        ("slurm", ["gres=gpu:8"], ""),
        ("local", ["gpus=4"], "local starts 4"),
        ("local", [], ""),
        ("local", ["nodes=2"], r"for 1 machines \(num_nodes\), and local starts 2"),
        ("docker", [], ""),
        ("skypilot", ["gpus=H100"], "skypilot starts 1"),
        ("kubernetes", ON_KUBERNETES, ""),
        ("kubernetes", [*ON_KUBERNETES, "nodes=2"], r"for 1 machines \(num_nodes\), and kubernetes starts 2"),
    ],
)
def test_recipe_and_executor_are_of_one_size(executor, options, says):
    """What is not would end in Lightning, when the job has its GPUs."""
    found = inputs.settings(Examination(describe(catalog.recipe("llama31_8b"), EIGHT, [], executor, options)))
    assert found.state == ("error" if says else "ok")
    assert re.search(says, str(found).replace(";", ":"))


MINE = """
import nemo_run as run
from nemo_cpt.executors import local, slurm, ssh

def sized(): return slurm("llm", "gpu", gpus_per_node=4)
def unsized(): return slurm("llm", "gpu")
def nodes(): return slurm("llm", "gpu", nodes=2, gpus_per_node=8)
def far(): return slurm("llm", "gpu", gpus_per_node=4, tunnel=ssh("login1", "me", "/jobs"))
def here(): return local(processes=2)
def nemo_runs(): return run.SlurmExecutor(account="llm", nodes=2, ntasks_per_node=8)
def gpu_a_task(): return run.SlurmExecutor(account="llm", ntasks_per_node=8, gpus_per_task=1)
"""


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("sized", "for 8 processes on each machine .*, and mine.py:sized starts 4"),
        ("unsized", ""),
        ("nodes", ""),
        ("far", "mine.py:far starts 4"),
        ("here", "mine.py:here starts 2"),
        ("gpu_a_task", ""),
        ("nemo_runs", r"for 1 machines \(num_nodes\), and mine.py:nemo_runs starts 2"),
    ],
)
def test_an_executor_of_the_users_own_is_compared_as_one_by_name_and_from_python(function, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    name = f"mine.py:{function}"
    job = describe(catalog.recipe("llama31_8b"), EIGHT, [], name, [])
    found = inputs.settings(Examination(job))
    assert (found.state, bool(re.search(says, found.found))) == ("error" if says else "ok", True)
    # From Python the same numbers are compared, by the executor's own name.
    of_python = replace(job, place=examination.place_of(make_executor(name, [], 1)))
    assert inputs.settings(Examination(of_python)).state == found.state
    with pytest.raises(CptError, match=f"executor.nodes=3: {name} takes no options; write them into mine.py"):
        describe(catalog.recipe("llama31_8b"), EIGHT, [], name, ["executor.nodes=3"])


@pytest.mark.parametrize("executor", ["local", "docker"])
def test_one_machine_is_not_two(executor):
    job = describe(catalog.recipe("llama31_8b"), EIGHT | {"num_nodes": 2}, [], executor, [])
    assert f"for 2 machines (num_nodes), and {executor} starts 1" in inputs.settings(Examination(job)).found


def test_from_python_too(given, monkeypatch):
    recipe = build_recipe("tiny.continual_pretrain", given | {"processes": 2, "model": "tiny"})
    for executor in (local(), docker(), None):
        found = inputs.settings(Examination(job_of(recipe, examination.place_of(executor))))
        assert found.state == "error"
        assert "the recipe is for 2 processes on each machine" in found.found
    there = slurm(tasks_per_node=4)
    assert "and slurm starts 4" in inputs.settings(Examination(job_of(recipe, examination.place_of(there)))).found
    for ours in (local(processes=2), slurm(), slurm(tasks_per_node=2, nodes=2)):
        assert inputs.settings(Examination(job_of(recipe, examination.place_of(ours)))).state == "ok"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert inputs.settings(Examination(job_of(recipe, examination.place_of(None)))).state == "ok"


def test_an_executor_takes_the_recipes_size(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    unsized, sized = (f"{tmp_path}/mine.py:{name}" for name in ("unsized", "sized"))
    for name, options, on_gpus, tasks, gpus in (
        ("slurm", [], True, 8, 8),  # as `run.run` has it
        (unsized, [], True, 8, 8),
        (unsized, [], False, 8, None),
        (sized, [], True, 4, 4),  # and refused: see above
        ("slurm", ["gres=gpu:8"], True, 8, None),
        ("slurm", ["gpus=8"], True, 8, None),
        ("slurm", ["tasks_per_node=2"], True, 2, None),
    ):
        executor = make_executor(name, options, 8, on_gpus=on_gpus)
        assert (executor.ntasks_per_node, executor.gpus_per_node) == (tasks, gpus), (name, options)
    executor = make_executor("slurm", [], 8, 4)
    assert (executor.nodes, executor.ntasks_per_node) == (4, 8)
    assert make_executor("slurm", ["nodes=2"], 8, 4).nodes == 2
    assert make_executor("local", [], 8, 4).nodes == 1  # others are started by hand


@pytest.mark.parametrize("name", ["tiny", "smollm2", "llama31_8b"])
def test_python_and_the_command_line_know_the_same_job(given, name):
    function = catalog.recipe(name)
    fields = ["log.ckpt.save_top_k=1", "trainer.val_check_interval=2"]
    arguments = given | {"data": build_blend(given["data"]), "directory": "runs", "global_batch_size": 16}
    told = describe(function, arguments, fields, "local", [])
    built = job_of(build_recipe(function.name, arguments, fields), told.place)
    assert built.recipe == f"{name}_cpt"
    for each in ("base", "tokenizer", "directory", "gpus_per_node", "num_nodes", "tensor_model_parallel_size",
                 "lora_rank", "trained_embeddings", "global_batch_size", "seq_length", "max_steps", "checkpoints",
                 "attention_backend", "logs_to_wandb", "unlike_base"):  # fmt: skip
        assert (each, getattr(built, each)) == (each, getattr(told, each))
    numbers = {name: value for name, value in vars(told.settings).items() if value is not None}
    assert {name: getattr(built.settings, name) for name in numbers} == numbers
    assert {"lr", "max_steps", "micro_batch_size", "gpus_per_node", "num_layers", "num_query_groups"} <= set(numbers)
    assert (built.data.train, built.data.validation) == (told.data.train, told.data.validation)


def build_blend(data):
    return Blend(**data)


def test_where_an_executor_runs_a_job(tmp_path, monkeypatch):
    here = examination.place_of(local(env={"COLOUR": "red"}))
    assert (here.here, here.same_packages, here.same_files, here.environ["COLOUR"]) == (True, True, True, "red")
    away = examination.place_of(slurm(partition="gpu", nodes=2, time="4:00:00", preempt_seconds=900))
    assert (away.here, away.slurm, away.same_files, away.same_packages) == (False, True, True, True)
    assert (away.partition, away.nodes, away.limit_seconds, away.preempt_seconds) == ("gpu", 2, 14400, 900)
    contained = examination.place_of(slurm(container_image="nvcr.io/nvidia/nemo:25.07"))
    assert (contained.same_files, contained.same_packages) == (False, False)
    assert not examination.place_of(docker("image", gpus=2)).same_files
    assert examination.place_of(None).here
