"""The noise floor: the closed form against gradients that are drawn at random."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from geffect import Run
from geffect.analysis import cosine, noise_floor
from tests.utils import reference
from tests.utils.watched import watched

DRAWS = 4000


@pytest.mark.parametrize("by", ["layer", "model"])
def test_it_is_what_random_gradients_of_these_lengths_have(tmp_path: Path, by: str) -> None:
    found = watched(tmp_path / "run.h5", steps=1)
    table = noise_floor(found.run, "forget", "retain", by=by)
    rng = np.random.default_rng(0)
    for row in table.to_dict("records"):
        names = [p.name for p in found.run.layers if by == "model" or p.layer == row[by]]
        drawn = {}
        for side in ("forget", "retain"):
            parts = []
            for name in names:
                own = found.gradients[0][side][name]
                noise = rng.standard_normal((DRAWS, own.numel()))
                noise *= float(own.norm()) / np.linalg.norm(noise, axis=1, keepdims=True)
                parts.append(noise)
            drawn[side] = np.concatenate(parts, axis=1)
        a, b = drawn["forget"], drawn["retain"]
        cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        assert cosines.std() * 1.959964 == pytest.approx(row["floor"], rel=0.06)
        assert np.mean(np.abs(cosines) < row["floor"]) == pytest.approx(0.95, abs=0.03)


def test_the_cosine_in_it_is_the_cosine(tmp_path: Path) -> None:
    found = watched(tmp_path / "run.h5")
    table = noise_floor(found.run)
    np.testing.assert_array_equal(table["value"], cosine(found.run, "objective", "retain")["value"])
    assert table["floor"].between(0, 1).all()


def test_a_naive_loop_says_the_same(tmp_path: Path) -> None:
    found = watched(tmp_path / "run.h5")
    table = noise_floor(found.run, "objective", "update", by="model")
    for row in table.to_dict("records"):
        a, b = (found.gradients[row["step"]][name] for name in ("objective", "update"))
        variance = sum(
            reference.inner(a, a, n) * reference.inner(b, b, n) / torch.numel(a[n]) for n in a
        )
        variance /= reference.inner(a, a) * reference.inner(b, b)
        assert row["floor"] == pytest.approx(1.959964 * variance**0.5, rel=1e-6)


def test_a_higher_level_is_a_higher_floor_and_one_is_none(
    example_run: Callable[..., Run],
) -> None:
    run = example_run()
    floors = [noise_floor(run, level=level)["floor"][0] for level in (0.5, 0.9, 0.9999)]
    assert floors == sorted(floors) and floors[-1] == 1.0
    for level in (0.0, 1.0, 2.0, float("nan")):
        with pytest.raises(ValueError, match="`level` should be between 0 and 1"):
            noise_floor(run, level=level)
