"""What an objective is: the parts of its loss, what it asks for, and how it is evaluated."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from geffect.batch import Batch, Pair, behind_first, check_one_answer, labels_of
from geffect.losses import Loss, Scalar
from geffect.numbers import is_number
from geffect.risk import scored_tokens, token_log_probabilities
from geffect.sources import FORGET, OBJECTIVE

from .of_run import OfRun
from .reference import Need, Reference, moves_with
from .weights import inverse_confidence


@dataclass(frozen=True)
class Reduction:
    """How a part of a loss is taken from many tokens: the side that it is of, and its kind.

    - "token_mean": the mean over all scored tokens; a long answer weighs more.
    - "sample_mean": the mean over samples of something of their token means.
    - "sequence_sum": the mean over samples of something of their sums over tokens.

    Of a token mean the first `skip` tokens of each answer may take no part, or all but a `fraction`
    of them, `share_of` their number. The losses of batches add up to that of all their data, each
    with its share of the count.

    >>> batch, model = {"labels": torch.tensor([[3, 5, -100], [7, 2, 9]])}, lambda input_ids: None
    >>> [Reduction("forget", kind).count(model, batch) for kind in ("token_mean", "sequence_sum")]
    [3, 2]
    """

    side: str
    kind: Literal["token_mean", "sample_mean", "sequence_sum"]
    skip: int = 0
    fraction: float = 1.0

    def count(self, model: Any, batch: Batch) -> int:
        """How many tokens or samples of a batch the mean is over."""
        if self.kind != "token_mean" or self.fraction != 1.0:
            check_one_answer(batch, f"a {self.kind.replace('_', ' ')}")
        if self.kind == "sequence_sum":
            return len(labels_of(batch))
        scored = scored_tokens(model, batch)
        if self.kind == "token_mean":
            counts = behind_first(scored, batch, self.skip).sum(dim=1)
            return int(share_of(counts, self.fraction).sum())
        return int(scored.any(dim=1).sum())


@dataclass(frozen=True)
class Component:
    """One part of an objective: a loss with its weight.

    - `given`: the loss, or a function without arguments that returns it. Of functions one is asked
      after the other, each right before its pass, so that their graphs are not in memory together.
    - `risk`: names the side whose NLL the loss is, where it is one: then it is declared as a
      multiple of that risk, and no pass is made twice.
    """

    given: Scalar
    weight: float = 1.0
    risk: str | None = None

    @property
    def loss(self) -> Tensor:
        """The loss, which a function is asked for anew each time."""
        return self.given if isinstance(self.given, Tensor) else self.given()


@dataclass(frozen=True)
class Objective(ABC):
    """A scalar that unlearning minimises: `objective(model, batch, reference)`.

    A frozen dataclass, whose fields are its options and nothing else. `model` is whatever returns
    `.logits` of shape (sample, position, token) for what a batch has beside its labels; `batch` has
    a batch of each of the `sides`. What an objective asks for it says by attributes of its class:

    - `reference`: what it compares with of the model before unlearning, nothing by default.
    - `sides`: whose batches it takes.
    - `source`: where its formula is from.

    What an objective has of one run, a target that is drawn or a weight that changes from step to
    step, `begin(model)` gives it: trainer, replay and study run what that returns, which for nearly
    all is the objective itself. In a loop of one's own, call `advance()` after each step.

    An objective of one's own:

    >>> @dataclass(frozen=True)
    ... class SquaredRisk(Objective):
    ...     scale: float = 1.0
    ...     def components(self, model, batch, reference=None):
    ...         def loss():
    ...             log_p, scored = token_log_probabilities(model, batch["forget"])
    ...             return -self.scale * log_p.sum(dim=1).square().mean()
    ...         return {"forget": Component(loss)}
    ...     @property
    ...     def reductions(self):
    ...         return {"forget": Reduction("forget", "sequence_sum")}
    >>> SquaredRisk().reference, SquaredRisk().sides
    ('none', ('forget',))
    """

    @property
    def reference(self) -> Need:
        """What is asked of the model before unlearning."""
        return "none"

    @property
    def sides(self) -> tuple[str, ...]:
        """The sides of a batch that are taken."""
        return (FORGET,)

    @property
    def source(self) -> str:
        """Where the formula is from."""
        return ""

    @property
    def risks(self) -> Mapping[str, float] | None:
        """The weights of the risks whose sum it is; None where it is anything else."""
        return None

    @abstractmethod
    def components(
        self, model: Any, batch: Pair, reference: Reference | None = None
    ) -> dict[str, Component]:
        """The parts of the loss by name."""

    @property
    def reductions(self) -> Mapping[str, Reduction]:
        """How each component is reduced, by its name.

        None are declared here: the loss is then known on a pair of batches, and not on more data
        than is run at once.
        """
        return {}

    @property
    def keeps(self) -> frozenset[str]:
        """The components, by name, that are reduced over another side than that to forget."""
        return frozenset(
            name for name, how in self.reductions.items() if how.side.partition(".")[0] != FORGET
        )

    @property
    def unbounded(self) -> bool:
        """Whether single tokens may carry it: it is not to be taken at a relearned copy."""
        return False

    def begin(self, model: Any) -> Self:
        """The objective as a run of this model uses it, with what it has of the run."""
        return self

    @property
    def of_run(self) -> Mapping[str, OfRun]:
        """What it has of a run that has begun, by name."""
        return {}

    @property
    def tables(self) -> Mapping[str, Mapping[str, np.ndarray]]:
        """What a run file keeps of that as a whole: columns by the name of a table."""
        return {name: own.table for name, own in self.of_run.items() if own.table}

    def advance(self) -> None:
        """The optimizer has taken a step."""
        for own in self.of_run.values():
            own.advance()

    def of_step(self) -> dict[str, Tensor]:
        """What it has of the run in this step, as `Recorder.backward` takes weights; often none."""
        values = {name: v for own in self.of_run.values() for name, v in own.values.items()}
        return {name: torch.tensor([v], dtype=torch.float64) for name, v in values.items()}

    def state_dict(self) -> dict[str, Any]:
        """What it has of the run, for a checkpoint."""
        return {name: own.state_dict() for name, own in self.of_run.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with what it had of the run at a checkpoint."""
        if state.keys() != self.of_run.keys():
            raise ValueError(
                f"The state of {type(self).__name__} should be of {_names(self.of_run)}. Found "
                f"that of {_names(state)}. Resume with the objective that the checkpoint is of."
            )
        for name, own in self.of_run.items():
            own.load_state_dict(state[name])

    def __call__(self, model: Any, batch: Pair, reference: Reference | None = None) -> Tensor:
        """The loss: the weighted sum of the components."""
        return total(self.components(model, batch, reference))

    def implicit_weights(
        self, model: Any, batch: Pair, reference: Reference | None = None
    ) -> dict[str, Tensor]:
        """How the gradient is spread over the forget data: weights by name, without a graph.

        "inverse confidence" is 1/p of every answer token, the weight of a log-likelihood's gradient
        on grad p. An objective that weighs grad log p as well has "weight": of every answer token,
        or of every sample where the objective weighs whole answers. With the `SharedForward` of
        the step, after the loss, they cost no forward. What changes with the steps of a run is
        among them (`of_step`).
        """
        with torch.no_grad():
            log_p, scored = token_log_probabilities(model, batch[FORGET])
            weights = self._weights_of(batch, log_p, scored, reference)
        further = {} if weights is None else {"weight": weights}
        return {
            **further,
            "inverse confidence": inverse_confidence(log_p, scored),
            **self.of_step(),
        }

    def compared(self, reference: Reference | None, model: Any = None) -> Reference:
        """The reference; a ValueError where there is none, or where it is the model itself."""
        if isinstance(reference, Reference) and not moves_with(reference, model):
            return reference
        found = "None" if reference is None else f"`{type(reference).__name__}`"
        if isinstance(reference, Reference):
            found = "the model itself, which moves with every step"
        raise ValueError(
            f"`reference` of {type(self).__name__} should be the model as it was before "
            f"unlearning. Found {found}. Pass FrozenModel.copied(model), of geffect.objectives, "
            "made before the first step."
        )

    def _weights_of(
        self, batch: Pair, log_p: Tensor, scored: Tensor, reference: Reference | None
    ) -> Tensor | None:
        """The weights on grad log p; None where all are 1, or where there are none."""
        return None


