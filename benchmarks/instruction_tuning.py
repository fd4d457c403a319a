"""Tokens/s and memory of tuning Llama-3.1-8B with LoRA on conversations, on one GPU, beside NeMo's own recipe and TRL.

    python benchmarks/instruction_tuning.py [--micro-batches 1 2] [--layers 32] [--trl TRL] [--out FOLDER]

All train on the same random conversations (lengths like alpaca's, log-normal with a median of 110 tokens) from random
weights: packed to 4096 positions by best fit, 8 sequences a step, adapters of rank 32 on all linear layers. NeMo 2.7.3
gets our packing in its own format, and takes a micro batch of 1 alone; TRL packs itself ("bfd"), and, with SDPA, lets
conversations see each other. TRL: what `pip install --target TRL --no-deps trl==1.16.* peft accelerate` gives; it is
left out without it. Tokens are those of conversations, padding not counted.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from train import LAYERS, VOCABULARY, Case, Worker, lora, recorder

from nemo_cpt.conversations.dataset import open_conversations
from nemo_cpt.conversations.packing import pack

LENGTH, BATCH, RANK, STEPS, WARM_UP = 4096, 8, 32, 10, 2
CONVERSATIONS = 20_000


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--micro-batches", type=int, nargs="+", default=[1, 2], help="of this library's runs")
    options.add_argument("--layers", type=int, default=LAYERS)
    options.add_argument("--trl", type=Path, help="folder with TRL, PEFT and Accelerate")
    options.add_argument("--out", type=Path, default=Path("benchmark-instruction-tuning"))
    options.add_argument("--timeout", type=float, default=240, help="seconds for a run")
    given = options.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    prefix = str(Path(tempfile.mkdtemp(prefix="conversations_")) / "alpaca_like")
    write_conversations(prefix, CONVERSATIONS)
    os.environ["CONVERSATIONS"] = prefix
    cases = {
        f"nemo_cpt, micro batch {size}": _case("nemo_cpt_packed", size, given.layers) for size in given.micro_batches
    }
    cases["NeMo's finetune_recipe(packed_sequence=True)"] = _case("nemo_packed", 1, given.layers)
    workers = {
        name: Worker(case, given.out / f"{case.stack}_{case.setting.micro_batch_size}.log", measure_packed)
        for name, case in cases.items()
    }
    for worker in workers.values():
        worker.ready()
    results = {name: worker.measure(given.timeout) for name, worker in workers.items()}
    filled = pack(open_conversations(prefix).fit(LENGTH).positions, LENGTH).filled
    for found in results.values():
        found["tokens_per_s"] = round(found.get("tokens_per_s", 0) * filled)
    for size in (1, 2) if given.trl else ():
        results[f"TRL + PEFT, micro batch {size}"] = _in_trl(given, size)
    (given.out / "results.json").write_text(json.dumps(results, indent=1))
    print("| run | tokens/s | peak allocated, GiB | last loss |\n|---|---|---|---|")
    for name, found in results.items():
        shown = found.get("error") or found["tokens_per_s"]
        print(f"| {name} | {shown} | {found.get('peak_allocated_gib', '')} | {(found.get('losses') or [''])[-1]} |")


def _case(stack: str, micro_batch_size: int, layers: int) -> Case:
    setting = lora(141, RANK, seq_length=LENGTH, micro_batch_size=micro_batch_size)
    return Case(setting=setting, global_batch_size=BATCH, steps=STEPS, warm_up=WARM_UP, layers=layers, stack=stack)


def write_conversations(prefix: str, count: int) -> None:
    """A set as `prepare` writes it, of random tokens; the last two thirds of each conversation are trained on."""
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    random = np.random.default_rng(0)
    lengths = np.clip(np.exp(random.normal(4.7, 0.7, count)).astype(int), 8, LENGTH)
    builder = IndexedDatasetBuilder(f"{prefix}_conversations.bin", dtype=np.int32)
    masks = []
    for length in lengths:
        builder.add_document(torch.from_numpy(random.integers(0, VOCABULARY, length, dtype=np.int32)), [int(length)])
        masks.append(np.arange(length) >= length // 3)
    builder.finalize(f"{prefix}_conversations.idx")
    Path(f"{prefix}_conversations.mask").write_bytes(np.concatenate(masks).astype(np.uint8).tobytes())
    template = {"name": "random", "sha256": "0", "text": "", "stop": ["", 0], "tokens": {}}
    manifest = {"kind": "conversations", "documents": count, "tokens": int(lengths.sum()), "template": template}
    Path(f"{prefix}_conversations.json").write_text(json.dumps({"format": 1} | manifest))


def measure_packed(case: Case, record: dict[str, Any]) -> None:
    """Train one case; what its recorder sees is collected by `train.measure`."""
    (_train_ours if case.stack == "nemo_cpt_packed" else _train_nemo)(case, record)


def _train_ours(case: Case, record: dict[str, Any]) -> None:
    """With the settings of `llama31_8b.instruction_tune_single_gpu`."""
    import torch
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from nemo import lightning as nl
    from nemo.collections import llm
    from nemo.collections.common.tokenizers.null_tokenizer import NullTokenizer

    from nemo_cpt.training import patches
    from nemo_cpt.training.conversations import ConversationDataModule

    patches.apply()
    tokenizer = NullTokenizer(VOCABULARY - 1)
    data = ConversationDataModule(
        [1.0, os.environ["CONVERSATIONS"]], seq_length=LENGTH, micro_batch_size=case.setting.micro_batch_size,
        global_batch_size=BATCH, tokenizer=tokenizer, num_workers=2,
    )  # fmt: skip
    config = llm.Llama31Config8B(
        num_layers=case.layers, seq_length=LENGTH, vocab_size=VOCABULARY, cross_entropy_fusion_impl="te",
        gradient_accumulation_fusion=False, calculate_per_token_loss=True,
    )  # fmt: skip
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=True, average_in_collective=False
    )
    precision = nl.MegatronMixedPrecision(
        precision="bf16-mixed", params_dtype=torch.bfloat16, pipeline_dtype=torch.bfloat16, autocast_enabled=False,
        grad_reduce_in_fp32=True,
    )  # fmt: skip
    optimizer = OptimizerConfig(optimizer="adam", lr=1e-4, bf16=True, use_distributed_optimizer=True, clip_grad=1.0)
    _fit(
        case, record, llm.LlamaModel(config, tokenizer=tokenizer), data, nl.MegatronOptimizerModule(optimizer),
        nl.MegatronStrategy(ddp=ddp, gradient_as_bucket_view=True, ckpt_async_save=False), precision,
        llm.peft.LoRA(dim=RANK, alpha=2 * RANK),
    )  # fmt: skip


def _train_nemo(case: Case, record: dict[str, Any]) -> None:
    """NeMo's own recipe, data module and defaults, but for rank, layers and the packed file."""
    import fiddle
    import numpy as np
    from nemo.collections import llm
    from nemo.collections.common.tokenizers.null_tokenizer import NullTokenizer
    from nemo.collections.llm.gpt.data.packed_sequence import PackedSequenceSpecs

    chats = open_conversations(os.environ["CONVERSATIONS"])
    packing = pack(chats.fit(LENGTH).positions, LENGTH)
    rows = []
    for sequence in range(len(packing)):
        parts = [chats.read(int(number)) for number in packing[sequence]]
        lengths = [len(tokens) for tokens, _ in parts]
        rows.append({
            "input_ids": np.concatenate([tokens for tokens, _ in parts]).tolist(),
            "loss_mask": np.concatenate([mask for _, mask in parts]).tolist(),
            "seq_start_id": [0, *np.cumsum(lengths)[:-1].tolist()],
        })  # fmt: skip
    packed = Path(os.environ["CONVERSATIONS"] + ".npy")
    np.save(packed, rows, allow_pickle=True)
    packed.with_suffix(".json").write_text("[]")
    recipe = llm.recipes.llama31_8b.finetune_recipe(num_gpus_per_node=1, peft_scheme="lora", packed_sequence=True)
    recipe.peft.dim, recipe.peft.alpha = RANK, 2 * RANK
    recipe.model.config.vocab_size, recipe.model.config.num_layers = VOCABULARY, case.layers
    tokenizer = NullTokenizer(VOCABULARY - 1)
    tokenizer.eos_id = VOCABULARY - 1  # what NeMo's collation pads with
    specs = PackedSequenceSpecs(
        packed_sequence_size=LENGTH, packed_train_data_path=packed, packed_val_data_path=packed,
        packed_metadata_path=packed.with_suffix(".json"),
    )  # fmt: skip
    data = llm.FineTuningDataModule(
        packed.parent, seq_length=LENGTH, micro_batch_size=1, global_batch_size=BATCH, tokenizer=tokenizer,
        packed_sequence_specs=specs, num_workers=2, dataset_kwargs={"pad_to_max_length": True},
    )  # fmt: skip
    recipe.optim.lr_scheduler = None  # its warm-up is longer than the benchmark
    trainer = recipe.trainer
    model, optim, strategy, plugins, adapters = (
        fiddle.build(each) for each in (recipe.model, recipe.optim, trainer.strategy, trainer.plugins, recipe.peft)
    )
    _fit(case, record, model, data, optim, strategy, plugins, adapters)


