"""The accumulated change: updates against gradients, and the losses that were measured."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from geffect import Run
from geffect.analysis import accumulated
from tests.utils import reference
from tests.utils.watched import watched


def test_it_is_the_sum_of_all_updates_before(tmp_path: Path) -> None:
    found = watched(tmp_path / "run.h5")
    table = accumulated(found.run)
    for risk in ("forget", "retain"):
        own = table[table["risk"] == risk]
        predicted, measured, gaps = [], [], []
        for step in range(len(found.gradients)):
            rise = sum(reference.inner(g[risk], g["update"]) for g in found.gradients[:step])
            was = found.losses[step][risk] - found.losses[0][risk]
            predicted.append(rise)
            measured.append(was)
            gaps.append(abs(rise - was) / abs(was) if was else np.nan)
        np.testing.assert_allclose(own[own["how"] == "predicted"]["value"], predicted, atol=1e-10)
        np.testing.assert_allclose(own[own["how"] == "measured"]["value"], measured, atol=1e-10)
        np.testing.assert_allclose(own[own["how"] == "predicted"]["gap"], gaps, rtol=1e-6)


def test_layers_add_up_to_the_model(tmp_path: Path) -> None:
    run = watched(tmp_path / "run.h5").run
    layers, model = (
        accumulated(run, by=by).query("how == 'predicted'") for by in ("layer", "model")
    )
    summed = layers.groupby(["risk", "step"], observed=True)["value"].sum()
    np.testing.assert_allclose(summed, model["value"], atol=1e-12)
    assert set(accumulated(run, by="layer")["how"]) == {"predicted"}


def test_a_captured_step_stands_for_those_up_to_the_next(tmp_path: Path) -> None:
    every, all_of_them = (watched(tmp_path / f"{n}.h5", every=n, steps=6) for n in (3, 1))
    table = accumulated(every.run).query("how == 'predicted' and risk == 'forget'")
    first = all_of_them.gradients[0]
    assert table["step"].tolist() == [0, 3]
    expected = 3 * reference.inner(first["forget"], first["update"])
    np.testing.assert_allclose(table["value"], [0.0, expected], atol=1e-10)


def test_a_skipped_step_counts_nothing(example_run: Callable[..., Run]) -> None:
    run = example_run(update=True, steps=3)

    class Skipping(Run):
        def column(self, name: str) -> np.ndarray:
            return np.array([0, 1, 0]) if name == "skipped" else super().column(name)

    skipping = Skipping(**vars(run))
    table = accumulated(skipping).query("how == 'predicted' and risk == 'forget'")
    np.testing.assert_allclose(table["value"], [0.0, 0.4, 0.4])


def test_steps_that_begin_anew_and_updates_that_are_not_there_are_refused(
    example_run: Callable[..., Run],
) -> None:
    run = example_run(update=True, steps=3)
    with pytest.raises(ValueError, match="where they begin anew"):
        accumulated(replace(run, steps=np.array([0, 1, 0])))
    with pytest.raises(ValueError, match="update=True"):
        accumulated(example_run())
