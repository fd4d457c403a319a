"""Commands of `nemo-cpt`: chat and serve."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Annotated

import typer

from nemo_cpt.cli import app
from nemo_cpt.errors import CptError

_LOCAL = ("127.0.0.1", "localhost", "::1")
_Model = Annotated[
    str, typer.Argument(help="Hugging Face folder, NeMo checkpoint, run folder, or an endpoint's http address.")
]
_Base = Annotated[Path | None, typer.Option(help="LoRA: the base; default: the one that the run recorded.")]
_Device = Annotated[str | None, typer.Option(help="cuda, cpu; default: the GPU where there is one.")]
_Template = Annotated[Path | None, typer.Option("--chat-template", help="File of a Jinja chat template.")]


@app.command("chat")
def chat_command(
    model: _Model,
    against: Annotated[str | None, typer.Option(help="Another model, answering beside it.")] = None,
    system: Annotated[str, typer.Option(help="What the model is told before the conversation.")] = "",
    max_tokens: Annotated[int, typer.Option(help="The most tokens of a reply.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 for the most probable words.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Draw among the most probable tokens of this probability.")] = 0.9,
    seed: Annotated[int, typer.Option(help="Of the random numbers.")] = 0,
    base: _Base = None,
    device: _Device = None,
    chat_template: _Template = None,
    plain: Annotated[bool, typer.Option("--plain", help="Continue the text; default without a chat template.")] = False,
    api_key_env: Annotated[str | None, typer.Option(help="Variable that holds an endpoint's key.")] = None,
) -> None:
    """Talk to a model; --against another one shows both replies side by side."""
    from rich.console import Console

    from nemo_cpt.inference import Engine, Sampling, open_engine
    from nemo_cpt.inference.chat import Chat, typed_lines

    console, told = Console(soft_wrap=True), Console(stderr=True)
    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    options = _options(device, chat_template)
    engines: list[Engine] = []
    for name in [model, against] if against else [model]:
        with told.status(f"loading {name}"):
            engines.append(
                open_engine(
                    name, base=base, api_key=key_of_variable(api_key_env), say=_say,
                    **({} if name.startswith("http") else options),
                )
            )  # fmt: skip
    if not all(getattr(engine, "has_chat_template", True) for engine in engines) and not plain:
        _say("no chat template: the model continues your text (--chat-template FILE gives it one)")
        plain = True
    if sys.stdin.isatty():
        _say("/help lists the commands")
    Chat(engines, sampling, system=system, plain=plain, console=console).run(typed_lines())


@app.command("serve")
def serve_command(
    model: _Model,
    host: Annotated[str, typer.Option(help="Address; other than this machine's own needs a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8000,
    served_as: Annotated[str | None, typer.Option(help="The model's name in requests; default: its folder's.")] = None,
    api_key_env: Annotated[str | None, typer.Option(help="Variable of the key that requests must carry.")] = None,
    max_waiting: Annotated[int, typer.Option(help="Requests that may wait; others are answered 429.")] = 256,
    batch_tokens: Annotated[int, typer.Option(help="Tokens of the batch: memory of keys and values.")] = 32_768,
    base: _Base = None,
    device: _Device = None,
    chat_template: _Template = None,
    nemo_api: Annotated[bool, typer.Option("--nemo-api", help="Answer NeMo's PUT /generate of 2023 too.")] = False,
    log_requests: Annotated[bool, typer.Option("--log-requests", help="Log each request's path and status.")] = False,
) -> None:
    """Serve a model over HTTP, compatible with OpenAI's chat completions and completions."""
    key = key_of_variable(api_key_env)
    if host not in _LOCAL and key is None:
        raise CptError(f"{host} can be reached from other machines: name the variable of a key with --api-key-env")
    listener = _listen(host, port)  # before the model is loaded: a port in use is known at once
    import uvicorn

    from nemo_cpt.inference.models import open_transformers
    from nemo_cpt.inference.server import make_app

    engine = open_transformers(model, base=base, say=_say, **_options(device, chat_template))
    name = served_as or Path(model).resolve().name
    application = make_app(
        engine, served_as=name, api_key=key, most_waiting=max_waiting, batch_tokens=batch_tokens, nemo_api=nemo_api
    )
    _say(f"{name} at http://{host}:{listener.getsockname()[1]}/v1")
    uvicorn.Server(uvicorn.Config(application, log_level="warning", access_log=log_requests)).run([listener])


def _options(device: str | None, chat_template: Path | None) -> dict[str, str | None]:
    if chat_template is not None and not chat_template.is_file():
        raise CptError(f"there is no chat template at {chat_template}")
    text = chat_template.read_text(encoding="utf-8") if chat_template else None
    return {name: value for name, value in (("device", device), ("chat_template", text)) if value is not None}


def key_of_variable(variable: str | None) -> str | None:
    """The key that a variable of the environment holds; CptError where it is named and not set."""
    if variable is None:
        return None
    if not os.environ.get(variable):
        raise CptError(f"the variable {variable}, which is to hold the key, is not set")
    return os.environ[variable]


def _listen(host: str, port: int) -> socket.socket:

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    # Else a server that was just ended keeps its port busy for a minute.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        raise CptError(f"cannot listen on {host}:{port} ({error.strerror}): choose another --port") from None
    return listener


def _say(line: str) -> None:
    print(f"nemo-cpt: {line}", file=sys.stderr, flush=True)
