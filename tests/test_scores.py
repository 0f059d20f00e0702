"""Score tables say what they hold: merged, joined, and read again from a file."""

from io import StringIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from geffect import open_run
from geffect.analysis import conflict, cosine, g_effect, rectification, violation
from geffect.plots import facets, heatmap, profile, sheet, trajectory
from geffect.scores import PER_RATE, YES_OR_NO, Score, score_of, scores_in, stack, tidy

pytestmark = pytest.mark.usefixtures("untouched")


def blank() -> Figure:
    return Figure(layout="constrained")


def again(table: pd.DataFrame) -> pd.DataFrame:
    """The table after a round trip through a file."""
    return pd.read_csv(StringIO(table.to_csv(index=False)))


@pytest.mark.parametrize("of", [g_effect, violation, conflict, rectification])
def test_a_file_keeps_labels_and_units(recorded: Path, of: object) -> None:
    table = of(open_run(recorded))  # type: ignore[operator]
    back = again(table)
    assert scores_in(back) == scores_in(table)
    assert back.attrs == {}


@pytest.mark.parametrize("plot", [heatmap, profile, trajectory])
def test_what_comes_from_a_file_is_drawn_the_same(recorded: Path, plot: object) -> None:
    run = open_run(recorded)
    for table in (violation(run, "layer"), cosine(run, "forget", "retain")):
        drawn = [plot(of, ax=blank().subplots()) for of in (table, again(table))]  # type: ignore[operator]
        for what in ("get_ylabel", "get_ylim", "get_yscale"):
            assert len({str(getattr(ax, what)()) for ax in drawn}) == 1, what
        assert len({ax.get_title(loc="left") for ax in drawn}) == 1


def test_a_merge_keeps_both_labels(recorded: Path) -> None:
    run = open_run(recorded)
    one, other = cosine(run, "forget", "retain"), conflict(run, by="layer")
    merged = one.merge(other, on=["step", "layer"])
    assert set(merged["unit_x"]) == {"cosine"} and set(merged["unit_y"]) == {YES_OR_NO}
    assert one.merge(run_names(), on="step")["score"].tolist() == one["score"].tolist()


def run_names() -> pd.DataFrame:
    return pd.DataFrame({"step": range(4), "epoch": 0.0})


def test_scores_of_one_unit_share_a_panel_and_are_told_apart(recorded: Path) -> None:
    run = open_run(recorded)
    both = pd.concat(
        [cosine(run, "forget", "retain", by="model"), cosine(run, "forget", "update", by="model")]
    )
    ax = trajectory(both, ax=blank().subplots())
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "cosine of forget and retain", "cosine of forget and update"
    ]  # fmt: skip
    mixed = pd.concat([both, conflict(run)])
    with pytest.raises(ValueError, match=r"values of one unit.* Found 'cosine', '0 or 1'.*facets"):
        trajectory(mixed)
    assert len(facets(mixed, trajectory, "score").axes) == 3


def test_tables_of_two_runs_are_joined(recorded: Path) -> None:
    table = g_effect(open_run(recorded), by="model")
    two = stack({"a": table, "b": table}, "run")
    assert list(two.columns)[-4:] == ["run", "value", "score", "unit"]
    assert scores_in(two) == scores_in(table)
    by_hand = again(pd.concat([table.assign(run="a"), table.assign(run="b")]))
    assert len(facets(by_hand[by_hand["effect"] == "retaining"], trajectory, "run").axes) == 2


def test_an_empty_unit_comes_back_empty() -> None:
    table = tidy(np.zeros((1, 1)), Score("plain"), steps=np.array([0]), blocks=["a"], by="layer")
    assert score_of(again(table)) == Score("plain")


# What is 0 or 1


def zeros_and_ones(steps: int = 5) -> pd.DataFrame:
    """Three layers: never, in two of five steps, and where it is known always."""
    values = np.zeros((steps, 3))
    values[:2, 1] = 1.0
    values[:, 2] = [1.0, np.nan, np.nan, 1.0, 1.0]
    score, blocks = Score("conflict", YES_OR_NO), ["a", "b", "c"]
    return tidy(values, score, steps=np.arange(steps), blocks=blocks, by="layer")


