"""The tokens of a sample as HTML: text that can be selected, each token on its colour."""

import numpy as np
import pandas as pd
from matplotlib.colors import to_hex

from geffect.scores import score_of
from geffect.text import in_html

from .frames import Frame, colours_of
from .inks import UNDEFINED
from .text import BREAK, answer, readable_on
from .ticks import decades

LEGEND = 41  # colours in the bar below the text


def spans(table: pd.DataFrame) -> str:
    """The answer of one sample as a block of HTML that stands alone, with a legend of its colours.

    - `table`: as for `text`, which has the same colours.

    Returns the HTML. Raises ValueError for a table of several samples or risks.

    A token under the pointer shows its value and its probability. Tokens are escaped: what a model
    writes is text and no markup, and what does not print is written as its code. A copy of the text
    is the answer as it is.

    >>> table = pd.DataFrame({"sample": 3, "position": [7, 8], "token": [" <b>", " fox"],
    ...                       "p": [0.9, 0.2], "value": [-2.0, 0.5]})
    >>> page = spans(table)
    >>> "&lt;b&gt;</span>" in page, "<b>" in page
    (True, False)
    """
    name, table = answer(table)
    as_model = table.assign(model="model")
    cmap, norm = colours_of(as_model)
    values = table["value"].to_numpy(dtype=float)
    colours = cmap(norm(np.ma.masked_invalid(values)))
    likely = table["p"].tolist() if "p" in table else [np.nan] * len(table)
    marked = "".join(map(_span, table["token"], values, likely, colours))
    return (
        f'<div class="tokens"><p style="white-space: pre-wrap; line-height: 1.7">{marked}</p>'
        f"{_legend(as_model)}<p><small>{in_html(name)}</small></p></div>"
    )


def _span(
    token: object, value: float, likely: float, colour: tuple[float, float, float, float]
) -> str:
    says = "undefined" if np.isnan(value) else f"{value:.3g}"
    if not np.isnan(likely):
        says += f", probability {likely:.3g}"
    style = f"background: {to_hex(colour)}; color: {readable_on(colour)}"
    return f'<span style="{style}" title="{says}">{_shown(token)}</span>'


def _shown(token: object) -> str:
    if not isinstance(token, str):
        return in_html(f" {token}")  # an id
    # What is empty or breaks a line is seen, and not copied.
    mark = '<span style="user-select: none">{}</span>'
    if not token:
        return mark.format("∅")
    lines = token.replace("\r\n", "\n").split("\n")
    return f"{mark.format(BREAK)}\n".join("\t".join(map(in_html, x.split("\t"))) for x in lines)


def _legend(table: pd.DataFrame) -> str:
    """A bar from the lowest colour to the highest, with its ends, zero and unit in words."""
    score, (cmap, norm) = score_of(table), colours_of(table)
    bar = ", ".join(to_hex(cmap(share)) for share in np.linspace(0, 1, LEGEND))
    frame, is_symlog = Frame.of(table), score.scale == "symlog"
    ticks = decades(frame.threshold, frame.limit, 2) if is_symlog else [norm.vmin, 0.0, norm.vmax]
    marks = "".join(
        f'<span style="position: absolute; left: {100 * float(norm(tick)):.1f}%; '
        f'white-space: nowrap; transform: translateX(-50%)">{tick:g}</span>'
        for tick in ticks
        if tick is not None
    )
    undefined = (
        f' <span style="background: {UNDEFINED}">undefined</span>'
        if table["value"].isna().any()
        else ""
    )
    return (
        '<div style="width: 24em; max-width: 90%; font-size: .8em; user-select: none">'
        f'<div style="height: .7em; background: linear-gradient(to right, {bar})"></div>'
        f'<div style="position: relative; height: 1.5em">{marks}</div>'
        f"{in_html(score.full)}{undefined}</div>"
    )
