"""The planner by itself, without NeMo."""

import contextlib
import itertools
import math
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_cpt.errors import CptError
from nemo_cpt.planning import ALLOWED, Workload, fit_workload, memory, plan_workload
from nemo_cpt.planning.hardware import GIB, gpu, of_device, usable_gib
from nemo_cpt.planning.throughput import model_flops_per_token
from tests.support.cost import within_cpu_seconds

LLAMA = {
    "num_layers": 32, "hidden_size": 4096, "ffn_hidden_size": 14336, "num_attention_heads": 32, "num_query_groups": 8,
    "kv_channels": 128, "vocab_size": 128_256,
}  # fmt: skip


# Tokens a second and GPU of the whole model on four H200, by tensor and pipeline parallel size and recomputed layers
# (docs/planning.md); the lowest and the highest where two machines were measured, of which one launched more slowly.
FOUR_GPUS = {"gpus": 4, "gpus_per_node": 4, "global_batch_size": 16, "fused_gradients": True}
ON_FOUR_H200 = {
    (1, 1, 0): (10_500, 10_678), (2, 1, 0): (9_148, 9_684), (1, 2, 0): (9_309, 9_309), (2, 2, 0): (8_715, 8_715),
    (1, 1, 32): (8_285, 8_285), (1, 4, 0): (8_221, 8_221), (4, 1, 0): (5_872, 7_990),
}  # fmt: skip
BF16_STATES = {
    "grad_bytes": 2, "exp_avg_bytes": 2, "exp_avg_sq_bytes": 2, "master_bytes": 2, "precision_aware": True
}  # fmt: skip


def llama(**changes) -> Workload:
    return Workload(**LLAMA | {"global_batch_size": 32} | changes)


def test_parameters_are_llama_31_8bs() -> None:
    assert llama().parameters == 8_030_261_248
    assert llama(lora_rank=32).adapter_parameters == 32 * 32 * 69_632


def test_operations_are_those_of_the_products() -> None:
    """Forward 2 a weight; backward 2 for the inputs' gradients, and 2 for those of the weights that are trained."""
    layers, head, attention = 32 * 218_103_808, 128_256 * 4096, 6 * 32 * 8192 * 4096
    assert model_flops_per_token(llama()) == 6 * (layers + head) + attention
    adapters = 32 * 32 * 69_632
    assert model_flops_per_token(llama(lora_rank=32)) == 4 * (layers + head) + 6 * adapters + attention
    trained = llama(lora_rank=32, trained_embeddings=True)
    assert model_flops_per_token(trained) == 4 * layers + 6 * (head + adapters) + attention


