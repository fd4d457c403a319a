"""Outputs that are dropped and computed again change nothing but the memory: activations on a CPU, all on a GPU."""

import types
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch

from nemo_cpt.cpu_stack import UNFUSED
from nemo_cpt.errors import CptError
from nemo_cpt.planning import Workload, memory
from nemo_cpt.training import patches
from nemo_cpt.training.recompute import RecomputeOutputs, recompute_outputs

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU with Transformer Engine")
SEQ, BATCH, VOCABULARY = 16, 2, 96
SIZES = {"num_layers": 2, "num_attention_heads": 4, "num_query_groups": 2, "seq_length": SEQ, "vocab_size": VOCABULARY}
BLOCK = {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1}
MLP_AGAIN = {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}
UNIFORM = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2}
GELU = {"gated_linear_unit": False, "activation_func": torch.nn.functional.gelu, "add_bias_linear": True}


def model_of(peft: str | None = None, **config: Any) -> torch.nn.Module:
    """A small Llama of Megatron's layers, on its way to be trained."""
    from nemo.collections import llm
    from nemo.collections.llm import fn

    torch.manual_seed(7)
    made = llm.Llama31Config8B(**SIZES | config)
    model = made.configure_model(tokenizer=None, pre_process=True, post_process=True).to(made.params_dtype)
    if peft is not None:
        model.requires_grad_(False)
        model = fn.walk(model, getattr(llm.peft, peft)(dim=4, alpha=8).transform)
        for name, parameter in model.named_parameters():
            if name.endswith("linear_out.weight"):
                torch.nn.init.normal_(parameter, std=0.02)
    return model.train()


def loss_of(model: torch.nn.Module, device: str = "cpu", factor: int = 7) -> torch.Tensor:
    tokens = torch.arange(BATCH * SEQ, device=device).reshape(BATCH, SEQ) * factor % VOCABULARY
    positions = torch.arange(SEQ, device=device).expand(BATCH, SEQ)
    mask = torch.ones(SEQ, SEQ).triu(1).bool()[None, None] if device == "cpu" else None
    return model(tokens, positions, mask, labels=tokens.roll(-1, 1)).float().mean()


def gradients_of(model: torch.nn.Module, device: str = "cpu") -> dict[str, torch.Tensor]:
    loss_of(model, device).backward()
    return gradients_in(model)


