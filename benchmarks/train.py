"""Tokens/s and memory on one GPU (random weights, mock tokens), several settings in one run; mostly of Llama-3.1-8B.

usage: python benchmarks/train.py GROUP_OR_CASE [...]    (see CASES and GROUPS below; --list prints them)

Every case has a process of its own; all of them import NeMo at the same time, then they run one after the other.
"""

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
import traceback
from pathlib import Path

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

from nemo_cpt.constants import ADAM_STATES
from nemo_cpt.planning import ALLOWED, Workload, fit_workload
from nemo_cpt.planning.throughput import model_flops_per_token

BF16_TFLOPS = 790.0  # an 8192 x 8192 x 8192 product of random bf16 numbers on the H200 used
LAYERS, VOCABULARY = 32, 128_256

LLAMA31_8B = Workload(
    num_layers=LAYERS, hidden_size=4096, ffn_hidden_size=14336, num_attention_heads=32, num_query_groups=8,
    kv_channels=128, vocab_size=VOCABULARY,
)  # fmt: skip
QWEN25_7B = Workload(
    num_layers=28, hidden_size=3584, ffn_hidden_size=18944, num_attention_heads=28, num_query_groups=4,
    kv_channels=128, vocab_size=152_064, qkv_bias=True,
)  # fmt: skip
MODELS = {"llama31_8b": LLAMA31_8B, "qwen25_7b": QWEN25_7B}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SingleGpuSetting:
    """What to set for one GPU; names and values are those of Megatron's and NeMo's configurations."""

    gpu_memory_gib: int
    lora_rank: int | None
    seq_length: int = 8192
    micro_batch_size: int = 1
    recompute_num_layers: int = 0
    recompute_outputs: bool = False  # RecomputeOutputs
    cross_entropy_fusion_impl: str = "te"
    gradient_accumulation_fusion: bool = False
    fp8_recipe: str | None = None
    fp8_param: bool = False
    grad_dtype: str = "fp32"
    exp_avg_dtype: str = "fp32"
    exp_avg_sq_dtype: str = "fp32"
    host_states: tuple[str, ...] = ()


def recipes_setting(gpu_memory_gib: int, lora_rank: int | None) -> SingleGpuSetting:
    """What the single-GPU recipes set for a card: the planner's choice."""
    work = LLAMA31_8B.replace(lora_rank=lora_rank, global_batch_size=128, fused_gradients=lora_rank is None)
    given_up = ["gradients"] if lora_rank is None else ["rank", "seq_length"]
    chosen = fit_workload(work, gpu_memory_gib, allow=[*ALLOWED, *given_up]).plan.workload
    return SingleGpuSetting(
        gpu_memory_gib=gpu_memory_gib, lora_rank=chosen.lora_rank, seq_length=chosen.seq_length,
        micro_batch_size=chosen.micro_batch_size, recompute_num_layers=chosen.recompute_num_layers,
        recompute_outputs=chosen.recompute_outputs, gradient_accumulation_fusion=chosen.fused_gradients,
        host_states=chosen.host_states,
        grad_dtype="fp32" if chosen.grad_bytes == 4 else "bf16",
    )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    setting: SingleGpuSetting
    global_batch_size: int = 8
    steps: int = 10
    warm_up: int = 2
    cap_gib: float | None = None
    patches: bool = True
    stack: str = "nemo_cpt"
    model: str = "llama31_8b"
    layers: int = LAYERS  # of Llama-3.1-8B
    profile: bool = False


def lora(gpu_memory_gib: int, rank: int = 32, **fields) -> SingleGpuSetting:
    return SingleGpuSetting(gpu_memory_gib=gpu_memory_gib, lora_rank=rank, **fields)


def full(gpu_memory_gib: int, **fields) -> SingleGpuSetting:
    return SingleGpuSetting(gpu_memory_gib=gpu_memory_gib, lora_rank=None, **fields)


