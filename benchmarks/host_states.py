"""A checkpoint of full-parameter training with Adam's states in host memory: seconds, and what it takes of the host.

usage: python benchmarks/host_states.py FOLDER [--layers 8]     on a GPU; FOLDER takes 12 bytes a parameter

Llama-3.1-8B's widths with fewer layers, random weights, mock tokens, as `continual_pretrain_full_single_gpu` trains it:
a process trains two steps and saves, another goes on from there for one more.
"""

import argparse
import functools
import json
import multiprocessing
import os
import resource
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

GIB = 2**30
VOCABULARY, STEPS = 128_256, 3


def recipe(folder: Path, layers: int) -> Any:
    import nemo_run as run
    from nemo import lightning as nl
    from nemo.collections import llm
    from nemo.collections.common.tokenizers.null_tokenizer import NullTokenizer

    from nemo_cpt.corpus import Blend
    from nemo_cpt.recipes import llama31_8b

    partial = llama31_8b.continual_pretrain_full_single_gpu("none", Blend(train={"mock": 1.0}), max_steps=STEPS)
    partial.model.config.num_layers, partial.model.config.vocab_size = layers, VOCABULARY
    partial.model.config.recompute_num_layers = min(layers, partial.model.config.recompute_num_layers)
    partial.data = run.Config(
        llm.MockDataModule, seq_length=partial.data.seq_length, micro_batch_size=1, global_batch_size=2, num_workers=2,
        tokenizer=run.Config(NullTokenizer, VOCABULARY - 1),
    )  # fmt: skip
    partial.resume = run.Config(nl.AutoResume, resume_if_exists=True, resume_ignore_no_checkpoint=True)
    checkpoint = run.Config(nl.ModelCheckpoint, save_last=True, save_top_k=0, every_n_train_steps=2)
    partial.log = run.Config(
        nl.NeMoLogger, log_dir=str(folder), name="run", use_datetime_version=False, ckpt=checkpoint
    )
    trainer = partial.trainer
    trainer.limit_val_batches, trainer.val_check_interval, trainer.num_sanity_val_steps = 0, None, 0
    trainer.logger, trainer.enable_progress_bar, trainer.callbacks = False, False, []
    return partial


def train(folder: Path, layers: int, until: int, send: Any) -> None:
    """Train to step `until` and send what was seen; the process ends there."""
    import fiddle
    import lightning.pytorch as pl
    import torch

    from nemo_cpt.training import patches

    seen: dict[str, Any] = {"seconds": {}, "host_gib": {}, "step_s": [], "losses": []}

    class Recorder(pl.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, *args: Any) -> None:
            if trainer.global_step == until:  # the checkpoint is written
                finish(module)
            torch.cuda.synchronize()
            self.started = time.perf_counter()

        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            torch.cuda.synchronize()
            seen["step_s"].append(round(time.perf_counter() - self.started, 2))
            seen["losses"].append(round(float(trainer.callback_metrics["reduced_train_loss"]), 4))
            seen["host_gib"][f"step {trainer.global_step}"] = peak_host_gib()
            if trainer.global_step == STEPS:
                finish(module)

    def finish(module: Any) -> None:
        seen["billions_of_parameters"] = round(sum(each.numel() for each in module.parameters()) / 1e9, 3)
        seen["gpu_gib"] = round(torch.cuda.max_memory_reserved() / GIB, 2)
        seen["written_gib"] = round(sum(file.stat().st_size for file in folder.rglob("*.distcp")) / GIB, 2)
        send.send(seen)
        os._exit(0)

    patches.apply()
    built = fiddle.build(recipe(folder, layers))
    trainer = built.keywords["trainer"]
    trainer.callbacks.append(Recorder())
    for name in ("save_checkpoint", "load_checkpoint", "load_optimizer_state_dict"):
        setattr(trainer.strategy, name, timed(getattr(trainer.strategy, name), name, seen))
    built()


def timed(function: Any, name: str, seen: dict[str, Any]) -> Any:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        result = function(*args, **kwargs)
        seen["seconds"][name] = round(time.perf_counter() - started, 1)
        seen["host_gib"][name] = peak_host_gib()
        return result

    return call


def peak_host_gib() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=8)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    for until in (2, STEPS):
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=train, args=(options.folder.absolute(), options.layers, until, send))
        process.start()
        send.close()
        print(json.dumps(receive.recv()), flush=True)
        process.join()


if __name__ == "__main__":
    main()
