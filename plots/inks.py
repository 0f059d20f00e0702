"""Colours, dashes and markers, and what each stands for."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Literal

import matplotlib as mpl
import numpy as np
from matplotlib.colors import Colormap, ListedColormap, to_hex

Dashes = Literal["-"] | tuple[int, tuple[float, ...]]


@dataclass(frozen=True)
class Ink:
    """Colour and dashes of a line: either alone tells it from its neighbours.

    The colours differ in lightness too, for paper printed grey.
    """

    colour: str
    dashes: Dashes = "-"
    marker: str = "o"


SOLID: Dashes = "-"
DASHED: Dashes = (0, (5, 1.6))
DOTTED: Dashes = (0, (1.1, 1.3))
DASH_DOT: Dashes = (0, (6, 1.5, 1.1, 1.5))
DASH_DOT_DOT: Dashes = (0, (6, 1.5, 1.1, 1.5, 1.1, 1.5))

DASHES = (SOLID, DASHED, DOTTED, DASH_DOT, DASH_DOT_DOT)

UNLEARNING, RETAINING = Ink("#b3261e", SOLID), Ink("#4a90d9", DASHED)
PLAIN = Ink("#333333", SOLID)
GRU = Ink("#00875f", DASHED)
GRU_UPDATE = Ink("#b0569b", DASH_DOT)
GRU_COORDINATE = Ink("#e08e0b", DOTTED)
SELECT = Ink("#5b4bb5", DASH_DOT_DOT)

NAMED = {
    "unlearning": UNLEARNING,
    "forget": UNLEARNING,
    "retaining": RETAINING,
    "retain": RETAINING,
    "original": Ink("#708090", DOTTED),
    "retrained": Ink("#0b7285", DASHED),
    "unlearned": Ink("#8c5a2b", SOLID),
    "objective": PLAIN,
    "plain": PLAIN,
    "gru": GRU,
    "gru-update": GRU_UPDATE,
    "gru-coordinate": GRU_COORDINATE,
    "select": SELECT,
    "unlearning, rectified": Ink(UNLEARNING.colour, DOTTED),
    "retaining, rectified": Ink(RETAINING.colour, DOTTED),
    "unlearning, update": Ink(UNLEARNING.colour, DASH_DOT),
    "retaining, update": Ink(RETAINING.colour, DASH_DOT),
}
# None of the colours above: a colour that stands for something stands for nothing else.
SPARE = (
    Ink("#1f3a8a", SOLID), Ink("#e5739d", DASHED), Ink("#a3a500", DASH_DOT),
    Ink("#6b8e9e", DOTTED), Ink("#c49a6c", DASH_DOT_DOT), Ink("#4d7c3a", DASHED),
)  # fmt: skip

UNDEFINED = "#bdbdbd"
QUIET = "#8a8a8a"
# Brown to purple: red and blue name the two effects, so the two signs take other hues.
DIVERGING: Colormap = mpl.colormaps["PuOr"].with_extremes(bad=UNDEFINED)
POSITIVE: Colormap = mpl.colormaps["viridis_r"].with_extremes(bad=UNDEFINED)
RATE: Colormap = mpl.colormaps["Purples"].with_extremes(bad=UNDEFINED)
NO_OR_YES: Colormap = ListedColormap(DIVERGING([0.5, 0.9])).with_extremes(bad=UNDEFINED)

DEPTH: Colormap = mpl.colormaps["viridis"]


def inks(names: Sequence[str]) -> dict[str, Ink]:
    """An ink a name: its own where it has one, else the spare ones in turn.

    Where these run out, names that begin alike, such as "NPO, beta 0.1" and "NPO, beta 0.5", share
    a colour while it has dashes left. Else colours come again with other dashes.

    >>> inks(["unlearning", "alpha 1"])["alpha 1"] == SPARE[0]
    True
    """
    others = [name for name in names if name not in NAMED]
    families: dict[str, list[str]] = {}
    for name in others:
        family = name.partition(", ")[0] if len(others) > len(SPARE) else name
        families.setdefault(family, []).append(name)
    found: dict[str, Ink] = {}
    taken = Counter[Ink]()
    for own, ink in zip(families.values(), cycle(SPARE), strict=False):
        for name in own:
            if taken[ink] >= len(DASHES):
                ink = min(SPARE, key=taken.__getitem__)
            found[name] = _turned(ink, taken[ink])
            taken[ink] += 1
    return {name: NAMED[name] if name in NAMED else found[name] for name in names}


def _turned(ink: Ink, turns: int) -> Ink:
    return replace(ink, dashes=DASHES[(DASHES.index(ink.dashes) + turns) % len(DASHES)])


METHOD = "method"
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def marks_of(names: Sequence[str], by: str) -> dict[str, Ink]:
    """Dashes and markers of names: methods have both of their own, other names the dashes.

    >>> marks_of(["ga", "npo"], by="method")["npo"].marker
    's'
    """
    if by != METHOD:
        return inks(names)
    return {
        name: replace(ink, dashes=DASHES[turn % len(DASHES)], marker=MARKERS[turn % len(MARKERS)])
        for turn, (name, ink) in enumerate(inks(names).items())
    }


STRENGTH: Colormap = mpl.colormaps["magma"]


def strength_colours(names: Sequence[str]) -> dict[str, str]:
    """A colour a setting of one option, from light at the smallest to dark at the largest.

    Not the sequence of the layers. The lightest part, which is hard to see on white, is left out.

    >>> strength_colours(["beta 0.1", "beta 0.5"])
    {'beta 0.1': '#fc8961', 'beta 0.5': '#251255'}
    """
    shares = np.linspace(0.15, 0.75, len(names))[::-1]
    return {name: to_hex(STRENGTH(share)) for name, share in zip(names, shares, strict=True)}


def depth_colours(blocks: Sequence[str]) -> dict[str, str]:
    """A colour a block, from dark at the input to light at the output.

    One perceptual sequence, whose lightness rises: the ends are apart in grey too. The lightest
    tenth, which is hard to see on white, is left out.

    >>> depth_colours(["embedding", "head"])
    {'embedding': '#440154', 'head': '#bddf26'}
    """
    shares = np.linspace(0.0, 0.9, len(blocks))
    return {block: to_hex(DEPTH(share)) for block, share in zip(blocks, shares, strict=True)}
