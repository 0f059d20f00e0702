"""The table of a model's trainable tensors: names, layers, towers, depth groups, ties.

Everything is read off the parameters' names, without the prefixes of wrappers. So the plain,
compiled, data-parallel and adapter-carrying forms of one model give one table.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from typing import TYPE_CHECKING

from geffect.places import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    LAYER,
    MODEL,
    OTHER,
    POOLER,
    PROJECTOR,
    TENSOR,
    Place,
    is_store,
    places,
    tower_order,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

DEPTHS = ("shallow", "middle", "deep")

_WRAPPERS = re.compile(
    r"^(?:module\.)+|(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|base_layer)\."
    r"|^base_model\.model\.(?=.+\.)"
)
# Behind the tensors of an adapter stands its name; not so in LoRAs that others write.
_ADAPTER = re.compile(
    rf"\.(lora_(?:embedding_)?[ABE]|lora_magnitude_vector|(?!lora_)(?:{TENSOR}))\.[^.]+"
)
_PARTS = (EMBEDDING, LAYER, FINAL_NORM, POOLER, HEAD, OTHER)


@dataclass(frozen=True)
class Parameter:
    """One trainable tensor. A tensor with several names stands under its first one, once."""

    name: str
    layer: str  # "embedding", "layer 0", ..., "final norm", "head", "embedding+head", "other"
    group: str  # as the layer, with the layers of a tower in thirds: "shallow", "middle", "deep"
    index: int  # of the layer in its tower; -1 outside
    module: str  # the path inside the layer, "self_attn.q_proj"
    shape: tuple[int, ...]
    dtype: str
    tied_to: tuple[str, ...]  # its further names
    tower: str = MODEL  # "vision", "encoder", ...; it stands before the layer if there are several
    role: str = ""  # in a mixture of experts: "router", "expert", "shared expert"
    experts: int = 0  # of how many experts it is made, along its first dimension
    depth: int = 0  # how many layers its tower has

    @property
    def numel(self) -> int:
        """How many numbers the tensor holds."""
        return prod(self.shape)


@cache
def canonical_name(name: str) -> str:
    """The name without what wrappers added.

    >>> canonical_name("module._orig_mod.model.layers.0.mlp.up_proj.weight")
    'model.layers.0.mlp.up_proj.weight'
    >>> canonical_name("base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight")
    'model.layers.0.self_attn.q_proj.lora_A.weight'
    """
    stripped = None
    while stripped != name:
        stripped, name = name, _WRAPPERS.sub("", name)
    return _ADAPTER.sub(r".\1", name)


def trainable(model: "nn.Module") -> "dict[str, Tensor]":
    """The tensors that require a gradient by canonical name, each once, in the model's order."""
    found = {names[0]: tensor for tensor, names in _named(model).items()}
    if not found:
        raise ValueError(
            "`model` should have a parameter that requires a gradient. Found none in "
            f"{type(model).__name__}. Call model.requires_grad_() before."
        )
    for name, tensor in found.items():
        _check_numbers(name, tensor, type(model).__name__)
    return found


def _check_numbers(name: str, tensor: "Tensor", model: str) -> None:
    """Refuse a parameter whose gradient is not one real number for each of its own."""
    from geffect.codes import holds_codes

    should = f"The parameters of `{model}` that require a gradient should hold real numbers."
    if tensor.is_complex():
        raise ValueError(
            f"{should} Found `{name}` of {tensor.dtype}. Keep its real and imaginary parts in one "
            "real parameter, and take torch.view_as_complex of it in the forward."
        )
    if tensor.is_inference():
        raise ValueError(
            f"{should} Found `{name}`, which was made inside of `torch.inference_mode()` and never "
            "has a gradient. Make or load the model outside of it."
        )
    if holds_codes(tensor):
        raise ValueError(
            f"{should} Found `{name}` of `{type(tensor).__name__}`, which holds them in another "
            "form, as quantised weights are. Freeze it and train an adapter beside it, or "
            "dequantise the model."
        )


def describe(model: "nn.Module") -> tuple[Parameter, ...]:
    """One row for each trainable tensor, in the order of `trainable`.

    Layers and towers are those of the whole model, also where parts of it are frozen. Layers that
    share a tensor share a row: tied input and output embeddings are one tensor of the layer
    "embedding+head", so that sums over layers count it once.

    >>> from torch import nn
    >>> [row.layer for row in describe(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)))]
    ['layer 0', 'layer 0', 'layer 1', 'layer 1']
    """
    from geffect.distributed import shape_of

    named, found = _named(model), places(_whole(model))
    depths = _depths(found.values())
    rows = []
    for tensor, (name, *further) in named.items():
        # A name that was left whole stands for one that is canonical.
        own = [found[n if n in found else canonical_name(n)] for n in (name, *further)]
        rows.append(
            Parameter(
                name=name,
                layer=_layer(own),
                group=_group(own, depths),
                index=own[0].index,
                module=own[0].module,
                shape=tuple(shape_of(tensor)),
                dtype=str(tensor.dtype).removeprefix("torch."),
                tied_to=tuple(further),
                tower=_tower(own),
                role=own[0].role,
                experts=own[0].experts,
                depth=depths[own[0].tower],
            )
        )
    return tuple(rows)


