"""Conversion of a random Llama: nemo_cpt against NeMo's own llm.import_ckpt and llm.export_ckpt, and against cp.

    python benchmarks/checkpoint.py --work /tmp/bench                     # 1.2 B parameters, both, three rounds
    python benchmarks/checkpoint.py --work /tmp/bench --shape 8b --no-peer --rounds 1

Every measurement is a process of its own, interleaved by round; figures are medians. CPU seconds are
user and system time, which a busy machine disturbs less than the clock. Peak memory is the process's
VmHWM, mapped files included. The page cache is warm. A copy goes before each conversion of ours: a
virtual machine gives memory that was just freed several times as fast as memory that it must fetch
from its host. NeMo's converters need Transformer Engine; without it they run here on Megatron's local
layers, through nemo_cpt.training.cpu, with the layer norms' names changed to that spec's.
"""

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_COMMON = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
    "head_dim": 64,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 8192,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
SHAPES: dict[str, dict[str, Any]] = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "tie_word_embeddings": True},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128},
}


def make_model(folder: Path, shape: str) -> None:
    """Write a random model with this package's streaming writer: no more than one tensor is in memory."""
    import numpy as np
    from tokenizers import Tokenizer, models
    from transformers import GenerationConfig, PreTrainedTokenizerFast

    from nemo_cpt.checkpoint.architecture import parse_config
    from nemo_cpt.checkpoint.layout import slots
    from nemo_cpt.checkpoint.safetensors_files import TensorPlan, write_weights

    folder.mkdir(parents=True)
    config = _COMMON | SHAPES[shape]
    (folder / "config.json").write_text(json.dumps(config))
    GenerationConfig(eos_token_id=config["eos_token_id"]).save_pretrained(folder)
    words = {f"t{i}": i for i in range(config["vocab_size"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="t1", eos_token="t2").save_pretrained(folder)
    plans = [TensorPlan(slot.name, "bfloat16", slot.shape) for slot in slots(parse_config(config, "benchmark"))]
    shapes = {plan.name: plan.shape for plan in plans}
    random = np.random.default_rng(0)
    write_weights(folder, plans, lambda name: [0.02 * random.standard_normal(shapes[name], np.float32)])


def ours_import(source: Path, dest: Path) -> None:
    from nemo_cpt.checkpoint import import_hf

    import_hf(source, dest)


def ours_export(source: Path, dest: Path) -> None:
    from nemo_cpt.checkpoint import export_hf

    export_hf(source, dest)


def nemo_import(source: Path, dest: Path) -> None:
    from nemo.collections import llm

    with on_local_layers():
        model = llm.LlamaModel(llm.Llama31Config8B())
        llm.import_ckpt(model, f"hf://{source.resolve()}", output_path=dest)


def nemo_export(source: Path, dest: Path) -> None:
    from nemo.collections import llm

    with on_local_layers():
        llm.export_ckpt(source, "hf", output_path=dest)


def on_local_layers() -> Any:
    """NeMo's Llama converters without Transformer Engine, on the CPU: what they compute is untouched."""
    import contextlib
    from unittest import mock

    import torch
    from megatron.core.transformer.transformer_config import TransformerConfig
    from nemo.lightning import io

    from nemo_cpt.cpu_stack import UNFUSED, cpu_stack

    post_init, transforms = TransformerConfig.__post_init__, io.apply_transforms

    def unfused(config: Any) -> None:
        for name, value in UNFUSED.items():
            setattr(config, name, value)
        post_init(config)

    def local_names(source: Any, target: Any, mapping: dict[str, str], **kwargs: Any) -> Any:
        names = {"self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight"}
        names["mlp.linear_fc1.layer_norm_weight"] = "pre_mlp_layernorm.weight"

        def rename(key: str) -> str:
            for old, new in names.items():
                key = key.replace(old, new)
            return key

        for module in (source, target):  # the local norms are made in fp32
            module.to(torch.bfloat16)
        renamed = {rename(key): rename(value) for key, value in mapping.items()}
        return transforms(source, target, mapping=renamed, **kwargs)

    stack = contextlib.ExitStack()
    stack.enter_context(cpu_stack())
    stack.enter_context(mock.patch.object(TransformerConfig, "__post_init__", unfused))
    stack.enter_context(mock.patch.object(io, "apply_transforms", local_names))
    return stack


def copy(source: Path, dest: Path) -> None:
    subprocess.run(["cp", "-r", source, dest], check=True)
    subprocess.run(["sync", "-f", dest], check=True)


JOBS = {job.__name__: job for job in (ours_import, ours_export, nemo_import, nemo_export, copy)}


def measure(job: str, source: Path, dest: Path, keep: bool) -> dict[str, float]:
    """Run one job in a new process: seconds on the clock and of CPU time, peak GiB, GB written."""
    shutil.rmtree(dest, ignore_errors=True)
    command = [sys.executable, __file__, "--child", job, str(source), str(dest)]
    start, cpu = time.monotonic(), _cpu_seconds()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds, cpu = time.monotonic() - start, _cpu_seconds() - cpu
    if done.returncode:
        sys.exit(f"{job} failed:\n{done.stderr[-4000:]}")
    peak = json.loads(done.stdout.splitlines()[-1])["peak_kib"] / 2**20
    written = sum(path.stat().st_size for path in dest.rglob("*") if path.is_file())
    if not keep:
        shutil.rmtree(dest)
    return {"seconds": seconds, "cpu_seconds": cpu, "peak_gib": peak, "gb_written": written / 1e9}


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def child(job: str, source: Path, dest: Path) -> None:
    JOBS[job](source, dest)
    status = Path("/proc/self/status").read_text()  # not ru_maxrss, which starts at the parent's
    print(json.dumps({"peak_kib": int(status.partition("VmHWM:")[2].split()[0])}))


def run(work: Path, shape: str, rounds: int, peer: bool) -> dict[str, dict[str, float]]:
    hf = work / f"hf_{shape}"
    if not hf.exists():
        make_model(hf, shape)
    plan = [
        ("copy", hf, work / "copied"),
        ("ours_import", hf, work / "ours"),
        ("copy", hf, work / "copied"),
        ("ours_export", work / "ours", work / "ours_hf"),
    ]
    if peer:
        plan += [("nemo_import", hf, work / "nemo"), ("nemo_export", work / "nemo", work / "nemo_hf")]
    found: dict[str, list[dict[str, float]]] = {job: [] for job, _, _ in plan}
    for number in range(rounds):
        for job, source, dest in plan:
            found[job].append(measure(job, source, dest, keep=job.endswith("import")))
            print(f"round {number + 1}: {job} {found[job][-1]}", file=sys.stderr, flush=True)
    for folder in ("ours", "nemo"):
        shutil.rmtree(work / folder, ignore_errors=True)
    return {
        job: {name: round(statistics.median(one[name] for one in many), 2) for name in many[0]}
        for job, many in found.items()
    }


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the models; needs 6 times their size")
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-peer", action="store_true", help="leave NeMo's own converters out")
    options = parser.parse_args()
    medians = run(options.work, options.shape, options.rounds, not options.no_peer)
    print(f"{'':12} {'seconds':>8} {'of copy':>8} {'CPU s':>7} {'peak GiB':>9} {'GB written':>11}")
    for job, row in medians.items():
        ratio = row["seconds"] / medians["copy"]["seconds"]
        print(
            f"{job:12} {row['seconds']:8.1f} {ratio:8.1f} {row['cpu_seconds']:7.1f} {row['peak_gib']:9.2f} "
            f"{row['gb_written']:11.2f}"
        )


if __name__ == "__main__":
    main()
