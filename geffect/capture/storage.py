"""What a run keeps of every step, of what parameters, and how much room that takes."""

import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from geffect import distributed
from geffect.gradients import Weights
from geffect.layers import Parameter
from geffect.store.schema import Contents, RunFileError, StoredGradients
from geffect.store.size import projected_bytes, remaining_bytes

from .collector import Collector
from .header import RunHeader
from .store_options import StoreOptions


class Storage:
    """What is kept of the gradients of these parameters, at the steps that are to be recorded."""

    def __init__(
        self,
        keep: StoreOptions,
        table: Sequence[Parameter],
        parameters: Sequence[Tensor],
        steps: Collection[int] | None,
    ) -> None:
        self._keep, self._table, self._parameters, self._steps = keep, table, parameters, steps
        self._indices = keep.indices(table) if keep.gradients else ()
        self._ranges = self._shard_ranges()

    @property
    def rows(self) -> int | None:
        """How many rows there will be, where that is known."""
        return None if self._steps is None else len(self._steps)

    @property
    def keeps_gradients(self) -> bool:
        """Whether gradients are kept whole, at any step."""
        return self._keep.gradients is not None

    @property
    def is_planned(self) -> bool:
        """Whether the size of the run is something to be told of."""
        return self._steps is not None or self.keeps_gradients

    def collector(self, step: int, weights: Weights, *, seed: str) -> Collector:
        """What takes the gradients of a step, so that what is to be kept of them is kept."""
        return Collector(
            self._table,
            self._parameters,
            weights,
            sketch=self._keep.sketch,
            encoding=self._keep.gradients if self._keep.when(step) else None,
            indices=self._indices,
            ranges=self._ranges[distributed.rank() if len(self._ranges) > 1 else 0],
            seed=seed,
        )

    def contents(self, header: RunHeader, manifest: Mapping[str, Any]) -> Contents:
        """What every row of the run holds."""
        gradients = self._keep.gradients
        return Contents(
            sources=header.sources,
            manifest=manifest,
            blocks=header.blocks,
            weights=header.weights,
            sketch=self._keep.sketch,
            gradients=StoredGradients(gradients, self._indices, self._ranges, header.mark)
            if gradients
            else None,
        )

    def check_room(self, path: Path, sources: Sequence[str], *, continued: bool) -> str:
        """A sentence about the size of the run; a run that would not fit the disk is refused."""
        steps = [0] if self._steps is None else list(self._steps)
        stored = sum(map(self._keep.when, steps)) if self.keeps_gradients else 0
        contents = self.contents(RunHeader(sources=tuple(sources)), {})
        size = projected_bytes(self._table, contents, len(steps), stored)
        room = shutil.disk_usage(path.parent).free
        rows = "a step" if self._steps is None else f"{len(steps)} steps"
        told = f"{path} will take {_bytes(size)} for {rows}"
        if continued:
            size = remaining_bytes(path, self._table, contents, len(steps), stored)
        if size > room:
            raise RunFileError(
                f"The disk of `{path}` should have room for the run: {_bytes(size)} for "
                f"{rows}. Found {_bytes(room)} free. Record fewer steps, keep less of them "
                '(store="sketch", or StoreOptions with `match` and `when`), or record on another '
                "disk."
            )
        return told

    def _shard_ranges(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """What each rank writes of the stored gradients; one rank all where nothing is sharded."""
        stored = [self._parameters[index] for index in self._indices]
        if not any(map(distributed.is_sharded, stored)):
            return (tuple((0, tensor.numel()) for tensor in stored),)
        if self._keep.gradients not in ("full", "bf16"):
            raise ValueError(
                '`store` should be "full" or "bf16" to keep the gradients of a sharded model: '
                "the blocks of the other encodings would straddle its shards. Found "
                f"`{self._keep.gradients}`. Choose one of those, or a sketch."
            )
        return distributed.shard_ranges(stored)


def _bytes(count: int) -> str:
    size, unit = float(count), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.3g} {unit}"
