"""What importing the package costs, and how its one exception ends a process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]

LIGHT = [
    "nemo_cpt",
    "nemo_cpt.checkpoint",
    "nemo_cpt.conversations",
    "nemo_cpt.conversations.preparation",
    "nemo_cpt.conversations.special_rows",
    "nemo_cpt.synthesis",
    "nemo_cpt.corpus",
    "nemo_cpt.evaluation.judge",
    "nemo_cpt.evaluation.language",
    "nemo_cpt.evaluation",
    "nemo_cpt.evaluation.comparison",
    "nemo_cpt.evaluation.report",
    "nemo_cpt.executors",
    "nemo_cpt.recipes",
]


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_import_neither_torch_nor_nemo(module: str) -> None:
    code = f"import sys, {module}; sys.exit(any(m in sys.modules for m in ('torch', 'nemo', 'nemo_run', 'megatron')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_package_imports_in_under_0_3_s() -> None:
    def seconds(code: str) -> float:
        """Of CPU time, which other work on the machine adds little to."""
        pid = os.posix_spawn(sys.executable, [sys.executable, "-c", code], os.environ)
        _, status, used = os.wait4(pid, 0)
        assert status == 0
        return used.ru_utime + used.ru_stime

    assert min(seconds("import nemo_cpt") for _ in range(3)) - min(seconds("pass") for _ in range(3)) < 0.3


def test_a_process_that_was_killed_in_megatrons_import_keeps_no_later_one_waiting(tmp_path: Path) -> None:
    """PyTorch's lock for what Megatron compiles there outlives the process that holds it."""
    (tmp_path / "managed_alloc_runtime").mkdir()
    (tmp_path / "managed_alloc_runtime/lock").touch()
    of_megatron = "megatron.core.inference.contexts.dynamic_context"
    code = f"import nemo_cpt, {of_megatron} as context; print(context.has_unified_memory)"
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, timeout=600)
    assert done.stdout.split() == [b"False"]


RAISES = "from nemo_cpt.errors import CptError, StoppedEarlyError\nraise {}('lr is 0')"


def ended(code: str, *options: str, **how: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *options, "-c", code], stderr=subprocess.PIPE, text=True, **how)  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize(("kind", "code"), [("CptError", 2), ("StoppedEarlyError", 75)])
def test_what_the_user_can_mend_ends_a_script_with_one_line_and_its_code(kind: str, code: int) -> None:
    done = ended(RAISES.format(kind))
    assert (done.returncode, done.stderr) == (code, "nemo_cpt: lr is 0\n")


def test_its_message_is_not_lost_behind_the_hook_of_torch_distributed() -> None:
    done = ended(
        "import torch.distributed as dist; from nemo_cpt import errors\n"
        "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
        "raise errors.CptError('lr is 0')"
    )
    assert done.returncode == 2
    assert "nemo_cpt: lr is 0\n" in done.stderr


def test_nor_behind_the_hook_that_typer_puts_in_its_place() -> None:
    """As in `nemo llm pretrain`; jobs and executors install theirs again within."""
    done = ended(
        "import typer; from nemo_cpt import errors; app = typer.Typer()\n"
        "@app.command()\ndef main() -> None:\n errors.exit_with_the_message(); raise errors.CptError('lr is 0')\n"
        "app()"
    )
    assert (done.returncode, done.stderr) == (2, "nemo_cpt: lr is 0\n")


def test_where_in_a_config_it_was_raised_is_not_said() -> None:
    done = ended(
        "import fiddle; from nemo_cpt import errors\ndef refuse(): raise errors.CptError('lr is 0')\n"
        "fiddle.build(fiddle.Config(dict, optim=fiddle.Config(refuse)))"
    )
    assert (done.returncode, done.stderr) == (2, "nemo_cpt: lr is 0\n")


def test_its_code_holds_where_nobody_reads_the_message() -> None:
    read, write = os.pipe()
    os.close(read)
    code = "from nemo_cpt import errors, output\noutput.say('gone')\nraise errors.StoppedEarlyError('saved')"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=write, stderr=write)
    os.close(write)
    assert process.wait() == 75


def test_an_interactive_session_goes_on() -> None:
    done = ended("", "-i", input=RAISES.format("CptError") + "\nprint('goes', 'on')\n", stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (0, "goes on\n")
    assert "nemo_cpt: lr is 0\n" in done.stderr
    assert "Traceback" not in done.stderr


def test_other_errors_keep_their_traceback() -> None:
    done = ended("import nemo_cpt\nraise ValueError('odd')")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_type_checkers_see_the_executors_arguments(tmp_path: Path) -> None:
    """`nemo_cpt/executors` and `nemo_cpt/recipes` are links to the folders at the top, which every tool follows."""
    pytest.importorskip("mypy")
    script = tmp_path / "script.py"
    script.write_text("from nemo_cpt.executors import local\n\nlocal(processes='many', no_such_argument=3)\n")
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--cache-dir",
        str(tmp_path),
        "--config-file",
        "pyproject.toml",
        str(script),
    ]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True)
    assert 'Unexpected keyword argument "no_such_argument" for "local"' in done.stdout
    assert 'Argument "processes" to "local" has incompatible type "str"' in done.stdout


def test_a_checkout_imports_its_own_recipes(tmp_path: Path) -> None:
    """Also beside another checkout that is installed: a worktree must not test the other one's recipes."""
    for name in ("nemo_cpt", "recipes", "executors"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    for name in ("recipes", "executors"):
        (tmp_path / "nemo_cpt" / name).symlink_to(f"../{name}")
    code = "import nemo_cpt.recipes, nemo_cpt.executors; print(nemo_cpt.recipes.__file__, nemo_cpt.executors.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [f"{tmp_path}/nemo_cpt/{name}/__init__.py" for name in ("recipes", "executors")]
