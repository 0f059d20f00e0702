"""A picture as SVG inside of a page: its text is text, and its marks say what they are."""

import re
from io import BytesIO

import matplotlib as mpl
from matplotlib.axes import Axes

from geffect.text import in_html

from .figures import figure_of
from .style import EMBEDDED

MARK = "mark"
"""How the marks are called in the SVG before they are told by their names."""


def svg(ax: Axes, says: str) -> str:
    """The picture that the axes are of, to be put into HTML; its figure is closed.

    - `says`: what it shows, for those who do not see it.

    An artist with a `gid` has that as its title, which shows under the pointer. Nothing is loaded
    from elsewhere, and several pictures fit into one page.

    >>> from .shares import shares
    >>> import pandas as pd
    >>> table = pd.DataFrame({"label": ["int4"], "model": "unlearned", "value": [0.5],
    ...                       "low": [0.4], "high": [0.6]})
    >>> text = svg(shares(table), "shares")
    >>> "<title>unlearned, int4: 0.5</title>" in text, "http" in text
    (True, False)
    """
    figure = figure_of(ax)
    named = [artist for artist in figure.findobj() if artist.get_gid()]
    titles = {f"{MARK}{index}": str(artist.get_gid()) for index, artist in enumerate(named)}
    written = BytesIO()
    for name, artist in zip(titles, named, strict=True):
        artist.set_gid(name)
    try:
        with mpl.rc_context({**EMBEDDED, "svg.hashsalt": says}):
            figure.savefig(written, format="svg", metadata={"Date": None})
    finally:
        for title, artist in zip(titles.values(), named, strict=True):
            artist.set_gid(title)
    text = written.getvalue().decode("utf-8")
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    for name, title in titles.items():
        text = text.replace(f'<g id="{name}">', f"<g><title>{in_html(title)}</title>")
    used = set(re.findall(r"#([\w.-]+)", text))
    text = re.sub(r'\sid="([^"]*)"', lambda found: found[0] if found[1] in used else "", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{in_html(says)}"', 1).strip()
