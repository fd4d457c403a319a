"""The peer of benchmarks/train.py: plain transformers + PEFT on the same shapes; prints one JSON line.

usage: python benchmarks/train_transformers.py CASE_AS_JSON      (benchmarks/train.py runs it)

Best usual settings: bf16 weights and adapters, SDPA, fused AdamW, gradient checkpointing only when memory demands it.
"""

import json
import statistics
import sys
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, __version__

LLAMA_31_8B = {
    "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131_072, "rope_theta": 500_000.0,
    "attn_implementation": "sdpa",
}  # fmt: skip
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def build(setting: dict, shape: dict, checkpointing: bool):
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(DEVICE):
        model = LlamaForCausalLM(LlamaConfig(**shape))
    torch.set_default_dtype(torch.float32)
    if setting["lora_rank"] is not None:
        rank = setting["lora_rank"]
        lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def step(model, optimizer, case: dict) -> float:
    """One optimizer step over the global batch; the mean loss."""
    setting = case["setting"]
    vocabulary = model.config.vocab_size
    micro_steps = case["global_batch_size"] // setting["micro_batch_size"]
    total = torch.zeros((), device=DEVICE)
    for _ in range(micro_steps):
        tokens = torch.randint(0, vocabulary, (setting["micro_batch_size"], setting["seq_length"]), device=DEVICE)
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss / micro_steps
        loss.backward()
        total += loss.detach()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return float(total)


def measure(case: dict, shape: dict, checkpointing: bool) -> dict:
    model = build(case["setting"], shape, checkpointing)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=2.5e-5, weight_decay=0.1, betas=(0.9, 0.95), fused=True)
    times, losses = [], []
    for _ in range(case["steps"]):
        started = time.perf_counter()
        losses.append(round(step(model, optimizer, case), 4))
        times.append(time.perf_counter() - started)
    steps = times[case["warm_up"] :]
    return {
        "tokens_per_s": round(case["global_batch_size"] * case["setting"]["seq_length"] / statistics.median(steps)),
        "measured_steps": len(steps),
        "losses": losses,
        "gradient_checkpointing": checkpointing,
        "versions": f"transformers {__version__}, torch {torch.__version__}",
    }


def main() -> None:
    case = json.loads(sys.argv[1])
    shape = LLAMA_31_8B | {"num_hidden_layers": case["layers"]} | case.get("shape", {})
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
