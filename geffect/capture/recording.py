"""A recording: from what was measured of the gradients of one step to the row of a run file.

The recorder, the callback of a trainer and the replay of checkpoints come by gradients in ways of
their own; what a run file is told of them is here.
"""

import logging
import os
import secrets
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import finalize

import numpy as np
from torch import Tensor, nn

from geffect import distributed, dots
from geffect.gradients import Vector, Weights
from geffect.interrupts import to_the_end
from geffect.layers import Parameter, describe, trainable
from geffect.objectives import Objective, provenance
from geffect.store.background import BackgroundWriter, Writer
from geffect.store.labels import is_text
from geffect.store.paths import place_of
from geffect.store.processes import Home
from geffect.store.reader import Run
from geffect.store.schema import MARKS, STOP, Row
from geffect.store.shards import ShardWriter
from geffect.store.writer import RunWriter
from geffect.text import plain

from .collector import Collector, Measurement, tell_of_climb
from .guard import Guard, OnError
from .header import RunHeader
from .manifest import as_json, manifest
from .rows import Entry, row
from .rows_seen import rows_seen
from .schedule import as_ranges
from .stopping import StopWhen, as_table
from .storage import Storage
from .store_options import StoreOptions, kept

log = logging.getLogger(__name__)

WAITING_BYTES = 2**30
"""How many bytes of gradients may wait for the disk before training does."""


LISTED = 1000
"""Ranges of planned steps that the manifest lists, at most: a schedule may have no pattern."""


@dataclass(frozen=True)
class IfExists:
    """What becomes of a run file that exists already: it is refused, replaced or continued.

    With `resume`, steps of the file after `drop_after` are given up; they will come again.
    """

    overwrite: bool = False
    resume: bool = False
    drop_after: int | None = None


REFUSED = IfExists()


