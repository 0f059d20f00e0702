"""The page of an audit: the verdict, a picture of each battery, and what came back most."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any, Protocol

import pandas as pd

from geffect import plots
from geffect.numbers import percent
from geffect.pages import framed, word
from geffect.plots.conventions import Draws
from geffect.plots.inks import inks
from geffect.plots.svg import svg
from geffect.scores import Score, said
from geffect.text import in_html

from . import panels
from .attacks import baseline
from .came_back import BACK, shares_of_facts
from .geometry import ERASED, Geometry
from .models import ORIGINAL, UNLEARNED
from .sets import FORGET, HOLDOUT
from .summary import DIRECTLY
from .verdict import MEMORISED, PRIVACY, UTILITY, Verdict
from .words import TURNS, definitions

LISTED = 10
"""So many items are listed that came back most."""

SENTENCE = 30
"""More characters than this are a sentence, which wants room on a narrow screen."""

CODE = re.compile(r"`([^`]+)`")

STYLE = """
  .verdict { font-size: 1.2rem; border-left: .4rem solid #b3261e; padding: .4rem 1rem; }
  .verdict.good { border-color: #00875f; }
  th, td { text-align: left; vertical-align: top; } td.number { text-align: right; }
"""


class Reported(Protocol):
    """What an audit found, as `geffect.audit.AuditReport` holds it."""

    @property
    def judgement(self) -> Verdict: ...

    @property
    def table(self) -> pd.DataFrame: ...

    @property
    def items(self) -> pd.DataFrame: ...

    @property
    def manifest(self) -> dict[str, Any]: ...

    @property
    def geometry(self) -> Geometry | None: ...

    @property
    def controls(self) -> pd.DataFrame | None: ...

    @property
    def texts(self) -> Mapping[int, tuple[str, str]]: ...


def page(report: Reported) -> str:
    """The page as HTML, in one file that opens offline."""
    good = report.judgement.exit_code == 0
    told = [f"<p>{in_html(reason)}</p>" for reason in report.judgement.reasons]
    flags = [f"<li>{in_html(flag)}</li>" for flag in report.judgement.flags]
    head = [
        f"<h1>Audit of {in_html(report.manifest['roles'][UNLEARNED])}</h1>",
        f'<div class="verdict{" good" if good else ""}"><b>{in_html(report.judgement.verdict)}</b>',
        *told,
        "</div>",
        f"<ul>{''.join(flags)}</ul>" if flags else "",
    ]
    parts = [
        _models(report.manifest),
        *_pictures(report),
        *_geometry(report.geometry),
        _controls(report.controls),
        _came_back(report),
        _skipped(report.manifest["skipped"]),
        _facts(report.manifest),
        _thresholds(report.manifest["thresholds"]),
        _whole(report.table),
        definitions(),
    ]
    title = f"Audit: {report.judgement.verdict}"
    return framed(title, "\n".join(head), "\n".join(parts), style=STYLE)


def _pictures(report: Reported) -> Iterator[str]:
    table, limits = report.table, report.manifest["thresholds"]
    lines = {"hidden": limits["hidden"], "remembers": limits["remembers"], "original": 1.0}
    yield from _figure(
        "What is there, and what comes back",
        plots.shares,
        panels.shares(table),
        f"{word('Shares', 'share')} of what the original knows beyond a model that never knew, "
        f"with 95 % intervals. Hollow marks are {word('noise')}: how large the share of a model "
        f"seems that hides nothing.{_without_attack(table)}",
        lines=lines,
    )
    yield from _figure(
        "Asked directly",
        plots.shares,
        said(panels.measured(table, MEMORISED, DIRECTLY, of=FORGET), panels.OF_SCORES),
        f"Of the forget set: {word('probability', 'prob')}, {word('extraction strength', 'es')}, "
        f"{word('exact match', 'em')}, {word('ROUGE-L recall', 'rouge')}, as far as they were "
        "measured. The aim is the retrained model, not 0.",
    )
    yield from _figure(
        "Relearning",
        plots.relearning,
        panels.relearning(table),
        "NLL of the forget set, over the steps of training on the retain set alone.",
    )
    yield from _figure(
        "Depth",
        plots.depth,
        panels.depth(table),
        f"{word('Depth')}: by how much the output of each block, handed to the original, lowers "
        "log p of the answer.",
    )
    aucs = [m for m in table["metric"].unique() if str(m).startswith("AUC ")]
    yield from _figure(
        "Membership",
        plots.shares,
        said(panels.measured(table, PRIVACY, aucs), Score("AUC")),
        f"How well the forget set is told from a holdout ({word('AUC')}), by the loss or such as "
        f"{word('Min-K%', 'mink')}. The aim is the retrained model, not .5.",
        lines={"by chance": 0.5},
    )
    yield from _figure(
        "What stays",
        plots.shares,
        said(panels.measured(table, UTILITY, ("es",), label="set"), Score("extraction strength")),
        f"{word('Extraction strength', 'es')} of the sets that should stay.",
    )


def _without_attack(table: pd.DataFrame) -> str:
    """What attacks begin from that are held against the NLL, which is not among what is asked."""
    there = panels.share_of_nll(table)
    if there != there:
        return ""
    return (
        f" By the {word('NLL', 'nll')}, against which rounding, decoder swap and relearning are "
        f"held, {percent(there)} is there without an attack."
    )


def _geometry(found: Geometry | None) -> Iterator[str]:
    """The course of the run, and what of it goes with what was measured."""
    if found is None:
        return
    yield from _figure(
        "Geometry",
        plots.accumulated,
        found.course,
        "How far the updates of the run have raised each risk: lines as they predict it, points as "
        "it was measured.",
    )
    yield _plain(found.table)
    yield (
        f"<p>{word('rho', 'rho')} between a metric and the predicted fall of the risk, from 8 "
        f"points on; for {in_html(ERASED)} between what each block has lost and the rise of the "
        "forget risk there. gap: how far the predicted fall is from the measured one.</p>"
    )


def _controls(found: pd.DataFrame | None) -> str:
    """How the audit reads models of which it is known whether they forgot."""
    if found is None:
        return ""
    return (
        f"<h2>Controls</h2>{_plain(found)}<p>Models of which it is known what an audit should say: "
        "made of the original, and read as this model is. Where one is read wrong, so may this "
        "model be.</p>"
    )


def _plain(table: pd.DataFrame) -> str:
    """A table of words and numbers as it stands."""
    rows = [
        f"<tr>{''.join(_words(x) if isinstance(x, str) else _numeral(x) for x in row)}</tr>"
        for row in table.itertuples(index=False)
    ]
    return _table(tuple(map(str, table.columns)), rows)


def _words(said: object) -> str:
    """A cell of words, as wide as a sentence needs where it is one."""
    words = str(said)
    kind = ' class="says"' if len(words) > SENTENCE else ""
    return f"<td{kind}>{in_html(words)}</td>"


def _numeral(value: float) -> str:
    return f'<td class="number">{_number(value)}</td>'


def _number(value: float) -> str:
    if isinstance(value, Integral):
        return str(value)
    return "" if pd.isna(value) else format(value, ".4g")


def _figure(title: str, plot: Draws, table: pd.DataFrame, says: str, **how: Any) -> Iterator[str]:
    """A section with a picture, where there is something in it; `says` is HTML of our own."""
    if len(table):
        picture = svg(plot(table, **how), title)
        yield (
            f"<h2>{in_html(title)}</h2>\n<figure>{picture}<figcaption>{says}</figcaption></figure>"
        )


def key(role: str) -> str:
    """The mark of a model in the pictures, in its colour, for text beside them.

    >>> key("retrained 2") == key("retrained"), key("unlearned")[-8:]
    (True, '●</span>')
    """
    model = role.rstrip(" 0123456789")  # of several that were retrained each has a number
    colour = inks([model])[model].colour
    return f'<span style="color:{colour}">{"●" if model == UNLEARNED else "○"}</span>'


def _came_back(report: Reported) -> str:
    """The facts that the strongest attack brought back, or that it brought back none."""
    attack = report.judgement.attack
    beside = None if attack is None else baseline(attack)
    if attack is None or beside is None:
        return ""
    facts = shares_of_facts(report.items, attack)
    back = facts[facts["share"] > BACK]
    most = f" The {LISTED} with the largest share:" if len(back) > LISTED else ""
    says = (
        f"<p>{len(back) or 'None'} of {len(facts)} facts came back by {in_html(attack)}: after it "
        "they are nearer to the original than to a model that never knew "
        f"({word('share')} above {BACK:g}). Values are of {in_html(beside.metric)}, before and "
        f"after.{most}</p>"
    )
    rows = []
    for fact in back.head(LISTED).to_dict("records"):
        question, answer = report.texts.get(int(fact["item"]), ("", ""))
        cells = (fact["item"], fact["subject"], question, answer)
        numbers = (fact[name] for name in ("share", "before", "after", "floor", "original"))
        rows.append(f"<tr>{''.join(map(_words, cells))}{''.join(map(_numeral, numbers))}</tr>")
    heads = (
        "item", "subject", "question", "answer", "share", "before", "after", "never knew",
        "original",
    )  # fmt: skip
    return f"<h2>What came back most</h2>\n{says}{_table(heads, rows) if rows else ''}"


def _models(manifest: Mapping[str, Any]) -> str:
    rows = [
        f"<tr><td>{key(role)} {in_html(role)}</td><td>{in_html(told['name'])}</td>"
        f"<td>{in_html(told['kind'])}</td><td>{in_html(told['class'])}</td>"
        f"<td>{in_html(', '.join(told['dtype']))}</td></tr>"
        for role, told in manifest["models"].items()
    ]
    return _table(("model", "name", "form", "class", "type"), rows)


def _skipped(skipped: Mapping[str, str]) -> str:
    if not skipped:
        return ""
    listed = "".join(
        f"<li><b>{in_html(what)}</b>: {_coded(why)}</li>" for what, why in skipped.items()
    )
    return f"<h2>What could not be measured</h2><ul>{listed}</ul>"


def _coded(said: str) -> str:
    """A sentence in HTML, with the names that stand between backticks in it as code."""
    return CODE.sub(r"<code>\1</code>", in_html(said))


def _facts(manifest: Mapping[str, Any]) -> str:
    sets = [
        f"<tr><td>{in_html(name)}</td><td>{in_html(told['source'] or 'given')}</td>"
        f'<td class="number">{told["items"]}</td><td class="number">{told["subjects"]}</td>'
        f"{_words(told['first'] or '')}</tr>"
        for name, told in manifest["sets"].items()
    ]
    heads = ("set", "from", "items", "subjects", "the first, scored between [[ and ]]")
    rate = manifest["learning_rate"]
    how = "given" if rate["given"] else "taken from the size of the weights"
    return (
        f"<h2>How it was made</h2>{_table(heads, sets)}"
        f"<p>Budget {in_html(manifest['budget']['name'])}; learning rate of relearning "
        f"{rate['value']:g}, {how}; {manifest['seconds']} s.</p>"
    )


def _thresholds(limits: Mapping[str, float]) -> str:
    """Where the verdict turns, in words; the names are those of Python."""
    rows = [
        f'<tr><td class="says">{in_html(TURNS[name])}</td><td class="number">{value:g}</td>'
        f"<td><small><code>{in_html(name)}</code></small></td></tr>"
        for name, value in limits.items()
    ]
    heads = ("what it decides", "threshold", "of geffect.audit.Thresholds")
    return f"<h2>Where the verdict turns</h2>{_table(heads, rows)}"


def _whole(table: pd.DataFrame) -> str:
    shown = table[table["set"].ne(HOLDOUT) | table["model"].eq(ORIGINAL)]
    rows = []
    for row in shown.to_dict("records"):
        keys = "".join(f"<td>{in_html(row[c])}</td>" for c in ("battery", "metric", "set", "model"))
        values = "".join(_numeral(row[c]) for c in ("value", "low", "high", "n"))
        rows.append(f"<tr>{keys}{values}</tr>")
    whole = _table([*map(str, table.columns)], rows)
    return f"<details><summary>All values</summary>{whole}</details>"


def _table(heads: Sequence[str], rows: Iterable[str]) -> str:
    """A table whose headings sort it; the rows are HTML."""
    named = "".join(f"<th>{in_html(head)}</th>" for head in heads)
    return (
        f'<div class="wide"><table class="sortable"><thead><tr>{named}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )
