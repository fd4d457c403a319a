"""A tokenized corpus and a small base model, made once for the session from the demo's own parts."""

import json
import random
import shutil
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.shared import made_once


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what `make_world` puts there, and the runs of this process's tests."""
    return copy_of_world(tmp_path_factory)


def copy_of_world(factory: pytest.TempPathFactory) -> Path:
    """The tests of a process write into their world, so that each process has a copy of its own."""
    made = made_once(factory, "made_world", make_world)
    return shutil.copytree(made, factory.mktemp("world"), dirs_exist_ok=True)


def make_world(folder: Path) -> None:
    """Put `base_hf`, `base` (NeMo) and `ds/{ja,en}_{train,validation}` into a folder."""
    import torch

    from nemo_cpt.checkpoint import import_hf
    from nemo_cpt.corpus import prepare
    from nemo_cpt.demo import base

    torch.set_num_threads(1)
    texts = {language: _texts(language) for language in ("ja", "en")}
    tokenizer = base.train_tokenizer(texts["ja"] + texts["en"], vocab_size=512)
    base.pretrain(texts["en"], tokenizer, folder / "base_hf", steps=40, progress=lambda step, loss: None, lr=5e-3)
    import_hf(folder / "base_hf", folder / "base")
    for language, documents in texts.items():
        for part, chosen in (("train", documents[8:]), ("validation", documents[:8])):
            lines = folder / f"{language}_{part}.jsonl"
            lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in chosen))
            prepare(lines, folder / "ds" / f"{language}_{part}", folder / "base_hf", workers=1, quiet=True)


def _texts(language: str) -> list[str]:
    lines = (files("nemo_cpt.demo") / "corpus" / f"{language}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in random.Random(0).sample(lines, 40)]


@pytest.fixture(scope="session")
def blend(world: Path) -> Any:
    from nemo_cpt.corpus import Blend

    return Blend.replay(
        str(world / "ds/ja_train"),
        str(world / "ds/en_train"),
        share=0.25,
        validation={language: str(world / f"ds/{language}_validation") for language in ("ja", "en")},
    )


@pytest.fixture(scope="session")
def chats(world: Path) -> Any:
    """Conversations in `world`: 64 to train on, 11 held out, of 20 to 110 positions with the small tokenizer."""
    from nemo_cpt.conversations import Conversations, prepare

    template = world / "template.jinja"
    template.write_text(
        "{{- bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}Q: {{ message['content'] }}\n"
        "{% else %}A: {{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}A: {% endif %}"
    )
    pairs = list(_pairs())
    for name, chosen in (("train", pairs[:64]), ("validation", pairs[64:75])):
        lines = world / f"chats_{name}.jsonl"
        lines.write_text("".join(json.dumps(pair) + "\n" for pair in chosen))
        prepare(lines, world / "sft" / name, world / "base_hf", template=str(template), workers=1, quiet=True)
    return Conversations(train={str(world / "sft/train"): 1.0}, validation={"chats": str(world / "sft/validation")})


def _pairs() -> Iterator[dict[str, str]]:
    """Sentences of the English texts, of which the base has learnt how they look, asked for by their first words."""
    for text in _texts("en"):
        for sentence in text.replace("\n", " ").split(". ")[:4]:
            if 40 <= len(sentence) <= 160:
                yield {"query": " ".join(sentence.split()[:3]), "answer": f"{sentence}."}


@pytest.fixture(scope="module")
def megatron(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One gloo process as Megatron's world, on the CPU stack."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from nemo_cpt.cpu_stack import cpu_stack

    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("gloo") / "store"), 1)
    absent = SimpleNamespace(Linear=type(None), LayerNormLinear=type(None))
    with cpu_stack(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("nemo.collections.llm.peft.lora.te", absent, raising=False)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1)
        yield
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
