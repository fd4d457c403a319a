"""Whether a job fits the GPUs that are here, by the planner."""

import pytest

from nemo_cpt.doctor import Examination, fitting
from tests.doctor.test_doctor_command import described, material, nemo_cpt

ADA = "0, GPU-11111111-aaaa, 48512, 48012, Disabled, 550.54.15, NVIDIA RTX 6000 Ada Generation"
ONE_GPU = ("gpus_per_node=1", "tensor_model_parallel_size=1")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Workloads that these tests build, for all of them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def test_every_parameter_does_not_fit_in_48_gb_and_run_says_what_would(world, machine) -> None:
    machine(ADA)
    recipe = ("llama31_8b", *material(world), *ONE_GPU)
    found = fitting.fit(Examination(described(*recipe)))
    assert (found.state, found.name) == ("error", "fit")
    assert "does not fit" in found.found
    assert "of 47.4 GiB" in found.found
    assert "host_states none -> exp_avg" in found.cure


def test_lora_fits_in_48_gb(world, machine) -> None:
    machine(ADA)
    found = fitting.fit(Examination(described("llama31_8b.continual_pretrain_single_gpu", *material(world))))
    assert found.state == "ok"
    assert found.found.startswith("fits: ")


def test_run_refuses_what_does_not_fit(world, machine) -> None:
    machine(ADA)
    done = nemo_cpt("run", "llama31_8b", *material(world), *ONE_GPU, "executor.gpus=1")
    assert done.returncode == 2
    assert "is not launched" in done.stderr


def test_a_job_on_the_cpu_or_on_an_unknown_card_is_skipped(world, machine) -> None:
    machine("")
    assert fitting.fit(Examination(described("tiny", *material(world)))).state == "skipped"
    skipped = fitting.fit(Examination(described("llama31_8b", *material(world))))
    assert (skipped.state, "card is not known" in skipped.found) == ("skipped", True)
