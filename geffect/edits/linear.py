"""Closed-form edits of one linear layer: other outputs for some inputs, the same for others.

UCE, "Unified Concept Editing in Diffusion Models" (arXiv 2308.14761), and RECE, "Reliable and
Efficient Concept Erasure" (ECCV 2024, arXiv 2407.12383), for any `nn.Linear`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from geffect.batch import on_device
from geffect.layers import canonical_name, trainable
from geffect.numbers import is_number
from geffect.risk import RiskSet, as_batches, inputs_of, scored_tokens, undisturbed

from .base import Data, Edit, Outcome
from .options import check_option
from .task_vector import check_weights


@dataclass(frozen=True)
class ClosedFormLinear(Edit):
    """UCE: W that sends each erased input c to W_0 c_target, and leaves preserved inputs c_j.

    The minimum of e sum |W c - W_0 c_target|^2 + l_1 sum |W c_j - W_0 c_j|^2 + l_2 |W - W_0|^2:

        W = (e sum W_0 c_target c^T + l_1 sum W_0 c_j c_j^T + l_2 W_0)
            (e sum c c^T + l_1 sum c_j c_j^T + l_2 I)^-1

    The data of the edit are inputs of the layer, `Float[input, feature]`: `erased`, a row of
    `targets` for each of them, and `preserved`. `layer_inputs` takes them from batches.

    - `layer`: the canonical name of the weight, such as "model.layers.3.mlp.down_proj.weight".
    - `erase`, `preserve`, `stay`: e, l_1 and l_2.

    >>> model = nn.Sequential(nn.Linear(2, 2, bias=False))
    >>> _ = nn.init.eye_(model[0].weight)
    >>> edit = ClosedFormLinear("0.weight", preserve=1.0, stay=1e-6)
    >>> x, y = torch.eye(2)[:1], torch.eye(2)[1:]
    >>> with edit.change(model, {"erased": x, "targets": y, "preserved": y}):
    ...     model(x).round(decimals=2).tolist(), model(y).round(decimals=2).tolist()
    ([[0.0, 1.0]], [[0.0, 1.0]])
    """

    layer: str
    erase: float = 1.0
    preserve: float = 0.1
    stay: float = 0.1

    def __post_init__(self) -> None:
        for name in ("erase", "preserve"):
            value = getattr(self, name)
            check_option(self, name, is_number(value) and value >= 0, "0 or positive")
        check_option(self, "stay", is_number(self.stay) and self.stay > 0, "positive")

    @property
    def source(self) -> str:
        return "arXiv 2308.14761"

    def outcome(self, model: nn.Module, data: Data) -> Outcome:
        parameters = trainable(model)
        check_weights(parameters, type(self).__name__)
        weight = parameters.get(self.layer)
        linear = {id(module.weight) for module in _linear(model)}
        if weight is None or id(weight) not in linear:
            matrices = [name for name, p in parameters.items() if id(p) in linear]
            raise ValueError(
                "`layer` of ClosedFormLinear should be the weight of a linear layer (nn.Linear) "
                f"that requires a gradient. Found `{self.layer}`. "
                + (f"Name one such as {matrices[:3]}." if matrices else "The model has none.")
            )
        _check_alone(model, weight, self.layer)
        own = weight.detach().double()
        erased, targets, preserved = (
            _inputs(data, name, own) for name in ("erased", "targets", "preserved")
        )
        if len(erased) != len(targets) or not len(erased):
            raise ValueError(
                "`targets` should have a row for each of `erased`, one or more. Found "
                f"{len(targets)} for {len(erased)}. Repeat a target that several inputs have."
            )
        both = self.preserve * preserved.T @ preserved + self.stay * torch.eye(own.shape[1]).to(own)
        moments = self.erase * erased.T @ erased + both
        wanted = own @ (self.erase * targets.T @ erased + both)
        new = torch.linalg.solve(moments, wanted.T).T
        return Outcome({self.layer: new}, {"erased": len(erased), "preserved": len(preserved)})


def derived_input(
    originals: Sequence[Tensor], edited: Sequence[Tensor], concept: Tensor, *, ridge: float = 0.1
) -> Tensor:
    """RECE: the input c' that makes edited layers say what the original ones said of a concept c.

        c' = (ridge I + sum_k W'_k^T W'_k)^-1 (sum_k W'_k^T W_k) c

    It minimises sum_k |W'_k c' - W_k c|^2 + ridge |c'|^2. Erase it as well, and derive again.

    - `originals`, `edited`: weights W_k and W'_k that read the same input.
    - `concept`: `Float[feature]`.
    - `ridge`: the paper's 0.1 or 0.001.

    >>> derived_input([torch.eye(2)], [2 * torch.eye(2)], torch.ones(2), ridge=1e-9)
    tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    if not originals or len(originals) != len(edited):
        raise ValueError(
            "`edited` should have a weight for each of `originals`, one or more. Found "
            f"{len(edited)} for {len(originals)}. Pass the same layers before and after the edit."
        )
    if not (is_number(ridge) and ridge > 0):
        raise ValueError(f"`ridge` should be positive. Found {ridge!r}. Pass, say, ridge=0.1.")
    pairs = [
        (w.detach().double(), v.detach().double()) for w, v in zip(originals, edited, strict=True)
    ]
    moments = sum((v.T @ v for _, v in pairs), ridge * torch.eye(len(concept)).to(pairs[0][0]))
    wanted = torch.stack([v.T @ (w @ concept.detach().to(w)) for w, v in pairs]).sum(dim=0)
    found: Tensor = torch.linalg.solve(moments, wanted)
    return found


