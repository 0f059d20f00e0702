"""The reference of an objective: what the model before unlearning says of a batch."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor, nn

from geffect.batch import Batch
from geffect.risk import for_labels, inputs_of, token_log_probabilities
from geffect.risk.alignment import unwrapped

Need = Literal["none", "likelihoods", "logits", "hidden states"]
"""What an objective asks of its reference: nothing, the likelihoods of the scored forget tokens, or
more, for which the model has to be kept."""

NEEDS = get_args(Need)
"""From the least to the most."""


@runtime_checkable
class Reference(Protocol):
    """The outputs of a frozen model for a batch, without a graph."""

    def log_probabilities(self, batch: Batch) -> Tensor:
        """log p of every scored token, `Float[sample, position - 1]`; 0 where none is scored."""

    def logits(self, batch: Batch) -> Tensor:
        """`Float[sample, position, token]`."""

    def hidden_states(self, batch: Batch) -> tuple[Tensor, ...]:
        """Those of the embedding and of every layer, each `Float[sample, position, hidden]`."""


def logits_before(reference: Reference, model: Any, batch: Batch, own: Tensor) -> Tensor:
    """The logits of the reference for the labels of a batch, beside the model's `own` for these.

    Both are `Float[sample, position, token]`, as `geffect.risk.label_logits` gives them. Raises
    ValueError for a reference with other tokens or positions.
    """
    found = for_labels(model, reference.logits(batch))
    if found.shape != own.shape:
        raise ValueError(
            "`reference` should give logits for the tokens that the model has, at its positions. "
            f"Found the shape {tuple(found.shape)} beside {tuple(own.shape)}. Pass the model as it "
            "was before unlearning, with its vocabulary."
        )
    return found


class FrozenModel:
    """The reference as a model that is there: all of its outputs, a forward each.

    `model` returns what a model of transformers does, in eval mode. A `SharedForward` of it gives
    all that is asked of one step by a single forward for each batch.

    >>> reference = FrozenModel(nn.Identity().eval())
    >>> FrozenModel(nn.Identity())
    Traceback (most recent call last):
    ValueError: `model` of FrozenModel should be in eval mode, without dropout. Found ...
    """

    def __init__(self, model: Any) -> None:
        if getattr(model, "training", False):
            raise ValueError(
                "`model` of FrozenModel should be in eval mode, without dropout. Found a model in "
                "training mode. Pass FrozenModel(copy.deepcopy(model).eval())."
            )
        self.model = model

    @classmethod
    def copied(cls, model: nn.Module) -> "FrozenModel":
        """A copy of a model as it is now."""
        return cls(copy.deepcopy(model).eval().requires_grad_(False))

    @torch.no_grad()
    def log_probabilities(self, batch: Batch) -> Tensor:
        """log p of every scored token, `Float[sample, position - 1]`; 0 where none is scored."""
        return token_log_probabilities(self.model, batch)[0]

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """`Float[sample, position, token]`."""
        logits: Tensor = self.model(**inputs_of(self.model, batch)).logits
        return logits

    @torch.no_grad()
    def hidden_states(self, batch: Batch) -> tuple[Tensor, ...]:
        """Those of the embedding and of every layer, each `Float[sample, position, hidden]`."""
        states = self.model(**inputs_of(self.model, batch), output_hidden_states=True).hidden_states
        return tuple(states)


def moves_with(reference: Reference, model: Any) -> bool:
    """Whether a reference is the model that is trained itself, which forgets nothing beside itself.

    >>> model = nn.Identity().eval()
    >>> moves_with(FrozenModel(model), model), moves_with(FrozenModel.copied(model), model)
    (True, False)
    """
    trained = unwrapped(model)
    return (
        isinstance(reference, FrozenModel)
        and isinstance(trained, nn.Module)
        and unwrapped(reference.model) is trained
    )


class AdapterBase:
    """The reference as the base of a model of peft: itself with its adapters disabled.

    That is the model before unlearning only where the adapters leave their base as it was; an
    adapter that trains biases or whole modules, or splits the base at the start, is refused.
    """

    def __init__(self, model: Any) -> None:
        if not hasattr(model, "disable_adapter"):
            raise TypeError(
                "`model` of AdapterBase should be a model of peft, with adapters to disable. Found "
                f"`{type(model).__name__}`. Pass FrozenModel.copied(model) in its place."
            )
        for config in model.peft_config.values():
            changed = base_changed_by(config)
            if changed is not None:
                raise ValueError(
                    "The adapter of an AdapterBase should leave its base as it was. Found "
                    f"{changed}. Load the base once more, and pass it as a FrozenModel."
                )
        self._model = model

    def log_probabilities(self, batch: Batch) -> Tensor:
        """log p of every scored token, `Float[sample, position - 1]`; 0 where none is scored."""
        with self._base() as base:
            return base.log_probabilities(batch)

    def logits(self, batch: Batch) -> Tensor:
        """`Float[sample, position, token]`."""
        with self._base() as base:
            return base.logits(batch)

    def hidden_states(self, batch: Batch) -> tuple[Tensor, ...]:
        """Those of the embedding and of every layer, each `Float[sample, position, hidden]`."""
        with self._base() as base:
            return base.hidden_states(batch)

    @contextmanager
    def _base(self) -> Iterator[FrozenModel]:
        modes = [(module, module.training) for module in self._model.modules()]
        # Enabled again, all factors would require a gradient, also those that somebody froze.
        trained = [(p, p.requires_grad) for p in self._model.parameters()]
        try:
            with self._model.disable_adapter():
                yield FrozenModel(self._model.eval())
        finally:
            for module, training in modes:
                module.training = training
            for parameter, requires_grad in trained:
                parameter.requires_grad_(requires_grad)


LEAVE_THE_BASE = (True, False, "gaussian", "eva", "orthogonal")
"""The initialisations of LoRA that take nothing out of the weights they are for."""


def base_changed_by(config: Any) -> str | None:
    """What the adapter of a configuration of peft changes in its base; None if nothing.

    >>> from types import SimpleNamespace
    >>> base_changed_by(SimpleNamespace(peft_type="LORA", bias="all"))
    "`bias = 'all'`"
    >>> base_changed_by(SimpleNamespace(peft_type="LORA", bias="none"))
    """
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != "LORA":
        return f"`peft_type = {kind!r}`, whose base may change"
    left: dict[str, tuple[object, ...]] = {
        "bias": ("none",),
        "init_lora_weights": LEAVE_THE_BASE,
        "modules_to_save": (None, []),
        "trainable_token_indices": (None,),
        "layer_replication": (None,),
    }
    for option, harmless in left.items():
        value = getattr(config, option, harmless[0])
        if value not in harmless:
            return f"`{option} = {value!r}`"
    return None