def gradients_in(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


def inputs_of(model: torch.nn.Module, part: str) -> list[torch.Tensor]:
    """A list that fills with what the layers' linear `part` is given."""
    found: list[torch.Tensor] = []
    for layer in model.decoder.layers:
        getattr(layer.mlp, part).register_forward_pre_hook(lambda module, given: found.append(given[0]))
    return found


@pytest.mark.usefixtures("megatron")
class TestOnCpu:
    CONFIG: ClassVar = {
        "hidden_size": 32,
        "ffn_hidden_size": 64,
        "kv_channels": 8,
        "params_dtype": torch.float32,
        "bf16": False,
    }

    SHAPES: ClassVar = {"swiglu": {}, "block": BLOCK, "gelu": GELU, "mlp": MLP_AGAIN, "uniform": UNIFORM}

    @pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
    @pytest.mark.parametrize("peft", [None, "LoRA", "DoRA"])
    def test_gradients_are_the_same_and_the_activations_memory_is_free_between_the_passes(
        self, peft: str | None, shape: dict[str, Any]
    ) -> None:
        patches.apply()
        config = self.CONFIG | UNFUSED | shape
        expected = gradients_of(model_of(peft, **config))
        model = model_of(peft, **config)
        activations = inputs_of(model, "linear_fc2")
        recompute_outputs(model)
        for _ in range(2):
            model.zero_grad()
            activations.clear()
            loss = loss_of(model)
            kept = [each.untyped_storage().nbytes() for each in activations]
            if not shape.get("recompute_granularity"):
                assert kept == [0, 0]
            loss.backward()
            assert_equal(gradients_in(model), expected)

    def test_micro_batches_in_flight_keep_their_own_outputs_whatever_runs_or_fails_between(self) -> None:
        """As pipeline stages hold them: two forward passes, then their backward passes, the first one's first."""
        plain, model = (model_of(**self.CONFIG | UNFUSED) for _ in range(2))
        (loss_of(plain) + loss_of(plain, factor=5)).backward()
        recompute_outputs(model)
        fails = model.decoder.layers[1].mlp.linear_fc2.register_forward_pre_hook(self.fail)
        with pytest.raises(ZeroDivisionError):
            loss_of(model)
        fails.remove()
        first = loss_of(model)
        with torch.no_grad():
            loss_of(model.eval(), factor=3)
        second = loss_of(model.train(), factor=5)
        first.backward()
        second.backward()
        assert_equal(gradients_in(model), gradients_in(plain))

    @staticmethod
    def fail(*args: Any) -> None:
        raise ZeroDivisionError

    def test_adapters_dropout_and_frozen_layers_change_nothing_of_it(self) -> None:
        def gradients(again: bool, freeze: str) -> dict[str, torch.Tensor]:
            model = model_of("LoRA" if freeze == "base" else None, **self.CONFIG | UNFUSED)
            for module in model.modules():
                if hasattr(module, "dropout_position"):
                    module.dropout = torch.nn.Dropout(0.5)
            if freeze == "decoder":
                model.decoder.requires_grad_(False)
            if again:
                recompute_outputs(model)
            torch.manual_seed(3)
            return gradients_of(model)

        for freeze in ("base", "decoder"):
            assert_equal(gradients(True, freeze), gradients(False, freeze))

    def test_nothing_is_dropped_where_no_gradient_is_wanted(self) -> None:
        model = model_of(**self.CONFIG | UNFUSED)
        recompute_outputs(model)
        activations = inputs_of(model, "linear_fc2")
        with torch.no_grad():
            loss_of(model)
        assert all(each.untyped_storage().nbytes() == each.nbytes for each in activations)

    def test_the_callback_does_it_once_at_the_first_step(self) -> None:
        model = model_of(**self.CONFIG | UNFUSED)
        trainer = types.SimpleNamespace(strategy=types.SimpleNamespace(megatron_parallel=model))
        callback = RecomputeOutputs()
        callback.on_train_batch_start(trainer, model)
        forward = model.decoder.layers[0].mlp.linear_fc2.forward
        callback.on_train_batch_start(trainer, model)
        assert model.decoder.layers[0].mlp.linear_fc2.forward is forward

    def test_a_model_without_megatrons_layers_or_with_experts_is_refused(self) -> None:
        with pytest.raises(CptError, match="found no MLP"):
            recompute_outputs(torch.nn.Linear(2, 2))
        model = model_of(**self.CONFIG | UNFUSED)
        model.config.num_moe_experts = 8
        with pytest.raises(CptError, match="for dense models"):
            recompute_outputs(model)

    @pytest.mark.parametrize(
        ("setting", "value", "why"),
        [
            ("enable_cuda_graph", True, "CUDA graph"),
            ("external_cuda_graph", True, "CUDA graph"),
            ("cuda_graph_impl", "local", "CUDA graph"),
            ("cpu_offloading", True, "cpu_offloading"),
        ],
    )
    def test_what_captures_or_copies_outputs_is_refused(self, setting: str, value: Any, why: str) -> None:
        model = model_of(**self.CONFIG | UNFUSED)
        setattr(model.config, setting, value)
        with pytest.raises(CptError, match=why):
            recompute_outputs(model)


@pytest.mark.gpu
@needs_gpu
class TestOnGpu:
    """Transformer Engine's layers, in bf16, of a size at which activations outweigh all else."""

    SEQ = 2048
    CONFIG: ClassVar = {
        "hidden_size": 512, "ffn_hidden_size": 1536, "kv_channels": 128, "seq_length": SEQ, "num_layers": 4,
        "params_dtype": torch.bfloat16, "bf16": True,
    }  # fmt: skip
    WORK = Workload(
        num_layers=4, hidden_size=512, ffn_hidden_size=1536, num_attention_heads=4, num_query_groups=2,
        kv_channels=128, vocab_size=VOCABULARY, seq_length=SEQ, micro_batch_size=1,
    )  # fmt: skip

    @pytest.fixture(autouse=True, scope="class")
    def world(self) -> Iterator[None]:
        from nemo_cpt.checkpoint.nemo_model import one_process

        patches.apply()
        with one_process("nccl"):
            yield

    def kept_and_gradients(self, model: torch.nn.Module) -> tuple[int, dict[str, torch.Tensor]]:
        """Bytes between the passes, of a second step: the first one also allocates workspaces."""
        for _ in range(2):
            model.zero_grad(set_to_none=True)
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            tokens = torch.arange(self.SEQ, device="cuda")[None] * 7 % VOCABULARY
            positions = torch.arange(self.SEQ, device="cuda")[None]
            loss = model(tokens, positions, None, labels=tokens.roll(-1, 1)).float().mean()
            kept = torch.cuda.memory_allocated() - before
            loss.backward()
        return kept, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    @pytest.mark.parametrize("peft", [None, "LoRA", "DoRA"])
    @pytest.mark.parametrize("shape", [{}, BLOCK, {"qk_layernorm": True}, GELU | {"normalization": "LayerNorm"}])
    def test_gradients_are_the_same_and_memory_as_planned(
        self, shape: dict[str, Any], peft: str | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")  # of attention's backward pass
        config = self.CONFIG | shape
        model = model_of(peft, **config).cuda()
        kept, expected = self.kept_and_gradients(model)
        _, repeated = self.kept_and_gradients(model)
        recompute_outputs(model)
        less, found = self.kept_and_gradients(model)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            noise = (repeated[name] - gradient).abs().max()  # of sums in another order, where there are any
            assert (found[name] - gradient).abs().max() <= 2 * noise, name
        work = self.WORK.replace(
            gated=config.get("gated_linear_unit", True), qk_norm=config.get("qk_layernorm", False),
            lora_rank=4 if peft else None, dora=peft == "DoRA", recompute_outputs=True,
        )  # fmt: skip
        layers = 4 - config.get("recompute_num_layers", 0)
        planned = layers * memory.recomputed_outputs_per_token(work) * self.SEQ
        assert kept - less == pytest.approx(planned, abs=4 * 2**20)  # of 40 MiB: the allocator rounds up to 2
