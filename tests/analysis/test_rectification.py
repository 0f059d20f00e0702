"""What a rectifier did, against loops over raw vectors; runs of old, and what the pages show."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import cycle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread

from geffect import Recorder, Rectifier, Run, open_run
from geffect.analysis import intervals, predicted_change, rectification, violation
from geffect.layers import describe
from geffect.objectives import nll
from geffect.projection import gru
from geffect.projection.rules import nearest
from geffect.report import runs_report
from geffect.store import layout
from geffect.store.schema import RECTIFICATION_COLUMNS, VERSION, Contents, Row
from geffect.store.writer import RunWriter
from tests.utils import shallow as tiny
from tests.utils.command_line import Ask

PARAMETERS = describe(tiny.llama())[::3]
LABELS: dict[str, Callable[[int], str]] = {
    "parameter": lambda i: PARAMETERS[i].name,
    "layer": lambda i: PARAMETERS[i].layer,
    "group": lambda i: PARAMETERS[i].group,
    "model": lambda i: "model",
}
STEPS, RATE = 3, 0.1
Vectors = list[np.ndarray]  # one a parameter


class Made:
    """Steps of random vectors: u, x, and the averages and gradients of some retain sets."""

    def __init__(self, sets: Sequence[str], seed: int = 0) -> None:
        rng = np.random.default_rng(seed)

        def vectors() -> list[Vectors]:
            return [[rng.normal(size=6) for _ in PARAMETERS] for _ in range(STEPS)]

        self.sets = sets
        self.u, self.x, self.update = vectors(), vectors(), vectors()
        self.average = {name: vectors() for name in sets}
        self.fresh = {name: vectors() for name in sets}
        self.fired = rng.integers(2, size=(STEPS, len(PARAMETERS))).astype(float)
        self.coefficient = rng.random((STEPS, len(PARAMETERS), len(sets)))
        self.unmet = rng.integers(2, size=(STEPS, len(PARAMETERS))).astype(float)
        # Numbers of coordinates: of all, of a mask, of what it has in common, of both together.
        self.counts = np.sort(rng.integers(1, 9, size=(STEPS, len(PARAMETERS), 4)), axis=-1)

    def write(
        self, path: Path, scope: str, *, update: bool, rows: Sequence[int] = range(STEPS)
    ) -> Run:
        """The run of a rectifier of this scope; without `update` it has followed the update."""
        own = _members(scope)
        several = len(self.sets) > 1
        sources = {"objective": self.u, **self.fresh}
        sources |= {f"{name}_ema": self.average[name] for name in self.sets}
        sources |= {"update": self.update} if update else {}
        manifest = {"rectifier": {"scope": scope, "space": "gradient"}, "metadata": {}}
        writer = RunWriter(path, PARAMETERS, resume=path.exists())
        writer.begin(
            Contents(
                tuple(sources),
                {"format_version": VERSION, **manifest},
                blocks=tuple(
                    f"{block}, {name}" if several else block for block in own for name in self.sets
                ),
            )
        )
        for step in rows:
            stacked = np.array([vectors[step] for vectors in sources.values()])
            writer.append(
                Row(
                    step=step,
                    lr=RATE,
                    losses=np.full(len(sources), np.nan),
                    gram=np.einsum("apn,bpn->pab", stacked, stacked),
                    rectification=np.array(
                        [
                            self.report(step, members, name, followed=not update)
                            for members in own.values()
                            for name in self.sets
                        ]
                    )[:, : len(layout.RECTIFICATION_COLUMNS)],
                )
            )
        writer.close(complete=True)
        return open_run(path)

    def report(
        self, step: int, members: list[int], name: str, *, followed: bool
    ) -> tuple[float, ...]:
        """What the rectifier says of a block, in the order of the columns."""
        u, x, r = self.u[step], self.x[step], self.average[name][step]
        applied = [
            -dot(self.update[step], of[name][step], members) if followed else np.nan
            for of in (self.average, self.fresh)
        ]
        return (
            self.fired[step, members[0]],
            self.coefficient[step, members[0], self.sets.index(name)],
            dot(u, r, members),
            dot(x, r, members),
            dot(u, u, members) ** 0.5,
            dot(x, x, members) ** 0.5,
            dot(r, r, members) ** 0.5,
            *applied,
            self.unmet[step, members[0]],
            *(self.counts[step, members[0], place] for place in (3, 1, 0, 2)),
        )


def _members(by: str) -> dict[str, list[int]]:
    """The parameters of every block."""
    found: dict[str, list[int]] = {}
    for i in range(len(PARAMETERS)):
        found.setdefault(LABELS[by](i), []).append(i)
    return found


def dot(a: Vectors, b: Vectors, members: list[int]) -> float:
    return float(sum(float(x) * float(y) for i in members for x, y in zip(a[i], b[i], strict=True)))


def expected(
    made: Made, scope: str, step: int, members: list[int], name: str
) -> Mapping[str, float]:
    """The quantities of a block, from the vectors."""
    u, x, D = made.u[step], made.x[step], made.update[step]
    r, g = made.average[name][step], made.fresh[name][step]

    def length(v: Vectors) -> float:
        return dot(v, v, members) ** 0.5

    parts = [own for own in _members(scope).values() if own[0] in members]
    along = -dot(D, r, members) / length(D) / length(r)
    return {
        "fired": max(made.fired[step, part[0]] for part in parts),
        "inner_before": dot(u, r, members),
        "inner_after": dot(x, r, members),
        "cosine_before": dot(u, r, members) / length(u) / length(r),
        "cosine_after": dot(x, r, members) / length(x) / length(r),
        "coefficient": made.coefficient[step, members[0], made.sets.index(name)]
        if len(parts) == 1
        else np.nan,
        "removed": 1 - (length(x) / length(u)) ** 2,
        "retain_norm": length(r),
        "applied_average": -dot(D, r, members),
        "applied_fresh": -dot(D, g, members),
        "cosine_applied": along,
        "violated": float(along < -1e-6),
        "unmet": max(made.unmet[step, part[0]] for part in parts),
        "selected": _over(made.counts[step], parts, 1, 3),
        "overlap": _over(made.counts[step], parts, 0, 2),
    }


def _over(counts: np.ndarray, parts: list[list[int]], part: int, whole: int) -> float:
    sums = [sum(float(counts[own[0], place]) for own in parts) for place in (part, whole)]
    return sums[0] / sums[1]


def values(table: pd.DataFrame, **where: object) -> np.ndarray:
    for column, value in where.items():
        table = table[table[column] == value]
    found: np.ndarray = table.sort_values("step")["value"].to_numpy()
    return found


SCOPES = [
    ("model", "model"),
    ("group", "group"),
    ("layer", "layer"),
    ("layer", "group"),
    ("layer", "model"),
    ("parameter", "parameter"),
    ("parameter", "layer"),
]


@pytest.mark.parametrize(
    ("scope", "by", "sets", "update"),
    [
        (scope, by, ("retain",) if one == update else ("retain", "world"), update)
        for (scope, by), one in zip(SCOPES, cycle([True, False]), strict=False)
        for update in (True, False)
    ],
)
def test_every_quantity(
    tmp_path: Path, scope: str, by: str, sets: tuple[str, ...], update: bool
) -> None:
    """Of scope with blocks, number of sets and recorded update, each pair of values."""
    made = Made(sets)
    table = rectification(made.write(tmp_path / "run.h5", scope, update=update), by)
    assert list(table.columns) == ["step", by, "against", "quantity", "value", "score", "unit"]
    own = _members(by)
    assert len(table) == STEPS * len(own) * len(sets) * 15
    for block, members in own.items():
        for name in sets:
            part = table[(table[by] == block) & (table["against"] == name)]
            for step in range(STEPS):
                naive = expected(made, scope, step, members, name)
                if not update:  # the length of the update is not known
                    naive = {**naive, "cosine_applied": np.nan}
                found = part[part["step"] == step].set_index("quantity")["value"].to_dict()
                assert found == pytest.approx(naive, rel=1e-12, nan_ok=True)


def test_in_update_space_what_is_left_is_what_is_applied(tmp_path: Path) -> None:
    """A followed update on its constraint is no violation for what rounding makes of it."""
    numbers = dict.fromkeys(RECTIFICATION_COLUMNS, 1.0)
    for space, applied, violated in [
        ("update", -1e-8, 0.0),
        ("update", -1e-5, 1.0),
        ("gradient", -1e-8, 0.0),  # gradient descent with rate 0.1
        ("gradient", -1e-6, 1.0),
    ]:
        path = tmp_path / f"{space}{applied}.h5"
        writer = RunWriter(path, PARAMETERS[:1])
        manifest = {"rectifier": {"scope": "model", "space": space}, "metadata": {}}
        contents = Contents(("objective", "retain", "retain_ema"), manifest, blocks=("model",))
        writer.begin(contents)
        reported = numbers | {"applied_average": applied, "applied_fresh": 0.5}
        writer.append(
            Row(
                step=0,
                lr=RATE,
                losses=np.zeros(3),
                gram=np.ones((1, 3, 3)),
                rectification=np.array([[*reported.values()]]),
            )
        )
        writer.close(complete=True)
        table = rectification(open_run(path))
        assert values(table, quantity="violated").tolist() == [violated]
        cosine = values(table, quantity="cosine_applied")
        assert cosine == pytest.approx(applied if space == "update" else np.nan, nan_ok=True)


# Runs of a rectifier


def step_of(recorder: Recorder, model: torch.nn.Module, pair: object, **how: object) -> None:
    """One step of GA, as the recorder is told of it."""
    recorder.backward(
        objective={"forget": -1.0},
        forget=nll(model, pair["forget"]),
        retain=nll(model, pair["retain"]),
        **how,
    )


@pytest.mark.parametrize("space", ["gradient", "update"])
def test_a_run_of_gradient_descent_keeps_what_the_rule_promised(tmp_path: Path, space: str) -> None:
    """u, x and the update of SGD are one vector times the rate, so each tells the others."""
    model = tiny.llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    attached = {"optimizer": optimizer} if space == "update" else {}
    rectifier = Rectifier(model, space=space, **attached)  # type: ignore[arg-type]
    with Recorder(model, tmp_path / "run.h5", update=True) as recorder:
        for pair in tiny.pairs(6):
            step_of(recorder, model, pair, rectifier=rectifier)
            optimizer.step()
            optimizer.zero_grad()
    run = open_run(tmp_path / "run.h5")
    table = rectification(run)
    K = run.gram().sum(axis=1)
    u, r = run.index("objective"), run.index("retain_ema")
    rate = RATE if space == "update" else 1.0
    found = {name: values(table, quantity=name) for name in table["quantity"].cat.categories}
    fired = K[:, u, r] < 0
    assert fired.any() and not fired.all(), "both kinds of step are wanted"
    assert found["fired"].tolist() == fired.astype(float).tolist()
    assert found["inner_before"] == pytest.approx(rate * K[:, u, r], rel=1e-3)
    kappa = np.where(fired, -K[:, u, r] / K[:, r, r], 0.0)
    assert found["coefficient"] == pytest.approx(rate * kappa, rel=1e-3)
    share = np.where(fired, K[:, u, r] ** 2 / K[:, u, u] / K[:, r, r], 0.0)
    assert found["removed"] == pytest.approx(share, abs=1e-4)
    assert (np.abs(found["cosine_after"][fired]) < 1e-5).all()
    assert found["applied_average"] == pytest.approx(
        RATE / rate * found["inner_after"], abs=1e-4 * np.abs(found["inner_before"]).max()
    )


@pytest.mark.parametrize("scope", ["model", "layer", "coordinate"])
@pytest.mark.parametrize("space", ["gradient", "update"])
def test_a_rectifier_that_follows_says_what_the_update_says(
    tmp_path: Path, space: str, scope: str
) -> None:
    """The same run twice, with two retain sets: the update is recorded, or followed."""
    tables = []
    for update in (True, False):
        model = tiny.llama()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        rectifier = Rectifier(
            model, nearest if scope != "coordinate" else gru, protect=("retain", "world"),
            space=space, scope=scope, optimizer=optimizer, measure_update=True,
        )  # type: ignore[arg-type]  # fmt: skip
        with Recorder(model, tmp_path / f"{update}.h5", update=update) as recorder:
            for pair, other in zip(tiny.pairs(3), tiny.pairs(3, seed=50), strict=True):
                step_of(recorder, model, pair, rectifier=rectifier,
                        world=nll(model, other["retain"]))  # fmt: skip
                optimizer.step()
                optimizer.zero_grad()
        rectifier.detach()
        by = "layer" if scope == "layer" else "model"
        tables.append(rectification(open_run(tmp_path / f"{update}.h5"), by).set_index("quantity"))
    recorded, followed = tables
    assert list(recorded["against"].cat.categories) == ["retain", "world"]
    known = ["applied_average", "applied_fresh", "violated", "fired", "inner_after"]
    known += ["cosine_applied"] if space == "update" else []
    for quantity in known:
        found = followed.loc[quantity, "value"].to_numpy()
        wanted = recorded.loc[quantity, "value"].to_numpy()
        assert not np.isnan(wanted).any()
        assert found == pytest.approx(wanted, abs=1e-4 * np.abs(wanted).max()), quantity


def test_it_says_of_the_update_what_the_other_scores_say(recorded: Path) -> None:
    run = open_run(recorded)
    table = rectification(run)
    assert values(table, quantity="violated").tolist() == violation(run)["value"].tolist()
    fresh = values(predicted_change(run, by="model"), risk="retain")
    assert values(table, quantity="applied_fresh").tolist() == fresh.tolist()


def test_intervals_can_be_had_of_it(recorded: Path) -> None:
    table = intervals(rectification, open_run(recorded), replicates=3)
    assert {"rows", "low", "high"} <= set(table.columns)
    assert table["value"].notna().sum() > 20


# What is undefined, and what is refused


def test_a_step_that_was_left_alone_is_undefined_and_has_not_fired(tmp_path: Path) -> None:
    model = tiny.llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    rectifier = Rectifier(model)
    (pair,) = tiny.pairs(1)
    with Recorder(model, tmp_path / "run.h5") as recorder:
        with pytest.warns(UserWarning, match="was not rectified"):
            recorder.backward(
                objective={"forget": -1.0},
                forget=nll(model, pair["forget"]),
                retain=0.0 * nll(model, pair["retain"]),
                rectifier=rectifier,
            )
        optimizer.step()
        optimizer.zero_grad()
        step_of(recorder, model, pair, rectifier=rectifier)
    table = rectification(open_run(tmp_path / "run.h5"))
    first = table[table["step"] == 0].set_index("quantity")["value"]
    assert first["fired"] == 0.0
    assert first.drop(["fired", "coefficient"]).isna().all()
    second = table[table["step"] == 1].set_index("quantity")["value"]
    applied = ["applied_average", "applied_fresh", "cosine_applied", "violated"]
    assert second[applied].isna().all(), "nobody looked at the update"
    assert second.drop(applied).notna().all()


def test_zero_lengths_have_no_angle_and_no_share(tmp_path: Path) -> None:
    made = Made(["retain"])
    made.u[0] = [0 * v for v in made.u[0]]
    made.update[1] = [0 * v for v in made.update[1]]
    made.average["retain"][2] = [0 * v for v in made.average["retain"][2]]
    table = rectification(made.write(tmp_path / "run.h5", "model", update=True))
    undefined = {
        name: np.flatnonzero(np.isnan(values(table, quantity=name))).tolist()
        for name in table["quantity"].cat.categories
    }
    assert {name: steps for name, steps in undefined.items() if steps} == {
        "cosine_before": [0, 2],
        "cosine_after": [2],
        "removed": [0],
        "cosine_applied": [1, 2],
        "violated": [1, 2],
    }


def test_blocks_that_would_be_divided_are_refused(tmp_path: Path) -> None:
    run = Made(["retain"]).write(tmp_path / "run.h5", "model", update=True)
    with pytest.raises(ValueError, match=r"should keep .* whole.* Found `embedding` and .*by="):
        rectification(run, by="layer")
    with pytest.raises(ValueError, match=r"`by` should be one of parameter, .* Found `by = 'blo"):
        rectification(run, by="block")


def test_groups_of_ones_own_may_hold_several_blocks(tmp_path: Path) -> None:
    made = Made(["retain"])
    run = made.write(tmp_path / "run.h5", "parameter", update=True)
    table = rectification(run, by=lambda p: "attention" if "attn" in p.name else "rest")
    members = [i for i, p in enumerate(PARAMETERS) if "attn" in p.name]
    naive = [dot(made.x[s], made.average["retain"][s], members) for s in range(STEPS)]
    assert values(table, group="attention", quantity="inner_after") == pytest.approx(naive)


def test_runs_that_say_nothing_of_it_are_refused(unwatched: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"should hold what a rectifier did. .* Record with"):
        rectification(open_run(unwatched))
    writer = RunWriter(tmp_path / "run.h5", PARAMETERS)
    writer.begin(Contents(("objective", "retain"), {"rectifier": {}}, blocks=("left", "right")))
    row = Row(step=0, losses=np.zeros(2), gram=np.zeros((len(PARAMETERS), 2, 2)))
    writer.append(row)
    writer.close(complete=True)
    with pytest.raises(ValueError, match=r"blocks of the rectifier should .* Found left, right in"):
        rectification(open_run(tmp_path / "run.h5"))


# Run files that were written before it was followed what became of an update


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run files have the columns that they had at first."""
    monkeypatch.setattr(layout, "RECTIFICATION_COLUMNS", RECTIFICATION_COLUMNS[:7])


