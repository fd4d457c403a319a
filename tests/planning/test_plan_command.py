"""`nemo-cpt plan`, and the doctor's use of it."""

import functools
import json
import os
import subprocess
import sys
from dataclasses import asdict

import pytest

from nemo_cpt.catalog import workloads
from tests.planning.test_planner import llama
from tests.support.commands import nemo_cpt
from tests.support.cost import within_cpu_seconds

LORA = "llama31_8b.continual_pretrain_single_gpu"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return {"XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache"))}


@pytest.fixture(scope="module")
def plan(cache):
    return functools.partial(nemo_cpt, "plan", environ=cache)


def test_a_recipe_that_fits_ends_with_0_and_the_second_answer_comes_at_once(plan, cache) -> None:
    question = [LORA, "--gpu-memory", "48", "--json"]
    first = plan(*question)
    assert first.returncode == 0, first.stderr
    command = [sys.executable, "-m", "nemo_cpt.cli", "plan", *question]
    with within_cpu_seconds(2):  # it takes 0.5
        again = subprocess.run(command, capture_output=True, text=True, env=os.environ | cache)
    assert json.loads(first.stdout) == json.loads(again.stdout)
    answer = json.loads(again.stdout)
    assert answer["fits"]
    assert answer["nearest"] is None
    assert sum(answer["stages"][0]["bytes"].values()) == answer["stages"][0]["total_bytes"]


def test_a_command_that_is_forked_is_as_one_of_its_own() -> None:
    for arguments in (["recipes", "--json"], ["run", "tinny"]):
        command = [sys.executable, "-m", "nemo_cpt.cli", *arguments]
        alone, forked = subprocess.run(command, capture_output=True, text=True), nemo_cpt(*arguments)
        assert (forked.returncode, forked.stdout, forked.stderr) == (alone.returncode, alone.stdout, alone.stderr)


def test_a_base_that_came_or_changed_is_read_again(plan, tmp_path) -> None:
    def bytes_of_weights() -> int:
        done = plan(LORA, f"base={tmp_path}/base", "--gpu-memory", "80", "--json")
        return json.loads(done.stdout)["stages"][0]["bytes"]["weights"]

    before = bytes_of_weights()
    configuration = tmp_path / "base" / "hf" / "config.json"
    configuration.parent.mkdir(parents=True)
    for vocabulary in (64_000, 32_000):
        configuration.write_text(json.dumps({"vocab_size": vocabulary}))
        assert before - bytes_of_weights() == 2 * 2 * 4096 * (128_256 - vocabulary)


def test_another_base_of_the_same_name_is_planned_anew(tmp_path, monkeypatch) -> None:
    """Also where the configuration that gives the vocabulary's size, of a tokenizer that was named, is the same."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    planned = {"workload": asdict(llama()), "configuration": "", "digest": ""}
    built = []
    monkeypatch.setattr(workloads, "_described_elsewhere", lambda request: built.append(1) or json.dumps(planned))
    monkeypatch.setattr(workloads, "_described_here", workloads._described_elsewhere)
    (tmp_path / "base/hf").mkdir(parents=True)
    for layers in (4, 4, 5):
        (tmp_path / "base/hf/config.json").write_text(json.dumps({"num_hidden_layers": layers}))
        workloads.workload("gpt.pretrain", {"base": str(tmp_path / "base"), "tokenizer": "gpt2"})
    assert len(built) == 2


@pytest.mark.parametrize("home", ["", "file/below"])
def test_what_cannot_be_remembered_is_planned_all_the_same(home, tmp_path, monkeypatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / home))
    planned = {"workload": asdict(llama()), "configuration": "", "digest": ""}
    built = []
    monkeypatch.setattr(workloads, "_described_elsewhere", lambda request: built.append(1) or json.dumps(planned))
    monkeypatch.setattr(workloads, "_described_here", workloads._described_elsewhere)
    for _ in range(2):
        assert workloads.workload("tiny.continual_pretrain", {}) == llama()
        for remembered in (tmp_path / "nemo_cpt/workloads").glob("*"):
            remembered.write_text('{"torn')
    assert len(built) == 2


def test_one_that_does_not_fit_ends_with_3_and_what_would(plan) -> None:
    done = plan(LORA, "--gpu-memory", "24")
    assert done.returncode == 3
    verdict, *would = done.stdout.partition("does not fit")[2].splitlines()
    assert "too much" in verdict
    assert would[0] == "what would fit:"
    assert any("rank 128 -> 16" in line for line in would)
    assert "fits: " in would[-1]


def test_more_gpus_and_a_picture(plan, tmp_path) -> None:
    picture = tmp_path / "plan.png"
    done = plan("llama31_8b.continual_pretrain", "--gpus", "16", "--gpu", "H100", "--tokens", "1.26e9",
                    "--json", "--plot", str(picture))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    answer = json.loads(done.stdout)
    assert answer["tokens"] == 1.26e9
    assert answer["hours"] == pytest.approx(1.26e9 / answer["tokens_per_second"] / 3600, rel=0.01)
    assert answer["tokens_per_second_per_gpu"] == pytest.approx(answer["tokens_per_second"] / 16, rel=0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["llama"], "there is no recipe 'llama'"),
        ([LORA, "--gpu", "TPU"], "the planner knows no GPU 'TPU'"),
        ([LORA, "--plot", "/nowhere/plan.png"], "a folder that exists"),
        (["llama31_8b.continual_pretrain", "--gpus", "12"], "does not fill nodes of 8"),
        (["llama31_8b.continual_pretrain", "data.nothing=1"], "no field nothing"),
    ],
)
def test_what_is_wrong_ends_with_2(plan, arguments, message) -> None:
    done = plan(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
