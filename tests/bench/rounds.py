"""Times of several loads in interleaved rounds, and their ratios.

Rounds of A B, B A, A B, ... let whatever else the machine does fall on both; a ratio is taken
within a round, and the median of the rounds is what counts.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

Load = Callable[[], object]
Clock = Callable[[Load], float]


def cpu_seconds(load: Load) -> float:
    """The processor time that a load takes in all threads of this process."""
    start = time.process_time()
    load()
    return time.process_time() - start


def cuda_seconds(load: Load) -> float:
    """The time that a load takes on the device, what the device waits for included."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    load()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1000


CLOCKS: Mapping[str, Clock] = {"cpu": cpu_seconds, "cuda": cuda_seconds}


@dataclass(frozen=True)
class Ratio:
    """A median over the rounds, and the distance between the quartiles.

    What is counted and not timed has one round and no spread.
    """

    ratio: float
    rounds: int = 1
    spread: float = 0.0


def interleaved(
    clock: Clock, rounds: int, loads: Mapping[str, Load], *, turns: int = 1
) -> dict[str, list[float]]:
    """The seconds of each load in each round, in which each has so many turns.

    A first round warms up and is not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in loads}
    order = list(loads)
    with _garbage_collected():
        for _ in range(1 + rounds):
            took = dict.fromkeys(loads, 0.0)
            for _ in range(turns):
                for name in order:
                    gc.collect()
                    took[name] += clock(loads[name])
                order.reverse()
            for name, times in seconds.items():
                times.append(took[name])
    return {name: times[1:] for name, times in seconds.items()}


def ratio(over: Sequence[float], under: Sequence[float]) -> Ratio:
    """The ratio of two loads, taken in each round.

    >>> ratio([2.0, 3.0, 9.0], [1.0, 1.0, 3.0])
    Ratio(ratio=3.0, rounds=3, spread=0.5)
    """
    ratios = [a / b for a, b in zip(over, under, strict=True)]
    low, _, high = statistics.quantiles(ratios, method="inclusive")
    return Ratio(statistics.median(ratios), len(ratios), high - low)


@contextmanager
def _garbage_collected() -> Iterator[None]:
    """A block in which only its own garbage is looked for, and none of it by chance.

    What was frozen before stays so: a suite of tests is slower without.
    """
    was_frozen = gc.get_freeze_count() > 0
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        if not was_frozen:
            gc.unfreeze()
