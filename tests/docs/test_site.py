"""The site builds without a warning, is whole, and asks nothing of a network."""

import importlib
import re
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
from sphinx.util.inventory import InventoryFile

from geffect import plots
from tests.utils.site import SOURCE, Page, extension

ROOT = SOURCE.parents[1]
REFERENCE = extension("reference")
ELSEWHERE = re.compile(r"^(?:https?:)?//", re.IGNORECASE)


@cache
def pages(folder: Path) -> dict[Path, Page]:
    """The pages of the site by their places."""
    static = folder / "_static"  # where the theme keeps what its pages are made of
    found = [path for path in folder.rglob("*.html") if static not in path.parents]
    return {path: Page(path) for path in found}


def test_it_is_built_without_a_warning(site: Any) -> None:
    assert (site.code, site.said) == (0, "")
    assert len(pages(site.pages)) > 60


def test_the_reference_says_what_each_package_is_for(site: Any) -> None:
    text = pages(site.pages)[site.pages / "api" / "index.html"].text
    for name in (*REFERENCE.ROOMS, *REFERENCE.MODULES):
        said = str(importlib.import_module(name).__doc__).split("\n\n")[0].split("`")[0]
        assert " ".join(said.split()) in " ".join(text.split()), name


def test_signatures_have_the_short_names_of_types(site: Any) -> None:
    for place, page in pages(site.pages).items():
        if place.parent.name == "api":
            said = re.sub(r"<[^>]+>", "", page.text)
            assert not re.search(r"~(?:geffect|collections|typing|torch)\b|&lt;factory", said), (
                place
            )


def test_quotes_are_those_of_the_message(site: Any) -> None:
    for name in ("docs/faq.html", "docs/recording.html"):
        text = pages(site.pages)[site.pages / name].text
        assert not re.search("[\u201c\u201d\u2018\u2019]", text), name


def test_no_page_asks_a_network(site: Any) -> None:
    for page in pages(site.pages).values():
        assert not [place for place in page.fetched if ELSEWHERE.match(place)], page.path
        assert not re.search(r"url\(\s*['\"]?(?:https?:)?//|@import", page.styles), page.path
        assert not re.search(r"(?i)google|analytics|gtag|matomo|readthedocs", page.text), page.path
    for style in site.pages.rglob("*.css"):
        text = style.read_text(encoding="utf-8")
        assert not re.search(r"url\(\s*['\"]?(?:https?:)?//", text), style
        assert not re.search(r"@import\s+(?:url\()?\s*['\"]?(?:https?:)?//", text), style


def test_scripts_are_those_of_the_theme(site: Any) -> None:
    """Our pages bring none of their own; what the theme's scripts load lies beside them."""
    for page in pages(site.pages).values():
        loaded = {urlsplit(place).path for place in page.fetched if ".js" in place}
        assert all(re.search(r"(?:^|/)_static/|searchindex", place) for place in loaded), page.path
    for script in site.pages.rglob("*.js"):
        if script.name != "searchindex.js":
            text = script.read_text(encoding="utf-8")
            # Where comments and error messages point is not fetched.
            asked = r"(?:fetch|import|open|src\s*=|importScripts)\(?\s*['\"`](?:https?:)?//"
            assert not re.search(asked, text), script


def test_no_page_knows_where_it_was_built(site: Any) -> None:
    for page in pages(site.pages).values():
        assert str(ROOT) not in page.text and str(site.pages.parent) not in page.text, page.path


def test_links_lead_somewhere(site: Any) -> None:
    known = pages(site.pages)
    for path, page in known.items():
        for link in {*page.links, *page.fetched}:
            told = urlsplit(link)
            if told.scheme or link.startswith("//"):
                continue
            target = (path.parent / unquote(told.path)).resolve() if told.path else path
            assert target.exists(), f"{path}: {link}"
            if told.fragment and target in known:
                anchors = known[target].anchors
                assert unquote(told.fragment) in anchors, f"{path}: {link}"


