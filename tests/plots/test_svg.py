"""A picture as SVG in a page."""

import re
from xml.etree import ElementTree

import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure

from geffect.plots import depth, shares
from geffect.plots.svg import svg
from tests.utils.pictures import of_models, recovered

pytestmark = pytest.mark.usefixtures("untouched")


def test_marks_have_titles_text_is_text_and_nothing_is_loaded() -> None:
    text = svg(shares(recovered()), "what <came> back")
    root = ElementTree.fromstring(text)
    titles = [element.text for element in root.iter("title")]
    assert len(titles) == len(recovered()) and "unlearned, int8: 0.35" in titles
    words = {element.text.strip() for element in root.iter("text")}
    assert {"int4", "relearning benign, 8 steps", "unlearned"} <= words
    assert root.get("aria-label") == "what <came> back"
    assert "http" not in text and "metadata" not in text


def test_all_that_is_referred_to_is_there_and_no_other_id() -> None:
    text = svg(shares(recovered()), "shares")
    ids, used = re.findall(r'\sid="([^"]*)"', text), re.findall(r"#([\w.-]+)\b", text)
    assert {*ids} <= {*used} and len(ids) == len({*ids})
    assert {name for name in used if re.search(rf'(?:url\(|href="?)#{name}', text)} <= {*ids}


def test_hostile_names_are_text() -> None:
    table = recovered()
    table["label"] = table["label"].replace({"int8": '</title><script>"&$x^$'})
    text = svg(shares(table), "shares")
    assert "<script" not in text
    titles = [element.text or "" for element in ElementTree.fromstring(text).iter("title")]
    assert 'unlearned, </title><script>"&$x^$: 0.35' in titles


def test_it_leaves_the_axes_as_they_were_and_no_figure_open() -> None:
    ax = shares(recovered())
    names = [line.get_gid() for line in ax.lines]
    assert svg(ax, "a")
    assert [line.get_gid() for line in ax.lines] == names
    assert not pyplot.get_fignums()
    assert svg(depth(of_models("block"), ax=Figure().subplots()), "b").startswith("<svg")
