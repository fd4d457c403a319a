"""Every patch, beside the defect that it mends, on Megatron's and NeMo's own layers (CPU, gloo)."""

import json
import sys
import types
from unittest import mock

import pytest
import torch

from nemo_cpt.cpu_stack import UNFUSED
from nemo_cpt.errors import CptError
from nemo_cpt.training import patches
from nemo_cpt.training.gradients import EveryTrainableParameterHasGradient
from nemo_cpt.training.patching import replace

SEQ, BATCH, VOCABULARY = 16, 2, 96
FULL = {"recompute_granularity": "full"}
RECOMPUTE = {
    "none": {},
    "selective": {"recompute_granularity": "selective"},
    "selective-mlp": {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]},
    "full-block": FULL | {"recompute_method": "block", "recompute_num_layers": 2},
    "full-uniform": FULL | {"recompute_method": "uniform", "recompute_num_layers": 1},
}


@pytest.fixture
def unpatched():
    """Undo every patch for one test, and again after it."""
    remove_patches()
    yield
    remove_patches()


def remove_patches():
    from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.tensor_parallel.layers import LinearWithFrozenWeight
    from nemo.collections.llm.peft.lora import LoRALinear
    from nemo.lightning.pytorch.callbacks.peft import WrappedAdapterIO

    for owner, name in [
        (DistributedOptimizer, "_set_main_param_and_optimizer_states"),
        (LinearWithFrozenWeight, "backward"),
        (WrappedAdapterIO, "load_checkpoint"),
        (LanguageModelEmbedding, "forward"),
        (LoRALinear, "forward"),
    ]:
        original = getattr(getattr(owner, name), "unpatched", None)
        if original is not None:
            setattr(owner, name, staticmethod(original) if name == "backward" else original)


def small_model(recompute=None, dtype=torch.float32, **lora):
    """A two-layer Llama of Megatron's layers with NeMo's LoRA, its adapters' second matrices not zero."""
    from nemo.collections import llm

    config = llm.Llama31Config8B(
        num_layers=2, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, num_query_groups=2, kv_channels=8,
        seq_length=SEQ, vocab_size=VOCABULARY, params_dtype=dtype, bf16=dtype == torch.bfloat16, **UNFUSED,
        **RECOMPUTE[recompute or "none"],
    )  # fmt: skip
    torch.manual_seed(7)
    model = config.configure_model(tokenizer=None, pre_process=True, post_process=True).to(dtype)
    model = with_lora(model, **lora)
    for name, parameter in model.named_parameters():
        if name.endswith("linear_out.weight"):
            torch.nn.init.normal_(parameter, std=0.02)
    return model.train()


def with_lora(model, kind="LoRA", **options):
    """What NeMo's PEFT does to a model when it trains: freeze it, then add the adapters."""
    from nemo.collections import llm
    from nemo.collections.llm import fn

    model.requires_grad_(False)
    lora = getattr(llm.peft, kind)(**({"dim": 4, "alpha": 8} | options))
    return fn.walk(model, lora.transform)


def loss_of(model):
    tokens = torch.arange(BATCH * SEQ).reshape(BATCH, SEQ) * 7 % VOCABULARY
    positions = torch.arange(SEQ).expand(BATCH, SEQ)
    mask = torch.ones(SEQ, SEQ).triu(1).bool()[None, None]
    return model(tokens, positions, mask, labels=tokens.roll(-1, 1)).mean()


def gradients_of(model):
    loss_of(model).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.usefixtures("megatron")
class TestRecompute:
    @pytest.mark.parametrize("recompute", RECOMPUTE)
    def test_every_adapter_gets_the_gradient_it_has_without_recompute(self, recompute):
        patches.apply()
        expected = gradients_of(small_model())
        found = gradients_of(small_model(recompute))
        assert len(expected) == 16
        for name, gradient in expected.items():
            assert gradient.abs().max() > 0
            torch.testing.assert_close(found[name], gradient, msg=lambda text, name=name: f"{name}: {text}")

    @pytest.mark.usefixtures("unpatched")
    @pytest.mark.parametrize("recompute", ["full-block", "full-uniform"])
    def test_without_the_cure_the_recomputed_adapters_get_none(self, recompute):
        model = small_model(recompute)
        with pytest.raises(RuntimeError, match="does not require grad"):
            loss_of(model).backward()

    @pytest.mark.usefixtures("unpatched")
    def test_without_the_cure_only_the_layer_that_is_not_recomputed_trains(self):
        model = small_model("full-block")
        model.decoder.config.recompute_num_layers = 1
        gradients = gradients_of(model)
        assert {name.split(".")[2] for name, gradient in gradients.items() if gradient is not None} == {"1"}

    def test_a_trainable_embedding_and_inference_are_left_alone(self):
        patches.apply()
        model = small_model("full-block")
        with torch.no_grad():
            assert not model.embedding(torch.zeros(1, 4, dtype=torch.int64), None).requires_grad


