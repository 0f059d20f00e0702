"""Where a parameter tensor stands in the network: its layer, its depth group, its ties.

Everything is read off the parameter's name, without the prefixes of wrappers. So the plain,
compiled, data-parallel and adapter-carrying forms of one model give one table.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

EMBEDDING, FINAL_NORM, HEAD, OTHER = "embedding", "final norm", "head", "other"
DEPTHS = ("shallow", "middle", "deep")

_WRAPPERS = re.compile(
    r"^(?:module\.)+|(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|base_layer)\."
    r"|^base_model\.model\.(?=.+\.)"
)
_ADAPTER = re.compile(r"\.(lora_(?:embedding_)?[AB]|lora_magnitude_vector)\.[^.]+")
_IN_STACK = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)\.")
_OUTSIDE_STACK = {
    EMBEDDING: re.compile(
        r"(?:^|\.)(?:embed_tokens|embed_positions|embed_in|wte|wpe|word_embeddings"
        r"|tok_embeddings|position_embeddings)\b"
    ),
    HEAD: re.compile(r"^(?:lm_head|embed_out|output)\b"),
    FINAL_NORM: re.compile(r"(?:^|\.)(?:norm|ln_f|final_layer_?norm)\b"),
}


@dataclass(frozen=True)
class Parameter:
    """One trainable tensor. A tensor with several names stands under its first one, once."""

    name: str
    layer: str  # "embedding", "layer 0", ..., "final norm", "head", "embedding+head", "other"
    group: str  # as the layer, with the stack in thirds: "shallow", "middle", "deep"
    index: int  # of the layer in the stack; -1 outside
    module: str  # the path inside the layer, "self_attn.q_proj"
    shape: tuple[int, ...]
    dtype: str
    tied_to: tuple[str, ...]  # its further names

    @property
    def numel(self) -> int:
        """How many numbers the tensor holds."""
        return prod(self.shape)


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


def is_adapter(name: str) -> bool:
    """Whether a canonical name is that of an adapter's factor.

    >>> is_adapter("model.layers.0.self_attn.q_proj.lora_A.weight")
    True
    """
    return re.search(r"\.lora_", name) is not None


def layer_of(name: str) -> tuple[str, int]:
    """The layer of a canonical name, and its index in the stack; ("other", -1) if unknown.

    >>> layer_of("transformer.h.11.attn.c_attn.weight")
    ('layer 11', 11)
    >>> layer_of("model.norm.weight")
    ('final norm', -1)
    """
    if found := _IN_STACK.search(name):
        return f"layer {int(found[1])}", int(found[1])
    for layer, pattern in _OUTSIDE_STACK.items():
        if pattern.search(name):
            return layer, -1
    return OTHER, -1


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
    from geffect.distributed import is_sharded

    should = f"The parameters of `{model}` that require a gradient should hold real numbers."
    if tensor.is_complex():
        raise ValueError(
            f"{should} Found `{name}` of {tensor.dtype}. Keep its real and imaginary parts in one "
            "real parameter, and take torch.view_as_complex of it in the forward."
        )
    if hasattr(tensor, "__tensor_flatten__") and not is_sharded(tensor):
        raise ValueError(
            f"{should} Found `{name}` of `{type(tensor).__name__}`, which holds them in another "
            "form, as quantised weights are. Freeze it and train an adapter beside it, or "
            "dequantise the model."
        )


def describe(model: "nn.Module") -> tuple[Parameter, ...]:
    """One row for each trainable tensor, in the order of `trainable`.

    Layers that share a tensor share a row: tied input and output embeddings are one tensor of the
    layer "embedding+head", so that sums over layers count it once.

    >>> from torch import nn
    >>> describe(nn.Sequential(nn.Linear(2, 3, bias=False)))[0].layer
    'other'
    """
    named = _named(model)
    places = [[layer_of(canonical_name(name)) for name in names] for names in named.values()]
    depth = 1 + max((index for place in places for _, index in place), default=-1)
    rows = []
    for (tensor, (name, *further)), place in zip(named.items(), places, strict=True):
        layers = list(dict.fromkeys(layer for layer, _ in place))
        index = place[0][1]
        layer = "+".join(layers)
        rows.append(
            Parameter(
                name=name,
                layer=layer,
                group=DEPTHS[index * len(DEPTHS) // depth] if index >= 0 else layer,
                index=index,
                module=_module(name),
                shape=tuple(tensor.shape),
                dtype=str(tensor.dtype).removeprefix("torch."),
                tied_to=tuple(further),
            )
        )
    return tuple(rows)


def _named(model: "nn.Module") -> "dict[Tensor, list[str]]":
    """The names of each trainable tensor: canonical, or whole where two tensors would share one."""
    from geffect.distributed import at_rest  # needs torch, which who has a model has loaded

    rest = at_rest(model)
    whole: dict[Tensor, list[str]] = {}
    for name, found in model.named_parameters(remove_duplicate=False):
        parameter = rest.get(found, found)
        if parameter.requires_grad:
            whole.setdefault(parameter, []).append(name)
    canonical = {tensor: set(map(canonical_name, names)) for tensor, names in whole.items()}
    count = Counter(name for names in canonical.values() for name in names)
    return {
        tensor: [canonical_name(n) if count[canonical_name(n)] == 1 else n for n in names]
        for tensor, names in whole.items()
    }


def layers_of(parameters: Iterable[Parameter]) -> list[str]:
    """The layers of the parameters, each once, in order of first appearance."""
    return list(dict.fromkeys(parameter.layer for parameter in parameters))


def in_network_order(parameters: Iterable[Parameter], labels: Iterable[str]) -> list[str]:
    """The different `labels` of the parameters, from the input of the network to its output."""
    place: dict[str, tuple[int, int]] = {}
    for parameter, label in zip(parameters, labels, strict=True):
        place.setdefault(label, _depth(parameter))
    return sorted(place, key=place.__getitem__)


def _module(name: str) -> str:
    inside = _IN_STACK.split(name)[-1]
    return inside.rpartition(".")[0] or inside


def _depth(parameter: Parameter) -> tuple[int, int]:
    if parameter.index >= 0:
        return 1, parameter.index
    first = parameter.layer.partition("+")[0]
    return {EMBEDDING: 0, FINAL_NORM: 2, HEAD: 3}.get(first, 4), 0
