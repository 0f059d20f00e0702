"""What the study shows, said from its numbers: claims, each with whether it holds."""

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from geffect import Run, open_run
from geffect.analysis import g_effect, violation
from geffect.numbers import percent

from . import claims, hiding_claims
from .claims import INSIDE, OUTSIDE, WORLD, Gold, Runs
from .columns import AT_LEVEL
from .methods import DEEPER, FEW, HIDES, RATES, SETS, THIN

GAIN = 1.3
"""How many times lower the retain NLL of GRU has to be than plain, to count as better."""

APPRECIABLE = 1e-3
"""Of its peak: a model that has memorised its data starts with almost no gradient, of any sign."""

MOST = 0.9
"""The share of appreciable steps that has to have a sign for a run to have it: among the first of
them are some whose sign is that of the batch."""

KEEPING = (
    "gru-update",
    "gru-coordinate",
    "select-coordinate",
    "gru-retain-adam",
    "gru-world-update",
    "nearest-update",
    "gu",
    *(name for base, own in DEEPER.items() if base != "select" for name in own),
)
"""The variants that constrain the step that is applied."""

ORDER = (
    (("gru",), "plain", "from plain to gru"),
    (("gru-update",), "gru", "from gru to gru-update"),
    (THIN, "sago", "from SAGO to the best of coordinate and selective steps"),
)
"""Which variants should harm less than which, each at its best learning rate, and in words."""


def shares(path: Path) -> dict[str, float]:
    """What the findings need of a run file, in one number each.

    A step violates if the applied update opposes, beyond rounding, any of the averages that the
    rectifier protects.
    """
    run = open_run(path)
    effect = g_effect(run, by="model").query("effect == 'retaining'")["value"]
    appreciable = effect[effect.abs() > APPRECIABLE * effect.abs().max()]
    return {
        "share_retaining_negative": float((effect < 0).mean()),
        "share_appreciable_retaining_negative": float((appreciable < 0).mean()),
        "retaining_lowest": float(effect.min()),
        "retaining_last": float(effect.iloc[-1]),
        "share_update_violating": _violating(run),
    }


def findings(runs: Runs, further: Runs = (), gold: Gold | None = None) -> list[dict[str, Any]]:
    """Claims about the runs at hand, each with whether it holds, where not, and the numbers.

    `runs` are those at equal forgetting, `further` their controls, `gold` the retrained models by
    their seeds. A claim is made where there is something to compare. A run that did not reach the
    level is an exception to every claim about the level.
    """
    methods = list(dict.fromkeys(run["method"] for run in runs))
    variants = {method: {r["variant"] for r in runs if r["method"] == method} for method in methods}
    plain = {method for method in methods if "plain" in variants[method]}
    gaining = [m for m in ("ga", "wga", "npo") if {"plain", "gru"} <= variants.get(m, set())]
    comparisons = [
        (variant, others, [m for m in methods if {variant, *others} <= variants[m]])
        for variant, others in (
            ("gru-update", ["gru"]),
            ("gru-coordinate", ["gru", "gru-update"]),
            ("select", ["gru", "gru-update"]),
        )
    ]
    few = [run for run in further if run["part"] == FEW]
    reached = _reached(runs, further)
    hiding = hiding_claims.seen_through([*runs, *further], gold or {})
    # What only seems to forget is no rival of what does.
    further = [run for run in further if run["part"] != HIDES]
    return [
        reached,
        *([_negative_throughout(runs)] if "ga" in plain else []),
        *([_milder(runs)] if {"ga", "wga"} <= plain else []),
        *[_limits_itself(runs, m) for m in methods if m in ("wga", "npo") and {m, "ga"} <= plain],
        *([_gru_gains(runs, gaining)] if gaining else []),
        *[
            _lower(runs, compared, variant, others, key)
            for variant, others, compared in comparisons
            for key in (INSIDE, OUTSIDE)
            if compared
        ],
        *[
            _below_sago(part, compared, at)
            for part in (runs, few)
            for at in ("at_level", "at_es")
            if (compared := _with_sago(part, at))
        ],
        *_at_their_best(runs, further),
        *_protects_both(runs, further),
        *_keeps_constraint([*runs, *further]),
        *hiding_claims.as_deep(runs),
        *hiding_claims.no_more(runs),
        *hiding_claims.less_at_a_copy(runs),
        *hiding_claims.near_the_retrained(runs, gold or {}),
        *hiding,
    ]


