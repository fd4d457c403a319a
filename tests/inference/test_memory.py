"""Memory that runs out, in a real model's forward pass: who is told, and who goes on as if nothing had been."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_cpt.inference import Sampling, decoding
from nemo_cpt.inference.decoding import Decoder, Request
from nemo_cpt.inference.engine import NoMemoryError
from nemo_cpt.inference.transformers_engine import TransformersEngine

LONG = "The old town of Kyoto " * 6
SETTINGS = Sampling(max_tokens=12, min_tokens=12, temperature=0.9, seed=3, logprobs=1)


@pytest.fixture
def engine(make_model: Callable[[str], Path]) -> TransformersEngine:
    return TransformersEngine(make_model("llama"))


@pytest.fixture
def narrow(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Callable[[torch.Size], bool]], None]:
    """Lets the second layer, when the first has kept its keys, have no memory for inputs of some shapes."""
    attention = engine.network.model.layers[1].self_attn
    forward = attention.forward

    def only(fits: Callable[[torch.Size], bool]) -> None:
        def limited(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if not fits(hidden_states.shape):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return forward(hidden_states, *args, **kwargs)

        monkeypatch.setattr(attention, "forward", limited)

    return only


def alone(engine: TransformersEngine, prompt: str) -> tuple[str, Any]:
    (request,) = finished(engine.decoder(), [engine.request(prompt, SETTINGS)])
    text, logprobs = said(request)
    return text, pytest.approx(logprobs, abs=1e-3)  # batches of other sizes round differently


def said(request: Request) -> tuple[str, list[float]]:
    return request.text, [each.logprob for each in request.logprobs]


def finished(decoder: Decoder, requests: list[Request]) -> list[Request]:
    decoder.add(requests)
    while decoder.rows:
        decoder.step()
    return requests


def test_a_prompt_that_there_is_no_memory_for_ends_no_other_reply(
    engine: TransformersEngine, narrow: Callable[[Any], None]
) -> None:
    expected = {prompt: alone(engine, prompt) for prompt in ("a", "京都", "Kyoto is")}
    decoder, prompts = engine.decoder(), ["a", "京都", "Kyoto is", LONG]
    first, second, third, long = (engine.request(prompt, SETTINGS) for prompt in prompts)
    decoder.add([first])
    decoder.step()
    narrow(lambda shape: shape[1] < len(long.ids))
    pieces = decoder.add([second, long, third])
    assert [(request is long, piece.finish_reason) for request, piece in pieces] == [
        (False, None), (True, "cancelled"), (False, None)
    ]  # fmt: skip
    assert isinstance(long.error, NoMemoryError)
    assert f"no memory for a prompt of {len(long.ids):,} tokens" in str(long.error)
    while decoder.rows:
        decoder.step()
    assert [said(each) for each in (first, second, third)] == list(expected.values())


def test_where_a_step_has_no_memory_the_newest_leave_until_it_has(
    engine: TransformersEngine, narrow: Callable[[Any], None]
) -> None:
    prompts = ["a", "京都", "Kyoto is", LONG]
    expected = [alone(engine, prompt) for prompt in prompts[:2]]
    decoder, requests = engine.decoder(), [engine.request(prompt, SETTINGS) for prompt in prompts]
    decoder.add(requests)
    decoder.step()
    narrow(lambda shape: shape[0] <= 2)
    pieces = decoder.step()
    assert [request for request, piece in pieces if piece.finish_reason] == [requests[3], requests[2]]
    assert [request.tokens for request in requests] == [3, 3, 2, 2]
    while decoder.rows:
        decoder.step()
    assert [said(each) for each in requests[:2]] == expected
    assert all(isinstance(each.error, NoMemoryError) for each in requests[2:])


@pytest.mark.parametrize("fails", range(12))
def test_where_keys_cannot_be_joined_those_that_are_there_go_on(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch, fails: int
) -> None:
    """At each of the copies that a join of three layers takes."""
    expected = alone(engine, "京都")
    decoder, request, late = engine.decoder(), engine.request("京都", SETTINGS), engine.request(LONG, SETTINGS)
    decoder.add([request])
    decoder.step()
    padded, calls = decoding._left_padded, iter(range(12))

    def limited(states: torch.Tensor, columns: int) -> torch.Tensor:
        if next(calls) == fails:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return padded(states, columns)

    monkeypatch.setattr(decoding, "_left_padded", limited)
    ((refused, _),) = decoder.add([late])
    assert (refused, decoder.rows) == (late, [request])
    while decoder.rows:
        decoder.step()
    assert said(request) == expected


def test_a_batch_that_had_no_memory_can_be_used_again(
    engine: TransformersEngine, narrow: Callable[[Any], None]
) -> None:
    expected = alone(engine, "京都")
    decoder, request = engine.decoder(), engine.request("a", SETTINGS)
    narrow(lambda shape: False)
    assert finished(decoder, [request]) == [request]
    assert isinstance(request.error, NoMemoryError)
    narrow(lambda shape: True)
    (again,) = finished(decoder, [engine.request("京都", SETTINGS)])
    assert said(again) == expected


def test_replies_of_an_evaluation_end_with_the_reason(
    engine: TransformersEngine, narrow: Callable[[Any], None]
) -> None:
    narrow(lambda shape: shape[1] < 30)
    replies: Iterator[Any] = engine.generate(["a", LONG], SETTINGS)
    with pytest.raises(NoMemoryError, match="no memory for a prompt of"):
        list(replies)
