"""What NeMo's and Megatron-LM's scripts write, computed with Megatron's own builder and transformers' own tokenizer.

NeMo v2.4.0, scripts/nlp_language_modeling/preprocess_data_for_megatron.py, and Megatron-LM core_v0.15.3,
tools/preprocess_data.py: no BOS, EOS at the end of a document that has tokens.
"""

import json
import multiprocessing
import resource
from collections.abc import Callable
from pathlib import Path

from nemo_cpt.errors import CptError


def write_jsonl(path: Path, texts: list[str], key: str = "text") -> Path:
    """Write texts as JSON lines, every other one with its characters escaped."""
    lines = (json.dumps({"id": i, key: text}, ensure_ascii=i % 2 == 0) for i, text in enumerate(texts))
    path.write_text("".join(line + "\n" for line in lines), "utf-8")
    return path


def write_reference(prefix: Path, texts: list[str], tokenizer: Path, keep_empty: bool = False) -> Path:
    """Write PREFIX.bin and PREFIX.idx; NeMo's script leaves empty documents out, Megatron's keeps them."""
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    dtype = DType.optimal_dtype(len(loaded))
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for text in texts:
        ids = loaded.convert_tokens_to_ids(loaded.tokenize(text))
        if ids:
            ids.append(loaded.eos_token_id)
        if ids or keep_empty:
            builder.add_document(torch.IntTensor(ids), [len(ids)] if ids else [])
    builder.finalize(f"{prefix}.idx")
    return prefix


def same_files(one: str | Path, other: str | Path) -> bool:
    """Say whether two datasets are equal, byte for byte."""
    return all(Path(f"{one}.{end}").read_bytes() == Path(f"{other}.{end}").read_bytes() for end in ("bin", "idx"))


def error_of_a_full_disk(action: Callable[[], object], nbytes: int) -> str:
    """The CptError of an action in a process that may write files of `nbytes` at most: it fails as on a full disk."""
    fork = multiprocessing.get_context("fork")
    pipe, theirs = fork.Pipe()

    def job() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, nbytes))
        try:
            action()
        except CptError as error:
            theirs.send(str(error))

    process = fork.Process(target=job)
    process.start()
    process.join()
    assert pipe.poll()
    return pipe.recv()