def test_a_file_of_old_is_read(tmp_path: Path, narrow: None) -> None:
    made = Made(["retain"])
    run = made.write(tmp_path / "run.h5", "layer", update=False)
    assert run.read("rectification").shape[-1] == 7
    blocks, numbers = run.rectification()
    assert (blocks, tuple(numbers)) == (tuple(_members("layer")), RECTIFICATION_COLUMNS)
    assert np.isnan([numbers["applied_average"], numbers["applied_fresh"]]).all()
    table = rectification(run)
    assert np.isnan(values(table, quantity="applied_average")).all()
    assert not np.isnan(values(table, quantity="cosine_after")).any()


def test_a_file_of_old_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made(["retain"])
    with monkeypatch.context() as before:
        before.setattr(layout, "RECTIFICATION_COLUMNS", RECTIFICATION_COLUMNS[:7])
        made.write(tmp_path / "run.h5", "layer", update=False, rows=[0, 1])
    run = made.write(tmp_path / "run.h5", "layer", update=False, rows=[2])
    whole = made.write(tmp_path / "new.h5", "layer", update=False)
    found, wanted = run.read("rectification"), whole.read("rectification")
    np.testing.assert_array_equal(found[:, :, :7], wanted[:, :, :7])
    np.testing.assert_array_equal(found[2], wanted[2])
    assert np.isnan(found[:2, :, 7:]).all()


