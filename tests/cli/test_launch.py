import ast
import contextlib
import io
import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_cpt import CptError, catalog
from nemo_cpt.executors import nemo_run_patches, ssh
from nemo_cpt.launching import experiments, jobs
from nemo_cpt.launching.description import describe
from nemo_cpt.launching.executor import make_executor
from nemo_cpt.launching.scripts import write_script
from tests.support.executor_jobs import held_by_another_process

COMMAND = [sys.executable, "-m", "nemo_cpt.cli"]


SLURM = ["run", "llama31_8b", "--executor", "slurm"]


def nemo_cpt(*arguments, cwd=None, **environ):
    return subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | environ,
        stdin=subprocess.DEVNULL,
        cwd=cwd,
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
    by_place = catalog.parse(catalog.executor("slurm"), ['tunnel=ssh("login1", "me", "/lustre/me/jobs", port=23)'])
    assert by_place["tunnel"] == ssh("login1", "me", "/lustre/me/jobs", port=23)


def test_the_doctor_reads_paths_of_any_form_from_the_configs_fields():
    def described(*fields):
        return describe(catalog.recipe("llama31_8b"), {}, fields, "local", [])

    for base in ("results/x/checkpoints/steps=150-val_loss=1.2345", "~/ck/base", "a b", "1"):
        assert described(f"resume.base={base}").base == base
    assert described("resume.base=None").base is None
    for given in ("/data/my runs", "'/data/my runs'"):
        assert described(f"log.log_dir={given}").directory == Path("/data/my runs/llama31_8b_cpt")


def on_a_terminal(*command):
    controller, terminal = pty.openpty()
    running = subprocess.Popen([sys.executable, *command], stdout=terminal, env=os.environ | {"COLUMNS": "200"})
    os.close(terminal)
    printed = b""
    with contextlib.suppress(OSError):  # the terminal is closed
        while block := os.read(controller, 65536):
            printed += block
    assert running.wait() == 0
    return printed.decode()


