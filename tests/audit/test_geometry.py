"""The battery of a run file: what its updates predict, beside what was measured."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from geffect import Recorder, Run, open_run
from geffect.analysis import predicted_change
from geffect.audit.auditing import audit
from geffect.audit.depth import TAU
from geffect.audit.geometry import (
    along_depth,
    checkpoint_metrics,
    depths_in,
    geometry,
)
from geffect.audit.reading import set_of
from geffect.audit.table import per_item
from geffect.evaluation.memorised import memorised
from geffect.evaluation.tokens import evaluate_tokens
from geffect.objectives import nll
from tests.utils import tiny
from tests.utils.audits import BUDGET, items

STEPS = 12


def recorded(model: nn.Module, path: Path, loss: Callable[[str, int], Tensor]) -> Run:
    """Gradient ascent on `forget`, with its updates."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with Recorder(model, path, update=True) as recorder:
        for step in range(STEPS):
            recorder.backward(
                objective={"forget": -1.0},
                forget=lambda step=step: loss("forget", step),
                retain=lambda step=step: loss("retain", step),
            )
            optimizer.step()
            optimizer.zero_grad()
    return open_run(path)


@pytest.fixture(scope="module")
def linear(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Risks that are linear in the weights, the same at every step."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1, bias=False, dtype=torch.float64)
    at = {"forget": torch.randn(1, 4).double(), "retain": torch.randn(1, 4).double()}
    path = tmp_path_factory.mktemp("linear") / "run.h5"
    return recorded(model, path, lambda risk, step: model(at[risk]).sum())


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, nn.Module, nn.Module]:
    """A Llama of nine blocks, the run of its unlearning, and what was left of it."""
    model, original = (tiny.llama(0, layers=9) for _ in range(2))
    pairs = tiny.pairs(STEPS)
    path = tmp_path_factory.mktemp("deep") / "run.h5"
    run = recorded(model, path, lambda risk, step: nll(model, pairs[step][risk]))
    return run, original, model


def test_first_order_effects_explain_a_linear_model(linear: Run) -> None:
    table = geometry(linear).set_index("set")
    assert [*table["metric"]] == ["loss", "loss"] and [*table["n"]] == [STEPS, STEPS]
    np.testing.assert_allclose(table["rho"], -1.0)  # the loss falls by what is predicted
    np.testing.assert_allclose(table["slope"], -1.0, rtol=1e-6)
    np.testing.assert_allclose(table["gap"], 0.0, atol=1e-6)


def test_correlation_slope_and_gap_are_those_of_a_loop(
    deep: tuple[Run, nn.Module, nn.Module],
) -> None:
    run = deep[0]
    table = geometry(run).set_index("set")
    gram, update = run.gram().sum(axis=1), run.sources.index("update")
    for of in ("forget", "retain"):
        fall, falls = 0.0, []
        for step in range(STEPS):
            falls.append(fall)
            fall -= gram[step, run.sources.index(of), update]
        losses = run.losses()[of]
        row = table.loc[of]
        assert row["rho"] == pytest.approx(stats.spearmanr(falls, losses).statistic)
        assert row["slope"] == pytest.approx(np.polyfit(falls, losses, 1)[0])
        measured = losses[0] - losses[-1]
        assert row["gap"] == pytest.approx(abs(falls[-1] - measured) / abs(measured))


def test_metrics_of_checkpoints_go_with_the_risk_of_their_own_set(linear: Run) -> None:
    rng = np.random.default_rng(0)
    values = {"forget": rng.normal(size=STEPS), "retain": rng.normal(size=STEPS)}
    metrics = pd.DataFrame(
        [(step, of, "es", x) for of, own in values.items() for step, x in enumerate(own)],
        columns=["step", "set", "metric", "value"],
    )
    found = geometry(linear, metrics)
    falls = predicted_change(linear, by="model")
    for of, own in values.items():
        fall = np.cumsum([0.0, *falls[falls["risk"] == of]["value"]])[:STEPS]
        row = found[(found["metric"] == "es") & (found["set"] == of)].iloc[0]
        assert row["rho"] == pytest.approx(stats.spearmanr(fall, own).statistic)
        assert row["n"] == STEPS
    few = geometry(linear, metrics[metrics["step"] < 7])
    assert few[few["metric"] == "es"]["rho"].isna().all()  # of seven points there is none


