import types

import pytest
import torch

from nemo_cpt.errors import CptError
from nemo_cpt.training import oom_advice


class TestOutOfMemoryAdvice:
    config = types.SimpleNamespace(num_layers=32, recompute_num_layers=12, cross_entropy_fusion_impl="native")

    def test_it_says_what_to_change_and_keeps_the_allocators_message(self):
        module = types.SimpleNamespace(config=self.config)
        error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.96 GiB.")
        advice, heard = oom_advice.OutOfMemoryAdvice(), []
        later = types.SimpleNamespace(on_exception=lambda trainer, module, error: heard.append(error))
        with pytest.raises(CptError) as caught:
            advice.on_exception(types.SimpleNamespace(callbacks=[advice, later]), module, error)
        assert heard == [caught.value]  # what writes down how the run ended, and ends exports
        assert "recompute_num_layers=12 of 32" in str(caught.value)
        assert 'cross_entropy_fusion_impl="te"' in str(caught.value)
        assert "Tried to allocate 1.96 GiB" in str(caught.value)
        assert caught.value.__cause__ is error

    def test_it_does_not_offer_what_is_in_use(self):
        self_in_use = types.SimpleNamespace(num_layers=32, recompute_num_layers=32, cross_entropy_fusion_impl="te")
        text = oom_advice.advice(self_in_use, "out of memory", outputs_again=True)
        assert "recomputed" not in text
        assert "RecomputeOutputs" not in text
        assert "RecomputeOutputs" in oom_advice.advice(self_in_use, "out of memory")
        self_in_use.fp8 = "hybrid"
        assert "RecomputeOutputs" not in oom_advice.advice(self_in_use, "out of memory")
        assert "cross_entropy" not in text

    def test_other_errors_pass(self):
        oom_advice.OutOfMemoryAdvice().on_exception(None, types.SimpleNamespace(), ValueError("something else"))
