"""Real tokenizers, each with a chat template's tokens."""

import json
import shutil
from importlib.resources import files
from pathlib import Path

import pytest

from tests.conversations.oracle import add_tokens
from tests.support import tokenizers
from tests.support.shared import made_once

CHAT_TOKENS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


@pytest.fixture(scope="session")
def llama3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama-3.1's tokenizer, as the base has it."""
    return made_once(tmp_path_factory, "llama31", tokenizers.llama31)


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-Instruct's tokenizer with its template."""
    return made_once(tmp_path_factory, "smollm2_tokenizer", tokenizers.smollm2)


@pytest.fixture(scope="session")
def qwen25(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of Qwen2.5's shape."""
    folder = files("nemo_cpt.demo") / "corpus"
    lines = [line for name in ("ja", "en") for line in (folder / f"{name}.jsonl").read_text("utf-8").splitlines()]
    return tokenizers.qwen25(tmp_path_factory.mktemp("qwen25"), [json.loads(line)["text"] for line in lines])


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory, qwen25: Path) -> Path:
    """The same, described by its tokenizer.json alone: it loads in no time."""
    folder = shutil.copytree(qwen25, tmp_path_factory.mktemp("small") / "tokenizer")
    tokenizers.write_config(folder, eos_token="<|endoftext|>")
    return folder


@pytest.fixture(scope="session")
def with_chat_tokens(
    tmp_path_factory: pytest.TempPathFactory, llama3: Path, smollm2: Path, qwen25: Path
) -> dict[str, Path]:
    """Copies of the three, each with the tokens of all templates."""
    copies = {}
    for name, folder in {"llama3": llama3, "smollm2": smollm2, "qwen25": qwen25}.items():
        copies[name] = shutil.copytree(folder, tmp_path_factory.mktemp("with_chat_tokens") / name)
        add_tokens(copies[name], CHAT_TOKENS)
    return copies
