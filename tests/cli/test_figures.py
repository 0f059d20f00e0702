"""`geffect figures`: which figures of the paper are made of which runs, and why others are not."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from geffect import Run, open_run
from geffect.analysis import METRICS, g_effect, implicit_weights, setting
from geffect.cli.figures import KINDS, Given, labels, made_of
from geffect.cli.paper_figures import figures
from geffect.plots import paper
from tests.utils.command_line import Ask
from tests.utils.settings import recorded

BOTH = {"weight": 1.0, "inverse confidence": 5.0}
SAMPLES = {
    "sample": np.arange(4).repeat(2),
    "model": ["model"] * 8,
    "risk": ["forget", "retain"] * 4,
    "value": np.linspace(-1.0, 1.0, 8),
    "weight": np.linspace(0.1, 1.0, 4).repeat(2),
}
ALL = [figure.name for figure in figures()]


def run(path: Path, *given: Any, **how: Any) -> Run:
    return open_run(recorded(path, *given, **how))


def made(*runs: Run) -> dict[str, Any]:
    return {one.figure.name: one for one in made_of(runs)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run for each figure, of some several."""
    place = tmp_path_factory.mktemp("runs")
    tables = {METRICS: {"metric": ["forget quality", "utility"], "value": np.array([0.1, 0.6])}}
    recorded(place / "ga.h5", "ga", tables=tables, weights={"inverse confidence": 9.0})
    recorded(place / "kl.h5", "ga+kl")
    recorded(place / "rr.h5", "ga+rr")
    for alpha in (0.5, 2.0):
        recorded(place / f"wga{alpha}.h5", "wga", options={"alpha": alpha})
    for beta in (0.1, 0.5):
        recorded(
            place / f"npo{beta}.h5", "npo", options={"beta": beta}, weights=BOTH,
            tables={"samples": SAMPLES},
        )  # fmt: skip
    recorded(place / "tnpo.h5", "tnpo")
    recorded(place / "po.h5", "po")
    for layer in (1.0, 2.0):
        recorded(place / f"rmu{layer}.h5", "rmu", options={"layer": layer})
    return place


def test_every_figure_is_made_with_its_numbers(folder: Path, ask: Ask, tmp_path: Path) -> None:
    out = tmp_path / "new" / "figures"
    code, said, err = ask("figures", *sorted(folder.glob("*.h5")), "--paper", "-o", out)
    assert code == 0, err
    assert {path.name for path in out.iterdir()} == {f"{n}{kind}" for n in ALL for kind in KINDS}
    assert f"{len(ALL)} of {len(ALL)} figures in {out}" in said
    for line, name in zip(said.splitlines(), ALL, strict=False):
        assert line.startswith(f"{name}: ") and ".h5" in line
    pdf = (out / "figure-4.pdf").read_bytes()
    assert (b"/Type3" not in pdf and b"/TrueType" in pdf) or b"/CIDFontType2" in pdf
    drawn = pd.read_csv(out / "figure-4.csv")
    assert drawn["setting"].unique().tolist() == ["beta 0.1", "beta 0.5"]
    for beta in (0.1, 0.5):
        own = drawn[drawn["setting"] == f"beta {beta}"].drop(columns="setting")
        expected = g_effect(open_run(folder / f"npo{beta}.h5"), by="model")
        np.testing.assert_array_equal(own["value"], expected["value"])


def test_of_each_kind_of_run_the_figure_has_those_alone(folder: Path) -> None:
    found = made(*map(open_run, sorted(folder.glob("*.h5"))))
    of = {name: [given.file for given in one.runs] for name, one in found.items()}
    assert of["figure-3a"] == ["ga.h5"]  # that with a regulariser is another comparison
    assert of["figure-3c"] == ["wga0.5.h5", "wga2.0.h5"]
    assert of["figure-5a"] == ["npo0.1.h5", "npo0.5.h5"]
    assert of["figure-5b"] == ["npo0.1.h5"]
    assert of["figure-7"] == ["rmu1.0.h5", "rmu2.0.h5"]
    assert of["regularisers"] == ["kl.h5", "rr.h5"]
    assert of["inverse-confidence"] == ["ga.h5", "npo0.1.h5", "npo0.5.h5"]
    assert of["table-1"] == ["ga.h5"]
    settings = {
        name: one.table["setting"].unique().tolist()
        for name, one in found.items()
        if "setting" in one.table
    }
    assert settings["figure-3c"] == ["alpha 0.5", "alpha 2"]
    assert settings["figure-7"] == ["layer 1, c 2", "layer 2, c 2"]
    assert settings["regularisers"] == ["GA + KL", "GA + RR"]


