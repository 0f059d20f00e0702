"""The report of several runs: what it shows is what analyzers say, and it stays small."""

import shutil
from pathlib import Path

import pytest

from geffect import Run, open_run
from geffect.analysis import compare, conflict, cosine, g_effect, violation
from geffect.report import charts, overlays, runs_report
from geffect.report.summary import COLUMNS
from tests.utils.many_runs import random_run
from tests.utils.pages import Page, assert_self_contained


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    folder = tmp_path_factory.mktemp("runs")
    return [
        open_run(random_run(folder / "plain.h5", 12)),
        open_run(random_run(folder / "gru.h5", 9, rectified=True)),
        open_run(random_run(folder / "deep.h5", 5, layers=4, seed=2)),
    ]


@pytest.fixture(scope="module")
def text(runs: list[Run]) -> str:
    return runs_report(runs)


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def test_it_opens_offline(text: str, page: Page) -> None:
    assert_self_contained(text)
    assert {"#run-1", "#run-2", "#run-3", "#word-cosine", "#word-conflict"} <= {*page.links}
    for word in ("NPO, beta 0.1", "gru, of the model, gradient space", "AdamW", "Findings"):
        assert word in page.words


def test_the_table_has_what_analyzers_say(runs: list[Run], page: Page) -> None:
    head, *rows = page.tables[0]
    assert head == ["run", "objective", "rectifier", *(column.heading for column in COLUMNS)]
    for run, (name, objective, _, *cells) in zip(runs, rows, strict=True):
        assert (name, objective) == (run.name, "NPO, beta 0.1")
        effects = g_effect(run, "model")
        unlearning, retaining = (
            effects.loc[effects["effect"] == effect, "value"]
            for effect in ("unlearning", "retaining")
        )
        losses = run.losses()
        expected = [
            len(run.steps), losses["forget"][-1], losses["retain"][-1],
            unlearning.iloc[-1], unlearning.mean(), retaining.iloc[-1], retaining.mean(),
            cosine(run, "objective", "retain", "model")["value"].mean(),
            100 * conflict(run)["value"].mean(),
            100 * violation(run)["value"].mean() if "update" in run.sources else float("nan"),
        ]  # fmt: skip
        shown = [float(cell.removesuffix("\u00a0%").replace("undefined", "nan")) for cell in cells]
        assert shown[:8] == pytest.approx(expected[:8], rel=5e-4)
        assert shown[8:] == pytest.approx(expected[8:], abs=0.051, nan_ok=True)


def test_charts_hold_the_values_of_the_score_table(runs: list[Run], page: Page) -> None:
    for run in runs:
        table = g_effect(run, "layer")
        for effect, part in table.groupby("effect", observed=True):
            title = f"{effect}: {part['score'].iloc[0]} ({part['unit'].iloc[0]})"
            wide = part.pivot(index="layer", columns="step", values="value")
            assert [
                chart
                for chart in page.charts
                if chart["title"] == title
                and chart["steps"] == [*wide.columns]
                and chart["blocks"] == [*wide.index]
                and chart["rows"] == [[float(f"{v:.4g}") for v in row] for row in wide.to_numpy()]
            ], title


def test_overlays_have_a_curve_for_each_run(runs: list[Run], page: Page) -> None:
    names = [run.name for run in runs]
    over = [c for c in page.charts if c["kind"] == "lines"
            and [one["name"] for one in c["series"]] == names]  # fmt: skip
    assert len(over) == 6
    (retain,) = [chart for chart in over if chart["title"].startswith("retain risk")]
    shown = [values for _, *several in retain["tables"] for values in several]
    for run, values in zip(runs, shown, strict=True):
        assert values == [float(f"{v:.4g}") for v in run.losses()["retain"]]
    colours = [(one["colour"], tuple(one["dash"])) for one in retain["series"]]
    assert len(set(colours)) == len(names)


def test_maps_of_one_unit_have_one_scale(page: Page) -> None:
    scales: dict[str, list[object]] = {}
    for chart in page.charts:
        if chart["kind"] == "map" and "unit learning rate" in chart["title"]:
            scales.setdefault(chart["title"][-30:], []).append(chart["scale"])
    for several in scales.values():
        assert len(several) >= 6 and all(one == several[0] for one in several)


def test_it_says_where_runs_part(runs: list[Run], page: Page) -> None:
    head, gru, deep = page.tables[1]
    assert head == ["run", "found", "first step", "why"]
    assert gru[:2] == ["gru", compare(runs[0], runs[1]).level]
    assert gru[3] == compare(runs[0], runs[1]).sentence.replace("`", "")
    assert deep[:2] == ["deep", "not comparable"] and "the same parameters" in deep[3]


def test_one_run_is_not_compared(runs: list[Run]) -> None:
    text = runs_report(runs[:1])
    assert_self_contained(text)
    assert "<details open>" in text and "Where they part" not in text
    assert Page(text).tables[0][1][0] == "plain"


def test_no_run_is_refused() -> None:
    with pytest.raises(ValueError, match="should be one run or more"):
        runs_report([])


def test_runs_of_one_name_are_told_apart(runs: list[Run], tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        shutil.copy(runs[0].path, tmp_path / folder / "run.h5")
    several = [open_run(tmp_path / name / "run.h5") for name in ("a", "b", "a")]
    rows = Page(runs_report(several)).tables[0][1:]
    assert [row[0] for row in rows] == ["a/run (1)", "b/run", "a/run (3)"]


def test_twenty_runs_fit(tmp_path: Path) -> None:
    one = open_run(random_run(tmp_path / "one.h5", 60, layers=12, rectified=True))
    text = runs_report([one] * 20)
    assert len(text.encode()) < 6_000_000
    assert_self_contained(text)


def test_all_numbers_of_long_runs_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundredth of the room: what is thinned says so, and loses no peak."""
    monkeypatch.setattr(charts, "NUMBERS", charts.NUMBERS // 100)
    monkeypatch.setattr(overlays, "POINTS", overlays.POINTS // 100)
    monkeypatch.setattr(charts, "FEWEST", 10)
    run = open_run(random_run(tmp_path / "long.h5", 90, layers=6, rectified=True))
    page = Page(runs_report([run] * 3))
    maps = [chart for chart in page.charts if chart["kind"] == "map"]
    assert sum(len(row) for chart in maps for row in chart["rows"]) <= charts.NUMBERS
    curves = [chart for chart in page.charts if chart["kind"] == "lines"][:6]
    assert sum(len(v) for c in curves for _, *own in c["tables"] for v in own) <= overlays.POINTS
    assert "Of spans of steps, curves show the lowest and the highest value" in page.words
    table = g_effect(run, "layer")
    whole = table[table["effect"] == "unlearning"].pivot(
        index="layer", columns="step", values="value"
    )
    shown = next(c for c in maps if c["title"].startswith("unlearning: "))
    ends = [*shown["steps"][1:], len(run.steps)]
    assert 1 < len(ends) < len(run.steps)
    for row, own in zip(shown["rows"], whole.to_numpy(), strict=True):
        parts = [own[slice(*between)] for between in zip(shown["steps"], ends, strict=True)]
        assert row == [float(f"{max(part, key=abs):.4g}") for part in parts]
    steps, *several = next(c for c in curves if "unlearning" in c["title"])["tables"][0]
    effects = g_effect(run, "model")
    course = effects.loc[effects["effect"] == "unlearning", "value"].to_numpy()
    for values in several:
        assert values == [float(f"{course[int(step)]:.4g}") for step in steps]
        assert {float(f"{end:.4g}") for end in (course.min(), course.max())} <= {*values}
