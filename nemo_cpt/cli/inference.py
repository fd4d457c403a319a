"""Commands of `nemo-cpt`: chat and serve."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nemo_cpt.cli import app
from nemo_cpt.cli.tables import print_note
from nemo_cpt.errors import CptError
from nemo_cpt.inference.hosts import LOCAL_HOSTS, listen, names_to_answer, url_of
from nemo_cpt.urls import is_address

if TYPE_CHECKING:
    from nemo_cpt.inference.chat import Side

_Model = Annotated[
    str,
    typer.Argument(help="Hugging Face folder, NeMo checkpoint, run folder, or an endpoint's address (ADDRESS#MODEL)."),
]
_Base = Annotated[Path | None, typer.Option(help="LoRA: the base; default: the one that the run recorded.")]
_Device = Annotated[str | None, typer.Option(help="cuda, cpu; default: the GPU where there is one.")]
_Template = Annotated[
    str | None,
    typer.Option("--chat-template", "--template", help="In place of the model's: alpaca-ja, ..., or a Jinja file."),
]


@app.command("chat")
def chat_command(
    model: _Model,
    against: Annotated[str | None, typer.Option(help="Another model, answering beside it.")] = None,
    system: Annotated[str, typer.Option(help="What the model is told before the conversation.")] = "",
    max_tokens: Annotated[int, typer.Option(help="The most tokens of a reply.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 for the most probable words.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Draw among the most probable tokens of this probability.")] = 0.9,
    seed: Annotated[int, typer.Option(help="Of the first reply's random numbers.")] = 0,
    base: _Base = None,
    device: _Device = None,
    chat_template: _Template = None,
    plain: Annotated[bool, typer.Option("--plain", help="Continue the text; default without a chat template.")] = False,
    api_key_env: Annotated[str | None, typer.Option(help="Variable that holds the key of MODEL, an endpoint.")] = None,
    against_key_env: Annotated[str | None, typer.Option(help="The same for --against.")] = None,
) -> None:
    """Talk to a model; --against another one shows both replies side by side."""
    from rich.console import Console

    from nemo_cpt.inference import Sampling
    from nemo_cpt.inference.chat import Chat, typed_lines
    from nemo_cpt.inference.models import takes_base

    if against_key_env and not against:
        raise CptError("--against-key-env names the key of --against, which is not given")
    console, sampling = Console(), Sampling(max_tokens, temperature, top_p, seed=seed)
    options = _given(base=base, device=device, template=chat_template)
    # Beside a model of this machine they are for that one, and the endpoint is asked as it is.
    if options and all(map(is_address, (model, against or model))):
        raise CptError(f"{', '.join(options)} cannot be set for a model that a server has: set it there")
    asked = [(model, api_key_env), *([(against, against_key_env)] if against else [])]
    for each in asked:
        _check_side(*each)
    if base and not any(takes_base(each) for each, _ in asked):
        raise CptError(f"--base {base}: {model} is whole, and takes no base: leave it away")
    # Endpoints first: whether one answers is known sooner than a model is loaded.
    order = sorted(range(len(asked)), key=lambda number: not is_address(asked[number][0]))
    opened = {number: _side(*asked[number], options, plain) for number in order}
    sides = [opened[number] for number in range(len(asked))]
    if sys.stdin.isatty():
        print_note("/help lists the commands")
    # The model's name where there is one; two stand above their columns.
    prompt = "> " if against else f"{sides[0].title}> "
    chat = Chat(
        sides, sampling, system=system, console=console, language_of=_language_of, interactive=sys.stdin.isatty()
    )
    chat.run(typed_lines(prompt))


def _check_side(model: str, key_variable: str | None) -> None:
    """Refuse what can be refused before any model is loaded."""
    from nemo_cpt.inference.models import check_model

    if is_address(model):
        return
    if key_variable:
        raise CptError(f"{model} is no endpoint: it takes no key ({key_variable})")
    check_model(model)


def _side(model: str, key_variable: str | None, options: dict[str, Any], plain: bool) -> Side:
    """Open one model of a chat; what is set for it is used, or refused."""
    from rich.console import Console

    from nemo_cpt.inference import open_engine
    from nemo_cpt.inference.chat import Side
    from nemo_cpt.inference.models import takes_base

    key = key_of_variable(key_variable)
    # What is set holds for the model beside it where this one takes none of it.
    options = {} if is_address(model) else options if takes_base(model) else options | {"base": None}
    with Console(stderr=True).status(f"loading {model}"):
        engine = open_engine(model, api_key=key, say=print_note, **options)
    # An endpoint's engine says nothing of it: the template is its server's.
    if not plain and not getattr(engine, "has_chat_template", True):
        print_note(f"{model} has no chat template: it continues your text (--chat-template alpaca-en gives it one)")
        plain = True
    return Side(engine, plain)


def _language_of(question: str, reply: str) -> str:
    from nemo_cpt.evaluation.language import KNOWN, judge_language

    try:
        # First the question's: what could be of several languages in a reply is taken for that one.
        asked = judge_language(question, "en").language
        return judge_language(reply, asked if asked in KNOWN else "en").language
    except CptError as error:  # lingua is not installed
        return str(error)


@app.command("serve")
def serve_command(
    model: Annotated[str, typer.Argument(help="Hugging Face folder, NeMo checkpoint, or run folder.")],
    host: Annotated[str, typer.Option(help="Address; other than this machine's own needs a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    served_as: Annotated[str | None, typer.Option(help="The model's name in requests; default: its folder's.")] = None,
    allowed_host: Annotated[
        list[str] | None, typer.Option(help="Another name that requests may go by (Host header), as behind a proxy.")
    ] = None,
    api_key_env: Annotated[str | None, typer.Option(help="Variable of the key that requests must carry.")] = None,
    engine: Annotated[str, typer.Option(help="own, or vllm: start that with the flags that the model needs.")] = "own",
    container: Annotated[
        str | None, typer.Option(help="docker or slurm: where --engine vllm runs in its container (Slurm: Pyxis).")
    ] = None,
    image: Annotated[str | None, typer.Option(help="The container's image; vllm/vllm-openai:latest.")] = None,
    max_waiting: Annotated[int | None, typer.Option(help="Requests that may wait, others get 429; 256.")] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(help="Tokens of the batch, by which keys and values take memory; 32768.")
    ] = None,
    base: _Base = None,
    device: _Device = None,
    chat_template: _Template = None,
    nemo_api: Annotated[bool, typer.Option("--nemo-api", help="Answer NeMo's PUT /generate of 2023 too.")] = False,
    log_requests: Annotated[bool, typer.Option("--log-requests", help="Log each request's path and status.")] = False,
) -> None:
    """Serve a model over HTTP, compatible with OpenAI's chat completions and completions."""
    key, name = key_of_variable(api_key_env), served_as or Path(model).resolve().name
    if engine not in ("own", "vllm"):
        raise CptError(f"there is no engine {engine}: own or vllm")
    if is_address(model):
        raise CptError(f"{model} is served already: give serve a Hugging Face folder, a NeMo checkpoint or a run")
    if host not in LOCAL_HOSTS and key is None:
        raise CptError(f"{host} can be reached from other machines: name the variable of a key with --api-key-env")
    for option, value in {"--max-waiting": max_waiting, "--batch-tokens": batch_tokens}.items():
        if value is not None and value < 1:
            raise CptError(f"{option} is {value}; it must be 1 or more")
    if chat_template is not None:
        from nemo_cpt.inference.asked_as import check_template_choice

        check_template_choice(chat_template)
    if engine == "vllm":
        only_own = {
            "--max-waiting": max_waiting, "--batch-tokens": batch_tokens, "--device": device, "--nemo-api": nemo_api,
            "--log-requests": log_requests, "--allowed-host": allowed_host, "--port 0": port == 0,
        }  # fmt: skip
        # Refused, not passed over: who limits the queue counts on the limit.
        if given := [option for option, value in only_own.items() if value]:
            raise CptError(f"{', '.join(given)}: of this project's own server, not of --engine vllm")
        return _become_vllm(model, base, name, host, port, chat_template, key, container, image)
    if container is not None or image is not None:
        raise CptError("--container, --image: of --engine vllm, not of this project's own server")
    from nemo_cpt.inference.models import check_model, open_transformers

    # Before torch is imported and the model loaded: a port in use, and a path that is no model's, are known at once.
    listener = listen(host, port, "choose another --port")
    check_model(model)
    from nemo_cpt.inference.server import make_app, serve

    loaded = open_transformers(model, base=base, template=chat_template, say=print_note, **_given(device=device))
    limits = _given(most_waiting=max_waiting, batch_tokens=batch_tokens)
    names = names_to_answer(host, allowed_host or ())
    application = make_app(loaded, served_as=name, api_key=key, nemo_api=nemo_api, hosts=names, **limits)
    address = url_of(host, listener)
    serve(application, listener, log_requests=log_requests, ready=lambda: print_note(f"{name} at {address}"))


