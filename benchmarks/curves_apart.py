"""How far loss curves are apart, beside what rounding and chance do to a curve: smoothed, and as a table."""

from collections.abc import Callable

import numpy as np

WINDOW = 20  # steps of the moving average in which curves are compared


def smooth(curve: list[float]) -> np.ndarray:
    """Moving average over WINDOW steps, fewer where the curve is shorter."""
    window = min(WINDOW, len(curve))
    return np.convolve(curve, np.full(window, 1 / window), mode="valid")


def table(
    what: str,
    curves: dict[str, list[float]],
    held_out: dict[str, float],
    rounded_otherwise: str,
    judged: Callable[[str], bool],
) -> str:
    """Each variant's distance from the first one, by smoothed curve and by held-out loss, and verdicts.

    Args:
        what: the variants are.
        curves: losses by step, by variant.
        held_out: loss on held-out text, by variant. Those whose names begin with "shuffled" tell what chance does.
        rounded_otherwise: the variant that tells what rounding alone does.
        judged: whether a variant is one to be judged.
    """
    reference = next(iter(curves))
    apart = {name: smooth(curve) - smooth(curves[reference]) for name, curve in curves.items()}
    rounding = np.abs(apart[rounded_otherwise]).max()
    chance = max(abs(held_out[name] - held_out[reference]) for name in held_out if name.startswith("shuffled"))
    lines = [
        f"| {what} | smoothed curve: mean, largest difference (rounding: {rounding:.5f}) | held-out loss | "
        f"difference (chance: {chance:.5f}) | within rounding x 2 | within chance |",
        "|---|---|---|---|---|---|",
    ]
    for name, difference in apart.items():
        largest, further = np.abs(difference).max(), held_out[name] - held_out[reference]
        curve = "" if name.startswith("shuffled") else f"{difference.mean():+.5f}, {largest:.5f}"
        verdicts = ["yes" if largest <= 2 * rounding else "no", "yes" if further <= chance else "no"]
        verdict = " | ".join(verdicts if judged(name) else ["", ""])
        lines.append(f"| {name} | {curve} | {held_out[name]:.4f} | {further:+.5f} | {verdict} |")
    return "\n".join(lines)
