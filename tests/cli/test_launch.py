import ast
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nemo_cpt import CptError
from nemo_cpt.cli import catalog, jobs
from nemo_cpt.cli.scripts import write_script

COMMAND = [sys.executable, "-m", "nemo_cpt.cli"]


def nemo_cpt(*arguments, **environ):
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, env=os.environ | environ, stdin=subprocess.DEVNULL
    )


def test_help_imports_neither_torch_nor_nemo():
    code = (
        "import sys; sys.argv = ['nemo-cpt', '--help']\n"
        "import atexit\n"
        "atexit.register(lambda: print([m for m in ('torch', 'nemo', 'nemo_run') if m in sys.modules]))\n"
        "from nemo_cpt.cli import main; main()"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert printed.rstrip().endswith("[]")
    assert "recipes" in printed


def test_recipes_are_listed_without_importing_them():
    found = json.loads(nemo_cpt("recipes", "--json").stdout)
    assert found["llama31_8b.continual_pretrain"]["gpus"] == 8
    assert found["llama31_8b.continual_pretrain_single_gpu"]["gpus"] == 1
    assert found["tiny.continual_pretrain"]["gpus"] == 0
    assert found["tiny.continual_pretrain"]["parameters"]["min_lr"]["type"] == "float | None"  # through **kwargs
    assert "llama31_8b.with_lora" not in found


def test_values_are_parsed_by_their_annotations():
    given = ["base=b", "data={train: {ds/ja: 1.0}}", "max_steps=1_000", "lr=1e-3", "warmup_steps=None"]
    values = catalog.parse(catalog.recipe("tiny"), given)
    assert values["data"].train == {"ds/ja": 1.0}
    assert (values["max_steps"], values["lr"], values["warmup_steps"]) == (1000, 1e-3, None)
    options = catalog.parse(
        catalog.executor("slurm"), ["tunnel=ssh(host='h', user='u', job_dir='/j')", "requeue=no", "mem=0"]
    )
    assert (options["tunnel"].host, options["requeue"], options["mem"]) == ("h", False, 0)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "tinny", "base=b"], "no recipe 'tinny'; near: tiny.continual_pretrain"),
        (["run", "tiny", "max_stepz=3"], "no parameter max_stepz; near: max_steps"),
        (["run", "tiny", "max_steps=many"], "max_steps=many: expected int"),
        (["run", "tiny", "max_steps"], "write key=value"),
        (["run", "tiny"], "needs base=..., data=..."),
        (["run", "tiny", "base=b", "data={train: {ds/none: 1}}"], "ds/none"),
        (["run", "tiny", "base=b", "data={trian: {}}"], "expected Blend"),
        (["run", "llama31_8b", "--executor", "slrum"], "no executor 'slrum'"),
        (["run", "llama31_8b", "--executor", "slurm", "executor.partitoin=gpu"], "near: partition"),
        (["run", "llama31_8b", "--executor", "slurm", "executor.code=all"], "expected one of 'ship', 'committed'"),
        (["run", "llama31_8b", "--executor", "none.py:f"], "of a file that exists"),
        (["copy", "tiny", "/no/such/folder/x.py"], "is no folder"),
    ],
)
def test_bad_input_ends_with_2_and_says_why(arguments, says):
    done = nemo_cpt(*arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_copy_writes_a_script_that_is_python_and_does_not_overwrite(tmp_path):
    script = tmp_path / "mine.py"
    write_script(catalog.recipe("tiny"), script)
    tree = ast.parse(script.read_text())
    assert "continual_pretrain" in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert "executor=local(processes=1)" in script.read_text()
    with pytest.raises(CptError, match="exists"):
        write_script(catalog.recipe("tiny"), script)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.py"]


def test_executor_of_the_users_own_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def cluster():\n    from nemo_cpt.executors import local\n    return local(processes=3)\n")
    assert jobs.make_executor(f"{file}:cluster", [], 1).ntasks_per_node == 3
    with pytest.raises(CptError, match="has no clutser; near: cluster"):
        jobs.make_executor(f"{file}:clutser", [], 1)


def test_fields_are_checked_and_set(tmp_path):
    from nemo_cpt.cli.task import build_recipe

    data = {"train": {"ds/ja": 1.0}}
    given = {"base": "b", "data": data}
    recipe = build_recipe("tiny.continual_pretrain", given, ["trainer.max_steps=7", "optim.config.lr=0.5"])
    assert recipe.trainer.max_steps == 7
    assert recipe.optim.config.lr == 0.5
    for field, says in {
        "trainer.max_stepz=7": "Trainer has no field max_stepz; near: max_steps",
        "trainr.max_steps=7": "pretrain has no field trainr; near: trainer",
        "trainer.max_steps=many": "expected",
        "trainer.max_steps.x=1": "plain value",
    }.items():
        with pytest.raises(CptError, match=says):
            build_recipe("tiny.continual_pretrain", given, [field])


def test_a_slurm_job_and_the_recipes_trainer_agree():
    from nemo.lightning.pytorch.callbacks import PreemptionCallback

    from nemo_cpt.cli.task import build_recipe
    from nemo_cpt.executors import slurm
    from nemo_cpt.executors.stopping import save_on_sigterm

    recipe = build_recipe("llama31_8b.continual_pretrain", {"gpus_per_node": 4})
    job = slurm(nodes=2)
    job.fit(recipe)
    for _ in range(2):  # the second time changes nothing
        save_on_sigterm(recipe)
    assert (recipe.trainer.num_nodes, job.ntasks_per_node, job.gpus_per_node) == (2, 4, 4)
    kinds = [callback.__fn_or_cls__ for callback in recipe.trainer.callbacks]
    assert kinds.count(PreemptionCallback) == 1
    with pytest.raises(CptError, match="devices=4, and the job 8 tasks"):
        slurm(gpus_per_node=8).fit(recipe)


@pytest.mark.parametrize("example", sorted(Path("examples").glob("launch_*.py")), ids=lambda path: path.stem)
def test_each_example_builds_its_recipe_and_what_would_be_submitted(example, tmp_path, monkeypatch):
    """Up to where NeMo-Run would ask for an engine, a cluster or a login node that is not here."""
    import nemo_run as run

    (tmp_path / "data").mkdir()
    source = example.read_text().replace("/lustre/me/data", str(tmp_path / "data"))
    source = source.replace('ssh("login.cluster.example", "me", "/lustre/me/jobs")', '"local"')  # which would connect
    monkeypatch.setattr(sys, "stdin", io.StringIO())  # NeMo-Run's commands read it
    launched = []
    monkeypatch.setattr(run, "run", lambda recipe, executor, **how: launched.append((recipe, executor, how)))
    monkeypatch.chdir(tmp_path)
    _with_a_cluster_configured(example.stem, tmp_path, monkeypatch)
    exec(compile(source, str(example), "exec"), {"__name__": "__main__"})
    ((recipe, executor, how),) = launched
    assert set(how) <= {"detach"}
    with run.Experiment("t", executor=executor, base_dir=str(tmp_path), enable_goodbye_message=False) as experiment:
        experiment.add(recipe, name="t")
        experiment.dryrun(log=False, delete_exp_dir=False)
    (job,) = experiment.jobs
    assert job._dryrun_info.request
    assert job.executor.nproc_per_node() == recipe.trainer.devices
    assert job.executor.nnodes() == job.task.trainer.num_nodes
    assert "PreemptionCallback" in str(job.task.trainer.callbacks)


def _with_a_cluster_configured(example, folder, monkeypatch):
    if example == "launch_kubernetes":
        cluster = {"name": "c", "cluster": {"server": "https://127.0.0.1:1"}}
        context = {"name": "c", "context": {"cluster": "c", "user": "u"}}
        parts = {"clusters": [cluster], "contexts": [context], "users": [{"name": "u", "user": {}}]}
        (folder / "config").write_text(json.dumps(parts | {"current-context": "c"}))
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(folder / "config"))
    if example == "launch_skypilot":
        pytest.importorskip("sky", reason="skypilot is not installed")
        for name in ("checkpoints", "ds"):
            (folder / name).mkdir()