def layer_inputs(model: nn.Module, layer: str, batches: RiskSet) -> Tensor:
    """What a linear layer gets where the next token is scored, `Float[token, feature]`.

    - `layer`: the canonical name of its weight. The model is left as it was.
    """
    modules = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and canonical_name(f"{name}.weight") == layer
    ]
    if not modules:
        raise ValueError(
            f"`layer` should be the weight of an nn.Linear of the model. Found `{layer}`. Name "
            'one such as "model.layers.3.mlp.down_proj.weight".'
        )
    got: list[Tensor] = []
    found: list[Tensor] = []
    device = next(model.parameters()).device
    handle = modules[0].register_forward_pre_hook(lambda _, given: got.append(given[0].detach()))
    try:
        with undisturbed(model), torch.no_grad():
            for batch in as_batches(batches):
                got.clear()
                own = on_device(batch, device)
                model(**inputs_of(model, own))
                scored = scored_tokens(model, own)
                if len(got) != 1 or got[0].ndim != 3 or got[0].shape[1] < scored.shape[1]:
                    raise ValueError(
                        f"`{layer}` should be run once a forward, on every token. Found shapes "
                        f"{[tuple(x.shape) for x in got]}. Choose another layer."
                    )
                found.append(got[0][:, : scored.shape[1]][scored].clone())
    finally:
        handle.remove()
    return torch.cat(found)


def _linear(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def _check_alone(model: nn.Module, weight: Tensor, layer: str) -> None:
    """Refuse a weight that is an embedding too: other rows would be looked up in silence."""
    users = [
        name
        for name, module in model.named_modules()
        if any(own is weight for own in module._parameters.values())
    ]
    if len(users) > 1:
        raise ValueError(
            f"`layer` of ClosedFormLinear should be a weight of one module. Found that `{layer}` "
            f"is one of {', '.join(f'`{name}`' for name in users)}, whose outputs would change as "
            "well. Choose another layer, or untie them."
        )


def _inputs(data: Data, name: str, weight: Tensor) -> Tensor:
    given = data.get(name)
    width = weight.shape[1]
    if given is None and name == "preserved":
        return weight.new_zeros(0, width)
    if not isinstance(given, Tensor) or given.ndim != 2 or given.shape[1] != width:
        found = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise ValueError(
            f"`{name}` should be inputs of the layer, of shape (input, {width}). Found {found}. "
            "Take them by `geffect.edits.layer_inputs`."
        )
    return given.detach().to(weight)
