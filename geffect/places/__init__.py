"""Where the tensors of a network stand, read off their names: towers, layers, experts.

A number in a name is a place in a list of modules. These lists, the modules that hold them and the
order of the names tell the layers and the towers of a network. Words are needed for what stands
outside of the lists, and for towers that should have the field's names.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .adapters import TENSOR, is_adapter, is_store
from .experts import EXPERT, ROUTER, SHARED_EXPERT, expert_of, roles
from .names import spots
from .stacks import LAYER, parts
from .towers import MODEL, homes, tower_in, tower_order
from .words import EMBEDDING, FINAL_NORM, HEAD, OTHER, POOLER, PROJECTOR

__all__ = [
    "EMBEDDING",
    "EXPERT",
    "FINAL_NORM",
    "HEAD",
    "LAYER",
    "MODEL",
    "OTHER",
    "POOLER",
    "PROJECTOR",
    "ROUTER",
    "SHARED_EXPERT",
    "TENSOR",
    "Place",
    "expert_of",
    "is_adapter",
    "is_store",
    "places",
    "tower_in",
    "tower_order",
]


@dataclass(frozen=True)
class Place:
    """Where a tensor stands: its tower, its part of it, and what it is to a mixture of experts.

    `index` counts the layers of a tower, and is -1 for what stands outside of them. `surely` is
    False for what stands outside of all towers, and was given to one. `module` is the path inside
    of the layer. `experts` is how many a tensor holds along its first dimension, 0 where it is not
    one tensor for several experts.
    """

    tower: str
    part: str
    index: int
    surely: bool
    module: str
    role: str
    experts: int


def places(shapes: Mapping[str, Sequence[int]]) -> dict[str, Place]:
    """The place of every tensor of a model, from their canonical names and shapes in its order.

    >>> found = places({"embed.weight": (9, 4), "rnn.weight_ih_l0": (4, 4), "out.weight": (9, 4)})
    >>> [place.part for place in found.values()]
    ['embedding', 'layer', 'head']
    """
    every = spots(shapes)
    towers, surely = homes(every)
    placed: dict[str, tuple[str, int]] = {}
    for tower in dict.fromkeys(towers):
        members = [spot for spot, own in zip(every, towers, strict=True) if own == tower]
        placed |= parts(tower, members)
    return {
        spot.name: Place(tower, *placed[spot.name], sure, spot.module, role, experts)
        for spot, tower, sure, (role, experts) in zip(
            every, towers, surely, roles(every), strict=True
        )
    }