def test_types_are_whole_in_a_terminals_table():
    shown = (
        "from nemo_cpt import catalog; from nemo_cpt.cli import launch; "
        "launch._print_parameters(catalog.executor('local'))"
    )
    assert "Mapping[str, str | float] | None" in on_a_terminal("-c", shown)
    closing = "from nemo_cpt.cli.tables import print_table; print_table(('what',), [('a/[x] b/[/x]',)])"
    assert "a/[x] b/[/x]" in on_a_terminal("-c", closing)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "tinny", "base=b"], "no recipe 'tinny'; near: tiny.continual_pretrain"),
        (["run", "tiny", "max_stepz=3"], "no parameter max_stepz; near: max_steps"),
        (["run", "tiny", "max_steps=many"], "max_steps=many: expected int"),
        (["run", "tiny", "max_steps"], "write key=value"),
        (["run", "tiny"], "needs base=..., data=..."),
        (["run", "tiny", "base=b", "data={train: {ds/none: 1}}"], "ds/none"),
        (["run", "tiny", "base=b", "data=ds/none", "--force", "--detach"], "waits for those of LocalExecutor: leave"),
        (["run", "tiny", "base=b", "data={trian: {}}"], "Blend has no field trian; near: train"),
        (["run", "llama31_8b", "--executor", "slrum"], "no executor 'slrum'"),
        (["run", "llama31_8b", "--executor", "slurm", "executor.partitoin=gpu"], "near: partition"),
        (["run", "llama31_8b", "--executor", "slurm", "executor.code=all"], "expected one of 'ship', 'committed'"),
        (["run", "llama31_8b", "--executor", "nowhere.py:f"], "there is no such file; give FILE.py:FUNCTION"),
        (["run", "llama31_8b", "--force", "-e", "bad.py:f"], "bad.py cannot be imported: SyntaxError: "),
        (["run", "llama31_8b", "--force", "-e", "leaves.py:f"], "leaves.py cannot be imported: SystemExit: 3 (line 1)"),
        (["run", "llama31_8b", "--force", "-e", "none.py:f"], "none.py:f: the executor is None: give what a function"),
        (["run", "llama31_8b", "--force", "-e", "none.py:g"], "none.py:g: TypeError: g() missing 1 required"),
        (["run", "tiny", "base=b", "data=nosuch.yaml"], "data=nosuch.yaml: the file cannot be read: No such file"),
        ([*SLURM, "executor.tunnel=ssh(host='l'"], "write ssh('HOST', 'USER', 'FOLDER THERE') ('(' was never closed"),
        ([*SLURM, "executor.tunnel=ssh('l', 'me')"], "write ssh('HOST', 'USER', 'FOLDER THERE') (ssh(...): missing"),
        ([*SLURM, "executor.tunnel=ssh('l', 'me', here)"], "write ssh("),
        ([*SLURM, "executor.tunnel=ssh('l', 'me', '/l').host"], "not a call of ssh"),
        ([*SLURM, "executor.comment=[a"], "executor.comment=[a: no YAML"),
        ([*SLURM, "executor.begin=2024-13-45"], "no YAML (month must be in 1..12)"),
        (["doctor", "llama31_8b", "trainer.max_steps=abc"], "trainer.max_steps=abc: expected int"),
        (["doctor", "llama31_8b", "trainer.devices=auto"], "trainer.devices=auto: expected int"),
        (["doctor", "llama31_8b", "log.ckpt.save_top_k=None"], "log.ckpt.save_top_k=None: expected int"),
        (["copy", "tiny", "/no/such/folder/x.py"], "is no folder"),
    ],
)
def test_bad_input_ends_with_2_and_says_why(arguments, says, tmp_path):
    (tmp_path / "bad.py").write_text("def f(:\n")
    (tmp_path / "none.py").write_text("def f(): ...\ndef g(count): ...\n")
    (tmp_path / "leaves.py").write_text("raise SystemExit(3)\n")
    done = nemo_cpt(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_a_function_that_makes_the_executor_is_called_once_a_launch(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from nemo_cpt.executors import local\n\n\ndef mine():\n"
        "    open('called', 'a').write('x')\n    return local(processes=2)\n"
    )
    given = ["run", "tiny", "base=b", "data=d", "processes=2", "-e", "mine.py:mine", "--dry-run", "--force", "--json"]
    done = nemo_cpt(*given, cwd=tmp_path, NEMORUN_HOME=str(tmp_path / "home"))
    assert (done.returncode, json.loads(done.stdout)["runs on"]) == (0, "mine.py:mine: 2 CPU processes")
    assert (tmp_path / "called").read_text() == "x"


def test_copy_writes_a_script_that_is_python_and_does_not_overwrite(tmp_path):
    script = tmp_path / "mine.py"
    write_script(catalog.recipe("tiny"), script)
    tree = ast.parse(script.read_text())
    assert "continual_pretrain" in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert "executor=local(processes=1)" in script.read_text()
    with pytest.raises(CptError, match="exists"):
        write_script(catalog.recipe("tiny"), script)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.py"]
    write_script(catalog.recipe("llama31_8b"), tmp_path / "with_a_base.py")
    assert 'base="checkpoints/Llama-3.1-8B",  # edit' in (tmp_path / "with_a_base.py").read_text()


def test_executor_of_the_users_own_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def cluster():\n    from nemo_cpt.executors import local\n    return local(processes=3)\n")
    assert make_executor(f"{file}:cluster", [], 1).ntasks_per_node == 3
    with pytest.raises(CptError, match="has no clutser; near: cluster"):
        make_executor(f"{file}:clutser", [], 1)


def test_fields_are_checked_and_set(tmp_path):
    from nemo_cpt.catalog.build import build_recipe

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
    from nemo_cpt.catalog.build import build_recipe
    from nemo_cpt.executors import slurm
    from nemo_cpt.executors.stopping import save_on_sigterm
    from nemo_cpt.training.preemption import SaveWhenStopped

    recipe = build_recipe("llama31_8b.continual_pretrain", {"gpus_per_node": 4})
    job = slurm(nodes=2)
    job.fit(recipe)
    for _ in range(2):  # the second time changes nothing
        save_on_sigterm(recipe)
    assert (recipe.trainer.num_nodes, job.ntasks_per_node, job.gpus_per_node) == (2, 4, 4)
    kinds = [callback.__fn_or_cls__ for callback in recipe.trainer.callbacks]
    assert kinds.count(SaveWhenStopped) == 1
    with pytest.raises(CptError, match="devices=4, and the job 8 tasks"):
        slurm(gpus_per_node=8).fit(recipe)


@pytest.mark.parametrize("example", sorted(Path("examples").glob("launch_*.py")), ids=lambda path: path.stem)
def test_each_example_builds_its_recipe_and_what_would_be_submitted(example, tmp_path, monkeypatch):
    """Up to where NeMo-Run would ask for an engine, a cluster or a login node that is not here."""
    import nemo_run as run

    (tmp_path / "data").mkdir()
    source = example.read_text().replace("/lustre/me/data", str(tmp_path / "data"))
    source = source.replace('ssh("login.cluster.example", "me", "/lustre/me/jobs")', '"local", workdir="/data"')
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
    assert "SaveWhenStopped" in str(job.task.trainer.callbacks)


def _with_a_cluster_configured(example, folder, monkeypatch):
    if example == "launch_kubernetes":
        cluster = {"name": "c", "cluster": {"server": "https://127.0.0.1:1"}}
        context = {"name": "c", "context": {"cluster": "c", "user": "u"}}
        parts = {"clusters": [cluster], "contexts": [context], "users": [{"name": "u", "user": {}}]}
        (folder / "config").write_text(json.dumps(parts | {"current-context": "c"}))
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(folder / "config"))
    if example == "launch_skypilot":
        from tests.support.sky_stand_in import install

        install(monkeypatch)
        for name in ("checkpoints", "ds"):
            (folder / name).mkdir()