PUBLISHED = {"seq_length": 4096, "micro_batch_size": 2}  # the setting that NeMo Automodel publishes for LoRA
SINGLE = {"seq_length": 4096}
BF16_STATES = {"grad_dtype": "bf16", "exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"}
FUSED = {"gradient_accumulation_fusion": True}
HOST = {"host_states": ADAM_STATES}
CASES: dict[str, Case] = {
    "lora": Case(setting=lora(141, **PUBLISHED)),
    "lora_fp8": Case(setting=lora(141, fp8_recipe="tensorwise", **PUBLISHED)),
    "lora_batch32": Case(setting=lora(141, **PUBLISHED), global_batch_size=32),
    "lora_fp8_batch32": Case(setting=lora(141, fp8_recipe="tensorwise", **PUBLISHED), global_batch_size=32),
    "lora_native_loss": Case(setting=lora(141, cross_entropy_fusion_impl="native", **PUBLISHED)),
    "stock_lora": Case(setting=lora(141, **PUBLISHED), stack="nemo_stock"),
    "transformers_peft": Case(setting=lora(141, **PUBLISHED), stack="transformers"),
    "lora_8192": Case(setting=lora(141), global_batch_size=4, steps=6),
    "full_8192": Case(setting=full(141, **BF16_STATES, **FUSED), global_batch_size=4, steps=6),
    "full_4096": Case(setting=full(141, **BF16_STATES, **FUSED, **PUBLISHED), steps=6),
    "lora_mbs1": Case(setting=lora(141, **SINGLE), steps=6),
    "unpatched_mbs1": Case(setting=lora(141, cross_entropy_fusion_impl="native", **SINGLE), steps=6, patches=False),
    "stock_lora_mbs1": Case(setting=lora(141, **SINGLE), stack="nemo_stock", steps=6),
    "stock_pretrain": Case(setting=full(141), stack="nemo_stock", steps=4),
    "full_bf16_states": Case(setting=full(141, **BF16_STATES), steps=6),
    "full_bf16_gradients": Case(setting=full(141, grad_dtype="bf16", **HOST), steps=6),
} | {
    f"{kind}{gpu_memory_gib}": Case(
        setting=recipes_setting(gpu_memory_gib, rank), cap_gib=gpu_memory_gib - 1.0 if gpu_memory_gib < 141 else None
    )
    for kind, rank, cards in (("lora", 128, (24, 48, 80)), ("full", None, (48, 80, 141)))
    for gpu_memory_gib in cards
}
PEERS = ("transformers", "liger", "torchtune")  # of benchmarks/train_peers.py
CASES |= {
    f"{peer}_{name}": dataclasses.replace(CASES[case], stack=peer)
    for peer in PEERS
    for name, case in (
        ("lora_4096", "lora"),
        ("lora_8192", "lora_8192"),
        ("full_4096", "full_4096"),
        ("full_8192", "full_8192"),
    )
}
CASES["qwen25_7b"] = dataclasses.replace(CASES["lora"], model="qwen25_7b")  # Automodel publishes it too
CASES["transformers_qwen25_7b"] = dataclasses.replace(CASES["qwen25_7b"], stack="transformers")
CASES["full141_batch128"] = dataclasses.replace(CASES["full141"], global_batch_size=128, steps=2, warm_up=1)
GROUPS: dict[str, list[str]] = {
    "peers_lora": ["lora", "lora_8192", *(f"{peer}_lora_{length}" for peer in PEERS for length in (4096, 8192))],
    "peers_full": ["full_4096", "full_8192", *(f"{peer}_full_{length}" for peer in PEERS for length in (4096, 8192))],
    "published": ["lora", "lora_fp8", "stock_lora", "transformers_peft"],
    "qwen": ["qwen25_7b", "transformers_qwen25_7b"],
    "batches": ["lora_batch32", "lora_fp8_batch32", "lora48", "full141_batch128"],
    "defect": ["lora_mbs1", "unpatched_mbs1", "stock_lora_mbs1"],
    "budgets": ["lora24", "lora48", "lora80", "full48", "full80", "full141"],
    "ladder": ["full_bf16_states", "full_bf16_gradients", "full141", "full80", "full48"],
}


def parse(argument: str) -> tuple[str, Case]:
    """A case by name, or as JSON: {"name": ..., "setting": {...}, "global_batch_size": ...}."""
    if not argument.startswith("{"):
        return argument, CASES[argument]
    fields = json.loads(argument)
    name = fields.pop("name")
    setting = fields.pop("setting")
    if "host_states" in setting:
        setting["host_states"] = tuple(setting["host_states"])
    return name, Case(setting=SingleGpuSetting(**setting), **fields)


def flops_per_token(case: Case) -> float:
    """Model FLOPs a token: recomputation is not counted, nor weight gradients of frozen layers."""
    given = {"seq_length": case.setting.seq_length, "lora_rank": case.setting.lora_rank}
    return model_flops_per_token(MODELS[case.model].replace(**given))


