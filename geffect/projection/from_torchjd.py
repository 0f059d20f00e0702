"""The weightings of torchjd as rules. Needs the extra `torchjd`."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from geffect import distributed

from .rules import Rule

if TYPE_CHECKING:
    from torchjd.aggregation import Weighting


def from_torchjd(weighting: "Weighting[Tensor]", *, adds_retain: bool = True) -> Rule:
    """The rule that gives u and the retain gradients the weights of a weighting of torchjd.

    - `weighting`: any that is a function of the Gramian: UPGradWeighting, DualProjWeighting,
      CAGradWeighting, MGDAWeighting, IMTLGWeighting, AlignedMTLWeighting and others (torchjd.org).
    - `adds_retain`: whether the step trains on the retain data too, as with most weightings: they
      treat all gradients alike. False for one that leaves u alone where nothing is in conflict, and
      never looks at the length of a retain gradient.

    Each block is asked for by itself. Of several processes the first one asks, as some weightings
    draw random numbers.

    Weightings that project (UPGrad, DualProj) take gradients for zero whose squared lengths add up
    to less than 1e-4, which those of one layer may well do, and leave their conflicts as they are:
    give them `projector=torchjd.linalg.QuadprogProjector(norm_eps=0.0)`.

    >>> from torchjd.aggregation import MGDAWeighting
    >>> rule = from_torchjd(MGDAWeighting())
    >>> rule(torch.tensor([[4.0, -1.0], [-1.0, 2.0]]))
    tensor([0.3750, 0.6250])
    """
    from torchjd import Stateful
    from torchjd.aggregation import Weighting

    # One with a state would mix the blocks, and is lost when a run is resumed.
    if not isinstance(weighting, Weighting) or isinstance(weighting, Stateful):
        raise ValueError(
            "`weighting` should be a weighting of torchjd that depends on the Gramian alone, such "
            f"as UPGradWeighting(). Found `{type(weighting).__name__}`. Of an aggregator pass its "
            "`gramian_weighting`; of what keeps a state choose another."
        )

    def weights(K: Tensor) -> Tensor:
        blocks = K.reshape(-1, *K.shape[-2:])
        # Some draw random numbers: not the training's, and the same for the same Gram matrix.
        with torch.random.fork_rng(devices=[]):
            # Of the CPU alone, where K lies: `torch.manual_seed` is for those of all devices.
            torch.default_generator.manual_seed(hash(tuple(K.flatten().tolist())))
            found = torch.stack([weighting(block) for block in blocks])
        return distributed.broadcast(found).to(K).reshape(K.shape[:-1])

    weights.__name__ = type(weighting).__name__
    return Rule(weights, adds_retain=adds_retain)
