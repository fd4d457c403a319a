"""Train an imported checkpoint for some steps with NeMo, on the CPU; run by nemo_jobs.py."""

import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

EDITS = {"rotary_base": 5e6, "scale_factor": 16.0, "layernorm_epsilon": 1e-4}


def train(base: Path, dest: Path, name: str) -> None:
    """Train what `base` holds, in full, with adapters (`lora`, `dora`), or as another model of its shape (`edited`)."""
    import nemo.collections.llm.peft.lora as nemo_lora
    import torch
    from megatron.core.optimizer import OptimizerConfig
    from nemo import lightning as nl
    from nemo.collections import llm
    from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer

    from nemo_cpt.training.cpu import CpuStrategy

    # NeMo's LoRA compares with Transformer Engine's classes even where its placeholder for them raises.
    absent = type("Absent", (), {})
    nemo_lora.te = types.SimpleNamespace(Linear=absent, LayerNormLinear=absent)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer(str(base / "hf"))
    data = llm.PreTrainingDataModule(
        paths=[str(dest / "text")], seq_length=32, micro_batch_size=2, global_batch_size=4, num_workers=0,
        persistent_workers=False, tokenizer=tokenizer, split="90,5,5", create_attention_mask=True,
        num_dataset_builder_threads=1,
    )  # fmt: skip
    strategy = CpuStrategy(ckpt_async_save=False)
    trainer = nl.Trainer(
        devices=1, accelerator="cpu", strategy=strategy, max_steps=3, val_check_interval=3, limit_val_batches=1,
        num_sanity_val_steps=0, log_every_n_steps=1,
    )  # fmt: skip
    trainer.callbacks.append(save_logits_at_end(dest / f"{name}_logits.pt"))
    adapters = {"lora": llm.peft.LoRA, "dora": llm.peft.DoRA}
    config = OptimizerConfig(optimizer="adam", lr=5e-2, bf16=False, use_distributed_optimizer=False)
    checkpoint = nl.ModelCheckpoint(save_last=True, save_top_k=0, every_n_train_steps=3, save_optim_on_train_end=True)
    llm.train(
        model=model(base, EDITS if name == "edited" else {}),
        data=data,
        trainer=trainer,
        optim=nl.MegatronOptimizerModule(config=config),
        log=nl.NeMoLogger(log_dir=str(dest), name=name, use_datetime_version=False, ckpt=checkpoint),
        resume=nl.AutoResume(restore_config=nl.RestoreConfig(path=str(base))),
        model_transform=adapters[name](dim=4, alpha=10) if name in adapters else None,
        tokenizer="data",
    )


def save_logits_at_end(path: Path) -> Any:
    """A callback that saves the logits of the trained model, as NeMo has it in memory, for tokens 5 to 44."""
    import torch
    from lightning.pytorch import Callback

    class SaveLogits(Callback):
        def on_train_end(self, trainer, pl_module):
            model = trainer.strategy.megatron_parallel[0].eval()
            tokens = torch.arange(5, 45)[None]
            masked = torch.ones(40, 40).tril().logical_not()[None, None]
            with torch.no_grad():
                torch.save(model(tokens, torch.arange(40)[None], masked)[0], path)

    return SaveLogits()


def write_text(prefix: Path) -> None:
    """A Megatron dataset of random documents."""
    import numpy as np
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    random = np.random.default_rng(0)
    for _ in range(60):
        builder.add_document(random.integers(5, 250, 70), [70])
    builder.finalize(f"{prefix}.idx")


def model(base: Path, edits: Mapping[str, Any]) -> Any:
    """The model of the base's context, with Megatron's plain layers, in fp32, and other fields as `edits` says."""
    import fiddle as fdl
    import torch
    from nemo.collections.llm.gpt.model.base import local_layer_spec
    from nemo.lightning import io

    from nemo_cpt.cpu_stack import UNFUSED

    description = io.load_context(base / "context", subpath="model", build=False)
    overrides = {**UNFUSED, "params_dtype": torch.float32, "bf16": False, "transformer_layer_spec": local_layer_spec}
    for name, value in {**overrides, **edits}.items():
        setattr(description.config, name, value)
    return fdl.build(description)