def test_blocks_lose_what_the_updates_raised_there(
    deep: tuple[Run, nn.Module, nn.Module],
) -> None:
    run, rng = deep[0], np.random.default_rng(1)
    unlearned, retrained = rng.normal(1, 1, (5, 9)), rng.normal(1, 1, (5, 9))
    rise, erased = [], []
    forget, update = (run.sources.index(name) for name in ("forget", "update"))
    for block in range(9):
        own = [i for i, p in enumerate(run.layers) if p.index == block]
        rise.append(run.gram()[:, own, forget, update].sum())
        pairs = zip(unlearned[:, block], retrained[:, block], strict=True)
        erased.append(np.mean([min(max(u / g, 0.0), 1.0) for u, g in pairs if g > TAU]))
    rho, slope, n = along_depth(run, unlearned, retrained)
    assert (rho, n) == (pytest.approx(stats.spearmanr(rise, erased).statistic), 9)
    assert slope == pytest.approx(np.polyfit(rise, erased, 1)[0])


def test_a_block_in_which_nothing_was_lost_is_left_out(
    deep: tuple[Run, nn.Module, nn.Module],
) -> None:
    ones = np.ones((3, 9))
    known = ones.copy()
    known[:, 4] = 0.0
    assert along_depth(deep[0], ones, known)[2] == 8


def test_depths_are_read_by_item_and_block() -> None:
    rows = [
        per_item("depth", f"{kind} {block}", "forget", model, [block + i for i in (0, 10)], "ab")
        for kind in ("patched", "lens")
        for block in range(11)
        for model in ("unlearned", "retrained", "retrained 1")
    ]
    found = depths_in(pd.concat(rows, ignore_index=True))
    assert found is not None
    for values in found:
        np.testing.assert_array_equal(values, np.arange(11) + np.array([[0], [10]]))
    assert depths_in(rows[0]) is None


def test_checkpoints_are_asked_as_any_model_is(tmp_path: Path) -> None:
    of = set_of("forget", items(0))
    for step in (2, 11):
        tiny.llama(step).save_pretrained(tmp_path / f"checkpoint-{step}")
    folders = [*tmp_path.iterdir()]
    load: Any = lambda folder: tiny.llama(int(Path(folder).name[11:]))  # noqa: E731
    table = checkpoint_metrics(folders, load, [of]).set_index(["step", "metric"])["value"]
    for step in (2, 11):
        own = memorised(evaluate_tokens(tiny.llama(step), of.items))
        for metric, part in own.groupby("metric"):
            assert table[step, metric] == pytest.approx(part["value"].mean())
    assert [*dict.fromkeys(table.index.get_level_values(0))] == [2, 11]


def test_an_audit_tells_the_geometry_of_its_run(
    deep: tuple[Run, nn.Module, nn.Module], tmp_path: Path
) -> None:
    run, original, unlearned = deep
    for step in range(8):
        tiny.llama(step, layers=9).save_pretrained(tmp_path / f"checkpoint-{step}")
    sets = {"forget": items(0), "retain": items(1)}
    report = audit(
        unlearned,
        original,
        tiny.llama(3, layers=9),
        sets=sets,
        budget=BUDGET,
        batteries=["memorised", "hidden", "geometry"],
        run=run.path,
        checkpoints=[*tmp_path.iterdir()],
    )
    assert report.geometry is not None and report.manifest["run"] == str(run.path)
    table = report.geometry.table.set_index(["metric", "set"])
    assert {*table.index} == {
        *((m, s) for m in ("loss", "nll", "prob", "em", "es", "entropy") for s in sets),
        ("erased depth", "forget"),
    }
    assert table.loc[("nll", "retain"), "n"] == 8
    page = report.to_html()
    assert "Geometry</h2>" in page and "erased depth" in page
    assert '"metric": "loss"' in report.to_json()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"batteries": ["memorised", "geometry"]}, "Found no `run`"),
        ({"batteries": ["memorised"], "run": "linear"}, "Found no geometry among them"),
        ({"batteries": ["geometry"], "run": "linear"}, "Found no other"),
        ({"checkpoints": ["checkpoint-1"]}, "`checkpoints` should be those of a `run`"),
        ({"run": "linear"}, r"Found `weight` of \(1, 4\) .* in the model none"),
        ({"run": "plain"}, "recorded with the risk `forget` and with update=True"),
    ],
)
def test_what_goes_together_is_asked_together(
    linear: Run, unwatched: Path, options: dict[str, Any], says: str
) -> None:
    runs = {"linear": linear, "plain": unwatched}
    given = {**options, **({"run": runs[options["run"]]} if "run" in options else {})}
    models = [tiny.llama(seed) for seed in range(3)]
    with pytest.raises(ValueError, match=says):
        audit(*models, sets={"forget": items(0), "retain": items(1)}, budget=BUDGET, **given)
