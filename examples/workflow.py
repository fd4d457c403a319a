"""A language taught to a model of one's own, as a workflow: what is done is left alone, what was killed goes on.

python examples/workflow.py                                          # or: nemo-cpt workflow examples/workflow.py
nemo-cpt workflow examples/workflow.py --dry-run                     # where each step stands, and what it would take
"""

import json
from importlib.resources import files
from pathlib import Path

from nemo_cpt.corpus import Blend
from nemo_cpt.workflow import Workflow, call, export, init, prepare, report, run, split, tokenizer, train

CORPUS = str(files("nemo_cpt.demo") / "corpus" / "ja.jsonl")  # small; real runs want megabytes


def without_short_ones(source: str, dest: str, least: int) -> dict[str, int]:
    """A step of one's own: the documents of `least` characters or more."""
    lines = Path(source).read_text("utf-8").splitlines(keepends=True)
    kept = [line for line in lines if len(json.loads(line)["text"]) >= least]
    Path(dest).write_text("".join(kept), "utf-8")
    return {"kept": len(kept), "dropped": len(lines) - len(kept)}


# Relative paths are those of `folder`.
long = call("long", without_short_ones, reads="source", writes="dest", source=CORPUS, dest="long.jsonl", least=40)
text = split("text", inputs=long, output_folder="text", validation=0.1)
words = tokenizer("tokenizer", corpora=text / "train.jsonl", output="tokenizer", vocabulary_size=2048)
data = prepare("data", inputs=text / "train.jsonl", output_prefix="ds/ja", tokenizer=words)
held_out = prepare("held_out", inputs=text / "validation.jsonl", output_prefix="ds/ja_validation", tokenizer=words)
base = init("init", dest="base", tokenizer=words, params="tiny", seed=7)
trained = train(
    "train",
    recipe="tiny.continual_pretrain",
    model="base",
    base=base,
    data=Blend({"ds/ja": 1.0}, validation={"ja": "ds/ja_validation"}),
    untrained_base=True,
    name="ja",
    max_steps=20,
)
model = export("export", source=trained, dest="model")
page = report("report", run=trained, output="report")

workflow = Workflow(
    "ja", [long, text, words, data, held_out, base, trained, model, page], folder=Path.cwd() / "workflow_ja"
)

if __name__ == "__main__":
    run(workflow)
