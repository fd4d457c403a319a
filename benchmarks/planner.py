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
import json
import multiprocessing
import os
import statistics
import sys
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
    cap_gib: float | None = None


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
SEVERAL_GPUS = {
    "8B x 8, full, 4096, TP 2": Setting(layers=8, tp=2, gpus=2),
    "8B x 8, full, 4096, TP 2 + SP": Setting(layers=8, tp=2, gpus=2, sequence_parallel=True),
    "8B x 8, full, 4096, PP 2": Setting(layers=8, pp=2, gpus=2, micro_batches=4),
    "8B x 8, full, 8192, CP 2": Setting(layers=8, seq=8192, cp=2, gpus=2),
    "8B x 8, full, 4096, DP 2": Setting(layers=8, gpus=2, micro_batches=4),
    "8B, LoRA 128, 8192, TP 2": Setting(rank=128, seq=8192, tp=2, gpus=2),
}
SETTINGS = TUNE | HELD_OUT | SEVERAL_GPUS


def recipe(setting: Setting) -> Any:
    """The library's recipe for a setting: what the planner reads, and what is measured."""
    import nemo_run as run
    import torch
    from nemo.collections import llm

    from nemo_cpt.corpus import Blend
    from nemo_cpt.recipes import llama31_8b

    config = run.Config(
        getattr(llm, SHAPES[setting.shape]), num_layers=setting.layers, seq_length=setting.seq, vocab_size=VOCABULARY
    )
    data_parallel = setting.gpus // (setting.tp * setting.pp * setting.cp)
    partial = llama31_8b.continual_pretrain(
        "none", Blend(train={"mock": 1.0}), model=run.Config(llm.LlamaModel, config=config), gpus_per_node=setting.gpus,
        tensor_model_parallel_size=setting.tp, pipeline_model_parallel_size=setting.pp,
        context_parallel_size=setting.cp, seq_length=setting.seq, micro_batch_size=setting.mbs,
        global_batch_size=setting.mbs * setting.micro_batches * data_parallel, max_steps=STEPS,
    )  # fmt: skip
    config.cross_entropy_fusion_impl = "te"
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
        from nemo_cpt.training.optimizer import STATES, HostStateOptimizer

        partial.optim = run.Config(
            HostStateOptimizer, config=partial.optim.config, lr_scheduler=partial.optim.lr_scheduler,
            host_states=list(STATES),
        )  # fmt: skip
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
    try:
        _train(setting, _Recorder(record, pipe, trace))
    except BaseException as error:
        traceback.print_exc()
        record["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        record["peak_allocated_gib"] = torch.cuda.max_memory_allocated() / GIB
    pipe.send(record)
    sys.stdout.flush()
    os._exit(0)


def _train(setting: Setting, recorder: Any) -> None:
    import fiddle
    import nemo_run as run
    from nemo import lightning as nl
    from nemo.collections import llm
    from nemo.collections.common.tokenizers.null_tokenizer import NullTokenizer

    from nemo_cpt.training import upstream
    from nemo_cpt.training.gradients import EveryTrainableParameterHasGradient

    upstream.apply()
    partial = recipe(setting)
    partial.data = run.Config(
        llm.MockDataModule, seq_length=setting.seq, micro_batch_size=setting.mbs, num_workers=0,
        global_batch_size=partial.data.global_batch_size, tokenizer=run.Config(NullTokenizer, VOCABULARY - 1),
    )  # fmt: skip
    partial.resume = None
    partial.log = run.Config(nl.NeMoLogger, log_dir="/tmp/planner", use_datetime_version=False, ckpt=None)
    trainer = partial.trainer
    trainer.limit_val_batches, trainer.val_check_interval, trainer.num_sanity_val_steps = 0, None, 0
    trainer.enable_checkpointing, trainer.logger, trainer.enable_progress_bar = False, False, False
    trainer.callbacks = [run.Config(EveryTrainableParameterHasGradient)]
    built = fiddle.build(partial)
    built.keywords["trainer"].callbacks.append(recorder)
    built()


class _Recorder:
    """A Lightning callback: memory at the ends of the phases of a step, and the clock."""

    def __new__(cls, record: dict, send: Any, trace: bool) -> Any:
        import lightning.pytorch as pl

        return type("Recorder", (_Phases, pl.Callback), {})(record, send, trace)


class _Phases:
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
    logs = {name: out.with_name(f"{out.stem}-{number}.log") for number, name in enumerate(names)}
    workers = {name: Worker(name, logs[name], 29500 + number, trace) for number, name in enumerate(names)}
    for worker in workers.values():
        worker.ready()
    results = json.loads(out.read_text()) if out.exists() else {}
    for name in names:
        started = time.perf_counter()
        results[name] = workers[name].measure(timeout_s)
        print(f"{name} ({time.perf_counter() - started:.0f} s): {json.dumps(results[name])}", flush=True)
        out.write_text(json.dumps(results, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["measure", "report"])
    parser.add_argument("settings", nargs="*", help="names of settings; all of one GPU by default")
    parser.add_argument("--out", type=Path, default=MEASURED)
    parser.add_argument("--timeout", type=float, default=90, help="seconds for a setting")
    parser.add_argument("--trace", action="store_true", help="log what is alive at the peak of the second step")
    options = parser.parse_args()
    if options.command == "measure":
        groups = {"tune": TUNE, "held_out": HELD_OUT, "several_gpus": SEVERAL_GPUS}
        wanted = options.settings or ["tune", "held_out"]
        names = [name for each in wanted for name in groups.get(each, [each])]
        measure_all(names, options.out, options.timeout, options.trace)


if __name__ == "__main__":
    main()
