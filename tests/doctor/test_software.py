"""Versions against the table, and packages that do not import."""

import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from nemo_cpt.doctor import Examination, Job, Place, software, versions
from nemo_cpt.doctor.versions import MEASURED, OTHERS, OTHERWISE, STACK, Package, required

ROOT = Path(__file__).parents[2]


def plant(folder: Path, package: str, init: str, metadata: str = "") -> None:
    (folder / package).mkdir(parents=True)
    (folder / package / "__init__.py").write_text(init)
    if metadata:
        info = folder / f"{package}-{metadata.splitlines()[0]}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {metadata}\n")


def test_this_environment_is_sound():
    findings = [software.python(Examination()), *software.packages(Examination()), software.torch_import(Examination())]
    assert {each.state for each in findings} <= {"ok", "skipped"}
    assert software.combination(Examination()).found == "the versions measured together on the CPU"


def test_the_ranges_are_pyprojects():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [*project["dependencies"], *project["optional-dependencies"]["gpu"]]
    ranges = {each.name: each.specifier for each in map(Requirement, declared)}
    known = required()
    assert {name: Requirement(f"x{package.works}").specifier for name, package in known.items()} == ranges
    assert {*STACK, *OTHERS, *OTHERWISE} <= set(ranges)
    assert [name for name, package in known.items() if package.optional] == ["transformer_engine"]
    assert known["transformers"].works == ">=4.57,<5"


def test_an_installed_package_is_compared_with_its_metadata(tmp_path, monkeypatch):
    declared = [
        *[f"Requires-Dist: {name}" for name in STACK if name not in ("numpy", "transformer_engine")],
        "Requires-Dist: numpy<1,>=0.5",
        'Requires-Dist: transformer_engine[pytorch]<3,>=2.11; extra == "gpu"',
        'Requires-Dist: nothing-of-this-name; sys_platform == "other"',
        'Requires-Dist: nothing-of-that-name; extra == "dev"',
    ]
    plant(tmp_path, "nemo_cpt", "", "9.9\n" + "\n".join(declared))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(versions, "PROJECT", tmp_path / "pyproject.toml")  # site-packages has none
    assert set(required()) == set(STACK)
    (found,) = [each for each in software.packages(Examination()) if each.state == "error"]
    assert (found.name, found.cure) == ("numpy", "pip install 'numpy>=0.5,<1'")


