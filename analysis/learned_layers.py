"""Where facts were learned: in which block the forget gradient has been trained away."""

import numpy as np
from numpy.typing import NDArray

from geffect.places import is_adapter
from geffect.sources import FORGET, RETAIN
from geffect.store import Run

from .base import Floats, check_run

READING = frozenset(
    ("up_proj", "gate_proj", "gate_up_proj", "c_fc", "fc1", "fc_in", "dense_h_to_4h", "w1", "w3")
)
"""The matrices by which an MLP reads, as models call them."""


def learned_in(run: Run) -> dict[str, float]:
    """How likely each block is the one in which the facts to forget were learned, by its name.

    log(|g_retain|^2 / |g_forget|^2) over the matrices by which the MLP of the block reads, at the
    first step of the run, before anything was unlearned. Training a block on facts leaves little of
    their gradient in it, and in the other blocks as it was. It has been measured for facts that
    were planted in one block alone, as `docs/layers.md` says; larger is likelier, and a difference
    of blocks is all that it tells.

    Blocks without such a matrix are left out. Empty for a run without `retain`.

    >>> learned_in(example_run())
    {'layer 0': -1.38...}
    """
    check_run(run)
    if not {FORGET, RETAIN} <= {*run.sources} or not len(run.steps):
        return {}
    first = run.gram()[0]
    forget, retain = (run.index(name) for name in (FORGET, RETAIN))
    found = {}
    for layer in dict.fromkeys(p.layer for p in run.layers if p.index >= 0):
        own = _reading(run, layer)
        if own.any():
            summed: Floats = first[own].sum(axis=0)
            with np.errstate(divide="ignore", invalid="ignore"):
                found[layer] = float(np.log(summed[retain, retain] / summed[forget, forget]))
    return found


def _reading(run: Run, layer: str) -> NDArray[np.bool_]:
    """Which tensors of a run are matrices by which the MLP of a block reads."""
    return np.array(
        [
            p.layer == layer
            and len(p.shape) > 1
            and not is_adapter(p.name)
            and not READING.isdisjoint(p.module.split("."))
            for p in run.layers
        ]
    )
