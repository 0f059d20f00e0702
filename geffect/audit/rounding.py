"""The rounding of a model to few bits, which may bring back what unlearning only moved a little.

Of "Catastrophic Failure of LLM Unlearning via Quantization" (arXiv 2410.16454): an update that
stays inside the cells of a quantiser is gone when the weights are rounded.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from geffect.layers import canonical_name
from geffect.notes import noting
from geffect.places import EXPERT, HEAD, is_adapter, places

from .adapters import Form, deployed, tuners
from .kept import check_weights, kept
from .quantisers import NF4, Q4_0, Int4, Int8, Quantiser

ROUNDED = "linear layer"

NARROW = 512
"""A model that has a layer with fewer inputs than this is a small one."""

_ATTACK = "Rounding"


def quantisers_for(model: nn.Module) -> tuple[Quantiser, ...]:
    """The quantisers of an audit, each an attack of its own: int8, int4, nf4 and gguf_q4_0.

    Groups of int4 are 128 inputs wide, of a small model 32.
    """
    check_weights(model, _ATTACK)
    narrowest = min(_oriented(weight).shape[-1] for weight in _to_round(model, Int8()))
    return Int8(), Int4(32 if narrowest < NARROW else 128), NF4(), Q4_0()


@contextmanager
def rounded(
    model: nn.Module, quantiser: Quantiser, *, adapter: Form = "merged"
) -> Iterator[nn.Module]:
    """A block in which the weights of a model are those that its rounded form stands for.

    Rounded are the weights of all linear layers but the output head, which `rounding_table` lists;
    embeddings, norms and biases stay as they are. The values are computed in float32 and given in
    the type of the weight.

    - `quantiser`: of `geffect.audit.quantisers`.
    - `adapter`: of a model with an adapter (LoRA) what is rounded, "merged" or "base".

    Yields the model, or for "merged" a copy of it with its adapter merged. Afterwards every weight
    has its bits back, whatever is raised inside. It keeps one copy of what is rounded. Raises
    ValueError for a model that is quantised already, or without layers to round.

    >>> from geffect.audit.quantisers import Int8
    >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 3, bias=False))
    >>> model.get_output_embeddings = lambda: model[1]
    >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0, 0.3], [-0.5, 2.0]]))
    >>> with rounded(model, Int8()):
    ...     model[0].weight.detach()
    tensor([[ 1.0000,  0.2992],
            [-0.5039,  2.0000]])
    >>> model[0].weight[0, 1].item()
    0.30000...
    """
    plain = _of(model, adapter)
    chosen = _to_round(plain, quantiser)
    with kept(weight.parameter for weight in chosen):
        written = set()
        for weight in chosen:
            if weight.parameter.data_ptr() not in written:  # two parameters may share their memory
                with torch.no_grad():
                    _oriented(weight).copy_(_codes(weight, quantiser).values)
                written.add(weight.parameter.data_ptr())
        yield plain


def rounding_table(
    model: nn.Module, quantiser: Quantiser, *, adapter: Form = "merged"
) -> pd.DataFrame:
    """What is rounded and what is not: columns weight, numbers, rounded, reason.

    A row is a parameter by its canonical name, once where it is tied; `numbers` is how many it
    holds.

    >>> from geffect.audit.quantisers import Q4_0
    >>> model = nn.Sequential(nn.Linear(32, 4, bias=False), nn.Linear(4, 3, bias=False))
    >>> model.get_output_embeddings = lambda: model[1]
    >>> rounding_table(model, Q4_0())
         weight  numbers  rounded        reason
    0  0.weight      128     True  linear layer
    1  1.weight       12    False   output head
    """
    rows = []
    for weight in _weights(_of(model, adapter)):
        reason = weight.kept or _misfit(weight, quantiser) or ROUNDED
        rows.append((weight.name, weight.parameter.numel(), reason == ROUNDED, reason))
    return pd.DataFrame(rows, columns=["weight", "numbers", "rounded", "reason"])


def same_codes(
    original: nn.Module, unlearned: nn.Module, quantiser: Quantiser, *, adapter: Form = "merged"
) -> float:
    """The share of all rounded weights that have one and the same code in both models.

    A large share is needed for rounding to undo what unlearning did, and is not enough for it.
    Raises ValueError for models that do not have the same weights.

    >>> from geffect.audit.quantisers import Int8
    >>> one, other = (nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 3)) for _ in range(2))
    >>> for model, weights in ((one, [1.0, 0.3]), (other, [1.0, 0.5])):
    ...     model.get_output_embeddings = lambda model=model: model[1]
    ...     _ = model[0].weight.data.copy_(torch.tensor([weights]))
    >>> same_codes(one, other, Int8())
    0.5
    """
    sides = [_to_round(_of(model, adapter), quantiser) for model in (original, unlearned)]
    shapes = [{weight.name: tuple(weight.parameter.shape) for weight in side} for side in sides]
    if shapes[0] != shapes[1]:
        other = min({*shapes[0].items()} ^ {*shapes[1].items()})[0]
        raise ValueError(
            "`unlearned` should have the weights of `original`, in their shapes. Found that "
            f"`{other}` differs. Pass models of one architecture."
        )
    same, total = 0, 0
    for before, after in zip(*sides, strict=True):
        codes = _codes(before, quantiser).codes
        same += int((codes == _codes(after, quantiser).codes.to(codes.device)).sum())
        total += codes.numel()
    return same / total


@dataclass(frozen=True)
class _Weight:
    """A parameter: whether its inputs come before its outputs, and why it is kept, "" if not."""

    name: str
    parameter: Tensor
    turned: bool
    kept: str


def int4_cells(model: nn.Module) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The weights that int4 rounds, and between what each of their numbers keeps its code.

    The largest number of a group gives the scale, and does not move; no other may become it.

    Returns weights as they lie in the model, with bounds of the same shape.

    >>> model = nn.Sequential(nn.Linear(3, 1, bias=False), nn.Linear(1, 1))
    >>> model.get_output_embeddings = lambda: model[1]
    >>> _ = model[0].weight.data.copy_(torch.tensor([[7.0, 2.2, -1.0]]))
    >>> [(_, low, high)] = int4_cells(model)
    >>> low.round(decimals=2), high.round(decimals=2)
    (tensor([[ 7.0000,  1.5100, -1.4900]]), tensor([[ 7.0000,  2.4900, -0.5100]]))
    """
    int4 = next(q for q in quantisers_for(model) if isinstance(q, Int4))
    return [_cells(weight, int4) for weight in _to_round(model, int4)]