def test_profiles_of_zeros_and_ones_are_rates_without_a_band() -> None:
    ax = profile(zeros_and_ones(), ax=blank().subplots())
    assert ax.lines[-1].get_ydata().tolist() == [0.0, 40.0, 100.0]
    assert not ax.collections
    assert ax.get_ylabel() == "rate of conflict (%)"
    assert ax.get_title(loc="right") == "rate over steps"


def test_trajectories_of_zeros_and_ones_are_rates_over_the_blocks() -> None:
    ax = trajectory(zeros_and_ones(), ax=blank().subplots())
    (line,) = ax.lines[1:]
    np.testing.assert_allclose(line.get_ydata(), [200 / 3, 50.0, 0.0, 100 / 3, 100 / 3])
    assert ax.get_ylabel() == "rate of conflict (%)"
    assert ax.get_title(loc="right") == "of the blocks; rate 38 % of 13"


def test_maps_of_zeros_and_ones_have_two_colours_and_the_rate() -> None:
    ax = heatmap(zeros_and_ones(), ax=blank().subplots())
    bar = ax.collections[0].colorbar
    assert [tick.get_text() for tick in bar.ax.get_yticklabels()] == ["no", "yes"]
    assert ax.get_title(loc="right") == "rate 38 % of 13"
    undefined = zeros_and_ones().assign(value=np.nan)
    assert heatmap(undefined, ax=blank().subplots()).get_title(loc="right") == "undefined"


# What is shown of a rectified run


def test_effects_of_what_was_made_of_a_gradient_stand_beside_it(recorded: Path) -> None:
    run = open_run(recorded)
    table = g_effect(run, by="model").set_index(["effect", "step"])
    K, index = run.gram().sum(axis=1), run.index
    for effect, risk in (("unlearning", "forget"), ("retaining", "retain")):
        for source, sign, name in (
            ("objective", 1, effect),
            ("rectified", 1, f"{effect}, rectified"),
            ("update", -1, f"{effect}, update"),
        ):
            naive = [sign * k[index(risk), index(source)] for k in K]
            np.testing.assert_allclose(table.loc[name, "value"], naive, rtol=1e-12)
    told = table.groupby("effect", observed=True, sort=False)[["score", "unit"]].first()
    assert told["score"].tolist() == [
        *["G-effect before rectification"] * 2,
        *["G-effect of the rectified gradient"] * 2,
        *["G-effect of the applied update"] * 2,
    ]
    assert told["unit"].tolist() == [PER_RATE] * 4 + ["nats per token"] * 2
    assert "objective before rectification" in cosine(run, "objective", "retain")["score"][0]


def test_a_run_that_was_only_watched_is_as_it_was(unwatched: Path) -> None:
    table = g_effect(open_run(unwatched), by="model")
    assert set(table["effect"]) == {"unlearning", "retaining"}
    assert set(table["score"]) == {"G-effect"}


def test_panels_of_one_unit_share_a_scale_and_no_others(recorded: Path) -> None:
    figure = sheet(g_effect(open_run(recorded)))
    courses = [ax for ax in figure.axes if ax.get_xlabel() == "" and "\n(nats" in ax.get_ylabel()]
    limits = {}
    for ax in courses:
        limits.setdefault(ax.get_ylabel().splitlines()[-1], set()).add(ax.get_ylim())
    assert set(limits) == {f"({PER_RATE})", "(nats per token)"}
    assert figure.get_suptitle() == "G-effect, by layer"


def test_labels_of_one_unit_are_said_together_and_shortly() -> None:
    ours = "cosine of objective before rectification and retain"
    for labels, expected in (
        ([ours], ours),
        (
            ["cosine of objective and retain", ours],
            "cosine of objective (before rectification) and retain",
        ),
        (
            [ours, "cosine of objective and retain"],
            "cosine of objective (before rectification) and retain",
        ),
        (
            ["G-effect before rectification", "G-effect of the update"],
            "G-effect before rectification or of the update",
        ),
        (["cosine of a and c", "cosine of b and c"], "cosine of a and c or b and c"),
        (["G-effect", "G-effect, adapter space"], "G-effect or G-effect, adapter space"),
        (["a", "a b", "a c"], "a (b or c)"),
        (["a a", "a"], "a (a)"),
        (["fall", "rise"], "fall or rise"),
    ):
        table = pd.DataFrame({"value": 1.0, "score": labels, "unit": "s"})
        assert score_of(table) == Score(expected, "s")