def test_cancel_ends_a_local_job_from_another_shell(tmp_path):
    from nemo_cpt.cli.jobs import _end_processes, _processes

    job = tmp_path / "experiments" / "t" / "t_1" / "t"
    job.mkdir(parents=True)
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)", f"{job}/configs/x"])
    deadline = time.time() + 10
    while list(_processes(str(job))) != [sleeper.pid]:
        assert time.time() < deadline
    import threading

    threading.Thread(target=sleeper.wait, daemon=True).start()  # as its launcher does, so that it leaves no zombie
    _end_processes(str(job))
    assert sleeper.wait(5) < 0


def test_nemo_cpt_is_a_plugin_of_nemo():
    nemo = Path(sys.executable).with_name("nemo")
    done = subprocess.run([nemo, "cpt", "recipes", "--json"], capture_output=True, text=True)
    assert "tiny.continual_pretrain" in json.loads(done.stdout)


def test_what_a_recipe_needs_leaves_out_what_it_passes_on():
    needs = {
        name: [parameter.name for parameter in recipe.parameters.values() if parameter.default is None]
        for name, recipe in catalog.recipes().items()
    }
    assert needs["tiny.continual_pretrain"] == ["base", "data"]
    assert needs["llama31_8b.continual_pretrain_single_gpu"] == []