@pytest.mark.usefixtures("megatron")
class TestGuard:
    @pytest.mark.usefixtures("unpatched")
    def test_it_names_the_parameters_without_gradient(self):
        model = small_model("full-block")
        model.decoder.config.recompute_num_layers = 1
        guard = EveryTrainableParameterHasGradient()
        guard.watch(model)
        loss_of(model).backward()
        with pytest.raises(CptError, match=r"8 trainable parameters received no gradient.*decoder\.layers\.0\."):
            guard.check()

    def test_it_is_silent_and_removes_its_hooks_when_all_have_one(self):
        patches.apply()
        model = small_model("full-block")
        guard = EveryTrainableParameterHasGradient()
        guard.watch(model)
        loss_of(model).backward()
        guard.check()
        assert not any(p._post_accumulate_grad_hooks for p in model.parameters() if p.requires_grad)


@pytest.mark.usefixtures("megatron")
class TestFrozenLinear:
    def gradient(self, folded):
        from megatron.core.tensor_parallel.layers import LinearWithFrozenWeight

        patches.apply() if folded else remove_patches()
        torch.manual_seed(3)
        x = torch.randn(SEQ, BATCH, 8, requires_grad=True)
        weight = torch.randn(VOCABULARY, 8)
        out = LinearWithFrozenWeight.apply(x, weight, None, False, None)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            out.backward(torch.randn(BATCH, SEQ, VOCABULARY).transpose(0, 1))  # as the fused loss does
        return x.grad, {event.key for event in profile.key_averages()}

    def test_same_gradient_in_one_product(self):
        plain, _ = self.gradient(folded=False)
        folded, operations = self.gradient(folded=True)
        torch.testing.assert_close(folded, plain)
        assert "aten::mm" in operations
        assert "aten::bmm" not in operations

    def test_megatron_runs_a_batched_product_without_the_cure(self):
        _, operations = self.gradient(folded=False)
        assert "aten::bmm" in operations


class TestGuardInTheTrainer:
    def test_it_looks_once_and_after_the_adapters_are_there(self):
        guard = EveryTrainableParameterHasGradient()
        model = torch.nn.ModuleDict({"used": torch.nn.Linear(2, 2), "forgotten": torch.nn.Linear(2, 2)})
        trainer = types.SimpleNamespace(strategy=None)
        guard.on_train_batch_start(trainer, model, None, 0)
        model["used"](torch.ones(1, 2)).sum().backward()
        with pytest.raises(CptError, match=r"2 trainable parameters.*forgotten\.weight, forgotten\.bias"):
            guard.on_train_batch_end(trainer, model, None, None, 0)
        guard.on_train_batch_start(trainer, model, None, 1)
        guard.on_train_batch_end(trainer, model, None, None, 1)


@pytest.mark.usefixtures("megatron")
class TestLora:
    def test_same_loss_and_gradients_through_the_fused_addition(self):
        remove_patches()
        plain = small_model()
        expected_loss, expected = loss_of(plain), gradients_of(plain)
        patches.apply()
        with mock.patch.object(patches._AddProduct, "apply", side_effect=patches._AddProduct.apply) as addition:
            fused = small_model()
            torch.testing.assert_close(loss_of(fused), expected_loss)
            assert addition.call_count == 8
            torch.testing.assert_close(gradients_of(fused), expected)

    def test_dropout_keeps_nemos_own_path(self):
        patches.apply()
        model = small_model(dropout=0.5)
        torch.manual_seed(1)
        first = loss_of(model)
        torch.manual_seed(2)
        assert loss_of(model) != first


