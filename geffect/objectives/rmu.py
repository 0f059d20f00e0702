"""RMU: representation misdirection, which pulls hidden states to a random target."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from geffect.batch import Pair, side_of
from geffect.risk import sequence_sum, token_mean
from geffect.risk.alignment import unwrapped
from geffect.sources import FORGET

from .base import Component, Objective, Reduction, begun, positive, switch
from .draws import check_seed
from .hidden_states import THIRD, check_layer, chosen, hidden_states, of_answers
from .of_run import OfRun
from .reference import Reference


class Target(OfRun):
    """The direction u of a run, `Float32[hidden]`: the table `rmu_target` of its file.

    >>> Target(torch.tensor([0.5, 0.25])).table["target"]
    array([0.5 , 0.25], dtype=float32)
    """

    def __init__(self, direction: Tensor) -> None:
        self.direction = direction

    @property
    def table(self) -> Mapping[str, np.ndarray]:
        return {"target": self.direction.numpy()}

    def state_dict(self) -> dict[str, Any]:
        return {"direction": self.direction}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.direction = state["direction"]


@dataclass(frozen=True)
class RMU(Objective):
    """RMU: the mean over forget tokens of (1/d) sum_d (h_k - c u)^2.

    Over the answer tokens: h_k are the hidden states of layer k at the tokens themselves, of size
    d. Token mean. The target u is drawn once a run, uniformly from [0, 1)^d by the `seed`, and the
    file of the run keeps it as the table `rmu_target`. Parameters above k are not reached: they
    have no gradient, their entries in a run are 0, and training leaves them as they are. The loss
    is of activations and weighs no log p.

    - `layer`: k, an index of hidden states with 0 for the embedding, or a share of the layers,
      rounded down and one at least. A third, two thirds and all of 32 layers are the 10, 21 and 32
      of the source, where the last is behind the final norm.
    - `coefficient`: c.
    - `normalize_target`: makes u of length 1, as open-unlearning does, which then sets c to 20: the
      values of c do not carry over from one to the other.
    - `legacy`: divides as open-unlearning does, where [b] / [b, 1] is [b, b]: the mean of the sums
      of samples, times the mean of 1/n. The weight of a sample then depends on its batch, so that
      batches cannot be put together.

    >>> RMU(layer=7, coefficient=20.0, normalize_target=True).sides
    ('forget',)
    """

    source = "arXiv 2403.03218; defaults of arXiv 2502.19301"

    layer: float = THIRD
    coefficient: float = 2.0
    normalize_target: bool = False
    seed: int = 0
    legacy: bool = False
    target: Target | None = field(
        default_factory=lambda: None, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        check_layer("RMU", "layer", self.layer)
        positive("RMU", "coefficient", self.coefficient)
        switch("RMU", "normalize_target", self.normalize_target)
        switch("RMU", "legacy", self.legacy)
        check_seed("RMU", self.seed)

    def begin(self, model: Any) -> Self:
        """The objective with the target of a run, whose size the config of the model tells."""
        config: Any = getattr(unwrapped(model), "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        size = getattr(text, "hidden_size", None)
        if not isinstance(size, int):
            raise ValueError(
                "`model` of RMU should tell its hidden size as `config.hidden_size`. Found none in "
                f"`{type(unwrapped(model)).__name__}`. Give it a config that has it."
            )
        return begun(self, target=Target(self.direction(size)))

    @property
    def of_run(self) -> Mapping[str, OfRun]:
        return {} if self.target is None else {"rmu_target": self.target}

    def direction(self, size: int) -> Tensor:
        """The target u that the seed gives for a hidden size, `Float32[hidden]`.

        >>> RMU(normalize_target=True).direction(64).norm()
        tensor(1.)
        """
        # Whatever type and device the process takes for its own: the draw depends on both.
        draw = torch.Generator().manual_seed(self.seed)
        drawn = torch.rand(size, generator=draw, dtype=torch.float32, device="cpu")
        return drawn / drawn.norm() if self.normalize_target else drawn

    def components(
        self, model: Any, batch: Pair, reference: Reference | None = None
    ) -> dict[str, Component]:
        def loss() -> Tensor:
            forget = side_of(batch, FORGET)
            states = chosen(hidden_states(model, forget), self.layer, "layer")
            found, scored = of_answers(model, states, forget)
            goal = self.coefficient * self._direction_for(found.shape[-1]).to(found)
            distances = (found - goal).square().mean(dim=-1)
            return (_broadcast_mean if self.legacy else token_mean)(distances, scored)

        return {FORGET: Component(loss)}

    @property
    def reductions(self) -> Mapping[str, Reduction]:
        return {} if self.legacy else {FORGET: Reduction(FORGET, "token_mean")}

    def _direction_for(self, size: int) -> Tensor:
        if self.target is None:
            return self.direction(size)
        if len(self.target.direction) != size:
            raise ValueError(
                "The target of RMU should have the size of the hidden states. Found "
                f"{len(self.target.direction)}, from `config.hidden_size`, and hidden states of "
                f"{size}. Begin the objective with the model that it is run with."
            )
        return self.target.direction


def _broadcast_mean(distances: Tensor, scored: Tensor) -> Tensor:
    """mean_i(s_i) mean_j(1/n_j) over samples, as the division of [b] by [b, 1] makes it.

    Samples without an answer, where that is no number, take no part.
    """
    has_some = scored.any(dim=1)
    sums, counts = sequence_sum(distances, scored)[has_some], scored.sum(dim=1)[has_some]
    return (sums / counts[:, None]).mean()
