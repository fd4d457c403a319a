"""Tokenizers and vocabularies: what training and growing one cost, what growing gains, and what it leaves alone.

usage: python benchmarks/vocabulary.py --base FOLDER --ja FILE... --en FILE... [--documents LABEL=FILE...] [--only PART]

Each part runs in a process of its own, so that its memory is its own, and prints a line of JSON:

train      32,000 tokens from all that --ja and --en hold
grow       the base's tokenizer by --tokens, learnt from --ja
documents  before and after, of --en and of each of --documents: tokens that changed, texts that do not come back
model      `nemo-cpt grow` of a model beside `cp` and `sync`: --model, or one of Llama-3.1-8B's shape with --layers of
           its 32, of random weights
prepare    `nemo-cpt prepare` of --ja with the base's tokenizer and the grown one
rows       of --model: bits per byte of Japanese that was held out, as it is and with new rows of each initialisation,
           before any training

`grow` judges on documents that it held out itself; `documents` on all of them, of which 98 % of --ja were learnt from.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from llama31_8b import CONFIG

from nemo_cpt.checkpoint import grow_model
from nemo_cpt.checkpoint.architecture import parse_config
from nemo_cpt.checkpoint.arrays import BLOCK_BYTES, DTYPES
from nemo_cpt.checkpoint.folders import copy_small_files
from nemo_cpt.checkpoint.growing import INITIALISATIONS
from nemo_cpt.checkpoint.layout import slots
from nemo_cpt.checkpoint.safetensors_files import TensorPlan, write_weights
from nemo_cpt.corpus import prepare
from nemo_cpt.corpus.tokenization.tokenizer import Encoder, FastEncoder, load_tokenizer
from nemo_cpt.vocabulary import grow, train
from nemo_cpt.vocabulary.samples import documents, draw

LLAMA31_8B = CONFIG | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="folder of the tokenizer that is grown")
    parser.add_argument("--ja", nargs="+", required=True, help="Japanese text, as prepare reads it")
    parser.add_argument("--en", nargs="+", required=True, help="English text")
    parser.add_argument("--documents", nargs="*", default=[], metavar="LABEL=FILE", help="texts of further languages")
    parser.add_argument("--tokens", type=int, default=12_000)
    parser.add_argument("--model", type=Path, help="Hugging Face folder with the base's tokenizer")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--judged", type=int, default=20, help="documents of `rows`, their first 1,000 characters")
    parser.add_argument("--work", type=Path, help="folder for what is made; a temporary one if not given")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=DEFAULT_PARTS, metavar="PART", help=" ".join(PARTS))
    given = parser.parse_args()
    if given.work and len(given.only) == 1:
        given.work.mkdir(parents=True, exist_ok=True)
        return PARTS[given.only[0]](given)
    with tempfile.TemporaryDirectory() as name:
        for part in given.only:
            # Of options that are given twice, the last one counts.
            again = [*sys.argv, "--work", str(given.work or name), "--only", part]
            subprocess.run([sys.executable, *again], check=True)


def _train(given: argparse.Namespace) -> None:
    folder = Path(tempfile.mkdtemp(dir=given.work)) / "trained"
    report, cost = _measured(lambda: train([*given.ja, *given.en], folder, 32_000))
    _show("train", {**report.as_dict(), "special": len(report.special)} | cost)


def _grow(given: argparse.Namespace) -> None:
    report, cost = _measured(lambda: grow(given.base, given.ja, given.work / "grown", tokens=given.tokens))
    _show("grow", report.as_dict() | cost)


def _grown(given: argparse.Namespace) -> str:
    """The grown tokenizer, made where `grow` has not run before."""
    if not (given.work / "grown").exists():
        grow(given.base, given.ja, given.work / "grown", tokens=given.tokens)
    return str(given.work / "grown")


def _documents(given: argparse.Namespace) -> None:
    old, new = load_tokenizer(given.base), load_tokenizer(_grown(given))
    files = {"ja": given.ja, "en": given.en} | {
        label: [path] for label, _, path in (each.partition("=") for each in given.documents)
    }
    for label, inputs in files.items():
        texts = list(dict.fromkeys(documents(inputs)))
        reference = new.reference_encoder()
        before, _ = _encode(old.reference_encoder(), texts)
        after, seconds = _encode(reference, texts)
        fast, fast_seconds = _encode(FastEncoder(new.definition or "", False), texts)
        # Without a character of the scripts that were learnt, nothing may change.
        plain = [number for number, text in enumerate(texts) if max(text, default="") < "\u2e80"]
        characters = sum(map(len, texts))
        found = {
            "documents": len(texts),
            "megabytes": round(sum(len(text.encode()) for text in texts) / 1e6, 1),
            "characters_per_token": [round(characters / sum(map(len, each)), 4) for each in (before, after)],
            "without_cjk": len(plain),
            "of_these_changed": sum(before[number] != after[number] for number in plain),
            "lost": sum(reference.decode(ids) != text for ids, text in zip(after, texts, strict=True)),
            "fastokens_differs": sum(one != other for one, other in zip(fast, after, strict=True)),
            "cpu_seconds": {"reference": seconds, "fastokens": fast_seconds},
        }
        _show("documents", {"language": label} | found)


def _model(given: argparse.Namespace) -> None:
    grown, source = _grown(given), given.model or _llama(given)
    with tempfile.TemporaryDirectory(dir=given.work) as name:
        _, copied = _measured(lambda: _copy(source, Path(name, "copy")))
    with tempfile.TemporaryDirectory(dir=given.work) as name:
        report, cost = _measured(lambda: _synced(lambda: grow_model(source, Path(name, "grown"), grown)))
    rate = cost["wall_seconds"] / copied["wall_seconds"]
    gigabytes = {"gigabytes": round(report.bytes_written / 1e9, 2), "rows": report.rows}
    _show("model", gigabytes | {"cp_seconds": copied["wall_seconds"], "times_cp": round(rate, 2)} | cost)


def _llama(given: argparse.Namespace) -> Path:
    """A model of Llama-3.1-8B's shape, of fewer layers, with the base's tokenizer."""
    folder = given.work / "llama"
    if folder.exists():
        return folder
    rows = load_tokenizer(given.base).highest + 1
    config = LLAMA31_8B | {"num_hidden_layers": given.layers, "vocab_size": rows}
    folder.mkdir()
    copy_small_files(Path(given.base), folder)
    (folder / "config.json").write_text(json.dumps(config))
    plans = [TensorPlan(slot.name, "bfloat16", slot.shape) for slot in slots(parse_config(config, "config.json"))]
    block = np.random.default_rng(0).standard_normal(BLOCK_BYTES // 2, np.float32).astype(DTYPES["bfloat16"])
    shapes = {plan.name: plan.shape for plan in plans}
    write_weights(folder, plans, lambda name: _repeated(shapes[name], block))
    os.sync()
    return folder


def _repeated(shape: tuple[int, ...], block: np.ndarray) -> Iterator[np.ndarray]:
    """A tensor's rows out of one block of numbers."""
    width = int(np.prod(shape[1:]))
    step = block.size // width
    for row in range(0, shape[0], step):
        count = min(step, shape[0] - row)
        yield block[: count * width].reshape(count, *shape[1:])


