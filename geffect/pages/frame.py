"""The frame of every page: one look, contents, and scripts, in one file that opens offline."""

import re
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from geffect.numbers import unbroken
from geffect.text import plain

from .charts import Chart, as_json
from .pictures import picture

HEADING = re.compile(r'<(h[23])(?: id="([^"]*)")?>(.*?)</\1>', re.DOTALL)
TAG = re.compile(r"<[^>]*>")
UNSEEN = re.compile(r"(<(?:script|style)\b.*?</(?:script|style)>|<[^>]*>)", re.DOTALL)
"""What of a page is no text of it."""


def page(template: str, *rooms: str, **values: Any) -> str:
    """A page made from a template, which extends `page.html.jinja`.

    - `rooms`: the packages whose folder `templates` has it, looked into first.
    - `values`: what the template names. Text is escaped; `Markup` is not.
    """
    parts = UNSEEN.split(_environment(rooms).get_template(template).render(**values))
    parts[::2] = map(unbroken, parts[::2])
    return "".join(parts)


def framed(title: str, head: str, body: str, *, style: str = "") -> str:
    """A page of HTML that is at hand: in `head` and `body` all that others wrote is escaped.

    - `head`: what stands above the contents.
    - `style`: rules of its own, behind those of all pages.

    >>> page = framed("a", "<h1>a</h1>", "<h2>b</h2>")
    >>> "<title>a</title>" in page, '<h2 id="b">b</h2>' in page
    (True, True)
    """
    parts = {"head": Markup(head), "body": Markup(body), "style": Markup(style)}
    return page("framed.html.jinja", title=title, **parts)


@cache
def _environment(rooms: tuple[str, ...]) -> Environment:
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(room) for room in (*rooms, "geffect.pages")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_plain,
    )
    environment.filters |= {"chart": _chart, "word": word}
    environment.globals |= {"file": _file, "with_contents": with_contents}
    return environment


def word(said: str, defined: str = "") -> Markup:
    """A word of the methods, linked to where the page defines it.

    >>> word("cosines", "cosine")
    Markup('<a class="word" href="#word-cosine">cosines</a>')
    """
    slug = _slug(defined or said)
    return Markup('<a class="word" href="#word-{}">{}</a>').format(slug, said)


def with_contents(body: str) -> Markup:
    """The body with an anchor at every heading, and before it the list of those of sections.

    >>> print(with_contents("<h2>A b</h2>"))
    <nav aria-label="Contents"><ul><li><a href="#a-b">A b</a></li></ul></nav>
    <h2 id="a-b">A b</h2>
    """
    taken: set[str] = set(re.findall(r'\bid="([^"]*)"', body))
    listed: list[str] = []

    def anchored(found: re.Match[str]) -> str:
        level, name, inside = found.groups()
        if name is None:
            name = next(free for free in _names(_slug(TAG.sub("", inside))) if free not in taken)
            taken.add(name)
        if level == "h2":
            said = TAG.sub("", inside).strip()
            listed.append(f'<li><a href="#{name}">{said}</a></li>')
        return f'<{level} id="{name}">{inside}</{level}>'

    anchored_body = HEADING.sub(anchored, body)
    contents = f'<nav aria-label="Contents"><ul>{"".join(listed)}</ul></nav>\n' if listed else ""
    # Every tag is of a template, and what others wrote is escaped in it.
    return Markup(contents + anchored_body)


def _chart(chart: Chart) -> Markup:
    """The picture of a chart with its data, of which the browser makes more."""
    inside = f'<script type="application/json">{as_json(chart)}</script>'
    return Markup(f'<div class="chart">{picture(chart)}{inside}</div>')


def _file(name: str) -> Markup:
    """A file of ours, such as a style or a script, as it is."""
    text = files("geffect.pages").joinpath("templates", name).read_text(encoding="utf-8")
    return Markup(text)


def _slug(text: str) -> str:
    """The text as an anchor.

    >>> _slug("What it is: <b>"), _slug("語言")
    ('what-it-is-b', 'section')
    """
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60] or "section"


def _names(slug: str) -> Iterator[str]:
    yield slug
    number = 2
    while True:
        yield f"{slug}-{number}"
        number += 1


def _plain(value: Any) -> Any:
    """What a template writes: text on one line, to be escaped then; markup of our own as it is."""
    return plain(value) if isinstance(value, str) and not hasattr(value, "__html__") else value
