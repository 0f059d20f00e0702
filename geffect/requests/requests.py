"""Requests to forget that come one after the other, and the run file of what each of them does."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import fields
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from geffect import distributed
from geffect.capture.header import Declared
from geffect.capture.recording import IfExists, Recording
from geffect.capture.rows import Entry
from geffect.edits.change import difference
from geffect.edits.task_vector import check_weights, negated
from geffect.interrupts import put_back_after
from geffect.layers import trainable
from geffect.numbers import is_number
from geffect.risk import RiskSet, check_data, check_each, mean_nll, noting_risk, risk_gradient
from geffect.sources import FORGET, OBJECTIVE, RETAIN, UPDATE, check_risks

from .overlap import Likeness, Moved, likeness

RISKS, PAIRS = "request_risks", "request_pairs"
"""The tables that such a run keeps: each risk before and after each request, and pairs of them."""


class Requests:
    """Several sets to forget, one after the other, each with what it does to all of them.

    Iterate over it, and unlearn each set as you like, in place: by a loop, a Trainer, an edit. Of
    each request it records the gradients of all risks before it, its displacement D = theta after
    minus theta before, and every risk before and after. The run has one row a request, numbered
    from 0 as `step` and as `request`.

    - `model`: it is trained in place.
    - `path`: the run file to write.
    - `forget`: the data of each request by name, in the order in which they come.
    - `retain` and further `risks` by name: what should stay.
    - `negate`: None leaves what was learned; a number alpha is for training that learns what is to
      be forgotten (SSU, TaskVectorNegation): tau is taken, and theta - alpha tau set in its place.
    - `share`: of all numbers of the model those that count as moved most, for the overlap; those
      that moved as far as the last of them count too.
    - `metadata`, `overwrite`: as for `geffect.Recorder`.

    It keeps the displacement of every request and a mask of it in the memory of the host: a copy of
    the trainable parameters each, and a byte a number. One more copy is that of before.

    In the file the request that a row is of stands as `forget`, and the others by their names too.
    `geffect.analysis.task_vectors` tells how alike requests are, `revivals` what each does to those
    before it. All other analyzers read the file as that of an edit: `predicted_change` is e_R(D) =
    -<grad R, D>, by how much a risk falls to first order. Of a block that raises nothing is
    recorded, and the model stays where it was left. A loop that is left in the midst of a request
    is refused: leave it as soon as the next one is named.

    >>> import tempfile
    >>> from types import SimpleNamespace
    >>> class Table(nn.Embedding):
    ...     def forward(self, input_ids):
    ...         return SimpleNamespace(logits=super().forward(input_ids))
    >>> _, model = torch.manual_seed(0), Table(3, 3)
    >>> sets = [{"input_ids": ids, "labels": ids} for ids in torch.tensor([[[0, 1]], [[1, 2]]])]
    >>> path = tempfile.mkdtemp() + "/requests.h5"
    >>> forget = {"first": sets[0], "second": sets[1]}
    >>> with Requests(model, path, forget=forget, retain=sets[1]) as requests:
    ...     for name, batches in requests:
    ...         with torch.no_grad():
    ...             _ = model.weight[0, 1].sub_(1.0)
    >>> from geffect import open_run
    >>> open_run(path).sources
    ('objective', 'forget', 'first', 'second', 'retain', 'update')
    """

    def __init__(
        self,
        model: nn.Module,
        path: str | os.PathLike[str],
        *,
        forget: Mapping[str, RiskSet],
        retain: RiskSet,
        risks: Mapping[str, RiskSet] | None = None,
        negate: float | None = None,
        share: float = 0.01,
        metadata: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> None:
        _check_options(negate, share)
        check_risks("forget", forget, taken=(FORGET, RETAIN))
        check_risks("risks", risks or {}, taken=(FORGET, RETAIN, *forget))
        self._sets = {**forget, RETAIN: retain, **(risks or {})}
        _check_sets(forget, self._sets)
        self._parameters = trainable(model)
        _check_model(self._parameters, negate)
        self._model, self._names = model, [*forget]
        self._negate, self._share = negate, share
        self._moved: list[Moved] = []
        self._risks: list[tuple[str, str, float, float]] = []
        self._pairs: list[tuple[str, str, str, Likeness]] = []
        self._complete = False
        self._begun: tuple[str, list[Tensor]] | None = None  # a request, and theta before it
        self._recording = Recording(
            model,
            path,
            metadata=metadata,
            existing=IfExists(overwrite=overwrite),
            provenance={"requests": {"names": self._names, "negate": negate, "share": share}},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._recording.close(complete=self._complete and error is None)
        if error is None:
            self._check_ended()

    def __iter__(self) -> Iterator[tuple[str, RiskSet]]:
        """The name and the data of each request, to be unlearned before the next is asked for."""
        if self._moved or self._complete:
            raise RuntimeError(
                "Requests should be gone through once. Found that some of them are recorded "
                "already. Make Requests anew, with another file."
            )
        for number, name in enumerate(self._names):
            before = [p.detach().clone() for p in self._parameters.values()]
            found = {}
            for risk, batches in self._sets.items():
                with noting_risk(risk):
                    found[risk] = risk_gradient(self._model, batches)
            self._begun = name, before
            yield name, self._sets[name]
            self._begun = None
            self._check_same(name)
            self._set_back(before)
            displacement = [
                difference(p.detach(), b)
                for p, b in zip(self._parameters.values(), before, strict=True)
            ]
            _check_moved(name, displacement)
            vectors = {risk: one.vector for risk, one in found.items()}
            losses = {risk: one.loss for risk, one in found.items()}
            self._write(number, name, {**vectors, UPDATE: displacement}, losses)
            self._keep(name, displacement, losses)
        self._complete = True

    def _check_same(self, name: str) -> None:
        """Refuse parameters that others have taken the place of, or that are frozen since."""
        now = trainable(self._model)
        moved = [
            key
            for key in {**self._parameters, **now}
            if now.get(key) is not self._parameters.get(key)
        ]
        if moved:
            raise ValueError(
                f"Request `{name}` should train the parameters of the model in place. Found other "
                f"ones, or frozen ones, in the place of {len(moved)}, the first of them "
                f"`{moved[0]}`. Load weights by `load_state_dict`, and put adapters and frozen "
                "parts in place before Requests is made."
            )

    def _check_ended(self) -> None:
        """Refuse a loop that was left in the midst of a request: its change is in no row."""
        if self._begun is None:
            return
        name, before = self._begun
        pairs = zip(self._parameters.values(), before, strict=True)
        if all(torch.equal(parameter, old) for parameter, old in pairs):
            return
        learned = "" if self._negate is None else ", and what was learned is not taken away"
        raise ValueError(
            "Requests should be left before a request has changed the model, or after the last. "
            f"Found that the loop was left in the midst of `{name}`: its change is in the model "
            f"and in no row{learned}. To stop early, leave as soon as the next one is named."
        )

    @torch.no_grad()
    def _set_back(self, before: list[Tensor]) -> None:
        """theta - alpha tau, where tau is what was learned."""
        if self._negate is None:
            return
        alpha, pairs = self._negate, [*zip(self._parameters.values(), before, strict=True)]
        tuned = [p.detach().clone() for p, _ in pairs]

        def write() -> None:
            for (parameter, old), new in zip(pairs, tuned, strict=True):
                parameter.copy_(negated(old, new, alpha))

        # It writes the same again: an interrupt in its midst leaves the whole of it behind.
        put_back_after(lambda: None, write)

    def _write(
        self, number: int, name: str, vectors: Mapping[str, Any], losses: Mapping[str, float]
    ) -> None:
        sources = {
            # One step of gradient descent of rate 1 along -D.
            OBJECTIVE: {UPDATE: -1.0},
            FORGET: {name: 1.0},
            **{source: {source: 1.0} for source in vectors},
        }
        declared: Declared = {
            OBJECTIVE: {UPDATE: -1.0},
            **{source: "loss" for source in sources if source not in (OBJECTIVE, UPDATE)},
        }
        values = {FORGET: losses[name], **losses}
        measured = self._recording.measure(number, vectors, values, sources)
        self._recording.write(
            Entry(
                number,
                measured,
                declared,
                request=number,
                lr=1.0,
                stepped=[bool(part.any()) for part in vectors[UPDATE]],
            )
        )

    def _keep(self, name: str, displacement: list[Tensor], losses: Mapping[str, float]) -> None:
        """The tables of the run, with the rows of this request."""
        for risk, batches in self._sets.items():
            self._risks.append((name, risk, losses[risk], mean_nll(self._model, batches)))
        moved = Moved.of(displacement, self._share)
        for other, earlier in zip(self._names, self._moved, strict=False):
            own = zip(self._parameters, likeness(moved, earlier), strict=True)
            self._pairs += [(name, other, parameter, value) for parameter, value in own]
        self._moved.append(moved)
        requests, risks, before, after = zip(*self._risks, strict=True)
        self._recording.keep_table(
            RISKS,
            {
                "request": requests,
                "risk": risks,
                "before": np.array(before),
                "after": np.array(after),
            },
        )
        if self._pairs:
            requests, others, parameters, values = zip(*self._pairs, strict=True)
            columns = {
                field.name: np.array([getattr(value, field.name) for value in values])
                for field in fields(Likeness)
            }
            names = {"request": requests, "other": others, "parameter": parameters}
            self._recording.keep_table(PAIRS, {**names, **columns})


def _check_options(negate: float | None, share: float) -> None:
    if negate is not None and not (is_number(negate) and negate > 0):
        raise ValueError(
            "`negate` of Requests should be None, or a positive number of task vectors. Found "
            f"`negate = {negate!r}`. Pass None where the blocks unlearn, or 1.0 where they learn "
            "what is to be forgotten."
        )
    if not (is_number(share) and 0 < share <= 1):
        raise ValueError(
            "`share` of Requests should be a part of all numbers, above 0 and up to 1. Found "
            f"`share = {share!r}`. Pass, say, 0.01."
        )


def _check_sets(forget: Mapping[str, RiskSet], sets: Mapping[str, RiskSet]) -> None:
    if not forget:
        raise ValueError(
            "`forget` of Requests should have a set or more, by name. Found none. Pass, say, "
            '{"first": batches}.'
        )
    check_each(sets, check_data)


def _check_model(parameters: Mapping[str, Tensor], negate: float | None) -> None:
    if distributed.is_of_several(parameters.values()):
        raise ValueError(
            "Requests should be recorded in one process that holds the whole model. Found several "
            "processes, or parameters in shards. Save the model after each request, and record "
            "the change between what was saved."
        )
    if negate is not None:
        check_weights(parameters, "`negate` of Requests")


def _check_moved(name: str, displacement: list[Tensor]) -> None:
    if not any(part.any() for part in displacement):
        raise ValueError(
            f"Request `{name}` should change the model. Found every parameter as it was before. "
            "Unlearn its set inside of the loop, in place, in the model that was passed."
        )
    if not all(part.isfinite().all() for part in displacement):
        raise ValueError(
            f"Request `{name}` should leave finite parameters. Found NaN or infinity. Lower the "
            "learning rate, or clip the gradient."
        )