Of = TypeVar("Of", bound=Objective)


def begun(objective: Of, **values: Any) -> Of:
    """A copy of an objective with what it has of a run, in fields that are no options."""
    own = copy.copy(objective)
    for name, value in values.items():
        object.__setattr__(own, name, value)
    return own


def _names(of_run: Mapping[str, Any]) -> str:
    return ", ".join(of_run) or "nothing"


def total(parts: Mapping[str, Component]) -> Tensor:
    """The weighted sum of components."""
    terms = [c.loss if c.weight == 1.0 else c.weight * c.loss for c in parts.values()]
    return sum(terms[1:], terms[0])


def loss_name(part: str, component: Component) -> str:
    """The name of the loss of a component: that of the risk that it is, else its own.

    >>> loss_name("kl", Component(torch.ones(())))
    'objective.kl'
    """
    return component.risk or f"{OBJECTIVE}.{part}"


def kept_losses(objective: Objective, parts: Mapping[str, Component]) -> list[str]:
    """The names of the losses of those parts that keep what should stay.

    >>> from geffect.objectives import KL, GradientAscent, Regularised
    >>> parts = {"forget": Component(torch.ones(())), "kl": Component(torch.ones(()))}
    >>> kept_losses(Regularised(GradientAscent(), KL()), parts)
    ['objective.kl']
    """
    return [loss_name(name, part) for name, part in parts.items() if name in objective.keeps]