def placed(rows: Sequence[Parameter]) -> tuple[Parameter, ...]:
    """The rows of a table that was made without towers, with what their names say of these.

    >>> old = Parameter("encoder.layers.0.w", "layer 0", "deep", 0, "w", (2, 2), "float32", ())
    >>> placed([old, replace(old, name="decoder.layers.0.w")])[1].tower
    'decoder'
    """
    found = places({name: row.shape for row in rows for name in (row.name, *row.tied_to)})
    depths = _depths(found.values())
    own = [[found[name] for name in (row.name, *row.tied_to)] for row in rows]
    return tuple(
        replace(row, tower=_tower(those), role=those[0].role, depth=depths[those[0].tower])
        for row, those in zip(rows, own, strict=True)
    )


def _depths(found: Iterable[Place]) -> dict[str, int]:
    """How many layers each tower has."""
    depths: dict[str, int] = {}
    for place in found:
        depths[place.tower] = max(depths.get(place.tower, 0), 1 + place.index)
    return depths


def _tower(own: Sequence[Place]) -> str:
    """The tower, or those that share the tensor."""
    return "+".join(dict.fromkeys(p.tower for p in own if p.surely)) or own[0].tower


def _layer(own: Sequence[Place]) -> str:
    parts = (f"{p.part} {p.index}" if p.index >= 0 else p.part for p in own)
    return in_tower("+".join(dict.fromkeys(parts)), _tower(own))


def _group(own: Sequence[Place], depths: Mapping[str, int]) -> str:
    index, tower = own[0].index, own[0].tower
    if tower == PROJECTOR:
        return PROJECTOR
    return (
        in_tower(DEPTHS[index * len(DEPTHS) // depths[tower]], tower) if index >= 0 else _layer(own)
    )


def in_tower(part: str, tower: str) -> str:
    """The part of a tower by its whole name; the tower of a model that has but one goes unsaid.

    >>> in_tower("layer 0", "vision"), in_tower("layer 0", "model")
    ('vision layer 0', 'layer 0')
    """
    return part if tower in (MODEL, part) else f"{tower} {part}"


def _whole(model: "nn.Module") -> "dict[str, tuple[int, ...]]":
    """The shapes of all tensors by canonical name, with those that are frozen."""
    from geffect.distributed import shape_of

    return {
        canonical_name(name): tuple(shape_of(tensor))
        for name, tensor in model.named_parameters(remove_duplicate=False)
    }


def _named(model: "nn.Module") -> "dict[Tensor, list[str]]":
    """The names of each trainable tensor: canonical, or whole where two tensors would share one."""
    from geffect.distributed import at_rest  # needs torch, which who has a model has loaded

    rest = at_rest(model)
    whole: dict[Tensor, list[str]] = {}
    for name, found in model.named_parameters(remove_duplicate=False):
        if hasattr(found, "materialize"):  # as of nn.LazyLinear
            raise ValueError(
                f"The parameters of `{type(model).__name__}` should have a shape. Found `{name}` "
                "without one, which gets it in the first forward. Run the model once before."
            )
        parameter = rest.get(found, found)
        if parameter.requires_grad:
            whole.setdefault(parameter, []).append(name)
    # Where it stands is told by the layers that share it.
    whole = {
        tensor: [name for name in names if not is_store(name)] or names
        for tensor, names in whole.items()
    }
    canonical = {tensor: set(map(canonical_name, names)) for tensor, names in whole.items()}
    count = Counter(name for names in canonical.values() for name in names)
    return {
        tensor: [canonical_name(n) if count[canonical_name(n)] == 1 else n for n in names]
        for tensor, names in whole.items()
    }


def layers_of(parameters: Iterable[Parameter]) -> list[str]:
    """The layers of the parameters, each once, in order of first appearance."""
    return list(dict.fromkeys(parameter.layer for parameter in parameters))


def in_network_order(parameters: Sequence[Parameter], labels: Iterable[str]) -> list[str]:
    """The different `labels` of the parameters, from the input of the network to its output.

    Towers come one after another: encoders first, then projectors, then decoders.
    """
    towers = tower_order(parameter.tower for parameter in parameters)
    order: dict[str, tuple[int, int, int]] = {}
    for parameter, label in zip(parameters, labels, strict=True):
        order.setdefault(label, (towers[parameter.tower], *_depth(parameter)))
    return sorted(order, key=order.__getitem__)


def part_of(parameter: Parameter) -> str:
    """What the layer is in its tower: "embedding", "layer 0", ..., of several the first."""
    return parameter.layer.removeprefix(f"{parameter.tower} ").partition("+")[0]


def _depth(parameter: Parameter) -> tuple[int, int]:
    if parameter.index >= 0:
        return _PARTS.index(LAYER), parameter.index
    part = part_of(parameter)
    return _PARTS.index(part if part in _PARTS else OTHER), 0