def test_every_public_name_has_an_entry(site: Any) -> None:
    loaded = InventoryFile.loads((site.pages / "objects.inv").read_bytes(), uri="")
    entries = {
        name: item.uri for kind, items in loaded.data.items() if kind.startswith("py:")
        for name, item in items.items()
    }  # fmt: skip
    known = REFERENCE.links(REFERENCE.homes())
    for room in (*REFERENCE.ROOMS, *REFERENCE.MODULES):
        page = pages(site.pages)[site.pages / "api" / f"{room}.html"]
        assert "str(object=" not in page.text, "A constant should have words below it."
        for name in REFERENCE.names_in(importlib.import_module(room)):
            home = known[f"{room}.{name}"]
            assert home in entries, home
            # The page of the room has the entry, or a row that leads to it.
            led = {home} & page.anchors or [
                link for link in page.links if link.endswith(f"#{home}")
            ]
            assert led, f"{room}.{name}"


def test_every_name_of_the_reference_says_what_it_is(site: Any) -> None:
    for page in (site.pages / "api").glob("*.html"):
        unsaid = r'title="([^"]*)"><code[^>]*>(?:(?!</tr>).)*<td><p></p></td>'
        assert not re.findall(unsaid, page.read_text(encoding="utf-8"), re.DOTALL), page


def test_no_line_breaks_before_a_sign_of_per_cent(site: Any) -> None:
    for name in ("docs/study.html", "docs/comparison.html"):
        text = pages(site.pages)[site.pages / name].text
        assert re.search(r"\d\u00a0%", text) and not re.search(r"\d %", text), name


def test_every_room_is_in_the_reference() -> None:
    rooms = {
        path.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for folder in ("geffect", "analysis", "plots")
        for path in (ROOT / folder).rglob("__init__.py")
        if "\n__all__ = " in path.read_text(encoding="utf-8")
    }
    named = {room if room.startswith("geffect") else f"geffect.{room}" for room in rooms}
    # What those who write a loop never meet.
    inner = (
        "beside",
        "distributed",
        "gradients",
        "kernels",
        "losses",
        "pages",
        "places",
        "relearning",
    )
    within = {f"geffect.{name}" for name in inner}
    assert named - within == {*REFERENCE.ROOMS}


@pytest.mark.parametrize("name", plots.__all__)
def test_every_plot_is_in_the_gallery(name: str, site: Any) -> None:
    script = ROOT / "docs" / "gallery" / f"{name}.py"
    assert script.exists(), f"A plot should have a page in the gallery. Write {script}."
    assert re.search(rf"^from geffect\.plots import .*\b{name}\b", script.read_text(), re.MULTILINE)
    page = pages(site.pages)[site.pages / "gallery" / f"{name}.html"]
    drawn = [path for path in page.pictures if "sphx_glr" in path]
    assert drawn and (name != "spans" or re.search(r"<span style=[^>]*title=", page.text))
    for path in drawn:
        assert (page.path.parent / path).resolve().stat().st_size > 5_000
    assert f"{name}(" in re.sub(r"<[^>]*>", "", page.text)


def test_every_page_can_be_reached(site: Any) -> None:
    known = pages(site.pages)
    start, reached = site.pages / "index.html", set()
    next_ones = {start}
    while next_ones:
        reached |= next_ones
        links = {(path.parent / unquote(urlsplit(link).path)).resolve()
                 for path in next_ones for link in known[path].links
                 if not urlsplit(link).scheme}  # fmt: skip
        next_ones = links & {*known} - reached
    written = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert written <= {path.stem for path in reached if path.parent.name == "docs"}


def test_notebooks_have_their_outputs(site: Any) -> None:
    places = sorted((ROOT / "notebooks").glob("*.ipynb"))
    assert places
    for place in places:
        code = [c for c in nbformat.read(place, as_version=4).cells if c.cell_type == "code"]
        page = pages(site.pages)[site.pages / "notebooks" / f"{place.stem}.html"]
        assert page.text.count('class="cell_output') >= len(code) // 2
        assert [path for path in page.pictures if "_images" in path], place


def test_formulas_are_drawn_by_the_browser(site: Any) -> None:
    page = pages(site.pages)[site.pages / "notebooks" / "rectify.html"]
    assert "<math" in page.text and r"\(" not in page.text
    assert not [place for place in page.fetched if "mathjax" in place.lower()]