def _cells(weight: _Weight, int4: Int4) -> tuple[Tensor, Tensor, Tensor]:
    values, found = _oriented(weight).float(), _codes(weight, int4)
    most = found.scale * 7
    fixed = values.abs() >= most * (1 - 1e-6)
    inside = most * 0.999
    bounds = [
        torch.where(fixed, values, ((found.codes + side) * found.scale).clamp(-inside, inside))
        for side in (-0.49, 0.49)
    ]
    low, high = (b.transpose(-1, -2) if weight.turned else b for b in bounds)
    return weight.parameter, low, high


def _of(model: nn.Module, adapter: Form) -> nn.Module:
    check_weights(model, _ATTACK)
    return deployed(model, adapter)


def _to_round(model: nn.Module, quantiser: Quantiser) -> list[_Weight]:
    weights = [w for w in _weights(model) if not w.kept and not _misfit(w, quantiser)]
    if not weights:
        raise ValueError(
            "The model should have linear layers beside its output head, with weights that "
            f"{quantiser.name} takes. Found none in `{type(model).__name__}`. See "
            "`geffect.audit.rounding.rounding_table` for why."
        )
    return weights


def _misfit(weight: _Weight, quantiser: Quantiser) -> str:
    inputs = _oriented(weight).shape[-1]
    if inputs % quantiser.multiple:
        return f"{inputs} inputs are no multiple of {quantiser.multiple}"
    return ""


def _oriented(weight: _Weight) -> Tensor:
    """The weight as `Float[..., output, input]`, in the memory of the parameter."""
    found = weight.parameter.detach()
    return found.transpose(-1, -2) if weight.turned else found


def _codes(weight: _Weight, quantiser: Quantiser) -> Any:
    with noting(f"It was found in `{weight.name}`."):
        return quantiser(_oriented(weight))


def _weights(model: nn.Module) -> list[_Weight]:
    """All parameters, each once, with why they are not rounded."""
    head = {id(p) for p in _head(model)}
    embedded = {
        id(p)
        for m in model.modules()
        if isinstance(m, nn.Embedding | nn.EmbeddingBag)
        for p in m.parameters()
    }
    turned = dict(_linear(model))
    beside = {id(p) for p in _beside(model)}
    experts = _experts(model)

    def reason(name: str, parameter: Tensor) -> str:
        if id(parameter) in embedded:
            return "embedding" + (" and output head" if id(parameter) in head else "")
        if id(parameter) in head:
            return "output head"
        if id(parameter) in beside or is_adapter(name):
            return "adapter"
        if id(parameter) in turned:
            return ""
        if name in experts:
            raise ValueError(
                "Experts that lie in one tensor should say which of its dimensions are inputs, by "
                f"`is_transposed` of their module. Found `{name}` of shape "
                f"{tuple(parameter.shape)}, whose module does not. Load the model by a newer "
                "transformers, or set that attribute to whether inputs come before outputs."
            )
        return "no linear layer" if parameter.ndim > 1 else "vector"

    return [
        _Weight(
            canonical_name(name),
            parameter,
            turned.get(id(parameter), False),
            reason(canonical_name(name), parameter),
        )
        for name, parameter in model.named_parameters()
    ]


def _linear(model: nn.Module) -> Iterator[tuple[int, bool]]:
    """The weights of linear layers, and whether their inputs come before their outputs."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) or _is_conv1d(module):
            weight = module._parameters.get("weight")
            if weight is None:
                raise ValueError(
                    "Linear layers should hold their weight as a parameter. Found that that of "
                    f"`{path}` is computed from others. Make it one: "
                    "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')."
                )
            yield id(weight), not isinstance(module, nn.Linear)
        elif isinstance(vars(module).get("is_transposed"), bool):
            for weight in module.parameters(recurse=False):
                if weight.ndim == 3:  # a matrix for each expert
                    yield id(weight), module.is_transposed is True


def _is_conv1d(module: nn.Module) -> bool:
    """Whether a module is the linear layer of GPT-2, which has its inputs first."""
    return type(module).__name__ == "Conv1D" and getattr(module.weight, "ndim", 0) == 2


def _experts(model: nn.Module) -> set[str]:
    """The canonical names of tensors of three dimensions that hold several experts."""
    shapes = {canonical_name(name): tuple(p.shape) for name, p in model.named_parameters()}
    found = places(shapes)
    return {n for n, shape in shapes.items() if len(shape) == 3 and found[n].role == EXPERT}


def _beside(model: nn.Module) -> Iterator[Tensor]:
    """The parameters that an adapter has beside those of the model."""
    for tuner in tuners(model):
        base = {id(p) for p in tuner.get_base_layer().parameters()}
        yield from (p for p in tuner.parameters() if id(p) not in base)
    for name, parameter in model.named_parameters():
        if ".modules_to_save." in name or "prompt_encoder." in name:
            yield parameter


def _head(model: nn.Module) -> Sequence[Tensor]:
    """The parameters of the output head, as the model says, or by its name."""
    try:
        given = model.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        given = None
    if isinstance(given, nn.Module):
        return [*given.parameters()]
    named = {canonical_name(n): p for n, p in model.named_parameters(remove_duplicate=False)}
    found = places({name: tuple(p.shape) for name, p in named.items()})
    head = [p for name, p in named.items() if found[name].part == HEAD]
    if not head:
        raise ValueError(
            "The model should tell which layer is its output head, which is not rounded. Found "
            f"neither `get_output_embeddings` of `{type(model).__name__}` nor a layer called so. "
            "Give it that method, which returns the layer, or call the layer `lm_head`."
        )
    return head
