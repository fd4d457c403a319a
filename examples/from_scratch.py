"""A model of one's own from text: tokenizer, data, random weights, training, and what it says.

python examples/from_scratch.py                      # the demo's small corpus and model, on a CPU, in minutes
python examples/from_scratch.py --params 124M --text wiki.jsonl      # GPT's 124M on your text, {"text": ...} a line
"""

import argparse
from importlib.resources import files
from pathlib import Path

import nemo_run as run
import torch

from nemo_cpt.checkpoint import export_hf, make_untrained
from nemo_cpt.corpus import Blend, prepare, split
from nemo_cpt.recipes import gpt
from nemo_cpt.training.cpu import on_cpu
from nemo_cpt.training.run_folder import newest_whole
from nemo_cpt.vocabulary import train

CORPUS = str(files("nemo_cpt.demo") / "corpus" / "en.jsonl")
TINY = {
    "max_steps": 200,
    "val_check_interval": 50,
    "seq_length": 128,
    "global_batch_size": 16,
    "micro_batch_size": 16,
    "lr": 3e-3,
}


def main() -> None:
    """Everything, in order; what is there already is not made again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", default="tiny", help="tiny, 124M, 350M or 1.3B")
    parser.add_argument("--shape", default="llama", help="of the layers: llama or gpt2")
    parser.add_argument("--text", default=CORPUS)
    parser.add_argument("--vocabulary-size", type=int, default=None, help="32,000; 2,048 for tiny")
    parser.add_argument("--out", type=Path, default=Path("from_scratch"))
    parser.add_argument("--no-training", action="store_true", help="make what a training starts from, and no more")
    given = parser.parse_args()

    out, tiny = given.out.absolute(), given.params == "tiny"
    split(given.text, out / "text", validation=0.05)
    if not (out / "tokenizer").exists():
        train(str(out / "text/train.jsonl"), out / "tokenizer", given.vocabulary_size or (2048 if tiny else 32_000))
    if not (out / "base").exists():
        make_untrained(out / "base", out / "tokenizer", given.params, shape=given.shape)
    for part in ("train", "validation"):
        prepare(out / "text" / f"{part}.jsonl", out / "ds" / part, out / "tokenizer")
    if given.no_training:
        return
    data = Blend(train={f"{out}/ds/train": 1.0}, validation={"validation": f"{out}/ds/validation"})
    settings = TINY if tiny else {"params": given.params}
    recipe = gpt.pretrain(f"{out}/base", data, name="run", directory=f"{out}/runs", **settings)
    run.run(recipe if torch.cuda.is_available() else on_cpu(recipe), direct=True)

    newest = newest_whole(out / "runs/run/checkpoints")
    if newest is not None and not (out / "hf").exists():
        export_hf(newest.path, out / "hf")
    print(f"{out}/hf: nemo-cpt chat {out}/hf, nemo-cpt serve {out}/hf")


if __name__ == "__main__":
    main()