def _reached(runs: Runs, further: Runs) -> dict[str, Any]:
    def name(run: Mapping[str, Any]) -> str:
        return f"{run['method']}-{run['variant']}-seed{run['seed']}"

    short = [
        *[name(run) for run in runs if not run["reached_level"]],
        *[
            f"{name(run)} with {run['retain_feed']} QA at learning rate {run['learning_rate']:g}"
            for run in further
            if not run["reached_level"]
        ],
    ]
    planned = len(runs) + len(further)
    return claims.finding(
        "Every run reached the gold level of forgetting",
        short,
        [f"{planned - len(short)} of {planned}"],
        {"runs": planned},
    )


def _negative_throughout(runs: Runs) -> dict[str, Any]:
    shares = claims.cells(runs, "ga", "plain", "share_appreciable_retaining_negative")
    return claims.finding(
        "GA harms what should stay: its retaining G-effect is negative in more than nine of ten "
        "steps, not counting those below a thousandth of its peak (a single step may have the sign "
        f"of its batch), {claims.each(shares)}",
        [f"seed {seed}" for seed, share in shares.items() if not share > MOST],
        [
            f"{claims.of_seed(seed, shares)}{percent(share)} of steps"
            for seed, share in shares.items()
        ],
        {
            "share_of_appreciable_steps": shares,
            "share_of_all_steps": claims.cells(runs, "ga", "plain", "share_retaining_negative"),
        },
    )


def _milder(runs: Runs) -> dict[str, Any]:
    # Only of WGA, whose loss is a token mean as GA's is: NPO's sums are larger by their length.
    wga, ga = (claims.cells(runs, method, "plain", "retaining_lowest") for method in ("wga", "ga"))
    return claims.finding(
        f"WGA is milder than GA: its retaining G-effect never falls as low, {claims.each(wga)}",
        [f"seed {seed}" for seed, lowest in wga.items() if not lowest > ga[seed]],
        [
            f"{claims.of_seed(seed, wga)}{claims.said(own)} against GA's {claims.said(ga[seed])}"
            for seed, own in wga.items()
        ],
        {"lowest": wga, "of_ga": ga},
    )


def _limits_itself(runs: Runs, method: str) -> dict[str, Any]:
    def last_over_peak(name: str) -> dict[int, float]:
        lowest = claims.cells(runs, name, "plain", "retaining_lowest")
        last = claims.cells(runs, name, "plain", "retaining_last")
        return {seed: last[seed] / lowest[seed] for seed in lowest}

    own, ga = last_over_peak(method), last_over_peak("ga")
    return claims.finding(
        f"{method.upper()} limits itself: its retaining G-effect has fallen back from its peak at "
        f"the end of the run, and further than GA's, {claims.each(own)}",
        [f"seed {seed}" for seed, share in own.items() if not share < min(1.0, ga[seed])],
        [
            f"{claims.of_seed(seed, own)}to {percent(own[seed])} of its peak, "
            f"GA's to {percent(ga[seed])}"
            for seed in own
        ],
        {"last_over_peak": own, "of_ga": ga},
    )


