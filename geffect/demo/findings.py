"""What the study shows, said from its numbers: the table of equal forgetting and the claims."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from geffect import open_run
from geffect.analysis import conflict, g_effect, violation

Runs = Sequence[Mapping[str, Any]]

GAIN = 1.3
"""How many times lower the retain NLL of GRU has to be than plain, to count as better."""

APPRECIABLE = 1e-3
"""Of its peak: a model that has memorised its data starts with almost no gradient, of any sign."""

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


def as_markdown(table: pd.DataFrame) -> str:
    """The table of equal forgetting for a terminal or a README: means over the seeds."""
    columns = {
        "learning_rate": ("learning rate", "{:g}"),
        "step": ("steps", "{:.0f}"),
        "retain_nll": ("retain NLL inside", "{:.3f}"),
        "retain_heldout_authors_nll": ("outside", "{:.3f}"),
        "world_nll": ("world facts NLL", "{:.3f}"),
        "forget_es": ("forget ES", "{:.2f}"),
        "forget_paraphrase_nll": ("paraphrases NLL", "{:.2f}"),
        "relearn_nll": ("relearned NLL", "{:.2f}"),
        "share_update_violating": ("violating steps", "{:.2f}"),
    }
    lines = [["method", "variant", *(title for title, _ in columns.values())]]
    means = table.groupby(["method", "variant"], sort=False)[list(columns)].mean()
    for names, row in means.iterrows():
        cells = [
            "" if value != value else form.format(value)
            for value, (_, form) in zip(row, columns.values(), strict=True)
        ]
        lines.append([*names, *cells])  # type: ignore[misc]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rule = ["-" * widths[0], "-" * widths[1], *("-" * (width - 1) + ":" for width in widths[2:])]
    padded = [
        [
            c.ljust(w) if i < 2 else c.rjust(w)
            for i, (c, w) in enumerate(zip(x, widths, strict=True))
        ]
        for x in (lines[0], rule, *lines[1:])
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded) + "\n"


def shares(path: Path) -> dict[str, float]:
    """What the findings need of a run file, in one number each."""
    run = open_run(path)
    effect = g_effect(run, by="model").query("effect == 'retaining'")["value"]
    appreciable = effect[effect.abs() > APPRECIABLE * effect.abs().max()]
    return {
        "share_retaining_negative": float((effect < 0).mean()),
        "share_appreciable_retaining_negative": float((appreciable < 0).mean()),
        "retaining_lowest": float(effect.min()),
        "retaining_last": float(effect.iloc[-1]),
        "share_update_violating": float(violation(run)["value"].mean()),
        "share_layers_in_conflict": float(conflict(run)["value"].mean()),
    }


def findings(runs: Runs) -> list[dict[str, Any]]:
    """Claims about the runs at hand, each with whether it holds, where not, and the numbers.

    A claim is made where there is something to compare. A run that did not reach the level is an
    exception to every claim about the level.
    """
    methods = list(dict.fromkeys(run["method"] for run in runs))
    variants = {method: {r["variant"] for r in runs if r["method"] == method} for method in methods}
    plain = {method for method in methods if "plain" in variants[method]}
    gaining = [m for m in ("ga", "wga", "npo") if {"plain", "gru"} <= variants.get(m, set())]
    inside, outside = "retain_nll", "retain_heldout_authors_nll"
    comparisons = [
        (variant, others, [m for m in methods if {variant, *others} <= variants[m]])
        for variant, others in (
            ("gru-update", ["gru"]),
            ("gru-coordinate", ["gru", "gru-update"]),
            ("select", ["gru", "gru-update"]),
        )
    ]
    return [
        _reached(runs),
        *([_negative_throughout(runs)] if "ga" in plain else []),
        *([_milder(runs)] if {"ga", "wga"} <= plain else []),
        *[_limits_itself(runs, m) for m in methods if m in ("wga", "npo") and {m, "ga"} <= plain],
        *([_gru_gains(runs, gaining)] if gaining else []),
        *[
            _lower(runs, compared, variant, others, key)
            for variant, others, compared in comparisons
            for key in (inside, outside)
            if compared
        ],
        *([_keeps_constraint(runs)] if any("gru-update" in v for v in variants.values()) else []),
    ]


def _reached(runs: Runs) -> dict[str, Any]:
    short = [
        f"{run['method']}-{run['variant']}-seed{run['seed']}"
        for run in runs
        if not run["reached_level"]
    ]
    return _finding("Every run reached the gold level of forgetting", short, {"runs": len(runs)})


def _negative_throughout(runs: Runs) -> dict[str, Any]:
    shares = _cells(runs, "ga", "plain", "share_appreciable_retaining_negative")
    return _finding(
        "GA harms what should stay in every step: its retaining G-effect is negative wherever it "
        "is above a thousandth of its peak",
        [f"seed {seed}" for seed, share in shares.items() if share != 1.0],
        {
            "share_of_appreciable_steps": shares,
            "share_of_all_steps": _cells(runs, "ga", "plain", "share_retaining_negative"),
        },
    )


def _milder(runs: Runs) -> dict[str, Any]:
    # Only of WGA, whose loss is a token mean as GA's is: NPO's sums are larger by their length.
    wga, ga = (_cells(runs, method, "plain", "retaining_lowest") for method in ("wga", "ga"))
    return _finding(
        "WGA is milder than GA: its retaining G-effect never falls as low",
        [f"seed {seed}" for seed, lowest in wga.items() if not lowest > ga[seed]],
        {"lowest": wga, "of_ga": ga},
    )


def _limits_itself(runs: Runs, method: str) -> dict[str, Any]:
    def last_over_peak(name: str) -> dict[int, float]:
        lowest = _cells(runs, name, "plain", "retaining_lowest")
        last = _cells(runs, name, "plain", "retaining_last")
        return {seed: last[seed] / lowest[seed] for seed in lowest}

    own, ga = last_over_peak(method), last_over_peak("ga")
    return _finding(
        f"{method.upper()} limits itself: its retaining G-effect has fallen back from its peak at "
        "the end of the run, and further than GA's",
        [f"seed {seed}" for seed, share in own.items() if not share < min(1.0, ga[seed])],
        {"last_over_peak": own, "of_ga": ga},
    )


def _gru_gains(runs: Runs, methods: Sequence[str]) -> dict[str, Any]:
    plain, gru = (
        {method: _cells(runs, method, variant, "retain_nll") for method in methods}
        for variant in ("plain", "gru")
    )
    ratios = {
        method: {seed: plain[method][seed] / gru[method][seed] for seed in plain[method]}
        for method in methods
    }
    return _finding(
        f"At equal forgetting GRU keeps a retain NLL at least {GAIN} times lower than plain, for "
        f"{', '.join(method.upper() for method in methods)}, in every seed",
        [
            f"{method} seed {seed}"
            for method, by_seed in ratios.items()
            for seed, ratio in by_seed.items()
            if not ratio >= GAIN
        ],
        {"plain_over_gru": ratios},
    )


def _lower(
    runs: Runs, methods: Sequence[str], variant: str, others: Sequence[str], key: str
) -> dict[str, Any]:
    """Whether the mean over seeds is lower than that of each of the others, by method."""
    means = {
        method: {name: _mean(_cells(runs, method, name, key)) for name in (variant, *others)}
        for method in methods
    }
    return _finding(
        f"At equal forgetting {variant} keeps a lower {AT_LEVEL[key]} than {' and '.join(others)}, "
        "on the mean over seeds",
        [
            method
            for method, mean in means.items()
            if not all(mean[variant] < mean[other] for other in others)
        ],
        {"means": means},
    )


def _keeps_constraint(runs: Runs) -> dict[str, Any]:
    shares: dict[str, list[float]] = {}
    for run in runs:
        shares.setdefault(run["variant"], []).append(run["share_update_violating"])
    return _finding(
        "In update space no applied update opposes the retain average; AdamW makes some do so "
        "after the gradient alone was projected",
        [
            *[
                v
                for v in ("gru-update", "gru-coordinate")
                if not all(share == 0.0 for share in shares.get(v, []))
            ],
            *(["gru"] if max(shares.get("gru", [1.0])) == 0.0 else []),
        ],
        {
            "mean_share_of_violating_steps": {
                v: _mean(dict(enumerate(x))) for v, x in shares.items()
            }
        },
    )


def _finding(claim: str, exceptions: list[str], numbers: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "claim": claim,
        "holds": not exceptions,
        "except": exceptions,
        "numbers": _without_nan(numbers),
    }


def _without_nan(numbers: Any) -> Any:
    """The numbers for JSON, which has no NaN: None in its place."""
    if isinstance(numbers, Mapping):
        return {name: _without_nan(value) for name, value in numbers.items()}
    return None if numbers != numbers else numbers


def _cells(runs: Runs, method: str, variant: str, key: str) -> dict[int, float]:
    """The values of a method in a variant by seed; NaN where the level was not reached."""
    return {
        run["seed"]: run[key] if key in run else (run["at_level"] or {}).get(key, math.nan)
        for run in runs
        if (run["method"], run["variant"]) == (method, variant)
    }


def _mean(cells: Mapping[int, float]) -> float:
    return sum(cells.values()) / len(cells)


def _at_level(measured: Mapping[str, Any]) -> dict[str, float]:
    values = {key: measured[key] for key in AT_LEVEL if key in measured}
    if "relearn_nll" in values:
        values["relearn_nll"] = sum(values["relearn_nll"]) / len(values["relearn_nll"])
    return values
