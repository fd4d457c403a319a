"""Blends that others trained with, and where that is written."""

from collections.abc import Mapping

from nemo_cpt.corpus.dataset.blend import Blend, check_distinct

SWALLOW = "job scripts of Llama-3.1-Swallow-8B, github.com/okoge-kaz/Megatron-LM, scripts/"
IBRAHIM = "Ibrahim et al. 2024, Simple and Scalable Strategies to Continually Pre-train LLMs, arXiv:2403.08763"


def swallow_v0_1(
    japanese: str, english: str, code: str, parallel: str | None = None, validation: Mapping[str, str] | None = None
) -> Blend:
    """Llama-3.1-Swallow v0.1: 54.0 % Japanese (web and Wikipedia), 29.6 % English, 16 % code, 0.44 % parallel text.

    Args:
        japanese: Prefix of Japanese web text and Wikipedia.
        english: Prefix of English text.
        code: Prefix of source code.
        parallel: Prefix of Japanese-English parallel text; without it the others keep their proportions.
        validation: Prefixes by name.

    Raises:
        CptError: Two prefixes name one dataset.

    Source: the job scripts named in `SWALLOW`, blend weights of the 200 B token run.
    """
    return _swallow([(japanese, 53.99), (english, 29.56), (code, 16.0)], parallel, validation, "v0.1")


def swallow_v0_2(
    japanese: str, english: str, code: str, parallel: str | None = None, validation: Mapping[str, str] | None = None
) -> Blend:
    """Llama-3.1-Swallow v0.2: 68.6 % Japanese, 15.0 % English, 16 % code, 0.44 % parallel text.

    Arguments, errors and source as for `swallow_v0_1`.
    """
    return _swallow([(japanese, 68.6), (english, 15.0), (code, 16.0)], parallel, validation, "v0.2")


def _swallow(
    parts: list[tuple[str, float]], parallel: str | None, validation: Mapping[str, str] | None, version: str
) -> Blend:
    # The shares need not add up to 100: `Blend.shares` normalizes them, also without the parallel text.
    parts = parts + ([(parallel, 0.44)] if parallel else [])
    # Before they become keys of a dictionary, where the second of two equal prefixes would replace the first.
    check_distinct(prefix for prefix, _ in parts)
    return Blend(train=dict(parts), validation=dict(validation or {}), note=f"Shares of Swallow {version}: {SWALLOW}")


def ibrahim_weak(new: str, old: str, validation: Mapping[str, str] | None = None) -> Blend:
    """5 % replay, for a weak shift of distribution such as English web to newer English web (arXiv:2403.08763)."""
    return Blend.replay(new, old, share=0.05, validation=validation, note=f"5 % replay for a weak shift: {IBRAHIM}")


def ibrahim_strong(new: str, old: str, validation: Mapping[str, str] | None = None) -> Blend:
    """25 % replay, for a strong shift such as English to German (arXiv:2403.08763)."""
    return Blend.replay(new, old, share=0.25, validation=validation, note=f"25 % replay for a strong shift: {IBRAHIM}")


def japanese_wikipedia_alone(japanese: str, validation: Mapping[str, str] | None = None) -> Blend:
    """The Japanese Wikipedia and nothing else, as in NVIDIA's tutorial; it forgets English, and says so.

    Source: NVIDIA's blog, NeMo Framework で実践する継続事前学習 – 日本語 LLM 編.
    """
    return Blend(
        train={japanese: 1.0},
        validation=dict(validation or {}),
        note="The blend of NVIDIA's tutorial on continual pretraining in Japanese",
        caution="There is no replay of the base model's data: it will forget English. Blend.replay adds it, and a "
        "validation set in English shows the forgetting.",
    )
