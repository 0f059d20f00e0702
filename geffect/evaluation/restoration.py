"""Restoration: how far unlearning leads from a corrupted model back to the clean one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from geffect.layers import describe, in_network_order, layers_of, trainable


@dataclass(frozen=True)
class Recovery:
    """Of the way from the corrupted parameters to the clean ones, what unlearning has gone.

    `cosine` is cos(theta_u - theta_k, theta_c - theta_k): 1 where every step leads back, NaN where
    either is no step at all. `residual` is |theta_u - theta_c| / |theta_k - theta_c|: 0 where the
    clean model is reached, 1 where nothing is gained.
    """

    cosine: float
    residual: float


def recovery(
    clean: Mapping[str, Tensor] | nn.Module,
    corrupted: Mapping[str, Tensor] | nn.Module,
    unlearned: nn.Module,
) -> dict[str, Recovery]:
    """The recovery of the whole, under the name `model`, and of every layer of the network.

    - `clean`, `corrupted`: theta_c and theta_k, models or their trainable tensors by name, as
      `geffect.layers.trainable` gives them; kept copies will do.
    - `unlearned`: the model theta_u.

    Sums are in float64. Raises ValueError where the models do not have the same tensors, or where
    clean and corrupted do not differ: there is then nothing to recover. A layer that corruption
    has not changed has NaN, and one with numbers that are none. From RESTOR (arXiv 2411.00204).

    >>> clean, corrupted, halfway = (nn.Linear(1, 1, bias=False) for _ in range(3))
    >>> for model, weight in ((clean, 0.0), (corrupted, 4.0), (halfway, 2.0)):
    ...     _ = nn.init.constant_(model.weight, weight)
    >>> recovery(clean, corrupted, halfway)["model"]
    Recovery(cosine=1.0, residual=0.5)
    """
    now, rows = trainable(unlearned), describe(unlearned)
    states = {"clean": _tensors(clean), "corrupted": _tensors(corrupted)}
    for name, state in states.items():
        _check_same(name, state, now)
    products = {layer: torch.zeros(4, dtype=torch.float64) for layer in layers_of(rows)}
    for row, (name, theta) in zip(rows, now.items(), strict=True):
        start, goal = (states[s][name].detach().double().cpu() for s in ("corrupted", "clean"))
        end = theta.detach().double().cpu()
        gone, way, left = end - start, goal - start, end - goal
        products[row.layer] += torch.stack(
            [(gone * way).sum(), gone.square().sum(), way.square().sum(), left.square().sum()]
        )
    whole = torch.stack(list(products.values())).sum(0)
    if not whole[2]:
        raise ValueError(
            "`corrupted` should differ from `clean`. Found the same parameters. Pass the model "
            "before and after it has learned what is false."
        )
    order = in_network_order(rows, [row.layer for row in rows])
    return {"model": _of(whole), **{layer: _of(products[layer]) for layer in order}}


def verdict(false_effect: float, true_effect: float) -> str:
    """What a step does, by the predicted changes e_R of the risks of false and of true facts.

    `restorative`: the false ones are forgotten and the true ones regained. `forget-only`: the
    false ones alone. `neither`: the risk of the false ones does not rise. NaN is refused.

    >>> verdict(-1.0, 0.5), verdict(-1.0, -0.5), verdict(0.0, 1.0)
    ('restorative', 'forget-only', 'neither')
    """
    if false_effect != false_effect or true_effect != true_effect:
        raise ValueError(
            f"Effects should be numbers. Found {false_effect} and {true_effect}. Leave out the "
            "steps that were not measured."
        )
    if not false_effect < 0:
        return "neither"
    return "restorative" if true_effect > 0 else "forget-only"


def _of(products: Tensor) -> Recovery:
    inner, gone, way, left = products.tolist()
    length = (gone * way) ** 0.5
    nothing = float("nan")
    return Recovery(
        cosine=float(torch.tensor(inner / length, dtype=torch.float64).clamp(-1.0, 1.0))
        if length
        else nothing,
        residual=(left / way) ** 0.5 if way else nothing,
    )


def _tensors(state: Mapping[str, Tensor] | nn.Module) -> Mapping[str, Tensor]:
    return trainable(state) if isinstance(state, nn.Module) else state


def _check_same(whose: str, state: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> None:
    if {n: t.shape for n, t in state.items()} == {n: t.shape for n, t in now.items()}:
        return
    other: Sequence[str] = sorted(
        name
        for name in state.keys() | now.keys()
        if name not in state or name not in now or state[name].shape != now[name].shape
    )
    raise ValueError(
        f"`{whose}` should have the trainable tensors of `unlearned`, in their shapes. Found that "
        f"{', '.join(other[:3])}{', ...' if len(other) > 3 else ''} differ. Pass states of one "
        "model."
    )