def step_losses(parts: Mapping[str, Component], *, apart: bool) -> dict[str, Loss]:
    """The losses of a step as `Recorder.backward` and `Rectifier.backward` take them.

    With `apart` every component is differentiated by itself, and the objective is declared as their
    combination: one that is a risk goes by the name of the risk, any other by `objective.<name>`.
    Without, the objective is one loss, whose gradient is that of a single pass bit for bit; a
    multiple of a risk is declared as that either way.

    >>> loss = torch.ones(())
    >>> step_losses({"forget": Component(loss, -1.0, risk="forget")}, apart=False)
    {'objective': {'forget': -1.0}, 'forget': tensor(1.)}
    >>> parts = {"forget": Component(loss), "retain": Component(loss, 0.5, risk="retain")}
    >>> step_losses(parts, apart=True)["objective"]
    {'objective.forget': 1.0, 'retain': 0.5}
    """
    if not apart and (len(parts) > 1 or next(iter(parts.values())).risk is None):
        # A tensor has its graph already, which a function is not to find half freed.
        is_asked = not any(isinstance(part.given, Tensor) for part in parts.values())
        return {OBJECTIVE: partial(total, parts) if is_asked else total(parts)}
    weights: dict[str, float] = {}
    losses: dict[str, Loss] = {}
    for part, component in parts.items():
        name = loss_name(part, component)
        weights[name] = weights.get(name, 0.0) + component.weight
        losses.setdefault(name, component.given)
    return {OBJECTIVE: weights, **losses}


def share_of(counts: Tensor, fraction: float) -> Tensor:
    """How many tokens a fraction of each answer is: rounded down, but one where there are any.

    >>> share_of(torch.tensor([0, 1, 5, 10]), 0.8)
    tensor([0, 1, 4, 8])
    """
    # A fraction such as 0.29 of 100 is a hair less than 29 in floating point.
    share = (counts.double() * fraction + 1e-9).floor().long()
    return share.clamp(min=1).minimum(counts)


def switch(owner: str, name: str, value: bool) -> None:
    """Refuse what is neither True nor False in a ValueError that names the field."""
    if not isinstance(value, bool):
        raise ValueError(
            f"`{name}` of {owner} should be True or False. Found `{name} = {value!r}`. Leave it "
            "out for False."
        )


def positive(owner: str, name: str, value: float) -> float:
    """`value` if it is a positive finite number, else a ValueError that names the field."""
    if not (is_number(value) and value > 0):
        raise ValueError(
            f"`{name}` of {owner} should be a positive number. Found "
            f"`{name} = {value!r:.60}`. Pass a number such as {owner}({name}=1.0)."
        )
    return float(value)


def not_negative(owner: str, name: str, value: float) -> float:
    """`value` if it is a finite number of 0 or more, else a ValueError that names the field."""
    if not (is_number(value) and value >= 0):
        raise ValueError(
            f"`{name}` of {owner} should be a number of 0 or more. Found "
            f"`{name} = {value!r:.60}`. Pass a number such as {owner}({name}=1.0)."
        )
    return float(value)
