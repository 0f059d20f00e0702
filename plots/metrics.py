"""Metrics as a table that is printed: settings below one another, metrics side by side."""

import re
from textwrap import wrap

import pandas as pd
from matplotlib.figure import Figure

from .figures import new_figure
from .fit import SEED, levels, once_only, require, seed_in
from .inks import QUIET
from .style import points
from .words import drawn, longest
from .words import title as put_title

WIDE = 11  # characters of a line of a heading
FEWEST = 10  # characters of a line of a setting
NOTHING = "-"
LINE, GAP = 1.3, 0.6  # of the size of the text


def metrics(table: pd.DataFrame, *, title: str | None = None, below: str = "") -> Figure:
    """A figure of a table: a row for each setting, a column for each metric.

    - `table`: `setting`, `metric` and `value`, one row for each pair; a pair that is not there, or
      undefined, is a dash. Of several values in a column `seed` the mean is shown, and the range
      below it.
    - `title`: above the table.
    - `below`: what is said below it.

    Returns the figure.

    >>> table = pd.DataFrame({"setting": ["GA", "NPO"], "metric": "forget quality",
    ...                       "value": [0.01, 0.72]})
    >>> [text.get_text() for text in metrics(table).axes[0].texts]
    ['forget\\nquality', 'GA', '0.0100', 'NPO', '0.720']
    """
    require(table, ["setting", "metric", "value"])
    once_only(table, ["setting", "metric", *seed_in(table)])
    settings, names = levels(table["setting"]), levels(table["metric"])
    values = {
        (str(setting), str(metric)): _said(part["value"])
        for (setting, metric), part in table.groupby(["setting", "metric"], observed=True)
    }
    size = points("small")
    letter, line, gap = (share * size / 72 for share in (0.58, LINE, GAP))  # inches
    heads = ["\n".join(wrap(drawn(name, 3 * WIDE).replace("_", " "), WIDE)) for name in names]
    wide = [
        1.5
        + max(map(_letters, [head, "0.00123", *(x for (_, of), x in values.items() if of == name)]))
        for name, head in zip(names, heads, strict=True)
    ]
    figure = new_figure(letter * (longest(settings) + 4 + sum(wide)), 2.0)
    across = figure.get_figwidth() / letter - 2
    first = int(max(FEWEST, across - sum(wide) - 1))
    rows = [_wrapped(drawn(name), first) for name in settings]
    head = line * max(map(_lines, heads))
    tallest = [
        max([len(called), *(_lines(x) for (of, _), x in values.items() if of == setting)])
        for setting, called in zip(settings, rows, strict=True)
    ]
    under = [line * lines + gap * (lines > 1) for lines in tallest]
    tall = head + sum(under) + 3 * gap
    said = wrap(below, max(3 * FEWEST, int(across)))
    foot = line * len(said) + gap * bool(said)
    figure.set_figheight(tall + foot + (0.3 if title else 0.1))
    ax = figure.subplots()
    ax.set_axis_off()
    ax.set_xlim(0, across)
    ax.set_ylim(tall + foot, 0)
    centres = [across - sum(wide[index:]) + wide[index] / 2 for index in range(len(names))]
    for x, text in zip(centres, heads, strict=True):
        ax.text(x, head, text, ha="center", va="baseline", fontsize=size)
    for index, (setting, called) in enumerate(zip(settings, rows, strict=True)):
        y = head + 2 * gap + sum(under[:index]) + under[index] / 2
        ax.text(0, y, "\n".join(called), ha="left", va="center", fontsize=size)
        for x, name in zip(centres, names, strict=True):
            value = values.get((setting, name), NOTHING)
            ax.text(x, y, value, ha="center", va="center", fontsize=size)
    for y, width in ((0.0, 0.9), (head + gap, 0.5), (tall, 0.9)):
        ax.axhline(y, color=QUIET, linewidth=width, clip_on=False)
    if seed_in(table):
        several = f"mean and range of {table[SEED].nunique()} seeds"
        ax.text(0, head, "\n".join(wrap(several, first)), va="baseline", fontsize=size)
    if below:
        ax.text(0, tall + gap, "\n".join(said), va="top", fontsize=size)
    if title is not None:
        put_title(figure, title)
    return figure


def _said(values: pd.Series) -> str:
    """A number in three digits, with the range of several below it; a dash where none is known."""
    known = values.dropna()
    if known.empty:
        return NOTHING
    ends = f"\n{known.min():.2g}\N{EN DASH}{known.max():.2g}" if len(known) > 1 else ""
    # With zeros at the end: numbers below one another are as long.
    return f"{known.mean():#.3g}".rstrip(".") + ends


def _wrapped(name: str, width: int) -> list[str]:
    """Its lines; a number stays with the word before it, as in `beta 0.1`."""
    kept = "\N{NO-BREAK SPACE}"
    return [line.replace(kept, " ") for line in wrap(re.sub(r" (?=\d)", kept, name), width)]


def _lines(text: str) -> int:
    return text.count("\n") + 1


def _letters(text: str) -> int:
    """Those of its longest line."""
    return max(map(len, text.split("\n")))
