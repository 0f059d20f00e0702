"""Ticks: which blocks are named, and how numbers are written."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from geffect.plots import heatmap, tradeoff
from geffect.plots.ticks import log_scale, power, ticked
from geffect.scores import Score, tidy
from tests.utils.pictures import losses

pytestmark = pytest.mark.usefixtures("untouched")


def network(layers: int) -> list[str]:
    return ["embedding", *(f"layer {index}" for index in range(layers)), "final norm", "head"]


@pytest.mark.parametrize("layers", [1, 2, 5, 12, 31, 32, 33, 80])
@pytest.mark.parametrize("room", [2, 5, 9, 20])
def test_the_first_the_last_and_those_that_are_no_layer_are_always_named(
    layers: int, room: int
) -> None:
    names = network(layers)
    found = ticked(names, room)
    text = ", ".join(found.values())
    assert min(found) >= 0 and max(found) <= len(names) - 1
    assert "embedding" in text and "head" in text
    if room > 5 or len(names) <= room:
        assert "final norm" in text
    assert list(found) == sorted(found)
    gap = len(names) / room
    assert (np.diff(list(found)) >= min(1, gap) - 1e-9).all()
    places = [place for place, name in found.items() if name.startswith("layer")]
    if len(names) > room and len(places) > 2:
        assert len(set(np.diff(places))) == 1, "every n-th layer"
    assert len(found) <= room + 2


@pytest.mark.parametrize("count", [1, 2, 20, 21, 34, 291])
def test_blocks_without_layers_are_named_at_both_ends(count: int) -> None:
    names = [f"{index}.{side}" for index in range(count) for side in "ab"]
    found = ticked(names, 20)
    assert (found[0.0], found[len(names) - 1.0]) == (names[0], names[-1])
    assert all(names[int(place)] == name for place, name in found.items())


def test_a_smaller_panel_has_fewer_ticks_and_a_zoomed_one_those_on_view() -> None:
    names = network(40)
    table = tidy(np.ones((2, 43)), Score("x"), steps=np.arange(2), blocks=names, by="layer")

    def labels(height: float, **keywords: object) -> list[str]:
        figure = Figure(figsize=(4, height), layout="constrained")
        ax = heatmap(table, ax=figure.subplots(), **keywords)
        figure.draw_without_rendering()
        return [label.get_text() for label in ax.get_yticklabels()]

    assert len(labels(1.5)) < len(labels(5)) <= 21
    assert labels(3, ylim=(6.5, 2.5)) == ["layer 2", "layer 3", "layer 4", "layer 5"]


def test_numbers_on_a_logarithmic_axis_are_plain() -> None:
    ax = tradeoff(losses(), ax=Figure().subplots())
    ax.figure.draw_without_rendering()
    shown = [text.get_text() for text in ax.get_yticklabels(which="both")]
    assert "0.1" in shown and not any("$" in text for text in shown)


@pytest.mark.parametrize(
    ("value", "said"), [(0.0, "0"), (1.0, "10⁰"), (1e-12, "10⁻¹²"), (1e15, "10¹⁵"), (2.5, "2.5")]
)
def test_powers_are_of_one_size(value: float, said: str) -> None:
    assert power(value) == said
    assert power(-value)[1:] == (said if value else "")


@pytest.mark.parametrize(("low", "high"), [(1.0, 1e6), (1e-5, 1.0), (0.02, 300.0), (1e-7, 1e7)])
def test_numbers_of_a_logarithmic_axis_are_of_one_kind(low: float, high: float) -> None:
    ax = Figure().subplots()
    log_scale(ax)
    ax.set_ylim(low, high)
    ax.figure.draw_without_rendering()
    said = [label.get_text() for label in ax.get_yticklabels() if label.get_text()]
    are_powers = {any(mark in text for mark in "⁰¹²³⁴⁵⁶⁷⁸⁹") for text in said}
    assert len(said) >= 3 and are_powers == {low < 1e-4 or high > 1e5}