def _gru_gains(runs: Runs, methods: Sequence[str]) -> dict[str, Any]:
    plain, gru = (
        {method: claims.cells(runs, method, variant, "retain_nll") for method in methods}
        for variant in ("plain", "gru")
    )
    ratios = {
        method: {seed: plain[method][seed] / gru[method][seed] for seed in plain[method]}
        for method in methods
    }
    return claims.finding(
        f"At equal forgetting GRU keeps a retain NLL at least {GAIN} times lower than plain, for "
        f"{', '.join(methods)}, {claims.each(ratios[methods[0]])}",
        [
            f"{method} seed {seed}"
            for method, by_seed in ratios.items()
            for seed, ratio in by_seed.items()
            if not ratio >= GAIN
        ],
        [
            f"{method} {claims.of_seed(seed, by_seed)}{claims.nats(gru[method][seed])} against "
            f"{claims.said(plain[method][seed])}, {claims.said(ratio)} times lower"
            for method, by_seed in ratios.items()
            for seed, ratio in by_seed.items()
        ],
        {"plain_over_gru": ratios},
    )


def _lower(
    runs: Runs, methods: Sequence[str], variant: str, others: Sequence[str], key: str
) -> dict[str, Any]:
    """Whether the mean over seeds is lower than that of each of the others, by method."""
    means = {
        method: {
            name: claims.mean(claims.cells(runs, method, name, key)) for name in (variant, *others)
        }
        for method in methods
    }
    return claims.finding(
        f"At equal forgetting {variant} keeps a lower {AT_LEVEL[key]} than {' and '.join(others)}, "
        f"{claims.mean_over(runs)}",
        [
            method
            for method, mean in means.items()
            if not all(mean[variant] < mean[other] for other in others)
        ],
        [
            f"{method} {claims.against(mean[variant], {name: mean[name] for name in others})}"
            for method, mean in means.items()
        ],
        {"means": means},
    )


def _below_sago(runs: Runs, methods: Sequence[str], at: str) -> dict[str, Any]:
    """Whether a thin variant keeps a lower mean over seeds outside than SAGO, by method."""
    means = {
        method: {
            v: claims.mean(claims.cells(runs, method, v, OUTSIDE, at)) for v in ("sago", *THIN)
        }
        for method in methods
    }
    level = "forgetting" if at == "at_level" else "extraction strength"
    return claims.finding(
        f"At equal {level}, with {runs[0]['retain_feed']} QA feeding the retain gradient, the best "
        f"of coordinate and selective steps keeps a lower {AT_LEVEL[OUTSIDE]} than SAGO, "
        f"{claims.mean_over(runs)}",
        [method for method, mean in means.items() if not claims.best(mean, THIN) < mean["sago"]],
        [
            f"{method} {claims.against(claims.best(mean, THIN), {'sago': mean['sago']})}"
            for method, mean in means.items()
        ],
        {"means": means},
    )


def _with_sago(runs: Runs, at: str) -> list[str]:
    """The methods in which SAGO and a thin variant were run up to a level."""
    reached = {(run["method"], run["variant"]) for run in runs if run.get(at)}
    methods = dict.fromkeys(run["method"] for run in runs)
    return [m for m in methods if (m, "sago") in reached and any((m, v) in reached for v in THIN)]