class Recording:
    """Writes what was measured at each step into a run file.

    - `store`: what is kept beside the Gram matrices, a word or a `StoreOptions`.
    - `steps`: those that are going to be recorded, where that is known. The size of the file is
      then told at the start, and a run that would not fit the disk is refused.
    - `existing`: what becomes of a file that is there already.
    - `on_error`: whether a file that cannot be written ends training with the error, or is warned
      of once; what was recorded until then stays readable either way.
    - `provenance`: more for the manifest, from the source of the gradients.

    Under `torch.distributed` every rank has one and calls it alike; the file is rank 0's.
    """

    def __init__(
        self,
        model: nn.Module,
        path: str | os.PathLike[str],
        *,
        metadata: Mapping[str, Any] | None = None,
        store: str | StoreOptions = "gram",
        steps: Collection[int] | None = None,
        existing: IfExists = REFUSED,
        on_error: OnError = "raise",
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        self.guard = Guard(on_error)
        distributed.check_layout(model)
        self.path = place_of(path)
        self.table = describe(model)
        _check_names(self.table)
        self.parameters = list(trainable(model).values())
        self._model = model
        self._metadata = as_json(metadata or {})
        self._provenance = as_json({**_planned(steps), **(provenance or {})})
        self._storage = Storage(kept(store), self.table, self.parameters, steps)
        self._begun = False
        self._stop: StopWhen | None = None
        self._continued: Run | None = None
        self._home = Home()
        # Rounding that is the same in two runs would look like a likeness of their gradients.
        self._salt = os.urandom(8).hex()
        self._announced = False
        self._writer: Writer
        known = RunHeader()
        with distributed.raise_on_all_ranks():
            if distributed.is_main_process():
                known = self._open(existing)
        self.header = distributed.broadcast(known)
        if not distributed.is_main_process():
            shard = ShardWriter(self.path, self.table, distributed.rank(), first=self.header.stored)
            self._writer = self._behind(shard)
        self._started = time.perf_counter() - self.header.wall_seconds
        self._lost = finalize(self, _give_back, self._writer, self.path)
        self._lost.atexit = False  # what a program leaves open when it ends is whole as it is

    @property
    def failed(self) -> bool:
        """Whether the file could not be written, and training goes on without it."""
        return self.guard.has_given_up

    @property
    def is_here(self) -> bool:
        """Whether this is the process that records, not one that was forked from it."""
        return self._home.is_here

    def check_here(self) -> None:
        """Refuse to record in a process that was forked from the one that records."""
        self._home.check(self.path)

    @property
    def next_step(self) -> int:
        """The number after that of the last step in the file."""
        return self.header.last_step + 1

    def collector(self, step: int, weights: Weights, batch: int = 0) -> Collector:
        """What takes the gradients of a step, so that what is to be kept of them is kept."""
        return self._storage.collector(step, weights, seed=f"{self._salt}/{step}/{batch}")

    def measure(
        self,
        step: int,
        vectors: Mapping[str, Vector],
        losses: Mapping[str, float],
        weights: Weights | None = None,
        batch: int = 0,
    ) -> Measurement:
        """What is to be kept of gradients that are all there.

        `weights` gives the sources in terms of the vectors; without it they are the sources.
        """
        collector = self.collector(step, weights or {name: {name: 1.0} for name in vectors}, batch)
        for index in range(len(self.parameters)):
            collector.take(index, {name: vector[index] for name, vector in vectors.items()})
        return collector.measured(losses, distributed.exchange)

    def note_objective(self, objective: Objective, reference: str | None = None) -> None:
        """Keep name, options and reduction of the objective with the run, before its first row.

        Of one that has begun, the tables of what it has of the run as well. `reference` tells where
        its reference is from. A run that is continued is held to what its file says.
        """
        self.check_here()
        told = as_json(provenance(objective, reference), "objective")
        known = self.header.objective
        if known is not None and not _is_same(known, told):
            raise ValueError(
                f"`objective` should be that of the run in `{self.path}`: {dict(known)}. Found "
                f"{told}. Pass the same, or record into another file."
            )
        self.header.objective = self._provenance["objective"] = told
        for name, table in objective.tables.items():
            self.keep_table(name, table)

    def watch(self, stop: StopWhen | None) -> None:
        """Let a rule look at every row, and at those that the file has already."""
        if not (stop is None or isinstance(stop, StopWhen)):
            raise TypeError(
                f"`stop` should be a rule. Found {stop!r}. Pass, say, StopWhen(level=3.9)."
            )
        self._stop = stop
        if stop is not None:
            stop.begin(self._model, distributed.broadcast([*rows_seen(self._continued)]))
            self._provenance["stop"] = as_json(stop.options, "stop")
            self.guard.consequence = ", so that no rule stops it"

    def announce(self, sources: Sequence[str]) -> None:
        """Tell how large the file will be, and refuse what would not fit or lacks sources; once."""
        if self._announced:
            return
        if self._stop is not None:
            self._stop.check_sources(sources)
        self._announced = True
        if not distributed.is_main_process():
            return
        try:
            self._tell_size(sources)
        except OSError as error:
            if not self.guard.may_give_up:
                raise
            self.guard.give_up(error)

    def write(self, entry: Entry) -> None:
        """Write one row. The first one fixes the sources."""
        self.check_here()
        if self.failed:
            return
        if not self.header.sources:
            sources = entry.sources or entry.measured.names
            self.header.fix(sources, entry.declared, entry.rectifier, entry.weights)
        with distributed.raise_on_all_ranks() if not self._announced else nullcontext():
            self.announce(self.header.sources)
        if self.failed:  # which is said to the others below
            self.guard.agree()
            return
        written = self._row(entry)

        def append() -> None:
            if not self._begun:
                self._begin(entry)
            self._writer.append(written)

        self.guard.do(append)
        self.guard.agree()
        self.header.last_step = entry.step
        self._show(entry)

    def amend(self, entry: Entry) -> None:
        """Write a row again, of the step that was written last."""
        self.check_here()
        if not self.failed:
            written = self._row(entry)
            self.guard.do(lambda: self._writer.amend(written))
            self.guard.agree()
            self._show(entry)

    def keep_table(self, name: str, columns: Mapping[str, Sequence[str] | np.ndarray]) -> None:
        """Keep a table with the run, such as effects of samples; one of that name is replaced."""
        self.check_here()
        if not self.failed:
            self.guard.do(lambda: self._writer.keep(name, columns))
        self.guard.agree()

    def check_open(self) -> None:
        """Refuse to go on after the end, or after a failure that not all processes know of yet.

        To be called on all of them inside of `distributed.raise_on_all_ranks`.
        """
        self.check_here()
        self.guard.check()
        if self.guard.raises:
            self._writer.check_open()

    def close(self, *, complete: bool) -> None:
        """End the recording; a file that is not complete stays marked as open.

        A process that was forked from the one that records does nothing. An interrupt waits until
        the file is closed.
        """
        to_the_end(lambda: self._close(complete=complete))
        if self.guard.failure is not None:
            raise self.guard.failure

    def _close(self, *, complete: bool) -> None:
        if self.is_here:
            self.guard.do(lambda: self._writer.close(complete=complete and not self.failed))
            self.guard.closed = True
        self._lost.detach()

    def _show(self, entry: Entry) -> None:
        """Show the row to the rule that stops, and keep what it says at last."""
        fired = None if self._stop is None else self._stop.look(entry)
        if fired is not None:
            self.keep_table(STOP, as_table(fired))
            if distributed.is_main_process():
                log.warning("Training should stop, by `%s`: %s.", fired.clause, fired.message)

    def _tell_size(self, sources: Sequence[str]) -> None:
        begun = self.header.stored or self.header.last_step >= 0
        told = self._storage.check_room(self.path, sources, continued=bool(begun))
        log.log(logging.WARNING if self._storage.is_planned else logging.INFO, told)

    def _row(self, entry: Entry) -> Row:
        return row(
            self.header,
            entry,
            # What a rectifier promises is kept up to the rounding of the parameters.
            lengths=_lengths(self.parameters) if self.header.blocks else None,
            wall_seconds=time.perf_counter() - self._started,
        )

    def _open(self, existing: IfExists) -> RunHeader:
        writer = RunWriter(
            self.path,
            self.table,
            overwrite=existing.overwrite,
            resume=existing.resume,
            drop_after=existing.drop_after,
            rows=self._storage.rows,
        )
        self._writer = self._behind(writer)
        run = writer.resumed
        if run is None:
            return RunHeader(mark=1 + secrets.randbelow(MARKS - 1))
        try:
            _check_metadata(run, self._metadata)
            known, self._continued = RunHeader.of(run, writer.gradient_rows), run
            # What is to be kept has to be what the file keeps: refused now, not after a step.
            self._writer.begin(self._storage.contents(known, run.manifest))
            if STOP in run.tables and not np.isin(run.table(STOP).get("step", []), run.steps).all():
                self._writer.keep(STOP, as_table(None))  # of a step that comes again
            return known
        except BaseException:
            writer.close(complete=False)
            raise

    def _behind(self, writer: Writer) -> Writer:
        """What writes behind the training where there is much to write."""
        return BackgroundWriter(writer, WAITING_BYTES) if self._storage.keeps_gradients else writer

    def _begin(self, entry: Entry) -> None:
        tell_of_climb(entry.measured)
        of_run = manifest(
            self._model,
            losses=self.header.declared,
            rectifier=None if entry.rectifier is None else entry.rectifier.options,
            optimizer=entry.optimizer,
            metadata=self._metadata,
            **{**self.header.further, **self._provenance},
        )
        self._writer.begin(self._storage.contents(self.header, of_run))
        self._begun = True


def _planned(steps: Collection[int] | None) -> dict[str, Any]:
    """What the manifest says of the steps that are going to be recorded, where that is known."""
    if steps is None:
        return {}
    ranges = as_ranges(steps)
    return {"planned": {"steps": len({*steps}), "ranges": ranges if len(ranges) < LISTED else []}}


def _is_same(known: Mapping[str, Any], told: Mapping[str, Any]) -> bool:
    """Whether two objectives are one, as GA and {"forget": -1.0} are."""
    of_risks = told.get("risks") is not None and told["risks"] == known.get("risks")
    return of_risks or {**known, "reference": None} == {**told, "reference": None}


def _check_metadata(run: Run, found: Mapping[str, Any]) -> None:
    if run.metadata != found:
        raise ValueError(
            f"`metadata` should be that of the run in `{run.path}` to continue it: "
            f"{dict(run.metadata)}. Found {found}. Pass the same, or record into another file."
        )


def _lengths(parameters: Sequence[Tensor]) -> np.ndarray:
    """|theta| of each parameter, as it is now; on all processes at once."""
    squares = [dots.quick_gram([p]) for p in parameters]
    whole = dots.gathered(squares, [*map(distributed.holders, parameters)])
    return whole[:, 0, 0].sqrt().numpy()


def _check_names(parameters: Iterable[Parameter]) -> None:
    odd = [parameter.name for parameter in parameters if not is_text(parameter.name)]
    if odd:
        raise ValueError(
            "The parameters of a model should have names that a file can hold, without NUL and "
            f"halves of characters. Found `{plain(odd[0])}`. Name it otherwise in the model."
        )


def _give_back(writer: Writer, path: Path) -> None:
    """Close the file of a recording that nobody has any more, so that others may take its place."""
    log.warning(
        "The recorder of `%s` was lost before it was closed: the file stays marked as open. Call "
        "close(), or record in a `with` block.",
        path,
    )
    with suppress(OSError):
        writer.close(complete=False)
