"""Tokenizers: what growing one gains and leaves alone, what growing and training cost.

    python benchmarks/vocabulary.py --base FOLDER --ja FILE --en FILE [--tokens 12000] [--model HF_FOLDER]

Growing is judged on all documents, of which 98 % were learnt from, and on those that it held out itself.
"""

import argparse
import json
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemo_cpt.checkpoint import grow_model
from nemo_cpt.corpus.tokenization.tokenizer import Encoder, FastEncoder, load_tokenizer
from nemo_cpt.vocabulary import grow, train
from nemo_cpt.vocabulary.samples import documents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="folder of the tokenizer that is grown")
    parser.add_argument("--ja", required=True, help="Japanese text, as prepare reads it")
    parser.add_argument("--en", required=True, help="English text")
    parser.add_argument("--tokens", type=int, default=12_000)
    parser.add_argument("--model", type=Path, help="Hugging Face folder with that tokenizer, to be grown beside cp")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        report, cost = _measured(lambda: grow(given.base, given.ja, work / "grown", tokens=given.tokens))
        _show("grow", report.as_dict() | cost)
        for language in ("ja", "en"):
            _show(language, _judge(given.base, str(work / "grown"), list(documents(getattr(given, language)))))
        trained, cost = _measured(lambda: train({given.ja: 1.0, given.en: 1.0}, work / "trained", 32_000))
        _show("train", trained.as_dict() | cost)
        if given.model:
            _, copied = _measured(lambda: shutil.copytree(given.model, work / "copy"))
            _, grown = _measured(lambda: grow_model(given.model, work / "model", work / "grown"))
            _show("grow model", {"cp_seconds": copied["wall_seconds"]} | grown)


def _judge(base: str, grown: str, texts: list[str]) -> dict[str, Any]:
    """What growing changed in texts, and whether they come back."""
    old, new = load_tokenizer(base), load_tokenizer(grown)
    reference = new.reference_encoder()
    before, _ = _encode(old.reference_encoder(), texts)
    after, seconds = _encode(reference, texts)
    fast, fast_seconds = _encode(FastEncoder(new.definition or "", False), texts)
    _, fast_before = _encode(FastEncoder(old.definition or "", False), texts)
    plain = [number for number, text in enumerate(texts) if max(text, default="") < "\u2e80"]
    characters = sum(map(len, texts))
    return {
        "documents": len(texts),
        "characters_per_token": [round(characters / sum(map(len, each)), 4) for each in (before, after)],
        "without_cjk": len(plain),
        "of_these_unchanged": sum(before[number] == after[number] for number in plain),
        "lost": sum(reference.decode(ids) != text for ids, text in zip(after, texts, strict=True)),
        "fastokens_agrees": fast == after,
        "cpu_seconds": {"reference": seconds, "fastokens": fast_seconds, "fastokens_before": fast_before},
    }


def _encode(encoder: Encoder, texts: list[str]) -> tuple[list[list[int]], float]:
    start = time.process_time()
    ids, bounds = encoder.encode(texts)
    seconds = round(time.process_time() - start, 2)
    edges = zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)
    return [ids[int(first) : int(last)].tolist() for first, last in edges], seconds


def _measured(action: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    cpu, wall = time.process_time(), time.monotonic()
    result = action()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return result, {
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "wall_seconds": round(time.monotonic() - wall, 1),
        "peak_gib_so_far": round(peak, 2),
    }


def _show(name: str, values: dict[str, Any]) -> None:
    print(json.dumps({name: values}, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    main()
