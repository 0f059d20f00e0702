"""When to stop: a rule that looks at every row a recorder writes, and costs no pass of its own."""

import sys
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from geffect.numbers import is_number, is_whole
from geffect.risk.limits import vocabulary_of
from geffect.sources import FORGET, UPDATE
from geffect.store.reader import Run

from .clauses import CLAUSES, LOOKED_BACK, Stop
from .rows import Entry
from .rows_seen import Seen, entry_seen, rows_seen


class StopWhen:
    """A rule that says when unlearning has gone far enough, by clauses on the recorded gradients.

        stop = StopWhen(level=3.9)
        with Recorder(model, "run.h5", update=True, stop=stop) as recorder:
            for batch in batches:
                recorder.backward(...)
                optimizer.step()
                optimizer.zero_grad()
                if stop.fired:
                    break

    A Trainer ends by itself: with `GEffectCallback(..., stop=stop)`, and with a recorder that has a
    rule in `UnlearningTrainer` and `rectify`. Up to there training is what it would have been. The
    clause that fired is logged, and kept in the run file as the table `stop`.

    - `level`: stop when the forget risk has reached so many nats per token: that of a model which
      never saw the data, or that of the model before unlearning on data it never saw.
    - `free_forgetting`: stop when this gain, in nats a step, is more than a step can forget for
      free.
    - `radius`: how long that step is; the learning rate times |r| if left out.
    - `exchange_rate`: stop when a nat of forgetting costs more retain nats than this; 0.5 is where
      to begin.
    - `vocabulary`: stop when the forget risk is above that of guessing among so many tokens; those
      that the config of the model tells if left out.

    With f and r the gradients of the risks `forget` and `retain`, D the update, and K the Gram
    matrix of the model, over the parameters that the step moves:

    - "anti-knowledge", always where a vocabulary V is known: the forget risk exceeds ln V.
    - "level": the mean over the last five steps of the recorded forget risk plus the <f, D> since
      then reaches the level. It has neither the noise of single batches nor the lag of a mean.
      Without `update` it is the risk before the step.
    - "free forgetting": the gain that is wanted exceeds R sqrt(K_ff - K_fr^2 / K_rr), what a step
      of length R raises the forget risk by if it leaves the retain risk as it is. It is the rule of
      the public code of HAMU (ICML 2026), over the model as a whole. A model that has memorised its
      data has hardly a gradient to begin with, and stops at once.
    - "exchange rate": <r, D> / <f, D>, the median of the last five steps that forget, exceeds the
      limit. With a `level` also: five steps in a row gain less than 1 % of it, after one that
      gained more.

    `fired` is None until then; of several clauses the first in this order is told. Risks are those
    that are recorded: of batches, with the dropout of training, unless a callback takes them of
    whole sets; of several micro-batches the sum, for which losses are divided by their number.
    Raises a ValueError for a number that is not above 0.

    >>> rule = StopWhen(free_forgetting=0.52)
    >>> K = np.array([[4.0, 3.0, 0.0], [3.0, 9.0, 0.0], [0.0, 0.0, 0.0]])
    >>> rule.see(Seen(0, 1.0, K, lr=0.1)).message
    'a step of length 0.3 at step 0 forgets 0.519615 nats for free, less than 0.52'
    >>> StopWhen(free_forgetting=0.5).see(Seen(0, 1.0, K, lr=0.1)) is None
    True
    """

    def __init__(
        self,
        *,
        level: float | None = None,
        free_forgetting: float | None = None,
        radius: float | None = None,
        exchange_rate: float | None = None,
        vocabulary: int | None = None,
    ) -> None:
        given: dict[str, Any] = {
            "level": level,
            "free_forgetting": free_forgetting,
            "radius": radius,
            "exchange_rate": exchange_rate,
            "vocabulary": vocabulary,
        }
        self.options = {name: value for name, value in given.items() if value is not None}
        for name, value in self.options.items():
            if not (is_number(value) and value > 0):
                raise ValueError(
                    f"`{name}` of StopWhen should be a number above 0. Found `{name} = "
                    f"{value!r}`. Pass a positive one, or leave it out."
                )
        if not (vocabulary is None or is_whole(vocabulary, 2)):
            raise ValueError(
                "`vocabulary` of StopWhen should be a whole number of tokens, 2 or more. Found "
                f"`vocabulary = {vocabulary!r}`. Pass model.config.vocab_size, or leave it out."
            )
        if radius is not None and free_forgetting is None:
            raise ValueError(
                "`radius` of StopWhen should come with `free_forgetting`, whose step it is of. "
                "Found it alone. Pass free_forgetting=0.01, say, or leave `radius` out."
            )
        self.vocabulary = vocabulary
        self._restart()

    def __repr__(self) -> str:
        return f"StopWhen({', '.join(f'{name}={v!r}' for name, v in self.options.items())})"

    def _restart(self) -> None:
        self.fired: Stop | None = None
        self._seen: list[Seen] = []
        asked = {**self.options, "vocabulary": self.vocabulary}
        self._clauses = [make(asked) for name, make in CLAUSES.items() if asked.get(name)]

    def begin(self, model: nn.Module, earlier: Iterable[Seen] = ()) -> None:
        """Begin a run of a model, after the rows that it has already."""
        self.vocabulary = self.options.get("vocabulary", _vocabulary_of(model))
        self._restart()
        if self.vocabulary is None and not self.options:
            raise ValueError(
                "`stop` should have a clause. Found none: the config of the model tells no size of "
                "a vocabulary. Pass, say, StopWhen(level=3.9)."
            )
        for seen in earlier:
            self.see(seen)

    def check_sources(self, sources: Iterable[str]) -> None:
        """Refuse a run that lacks what a clause looks at."""
        found, needed = list(sources), dict.fromkeys([FORGET])
        for clause in self._clauses:
            needed.update(dict.fromkeys(clause.sources))
        lacking = [name for name in needed if name not in found]
        with_update = " (update=True)" if UPDATE in lacking else ""
        if lacking:
            raise ValueError(
                f"`stop` should be a rule on what is recorded: {self!r} looks at "
                f"{', '.join(needed)}. Found {', '.join(found)}. Record "
                f"{' and '.join(lacking)} too{with_update}, or leave the clause out."
            )

    def see(self, seen: Seen) -> Stop | None:
        """Look at a row, which may be that of the last step again. What fired first stays."""
        if self._seen and self._seen[-1].step == seen.step:
            self._seen.pop()
        self._seen = [*self._seen, seen][-LOOKED_BACK:]
        for clause in self._clauses:
            self.fired = self.fired or clause.look(self._seen)
        return self.fired

    def look(self, entry: Entry) -> Stop | None:
        """Look at a row that was written; what it makes fire, if that is the first."""
        if self.fired is not None or entry.skipped:
            return None
        return self.see(entry_seen(entry))

    def would_stop(self, run: Run) -> Stop | None:
        """What would have stopped a run that is recorded; None where nothing would.

        Without a `vocabulary` there is no clause on it: a run does not tell that of its model.

        >>> StopWhen(level=1.3).would_stop(example_run(update=True)).message
        'the forget risk has reached the level of 1.3: to first order it is 1.4 after step 0, and
        crossed it after 0.8 updates'
        """
        twin = StopWhen(**self.options)
        twin.check_sources(run.sources)
        return next((stop for stop in map(twin.see, rows_seen(run)) if stop is not None), None)


def as_table(stop: Stop | None) -> Mapping[str, NDArray[Any] | list[str]]:
    """The columns that a run keeps of a Stop; without rows where there is none."""
    stops = [] if stop is None else [stop]
    return {
        "step": np.array([stop.step for stop in stops], dtype=np.int64),
        "clause": [stop.clause for stop in stops],
        "value": np.array([stop.value for stop in stops], dtype=np.float64),
        "limit": np.array([stop.limit for stop in stops], dtype=np.float64),
        "message": [stop.message for stop in stops],
    }


def _vocabulary_of(model: nn.Module) -> int | None:
    """How many tokens the model knows, if its config tells."""
    size = vocabulary_of(model)
    return size if 1 < size < sys.maxsize else None
