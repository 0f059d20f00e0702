"""The pictures of a study, drawn from its run files and its summary."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from geffect import Run, open_run
from geffect.analysis import conflict, cosine, g_effect
from geffect.plots import crossings, facets, heatmap, profile, sheet, tradeoff, trajectory
from geffect.plots.figures import new_figure, save
from geffect.scores import stack

from .claims import OUTSIDE, TAUGHT
from .methods import EQUAL, in_one_picture
from .tables import compared

FORMATS = ("png", "pdf")

DRAWN = ("plain", "gru", "gru-update", "gru-coordinate", "select", "select-relearned", "sago")
"""The variants in the figures; the tables have all."""

Runs = dict[tuple[str, str], Run]  # by method and variant


def draw(name: str, summary: Mapping[str, Any], out: Path) -> None:
    """Write one figure into out/figures, as PNG and PDF."""
    figure = _figures(summary, out)[name]()
    for kind in FORMATS:
        save(figure, out / "figures" / f"{name}.{kind}", dpi=150)


def names(summary: Mapping[str, Any], out: Path) -> list[str]:
    """The names of all figures of a study."""
    return list(_figures(summary, out))


def _figures(summary: Mapping[str, Any], out: Path) -> dict[str, Callable[[], Figure]]:
    """Every figure by name. Curves and heatmaps are of the lowest seed: gold levels differ."""
    seed = min(run["seed"] for run in summary["runs"])
    every = [run for run in summary["runs"] if run["seed"] == seed]
    of_seed = [run for run in every if run["variant"] in DRAWN] or every
    runs = {(run["method"], run["variant"]): open_run(out / run["file"]) for run in of_seed}
    plain = {method: run for (method, variant), run in runs.items() if variant == "plain"}
    level = summary["gold"][str(seed)]["forget_nll"]
    heatmaps: dict[str, Callable[[], Figure]] = {
        f"g_effect_{method}": partial(_heatmaps, run) for method, run in plain.items()
    }
    return {
        "tradeoff": lambda: facets(
            _curves(of_seed, level), partial(tradeoff, level=level), "method"
        ),
        **({"recognition": lambda: _recognition(summary)} if _is_recognised(summary) else {}),
        **(
            {"comparison": lambda: _comparison(summary, seed, level)}
            if in_one_picture(summary)
            else {}
        ),
        **heatmaps,
        **{f"sheet_{m}": partial(_sheet, run) for m, run in [*plain.items()][:1]},
        "cosine": lambda: facets(_cosines(runs), trajectory, "method"),
        **({"conflict": lambda: _conflict_rates(plain)} if plain else {}),
    }


def _sheet(run: Run) -> Figure:
    return sheet(g_effect(run))


def _heatmaps(run: Run) -> Figure:
    return facets(g_effect(run), heatmap, "effect")


def _comparison(summary: Mapping[str, Any], seed: int, level: float) -> Figure:
    """Every run and edit of a seed, by variant: the retain loss outside over the forget loss."""
    made = [run for run in (*summary["runs"], *summary.get("edits", ())) if run["seed"] == seed]
    table = _curves([run for run in made if run["curve"]], level, OUTSIDE)
    return crossings(
        table, "variant", OUTSIDE, level=level, label="retain NLL outside the retain gradient"
    )


def _is_recognised(summary: Mapping[str, Any]) -> bool:
    """Whether runs tell how far facts are recognised once others are taught."""
    reached = [run["at_level"] for run in summary["runs"] if run["at_level"]]
    return any(at.get(TAUGHT) is not None for at in reached)


def _recognition(summary: Mapping[str, Any]) -> Figure:
    """Retain loss outside over recognition after the attack, at equal forgetting: points.

    Means over the seeds that reached the level; the gold model, in a corner, is what to reach.
    """
    found = compared(summary, "at_level", EQUAL).dropna(subset=[TAUGHT])
    of = ["method", "variant"]
    table = found.groupby(of, sort=False)[[TAUGHT, OUTSIDE]].mean().reset_index()
    table = table.assign(step=0, at_level=True).astype(
        {name: _in_order(table[name]) for name in of}
    )
    figure = new_figure(6.4, 4.2)
    tradeoff(table, x=TAUGHT, y=OUTSIDE, ax=figure.subplots())
    return figure


def _curves(runs: list[Mapping[str, Any]], level: float, kept: str = "retain_nll") -> pd.DataFrame:
    """The points of every run's curve, and the one at the level."""
    curves = []
    for run in runs:
        curve = pd.DataFrame(run["curve"]).assign(at_level=False)
        if run["at_level"]:
            step = run["at_level"]["step"]  # an edit has none: its curve ends at the level
            there = {"step": len(curve) if step is None else step, kept: run["at_level"][kept]}
            crossing = pd.DataFrame([{**there, "forget_nll": level, "at_level": True}])
            curve = pd.concat([curve, crossing], ignore_index=True)
        curves.append(curve.assign(method=run["method"], variant=run["variant"]))
    table = pd.concat(curves, ignore_index=True)
    return table.astype({name: _in_order(table[name]) for name in ("method", "variant")})


def _cosines(runs: Runs) -> pd.DataFrame:
    """cos(objective, retain) of the whole model, by variant and method."""
    methods: dict[str, dict[str, pd.DataFrame]] = {}
    for (method, variant), run in runs.items():
        table = cosine(run, "objective", "retain", by="model")
        methods.setdefault(method, {})[variant] = table
    return stack({m: stack(tables, "variant") for m, tables in methods.items()}, "method")


def _conflict_rates(plain: Mapping[str, Run]) -> Figure:
    """The share of steps in which a layer's objective gradient opposes the retain gradient."""
    conflicts = {method: conflict(run, by="layer") for method, run in plain.items()}
    figure = new_figure(6.4, 3.6)
    profile(stack(conflicts, "method"), ax=figure.subplots())
    return figure


def _in_order(column: "pd.Series[str]") -> pd.CategoricalDtype:
    return pd.CategoricalDtype(column.drop_duplicates(), ordered=True)