def _fit(
    case: Case, record: dict[str, Any], model: Any, data: Any, optim: Any, strategy: Any, plugins: Any, adapters: Any
) -> None:
    from nemo import lightning as nl
    from nemo.collections import llm

    trainer = nl.Trainer(
        devices=1, accelerator="gpu", strategy=strategy, plugins=plugins, max_steps=case.steps, limit_val_batches=0,
        val_check_interval=None, log_every_n_steps=1, num_sanity_val_steps=0, enable_checkpointing=False, logger=False,
        use_distributed_sampler=False, enable_progress_bar=False, callbacks=[recorder(case, record)],
    )  # fmt: skip
    log = nl.NeMoLogger(log_dir=tempfile.mkdtemp(), use_datetime_version=False, ckpt=None)
    llm.train(model=model, data=data, trainer=trainer, optim=optim, tokenizer="data", log=log, model_transform=adapters)


def _in_trl(given: argparse.Namespace, micro_batch_size: int) -> dict[str, Any]:
    """Run this file once more as TRL's program, in a process with TRL's folder ahead."""
    path = os.pathsep.join([str(given.trl), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    command = [
        sys.executable,
        "-c",
        f"import instruction_tuning as it; it.train_trl({micro_batch_size}, {given.layers})",
    ]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=given.timeout, env=os.environ | {"PYTHONPATH": path}
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {given.timeout:.0f} s"}
    (given.out / f"trl_{micro_batch_size}.log").write_text(done.stdout + done.stderr)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"tokens_per_s"')]
    return json.loads(lines[-1]) if lines else {"error": (done.stderr or "no output").strip().splitlines()[-1][:200]}


def train_trl(micro_batch_size: int, layers: int) -> None:
    """TRL's SFTTrainer with PEFT: its own packing, bf16 weights, SDPA; checkpointing only where memory demands it."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from train_peers import LLAMA_31_8B
    from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    chats = open_conversations(os.environ["CONVERSATIONS"])
    rows = [chats.read(number) for number in range(len(chats))]
    dataset = Dataset.from_dict({
        "input_ids": [tokens.tolist() for tokens, _ in rows], "completion_mask": [mask.tolist() for _, mask in rows],
    })  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(LlamaConfig(**LLAMA_31_8B | {"num_hidden_layers": layers}))
    torch.set_default_dtype(torch.float32)
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize()
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize()
            times.append(time.perf_counter() - self.started)

    arguments = SFTConfig(
        output_dir=tempfile.mkdtemp(), max_length=LENGTH, packing=True, max_steps=STEPS, logging_steps=1, bf16=True,
        per_device_train_batch_size=micro_batch_size, gradient_accumulation_steps=BATCH // micro_batch_size,
        gradient_checkpointing=False, learning_rate=1e-4, save_strategy="no", report_to=[], optim="adamw_torch_fused",
    )  # fmt: skip
    trainer = SFTTrainer(
        model, args=arguments, train_dataset=dataset, processing_class=_tokenizer(), callbacks=[Clock()],
        peft_config=LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    filled = sum(map(len, trainer.train_dataset["input_ids"])) / (len(trainer.train_dataset) * LENGTH)
    trainer.train()
    print(json.dumps({
        "tokens_per_s": round(BATCH * LENGTH * filled / statistics.median(times[WARM_UP:])),
        "peak_allocated_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "losses": [each["loss"] for each in trainer.state.log_history if "loss" in each],
    }))  # fmt: skip


def _tokenizer() -> Any:
    """TRL wants a real one, though it has nothing to tokenize."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<p>": 0, "<e>": 1}, unk_token="<p>")),
        pad_token="<p>",
        eos_token="<e>",
    )


if __name__ == "__main__":
    main()
