"""vLLM in place of this project's own server: with the flags that an export needs, in an environment of its own.

vLLM pins a torch of its own, so that it is not installed beside NeMo: it is a program on PATH, or a container.
"""

import os
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_cpt.cache import cache_folder
from nemo_cpt.checkpoint.architecture import context_length, read_json
from nemo_cpt.errors import CptError
from nemo_cpt.inference.asked_as import template_text

IMAGE = "vllm/vllm-openai:latest"
CONTAINERS = ("docker", "slurm")
# The key goes by the environment, which other users cannot read; nothing is asked of the hub or sent to vLLM's makers.
KEY_VARIABLE = "VLLM_API_KEY"
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


@dataclass(frozen=True)
class VllmServer:
    """What vLLM is to serve, and where.

    Attributes:
        folder: a Hugging Face folder.
        served_as: the model's name in requests.
        host: address to listen on.
        port: port to listen on.
        template: a chat template in place of the model's own, a name or a Jinja file.
        api_key: what requests must carry.
        container: "docker" or "slurm": where vLLM's image runs; None for the program on PATH.
        image: vLLM's.
    """

    folder: Path
    served_as: str
    host: str
    port: int
    template: str | None = None
    api_key: str | None = None
    container: str | None = None
    image: str = IMAGE

    def command(self) -> list[str]:
        """The command line; its flags are those of https://docs.vllm.ai/en/v0.8.5/serving/engine_args.html."""
        folder, config = self.folder.resolve(), read_json(self.folder / "config.json")
        words: dict[str, Any] = {
            "--served-model-name": self.served_as,
            "--host": self.host,
            "--port": self.port,
            "--max-model-len": context_length(folder),
            # Its own choice for weights in fp32 is fp16, in which models that were trained in bf16 overflow.
            "--dtype": config.get("dtype") or config.get("torch_dtype") or "bfloat16",
            "--generation-config": folder,  # every token that ends a reply
        }
        if self.template is not None:
            words["--chat-template"] = self._template_file()
        given = ((name, str(value)) for name, value in words.items() if value is not None)
        return ["vllm", "serve", str(folder), *(word for pair in given for word in pair)]

    def _template_file(self) -> Path:
        """The named template as a file: one that ships has its BOS settled by the folder's tokenizer."""
        assert self.template is not None
        text = template_text(self.template, self.folder)
        if Path(self.template).is_file():
            return Path(self.template).resolve()
        file = cache_folder("chat_templates") / f"{self.template}{'-bos' if 'bos_token' in text else ''}.jinja"
        file.write_text(text, encoding="utf-8")
        return file

    def in_docker(self) -> list[str]:
        """The command line for Docker; `executors.docker` starts jobs alone, and vLLM's image has an entry point."""
        publish = f"{self.host}:{self.port}:{self.port}"
        words = ["docker", "run", "--rm", "--gpus", "all", "--ipc", "host", "--publish", publish]
        for source in self._mounts():
            words += ["--volume", f"{source}:{source}:ro"]
        for name in self._variables():
            words += ["--env", name]
        # In the container it listens on all addresses; --publish says which of this machine's lead there.
        inside = [word if word != self.host else "0.0.0.0" for word in self.command()[1:]]
        return [*words, "--entrypoint", "vllm", self.image, *inside]

    def on_slurm(self) -> list[str]:
        """The command line for Slurm with Pyxis."""
        mounts = ",".join(f"{source}:{source}:ro" for source in self._mounts())
        image = ["--container-image", self.image, "--container-mounts", mounts]
        return ["srun", "--nodes=1", "--ntasks=1", "--gpus-per-node=1", *image, *self.command()]

    def _mounts(self) -> list[Path]:
        template = [self._template_file()] if self.template is not None else []
        return [self.folder.resolve(), *template]

    def _variables(self) -> list[str]:
        return [f"{name}={value}" for name, value in ENVIRONMENT.items()] + ([KEY_VARIABLE] if self.api_key else [])

    def environment(self) -> dict[str, str]:
        """The variables of its process."""
        key = {KEY_VARIABLE: self.api_key} if self.api_key else {}
        return os.environ | ENVIRONMENT | key

    def launch(self) -> list[str]:
        """The command line that starts it: vLLM's own, or the container's."""
        return {None: self.command, "docker": self.in_docker, "slurm": self.on_slurm}[self.container]()

    def start(self) -> None:
        """Become vLLM, or what runs its container: this process goes on as it.

        Raises:
            CptError: the program is not here; of vLLM itself the message says how it is installed, and how it is
                started in a container.
        """
        words = self.launch()
        if (program := shutil.which(words[0])) is None:
            if self.container is not None:
                raise CptError(f"--container {self.container}: there is no {words[0]} on PATH")
            raise CptError(
                "--engine vllm: there is no vllm on PATH. It wants an environment of its own:\n"
                '  python3 -m venv ~/vllm && ~/vllm/bin/pip install vllm && export PATH="$PATH:$HOME/vllm/bin"\n'
                f"or its container (--container docker){f', with the key in {KEY_VARIABLE}' if self.api_key else ''}:\n"
                f"  {shlex.join(self.in_docker())}\n"
                f"or that on Slurm with Pyxis (--container slurm):\n  {shlex.join(self.on_slurm())}"
            )
        os.execve(program, words, self.environment())
