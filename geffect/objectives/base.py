"""What an objective is, and the quantities that all of them are made of."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from geffect.batch import Batch, Pair, labels_of, scored_tokens
from geffect.risk import token_log_probabilities

from .weights import inverse_confidence


@dataclass(frozen=True)
class Mean:
    """What a part of a loss is a mean over: the scored tokens, or the sequences, of one side.

    So the losses of batches add up to that of all their data, each with its share of the count.

    >>> Mean("forget", "tokens").count({"labels": torch.tensor([[3, 5, -100], [7, 2, 9]])})
    3
    """

    side: str
    over: Literal["tokens", "sequences"]

    def count(self, batch: Batch) -> int:
        """How many tokens or sequences of a batch there are to take the mean over."""
        return int(scored_tokens(batch).sum()) if self.over == "tokens" else len(labels_of(batch))


class Objective(ABC):
    """A scalar that unlearning minimises: `objective(model, {"forget": ..., "retain": ...})`.

    `model` is whatever returns `.logits` of shape (sample, position, token) for the keys of a batch
    without its labels. An objective with a field `reference` compares with the model before
    unlearning; `likelihoods_suffice` says that it asks that model for nothing but the likelihoods
    of the scored forget tokens.
    """

    likelihoods_suffice: ClassVar[bool] = False

    @abstractmethod
    def components(self, model: Any, batch: Pair) -> dict[str, tuple[Tensor, float]]:
        """The parts of the loss by name, each with its weight."""

    @property
    def means(self) -> Mapping[str, Mean]:
        """What each component is a mean over, by its name.

        None are declared here: the loss is then known on a pair of batches, and not on more data
        than is run at once.
        """
        return {}

    def __call__(self, model: Any, batch: Pair) -> Tensor:
        """The loss: the weighted sum of the components."""
        total: Tensor | None = None
        for loss, weight in self.components(model, batch).values():
            part = loss if weight == 1.0 else weight * loss
            total = part if total is None else total + part
        assert total is not None
        return total

    def implicit_weights(self, model: Any, batch: Pair) -> dict[str, Tensor]:
        """How the gradient is spread over the forget data: weights by name, without a graph.

        "inverse confidence" is 1/p of every answer token, the weight of a log-likelihood's gradient
        on grad p. An objective that weighs grad log p as well has "weight": of every answer token,
        or of every sample where the objective weighs whole answers. With the `SharedForward` of
        the step, after the loss, they cost no forward.
        """
        with torch.no_grad():
            return self._weights_of(batch, *token_log_probabilities(model, batch["forget"]))

    def _weights_of(self, batch: Pair, log_p: Tensor, scored: Tensor) -> dict[str, Tensor]:
        return {"inverse confidence": inverse_confidence(log_p, scored)}


class SharedForward:
    """A model that runs each batch once, for objectives and risks on the same data.

    It remembers what it returned for a batch as long as it lives; make one a step. What was run
    without a graph is run again for who needs one.

    >>> calls = []
    >>> def model(input_ids): calls.append(1); return input_ids.sum()
    >>> shared, ids = SharedForward(model), torch.ones(2)
    >>> shared(input_ids=ids) is shared(input_ids=ids), len(calls)
    (True, 1)
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._outputs: dict[tuple[tuple[str, int], ...], tuple[Any, Any, bool]] = {}

    def __call__(self, **inputs: Tensor) -> Any:
        """What the model returns for the inputs."""
        key = tuple((name, id(value)) for name, value in inputs.items())
        _, output, with_graph = self._outputs.get(key, (None, None, False))
        if output is None or (torch.is_grad_enabled() and not with_graph):
            output = self._model(**inputs)
            # The inputs are kept too: an id is only their own while they live.
            self._outputs[key] = inputs, output, torch.is_grad_enabled()
        return output


def positive(owner: str, name: str, value: float) -> float:
    """`value` if it is a positive finite number, else a ValueError that names the field."""
    if not (isinstance(value, int | float) and 0 < value < float("inf")):
        raise ValueError(
            f"`{name}` of {owner} should be a positive number. Found `{name} = {value!r}`. "
            f"Pass a number such as {owner}({name}=1.0)."
        )
    return float(value)