# Pages and pictures


def test_the_report_shows_it_where_there_was_a_rectifier(
    recorded: Path, unwatched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures are counted here; tests of the command line look at them."""
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)
    model = tiny.llama()
    rectifier = Rectifier(model, scope="layer")
    with Recorder(model, tmp_path / "run.h5") as recorder:
        for pair in tiny.pairs(2):
            step_of(recorder, model, pair, rectifier=rectifier)
            model.zero_grad()
    layers = open_run(tmp_path / "run.h5")
    pages = [runs_report([open_run(path)]) for path in (unwatched, recorded, layers.path)]
    plain, model_alone, by_layer = (page.count("data:image/png;base64,") for page in pages)
    assert plain < model_alone < by_layer
    assert [">Rectification</h3>" in page for page in pages] == [False, True, True]
    fired = 100 * np.mean(values(rectification(layers), quantity="fired"))
    assert f"The rectifier fired in {fired:.1f}\u00a0% of the steps" in pages[-1]


def test_the_command_line_has_it_of_the_model(recorded: Path, ask: Ask) -> None:
    table = rectification(open_run(recorded))
    code, out, _ = ask("scores", recorded, "--score", "rectification", "--format", "json")
    assert code == 0
    said = json.loads(out)
    assert [row["quantity"] for row in said] == table["quantity"].tolist()
    assert [row["value"] for row in said] == table["value"].tolist()


@pytest.mark.parametrize("how", [("--kind", "rectification"), ("--score", "rectification")])
def test_the_command_line_draws_it(
    recorded: Path, tmp_path: Path, ask: Ask, how: tuple[str, str]
) -> None:
    picture = tmp_path / "picture.png"
    code, out, _ = ask("plot", recorded, "-o", picture, *how)
    assert (code, out) == (0, f"rectification in {picture}\n")
    assert imread(picture)[..., :3].std() > 0.02
