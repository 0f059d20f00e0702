"""How fast a gradient gets into a run file, beside its bytes into a plain one."""

from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np

from geffect.layers import describe
from geffect.store import Contents, StoredGradients
from geffect.store import Row as StoredRow
from geffect.store.writer import RunWriter

from .bars import Bar, Row
from .rounds import ratio
from .workload import Workload


def rows(workload: Workload, folder: Path) -> Iterator[Row]:
    """A row with one full gradient, appended to a run that grows, and `numpy.tofile`."""
    table = describe(workload.model)
    by_layer: dict[str, int] = {}
    for parameter in table:
        by_layer[parameter.layer] = by_layer.get(parameter.layer, 0) + parameter.numel
    whole = np.random.default_rng(0).standard_normal(sum(by_layer.values()), dtype=np.float32)
    ends = np.cumsum([*by_layer.values()])[:-1]
    gradient = {
        layer: {"values": part} for layer, part in zip(by_layer, np.split(whole, ends), strict=True)
    }
    ranges = (tuple((0, parameter.numel) for parameter in table),)
    stored = StoredGradients("full", tuple(range(len(table))), ranges)
    steps, files = count(), count()
    writer = RunWriter(folder / "append.h5", table)
    writer.begin(Contents(sources=("objective",), manifest={}, gradients=stored))

    def append() -> None:
        writer.append(
            StoredRow(
                step=next(steps),
                losses=np.zeros(1),
                gram=np.zeros((len(table), 1, 1)),
                gradients={"objective": gradient},
            )
        )

    seconds = workload.seconds(
        {"append": append, "dump": lambda: whole.tofile(folder / f"{next(files)}.bin")}
    )
    writer.close(complete=True)
    yield Row(
        "append of a gradient: speed / numpy.tofile",
        ratio(seconds["dump"], seconds["append"]),
        Bar(0.8, at_least=True),
    )