def test_means_are_those_of_the_file(folder: Path) -> None:
    npo = open_run(folder / "npo0.5.h5")
    weights = implicit_weights(npo)
    for name, weight in (("figure-5a", "weight"), ("inverse-confidence", "inverse confidence")):
        table = made(npo)[name].table
        own = weights[(weights["weight"] == weight) & (weights["statistic"] == "mean")]
        np.testing.assert_array_equal(table["value"], own["value"])


def test_a_run_with_a_regulariser_stands_in_where_there_is_none_without(tmp_path: Path) -> None:
    found = made(run(tmp_path / "kl.h5", "ga+kl"))
    assert [given.file for given in found["figure-3a"].runs] == ["kl.h5"]
    assert found["figure-3a"].table["setting"].unique().tolist() == ["GA + KL"]


@pytest.mark.parametrize(
    ("how", "name", "says"),
    [
        (
            {"objective": "ga", "rectified": True}, "figure-3a",
            "a rectifier changed the steps of a run of GA. Record one without a rectifier",
        ),
        ({"objective": "ga", "retain": False}, "figure-3a", "should be one of objective, forget"),
        ({"objective": "wga"}, "figure-3a", "run of GA. Record one with objective=.ga"),
        ({"objective": "wga"}, "regularisers", "GD, KL or RR. Record one with objective=.ga.kl"),
        ({"objective": "npo"}, "figure-5a", "should hold implicit weights"),
        ({"objective": "npo", "weights": {"other": 1.0}}, "figure-5a", "hold the weight `weight`"),
        ({"objective": "npo"}, "figure-5b", "should hold a table `samples`"),
        (
            {"objective": "npo", "tables": {"samples": {k: v for k, v in SAMPLES.items()
                                                         if k != "weight"}}},
            "figure-5b", "should have the weight of each sample",
        ),
        ({"objective": "ga"}, "table-1", "should hold a table `metrics`"),
        (
            {"objective": "ga", "tables": {METRICS: {"metric": ["a", "a"], "value": np.ones(2)}}},
            "table-1", "each metric once",
        ),
        ({"objective": "ga", "retain": False}, "figure-1", "Found `retain`"),
    ],
)  # fmt: skip
def test_why_a_figure_was_not_made(
    tmp_path: Path, how: dict[str, Any], name: str, says: str
) -> None:
    one = made(run(tmp_path / "run.h5", **how))[name]
    assert one.table is None and re.search(says, one.said), one.said
    assert one.said.startswith(f"{name}: not made: ") and "\n" not in one.said


def test_what_several_runs_lack_is_said_of_the_first_with_their_count(tmp_path: Path) -> None:
    runs = [run(tmp_path / f"{name}.h5", "ga") for name in ("a", "b", "c")]
    for some, more in ((runs[:2], "1 run"), (runs, "2 runs")):
        says = made(*some)["table-1"].said
        assert says.startswith("table-1: not made: a.h5: ")
        assert says.endswith(f" The same goes for {more} more.")


def test_the_half_spaces_are_of_any_run_and_rather_of_one_without_a_rectifier(
    tmp_path: Path,
) -> None:
    rectified = run(tmp_path / "a.h5", "ga", rectified=True)
    found = made(rectified)
    assert [given.file for given in found["figure-1"].runs] == ["a.h5"]
    assert [name for name, one in found.items() if one.table is not None] == ["figure-1"]
    plain = run(tmp_path / "b.h5", "ga")
    assert [given.file for given in made(rectified, plain)["figure-1"].runs] == ["b.h5"]