@pytest.mark.usefixtures("megatron")
class TestDora:
    """What NeMo's DoRA computes on two ranks is in tests/checkpoint/test_dora.py."""

    @pytest.mark.parametrize("sequence_parallel", [False, True])
    def test_megatron_is_told_which_magnitudes_are_cut_and_which_gradients_are_parts(self, sequence_parallel):
        patches.apply()
        found = {True: 0, False: 0}
        for module in small_model(kind="DoRA").modules():
            if hasattr(module, "init_weight_magnitude"):
                module.config.sequence_parallel = sequence_parallel
                module.init_weight_magnitude(module.weight_magnitude.data)
                whole = module.input_is_parallel  # those of linear_proj and linear_fc2, which every rank has
                assert getattr(module.weight_magnitude, "tensor_model_parallel", False) is not whole
                assert getattr(module.weight_magnitude, "sequence_parallel", False) is (whole and sequence_parallel)
                found[whole] += 1
        assert found == {True: 4, False: 4}


class TestSlices:
    def train(self, slice_elements):
        torch.manual_seed(5)
        parameters = [torch.nn.Parameter(torch.randn(size)) for size in (3, 40, 5, 6, 7)]
        groups = [{"params": parameters[:3], "lr": 0.1}, {"params": parameters[3:], "lr": 0.01}]
        seen = []

        class Adam(torch.optim.AdamW):
            def step(self, closure=None):
                seen.append(sum(p.numel() for group in self.param_groups for p in group["params"]))
                return super().step(closure)

        if slice_elements:
            Adam.step = patches.in_slices(Adam.step, slice_elements)
        optimizer = Adam(groups)
        for _ in range(3):
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape)
            optimizer.step()
        assert [len(group["params"]) for group in optimizer.param_groups] == [3, 2]
        return parameters, seen

    def test_same_values_with_bounded_slices(self):
        whole, seen_whole = self.train(None)
        sliced, seen = self.train(13)
        assert all(torch.equal(a, b) for a, b in zip(whole, sliced, strict=True))
        assert seen_whole == [61] * 3
        assert seen == [3, 40, 5, 13] * 3

    def test_a_step_count_of_the_group_rises_by_one(self):
        class Counting(torch.optim.SGD):
            def step(self, closure=None):
                for group in self.param_groups:
                    group["step"] = group.get("step", 0) + 1

        step = patches.in_slices(Counting.step, 2)
        optimizer = Counting([torch.nn.Parameter(torch.ones(2)) for _ in range(3)], lr=1.0)
        for expected in (1, 2):
            step(optimizer)
            assert optimizer.param_groups[0]["step"] == expected


def test_apply_twice_wraps_once():
    from nemo.collections.llm.peft.lora import LoRALinear

    patches.apply()
    patched = LoRALinear.forward
    patches.apply()
    assert LoRALinear.forward is patched


class TestRoomForTwoCopies:
    def test_weights_wait_on_the_host_only_without_room(self):
        module = torch.nn.Linear(10, 10, bias=False)
        module.frozen = torch.nn.Parameter(torch.ones(1000), requires_grad=False)
        weight = module.weight.data
        assert not patches.move_to_host_without_room(module, grad_bytes=4, free=100 * (4 + 4))
        assert module.weight.data_ptr() == weight.data_ptr()
        assert patches.move_to_host_without_room(module, grad_bytes=4, free=100 * (4 + 4) - 1)
        assert module.weight.data_ptr() != weight.data_ptr()
        assert torch.equal(module.weight, weight)


class TestUnreadGradients:
    @pytest.mark.parametrize("fused", [True, False])
    def test_they_are_there_when_the_model_is_wrapped(self, monkeypatch, fused):
        made = []
        base = types.ModuleType("transformer_engine.pytorch.module.base")
        base.get_dummy_wgrad = lambda shape, dtype: made.append((shape, dtype))
        monkeypatch.setitem(sys.modules, base.__name__, base)
        monkeypatch.setattr(patches, "_on_gpu", lambda module: True)
        module = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.LayerNorm(5), torch.nn.Linear(5, 2)).bfloat16()
        module[2].requires_grad_(False)

        def init(self, config, ddp_config, module):
            for weight in module.parameters():
                weight.main_grad = torch.zeros(weight.shape)

        wrap = patches._with_unread_gradients(init)
        wrap(None, types.SimpleNamespace(gradient_accumulation_fusion=fused), None, module)
        assert made == ([([5, 3], torch.bfloat16)] if fused else [])


def test_two_cures_of_one_function_are_both_in_effect_once():
    class Owner:
        def name(self):
            return "name"

    def quoted(original):
        return lambda self: f"<{original(self)}>"

    def doubled(original):
        return lambda self: 2 * original(self)

    for patch in (quoted, doubled, quoted, doubled):
        replace(Owner, "name", patch)
    assert Owner().name() == "<name><name>"