@given(st.lists(st.integers(1, 10**8), min_size=1, max_size=12), st.sampled_from([2, 3, 8]))
def test_pieces_are_of_the_whole_and_no_longer_than_a_ranks_part(sizes: list[int], ranks: int) -> None:
    work = llama(gpus=ranks, global_batch_size=24)
    with mock.patch.object(memory, "_parameter_sizes", return_value=sizes):
        pieces = memory._saved_pieces(work, 0)
    assert sum(pieces) == sum(sizes)
    assert max(pieces) <= -(-(sum(sizes) + 64 * len(sizes)) // ranks) + 128
    assert len(pieces) <= len(sizes) + (ranks - 1) * len(sizes)


workloads = st.builds(
    llama,
    num_layers=st.sampled_from([4, 16, 32]),
    seq_length=st.sampled_from([512, 4096, 16384]),
    micro_batch_size=st.sampled_from([1, 2, 4]),
    lora_rank=st.sampled_from([None, 8, 128]),
    dora=st.booleans(),
    recompute=st.sampled_from(["none", "selective", "block", "uniform"]),
    recompute_num_layers=st.integers(0, 40),
    recompute_outputs=st.booleans(),
    loss=st.sampled_from(["te", "native", "plain"]),
    fp8=st.booleans(),
    fused_gradients=st.booleans(),
    grad_bytes=st.sampled_from([2, 4]),
    tensor_model_parallel_size=st.sampled_from([1, 2]),
    pipeline_model_parallel_size=st.sampled_from([1, 2]),
    context_parallel_size=st.sampled_from([1, 2]),
    sequence_parallel=st.booleans(),
    gpus=st.sampled_from([8, 16]),
    global_batch_size=st.just(256),
)


@settings(max_examples=200, deadline=None)
@given(workloads)
def test_parts_add_up_and_are_never_negative(work: Workload) -> None:
    planned = plan_workload(work)
    for stage in planned.stages:
        assert stage.total == sum(stage.parts.values())
        assert min(stage.parts.values()) >= 0
        assert stage.parts["weights"] > 0
    speed = planned.speed
    assert min(speed.seconds.values()) > 0
    assert speed.step_seconds * speed.tokens_per_second == pytest.approx(work.tokens_per_step)


@settings(max_examples=100, deadline=None)
@given(workloads)
def test_more_of_anything_takes_no_less(work: Workload) -> None:
    peak = plan_workload(work).peak_gib
    assert plan_workload(work.replace(micro_batch_size=2 * work.micro_batch_size)).peak_gib >= peak
    assert plan_workload(work.replace(seq_length=2 * work.seq_length)).peak_gib >= peak
    if work.recompute == "none":
        assert plan_workload(work.replace(recompute="uniform")).peak_gib <= peak * 1.05  # a layer's transient


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensor_model_parallel_size": 3}, "num_attention_heads 32 cannot be cut over 3"),
        ({"pipeline_model_parallel_size": 5, "gpus": 5}, "32 layers cannot be cut into 5"),
        ({"context_parallel_size": 3, "gpus": 3}, "seq_length 8192 cannot be cut over 3"),
        ({"tensor_model_parallel_size": 4, "gpus": 6}, "6 GPUs cannot be cut into groups"),
        ({"gpus": 8, "global_batch_size": 12}, "global_batch_size 12 is not a multiple"),
        ({"tensor_model_parallel_size": 16, "gpus": 16}, "num_query_groups 8 cannot be cut over 16"),
        ({"fp8": True, "seq_length": 8200}, "tiles of 16, and seq_length x micro_batch_size is 8200 on one GPU"),
        ({"fp8": True, "hidden_size": 4104}, "hidden_size is 4104"),
        ({"fp8": True, "ffn_hidden_size": 14352, "gpus": 2, "tensor_model_parallel_size": 2}, "hidden_size is 7176"),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(CptError, match=message):
        llama(**changes)


def test_norms_of_queries_and_keys_keep_what_they_normalise() -> None:
    plain, normed = (memory.layer_bytes_per_token(llama(qk_norm=each)) for each in (False, True))
    assert normed - plain == 2 * (4096 + 1024) + 4 * (32 + 8)
    assert llama(qk_norm=True).parameters - llama().parameters == 32 * 2 * 128


def test_layers_recomputed_at_once_keep_fewer_inputs_and_take_more_in_the_backward_pass() -> None:
    one, four = (
        memory.stage_memory(llama(lora_rank=8, recompute="uniform", recompute_num_layers=count), 0) for count in (1, 4)
    )
    assert (one.moment, four.moment) == ("loss", "backward")
    layer = memory.layer_bytes_per_token(llama(lora_rank=8)) * 8192
    assert four.parts["activations"] > 4 * layer
    assert memory.activation_bytes(llama(recompute="uniform", recompute_num_layers=4), 0) == (8 + 2) * 8192 * 4096 * 2


def test_outputs_that_are_computed_again_are_not_kept() -> None:
    """Both norms' outputs and the activation's in bf16; in fp8 they are bytes, which stay."""
    work = llama(recompute_outputs=True)
    assert memory.recomputed_outputs_per_token(work) == 2 * (2 * 4096 + 14_336)
    assert memory.recomputed_outputs_per_token(work.replace(fp8=True)) == 0
    assert memory.recomputed_outputs_per_token(work.replace(lora_rank=8)) == 2 * (2 * 4096 + 14_336)
    assert memory.recomputed_outputs_per_token(work.replace(lora_rank=8, lora_targets=("linear_proj",))) == 0
    adapted = {"lora_rank": 8, "tensor_model_parallel_size": 2, "sequence_parallel": True, "gpus": 2}
    # What was gathered for the adapters is kept in its place: both norms' parts go, and half the activation.
    assert memory.recomputed_outputs_per_token(work.replace(**adapted)) == 2 * (4096 + 14_336 // 2)


class TestHostMemory:
    def test_a_node_of_four_gpus_takes_what_was_measured(self) -> None:
        """In use behind the first asynchronous save of the whole 8B (112 GB) on 4 H200, the system's 1 GiB included."""
        host = memory.host_memory(llama(gpus=4, tensor_model_parallel_size=2))
        assert host.total / GIB == pytest.approx(143, rel=0.02)

    @pytest.mark.parametrize(
        ("work", "shared"),
        [(llama(gpus=4, tensor_model_parallel_size=2), 125.42 - 4 * 0.03), (llama(num_layers=3), 23.88 - 0.03)],
    )
    def test_a_checkpoints_copy_is_what_was_measured(self, work: Workload, shared: float) -> None:
        """Shared memory on H200s while checkpoints were written, less each process's before the first."""
        assert memory.host_memory(work).parts["checkpoint being written"] / GIB == pytest.approx(shared, abs=0.02)

    def test_each_tensor_takes_a_power_of_two(self) -> None:
        mib = {"fc1": 256, "fc2": 128, "qkv": 64, "projection": 32}  # 224, 112, 48 and 32 MiB in bf16
        weights = 32 * sum(mib.values()) + 2 * 1024  # the embedding and the output layer, 1002 MiB each
        copy = memory.host_memory(llama()).parts["checkpoint being written"]
        assert copy / 2**20 == pytest.approx(weights + 3 * 2 * weights, rel=1e-3)  # and three states in fp32

    def test_a_node_holds_its_gpus_share(self) -> None:
        one, two = (memory.host_memory(llama(gpus=gpus, gpus_per_node=4)).parts for gpus in (4, 8))
        assert two["checkpoint being written"] == pytest.approx(one["checkpoint being written"] / 2, rel=0.1)
        assert two["processes"] == one["processes"]

    def test_a_tied_output_layer_is_saved_with_the_embedding(self) -> None:
        tied = llama(gpus=4, tied=True)
        pipelined = tied.replace(pipeline_model_parallel_size=2)
        parts = [memory.host_memory(work).parts["checkpoint being written"] for work in (tied, pipelined)]
        assert parts[1] == pytest.approx(parts[0], rel=0.05)  # the pieces differ

    def test_adapters_are_saved_alone(self) -> None:
        host = memory.host_memory(llama(gpus=4, lora_rank=32))
        assert host.parts["checkpoint being written"] == llama(lora_rank=32).adapter_parameters * 14


class TestFit:
    def test_it_is_fast_and_says_what_each_change_bought(self) -> None:
        with within_cpu_seconds(2):
            found = fit_workload(llama(lora_rank=128, loss="native"), 48)
        assert [change.knob for change in found.changes] == ["loss", "recompute_outputs", "recompute"]
        assert found.changes[0].memory_gib > 8
        for each in found.changes[1:]:
            assert each.tokens_per_second < 0 < each.memory_gib
        before = plan_workload(llama(lora_rank=128, loss="native"), 48)
        bought = sum(change.memory_gib for change in found.changes)
        assert before.peak_gib - found.plan.peak_gib == pytest.approx(bought, abs=0.01)

    def test_it_recomputes_no_layer_more_than_it_must(self) -> None:
        work = fit_workload(llama(lora_rank=128), 48).plan.workload
        one_less = work.replace(recompute_num_layers=work.recompute_num_layers - 1)
        budget = 0.95 * 47.4
        assert plan_workload(work, 48).peak_gib <= budget < plan_workload(one_less, 48).peak_gib

    def test_eight_gpus_get_a_layout_in_time(self) -> None:
        with within_cpu_seconds(2):
            work = fit_workload(llama(gpus=8, global_batch_size=1024), 80).plan.workload
        assert work.tensor_model_parallel_size > 1
        assert not work.host_states

    def test_states_go_to_the_host_where_that_is_much_faster(self) -> None:
        """On two GPUs of 80 GB they would fit, with every layer cut in two and nearly all recomputed."""
        two = llama(gpus=2, gpus_per_node=2, global_batch_size=128)
        kept = fit_workload(two, 80, allow=[name for name in ALLOWED if name != "host_states"]).plan
        moved = fit_workload(two, 80).plan
        assert moved.workload.host_states
        assert moved.speed.tokens_per_second > 1.2 * kept.speed.tokens_per_second
        assert moved.host.total < kept.host.total
        # As fast as makes no difference, and fewer things that could be slower on another machine.
        assert not fit_workload(llama(global_batch_size=128), 192).plan.workload.host_states

    @pytest.mark.parametrize("gpu_memory_gib", [24, 80])
    @pytest.mark.parametrize("sizes", [{}, {"fp8": True}])
    def test_more_memory_and_more_gpus_are_not_slower(self, sizes: dict[str, Any], gpu_memory_gib: int) -> None:
        """By more than states on the host have to gain."""
        for seq_length in (1024, 8192):
            speeds = [0.0]
            for gpus, memory_gib in ((2, gpu_memory_gib), (4, gpu_memory_gib), (8, gpu_memory_gib), (8, 192)):
                work = llama(gpus=gpus, seq_length=seq_length, global_batch_size=128, **sizes)
                with contextlib.suppress(CptError):  # nothing fits on the smallest cards
                    speeds.append(fit_workload(work, memory_gib).plan.speed.tokens_per_second)
            assert all(1.2 * after >= before for before, after in itertools.pairwise(speeds))

    def test_every_knob_is_told_and_the_steps_lead_to_the_plan(self) -> None:
        for before in (
            llama(lora_rank=64, dora=True, gpus=8, global_batch_size=128),
            llama(lora_rank=64, gpus=8, tensor_model_parallel_size=8, micro_batch_size=8, global_batch_size=8),
        ):
            found = fit_workload(before, 24, allow=[*ALLOWED, "rank"])
            after, told = found.plan.workload, {change.knob: change for change in found.changes}
            assert after.micro_batch_size != before.micro_batch_size
            assert (told["micro_batch_size"].before, told["micro_batch_size"].after) == (
                before.micro_batch_size, after.micro_batch_size,
            )  # fmt: skip
            assert told["layout"].after == (
                f"tensor {after.tensor_model_parallel_size} x pipeline {after.pipeline_model_parallel_size}"
            )
            bought = sum(change.memory_gib for change in found.changes)
            assert plan_workload(before, 24).peak_gib - found.plan.peak_gib == pytest.approx(bought, abs=0.01)

    def test_the_peak_leaves_the_margin_also_while_the_model_is_made(self) -> None:
        """Two copies of a 70B's part of the weights would fit, and leave 2 % of the card."""
        work = llama(
            num_layers=80, hidden_size=8192, ffn_hidden_size=28672, num_attention_heads=64, gpus=4, gpus_per_node=4,
            global_batch_size=128,
        )  # fmt: skip
        planned = fit_workload(work, 141).plan
        assert planned.peak_gib <= 0.95 * planned.memory_gib

    def test_it_recomputes_nothing_for_a_larger_micro_batch_alone(self) -> None:
        """Measured with LoRA of rank 128: 13,547 tokens/s with one sequence, 13,665 with two and outputs again."""
        work = fit_workload(llama(lora_rank=128), 80).plan.workload
        assert (work.recompute, work.recompute_outputs, work.micro_batch_size) == ("none", False, 1)
        assert fit_workload(llama(lora_rank=128), 48).plan.workload.recompute_outputs  # where it must recompute
        assert not fit_workload(llama(lora_rank=128, fp8=True), 48).plan.workload.recompute_outputs

    @pytest.mark.parametrize("micro_batches", [("layout", "recompute"), ALLOWED])
    @pytest.mark.parametrize(("gpu_memory_gib", "fastest"), [(80, (2, 1)), (141, (1, 1))])
    def test_on_four_gpus_it_takes_the_layout_that_was_measured_fastest(
        self, gpu_memory_gib: int, fastest: tuple[int, int], micro_batches: tuple[str, ...]
    ) -> None:
        fitting = {}
        for (tensor, pipeline, recompute), (slow, fast) in ON_FOUR_H200.items():
            work = llama(
                tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline, sequence_parallel=tensor > 1,
                recompute="block" if recompute else "none", recompute_num_layers=recompute, **FOUR_GPUS,
            )  # fmt: skip
            planned = plan_workload(work, gpu_memory_gib)
            assert 0.91 * slow < planned.speed.tokens_per_second / 4 < 1.09 * fast
            if planned.peak_gib <= 0.95 * planned.memory_gib:
                fitting[tensor, pipeline] = max(fast, fitting.get((tensor, pipeline), 0))
        assert max(fitting, key=fitting.get) == fastest
        for global_batch_size in (16, 128, 1024):
            start = llama(**FOUR_GPUS | {"global_batch_size": global_batch_size})
            chosen = fit_workload(start, gpu_memory_gib, allow=micro_batches).plan.workload
            layout = (chosen.tensor_model_parallel_size, chosen.pipeline_model_parallel_size)
            if chosen.recompute_outputs and global_batch_size > 16 and layout == (1, 2):
                # What was measured of two stages, without the ninth of it that is their bubble at 16 sequences.
                assert max(fitting.values()) < 9_309 * 9 / 8
            else:
                assert layout == fastest

    @pytest.mark.parametrize(
        ("gpu_memory_gib", "changes", "fastest"),
        [
            (80, BF16_STATES, (1, 1, 1)),  # 10,777 tokens/s a GPU; with fp32 states 9,432
            (80, {"fp8": True} | BF16_STATES, (2, 1, 2)),  # 13,155; one sequence and fp32 states 10,742
            (80, {"fp8": True}, (2, 2, 2)),  # 12,310, beside those 10,742
            (141, BF16_STATES, (1, 1, 2)),  # 10,968; one sequence and fp32 states 10,799
            (141, {"fp8": True} | BF16_STATES, (1, 1, 2)),  # 15,410; likewise 14,515
            (141, {"fp8": True}, (1, 1, 1)),
        ],
    )
    def test_so_in_fp8_and_with_states_in_bf16(
        self, gpu_memory_gib: int, changes: dict, fastest: tuple[int, int, int]
    ) -> None:
        """docs/performance.md, four GPUs."""
        start = llama(**FOUR_GPUS | {"global_batch_size": 1024} | changes)
        chosen = fit_workload(start, gpu_memory_gib).plan.workload
        layout = (chosen.tensor_model_parallel_size, chosen.pipeline_model_parallel_size, chosen.micro_batch_size)
        assert layout == fastest

    def test_on_two_gpus_it_takes_the_layout_that_was_measured_fastest(self) -> None:
        """Tokens a second of 8 layers at 4096: data parallel 67,000, pipeline 48,000, tensor 46,000."""
        start = llama(num_layers=8, seq_length=4096, gpus=2, gpus_per_node=2, global_batch_size=8)
        chosen = fit_workload(start, 141, allow=("layout", "recompute")).plan.workload
        assert (chosen.tensor_model_parallel_size, chosen.pipeline_model_parallel_size) == (1, 1)

    def test_nothing_is_given_up_unless_allowed(self) -> None:
        with pytest.raises(CptError, match=r"nothing fits in 23\.5 GiB: LoRA takes at least"):
            fit_workload(llama(lora_rank=128), 24)
        work = fit_workload(llama(lora_rank=128), 24, allow=[*ALLOWED, "rank"]).plan.workload
        assert (work.lora_rank, work.seq_length) == (16, 8192)

    def test_the_smallest_memory_that_is_named_does_fit(self) -> None:
        with pytest.raises(CptError) as caught:
            fit_workload(llama(), 24)
        least = float(str(caught.value).split("at least ")[1].split(" GiB")[0])
        assert fit_workload(llama(), (least + 0.2) / 0.98).plan.fits

    def test_an_unknown_knob_is_refused(self) -> None:
        with pytest.raises(CptError, match=r"allow names \['speed'\]"):
            fit_workload(llama(), 48, allow=["speed"])


def test_what_a_run_measures_is_planned_of_the_same_gpu() -> None:
    """Rank 0 has the first stage, and its allocator does not see CUDA's context; the peak is of the last stage here."""
    found = plan_workload(llama(num_layers=4, gpus=2, pipeline_model_parallel_size=2, loss="plain"))
    first, last = found.stages
    assert found.peak_gib == last.total / GIB > first.total / GIB
    reserved = sum(size for name, size in first.parts.items() if name != "CUDA context")
    assert found.as_dict()["reserved_gib"] == pytest.approx(reserved / GIB, abs=1e-3)


def test_a_plan_says_how_far_to_trust_its_speed() -> None:
    assert "mean error 3 %" in plan_workload(llama()).speed.error
    assert "bound by the host" in plan_workload(llama(hidden_size=768, num_layers=12)).speed.error  # as the 124M is
    assert "not measured" in plan_workload(llama(), gpu="H100").speed.error


def test_fp8_is_refused_on_a_card_without_it() -> None:
    assert plan_workload(llama(fp8=True), gpu="H100").speed.tokens_per_second
    for planned in (plan_workload, fit_workload):
        with pytest.raises(CptError, match="the A100-80GB has no fp8 products"):
            planned(llama(fp8=True, lora_rank=16), gpu="A100-80GB")


def test_cards_are_known_by_size_and_by_name() -> None:
    assert usable_gib(48) == usable_gib(49140 / 1024) == 47.4  # as sold, as nvidia-smi has it
    assert usable_gib(143771 / 1024) == 139.8
    assert usable_gib(100) == 98
    assert gpu("nvidia rtx 6000 ada").memory_gib == 47.4
    with pytest.raises(CptError, match="knows no GPU 'TPU'"):
        gpu("TPU")
    for none in (-1, math.nan, math.inf):
        with pytest.raises(CptError, match=f"{none} GiB: give the size of the card"):
            usable_gib(none)


@pytest.mark.parametrize(
    ("device", "kind"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_a_gpu_is_known_by_its_drivers_name(device: str, kind: str | None) -> None:
    found = of_device(device)
    assert (found.name if found else None) == kind
