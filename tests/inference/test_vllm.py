"""`serve --engine vllm`: the program that it becomes, and what it says where there is none. vLLM itself is not here."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nemo_cpt.cli import app
from nemo_cpt.inference.vllm import ENVIRONMENT, VllmServer

RECORDER = f"""#!{sys.executable}
import json, os, sys
names = ["VLLM_API_KEY", *{list(ENVIRONMENT)!r}]
print(json.dumps([sys.argv[1:], {{name: os.environ.get(name) for name in names}}]))
"""


def test_it_becomes_vllm_with_the_flags_of_the_model(make_model: Callable[[str], Path], tmp_path: Path) -> None:
    program, folder = tmp_path / "bin" / "vllm", make_model("llama")
    program.parent.mkdir()
    program.write_text(RECORDER)
    program.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{program.parent}:{os.environ['PATH']}",
        "TINY_KEY": "secret-key",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }
    words = ["serve", str(folder), "--engine", "vllm", "--api-key-env", "TINY_KEY", "--chat-template", "alpaca-ja"]
    done = subprocess.run(
        [sys.executable, "-m", "nemo_cpt.cli", *words], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    (given, variables) = json.loads(done.stdout)
    flags = dict(zip(given[2::2], given[3::2], strict=True))
    template = Path(flags.pop("--chat-template"))
    assert given[:2] == ["serve", str(folder)]
    assert flags == {
        "--served-model-name": "llama", "--host": "127.0.0.1", "--port": "8000", "--max-model-len": "256",
        "--dtype": "float32", "--generation-config": str(folder),
    }  # fmt: skip
    assert "### 指示:" in template.read_text()
    assert variables == ENVIRONMENT | {"VLLM_API_KEY": "secret-key"}
    assert "secret-key" not in done.stderr


@pytest.mark.parametrize(("container", "program"), [("docker", "docker"), ("slurm", "srun")])
def test_it_becomes_what_runs_its_container(
    container: str, program: str, make_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """A stand-in for the program: Docker's daemon and Pyxis cannot be had."""
    stand_in, folder = tmp_path / "bin" / program, make_model("llama")
    stand_in.parent.mkdir()
    stand_in.write_text(RECORDER)
    stand_in.chmod(0o755)
    environment = os.environ | {"PATH": f"{stand_in.parent}:{os.environ['PATH']}", "TINY_KEY": "secret-key"}
    words = ["serve", str(folder), "--engine", "vllm", "--container", container, "--image", "vllm/vllm-openai:v0.8.5"]
    done = subprocess.run(
        [sys.executable, "-m", "nemo_cpt.cli", *words, "--api-key-env", "TINY_KEY"],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    given, variables = json.loads(done.stdout)
    server = VllmServer(
        folder, "llama", "127.0.0.1", 8000, None, "secret-key", container, image="vllm/vllm-openai:v0.8.5"
    )
    assert [program, *given] == server.launch()
    assert "vllm/vllm-openai:v0.8.5" in given
    assert variables["VLLM_API_KEY"] == "secret-key"
    assert "secret-key" not in done.stderr
    assert ("listens on its node's 127.0.0.1 alone" in done.stderr) == (container == "slurm")


def test_containers_that_cannot_be_are_refused(
    make_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    from nemo_cpt.cli import inference  # noqa: F401  registers the commands

    serve = ["serve", str(make_model("llama"))]
    for words, said in (
        (["--engine", "vllm", "--container", "podman"], "--container podman: give docker or slurm"),
        (["--engine", "vllm", "--image", "mine"], "--image: give --container docker or slurm with it"),
        (["--engine", "vllm", "--container", "docker"], "--container docker: there is no docker on PATH"),
        (["--container", "docker"], "--container, --image: of --engine vllm"),
        (["--image", "mine"], "--container, --image: of --engine vllm"),
    ):
        assert said in str(CliRunner().invoke(app, [*serve, *words]).exception)


def test_where_it_is_not_installed_its_containers_are_told(
    make_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    folder = make_model("llama")
    from nemo_cpt.cli import inference  # noqa: F401  registers the commands

    refused = CliRunner().invoke(app, ["serve", str(folder), "--engine", "vllm", "--port", "8765"])
    message = str(refused.exception)
    assert "no vllm on PATH" in message
    assert "pip install vllm" in message
    docker, slurm = (
        shlex.split(next(line for line in message.splitlines() if line.startswith(f"  {word} ")))
        for word in ("docker", "srun")
    )
    assert f"{folder}:{folder}:ro" in docker
    assert "127.0.0.1:8765:8765" in docker
    assert docker[docker.index("--host") + 1] == "0.0.0.0"  # in the container
    assert docker[docker.index("serve") + 1] == slurm[slurm.index("serve") + 1] == str(folder)


def test_a_key_is_on_no_command_line(make_model: Callable[[str], Path]) -> None:
    server = VllmServer(make_model("llama"), "tiny", "0.0.0.0", 8000, api_key="secret-key")
    assert server.environment()["VLLM_API_KEY"] == "secret-key"
    for command in (server.command(), server.in_docker(), server.on_slurm()):
        assert "secret-key" not in " ".join(command)
    assert "VLLM_API_KEY" in server.in_docker()