class TestPrecisionAwareStates:
    def set(self):
        from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

        given = {}
        adam = types.SimpleNamespace(
            param_groups=[{"params": ["parameter"]}],
            set_scaled_state=lambda param, name, value: given.update({name: value.dtype}),
        )
        config = types.SimpleNamespace(use_precision_aware_optimizer_no_fp8_or_ds_fp8=True)
        megatron = types.SimpleNamespace(config=config, optimizer=adam, model_param_group_index_map={"model": (0, 0)})
        read = {name: torch.ones(1) for name in ("param", "exp_avg", "exp_avg_sq")} | {"padding": False}
        DistributedOptimizer._set_main_param_and_optimizer_states(megatron, "model", read)
        return given

    def test_what_a_checkpoint_says_of_padding_is_no_state(self):
        patches.resume_with_precision_aware_states()
        assert self.set() == dict.fromkeys(("master_param", "exp_avg", "exp_avg_sq"), torch.float32)

    @pytest.mark.usefixtures("unpatched")
    def test_megatron_takes_it_for_one(self):
        with pytest.raises(AttributeError, match="'bool' object has no attribute 'dtype'"):
            self.set()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU with Transformer Engine")
class TestOnGpu:
    def test_gradients_are_accumulated_on_the_stream_of_training(self):
        class Chunks(list):
            def init_ddp(self):
                self.stream = torch.cuda.current_stream()

        def stream_of(init_ddp):
            chunks = Chunks([torch.nn.Linear(2, 2, device="cuda")])
            with torch.cuda.stream(torch.cuda.Stream()):
                init_ddp(chunks)
            return chunks.stream

        assert stream_of(Chunks.init_ddp) != torch.cuda.default_stream()
        patched = patches._on_the_stream_of_training(Chunks.init_ddp)
        assert stream_of(patched) == torch.cuda.default_stream()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_the_output_layers_gradient_is_added_within_the_product(self, dtype):
        torch.manual_seed(0)
        inputs, grad = (torch.randn(512, n, device="cuda", dtype=torch.bfloat16) for n in (256, 1024))
        main_grad = torch.randn(1024, 256, device="cuda").to(dtype)
        expected = main_grad.double() + grad.double().t() @ inputs.double()
        patches._add_weight_gradient(inputs, grad, main_grad)
        assert (main_grad.double() - expected).norm() / expected.norm() < (1e-5 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("patched", [False, True])
def test_the_end_of_a_training_moves_nothing_to_the_host(patched):
    """Lightning's own teardown does; with the patch the model and its optimizers are seen again afterwards."""
    from lightning.pytorch.accelerators import CPUAccelerator
    from lightning.pytorch.plugins.environments import LightningEnvironment
    from nemo.lightning.pytorch.strategies import MegatronStrategy

    original = getattr(MegatronStrategy.teardown, "unpatched", MegatronStrategy.teardown)
    strategy = MegatronStrategy()
    strategy.accelerator, strategy.cluster_environment = CPUAccelerator(), LightningEnvironment()
    module = mock.MagicMock(_trainer=None)
    strategy._lightning_module, strategy.optimizers = module, [torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])]
    with mock.patch.object(MegatronStrategy, "teardown", original):
        if patched:
            patches.end_without_moving_to_the_host()
        with mock.patch("lightning.pytorch.strategies.strategy._optimizers_to_device") as moved:
            strategy.teardown()
    assert module.cpu.called != patched
    assert [len(call.args[0]) for call in moved.call_args_list] == [0 if patched else 1]
    assert strategy.lightning_module is module
    assert len(strategy.optimizers) == 1


def test_the_base_of_adapters_is_recorded_where_it_is(tmp_path, unpatched):
    from nemo.lightning.pytorch.callbacks.peft import PEFT, WrappedAdapterIO
    from nemo.lightning.resume import AdapterPath

    weights, base = tmp_path / "steps=3/weights", tmp_path / "moved"
    weights.mkdir(parents=True)
    (weights / "adapter_metadata.json").write_text(json.dumps({"model_ckpt_path": str(tmp_path / "where it was")}))

    def recorded():
        files = types.SimpleNamespace(load_checkpoint=lambda *args, **kwargs: {"state_dict": {}})
        io = WrappedAdapterIO(files, mock.Mock(spec=PEFT))
        for path in (AdapterPath(weights, base_model_path=base), weights):  # as NeMo does: the base, then the adapters
            io.load_checkpoint(path, {})
        return io.model_ckpt_path

    assert recorded() == tmp_path / "where it was"
    patches.record_where_the_base_of_adapters_is()
    assert recorded() == base
