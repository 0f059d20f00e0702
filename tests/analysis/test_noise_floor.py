"""The noise floor: the closed form against gradients that are drawn at random."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from geffect import Run
from geffect.analysis import cosine, noise_floor
from tests.utils import reference
from tests.utils.batches import write
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


def of_noise(steps: int, batches: int) -> dict[int, np.ndarray]:
    """Gram matrices of gradients that are noise in one direction of their two tensors each."""
    rng = np.random.default_rng(3)
    G = np.zeros((steps, batches, 2, 4, 6))
    G[..., 0] = rng.normal(size=(steps, batches, 2, 4))
    return dict(enumerate(G @ G.swapaxes(-1, -2)))


@pytest.mark.parametrize("by", ["layer", "model"])
def test_of_several_batches_it_is_their_spread(tmp_path: Path, by: str) -> None:
    grams = {**of_noise(4, 9), 4: of_noise(1, 1)[0], 5: of_noise(1, 5)[0]}
    t = {9: 2.306004, 5: 2.776445}  # of Student's t with 8 and with 4 degrees of freedom, at 0.975
    table = noise_floor(write(tmp_path / "run.h5", grams), "forget", "retain", by=by)
    assert (
        table["rows"].tolist()
        == table["step"].map({**dict.fromkeys(range(4), 9), 4: 1, 5: 5}).tolist()
    )
    for row in table.to_dict("records"):
        own = [i for i in range(2) if by == "model" or row[by] == f"layer {i}"]
        K = grams[row["step"]][:, own]
        a, b = (float(np.sqrt(K[..., i, i].sum(1).mean())) for i in (1, 2))
        squares = (K[..., i, i].mean(0) for i in (1, 2))
        chance = 1.959964 * float(np.sqrt((np.prod([*squares], axis=0) / 2).sum())) / a / b
        if row["rows"] > 1:
            products = [float(of_batch[:, 1, 2].sum()) for of_batch in K]
            mean = sum(products) / len(products)
            variance = sum((one - mean) ** 2 for one in products) / (len(products) - 1)
            spread = t[row["rows"]] * float(np.sqrt(variance / len(products))) / a / b
            chance = max(chance, spread)
        assert row["floor"] == pytest.approx(min(1.0, chance), rel=1e-5)


def test_it_holds_as_many_cosines_of_noise_as_it_says(tmp_path: Path) -> None:
    """Chance alone takes 400 numbers to be noise in as many directions, and holds few."""
    grams = of_noise(600, 12)
    several = write(tmp_path / "several.h5", grams, 400)
    table = noise_floor(several, "forget", "retain", "model")
    assert 0.93 <= (table["value"].abs() < table["floor"]).mean() <= 0.985
    alone = write(tmp_path / "alone.h5", {s: own.mean(0)[None] for s, own in grams.items()}, 400)
    chance = noise_floor(alone, "forget", "retain", "model")
    np.testing.assert_allclose(chance["value"], table["value"])
    assert (chance["value"].abs() < chance["floor"]).mean() < 0.4
