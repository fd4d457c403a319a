"""`nemo-cpt doctor`, and what `nemo-cpt run` refuses."""

import json
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_cpt import catalog
from nemo_cpt.conversations import Conversations
from nemo_cpt.corpus import Blend
from nemo_cpt.errors import CptError
from nemo_cpt.launching.description import describe, place
from nemo_cpt.launching.dry_run import how_much
from tests.support.cost import within_cpu_seconds

SECRET = "planted0123456789abcdef0123456789abcdef0"
QUIET = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "WANDB_API_KEY": SECRET, "HF_TOKEN": SECRET}


def nemo_cpt(*arguments, **environ):
    done = subprocess.run(
        [sys.executable, "-m", "nemo_cpt.cli", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | QUIET | environ,
        stdin=subprocess.DEVNULL,
    )
    assert SECRET not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def material(world: Path, *train: str, base: Path | None = None) -> list[str]:
    data = {"train": {str(world / "ds" / name): 1.0 for name in train or ("ja", "en")}}
    return [f"base={base or world / 'base'}", f"data={json.dumps(data)}", f"directory={world / 'runs'}"]


def described(recipe: str, *pairs: str, executor: str = "local"):
    function, arguments, fields, options = catalog.split(recipe, list(pairs))
    return describe(function, arguments, fields, executor, options)


def test_the_machine_alone():
    with within_cpu_seconds(10):  # it takes 3
        done = nemo_cpt("doctor", "--json")
    report = json.loads(done.stdout)
    states = {each["name"]: each["state"] for each in report["checks"]}
    assert (done.returncode, report["verdict"], report["recipe"]) == (0, "warning", None)
    assert states["Python"] == states["torch"] == states["import torch"] == states["wandb"] == "ok"
    assert states["Hugging Face hub"] == "warning"
    assert "base" not in states
    assert all(set(each) == {"name", "state", "found", "cure"} for each in report["checks"])
    assert all(each["cure"] for each in report["checks"] if each["state"] in ("error", "warning"))


def test_the_doctor_imports_nothing_heavy(world):
    code = (
        f"import sys; sys.argv = ['nemo-cpt', 'doctor', 'tiny', *{material(world)!r}]\n"
        "import atexit\n"
        "heavy = ('torch', 'nemo', 'nemo_run', 'transformers', 'lightning')\n"
        "atexit.register(lambda: print([name for name in heavy if name in sys.modules]))\n"
        "from nemo_cpt.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | QUIET)
    assert done.stdout.rstrip().endswith("[]"), done.stdout + done.stderr
    assert "ok\tvocabulary\t250 rows" in done.stdout


def test_a_torch_that_does_not_import_is_diagnosed(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('libcudart.so.12: cannot open shared object')\n")
    done = nemo_cpt("doctor", "--json", PYTHONPATH=str(tmp_path))
    found = {each["name"]: each for each in json.loads(done.stdout)["checks"]}
    assert done.returncode == 3
    assert found["import torch"]["state"] == "error"
    assert found["import torch"]["found"] == "ImportError: libcudart.so.12: cannot open shared object"
    assert f"{tmp_path}/torch" in found["import torch"]["cure"]


def test_one_thread_alone_imports(world):
    """Python deadlocks now and then where two threads import; once in a dozen runs it did."""
    code = (
        "import sys, threading\n"
        "from nemo_cpt import catalog\n"
        "from nemo_cpt.launching.description import describe\n"
        "from nemo_cpt.doctor import CHECKS, JOB_CHECKS, Examination, examine\n"
        "importing = {}\n"
        "class Spy:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        looked_for = ('torch', 'transformer_engine')\n"
        "        if name not in looked_for and name not in sys.builtin_module_names:\n"
        "            importing.setdefault(threading.current_thread().name, name)\n"
        f"function, arguments, fields, options = catalog.split('tiny', {material(world)!r})\n"
        "job = describe(function, arguments, fields, 'local', options)\n"
        "sys.meta_path.insert(0, Spy())\n"
        "examine(CHECKS + JOB_CHECKS, Examination(job, ranks=2, hub='a/b'))\n"
        "print(*importing.items(), sep='|')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | QUIET)
    assert len(done.stdout.split("|")) == 1, done.stdout + done.stderr
    assert "Thread" in done.stdout


@pytest.mark.parametrize("missing", ["orjson", "packaging", "numpy"])
def test_an_environment_of_which_a_part_is_missing(tmp_path, world, missing):
    """Every check says for itself what it lacks; none takes the doctor down."""
    (tmp_path / f"{missing}.py").write_text(f"raise ModuleNotFoundError('No module named {missing}', name='{missing}')")
    done = nemo_cpt("doctor", "tiny", *material(world), "--hub", "a/b", "--json", PYTHONPATH=str(tmp_path))
    found = json.loads(done.stdout)["checks"]
    assert done.returncode == 3
    hit = [each for each in found if each["found"] == f"could not be checked: No module named {missing}"]
    assert hit
    assert {each["cure"] for each in hit} == {f"pip install --constraint constraints.txt {missing}"}
    assert "ok" in {each["state"] for each in found}


def test_plain_lines_and_the_verdict(world):
    done = nemo_cpt("doctor", "tiny", *material(world, "ja", "other"))
    assert done.returncode == 3
    (red,) = [line for line in done.stdout.splitlines() if line.startswith("error")]
    assert red.split("\t")[1] == "vocabulary"
    (yellow,) = [line for line in done.stdout.splitlines() if line.startswith("warning")]
    assert yellow.split("\t")[1] == "data"
    assert "There is no validation set" in yellow  # and these sets of 50 tokens are repeated
    assert done.stdout.splitlines()[-1].startswith("verdict\t1 red, 1 yellow, ")


def on_a_terminal(world, *options):
    controller, terminal = pty.openpty()
    command = [sys.executable, "-m", "nemo_cpt.cli", "doctor", "tiny", *material(world, "ja", "other"), *options]
    running = subprocess.Popen(command, stdout=terminal, env=os.environ | {"COLUMNS": "120", "LINES": "60"})
    os.close(terminal)
    printed = b""
    while True:
        try:
            block = os.read(controller, 65536)
        except OSError:  # the terminal is closed
            break
        if not block:
            break
        printed += block
    assert running.wait() == 3
    return printed.decode()


def test_one_screen_on_a_terminal(world):
    text = on_a_terminal(world, "--all")
    assert "✘" in text
    assert "→ prepare it again" in text
    assert len(text.splitlines()) < 60
    assert len(re.findall("✔", text)) > 10


def test_on_a_terminal_what_is_wrong_comes_first_and_what_is_green_is_one_line(world):
    text = on_a_terminal(world)
    assert text.index("✘") < text.index("There is no validation set") < text.index("✔")
    assert re.search(r"✔ \d+ green \(--all\): .*Python", text)
    assert "→ prepare it again" in text
    assert len(text.splitlines()) < 25


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["tinny"], "no recipe 'tinny'; near"),
        (["tiny"], "needs base=..., data=..."),
        (["llama31_8b", "--executor", "slrum"], "no executor 'slrum'"),
        (["llama31_8b", "-e", "slurm", "executor.partitoin=gpu"], "near: partition"),
        (["llama31_8b", "-e", "slurm", "executor.code=all"], "expected one of 'ship', 'committed'"),
    ],
)
def test_bad_input_ends_with_2(arguments, says):
    done = nemo_cpt("doctor", *arguments)
    assert (done.returncode, says in done.stderr) == (2, True)


def test_what_the_recipes_source_says():
    job = described("llama31_8b")
    assert (job.base, job.gpus_per_node, job.tensor_model_parallel_size) == ("checkpoints/Llama-3.1-8B", 8, 2)
    assert job.data is not None
    assert job.data.train == {"ds/ja": 0.75, "ds/en": 0.25}
    assert job.directory == Path("results/llama31_8b_cpt")
    assert (job.checkpoints, job.lora_rank, job.gpu_memory_gib) == (5, None, None)
    single = described("llama31_8b.continual_pretrain_single_gpu", "gpu_memory_gib=80")
    assert (single.gpus_per_node, single.tensor_model_parallel_size) == (1, 1)
    assert (single.lora_rank, single.gpu_memory_gib) == (128, 80)
    assert described("llama31_8b.continual_pretrain_single_gpu", "rank=8").lora_rank == 8
    tiny = described("tiny", "base=b", "data={train: {a: 1}}")
    assert (tiny.gpus_per_node, tiny.tensor_model_parallel_size) == (0, 1)  # through **{...} | kwargs


def test_fields_of_the_config_count():
    fields = ["trainer.devices=4", "resume.base=other/base", "log.ckpt.save_top_k=1", "log.log_dir=/scratch"]
    job = described("llama31_8b", *fields, "model.config.attention_backend=flash")
    assert (job.gpus_per_node, job.base, job.checkpoints) == (4, "other/base", 3)
    assert (job.directory, job.attention_backend) == (Path("/scratch/llama31_8b_cpt"), "flash")
    assert described("llama31_8b", "max_steps=30").checkpoints == 2
    assert described("llama31_8b", "max_steps=30", "save_every=5").checkpoints == 5
    assert described("llama31_8b", "log.ckpt.save_top_k=-1").checkpoints == 10
    assert described("llama31_8b", "trainer.enable_checkpointing=false").checkpoints == 0


def test_a_changed_constant_is_red_unless_it_is_meant(world):
    changed = [*material(world), "model.config.rotary_base=5e6"]
    red = nemo_cpt("doctor", "tiny", *changed)
    assert red.returncode == 3
    assert "rope_theta (NeMo: rotary_base) is 5000000.0 in the recipe and 500000.0 in the base" in red.stdout
    assert nemo_cpt("doctor", "tiny", *changed, "unlike_base=[rope_theta]").returncode == 0
    wrong = nemo_cpt("doctor", "tiny", *changed, "unlike_base=[head_dim]")
    # No recipe is made of a name that no model has: there is nothing to examine.
    assert (wrong.returncode, "unlike_base names head_dim" in wrong.stderr) == (2, True)


def test_every_recipe_can_be_described():
    for name, function in catalog.recipes().items():
        missing = [each for each, parameter in function.parameters.items() if parameter.default is None]
        given = {"base": "base=b", "data": "data={train: {a: 1}}"}
        assert described(name, *[given[each] for each in missing if each in given]).recipe == name


def test_where_a_job_runs(monkeypatch, tmp_path):
    assert place("local", []).same_packages
    docker = place("docker", ["gpus=2"])
    assert (docker.here, docker.same_packages, docker.same_files) == (True, False, False)
    slurm = place("slurm", ["partition=gpu", "nodes=2", "env={A: 1}"])
    assert (slurm.here, slurm.slurm, slurm.same_files) == (False, True, True)
    assert (slurm.partition, slurm.nodes, slurm.environ["A"]) == ("gpu", 2, "1")
    assert not place("slurm", ["container_image=nvcr.io/nvidia/nemo:25.07"]).same_files
    over_ssh = place("slurm", ["tunnel=ssh(host='h', user='u', job_dir='/j')"])
    assert (over_ssh.slurm, over_ssh.same_files, over_ssh.same_packages) == (False, False, False)
    mine = tmp_path / "mine.py"
    mine.write_text("from nemo_cpt.executors import slurm\ndef cluster(): return slurm(partition='gpu', nodes=2)\n")
    slurm = place(f"{mine}:cluster", [])
    assert (slurm.here, slurm.slurm, slurm.partition, slurm.nodes) == (False, True, "gpu", 2)
    with pytest.raises(CptError, match="there is no such file"):
        place("not_there.py:cluster", [])
    with pytest.raises(CptError, match="no executor"):
        place("slrum", [])


def test_run_refuses_on_red_at_once_and_says_everything(world, tmp_path):
    given = [*material(world, "ja", "other")[1:], "base=nowhere"]
    with within_cpu_seconds(3):  # it takes 0.4
        done = nemo_cpt("run", "tiny", *given, NEMORUN_HOME=str(tmp_path / "home"))
    assert done.returncode == 2
    assert "is not launched (--force launches it all the same)" in done.stderr
    assert "base: the base nowhere is not there; import it first" in done.stderr
    assert not (tmp_path / "home").exists()


def test_run_on_gpus_that_are_not_here_is_refused(world):
    done = nemo_cpt("run", "llama31_8b", *material(world))
    assert done.returncode == 2
    assert "GPUs: none, and llama31_8b.continual_pretrain takes 8" in done.stderr


def test_warnings_are_printed_and_go_on(world, tmp_path):
    fields = ["max_steps=1", "val_check_interval=1", "seed=1234", "nonsense.field=1"]
    for end in (".bin", ".idx"):  # without its manifest
        shutil.copy(world / f"ds/ja_text_document{end}", tmp_path / f"bare_text_document{end}")
    given = [*material(world, str(tmp_path / "bare")), *fields]
    done = nemo_cpt("run", "tiny", *given, "--dryrun", NEMORUN_HOME=str(tmp_path / "home"))
    assert "nemo-cpt: warning: vocabulary: " in done.stderr
    assert (done.returncode, "experiment" in done.stdout) == (0, True)
    rows = dict(line.split("\t") for line in done.stdout.splitlines())
    assert rows["recipe"].startswith("tiny.continual_pretrain: ")
    assert rows["changed"].startswith("directory=")
    assert "max_steps=1 (default 60), val_check_interval=1 (default 10), nonsense.field=1" in rows["changed"]
    assert "seed" not in rows["changed"]  # given, as it is by default
    assert rows["runs on"] == "local: 1 CPU process"
    assert rows["trains on"] == f"{tmp_path}/bare 100 %"
    assert rows["steps"] == "1 of 16 x 128 tokens, 2,048 tokens in all"
    assert rows["run folder"] == f"{world}/runs/tiny_cpt (a new run)"


def test_a_dry_run_says_what_weights_come_to(world):
    ja, en = str(world / "ds/ja"), str(world / "ds/en")
    tokens = Blend({ja: 1.0, en: 1.0}).tokens().values()
    by_tokens = Blend({ja: 1.0, en: 1.0}, weighting="tokens")
    assert list(how_much(by_tokens)) == [
        (prefix, f"{100 * each / sum(tokens):.0f} %") for prefix, each in zip((ja, en), tokens, strict=True)
    ]
    assert list(how_much(Blend({ja: 3.0, "elsewhere": 1.0}))) == [(ja, "75 %"), ("elsewhere", "25 %")]
    assert list(how_much(Blend({"elsewhere": 2.0}, weighting="tokens"))) == [("elsewhere", "2 x its tokens")]
    assert list(how_much(Conversations({"a": 2.0, "b": 1.0}))) == [("a", "2 x an epoch"), ("b", "1 x an epoch")]


def test_a_dry_run_of_what_is_refused_says_so(world, tmp_path):
    given = [*material(world)[1:], "base=nowhere", f"tokenizer={world / 'hf'}", "max_steps=1"]
    done = nemo_cpt("run", "tiny", *given, "--dryrun", NEMORUN_HOME=str(tmp_path / "home"))
    assert done.returncode == 3
    assert "nemo-cpt: error: base: the base nowhere is not there" in done.stderr
    last = done.stdout.splitlines()[-1]
    assert last == "submitted\tnothing, and without --dry-run it would be refused; errors, see above: 1"


def test_force_launches_what_is_red(world, tmp_path):
    """The job itself then fails at the base, in its own guard."""
    given = [*material(world)[1:], "base=nowhere", f"tokenizer={world / 'hf'}", "max_steps=1"]
    done = nemo_cpt("run", "tiny", *given, "--force", "--dryrun", "--json", NEMORUN_HOME=str(tmp_path / "home"))
    assert "nemo-cpt: error: base: the base nowhere is not there" in done.stderr
    assert (done.returncode, "experiment" in done.stdout) == (0, True)
    assert "nemo_cpt.executors.supervisor" in json.loads(done.stdout)["submitted"]  # NeMo-Run's own words
