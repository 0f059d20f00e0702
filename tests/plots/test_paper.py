"""The sketch of the half-spaces, and tables that are drawn."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Wedge

from geffect.plots import half_spaces, metrics, style
from geffect.plots.paper import figure_5a, inverse_confidence
from geffect.scores import WEIGHT, Score, stack, tidy
from tests.utils.pictures import angles_of_a_step, measured

pytestmark = pytest.mark.usefixtures("untouched")


def changed(**cosines: float) -> pd.DataFrame:
    """The example with other cosines, by the initials of their gradients."""
    table = angles_of_a_step()
    for pair, value in cosines.items():
        initials = table["source"].str[0] + table["other"].str[0]
        table.loc[initials.isin([pair, pair[::-1]]), "value"] = value
    return table


def tips(table: pd.DataFrame) -> dict[str, np.ndarray]:
    ax = half_spaces(table, ax=Figure().subplots())
    named = [line for line in ax.lines if not str(line.get_label()).startswith("_")]
    return {
        line.get_label(): np.array([line.get_xdata()[1], line.get_ydata()[1]]) for line in named
    }


def test_arrows_have_the_angles_of_the_gradients() -> None:
    found = tips(changed(of=-0.6, **{"or": 0.3}, fr=-0.2))
    f, r, o = found["forget"], found["retain"], found["objective"]
    assert np.linalg.norm(f) == pytest.approx(1) == np.linalg.norm(r)
    assert f @ r == pytest.approx(-0.2)
    assert f @ o == pytest.approx(-0.6) and r @ o == pytest.approx(0.3)


def test_the_shaded_part_is_where_both_hold() -> None:
    ax = half_spaces(changed(fr=0.4), ax=Figure().subplots())
    *_, wanted = (patch for patch in ax.patches if isinstance(patch, Wedge))
    forget, retain = np.array([1.0, 0.0]), np.array([0.4, np.sqrt(1 - 0.4**2)])
    for degrees in np.arange(0.5, 360.0, 1.0):
        towards = np.array([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))])
        inside = wanted.theta1 < degrees < wanted.theta2
        assert inside == (towards @ forget < 0 <= towards @ retain)


@pytest.mark.parametrize("fr", [1.0, -1.0, 1 - 1e-15])
def test_gradients_on_one_line_have_no_plane_and_are_drawn(fr: float) -> None:
    found = tips(changed(fr=fr, of=-0.5, **{"or": -0.5 * fr}))
    assert np.isfinite(np.stack([*found.values()])).all()
    assert found["objective"].tolist() == pytest.approx([-0.5, 0.0])


def test_what_has_no_direction_or_is_not_there_is_refused() -> None:
    table = angles_of_a_step()
    for other, says in (
        (changed(of=np.nan), "should have a direction for each"),
        (table[table["source"] != "retain"], "Found none of retain"),
        (pd.concat([table, table.assign(step=4)]), "of one step and block"),
        (pd.concat([table, table.assign(model="other")]), "of one step and block"),
    ):
        with pytest.raises(ValueError, match=says):
            half_spaces(other)


def test_the_axis_of_the_inverse_confidence_is_in_plain_text() -> None:
    one = tidy(
        np.array([[3.0], [40.0]]), Score("mean of 1/p", WEIGHT), steps=np.array([0, 5]),
        blocks=["model"], by="model",
    )  # fmt: skip
    (ax,) = inverse_confidence(stack({"GA": one}, "setting")).axes
    assert ax.get_yscale() == "log" and ax.get_ylim()[0] == 0.8
    said = [label.get_text() for label in ax.get_yticklabels(which="both")]
    assert {"1", "2", "10", "20"} <= {*said}


def test_settings_of_one_objective_share_a_colour_and_no_dashes() -> None:
    one = tidy(
        np.array([[3.0], [40.0]]), Score("mean of 1/p", WEIGHT), steps=np.array([0, 5]),
        blocks=["model"], by="model",
    )  # fmt: skip
    options = {"WGA": "alpha", "NPO": "beta", "TNPO": "beta", "RMU": "c"}
    names = ["GA", *(f"{of}, {option} {n}" for of, option in options.items() for n in (1, 2, 3))]
    (ax,) = inverse_confidence(stack(dict.fromkeys(names, one), "setting")).axes
    drawn = {line.get_label(): line for line in ax.lines if line.get_label() in names}
    of_objective: dict[str, set[str]] = {}
    for name, line in drawn.items():
        of_objective.setdefault(name.partition(", ")[0], set()).add(line.get_color())
    assert {len(colours) for colours in of_objective.values()} == {1}
    assert len(set.union(*of_objective.values())) == len(of_objective) == 5
    looks = {(line.get_color(), str(line._dash_pattern)) for line in drawn.values()}
    assert len(looks) == len(names) == 13 and ax.get_title(loc="left") == ""


def test_a_larger_option_has_a_darker_line() -> None:
    one = tidy(
        np.array([[1.0], [0.5]]), Score("mean weight of a sample"), steps=np.array([0, 5]),
        blocks=["model"], by="model",
    )  # fmt: skip
    names = [f"beta {beta}" for beta in (0.05, 0.1, 0.5, 5)]
    (ax,) = figure_5a(stack(dict.fromkeys(names, one), "setting")).axes
    drawn = {line.get_label(): line for line in ax.lines if line.get_label() in names}
    lightness = [sum(to_rgb(drawn[name].get_color())) for name in names]
    assert [*drawn] == names and lightness == sorted(lightness, reverse=True)
    assert min(-np.diff(lightness)) > 0.2


def test_a_table_has_each_number_in_its_place() -> None:
    ax = metrics(measured()).axes[0]
    at = {text.get_text(): text.get_position() for text in ax.texts}
    assert {*at} == {
        "forget\nquality", "ES", "NPO + KL, beta 0.1", "RMU, layer 2, c 2", "0.0120", "-", "0.700",
        "0.333",
    }  # fmt: skip
    assert at["0.0120"][0] == at["0.700"][0] == at["forget\nquality"][0] < at["ES"][0] == at["-"][0]
    assert at["0.0120"][1] == at["-"][1] == at["NPO + KL, beta 0.1"][1] < at["0.333"][1]


def test_a_pair_that_is_there_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="one row for each setting, metric"):
        metrics(pd.concat([measured(), measured()]))


def test_a_name_of_two_lines_breaks_before_an_option_and_heightens_its_own_row_alone() -> None:
    names = ["GA", "WGA, alpha 1", "RMU, layer 11, c 200", "GA + GD"]
    of = ["forget quality", "model utility", "ES exact", "ES perturbed"]
    table = pd.DataFrame(
        [{"setting": name, "metric": metric, "value": 0.5} for name in names for metric in of]
    )
    with style("column"):
        ax = metrics(table).axes[0]
    ga, wga, rmu, gd = (
        next(text.get_position()[1] for text in ax.texts if text.get_text() == name)
        for name in ("GA", "WGA, alpha 1", "RMU, layer 11,\nc 200", "GA + GD")
    )
    assert gd - rmu == pytest.approx(rmu - wga) and rmu - wga > 1.4 * (wga - ga)
