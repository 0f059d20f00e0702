"""The answer of a sample as HTML: its text, its colours, and nothing that a model could slip in."""

import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from geffect.plots import spans
from geffect.plots.frames import colours_of
from geffect.plots.inks import DIVERGING, UNDEFINED
from geffect.scores import Score, said

SCORE = Score("PG-effect", "nats")


def table(tokens: list[object], values: list[float] | None = None) -> pd.DataFrame:
    made = pd.DataFrame(
        {
            "sample": 4,
            "position": np.arange(len(tokens)) + 7,
            "token": pd.Series(tokens, dtype=object),
            "p": 0.5,
            "risk": "forget",
            "value": np.linspace(-3.0, 3.0, len(tokens)) if values is None else values,
        }
    )
    return said(made, SCORE)


class Page(HTMLParser):
    """What a browser makes of a page: elements, and the text that can be selected."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[dict[str, str | None]] = []
        self.selected = ""
        self.feed(page)
        self.close()
        assert self.open == [], "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.open.append(dict(attrs))

    def handle_endtag(self, tag: str) -> None:
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if not any("user-select: none" in (of.get("style") or "") for of in self.open):
            self.selected += data

    @property
    def tokens(self) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if "title" in attributes]


def test_what_is_selected_is_the_answer_in_order() -> None:
    tokens = [" One", " day", ",", "\n", " a", "  mouse", "", "\r\nend"]
    shuffled = table(tokens).sample(frac=1.0, random_state=0)
    page = Page(spans(shuffled))
    assert page.selected == " One day,\n a  mouse\nend" + "sample 4, forget"
    assert len(page.tokens) == len(tokens)
    assert spans(shuffled).count("↵") == 2 and spans(shuffled).count("∅") == 1


@pytest.mark.parametrize(
    "token", ["<script>alert(1)</script>", "</span><img src=x>", "&lt;", '" onclick="x', "'"]
)
def test_what_a_model_writes_is_text_and_no_markup(token: str) -> None:
    page, plain = Page(spans(table([token, " b"]))), Page(spans(table(["a", " b"])))
    assert page.selected.startswith(f"{token} b")
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in plain.elements]
    assert [*map(dict.keys, page.tokens)] == [*map(dict.keys, plain.tokens)]


def test_names_of_the_user_are_escaped() -> None:
    page = spans(table(["a"]).assign(risk="<b>own</b>", score="<i>x</i>", unit="<i>nats</i>"))
    assert "<b>" not in page and "<i>" not in page and "&lt;b&gt;own" in page


def test_colours_are_those_of_the_values() -> None:
    made = table([" a", " b", " c", " d"], [-2.0, 0.0, 0.01, 2.0])
    _, norm = colours_of(made.assign(model="model"))
    for token, value in zip(Page(spans(made)).tokens, made["value"], strict=True):
        assert f"background: {to_hex(DIVERGING(float(norm(value))))};" in str(token["style"])
        assert str(token["title"]).startswith(f"{value:.3g}, probability 0.5")


def test_what_is_undefined_is_grey_and_says_so() -> None:
    page = spans(table([" a", " b"], [1.0, float("nan")]))
    assert f"background: {UNDEFINED}" in str(Page(page).tokens[1]["style"])
    assert str(Page(page).tokens[1]["title"]).startswith("undefined")
    assert ">undefined</span>" in page
    assert "undefined" not in spans(table([" a", " b"]))


def test_the_legend_has_the_colours_the_ends_and_the_unit() -> None:
    page = spans(table([" a", " b"], [-20.0, 0.5]))
    (bar,) = re.findall(r"linear-gradient\(to right, (.*?)\)", page)
    colours = bar.split(", ")
    assert colours[0] == to_hex(DIVERGING(0.0)) and colours[-1] == to_hex(DIVERGING(1.0))
    assert colours[len(colours) // 2] == to_hex(DIVERGING(0.5))
    assert "PG-effect (nats)" in page and re.search(r'left: 50\.0%; [^"]*">0<', page)


def test_ids_are_shown_and_several_texts_refused() -> None:
    assert Page(spans(table([12, 7]))).selected.startswith(" 12 7")
    two = pd.concat([table([" a"]), table([" a"]).assign(sample=5)], ignore_index=True)
    with pytest.raises(ValueError, match=r"should hold one sample.* Found 2: "):
        spans(two)
