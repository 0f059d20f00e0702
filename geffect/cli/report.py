"""`geffect report`: runs as one self-contained page."""

import base64
import io
from collections.abc import Mapping, Sequence
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from jinja2 import Environment, PackageLoader, StrictUndefined

from geffect.text import plain

from .options import OverwriteOption, check_output, choice
from .selection import By, written_as
from .terminal import say, terminal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from geffect import Run
    from geffect.demo.tables import Table

BARS = {"retain_nll": "inside", "retain_heldout_authors_nll": "outside"}
"""The columns of a study's tables with a bar, and what kind of bar."""


def command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Run files (.h5).")],
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            callback=written_as(".html"),
            help="The page to write (.html).",
        ),
    ],
    by: Annotated[
        By,
        choice("--by", By, "The rows of the pictures of G-effects and cosines", "BLOCKS"),
    ] = By.LAYER,
    overwrite: OverwriteOption = False,
) -> None:
    """Write the scores and pictures of one or several runs into a page that opens offline."""
    from geffect import open_run

    check_output(output, overwrite=overwrite)
    page = runs_report([open_run(path) for path in runs], by)
    output.write_text(page, encoding="utf-8")
    say(terminal(), f"{len(runs)} run{'s' * (len(runs) > 1)} in {output}")


def runs_report(runs: Sequence["Run"], by: str = By.LAYER) -> str:
    """The page of some runs: what was recorded, and for each its G-effects, cosines, conflicts.

    - `by`: what its pictures have a row for, one of `geffect.groups.LABELS`.
    """
    return _render("runs.html.jinja", by=by, runs=[_sections(run, by) for run in runs])


def study_report(summary: Mapping[str, Any], out: Path) -> str:
    """The page of a study, from its summary and the figures in `out`."""
    from geffect.demo import figures
    from geffect.demo.tables import COLUMNS, KEYS, tables

    main, *further = made = tables(summary)
    return _render(
        "study.html.jinja",
        summary=summary,
        figures={
            name: _embedded((out / "figures" / f"{name}.png").read_bytes())
            for name in figures.names(summary, out)
        },
        methods=list(dict.fromkeys(run["method"] for run in summary["runs"])),
        headings=[heading for heading, _ in (*KEYS.values(), *COLUMNS.values())],
        bars=BARS,
        main=_table(summary, main),
        further=[_table(summary, table) for table in further],
        files=[f"{table.name}.csv" for table in made],
    )


def _sections(run: "Run", by: str) -> dict[str, Any]:
    from geffect import plots
    from geffect.analysis import cosine, g_effect
    from geffect.analysis.rectified import acts, constrained

    last = g_effect(run, "model")
    last = last[last["step"] == last["step"].max()]
    return {
        "name": run.name,
        "manifest": run.manifest,
        "state": run.state,
        "steps": len(run.steps),
        "sources": run.sources,
        "losses": {name: (values[0], values[-1]) for name, values in run.losses().items()},
        "last": last.to_dict("records"),
        "changed": acts(run),
        "rates": _rates(run),
        "constrained": constrained(run),
        "g_effect": _drawn(plots.sheet(g_effect(run, by))),
        "cosine": _drawn(plots.sheet(cosine(run, "objective", "retain", by))),
        **_rectification(run),
        **_weights(run),
        **_effects(run),
    }


def _rates(run: "Run") -> list[tuple[str, dict[str, dict[str, float]]]]:
    """How often there is a conflict, and a violation, of the blocks that the rectifier constrains.

    What is of parameters is shown by layer. Scores of the same blocks share a table.
    """
    from geffect.analysis import conflict, violation
    from geffect.scores import blocks_of
    from geffect.sources import AVERAGE, UPDATE

    tables = {"conflict rate": conflict(run)}
    if UPDATE in run.sources and any(name.endswith(AVERAGE) for name in run.sources):
        violations = violation(run)
        several = violations.groupby("against", observed=True) if "against" in violations else ()
        tables |= {f"violation rate, {name}": own for name, own in several} or {
            "violation rate": violations
        }
    layer_of = {parameter.name: parameter.layer for parameter in run.layers}
    shown: dict[str, dict[str, dict[str, float]]] = {}
    for name, table in tables.items():
        by, blocks = blocks_of(table), table[blocks_of(table)].astype(str)
        if by == "parameter":
            by, blocks = "parameters of", blocks.map(layer_of)
        rates = table.groupby(blocks.rename(by), sort=False)["value"].mean()
        shown.setdefault(by, {})[name] = {str(block): rate for block, rate in rates.items()}
    return [*shown.items()]


def _rectification(run: "Run") -> dict[str, Any]:
    """What a rectifier did, of the model and of its own layers or groups, where there was one."""
    from geffect import plots
    from geffect.analysis import rectification

    if not run.contents.blocks:
        return {"rectified": None, "rectifications": {}}
    finer = {"group": "group", "layer": "layer", "parameter": "layer"}
    scope = (run.manifest["rectifier"] or {}).get("scope", "model")
    tables = {by: rectification(run, by) for by in ("model", finer.get(scope)) if by}
    means = tables["model"].groupby("quantity", observed=True)["value"].mean()
    return {
        "rectified": means.to_dict(),
        "rectifications": {by: _drawn(plots.rectification(t)) for by, t in tables.items()},
    }


def _weights(run: "Run") -> dict[str, Any]:
    """The picture of the implicit weights, where the run has them."""
    from geffect import plots
    from geffect.analysis import implicit_weights

    if not run.contents.weights:
        return {"weights": None}
    table = implicit_weights(run)
    mean = table[table["statistic"] == "mean"].drop(columns="statistic")
    return {"weights": _panel(plots.trajectory(mean))}


def _effects(run: "Run") -> dict[str, Any]:
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


def _table(summary: Mapping[str, Any], table: "Table") -> dict[str, Any]:
    """What a page shows of a table of a study; the models before unlearning come last."""
    from geffect.demo.tables import before, rows

    originals = before(summary, table.runs["retain_feed"].unique())
    shown = [*rows(table.runs), *rows(originals)]
    means = [row.values[name].mean for row in shown for name in BARS]
    return {
        "heading": table.heading,
        "rows": shown,
        "worst": max(mean for mean in means if not isnan(mean)),
    }


def _render(template: str, **values: Any) -> str:
    environment = Environment(
        loader=PackageLoader("geffect.cli"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_plain,
    )
    return environment.get_template(template).render(**values)


def _plain(value: Any) -> Any:
    """What a template writes: text on one line, to be escaped then; markup of our own as it is."""
    return plain(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def _panel(axes: "Axes") -> str:
    from matplotlib import pyplot

    figure = axes.get_figure(root=True)
    assert figure is not None
    pyplot.close(figure)  # which pyplot would keep, although the page is its only use
    return _drawn(figure)


def _drawn(figure: "Figure") -> str:
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=120)
    return _embedded(drawn.getvalue())


def _embedded(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