def _copy(source: Path, dest: Path) -> None:
    _synced(lambda: subprocess.run(["cp", "-r", source, dest], check=True))


def _synced(action: Callable[[], Any]) -> Any:
    result = action()
    os.sync()
    return result


def _prepare(given: argparse.Namespace) -> None:
    for name, tokenizer in {"base": given.base, "grown": _grown(given)}.items():
        with tempfile.TemporaryDirectory(dir=given.work) as folder:
            start = time.monotonic()
            report = prepare(given.ja, Path(folder, "ja"), tokenizer, quiet=True)
            seconds = time.monotonic() - start
        megabytes = sum(Path(path).stat().st_size for path in given.ja) / 1e6
        found = {"tokens": report.tokens, "encoder": report.encoder, "compared": report.compared}
        speed = {"wall_seconds": round(seconds, 1), "megabytes_per_second": round(megabytes / seconds, 1)}
        _show("prepare", {"tokenizer": name} | found | speed)


def _rows(given: argparse.Namespace) -> None:
    if given.model is None:
        raise SystemExit("rows: name a model that has learnt something, --model")
    sample = draw(given.ja)
    texts = [text[:1000] for text in sample.held_out[: given.judged]]
    with tempfile.TemporaryDirectory(dir=given.work) as name:
        corpus = Path(name, "ja.jsonl")
        corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in sample.texts))
        grow(given.base, str(corpus), Path(name, "tokenizer"), tokens=given.tokens)
        _judge_rows("as it is", given.model, texts, {})
        for kind in INITIALISATIONS:
            learnt = str(corpus) if kind == "focus" else None
            grown = partial(grow_model, given.model, Path(name, kind), Path(name, "tokenizer"), initialisation=kind)
            report, cost = _measured(partial(grown, corpus=learnt))
            _judge_rows(kind, Path(name, kind), texts, {"by_similarity": report.by_similarity} | cost)


def _judge_rows(kind: str, model: Path, texts: list[str], known: dict[str, Any]) -> None:
    from nemo_cpt.evaluation.bits_per_byte import documents_loss
    from nemo_cpt.inference.transformers_engine import TransformersEngine

    loss = documents_loss(TransformersEngine(model), texts)
    found = {"documents": len(texts), "bits_per_byte": round(loss.bits_per_byte, 4), "tokens": sum(loss.tokens)}
    _show("rows", {"initialisation": kind} | found | known)


PARTS = {"train": _train, "grow": _grow, "documents": _documents, "model": _model, "prepare": _prepare, "rows": _rows}
DEFAULT_PARTS = [part for part in PARTS if part != "rows"]  # which needs a model that has learnt something


def _encode(encoder: Encoder, texts: list[str]) -> tuple[list[list[int]], float]:
    start = sum(os.times()[:4])  # its children's as well, to which long texts are left
    ids, bounds = encoder.encode(texts)
    seconds = round(sum(os.times()[:4]) - start, 2)
    edges = zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)
    return [ids[int(first) : int(last)].tolist() for first, last in edges], seconds


def _measured(action: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    cpu, wall = time.process_time(), time.monotonic()
    result = action()
    return result, {
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "wall_seconds": round(time.monotonic() - wall, 1),
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }


def _show(name: str, values: dict[str, Any]) -> None:
    print(json.dumps({name: values}, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    main()
