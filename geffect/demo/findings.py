"""What the study shows, said from its numbers: the table of equal forgetting and the claims."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

Runs = Sequence[Mapping[str, Any]]

GAIN = 1.3
"""How many times lower the retain NLL of GRU has to be than plain, to count as better."""

SETTLED = 0.5
"""A G-effect that ends below this share of its peak has limited itself."""

AT_LEVEL = {
    "step": "step at the level",
    "retain_nll": "retain NLL",
    "retain_heldout_authors_nll": "retain NLL, authors outside the retain gradient",
    "world_nll": "world facts NLL",
    "forget_es": "forget extraction strength",
    "retain_es": "retain extraction strength",
    "forget_paraphrase_nll": "forget NLL, unseen paraphrases",
    "relearn_nll": "forget NLL after relearning the other half",
}
"""What is measured at the level of forgetting, with its name in words."""


def equal_forgetting(summary: Mapping[str, Any]) -> pd.DataFrame:
    """A row a run, at the forget NLL of the gold model of its seed, and a row for each gold model.

    Losses are nats per answer token; `relearn_nll` is the mean over the two halves. A run that did
    not reach the level has no values.
    """
    gold = [
        {"method": "gold", "variant": "retrained", "seed": int(seed), **_at_level(measured)}
        for seed, measured in summary["gold"].items()
    ]
    runs = [
        {
            **{k: run[k] for k in ("method", "variant", "seed", "learning_rate", "steps")},
            "reached_level": run["reached_level"],
            **_at_level(run["at_level"] or {}),
            "share_retaining_negative": run["share_retaining_negative"],
            "share_update_violating": run["share_update_violating"],
        }
        for run in summary["runs"]
    ]
    return pd.DataFrame([*runs, *gold])


def findings(runs: Runs) -> list[dict[str, Any]]:
    """Claims about the runs at hand, each with whether it holds and the numbers that say so."""
    methods = list(dict.fromkeys(run["method"] for run in runs))
    gains = [m for m in methods if m in ("ga", "wga", "npo")]
    return [
        _reached(runs),
        *[_negative_throughout(runs) for m in methods if m == "ga"],
        *[_limits_itself(runs, m) for m in methods if m in ("wga", "npo")],
        *[_gru_gains(runs, m) for m in gains],
        *[
            _lower(runs, method, "gru-update", ["gru"], key)
            for method in methods
            for key in ("retain_nll", "retain_heldout_authors_nll")
        ],
        *[
            _lower(runs, method, variant, ["gru", "gru-update"], key)
            for method in methods
            for variant in ("gru-coordinate", "select")
            for key in ("retain_nll", "retain_heldout_authors_nll")
            if _cells(runs, method, variant, "steps")
        ],
        _keeps_constraint(runs),
    ]


def _reached(runs: Runs) -> dict[str, Any]:
    short = [_name(run) for run in runs if not run["reached_level"]]
    return _finding("every run reached the gold level of forgetting", not short, {"not": short})


def _negative_throughout(runs: Runs) -> dict[str, Any]:
    shares = _cells(runs, "ga", "plain", "share_appreciable_retaining_negative")
    return _finding(
        "GA harms what should stay in every step: its retaining G-effect is negative wherever it "
        "is above a thousandth of its peak",
        all(share == 1.0 for share in shares.values()),
        {"share_of_appreciable_steps": shares}
        | {"share_of_all_steps": _cells(runs, "ga", "plain", "share_retaining_negative")},
    )


def _limits_itself(runs: Runs, method: str) -> dict[str, Any]:
    def last_over_peak(name: str) -> dict[int, float]:
        lowest = _cells(runs, name, "plain", "retaining_lowest")
        last = _cells(runs, name, "plain", "retaining_last")
        return {seed: last[seed] / lowest[seed] for seed in lowest}

    own, ga = last_over_peak(method), last_over_peak("ga")
    return _finding(
        f"{method.upper()} limits itself: its retaining G-effect ends below half of its peak, and "
        "nearer to zero than GA's does of its own",
        all(share < SETTLED and share < ga.get(seed, 1.0) for seed, share in own.items()),
        {"last_over_peak": own, "of_ga": ga},
    )


def _gru_gains(runs: Runs, method: str) -> dict[str, Any]:
    plain = _cells(runs, method, "plain", "retain_nll")
    gru = _cells(runs, method, "gru", "retain_nll")
    ratios = {seed: plain[seed] / gru[seed] for seed in plain.keys() & gru.keys()}
    return _finding(
        f"{method.upper()}: GRU keeps at least {GAIN} times lower retain NLL than plain, in every "
        "seed",
        bool(ratios) and all(ratio >= GAIN for ratio in ratios.values()),
        {"plain_over_gru": ratios},
    )


def _lower(
    runs: Runs, method: str, variant: str, others: Iterable[str], key: str
) -> dict[str, Any]:
    means = {name: _mean(_cells(runs, method, name, key)) for name in (variant, *others)}
    own = means[variant]
    return _finding(
        f"{method.upper()}: {variant} keeps a lower {AT_LEVEL[key]} than {' and '.join(others)}, "
        "mean over seeds",
        own is not None and all(means[o] is not None and own < means[o] for o in others),  # type: ignore[operator]
        {"means": means},
    )


def _keeps_constraint(runs: Runs) -> dict[str, Any]:
    shares: dict[str, list[float]] = {}
    for run in runs:
        shares.setdefault(run["variant"], []).append(run["share_update_violating"])
    projected = [name for name in ("gru-update", "gru-coordinate") if name in shares]
    return _finding(
        "the applied update never opposes the retain average in update space, and does so after "
        "AdamW when the gradient was projected",
        all(max(shares[name]) == 0.0 for name in projected) and max(shares["gru"]) > 0.0,
        {"mean_share_of_violating_steps": {n: sum(v) / len(v) for n, v in shares.items()}},
    )


def _finding(claim: str, holds: bool, numbers: Mapping[str, Any]) -> dict[str, Any]:
    return {"claim": claim, "holds": holds, "numbers": dict(numbers)}


def _cells(runs: Runs, method: str, variant: str, key: str) -> dict[int, float]:
    """The values of a method in a variant by seed; what is measured at the level where reached."""
    cells = {}
    for run in runs:
        if (run["method"], run["variant"]) == (method, variant):
            value = run.get(key, (run["at_level"] or {}).get(key))
            if value is not None:
                cells[run["seed"]] = value
    return cells


def _mean(cells: Mapping[int, float]) -> float | None:
    return sum(cells.values()) / len(cells) if cells else None


def _name(run: Mapping[str, Any]) -> str:
    return f"{run['method']}-{run['variant']}-seed{run['seed']}"


def _at_level(measured: Mapping[str, Any]) -> dict[str, float]:
    values = {key: measured[key] for key in AT_LEVEL if key in measured}
    if "relearn_nll" in values:
        values["relearn_nll"] = sum(values["relearn_nll"]) / len(values["relearn_nll"])
    return values
