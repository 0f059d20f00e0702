"""Angles: every pair of gradients against plain autograd."""

from pathlib import Path

import numpy as np
import pytest

from geffect.analysis import angles, cosine
from tests.utils import reference
from tests.utils.watched import watched


def test_every_pair_and_every_length(tmp_path: Path) -> None:
    found = watched(tmp_path / "run.h5")
    table = angles(found.run)
    assert len(table) == len(found.gradients) * len(found.run.sources) ** 2
    for row in table.to_dict("records"):
        own = found.gradients[row["step"]]
        a, b = own[row["source"]], own[row["other"]]
        lengths = [reference.inner(g, g) ** 0.5 for g in (a, b)]
        assert row["value"] == pytest.approx(reference.inner(a, b) / np.prod(lengths), abs=1e-9)
        assert row["length"] == pytest.approx(lengths[0], rel=1e-9)


def test_a_pair_of_them_is_the_cosine(tmp_path: Path) -> None:
    run = watched(tmp_path / "run.h5").run
    table = angles(run, by="layer").query("source == 'objective' and other == 'retain'")
    alone = cosine(run, "objective", "retain", by="layer")
    np.testing.assert_array_equal(table["value"], alone["value"])
    assert table["layer"].tolist() == alone["layer"].tolist()
