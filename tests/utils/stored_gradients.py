"""Run files with whole gradients, which are known from source, step and parameter."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from geffect.encodings import ENCODINGS
from geffect.layers import Parameter
from geffect.store import Contents, Row, Run, StoredGradients, open_run
from geffect.store.shards import ShardWriter
from geffect.store.writer import RunWriter

SOURCES = ("objective", "forget")
PARAMETERS = tuple(
    Parameter(f"{layer}.{i}", layer, "deep", 0, "weight", (3 + i, 37), "float32", ())
    for layer in ("embedding", "layer 0", "head")
    for i in range(3)
)
KEPT = (1, 3, 4, 5, 8)  # of the embedding and the head only a part
LAYERS = {"embedding": (1,), "layer 0": (3, 4, 5), "head": (8,)}

on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits a file's size")


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """As long as the block lasts, no file grows beyond so many bytes."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def ranges_of(ranks: int) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Every tensor in as many parts; the last rank has none of the smallest ones."""
    cuts = []
    for numel in (PARAMETERS[i].numel for i in KEPT):
        step = numel // ranks + 40
        cuts.append([*(min(step * rank, numel) for rank in range(ranks)), numel])
    return tuple(tuple((cut[rank], cut[rank + 1]) for cut in cuts) for rank in range(ranks))


def contents(encoding: str, ranks: int = 1) -> Contents:
    stored = StoredGradients(encoding, KEPT, ranges_of(ranks))
    return Contents(SOURCES, {"metadata": {}}, gradients=stored)


@cache
def vector_of(source: str, step: int, parameter: int) -> torch.Tensor:
    rng = np.random.default_rng([SOURCES.index(source), step, parameter])
    return torch.from_numpy(rng.standard_normal(PARAMETERS[parameter].numel).astype("f4"))


def encoded(
    step: int, encoding: str, ranks: int = 1, rank: int = 0
) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """What one rank holds of the gradients of a step."""
    parts = dict(zip(KEPT, ranges_of(ranks)[rank], strict=True))
    return {
        source: {
            layer: dict(
                ENCODINGS[encoding].encode(
                    torch.cat([vector_of(source, step, i)[slice(*parts[i])] for i in places]),
                    seed=step,
                )
            )
            for layer, places in LAYERS.items()
        }
        for source in SOURCES
    }


def decoded(source: str, step: int, encoding: str = "full") -> list[np.ndarray]:
    """What a reader is to find of a gradient, by layer."""
    numel = {layer: sum(PARAMETERS[i].numel for i in places) for layer, places in LAYERS.items()}
    arrays = encoded(step, encoding)[source]
    return [ENCODINGS[encoding].decode(arrays[layer], n) for layer, n in numel.items()]


def row(step: int, gradients: object, *, batch: int = 0, of: int | None = None) -> Row:
    """A row with the gradients of this step, or of another."""
    vectors = [
        np.stack([vector_of(source, step if of is None else of, i) for source in SOURCES])
        for i in range(len(PARAMETERS))
    ]
    gram = np.stack([pair.astype("f8") @ pair.astype("f8").T for pair in vectors])
    return Row(step, np.zeros(2), gram, batch=batch, gradients=gradients)  # type: ignore[arg-type]


def shard(path: Path) -> ShardWriter:
    """The writer of the second of two ranks."""
    to = ShardWriter(path, PARAMETERS, 1)
    to.begin(contents("full", 2))
    return to


def record(
    folder: Path, encoding: str, *, steps: int, ranks: int = 1, complete: bool | None = True
) -> Run:
    """A run with gradients at every other step; as a killed writer leaves it without `complete`."""
    path = folder / "a.h5"
    first = RunWriter(path, PARAMETERS)
    further = [ShardWriter(path, PARAMETERS, rank) for rank in range(1, ranks)]
    for to in (first, *further):
        to.begin(contents(encoding, ranks))
    for step in range(steps):
        for rank, to in reversed(list(enumerate([first, *further]))):
            kept = encoded(step, encoding, ranks, rank) if step % 2 == 0 else None
            to.append(row(step, kept))
    left = path.read_bytes()
    for to in (first, *further):
        to.close(complete=bool(complete))
    if complete is None:
        path.write_bytes(left)
    return open_run(path)


def assert_same(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    assert [vector.dtype for vector in found] == [np.float32] * len(expected)
    for a, b in zip(found, expected, strict=True):
        assert np.array_equal(a, b)