def test_table_1_has_the_columns_of_the_paper_and_says_what_no_run_has(tmp_path: Path) -> None:
    metrics = {"metric": ["own", "model utility"], "value": np.array([0.25, 0.5])}
    table = made(run(tmp_path / "a.h5", "ga", tables={METRICS: metrics}))["table-1"].table
    texts = {text.get_text(): text.get_position()[0] for text in paper.table_1(table).axes[0].texts}
    heads = ["forget\nquality", "model\nutility", "ES exact", "ES\nperturbed", "own"]
    assert [texts[head] for head in heads] == sorted(texts[head] for head in heads)
    assert texts["0.500"] == texts["model\nutility"] and texts["0.250"] == texts["own"]
    (below,) = (" ".join(text.split()) for text in texts if text.startswith("Not in the runs"))
    assert below.startswith("Not in the runs: forget quality, ES exact, ES perturbed. ")
    whole = table.assign(metric=["ES exact", "ES perturbed"])
    both = pd.concat([whole, whole.assign(metric=["forget quality", "model utility"])])
    assert not any("Not in" in text.get_text() for text in paper.table_1(both).axes[0].texts)


def test_a_run_that_lacks_something_is_named_beside_the_others(tmp_path: Path) -> None:
    there, lacking = (run(tmp_path / f"{name}.h5", "ga", retain=name == "a") for name in ("a", "b"))
    found = made(lacking, there)
    assert [given.file for given in found["figure-3a"].runs] == ["a.h5"]
    assert "not of b.h5: " in found["figure-3a"].said
    assert [given.file for given in found["figure-3b"].runs] == ["a.h5"]


def test_runs_that_differ_in_nothing_told_have_names_of_their_own(
    tmp_path: Path, example_run: Callable[..., Run]
) -> None:
    def named(*runs: Run) -> list[str]:
        return labels([Given(one, setting(one), one.name) for one in runs], ("beta",))

    seeds = [run(tmp_path / f"{n}.h5", "npo", metadata={"seed": n}) for n in (0, 1)]
    assert named(*seeds) == ["beta 0.1"] * 2
    assert named(*seeds, run(tmp_path / "again.h5", "npo", metadata={"seed": 1})) == [
        "beta 0.1, seed 0", "beta 0.1, seed 1, 1", "beta 0.1, seed 1, again",
    ]  # fmt: skip
    files = [run(tmp_path / f"{name}.h5", "npo") for name in "ab"]
    assert named(*files) == ["beta 0.1, a", "beta 0.1, b"]
    assert named(files[0]) == ["beta 0.1"]
    assert named(files[0], example_run()) == ["NPO, beta 0.1", "unknown"]
    (tmp_path / "other").mkdir()
    same = run(tmp_path / "other" / "a.h5", "npo")
    assert len(set(named(files[0], same))) == 2


def test_settings_stand_in_the_order_of_their_options(tmp_path: Path) -> None:
    """Numbers as numbers, whatever order the shell lists their files in."""
    runs = [
        run(tmp_path / f"{beta}.h5", "npo", options={"beta": beta}, weights={"weight": 1.0})
        for beta in (0.5, 10.0, 2.0)
    ]
    found = made(*runs)
    for name in ("figure-4", "figure-5a"):
        settings = [*found[name].table["setting"].cat.categories]
        assert settings == ["beta 0.5", "beta 2", "beta 10"]
        assert [given.file for given in found[name].runs] == ["0.5.h5", "2.0.h5", "10.0.h5"]
    mixed = made(run(tmp_path / "rr.h5", "ga+rr"), run(tmp_path / "kl.h5", "ga+kl"))
    assert [given.file for given in mixed["regularisers"].runs] == ["rr.h5", "kl.h5"]


def test_seeds_of_one_setting_are_a_line_with_a_band(tmp_path: Path) -> None:
    tables = [{METRICS: {"metric": ["utility"], "value": np.array([v])}} for v in (0.25, 0.75)]
    runs = [
        run(tmp_path / f"{beta}-{seed}.h5", "npo", options={"beta": beta}, metadata={"seed": seed},
            weights={"weight": 1.0 + seed}, tables=tables[seed])
        for beta, seed in ((0.1, 0), (0.1, 1), (0.5, 0))
    ]  # fmt: skip
    found = made(*runs)
    effects, weights, numbers = (found[n] for n in ("figure-4", "figure-5a", "table-1"))
    assert "mean and range of the seeds of a setting" in effects.said
    first, second = paper.figure_4(effects.table).axes
    assert [ax.get_title(loc="left") for ax in (first, second)] == ["beta 0.1", "beta 0.5"]
    assert "mean and range of 2 seeds" in {text.get_text() for text in first.texts} | {
        first.get_title(loc="right")
    }
    assert len(first.collections) == 2 and not second.collections
    (ax,) = paper.figure_5a(weights.table).axes
    drawn = next(line for line in ax.lines if line.get_label() == "beta 0.1")
    each = [open_run(r.path).weights()["weight"]["mean"] for r in runs[:2]]
    np.testing.assert_allclose(drawn.get_ydata(), np.mean(each, axis=0))
    low, high = (end(each, axis=0) for end in (np.min, np.max))
    (band,) = ax.collections
    reached = band.get_paths()[0].vertices
    assert {*low, *high} <= {*reached[:, 1]}
    written = [text.get_text() for text in paper.table_1(numbers.table).axes[0].texts]
    assert "0.500\n0.25\N{EN DASH}0.75" in written
    assert "mean and range of 2 seeds" in {text.replace("\n", " ") for text in written}