def test_files_without_metadata_say_that_nothing_is_compared(tmp_path, monkeypatch):
    def none(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(versions, "PROJECT", tmp_path / "pyproject.toml")
    monkeypatch.setattr(versions, "requires", none)
    (found,) = software.packages(Examination())
    assert (found.name, found.state) == ("packages", "warning")
    assert found.found.startswith("not compared")


def test_the_measured_versions_are_those_that_are_pinned():
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    pins = {canonicalize_name(name): pinned for name, pinned in pins.items()}
    assert {name: pins[canonicalize_name(name)] for name in MEASURED["CPU"]} == MEASURED["CPU"]


@pytest.mark.parametrize(
    ("name", "planted", "says"),
    [
        ("megatron-core", "0.16.0", "0.16 dropped dist_checkpointing"),
        ("nemo_toolkit", "3.0.0", "3.0 has no nemo.collections.llm"),
        ("leptonai", "0.28.0", "import nemo_run"),
        ("nvidia-resiliency-ext", "0.5.0", "NeMoLogger"),
        ("transformers", "5.0.0", "NeMo 2.7 was written for 4"),
    ],
)
def test_known_bad_versions_are_red(tmp_path, monkeypatch, name, planted, says):
    plant(tmp_path, name.replace("-", "_"), "", planted)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert version(name) == planted
    (found,) = [each for each in software.packages(Examination()) if each.state == "error"]
    assert (found.name, found.found.partition(",")[0]) == (name, planted)
    assert says in found.found
    assert found.cure.startswith(f"pip install '{name}")
    assert software.combination(Examination()).state == ("warning" if name in MEASURED["CPU"] else "ok")


def test_what_a_training_goes_without_is_a_warning(tmp_path, monkeypatch):
    plant(tmp_path, "pandas", "", "3.0.6")
    plant(tmp_path, "pyarrow", "", "25.0.1")
    monkeypatch.syspath_prepend(str(tmp_path))
    (found,) = [each for each in software.packages(Examination()) if each.state not in ("ok", "skipped")]
    assert (found.name, found.state) == ("other packages", "warning")
    assert found.found == "pyarrow 25.0.1, and <22 works; pandas 3.0.6, and <3 works"
    assert found.cure == "pip install 'pyarrow<22' 'pandas<3'"


def test_a_package_that_is_missing():
    found = software._of_package(Package("no-such-package-here", "<2"), Examination())
    assert (found.state, found.cure) == ("error", "pip install 'no-such-package-here<2'")


def test_transformer_engine_is_asked_for_where_the_recipe_takes_gpus():
    given = {each.name: each for each in software.packages(Examination(Job("r", gpus_per_node=8)))}
    assert given["transformer_engine"].state == "error"
    assert "transformer_engine[pytorch]" in given["transformer_engine"].cure
    assert {each.name: each for each in software.packages(Examination(Job("r")))}[
        "transformer_engine"
    ].state == "skipped"


@pytest.mark.parametrize(
    ("init", "says", "cure"),
    [
        ("import nothing_of_that_name", "No module named 'nothing_of_that_name'", "a package is missing"),
        (
            "raise ImportError('libtorch_cuda.so: undefined symbol: ncclCommShrink')",
            "ImportError: libtorch_cuda.so: undefined symbol: ncclCommShrink",
            "unset LD_LIBRARY_PATH",
        ),
        (
            "raise OSError('libcudnn.so.9: cannot open shared object file: No such file or directory')",
            "libcudnn.so.9",
            "unset LD_LIBRARY_PATH",
        ),
        ("import os; os._exit(3)", "the process ended with 3 and said nothing", "--force-reinstall"),
        ("import os; os.kill(os.getpid(), 11)", "the process ended with -11", "--force-reinstall"),
    ],
)
def test_a_torch_that_does_not_import(tmp_path, monkeypatch, init, says, cure):
    plant(tmp_path, "torch", init)
    monkeypatch.setattr(software, "TORCH", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{software.TORCH}")
    found = software.torch_import(Examination())
    assert found.state == "error"
    assert says in found.found
    assert cure in found.cure


def test_a_torch_that_hides_the_environments_own(tmp_path, monkeypatch):
    plant(tmp_path, "torch", "raise RuntimeError('broken on purpose')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    loaded = sys.modules.pop("torch", None)
    try:
        found = software.torch_import(Examination())
    finally:
        if loaded:
            sys.modules["torch"] = loaded
    assert (found.state, found.found) == ("error", "RuntimeError: broken on purpose")
    assert found.cure == f"{tmp_path}/torch stands before this environment's own: remove it from PYTHONPATH"


def test_a_torch_that_never_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(software, "TORCH", "import signal; signal.pause()")
    monkeypatch.setattr(software, "IMPORT_SECONDS", 0.5)
    found = software.torch_import(Examination())
    assert (found.state, found.found) == ("error", "still importing after 0.5 s")


def test_a_transformer_engine_that_does_not_import(tmp_path, monkeypatch):
    plant(tmp_path, "transformer_engine", "raise ImportError('undefined symbol: _ZN3c10')", "2.11.0")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert software.transformer_engine_import(Examination()).state == "warning"
    assert software.transformer_engine_import(Examination(Job("r", gpus_per_node=1))).state == "error"


def test_a_job_with_packages_of_its_own_is_not_judged_by_these():
    examination = Examination(Job("r", gpus_per_node=8, place=Place("kubernetes", here=False, same_packages=False)))
    findings = [*software.packages(examination), software.combination(examination), software.torch_import(examination)]
    findings += [software.driver(examination), software.transformer_engine_import(examination)]
    assert {each.state for each in findings} == {"skipped"}
