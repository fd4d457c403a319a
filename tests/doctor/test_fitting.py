"""Whether a job fits the GPUs that are here, by the planner."""

from pathlib import Path

import pytest

from nemo_cpt.doctor import Examination, gpus
from tests.doctor.test_doctor_command import described, material, nemo_cpt

ADA = "0, GPU-11111111-aaaa, 48512, 48012, Disabled, 550.54.15, NVIDIA RTX 6000 Ada Generation"
A100 = "0, GPU-22222222-bbbb, 81920, 81000, Disabled, 550.54.15, NVIDIA A100-SXM4-80GB"
ONE_GPU = ("gpus_per_node=1", "tensor_model_parallel_size=1")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Workloads that these tests build, for all of them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def llama31_8b(tmp_path_factory) -> Path:
    """A base that says to be Llama-3.1-8B, with the tokenizer of `world`."""
    from tests.support import small_models

    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return small_models.describe(
        "llama31", tmp_path_factory.mktemp("llama31_8b"), hidden_size=4096, intermediate_size=14336, head_dim=128,
        num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256, rms_norm_eps=1e-5,
        max_position_embeddings=131072, rope_scaling=rope | {"original_max_position_embeddings": 8192},
    )  # fmt: skip


def test_every_parameter_does_not_fit_in_48_gb_and_run_says_what_would(world, llama31_8b, machine) -> None:
    machine(ADA)
    recipe = ("llama31_8b", *material(world, base=llama31_8b), *ONE_GPU)
    found = gpus.fit(Examination(described(*recipe)))
    assert (found.state, found.name) == ("error", "fit")
    assert "does not fit" in found.found
    assert "of 47.4 GiB" in found.found
    assert "host_states none -> exp_avg" in found.cure


def test_lora_fits_in_48_gb(world, llama31_8b, machine) -> None:
    machine(ADA)
    found = gpus.fit(
        Examination(described("llama31_8b.continual_pretrain_single_gpu", *material(world, base=llama31_8b)))
    )
    assert found.state == "ok"
    assert found.found.startswith("fits: ")


def test_fp8_is_refused_on_a_card_without_it(world, llama31_8b, machine) -> None:
    recipe = ("llama31_8b.continual_pretrain_single_gpu", *material(world, base=llama31_8b), "precision=fp8")
    machine(A100)
    found = gpus.fit(Examination(described(*recipe)))
    assert (found.state, found.cure) == ("error", "train with precision=bf16")
    assert "A100" in found.found
    machine(ADA)
    assert gpus.fit(Examination(described(*recipe))).state == "ok"


def test_run_refuses_what_does_not_fit(world, llama31_8b, machine) -> None:
    machine(ADA)
    done = nemo_cpt("run", "llama31_8b", *material(world, base=llama31_8b), *ONE_GPU, "executor.gpus=1")
    assert done.returncode == 2
    assert "is not launched" in done.stderr


def test_a_job_on_the_cpu_or_on_an_unknown_card_is_skipped(world, llama31_8b, machine) -> None:
    machine("")
    assert gpus.fit(Examination(described("tiny", *material(world)))).state == "skipped"
    skipped = gpus.fit(Examination(described("llama31_8b", *material(world, base=llama31_8b))))
    assert (skipped.state, "card is not known" in skipped.found) == ("skipped", True)