def test_a_second_start_is_refused_before_nemo_is_imported(tmp_path):
    """What holds the folder is named; the base need not even be there."""
    arguments = ["nemo-cpt", "run", "tiny", "base=b", "data={train: {d: 1}}", f"directory={tmp_path}", "name=r"]
    second = (
        f"import atexit, sys; sys.argv = {arguments}; from nemo_cpt.cli import main\n"
        "atexit.register(lambda: print([name for name in ('torch', 'nemo', 'nemo_run') if name in sys.modules]))\n"
        "main()"
    )
    with held_by_another_process(tmp_path / "r") as holder:
        done = subprocess.run([sys.executable, "-c", second], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "[]\n")
    assert done.stderr.startswith(f"nemo-cpt: {tmp_path}/r is in use by process {holder} on ")
    assert len(done.stderr.splitlines()) == 1


@pytest.fixture
def start():
    """Start a process; it ends with the test, and so does what it started."""
    started = []
    yield lambda *command: started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True)) or started[-1]
    for pid in jobs._with_descendants({process.pid for process in started}):
        os.kill(pid, signal.SIGKILL)
    for process in started:
        process.communicate()


def supervised(job, code):
    """A local job's command, as NeMo-Run starts it."""
    python = [sys.executable, "-u", "-m", "nemo_cpt.executors.supervisor", "--marker", f"{job}/preempted-t"]
    return [*python, "--max-restarts", "0", "--", sys.executable, "-uc", code]


SAVES = """
import signal, subprocess, sys
def save(*_): open({file!r}, "w").write("saved"); sys.exit(0)
signal.signal(signal.SIGTERM, save)
subprocess.Popen(["sh", "-c", "until [ -e {file} ]; do sleep 0.1; done; touch {file}.seen"])  # it outlives the job
print("started")
signal.pause()
"""


