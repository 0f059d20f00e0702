"""Files and segments that grow every few rows."""

import pytest

from geffect.store import growing_file, segments
from tests.utils.stored_gradients import KEPT


@pytest.fixture
def small_capacity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that grow every few steps."""
    monkeypatch.setattr(growing_file, "FIRST_CAPACITY", 4)


@pytest.fixture
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first segment holds two rows, and none more than four."""
    monkeypatch.setattr(segments, "FIRST_ROWS", 2)
    monkeypatch.setattr(segments, "SEGMENT_BYTES", 4 * 2 * 4 * 37 * sum(3 + i % 3 for i in KEPT))
