"""What claims about a study are made of: cells of its runs, numbers in words, whether it holds."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from geffect.numbers import percent

Runs = Sequence[Mapping[str, Any]]
"""Runs of a study, as summary.json holds them."""

Gold = Mapping[str, Mapping[str, Any]]
"""What was measured of the retrained model of each seed."""

INSIDE, OUTSIDE, WORLD = "retain_nll", "retain_heldout_authors_nll", "world_nll"
MOST_BACK, TAUGHT = "audit_most", "recognition_taught"
"""What of a run claims are about, as summary.json calls it."""


def finding(
    claim: str, exceptions: list[str], measured: Sequence[str], numbers: Mapping[str, Any]
) -> dict[str, Any]:
    """A claim; where it fails; what was compared, in words; and all numbers, by name."""
    return {
        "claim": claim,
        "holds": not exceptions,
        "except": exceptions,
        "measured": "; ".join(measured),
        "numbers": _without_nan(numbers),
    }


def against(value: float, others: Mapping[str, float]) -> str:
    """Two losses or more side by side, in nats per token."""
    compared = ", ".join(f"{said(other)} ({name})" for name, other in others.items())
    return f"{nats(value)} against {compared}"


def nats(value: float) -> str:
    return said(value) if math.isnan(value) else f"{said(value)} nats"


def said(value: float) -> str:
    return "no value" if math.isnan(value) else f"{value:.3g}"


def finely(share: float) -> str:
    """In whole percents; what is less than one but not zero keeps a digit."""
    return percent(share, ".0f" if share == 0.0 or share >= 0.01 else ".1g")


def of_seed(seed: int, by_seed: Mapping[int, object]) -> str:
    """What tells one of several seeds apart."""
    return f"seed {seed}: " if len(by_seed) > 1 else ""


def each(by_seed: Mapping[int, object]) -> str:
    return "in every seed" if len(by_seed) > 1 else "in the one seed"


def in_seeds(runs: Runs) -> str:
    return each({run["seed"]: run for run in runs})


def mean_over(runs: Runs) -> str:
    several = len({run["seed"] for run in runs}) > 1
    return "on the mean over seeds" if several else "in the one seed"


def _without_nan(numbers: Any) -> Any:
    """The numbers for JSON, which has no NaN: None in its place."""
    if isinstance(numbers, Mapping):
        return {name: _without_nan(value) for name, value in numbers.items()}
    return None if numbers != numbers else numbers


def cells(
    runs: Runs, method: str, variant: str, key: str, at: str = "at_level"
) -> dict[int, float]:
    """The values of a method in a variant by seed; NaN where the level was not reached."""
    return {
        run["seed"]: run[key] if key in run else (run[at] or {}).get(key, math.nan)
        for run in runs
        if (run["method"], run["variant"]) == (method, variant)
    }


def mean(cells: Mapping[int, float]) -> float:
    return sum(cells.values()) / len(cells) if cells else math.nan


def best(means: Mapping[Any, float], of: Iterable[Any]) -> float:
    """The lowest of some values, of those that there are; NaN if there are none."""
    there = [means[name] for name in of if not math.isnan(means.get(name, math.nan))]
    return min(there, default=math.nan)


def number(value: float | None) -> float:
    return math.nan if value is None else value


def share(value: float) -> str:
    return "no value" if math.isnan(value) else percent(value)