def test_cancel_ends_a_local_job_from_another_shell_and_nothing_else(tmp_path, start):
    job, saved = tmp_path / "t", tmp_path / "saved"
    job.mkdir()
    (job / "log.out").write_text("a line\n")
    reader = start("tail", "-f", f"{job}/log.out")
    script = start("sh", "-c", f"echo {' '.join(supervised(job, 'x')[:6])}; sleep infinity")
    supervisor = start(*supervised(job, SAVES.format(file=str(saved))))
    assert supervisor.stdout.readline() == "started\n"
    assert list(experiments.processes_of(str(job))) == [supervisor.pid]
    assert jobs._end_processes(str(job))
    assert saved.read_text() == "saved"
    assert Path(f"{saved}.seen").exists()  # it waited until what the job started had ended, too
    assert (supervisor.wait(60), reader.poll(), script.poll()) == (0, None, None)
    assert jobs._end_processes(str(job))  # of which nothing is left


def test_cancel_kills_what_does_not_save_within_its_plans_time(tmp_path, start, monkeypatch, capsys):
    ignores = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('started'); signal.pause()"
    monkeypatch.setenv("NEMO_CPT_SECONDS_TO_SAVE", "0")
    supervisor = start(*supervised(tmp_path, ignores))
    monkeypatch.delenv("NEMO_CPT_SECONDS_TO_SAVE")  # the job's own environment says it
    assert supervisor.stdout.readline() == "started\n"
    assert not jobs._end_processes(str(tmp_path))
    assert "told to stop; it has 0 s to save, then it is killed" in capsys.readouterr().err
    assert supervisor.wait(60) == -signal.SIGKILL


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_cancel_of_another_users_job_says_so(tmp_path, start):
    supervisor = start(*supervised(tmp_path, "import signal; print('started'); signal.pause()"))
    assert supervisor.stdout.readline() == "started\n"
    code = (
        "import os, sys; from nemo_cpt.launching import jobs; from nemo_cpt import CptError; os.setuid(65534)\n"
        f"try: jobs._end_processes({str(tmp_path)!r})\n"
        "except CptError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert f"the job's process {supervisor.pid} is another user's" in done.stdout, done.stderr
    assert supervisor.poll() is None


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


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("trainer.max_stepz=3", "trainer.max_stepz=3: Invalid argument: No parameter named 'max_stepz' exists"),
        (
            "trainer.steps=ten",
            "trainer.steps=ten: Error parsing argument: ten: Failed to parse 'ten' as <class 'int'>",
        ),
    ],
)
def test_nemos_own_command_line_says_which_argument_is_wrong_and_no_more(argument, says):
    import nemo_run as run
    from nemo_run.cli.cli_parser import CLIException, parse_cli_args

    nemo_run_patches.say_which_argument_is_wrong()
    recipe = run.Partial(pretrain, trainer=run.Config(Trainer, steps=1))
    with pytest.raises(CLIException) as refused:
        parse_cli_args(recipe, [argument])
    assert str(refused.value).startswith(says)
    assert len(str(refused.value)) < len(says) + 30


class Trainer:
    def __init__(self, steps: int) -> None:
        self.steps = steps


def pretrain(trainer: Trainer) -> None:
    pass


@pytest.mark.parametrize(
    "option", [["--factory", "lama31_8b_cpt"], ["-f", "lama31_8b_cpt(max_steps=3)"], ["--factory=lama31_8b_cpt"]]
)
def test_a_factory_of_nemos_command_line_that_is_not_there_is_told_with_the_nearest(option, monkeypatch, capsys):
    import catalogue

    from nemo_cpt.cli import plugin

    monkeypatch.setitem(catalogue.REGISTRY, ("nemo", "llama31_8b_cpt"), print)
    monkeypatch.setattr(sys, "argv", ["nemo", "llm", "pretrain", *option, "--dryrun"])
    with pytest.raises(SystemExit, match="2"):
        plugin._refuse_unknown_factory()
    assert "there is no factory lama31_8b_cpt; near: llama31_8b_cpt" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["nemo", "llm", "pretrain", "-f", "llama31_8b_cpt(max_steps=3)"])
    plugin._refuse_unknown_factory()