def _become_vllm(
    model: str, base: Path | None, name: str, host: str, port: int, chat_template: str | None, key: str | None,
    container: str | None, image: str | None,
) -> None:  # fmt: skip
    from nemo_cpt.inference.asked_as import reply_warnings
    from nemo_cpt.inference.models import find_model
    from nemo_cpt.inference.vllm import CONTAINERS, VllmServer

    if container is not None and container not in CONTAINERS:
        raise CptError(f"--container {container}: give {' or '.join(CONTAINERS)}")
    if image is not None and container is None:
        raise CptError("--image: give --container docker or slurm with it")
    folder = find_model(model, base=base, say=print_note).folder
    for warning in reply_warnings(folder) if chat_template is None else ():
        print_note(f"warning: {warning}")
    server = VllmServer(folder, name, host, port, chat_template, key, container, **_given(image=image))
    print_note(shlex.join(server.launch()))
    if container == "slurm" and host in LOCAL_HOSTS:
        print_note(f"it listens on its node's {host} alone: --host 0.0.0.0 and --api-key-env let other machines in")
    server.start()


def _given(**options: Any) -> dict[str, Any]:
    # What was not typed is left to the library's own default, which thus stands in one place.
    return {name: value for name, value in options.items() if value is not None}


def key_of_variable(variable: str | None) -> str | None:
    """The key that a variable of the environment holds; CptError where it is named and not set, or no key."""
    if variable is None:
        return None
    # A file's last line break often comes along, and no header can carry one.
    key = os.environ.get(variable, "").strip()
    if not key:
        raise CptError(f"the variable {variable}, which is to hold the key, is not set")
    if not (key.isascii() and key.isprintable()):
        raise CptError(f"the key in {variable} holds characters that no HTTP header carries: use ASCII alone")
    return key