def test_a_figure_of_one_setting_has_all_its_seeds(tmp_path: Path) -> None:
    def runs(objective: str, **how: Any) -> list[Run]:
        return [
            run(tmp_path / f"{objective}{number}-{seed}.h5", objective, metadata={"seed": seed},
                options=options, **how)
            for number, (seed, options) in enumerate(
                [(0, {}), (1, {}), (0, {"beta": 0.5} if objective == "npo" else {})]
            )
        ]  # fmt: skip

    npo = runs("npo", tables={"samples": SAMPLES})
    again = run(tmp_path / "again.h5", "npo", metadata={"seed": 1}, tables={"samples": SAMPLES})
    npo.append(again)  # a second run of a seed is no further seed
    samples = made(*npo)["figure-5b"]
    assert [given.file for given in samples.runs] == ["npo0-0.h5", "npo1-1.h5"]
    assert "weight under NPO, seeds pooled, from npo0-0.h5, npo1-1.h5" in samples.said
    (ax,) = paper.figure_5b(samples.table).axes
    assert ax.get_title(loc="left") == "beta 0.1"
    assert sum(len(dots.get_offsets()) for dots in ax.collections if dots.get_offsets().size) == 8
    ga = runs("ga")[:2]
    groups, sketch = (made(*ga)[name] for name in ("figure-3b", "figure-1"))
    assert [given.file for given in groups.runs] == ["ga0-0.h5", "ga1-1.h5"]
    assert all(ax.collections for ax in paper.figure_3b(groups.table).axes)
    assert [given.file for given in sketch.runs] == ["ga0-0.h5"] and "seeds" not in sketch.said


def test_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for seed in "01":
        (tmp_path / seed).mkdir()
    runs = [run(tmp_path / seed / "a.h5", "ga", metadata={"seed": int(seed)}) for seed in "01"]
    found = made(*runs)["figure-3a"]
    assert found.said.endswith("from 0/a.h5, 1/a.h5")


def test_what_is_there_is_not_replaced_unasked(folder: Path, ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "figure-6.csv").write_text("mine", encoding="utf-8")
    code, _, err = ask("figures", folder / "po.h5", "--paper", "-o", tmp_path)
    assert code == 1 and "--overwrite" in err
    assert [path.name for path in tmp_path.iterdir()] == ["figure-6.csv"]
    code, said, err = ask("figures", folder / "po.h5", "--paper", "-o", tmp_path, "--overwrite")
    assert code == 0 and "figure-6: effects of PO, from po.h5" in said
    assert (tmp_path / "figure-6.csv").read_text(encoding="utf-8").startswith("step,")


def test_what_is_asked_wrongly(folder: Path, ask: Ask, tmp_path: Path) -> None:
    po, file = folder / "po.h5", tmp_path / "file"
    file.write_text("", encoding="utf-8")
    for words, code, says in (
        ([po, "-o", tmp_path], 2, "Found no --paper"),
        ([po, "--paper", "-o", file], 2, "should be a folder"),
        ([po, po, "--paper", "-o", tmp_path], 1, "twice"),
        ([po, "--paper", "-o", tmp_path, "--style", "poster"], 2, "column, page, slide"),
        ([tmp_path / "no.h5", "--paper", "-o", tmp_path], 1, "no.h5"),
    ):
        found, _, err = ask("figures", *words)
        assert found == code and says in err, (words, err)


def test_each_figure_has_a_function() -> None:
    for name in ALL:
        assert callable(getattr(paper, name.replace("-", "_")))
