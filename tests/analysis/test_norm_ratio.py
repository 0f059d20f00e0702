"""The norm ratio against plain autograd, and what clipping did."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from geffect import Run
from geffect.analysis import norm_ratio
from tests.utils import reference
from tests.utils.watched import watched


@pytest.mark.parametrize("by", ["model", "layer"])
def test_it_is_one_length_over_the_other(tmp_path: Path, by: str) -> None:
    found = watched(tmp_path / "run.h5")
    table = norm_ratio(found.run, "forget", "retain", by=by)
    for row in table.to_dict("records"):
        names = [p.name for p in found.run.layers if by == "model" or p.layer == row[by]]
        own = found.gradients[row["step"]]
        a, b = (
            sum(reference.inner(own[side], own[side], name) for name in names) ** 0.5
            for side in ("forget", "retain")
        )
        assert row["value"] == pytest.approx(a / b, rel=1e-9)
    assert table["clip_scale"].isna().all()  # nobody told a loop of one's own


def test_what_clipping_did_stands_beside_each_block(example_run: Callable[..., Run]) -> None:
    run = example_run(steps=2)

    class Clipped(Run):
        def column(self, name: str) -> np.ndarray:
            return np.array([1.0, 0.25]) if name == "clip_scale" else super().column(name)

    assert norm_ratio(Clipped(**vars(run)))["clip_scale"].tolist() == [1.0, 0.25]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("every", "one"), [(1.0, 0.0), (np.inf, np.inf), (1.0, np.nan)])
def test_a_gradient_of_zero_has_no_ratio_nor_have_two_infinite_ones(
    example_run: Callable[..., Run], every: float, one: float
) -> None:
    run = example_run()

    class Odd(Run):
        def gram(self) -> np.ndarray:
            K = super().gram() * every
            K[..., self.index("retain"), :] = K[..., :, self.index("retain")] = one
            return K

    odd = Odd(**vars(run))
    assert np.isnan(norm_ratio(odd)["value"]).all()
    assert np.isnan(norm_ratio(odd, "retain", "forget")["value"]).all()
