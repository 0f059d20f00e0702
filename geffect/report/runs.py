"""`geffect report`: runs held against each other on one page, and then each by itself."""

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from geffect.groups import By
from geffect.pages import page
from geffect.store import Run

from . import charts
from .divergence import against_the_first
from .findings import compared, findings
from .overlays import overlays, unit_of
from .read import Read, objective_of, opened, rectifier_of
from .study import embedded
from .summary import COLUMNS, rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def runs_report(runs: Sequence[Run], by: By = "layer") -> str:
    """The page of some runs: a table of all, overlays, where they part, and each by itself.

    - `by`: what its maps have a row for, one of `geffect.groups.LABELS`.

    Raises a ValueError where no run is given.

    >>> page = runs_report([example_run()])
    >>> page.count("<h2"), page.startswith("<!doctype html>")
    (4, True)
    """
    if not runs:
        raise ValueError(
            "`runs` should be one run or more. Found none. Pass [geffect.open_run(path)]."
        )
    several = opened(runs, by)
    scales = charts.Scales.of(several)
    return page(
        "runs.html.jinja",
        "geffect.report",
        by=by if isinstance(by, str) else "group",
        columns=COLUMNS,
        units=_units(several),
        rows=rows(several),
        compared=compared(several),
        overlays=overlays(several) if len(several) > 1 else [],
        parted=against_the_first(several),
        runs=[_sections(read, scales, len(several)) for read in several],
    )


def _sections(read: Read, scales: charts.Scales, count: int) -> dict[str, Any]:
    run, most = read.run, charts.most_of_maps(read, count)
    drawn = charts.OfRun(read, scales, most)
    last = read.effects.groupby("effect", observed=True, sort=False).tail(1)
    return {
        "name": read.name,
        "anchor": read.anchor,
        "metadata": [
            f"{name}: {in_words(value)}"
            for name, value in (run.manifest.get("metadata") or {}).items()
        ],
        "model": _model(run.manifest.get("model") or {}),
        "made": _made(run.manifest),
        "objective": objective_of(run.manifest),
        "rectifier": rectifier_of(run.manifest),
        "state": run.state,
        "steps": len(run.steps),
        "repeats": read.repeats,
        "thinned": len(read.steps) > most,
        "sources": run.sources,
        "losses": {name: (values[0], values[-1]) for name, values in read.losses.items()},
        "last": last.to_dict("records"),
        "findings": findings(read),
        "changed": read.rectified,
        "rates": read.rates(),
        "constrained": read.constrained,
        "courses": [*drawn.losses(), *drawn.course()],
        "effects": drawn.effects(),
        "cosine": [drawn.cosine()],
        "rectification": drawn.rectification(),
        "weights": drawn.weights(),
        **_effects(run),
    }


def _units(several: Sequence[Read]) -> str:
    """The unit of the G-effects of the table; of each run where they are not the same."""
    units = {read.name: unit_of(read) for read in several}
    if len({*units.values()}) == 1:
        return units[several[0].name]
    return ", ".join(f"of {name} {unit}" for name, unit in units.items())


def _model(told: Mapping[str, Any]) -> str:
    numbers = told.get("trainable_numbers")
    count = f" with {numbers:,} trainable numbers" if isinstance(numbers, int) else ""
    return f"{told.get('class', 'a model')}{count}"


def _made(manifest: Mapping[str, Any]) -> list[str]:
    """When, by which packages, of which losses, by which rectifier and optimizer."""
    versions = manifest.get("versions") or {}
    told = {name: manifest.get(name) for name in ("losses", "rectifier", "optimizer")}
    return [
        f"recorded {manifest.get('created', 'at an unknown time')}",
        ", ".join(f"{package} {number}" for package, number in versions.items()),
        *(f"{name}: {in_words(value)}" for name, value in told.items()),
    ]


SAID = {"None": "none", "True": "yes", "False": "no"}


def in_words(value: Any) -> str:
    """What a file tells, as a reader would write it: what is inside of it stands in brackets.

    >>> in_words({"lr": 0.1 + 0.2, "betas": [0.9, 0.999], "select": None, "fused": True})
    'lr 0.3, betas (0.9, 0.999), select none, fused yes'
    >>> in_words({"protect": ["retain"], "groups": [{"lr": 0.1}]})
    'protect retain, groups (lr 0.1)'
    """
    value = _alone(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_inside(of)}" for name, of in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(_inside, value)) or "none"
    said = f"{value:.6g}" if isinstance(value, float) else str(value)
    return SAID.get(said, said)


def _inside(value: Any) -> str:
    is_several = bool(value) and isinstance(_alone(value), Mapping | list)
    return f"({in_words(value)})" if is_several else in_words(value)


def _alone(value: Any) -> Any:
    """What is alone in a list, else the value."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _effects(run: Run) -> Mapping[str, Any]:
    """The effects of samples as a picture, of tokens as text, where a run keeps them."""
    from geffect import plots
    from geffect.analysis import SAMPLES, TOKENS, kept

    samples, texts = None, []
    if SAMPLES in run.tables:
        samples = _panel(plots.contours(kept(run, SAMPLES)))
    if TOKENS in run.tables:
        told_apart = kept(run, TOKENS).groupby(["sample", "risk"], observed=True)
        for (sample, risk), part in told_apart:
            caption = f"sample {sample}, effect on the {risk} risk"
            texts.append((caption, plots.spans(part)))
    return {"samples": samples, "texts": texts}


def _panel(axes: "Axes") -> str:
    from geffect.plots.figures import figure_of

    drawn = io.BytesIO()
    figure_of(axes).savefig(drawn, format="png", dpi=100)
    return embedded(drawn.getvalue())