def measure(case: Case, send, train) -> None:
    """Run one case in this process and send its figures, at the end of its last step or when it fails."""
    import torch

    if case.cap_gib is not None:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(case.cap_gib * 2**30 / total)
    record = {"step_s": [], "losses": [], "phases": {}, "error": None, "send": send}
    try:
        train(case, record)
    except Exception as error:
        traceback.print_exc()
        record["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    finish(case, record)


def finish(case: Case, record: dict) -> None:
    """Send the figures and end the process: Lightning's teardown copies the whole model to the host first."""
    record.pop("send").send(summary(case, record))
    sys.stdout.flush()
    os._exit(0)


def summary(case: Case, record: dict) -> dict:
    import torch

    steps = record["step_s"][case.warm_up : case.steps]
    record["step_s"] = [round(each, 3) for each in record["step_s"]]
    speed = case.global_batch_size * case.setting.seq_length / statistics.median(steps) if steps else 0.0
    tflops = speed * flops_per_token(case) / 1e12
    return record | {
        "tokens_per_s": round(speed),
        "model_tflops": round(tflops, 1),
        "share_of_bf16_product": round(tflops / BF16_TFLOPS, 3),
        "measured_steps": len(steps),
        "spread": round((max(steps) - min(steps)) / statistics.median(steps), 3) if steps else None,
        "peak_allocated_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
    }


def recorder(case: Case, record: dict):
    """A callback that times the steps; a profile is taken of one more step, which is not timed."""
    import lightning.pytorch as pl
    import torch

    class Recorder(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            if case.profile and len(record["step_s"]) == case.steps:
                activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
                self.profile = torch.profiler.profile(activities=activities)
                self.profile.__enter__()
            torch.cuda.synchronize()
            self.started = time.perf_counter()

        def on_before_optimizer_step(self, trainer, module, optimizer):
            torch.cuda.synchronize()
            self.gradients_ready = time.perf_counter()
            record["phases"].setdefault("gradients_gib", round(torch.cuda.max_memory_allocated() / 2**30, 2))

        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            torch.cuda.synchronize()
            ended = time.perf_counter()
            if case.profile and len(record["step_s"]) == case.steps:
                self.profile.__exit__(None, None, None)
                table = self.profile.key_averages()
                print(table.table(sort_by="self_cuda_time_total", row_limit=32, max_name_column_width=90))
                finish(case, record)
            record["step_s"].append(ended - self.started)
            record["phases"]["optimizer_s"] = round(ended - self.gradients_ready, 3)
            record["losses"].append(round(float(trainer.callback_metrics.get("reduced_train_loss", "nan")), 4))
            if len(record["step_s"]) == 2:
                record["adapters_unmoved"] = unmoved_adapters(module)
            if len(record["step_s"]) == case.steps and not case.profile:
                finish(case, record)

    return Recorder()


def unmoved_adapters(module) -> int:
    """How many LoRA adapters still have the zeros that their second matrix started with."""
    named = [(name, weight) for name, weight in module.named_parameters() if name.endswith("linear_out.weight")]
    return sum(not bool(weight.detach().any()) for _, weight in named)


def train_case(case: Case, record: dict) -> None:
    """Train one case by its stack."""
    (train_stock if case.stack == "nemo_stock" else train)(case, record)


def train(case: Case, record: dict) -> None:
    import torch
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from nemo import lightning as nl
    from nemo.collections import llm
    from nemo.collections.common.tokenizers.null_tokenizer import NullTokenizer

    from nemo_cpt.training import patches
    from nemo_cpt.training.gradients import EveryTrainableParameterHasGradient
    from nemo_cpt.training.optimizer import HostStateOptimizer
    from nemo_cpt.training.recompute import RecomputeOutputs

    if case.patches:
        patches.apply()
    setting = case.setting
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.uint8}
    full_parameter = setting.lora_rank is None
    recompute = {}
    if setting.recompute_num_layers:
        recompute = {
            "recompute_granularity": "full",
            "recompute_method": "block",
            "recompute_num_layers": setting.recompute_num_layers,
        }
    vocabulary = MODELS[case.model].vocab_size
    options = {
        "seq_length": setting.seq_length, "vocab_size": vocabulary,
        "cross_entropy_fusion_impl": setting.cross_entropy_fusion_impl,
        "gradient_accumulation_fusion": setting.gradient_accumulation_fusion, **recompute,
    }  # fmt: skip
    tokenizer = NullTokenizer(vocabulary - 1)
    if case.model == "qwen25_7b":
        model = llm.Qwen2Model(llm.Qwen25Config7B(**options), tokenizer=tokenizer)
    else:
        model = llm.LlamaModel(llm.Llama31Config8B(num_layers=case.layers, **options), tokenizer=tokenizer)
    fp32_gradients = setting.grad_dtype == "fp32"
    strategy = nl.MegatronStrategy(
        ddp=DistributedDataParallelConfig(
            grad_reduce_in_fp32=fp32_gradients, use_distributed_optimizer=True, check_for_nan_in_grad=True
        ),
        gradient_as_bucket_view=True,
        ckpt_async_save=False,
    )
    fp8 = {}
    if setting.fp8_recipe:
        fp8 = {"fp8": "hybrid", "fp8_recipe": setting.fp8_recipe, "fp8_param_gather": setting.fp8_param}
    precision = nl.MegatronMixedPrecision(
        precision="bf16-mixed",
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        autocast_enabled=False,
        grad_reduce_in_fp32=fp32_gradients,
        **fp8,
    )
    optimizer_config = OptimizerConfig(
        optimizer="adam", lr=2.5e-5, weight_decay=0.1, adam_beta1=0.9, adam_beta2=0.95, bf16=True,
        use_distributed_optimizer=True, clip_grad=1.0,
        use_precision_aware_optimizer=full_parameter,
        exp_avg_dtype=dtypes[setting.exp_avg_dtype], exp_avg_sq_dtype=dtypes[setting.exp_avg_sq_dtype],
        main_grads_dtype=dtypes[setting.grad_dtype],
    )  # fmt: skip
    if setting.host_states:
        optim = HostStateOptimizer(optimizer_config, host_states=setting.host_states)
    else:
        optim = nl.MegatronOptimizerModule(optimizer_config)
    trainer = nl.Trainer(
        devices=1, accelerator="gpu", strategy=strategy, plugins=precision, max_steps=case.steps + case.profile,
        limit_val_batches=0, val_check_interval=None, log_every_n_steps=1, num_sanity_val_steps=0,
        enable_checkpointing=False, logger=False, use_distributed_sampler=False, enable_progress_bar=False,
        callbacks=[
            *[EveryTrainableParameterHasGradient()] * case.patches, *[RecomputeOutputs()] * setting.recompute_outputs,
            recorder(case, record),
        ],
    )  # fmt: skip
    peft = None if full_parameter else llm.peft.LoRA(dim=setting.lora_rank, alpha=2 * setting.lora_rank)
    llm.train(
        model=model,
        data=llm.MockDataModule(
            seq_length=setting.seq_length, micro_batch_size=setting.micro_batch_size,
            global_batch_size=case.global_batch_size, num_workers=0, tokenizer=tokenizer,
        ),
        trainer=trainer,
        optim=optim,
        tokenizer="data",
        log=nl.NeMoLogger(log_dir="/tmp/nemo_cpt_benchmark", use_datetime_version=False, ckpt=None),
        model_transform=peft,
    )  # fmt: skip


def train_stock(case: Case, record: dict) -> None:
    """NeMo's own recipe: `llama31_8b.finetune_recipe(peft_scheme="lora")` or `pretrain_recipe`, on mock tokens."""
    import fiddle
    import nemo_run as run
    from nemo import lightning as nl
    from nemo.collections import llm
    from nemo.collections.common.tokenizers.null_tokenizer import NullTokenizer

    setting = case.setting
    tokenizer = run.Config(NullTokenizer, VOCABULARY - 1)
    if setting.lora_rank is None:
        recipe = llm.recipes.llama31_8b.pretrain_recipe(num_gpus_per_node=1)
        recipe.trainer.strategy.context_parallel_size = 1
        recipe.model.config.seq_length = setting.seq_length
        transform = None
    else:
        recipe = llm.recipes.llama31_8b.finetune_recipe(
            num_gpus_per_node=1, peft_scheme="lora", seq_length=setting.seq_length
        )
        recipe.peft.dim, recipe.peft.alpha = setting.lora_rank, 2 * setting.lora_rank
        transform = recipe.peft
    recipe.model.config.vocab_size = VOCABULARY
    recipe.model.config.num_layers = case.layers
    recipe.trainer.max_steps = case.steps + case.profile
    recipe.trainer.limit_val_batches = 0
    recipe.trainer.val_check_interval = None
    recipe.trainer.log_every_n_steps = 1
    recipe.trainer.enable_checkpointing = False
    recipe.trainer.logger = False
    recipe.optim.lr_scheduler = None  # its warm-up is longer than the benchmark
    model, trainer, optim, transform = (
        fiddle.build(each) if each is not None else None
        for each in (recipe.model, recipe.trainer, recipe.optim, transform)
    )
    trainer.callbacks.append(recorder(case, record))
    data = llm.MockDataModule(
        seq_length=setting.seq_length, micro_batch_size=setting.micro_batch_size,
        global_batch_size=case.global_batch_size, num_workers=0, tokenizer=fiddle.build(tokenizer),
    )  # fmt: skip
    log = nl.NeMoLogger(log_dir="/tmp/nemo_cpt_benchmark", use_datetime_version=False, ckpt=None)
    llm.train(
        model=model, data=data, trainer=trainer, optim=optim, tokenizer="data", log=log, model_transform=transform
    )


class Worker:
    """A process that has imported NeMo and waits to measure one case, so that the imports of all cases overlap."""

    def __init__(self, case: Case, log: Path, train=None):
        context = multiprocessing.get_context("spawn")
        self.pipe, child_end = context.Pipe()
        self.process = context.Process(target=_work, args=(case, log, child_end, train or train_case))
        self.process.start()
        child_end.close()

    def ready(self) -> None:
        with contextlib.suppress(EOFError):  # a worker that died is reported by measure()
            self.pipe.recv()

    def measure(self, timeout_s: float) -> dict:
        try:
            self.pipe.send("go")
            result = self.pipe.recv() if self.pipe.poll(timeout_s) else {"error": f"no answer within {timeout_s:.0f} s"}
        except (EOFError, OSError):
            self.process.join(10)
            result = {"error": f"the process died with exit code {self.process.exitcode}"}
        self.process.join(20)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        return result


def _work(case: Case, log: Path, pipe, train) -> None:
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        import nemo.collections.llm  # noqa: F401

        pipe.send("ready")
        pipe.recv()
        measure(case, pipe, train)


def by_a_peer(case: Case, log: Path, timeout_s: float, pythonpath: str | None) -> dict:
    """Measure a peer, a program of its own so that it can run with other versions of its libraries."""
    script = Path(__file__).with_name("train_peers.py")
    environment = os.environ | ({} if pythonpath is None else {"PYTHONPATH": pythonpath})
    command = [sys.executable, str(script), json.dumps(dataclasses.asdict(case))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {timeout_s:.0f} s"}
    log.write_text(done.stdout + done.stderr)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        return {"error": (done.stderr or "no output").strip().splitlines()[-1][:200]}
    record = json.loads(lines[-1])
    flops = flops_per_token(case) * record["tokens_per_s"] / 1e12
    return record | {"model_tflops": round(flops, 1), "share_of_bf16_product": round(flops / BF16_TFLOPS, 3)}


def table(results: dict[str, dict]) -> str:
    columns = ["tokens_per_s", "model_tflops", "share_of_bf16_product", "peak_allocated_gib", "peak_reserved_gib"]
    lines = ["| case | " + " | ".join(columns) + " | loss 0 | error |", "|---" * (len(columns) + 3) + "|"]
    for name, result in results.items():
        cells = [str(result.get(column, "")) for column in columns]
        losses = result.get("losses") or [""]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {losses[0]} | {result.get('error') or ''} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="cases, groups of cases, or cases as JSON objects")
    parser.add_argument("--list", action="store_true", help="print the known cases and groups")
    parser.add_argument("--out", type=Path, default=Path("benchmark-train"), help="folder for logs and results.json")
    parser.add_argument("--timeout", type=float, default=240, help="seconds for a case")
    parser.add_argument(
        "--peer-pythonpath", action="append", default=[], metavar="[PEER=]FOLDERS",
        help="PYTHONPATH for the peers, or for one of them: torchtune and PEFT want different versions of torchao",
    )  # fmt: skip
    options = parser.parse_args()
    if options.list:
        print("\n".join([f"{name}: {case}" for name, case in CASES.items()]))
        print("\n".join([f"{name} = {' '.join(members)}" for name, members in GROUPS.items()]))
        return
    paths = dict(each.split("=", 1) if "=" in each else ("", each) for each in options.peer_pythonpath)
    names = [member for each in options.cases for member in GROUPS.get(each, [each])]
    cases = dict(parse(name) for name in names)
    options.out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    logs = {name: options.out / f"{name}.log" for name in cases}
    workers = {name: Worker(case, logs[name]) for name, case in cases.items() if case.stack not in PEERS}
    for worker in workers.values():
        worker.ready()
    print(f"imports: {time.perf_counter() - started:.1f} s", flush=True)
    results = {}
    for name, case in cases.items():
        started = time.perf_counter()
        if case.stack in PEERS:
            results[name] = by_a_peer(case, logs[name], options.timeout, paths.get(case.stack, paths.get("")))
        else:
            results[name] = workers[name].measure(options.timeout)
        print(f"{name}: {time.perf_counter() - started:.0f} s {json.dumps(results[name])}", flush=True)
        (options.out / "results.json").write_text(json.dumps(results, indent=1))
    print(table(results))


if __name__ == "__main__":
    main()
