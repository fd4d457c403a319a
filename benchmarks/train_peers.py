"""The peers of benchmarks/train.py on the same shapes, each in its best usual settings; prints one JSON line.

usage: python benchmarks/train_peers.py CASE_AS_JSON      (benchmarks/train.py runs it; "stack" names the peer)

transformers: with PEFT; bf16 weights and adapters, SDPA. liger: the same with all of Liger-Kernel's replacements, the
loss fused with the output layer. torchtune: its own model, compiled by layers, its loss in chunks (0.6.1 needs torchao
below 0.14). All: fused AdamW, activation checkpointing only where the memory demands it.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version

import torch
from llama31_8b import CONFIG

LLAMA_31_8B = CONFIG | {"attn_implementation": "sdpa"}
QWEN_25_7B = {
    "vocab_size": 152_064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 131_072, "rope_theta": 1_000_000.0,
    "attn_implementation": "sdpa",
}  # fmt: skip
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DISTRIBUTIONS = {"transformers": "transformers", "liger": "liger_kernel", "torchtune": "torchtune"}

Loss = Callable[[torch.Tensor], torch.Tensor]  # of token ids, (sequences, tokens)


def in_transformers(case: dict, shape: dict, checkpointing: bool) -> tuple[torch.nn.Module, Loss]:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    with torch.device(DEVICE):
        if case["model"] == "qwen25_7b":
            model = Qwen2ForCausalLM(Qwen2Config(**shape))
        else:
            model = LlamaForCausalLM(LlamaConfig(**shape))
    torch.set_default_dtype(torch.float32)
    if (rank := case["setting"]["lora_rank"]) is not None:
        lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train(), lambda tokens: model(input_ids=tokens, labels=tokens, use_cache=False).loss


def in_liger(case: dict, shape: dict, checkpointing: bool) -> tuple[torch.nn.Module, Loss]:
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama()  # before the model is made: it replaces transformers' classes
    return in_transformers(case, shape, checkpointing)


def in_torchtune(case: dict, shape: dict, checkpointing: bool) -> tuple[torch.nn.Module, Loss]:
    from torchtune import modules, training
    from torchtune.models.llama3_1 import llama3_1, lora_llama3_1
    from torchtune.modules.loss import CEWithChunkedOutputLoss
    from torchtune.modules.peft import get_adapter_params, set_trainable_params

    sizes = {
        "vocab_size": shape["vocab_size"], "num_layers": shape["num_hidden_layers"],
        "num_heads": shape["num_attention_heads"], "num_kv_heads": shape["num_key_value_heads"],
        "embed_dim": shape["hidden_size"], "intermediate_dim": shape["intermediate_size"],
        "max_seq_len": case["setting"]["seq_length"], "rope_base": int(shape["rope_theta"]),
    }  # fmt: skip
    with torch.device(DEVICE):
        if (rank := case["setting"]["lora_rank"]) is None:
            model = llama3_1(**sizes)
        else:
            attention = ["q_proj", "k_proj", "v_proj", "output_proj"]
            model = lora_llama3_1(attention, apply_lora_to_mlp=True, lora_rank=rank, lora_alpha=2 * rank, **sizes)
            set_trainable_params(model, get_adapter_params(model))
    torch.set_default_dtype(torch.float32)
    if checkpointing:
        training.set_activation_checkpointing(model, auto_wrap_policy={modules.TransformerSelfAttentionLayer})
    loss = CEWithChunkedOutputLoss()
    model.set_num_output_chunks(loss.num_output_chunks)
    if DEVICE == "cuda":
        training.compile_model(model, verbose=False)
        training.compile_loss(loss, verbose=False)

    def next_tokens(tokens: torch.Tensor) -> torch.Tensor:
        ignored = torch.full_like(tokens[:, :1], loss.ignore_index)  # the last position has no next token
        return loss(model(tokens), torch.cat([tokens[:, 1:], ignored], dim=1))

    return model.train(), next_tokens


STACKS = {"transformers": in_transformers, "liger": in_liger, "torchtune": in_torchtune}


def step(loss: Loss, optimizer: torch.optim.Optimizer, case: dict, vocabulary: int) -> float:
    """One optimizer step over the global batch; the mean loss."""
    setting = case["setting"]
    micro_steps = case["global_batch_size"] // setting["micro_batch_size"]
    total = torch.zeros((), device=DEVICE)
    for _ in range(micro_steps):
        tokens = torch.randint(0, vocabulary, (setting["micro_batch_size"], setting["seq_length"]), device=DEVICE)
        part = loss(tokens) / micro_steps
        part.backward()
        total += part.detach()
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return float(total)


def measure(case: dict, shape: dict, checkpointing: bool) -> dict:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model, loss = STACKS[case["stack"]](case, shape, checkpointing)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=2.5e-5, weight_decay=0.1, betas=(0.9, 0.95), fused=True)
    times, losses = [], []
    for _ in range(case["steps"]):
        started = time.perf_counter()
        losses.append(round(step(loss, optimizer, case, shape["vocab_size"]), 4))
        times.append(time.perf_counter() - started)
    steps = times[case["warm_up"] :]
    return {
        "tokens_per_s": round(case["global_batch_size"] * case["setting"]["seq_length"] / statistics.median(steps)),
        "measured_steps": len(steps),
        "losses": losses,
        "trainable": sum(parameter.numel() for parameter in trainable),
        "activation_checkpointing": checkpointing,
        "versions": f"{case['stack']} {version(DISTRIBUTIONS[case['stack']])}, torch {torch.__version__}",
    }


def main() -> None:
    case = json.loads(sys.argv[1])
    shape = LLAMA_31_8B | {"num_hidden_layers": case["layers"]} | case.get("shape", {})
    if case["model"] == "qwen25_7b":
        shape = QWEN_25_7B
    result: dict = {}
    for checkpointing in (False, True):
        try:
            result = measure(case, shape, checkpointing)
            break
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    if DEVICE == "cuda":
        result["peak_allocated_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        result["peak_reserved_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 2)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
