"""SmolLM2-135M learns to answer from conversations: from JSON lines to a reply.

python examples/instruction_tune.py --base smollm2_japanese/nemo        # after examples/smollm2_japanese.py
python examples/instruction_tune.py --base BASE --chats chats.jsonl     # your own, {"query": ..., "answer": ...} a line
"""

import argparse
from importlib.resources import files
from pathlib import Path

import nemo_run as run
import torch

from nemo_cpt.checkpoint import export_hf
from nemo_cpt.conversations import Conversations, prepare
from nemo_cpt.corpus import split
from nemo_cpt.inference import Sampling, open_engine
from nemo_cpt.recipes import smollm2
from nemo_cpt.training.cpu import on_cpu
from nemo_cpt.training.metrics import read_metrics
from nemo_cpt.training.run_folder import newest_whole

CHATS = files("nemo_cpt.demo") / "conversations" / "ja.jsonl"  # 200; real runs want thousands


def get_data(chats: str, tokenizer: Path, template: str, folder: Path) -> Conversations:
    """Hold out a tenth of the questions, and turn all into tokens with a mask of the answers."""
    split(chats, folder / "chats", validation=0.1, json_key="query")
    for part in ("train", "validation"):
        prepare(folder / "chats" / f"{part}.jsonl", folder / "sft" / part, tokenizer, template=template)
    return Conversations(train={f"{folder}/sft/train": 1.0}, validation={"chats": f"{folder}/sft/validation"})


def make_recipe(base: Path, data: Conversations, folder: Path, epochs: float) -> run.Partial:
    """The recipe as it stands on a GPU; on a CPU the same in fp32 with small batches."""
    settings = {"base": str(base), "data": data, "name": "tuned", "directory": f"{folder}/runs", "epochs": epochs}
    settings["model"] = "base"  # SmolLM2 of any size
    if torch.cuda.is_available():
        return smollm2.instruction_tune(**settings)
    return on_cpu(smollm2.instruction_tune(**settings, seq_length=512, global_batch_size=4, micro_batch_size=2))


def main() -> None:
    """Everything, in order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="folder that nemo-cpt import wrote")
    parser.add_argument("--chats", default=str(CHATS))
    parser.add_argument("--template", default="chatml", help="whose tokens SmolLM2 has")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--question", default="日本で一番高い山は何ですか。")
    parser.add_argument("--out", type=Path, default=Path("instruction_tune"))
    options = parser.parse_args()

    out = options.out.absolute()
    tokenizer = options.base / "hf"
    data = get_data(options.chats, tokenizer, options.template, out)
    run.run(make_recipe(options.base.absolute(), data, out, options.epochs), direct=True)

    losses = [line["val_loss_chats"] for line in read_metrics(out / "runs/tuned") if "val_loss_chats" in line]
    print(f"held-out answers: {losses[0]:.3f} nats a token before, {losses[-1]:.3f} after")
    export_hf(newest_whole(out / "runs/tuned/checkpoints").path, out / "hf")
    engine = open_engine(out / "hf")  # which carries the template, and stops by itself
    ((_, reply),) = engine.generate([[{"role": "user", "content": options.question}]], Sampling(max_tokens=100))
    print(f"{options.question}\n{reply.text} ({reply.finish_reason})")


if __name__ == "__main__":
    main()
