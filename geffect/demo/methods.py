"""What the study compares: unlearning methods, and variants of the step that is taken.

What needs torch is imported where it is used: planning a study is done without.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .recipe import ALPHA, BETA, EMA

if TYPE_CHECKING:
    import torch

    from geffect import Rectifier
    from geffect.objectives import SharedForward
    from geffect.objectives.base import Pair

Step = Callable[["SharedForward", "Pair", Any], dict[str, Any]]
"""From (model, batch, model before unlearning) to what `Recorder.backward` is told of a step.

That is the loss `objective`, its parts if any, and its implicit weights. The losses `forget` and
`retain` are there already: what is a combination of them costs no pass.
"""


def _ga(model: "SharedForward", batch: "Pair", reference: Any) -> dict[str, Any]:
    from geffect.objectives import GradientAscent

    return {
        "objective": {"forget": -1.0},
        "weights": GradientAscent().implicit_weights(model, batch),
    }


def _wga(model: "SharedForward", batch: "Pair", reference: Any) -> dict[str, Any]:
    from geffect.objectives import WeightedGradientAscent

    wga = WeightedGradientAscent(ALPHA)
    return {"objective": wga(model, batch), "weights": wga.implicit_weights(model, batch)}


def _npo(model: "SharedForward", batch: "Pair", reference: Any) -> dict[str, Any]:
    from geffect.objectives import NPO, SharedForward

    npo = NPO(BETA, SharedForward(reference))
    return {"objective": npo(model, batch), "weights": npo.implicit_weights(model, batch)}


def _graddiff(model: "SharedForward", batch: "Pair", reference: Any) -> dict[str, Any]:
    return _ga(model, batch, reference) | {"objective": {"forget": -1.0, "retain": 1.0}}


def _npo_gd(model: "SharedForward", batch: "Pair", reference: Any) -> dict[str, Any]:
    npo = _npo(model, batch, reference)
    return npo | {
        "objective": {"objective.forget": 1.0, "retain": 1.0},
        "objective.forget": npo["objective"],
    }


METHODS: dict[str, Step] = {
    "ga": _ga,
    "wga": _wga,
    "npo": _npo,
    "graddiff": _graddiff,
    "npo+gd": _npo_gd,
}


@dataclass(frozen=True)
class Variant:
    """How a step is rectified, with the learning rate it is run at."""

    summary: str
    options: Mapping[str, Any] = field(default_factory=dict)
    learning_rate: float = 3e-4
    duration: float = 1.0  # of a run, beside the plain one

    def rectifier(
        self, model: "torch.nn.Module", optimizer: "torch.optim.Optimizer"
    ) -> "Rectifier":
        """The rectifier of this variant; that of the plain one only watches."""
        from geffect import Rectifier

        of_update = self.options.get("space") == "update"
        return Rectifier(model, ema=EMA, optimizer=optimizer if of_update else None, **self.options)


VARIANTS: dict[str, Variant] = {
    "plain": Variant("the objective alone", {"rule": None}),
    "gru": Variant("GRU: the gradient is projected, then AdamW steps"),
    "gru-update": Variant("AdamW's own step is projected", {"space": "update"}),
    "gru-coordinate": Variant(
        "AdamW's own step, each coordinate by itself",
        {"space": "update", "scope": "coordinate"},
        learning_rate=1e-3,
    ),
    "select": Variant(
        "AdamW's own step, on the most salient 0.5 % of coordinates",
        {"rule": None, "space": "update", "select": 0.005},
        learning_rate=2e-3,
        duration=1.7,
    ),
}