def _at_their_best(runs: Runs, further: Runs) -> list[dict[str, Any]]:
    """Whether the order of the variants holds with each at the best of its learning rates."""
    best: dict[str, dict[str, float]] = {}
    for method, feed in dict.fromkeys(
        (run["method"], run["retain_feed"]) for run in further if run["part"] == RATES
    ):
        of_cell = [
            run
            for run in (*runs, *further)
            if (run["method"], run["retain_feed"]) == (method, feed) and run["part"] != SETS
        ]
        means: dict[str, dict[float, float]] = {}
        for variant, rate in dict.fromkeys((r["variant"], r["learning_rate"]) for r in of_cell):
            at_rate = [run for run in of_cell if run["learning_rate"] == rate]
            means.setdefault(variant, {})[rate] = claims.mean(
                claims.cells(at_rate, method, variant, OUTSIDE)
            )
        name = f"{method}, {feed} QA"
        best[name] = {v: claims.best(by_rate, by_rate) for v, by_rate in means.items()}
    compared = {
        name: [
            (lower, higher, words)
            for lower, higher, words in ORDER
            if higher in means and any(variant in means for variant in lower)
        ]
        for name, means in best.items()
    }
    falls = list(dict.fromkeys(words for pairs in compared.values() for *_, words in pairs))
    if not falls:
        return []
    return [
        claims.finding(
            "At equal forgetting, with each variant at the best of its learning rates, the "
            f"{AT_LEVEL[OUTSIDE]} falls {', '.join(falls)}, {claims.mean_over(runs)}",
            [
                f"{name}: {' or '.join(lower)}"
                for name, pairs in compared.items()
                for lower, higher, _ in pairs
                if not claims.best(best[name], lower) < best[name][higher]
            ],
            [
                f"{name}: {' or '.join(lower)} "
                f"{claims.against(claims.best(best[name], lower), {higher: best[name][higher]})}"
                for name, pairs in compared.items()
                for lower, higher, _ in pairs
            ],
            {"lowest_means": best},
        )
    ]


def _protects_both(runs: Runs, further: Runs) -> list[dict[str, Any]]:
    """Whether `nearest` against two retain sets keeps each better than a rule that knows one."""
    with_sets = [run for run in further if run["part"] == SETS]
    methods = list(dict.fromkeys(run["method"] for run in with_sets))
    if not methods:
        return []
    cells = {
        f"{method}, {space} space": {
            name: {
                key: claims.mean(claims.cells([*runs, *with_sets], method, variant, key))
                for key in (INSIDE, WORLD)
            }
            for name, variant in (
                ("plain", "plain"),
                ("authors", "gru" + suffix),
                ("world", "gru-world" + suffix),
                ("both", "nearest" + suffix),
            )
        }
        for method, (space, suffix) in product(methods, (("gradient", ""), ("update", "-update")))
    }
    return [
        claims.finding(
            "At equal forgetting `nearest`, against authors and world facts, keeps both: a lower "
            f"{AT_LEVEL[INSIDE]} than GRU against the world facts alone, a lower {AT_LEVEL[WORLD]} "
            "than GRU against the authors alone, and both lower than plain, "
            f"{claims.mean_over([*runs, *with_sets])}",
            [
                f"{cell}: {AT_LEVEL[key]}"
                for cell, means in cells.items()
                for key, other in ((INSIDE, "world"), (WORLD, "authors"))
                if not all(means["both"][key] < means[x][key] for x in (other, "plain"))
            ],
            [
                f"{cell}, {AT_LEVEL[key]}: "
                + claims.against(means["both"][key], {x: means[x][key] for x in (other, "plain")})
                for cell, means in cells.items()
                for key, other in ((INSIDE, "world"), (WORLD, "authors"))
            ],
            {"means": cells},
        )
    ]


def _keeps_constraint(runs: Runs) -> list[dict[str, Any]]:
    shares: dict[str, list[float]] = {}
    for run in runs:
        shares.setdefault(run["variant"], []).append(run["share_update_violating"])
    keeping = [variant for variant in KEEPING if variant in shares]
    if not keeping:
        return []
    means = {variant: sum(of) / len(of) for variant, of in shares.items()}
    told = [*keeping, *(["gru"] if "gru" in shares else [])]
    return [
        claims.finding(
            "In update space no applied update opposes a retain average; AdamW makes some do so "
            "after the gradient alone was projected",
            [
                *[v for v in keeping if any(share != 0.0 for share in shares[v])],
                *(["gru"] if max(shares.get("gru", [1.0])) == 0.0 else []),
            ],
            [f"{variant} {claims.finely(means[variant])} of steps" for variant in told],
            {"mean_share_of_violating_steps": means},
        )
    ]


def _violating(run: Run) -> float:
    """The share of steps whose update opposes a retain average, beyond rounding."""
    opposes = violation(run, by="model").groupby("step")["value"].max()
    return float(opposes.fillna(0.0).mean())
