"""Ways to the same thing, timed side by side: the contestants of a round run one after the other."""

import statistics
import time
from collections.abc import Callable

Times = dict[str, list[float]]  # seconds of each round, by contestant


def compare(
    contestants: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> Times:
    """Time each contestant over `rounds` rounds, behind one that warms up."""
    times: Times = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, run in contestants.items():
            start = clock()
            run()
            if number:
                times[name].append(clock() - start)
    return times


def show(times: Times, amount: float) -> None:
    """Print each one's `amount` a second by its median, and how many times the first one's that is."""
    first = statistics.median(next(iter(times.values())))
    for name, seconds in times.items():
        median = statistics.median(seconds)
        print(f"  {name:34} {amount / median:8.1f}   {first / median:5.2f} x", flush=True)
