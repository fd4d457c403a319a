"""Predicted against measured memory and speed, over settings that differ in every way the planner models.

usage: python benchmarks/planner.py measure [--out FILE] [SETTING ...]     on a GPU; adds to FILE (JSON)
       python benchmarks/planner.py report                                 anywhere; table, plot and errors

Every setting is a recipe of this library with random weights and mock tokens, run in a process of its own; all of them
import NeMo at the same time, then they run one after the other. Half of the settings (TUNE) were looked at while the
planner was written; the others (HELD_OUT) were named beforehand and only predicted.
"""

import argparse
import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

MEASURED = Path(__file__).with_name("planner_measured.json")
GIB = 2**30
VOCABULARY = 128_256
STEPS = 6
SHAPES = {"1B": "Llama32Config1B", "3B": "Llama32Config3B", "8B": "Llama31Config8B", "70B": "Llama31Config70B"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """One recipe to plan and to measure; `config` and `optimizer` are fields of Megatron's own configurations."""

    shape: str = "8B"
    layers: int = 32
    rank: int | None = None
    dora: bool = False
    seq: int = 4096
    mbs: int = 1
    micro_batches: int = 2
    config: dict = dataclasses.field(default_factory=dict)
    outputs_again: bool = False  # RecomputeOutputs
    optimizer: dict = dataclasses.field(default_factory=dict)
    bf16_gradients: bool = False
    host_states: bool = False
    fp8: str | None = None
    fp8_param: bool = False
    tp: int = 1
    pp: int = 1
    cp: int = 1
    gpus: int = 1
    sequence_parallel: bool = False
    card: int | None = None  # the single-GPU recipe for such a card, capped at its memory
    cap: int | None = None  # a card of that size
    conversations: bool = False  # instruction tuning, packed


def block(layers: int) -> dict:
    return {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": layers}


UNIFORM = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SELECTIVE = {"recompute_granularity": "selective"}
NATIVE = {"cross_entropy_fusion_impl": "native"}
FUSED = {"gradient_accumulation_fusion": True}
AWARE = {"use_precision_aware_optimizer": True}
BF16_MOMENTS = AWARE | {"exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"}
FP8_MOMENTS = AWARE | {"exp_avg_dtype": "fp8", "exp_avg_sq_dtype": "fp8"}

TUNE = {
    "8B x 8, full, 4096": Setting(layers=8),
    "8B x 8, full, 4096, fused gradients": Setting(layers=8, config=FUSED),
    "8B x 8, full, 8192, block 4": Setting(layers=8, seq=8192, config=block(4)),
    "8B x 8, full, 4096 x 2, selective, native loss": Setting(layers=8, mbs=2, config=SELECTIVE | NATIVE),
    "8B x 8, full, 4096, fp8": Setting(layers=8, fp8="tensorwise"),
    "8B x 8, full, 4096, bf16 moments": Setting(layers=8, optimizer=BF16_MOMENTS, bf16_gradients=True),
    "8B x 8, full, 8192, host states": Setting(layers=8, seq=8192, optimizer=AWARE, host_states=True),
    "8B, LoRA 32, 4096 x 2": Setting(rank=32, mbs=2),
    "8B, LoRA 128, 8192, block 12": Setting(rank=128, seq=8192, config=block(12)),
    "8B x 8, LoRA 32, 4096 x 2, fp8": Setting(layers=8, rank=32, mbs=2, fp8="tensorwise"),
    "1B, full, 4096 x 4": Setting(shape="1B", layers=16, mbs=4),
    "70B x 4, full, 4096": Setting(shape="70B", layers=4),
    "70B x 8, LoRA 16, 2048": Setting(shape="70B", layers=8, rank=16, seq=2048),
}
HELD_OUT = {
    "8B x 8, full, 8192, uniform": Setting(layers=8, seq=8192, config=UNIFORM),
    "8B x 16, full, 2048 x 4, fp8 moments": Setting(layers=16, seq=2048, mbs=4, optimizer=FP8_MOMENTS),
    "8B, full, 8192, block 20, bf16 moments": Setting(
        seq=8192, config=block(20), optimizer=BF16_MOMENTS, bf16_gradients=True
    ),
    "8B, LoRA 8, 2048 x 4": Setting(rank=8, seq=2048, mbs=4),
    "8B, LoRA 256, 16384, uniform": Setting(rank=256, seq=16384, config=UNIFORM),
    "8B, LoRA 32, 4096, block 30": Setting(rank=32, config=block(30)),
    "8B x 16, LoRA 64, 8192, selective": Setting(layers=16, rank=64, seq=8192, config=SELECTIVE),
    "8B x 16, LoRA 128, 8192, fp8, native loss": Setting(
        layers=16, rank=128, seq=8192, fp8="tensorwise", config=NATIVE
    ),
    "8B x 8, DoRA 32, 4096": Setting(layers=8, rank=32, dora=True),
    "1B, full, 16384, block 16": Setting(shape="1B", layers=16, seq=16384, config=block(16)),
    "3B, full, 2048 x 4": Setting(shape="3B", layers=28, seq=2048, mbs=4),
    "3B, LoRA 64, 8192 x 2": Setting(shape="3B", layers=28, rank=64, seq=8192, mbs=2),
    "70B x 4, full, 8192, block 2, host states": Setting(
        shape="70B", layers=4, seq=8192, config=block(2), optimizer=AWARE, host_states=True
    ),
    "70B x 8, LoRA 128, 8192, block 8": Setting(shape="70B", layers=8, rank=128, seq=8192, config=block(8)),
}
OUTPUTS = {  # norms' and activations' outputs computed again
    "8B x 8, full, 8192, fused, outputs again": Setting(layers=8, seq=8192, config=FUSED, outputs_again=True),
    "8B x 8, full, 8192, fused": Setting(layers=8, seq=8192, config=FUSED),
    "8B x 8, full, 8192 x 2, fused, outputs again": Setting(
        layers=8, seq=8192, mbs=2, config=FUSED, outputs_again=True
    ),
    "8B x 8, full, 8192 x 2, fused": Setting(layers=8, seq=8192, mbs=2, config=FUSED),
    "8B, LoRA 128, 8192, outputs again": Setting(rank=128, seq=8192, outputs_again=True),
    "8B, LoRA 128, 8192": Setting(rank=128, seq=8192),
    "8B, LoRA 128, 8192 x 2, outputs again": Setting(rank=128, seq=8192, mbs=2, outputs_again=True),
}
SEVERAL_GPUS = {
    "8B x 8, full, 4096, TP 2": Setting(layers=8, tp=2, gpus=2),
    "8B x 8, full, 4096, TP 2 + SP": Setting(layers=8, tp=2, gpus=2, sequence_parallel=True),
    "8B x 8, full, 4096, PP 2": Setting(layers=8, pp=2, gpus=2, micro_batches=4),
    "8B x 8, full, 8192, CP 2": Setting(layers=8, seq=8192, cp=2, gpus=2),
    "8B x 8, full, 4096, DP 2": Setting(layers=8, gpus=2, micro_batches=4),
    "8B, LoRA 128, 8192, TP 2": Setting(rank=128, seq=8192, tp=2, gpus=2),
    "8B, full, 8192, DP 2, block 1, outputs again, host states": Setting(
        seq=8192,
        gpus=2,
        micro_batches=8,
        config=block(1) | FUSED,
        outputs_again=True,
        optimizer=AWARE,
        host_states=True,
        cap=80,
    ),
}
WHOLE_8B: dict[str, Any] = {"seq": 8192, "gpus": 4, "config": FUSED}  # every parameter of Llama-3.1-8B
FOUR_GPUS = {  # 16 sequences a step
    "8B, full, 8192, DP 4": Setting(micro_batches=4, **WHOLE_8B),
    "8B, full, 8192, TP 2 x DP 2": Setting(tp=2, sequence_parallel=True, micro_batches=8, **WHOLE_8B),
    "8B, full, 8192, DP 4, fp8": Setting(micro_batches=4, fp8="tensorwise", **WHOLE_8B),
    "8B, full, 8192, TP 2 x DP 2, fp8": Setting(
        tp=2, sequence_parallel=True, micro_batches=8, fp8="tensorwise", **WHOLE_8B
    ),
    "8B, full, 8192, CP 2 x DP 2": Setting(cp=2, micro_batches=8, **WHOLE_8B),
    "70B, LoRA 16, 4096 x 2, TP 4": Setting(
        shape="70B", layers=80, rank=16, mbs=2, tp=4, gpus=4, sequence_parallel=True, micro_batches=4
    ),
}
FOUR_GPUS_HELD_OUT = {
    "8B, full, 8192, DP 4, 32 sequences": Setting(micro_batches=8, **WHOLE_8B),
    "8B, full, 8192 x 2, DP 4, host states, 32 sequences": Setting(
        mbs=2, micro_batches=4, optimizer=AWARE, host_states=True, **WHOLE_8B
    ),
    "8B, full, 8192, DP 4, fp8, 32 sequences": Setting(micro_batches=8, fp8="tensorwise", **WHOLE_8B),
    "8B, full, 8192, TP 2 x DP 2, fp8, 32 sequences": Setting(
        tp=2, sequence_parallel=True, micro_batches=16, fp8="tensorwise", cap=80, **WHOLE_8B
    ),
    "8B, full, 8192, TP 2 x DP 2, 32 sequences": Setting(
        tp=2, sequence_parallel=True, micro_batches=16, cap=80, **WHOLE_8B
    ),
    "8B, full, 8192 x 2, TP 2 x DP 2, outputs again, 32 sequences": Setting(
        tp=2, sequence_parallel=True, mbs=2, micro_batches=8, outputs_again=True, cap=80, **WHOLE_8B
    ),
    "8B, full, 8192, DP 4, bf16 states, outputs again, 32 sequences": Setting(
        micro_batches=8, optimizer=BF16_MOMENTS, bf16_gradients=True, outputs_again=True, cap=80, **WHOLE_8B
    ),
    "8B, full, 8192 x 2, DP 4, outputs again, 32 sequences": Setting(
        mbs=2, micro_batches=4, outputs_again=True, **WHOLE_8B
    ),
    "8B, full, 8192, TP 4": Setting(tp=4, sequence_parallel=True, micro_batches=16, **WHOLE_8B),
    "8B, full, 8192 x 2, DP 4, bf16 states, 32 sequences": Setting(
        mbs=2, micro_batches=4, optimizer=BF16_MOMENTS, bf16_gradients=True, **WHOLE_8B
    ),
    "8B, full, 8192 x 2, DP 4, fp8, bf16 states, 32 sequences": Setting(
        mbs=2, micro_batches=4, fp8="tensorwise", optimizer=BF16_MOMENTS, bf16_gradients=True, **WHOLE_8B
    ),
    "8B, full, 8192 x 2, TP 2 x DP 2, fp8, bf16 states, 32 sequences": Setting(
        tp=2,
        sequence_parallel=True,
        mbs=2,
        micro_batches=8,
        fp8="tensorwise",
        optimizer=BF16_MOMENTS,
        bf16_gradients=True,
        cap=80,
        **WHOLE_8B,
    ),
    "8B, full, 8192 x 2, TP 2 x PP 2, fp8, 32 sequences": Setting(
        tp=2, pp=2, sequence_parallel=True, mbs=2, micro_batches=16, fp8="tensorwise", cap=80, **WHOLE_8B
    ),
    "8B, full, 8192, DP 4, block 18, fp8, bf16 states, 32 sequences": Setting(
        micro_batches=8,
        fp8="tensorwise",
        optimizer=BF16_MOMENTS,
        bf16_gradients=True,
        cap=80,
        **WHOLE_8B | {"config": FUSED | block(18)},
    ),
}
CARDS = {
    "LoRA recipe for 24 GB": Setting(card=24, rank=128),
    "LoRA recipe for 48 GB": Setting(card=48, rank=128),
    "LoRA recipe for 80 GB": Setting(card=80, rank=128),
    "full recipe for 48 GB": Setting(card=48),
    "full recipe for 80 GB": Setting(card=80),
    "full recipe for 141 GB": Setting(card=141),
    "8B, full, 8192, block 12, host states, capped at 80 GB": Setting(
        seq=8192, config=block(12) | FUSED, optimizer=AWARE, host_states=True, cap=80
    ),
    "8B, full, 8192, block 27, host states, capped at 48 GB": Setting(
        seq=8192, config=block(27) | FUSED, optimizer=AWARE, bf16_gradients=True, host_states=True, cap=48
    ),
}
CONVERSATIONS = {
    "LoRA tuning recipe for 24 GB": Setting(card=24, rank=32, conversations=True),
    "LoRA tuning recipe for 80 GB": Setting(card=80, rank=32, conversations=True),
    "8B x 8, full tuning, 4096 x 2": Setting(layers=8, mbs=2, conversations=True),
}
GROUPS = {
    "tune": TUNE,
    "held_out": HELD_OUT,
    "outputs": OUTPUTS,
    "several_gpus": SEVERAL_GPUS,
    "four_gpus": FOUR_GPUS,
    "four_gpus_held_out": FOUR_GPUS_HELD_OUT,
    "cards": CARDS,
    "conversations": CONVERSATIONS,
}
SETTINGS = {name: setting for group in GROUPS.values() for name, setting in group.items()}


def card_recipe(setting: Setting) -> Any:
    """The recipe for one GPU of a size, as a user gets it, with a step of two micro batches."""
    from nemo_cpt.conversations import Conversations
    from nemo_cpt.corpus import Blend
    from nemo_cpt.recipes import llama31_8b

    make = llama31_8b.continual_pretrain_single_gpu if setting.rank else llama31_8b.continual_pretrain_full_single_gpu
    data: Any = Blend(train={"mock": 1.0})
    if setting.conversations:
        make, data = llama31_8b.instruction_tune_single_gpu, Conversations(train={"mock": 1.0})
    partial = make("none", data, gpu_memory_gib=setting.card, max_steps=STEPS)
    partial.model.config.vocab_size = VOCABULARY
    partial.data.global_batch_size = 2 * partial.data.micro_batch_size
    return partial


def recipe(setting: Setting) -> Any:
    """The library's recipe for a setting: what the planner reads, and what is measured."""
    if setting.card:
        return card_recipe(setting)
    import nemo_run as run
    import torch
    from nemo.collections import llm

    from nemo_cpt.conversations import Conversations
    from nemo_cpt.corpus import Blend
    from nemo_cpt.recipes import llama31_8b

    config = run.Config(
        getattr(llm, SHAPES[setting.shape]), num_layers=setting.layers, seq_length=setting.seq, vocab_size=VOCABULARY
    )
    data_parallel = setting.gpus // (setting.tp * setting.pp * setting.cp)
    given: dict[str, Any] = {
        "model": run.Config(llm.LlamaModel, config=config), "gpus_per_node": setting.gpus, "max_steps": STEPS,
        "tensor_model_parallel_size": setting.tp, "pipeline_model_parallel_size": setting.pp,
        "seq_length": setting.seq, "micro_batch_size": setting.mbs,
        "global_batch_size": setting.mbs * setting.micro_batches * data_parallel,
    }  # fmt: skip
    if setting.conversations:
        partial = llama31_8b.instruction_tune("none", Conversations(train={"mock": 1.0}), **given)
    else:
        given["context_parallel_size"] = setting.cp
        partial = llama31_8b.continual_pretrain("none", Blend(train={"mock": 1.0}), **given)
    config.cross_entropy_fusion_impl, config.gradient_accumulation_fusion = "te", False
    for name, value in setting.config.items():
        setattr(config, name, value)
    if setting.rank:
        partial = llama31_8b.with_lora(partial, setting.rank)
        if setting.dora:
            partial.peft = run.Config(llm.peft.DoRA, dim=setting.rank, alpha=2 * setting.rank)
    partial.trainer.strategy.sequence_parallel = setting.sequence_parallel
    dtypes = {"bf16": torch.bfloat16, "fp8": torch.uint8}
    for name, value in setting.optimizer.items():
        setattr(partial.optim.config, name, dtypes.get(value, value))
    precision = partial.trainer.plugins
    if setting.bf16_gradients:
        partial.trainer.strategy.ddp.grad_reduce_in_fp32 = precision.grad_reduce_in_fp32 = False
        partial.optim.config.main_grads_dtype = torch.bfloat16
    if setting.host_states:
        from nemo_cpt.planning.recipe_writer import keep_states_on_host

        keep_states_on_host(partial)
    if setting.outputs_again:
        from nemo_cpt.training.recompute import RecomputeOutputs

        partial.trainer.callbacks.append(run.Config(RecomputeOutputs))
    if setting.fp8:
        precision.fp8, precision.fp8_recipe, precision.fp8_param_gather = "hybrid", setting.fp8, setting.fp8_param
    return partial


def measure(name: str, rank: int, port: int, log: str, pipe: Any, trace: bool = False) -> None:
    """Train a setting for some steps in this process, one of its GPUs, and send what its memory and clock showed."""
    setting = SETTINGS[name]
    file = os.open(f"{log}.{rank}", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if setting.gpus > 1:
        os.environ.update(
            TORCHELASTIC_RUN_ID="planner", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(setting.gpus),
            LOCAL_WORLD_SIZE=str(setting.gpus), GROUP_RANK="0", ROLE_RANK=str(rank),
        )  # fmt: skip
    import nemo_cpt.recipes.llama31_8b  # noqa: F401

    pipe.send("ready")
    pipe.recv()
    import torch

    record: dict[str, Any] = {"rank": rank, "error": None, "step_s": [], "optimizer_s": []}
    torch.cuda.set_device(rank)
    free, total = torch.cuda.mem_get_info()
    record["context_gib"] = round((total - free) / GIB, 4)
    if size := setting.card or setting.cap:  # what PyTorch finds on such a card, beside CUDA's context
        from nemo_cpt.planning import hardware, memory

        share = hardware.usable_gib(size) - memory.CONTEXT / GIB
        torch.cuda.set_per_process_memory_fraction(share * GIB / total)
    try:
        _train(setting, recorder(record, pipe, trace))
    except BaseException as error:
        traceback.print_exc()
        record["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        record["peak_allocated_gib"] = torch.cuda.max_memory_allocated() / GIB
    pipe.send(record)
    sys.stdout.flush()
    os._exit(0)


def _train(setting: Setting, callback: Any) -> None:
    import fiddle
    import nemo_run as run
    from nemo import lightning as nl
    from nemo.collections import llm
    from nemo.collections.common.tokenizers.null_tokenizer import NullTokenizer

    from nemo_cpt.training import patches
    from nemo_cpt.training.conversations import ConversationDataModule
    from nemo_cpt.training.gradients import EveryTrainableParameterHasGradient
    from nemo_cpt.training.recompute import RecomputeOutputs

    patches.apply()
    partial = recipe(setting)
    data = partial.data
    sizes = {name: getattr(data, name) for name in ("seq_length", "micro_batch_size", "global_batch_size")}
    sizes |= {"tokenizer": run.Config(NullTokenizer, VOCABULARY - 1), "num_workers": 0}
    if setting.conversations:
        partial.data = run.Config(ConversationDataModule, [1.0, os.environ["CONVERSATIONS"]], **sizes)
    else:
        partial.data = run.Config(llm.MockDataModule, **sizes)
    partial.resume = None
    partial.log = run.Config(nl.NeMoLogger, log_dir="/tmp/planner", use_datetime_version=False, ckpt=None)
    trainer = partial.trainer
    trainer.limit_val_batches, trainer.val_check_interval, trainer.num_sanity_val_steps = 0, None, 0
    trainer.enable_checkpointing, trainer.logger, trainer.enable_progress_bar = False, False, False
    kept = (EveryTrainableParameterHasGradient, RecomputeOutputs)
    trainer.callbacks = [each for each in trainer.callbacks if each.__fn_or_cls__ in kept]
    built = fiddle.build(partial)
    built.keywords["trainer"].callbacks.append(callback)
    built()


def recorder(record: dict, send: Any, trace: bool) -> Any:
    """A Lightning callback, made in the job, since its base class comes with PyTorch."""
    import lightning.pytorch as pl

    class Recorder(_Phases, pl.Callback):
        pass

    return Recorder(record, send, trace)


class _Phases:
    """Memory at the ends of the phases of a step, and the clock."""

    def __init__(self, record: dict, send: Any, trace: bool):
        import torch

        self.record, self.send, self.cuda, self.trace = record, send, torch.cuda, trace

    def _gib(self, peak: bool = False) -> float:
        return round((self.cuda.max_memory_allocated() if peak else self.cuda.memory_allocated()) / GIB, 4)

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.record["init_peak_gib"] = self._gib(peak=True)
        self.record["after_init_gib"] = self._gib()
        self.record["trainable"] = sum(p.numel() for p in module.parameters() if p.requires_grad)
        self.record["parameters"] = sum(p.numel() for p in module.parameters())
        for name, part in module.named_modules():
            if name.endswith("output_layer"):
                part.register_forward_pre_hook(self._forward_ends)
            if name.endswith("layers.0"):
                part.register_forward_pre_hook(self._layers_start)

    def _layers_start(self, *args: Any) -> None:
        self.record["before_layers_gib"] = self._gib()

    def _forward_ends(self, *args: Any) -> None:
        self.record["forward_gib"] = self._gib()
        self.record["forward_peak_gib"] = self._gib(peak=True)

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        self.cuda.synchronize()
        self.step = len(self.record["step_s"])
        self.cuda.reset_peak_memory_stats()
        self.record["before_step_gib"] = self._gib()
        if self.trace and self.step == 1:
            self.cuda.memory._record_memory_history(max_entries=1_000_000, context="alloc", stacks="python")
        self.started = time.perf_counter()

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.cuda.synchronize()
        self.gradients_ready = time.perf_counter()
        peak = self._gib(peak=True)
        self.record["gradients_peak_gib"] = max(peak, self.record.get("gradients_peak_gib", 0))
        self.record["before_optimizer_gib"] = self._gib()
        if self.trace and self.step == 1:
            print_live_at_peak(self.cuda.memory._snapshot())
            self.cuda.memory._record_memory_history(enabled=None)
        self.cuda.reset_peak_memory_stats()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        self.cuda.synchronize()
        ended = time.perf_counter()
        peak = self._gib(peak=True)
        self.record["optimizer_peak_gib"] = max(peak, self.record.get("optimizer_peak_gib", 0))
        self.record["step_s"].append(round(ended - self.started, 4))
        self.record["optimizer_s"].append(round(ended - self.gradients_ready, 4))
        if len(self.record["step_s"]) == STEPS:
            self._finish()

    def _finish(self) -> None:
        record = self.record
        record["reserved_gib"] = round(self.cuda.max_memory_reserved() / GIB, 4)
        record["used_gib"] = round((self.cuda.mem_get_info()[1] - self.cuda.mem_get_info()[0]) / GIB, 4)
        record["host_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
        record["device"] = self.cuda.get_device_name()
        record["allocated_gib"] = max(record[f"{each}_peak_gib"] for each in ("init", "gradients", "optimizer"))
        record["median_step_s"] = statistics.median(record["step_s"][2:])
        self.send.send(record)
        sys.stdout.flush()
        os._exit(0)


def print_live_at_peak(snapshot: dict) -> None:
    """Print what was alive at the peak of a recorded history, by the innermost frames, the largest first."""
    events = [event for trace in snapshot["device_traces"] for event in trace]
    live: dict[int, dict] = {}
    total = peak = 0
    at_peak: list[dict] = []
    for event in events:
        if event["action"] == "alloc":
            live[event["addr"]] = event
            total += event["size"]
            if total > peak:
                peak, at_peak = total, list(live.values())
        elif event["action"] == "free_completed" and event["addr"] in live:
            total -= live.pop(event["addr"])["size"]
    groups: dict[str, list[int]] = {}
    for event in at_peak:
        frames = [f"{Path(f['filename']).name}:{f['line']}:{f['name']}" for f in event["frames"] if _ours(f)]
        groups.setdefault(" < ".join(frames[:4]), []).append(event["size"])
    print(f"LIVE AT PEAK {peak / GIB:.4f} GiB")
    for where, sizes in sorted(groups.items(), key=lambda item: -sum(item[1]))[:40]:
        print(f"LIVE {sum(sizes) / 2**20:10.2f} MiB in {len(sizes):4d} {sizes[0] / 2**20:9.3f}: {where}")


def _ours(frame: dict) -> bool:
    return any(each in frame["filename"] for each in ("megatron", "nemo", "transformer_engine", "torch/utils"))


class Worker:
    """The processes of one setting, one a GPU, which have imported NeMo and wait."""

    def __init__(self, name: str, log: Path, port: int, trace: bool):
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(SETTINGS[name].gpus):
            here, there = context.Pipe()
            process = context.Process(target=measure, args=(name, rank, port, str(log), there, trace))
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def ready(self) -> None:
        for pipe in self.pipes:
            with contextlib.suppress(EOFError):  # reported by measure()
                pipe.recv()

    def measure(self, timeout_s: float) -> list[dict]:
        end = time.monotonic() + timeout_s
        records = []
        for pipe in self.pipes:
            with contextlib.suppress(OSError):
                pipe.send("go")
        for pipe in self.pipes:
            try:
                answered = pipe.poll(max(end - time.monotonic(), 0))
                records.append(pipe.recv() if answered else {"error": f"no answer within {timeout_s:.0f} s"})
            except (EOFError, OSError):
                records.append({"error": "the process died"})
        for process in self.processes:
            process.join(5)
            process.kill()
            process.join()
        return records


def measure_all(names: list[str], out: Path, timeout_s: float, trace: bool) -> None:
    from instruction_tuning import write_conversations

    os.environ["CONVERSATIONS"] = str(Path(tempfile.mkdtemp(prefix="conversations_")) / "alpaca_like")
    if any(SETTINGS[name].conversations for name in names):
        write_conversations(os.environ["CONVERSATIONS"], 2000)
    logs = {name: out.with_name(f"{out.stem}-{number}.log") for number, name in enumerate(names)}
    workers = {name: Worker(name, logs[name], 29500 + number, trace) for number, name in enumerate(names)}
    for worker in workers.values():
        worker.ready()
    results = measured(out) if out.exists() else {}
    for name in names:
        started = time.perf_counter()
        results[name] = workers[name].measure(timeout_s)
        print(f"{name} ({time.perf_counter() - started:.0f} s): {json.dumps(results[name])}", flush=True)
        out.write_text(json.dumps({"date": str(datetime.date.today()), "versions": versions(), "settings": results}))


def measured(path: Path) -> dict[str, list[dict]]:
    """The records of each setting, one a GPU."""
    return json.loads(path.read_text())["settings"]


def versions() -> dict[str, str]:
    """What was measured with."""
    names = ("torch", "transformer_engine", "megatron-core", "nemo_toolkit")
    found = {name: [each.version for each in importlib.metadata.distributions(name=name)] for name in names}
    return {name: each[0] for name, each in found.items() if each}


@dataclasses.dataclass(frozen=True)
class Row:
    """A setting's prediction beside its measurement: GiB on the fullest GPU, seconds a step."""

    name: str
    half: str
    allocated: tuple[float, float]
    used: tuple[float, float]
    step: tuple[float, float]

    def error(self, what: str) -> float:
        predicted, found = getattr(self, what)
        return predicted / found - 1


def compare(path: Path) -> list[Row]:
    """Predict every measured setting from its recipe."""
    from nemo_cpt.planning import plan

    rows = []
    for name, records in measured(path).items():
        half = next(half for half, group in GROUPS.items() if name in group)
        if any(record.get("error") for record in records):
            continue
        planned = plan(recipe(SETTINGS[name]), SETTINGS[name].card or SETTINGS[name].cap)
        largest = max(records, key=lambda record: record["used_gib"])
        rows.append(
            Row(
                name,
                half,
                (max(stage.allocated for stage in planned.stages) / GIB, max(r["allocated_gib"] for r in records)),
                (planned.peak_gib, largest["used_gib"]),
                (planned.speed.step_seconds, largest["median_step_s"]),
            )
        )
    return rows


def table(rows: list[Row]) -> str:
    lines = [
        "| setting | allocated, GiB: predicted / measured | on the card, GiB | error | a step, s | error |",
        "|---|---|---|---|---|---|",
    ]
    for half in GROUPS:
        for row in (row for row in rows if row.half == half):
            cells = [f"{a:.2f} / {b:.2f}" for a, b in (row.allocated, row.used)]
            step = f"{row.step[0]:.3f} / {row.step[1]:.3f}"
            errors = [f"{100 * row.error(what):+.1f} %" for what in ("used", "step")]
            lines.append(f"| {row.name} | {cells[0]} | {cells[1]} | {errors[0]} | {step} | {errors[1]} |")
    return "\n".join(lines)


def summary(rows: list[Row]) -> str:
    """Mean and worst errors, of each half by itself."""
    lines = [
        "| settings | allocated: mean, worst error | on the card: mean, worst, lowest | a step: mean, worst |",
        "|---|---|---|---|",
    ]
    for half in GROUPS:
        each = [row for row in rows if row.half == half]
        if not each:
            continue
        cells = []
        for what in ("allocated", "used", "step"):
            errors = [100 * row.error(what) for row in each]
            worst = max(errors, key=abs)
            text = f"{statistics.fmean(map(abs, errors)):.2f} %, {worst:+.1f} %"
            cells.append(text + (f", {min(errors):+.1f} %" if what == "used" else ""))
        lines.append(f"| {half.replace('_', ' ')} ({len(each)}) | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(rows: list[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullFormatter

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 5), layout="constrained")
    for axis, what, unit in ((axes[0], "used", "GiB on the card"), (axes[1], "step", "seconds a step")):
        for half, marker in zip(GROUPS, "osd^v<>P", strict=True):
            points = [getattr(row, what) for row in rows if row.half == half]
            axis.plot([b for _, b in points], [a for a, _ in points], marker, label=half.replace("_", " "), alpha=0.8)
        values = [value for row in rows for value in getattr(row, what)]
        limits = [0.9 * min(values), 1.1 * max(values)]
        axis.plot(limits, limits, color="black", linewidth=0.8)
        axis.set(xlabel=f"measured {unit}", ylabel=f"predicted {unit}", xscale="log", yscale="log")
        ticks = [tick for tick in (0.2, 0.5, 1, 2, 4, 10, 20, 40, 60, 100) if limits[0] < tick < limits[1]]
        for ruler in (axis.xaxis, axis.yaxis):
            ruler.set_major_locator(pyplot.FixedLocator(ticks))
            ruler.set_major_formatter("{x:g}")
            ruler.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3, which="both")
    axes[0].legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["measure", "report"])
    parser.add_argument("settings", nargs="*", help="names of settings; all of one GPU by default")
    parser.add_argument("--out", type=Path, default=MEASURED)
    parser.add_argument("--plot", type=Path, help="report: a picture")
    parser.add_argument("--timeout", type=float, default=90, help="seconds for a setting")
    parser.add_argument("--trace", action="store_true", help="log what is alive at the peak of the second step")
    options = parser.parse_args()
    if options.command == "measure":
        wanted = options.settings or ["tune", "held_out"]
        names = [name for each in wanted for name in GROUPS.get(each, [each])]
        measure_all(names, options.out, options.timeout, options.trace)
        return
    rows = compare(options.out)
    print(f"{table(rows)}\n\n{summary(rows)}")
    if options.plot:
        draw(rows, options.plot)


if __name__ == "__main__":
    main()
