"""When to stop: a rule that looks at every row a recorder writes, and costs no pass of its own."""

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from geffect.gram import norm
from geffect.numbers import is_number, is_whole
from geffect.risk.limits import vocabulary_of
from geffect.sources import FORGET, RETAIN, UPDATE
from geffect.store.reader import Run

from .rows import Entry
from .rows_seen import Seen, entry_seen, rows_seen

STEPS = 5
"""Over so many steps risks and rates are averaged: those of single batches are noise."""

LOOKED_BACK = 4 * STEPS
"""The steps among which so many that forget are looked for."""

LEAST_GAIN = 0.01
"""The share of the level by which one of five steps has to forget, for a run that goes on."""


@dataclass(frozen=True)
class Stop:
    """What ended a run: the clause, the step that was the last, and why, in words.

    - `step`: as the run file numbers it; its update has been made.
    - `value`, `limit`: the number that the clause looks at, and what it was held against.
    """

    step: int
    clause: str
    value: float
    limit: float
    message: str


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
        self.level, self.free_forgetting, self.radius = level, free_forgetting, radius
        self.exchange_rate, self.vocabulary = exchange_rate, vocabulary
        self.fired: Stop | None = None
        self._seen: list[Seen] = []
        self._has_forgotten = False  # by enough, in a step

    def __repr__(self) -> str:
        return f"StopWhen({', '.join(f'{name}={v!r}' for name, v in self.options.items())})"

    def begin(self, model: nn.Module, earlier: Iterable[Seen] = ()) -> None:
        """Begin a run of a model, after the rows that it has already."""
        self.fired, self._seen, self._has_forgotten = None, [], False
        self.vocabulary = self.options.get("vocabulary", _vocabulary_of(model))
        if self.vocabulary is None and not self.options:
            raise ValueError(
                "`stop` should have a clause. Found none: the config of the model tells no size of "
                "a vocabulary. Pass, say, StopWhen(level=3.9)."
            )
        for seen in earlier:
            self.see(seen)

    def check_sources(self, sources: Iterable[str]) -> None:
        """Refuse a run that lacks what a clause looks at."""
        found, needed = list(sources), [FORGET]
        if self.free_forgetting is not None:
            needed.append(RETAIN)
        if self.exchange_rate is not None:
            needed += [RETAIN, UPDATE]
        lacking = [name for name in dict.fromkeys(needed) if name not in found]
        with_update = " (update=True)" if UPDATE in lacking else ""
        if lacking:
            raise ValueError(
                f"`stop` should be a rule on what is recorded: {self!r} looks at "
                f"{', '.join(dict.fromkeys(needed))}. Found {', '.join(found)}. Record "
                f"{' and '.join(lacking)} too{with_update}, or leave the clause out."
            )

    def see(self, seen: Seen) -> Stop | None:
        """Look at a row, which may be that of the last step again. What fired first stays."""
        if self._seen and self._seen[-1].step == seen.step:
            self._seen.pop()
        self._seen = [*self._seen, seen][-LOOKED_BACK:]
        if self.level is not None:
            self._has_forgotten |= seen.gain >= LEAST_GAIN * self.level
        if self.fired is None:
            for clause in (self._anti_knowledge, self._level, self._free, self._exchange):
                self.fired = self.fired or clause()
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

    def _anti_knowledge(self) -> Stop | None:
        now, known = self._seen[-1], self.vocabulary
        if known is None or not now.risk > math.log(known):
            return None
        return Stop(
            now.step, "anti-knowledge", now.risk, math.log(known),
            f"the forget risk at step {now.step} is {now.risk:.4g}, above the "
            f"{math.log(known):.4g} of guessing among {known} tokens",
        )  # fmt: skip

    def _level(self) -> Stop | None:
        if self.level is None:
            return None
        (at, risk), now = _risk_at_last(self._seen), self._seen[-1]
        if not risk >= self.level:
            return None
        before, crossing = self._seen[:-1], ""
        since, earlier = _risk_at_last(before) if before else (now.step, now.risk)
        if earlier < self.level:
            passed = since + (at - since) * (self.level - earlier) / (risk - earlier)
            crossing = f", and crossed it after {passed:.1f} updates"
        told = f"it is {risk:.4g} before step {now.step}"
        if at > now.step:
            told = f"to first order it is {risk:.4g} after step {now.step}"
        return Stop(
            now.step, "level", risk, self.level,
            f"the forget risk has reached the level of {self.level:g}: {told}{crossing}",
        )  # fmt: skip

    def _free(self) -> Stop | None:
        wanted, now = self.free_forgetting, self._seen[-1]
        if wanted is None:
            return None
        if self.radius is None and math.isnan(now.lr):
            raise ValueError(
                "`radius` of StopWhen should be given where no optimizer tells a learning rate. "
                f"Found none at step {now.step}. Pass StopWhen(free_forgetting={wanted:g}, "
                "radius=...), the length of a step."
            )
        length = now.lr * float(norm(now.K, 1)) if self.radius is None else self.radius
        free = length * now.across
        if not free < wanted:
            return None
        return Stop(
            now.step, "free forgetting", free, wanted,
            f"a step of length {length:.4g} at step {now.step} forgets {free:.6g} nats for free, "
            f"less than {wanted:g}",
        )  # fmt: skip

    def _exchange(self) -> Stop | None:
        if self.exchange_rate is None:
            return None
        now, last = self._seen[-1], self._seen[-STEPS:]
        again = sum(seen.gain <= 0 for seen in last)
        learnt = f"; {again} of the last {len(last)} steps learn again" if again else ""
        rates = [seen.harm / seen.gain for seen in self._seen if seen.gain > 0][-STEPS:]
        if len(rates) == STEPS and (rate := float(np.median(rates))) > self.exchange_rate:
            return Stop(
                now.step, "exchange rate", rate, self.exchange_rate,
                f"a nat of forgetting costs {rate:.4g} retain nats at step {now.step}, more than "
                f"{self.exchange_rate:g}: the median of {STEPS} steps{learnt}",
            )  # fmt: skip
        if self.level is None or not self._has_forgotten or len(last) < STEPS:
            return None
        most, least = max(seen.gain for seen in last), LEAST_GAIN * self.level
        if not most < least:
            return None
        return Stop(
            now.step, "exchange rate", most, least,
            f"each of the last {STEPS} steps to step {now.step} forgets by {most:.4g} nats at "
            f"most, less than 1 % of the level{learnt}",
        )  # fmt: skip


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


def _risk_at_last(rows: Sequence[Seen]) -> tuple[int, float]:
    """After how many updates, and the forget risk there, as the last steps in a row tell it.

    Each risk is carried on by the changes that the updates since then predict.
    """
    now = rows[-1]
    if math.isnan(now.gain):
        return now.step, now.risk
    carried, since, carries = 0.0, now.step, []
    for row in reversed(rows[-STEPS:]):
        carried += row.gain
        if row.step < since - 1 or math.isnan(carried + row.risk):
            break
        carries.append(row.risk + carried)
        since = row.step
    return now.step + 1, float(np.mean(carries)) if carries else math.nan


def _vocabulary_of(model: nn.Module) -> int | None:
    """How many tokens the model knows, if its config tells."""
    size = vocabulary_of(model)
    return size if 1 < size < sys.maxsize else None
