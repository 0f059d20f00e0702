"""A plan: which sets will an unlearning damage, from a few probing steps of it on a copy."""

import copy
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from geffect import dots
from geffect.batch import Batch, Pair, batches_in, on_device
from geffect.correlation import ranks
from geffect.data.collate import batched, collate, pad_token_of
from geffect.data.examples import read, spelled
from geffect.data.pairs import Items
from geffect.devices import there
from geffect.layers import describe, trainable
from geffect.numbers import is_number, is_whole, percent
from geffect.objectives import (
    FrozenModel,
    Objective,
    SharedForward,
    answers_of,
    as_objective,
    check_sides,
)
from geffect.risk import noting_risk, risk_gradient
from geffect.sources import FORGET, RETAIN
from geffect.steps import Differences

from .folders import Folder, base_of, check_folder, positions_of, tokenizer_of
from .loading import Loader
from .sets import check_files, check_known

OPTIONS = ("base", "device", "tokenizer", "template", "max_length", "show")

LEAST_STEPS = 3
"""A model that has memorised its data has hardly a gradient: before this the ranks are noise."""

MEASURED = (
    "On the embedded model (20 configurations, 3 steps) such ranks have a mean Spearman "
    "correlation of 0.44 with the damage at equal forgetting; likeness of hidden states to those "
    "of the forget set has 0.59, the loss before unlearning -0.36. Two unlearnings that differ in "
    "the order of their data alone agree by 0.73. Nothing is known of larger models."
)
"""What is claimed of a plan: as `python -m tests.bench.plan` has measured it."""


@dataclass(frozen=True)
class Probe:
    """The steps that are tried: AdamW without weight decay and without dropout.

    - `steps`: how many, at least 3.
    - `learning_rate`: that of the unlearning.
    - `seeds`: of the order of the data, each with steps of its own.
    - `batch_size`: the items of each side in a step, and those of a forward pass elsewhere.
    """

    learning_rate: float
    steps: int = LEAST_STEPS
    seeds: tuple[int, ...] = (0, 1, 2)
    batch_size: int = 8

    def __post_init__(self) -> None:
        if not is_whole(self.steps, LEAST_STEPS):
            raise ValueError(
                f"`steps` of a probe should be at least {LEAST_STEPS}: the gradients of a model "
                "that has memorised its data predict nothing before it has begun to forget. Found "
                f"{self.steps!r}. Pass steps={LEAST_STEPS}, or more."
            )
        if not (is_number(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(
                "`learning_rate` of a probe should be a number above 0. Found "
                f"{self.learning_rate!r}. Pass that of the unlearning, such as 1e-5."
            )
        seeds = self.seeds
        if not (seeds and all(map(is_whole, seeds)) and len({*seeds}) == len(seeds)):
            raise ValueError(
                "`seeds` of a probe should be whole numbers, each once. Found "
                f"{self.seeds!r}. Pass, say, (0, 1, 2)."
            )
        if not is_whole(self.batch_size, 1):
            raise ValueError(
                "`batch_size` of a probe should be a whole number above 0. Found "
                f"{self.batch_size!r}. Pass, say, 8."
            )


@dataclass(frozen=True)
class Prediction:
    """What the probes say of a set.

    `predicted` is the rise of its risk over the steps of a probe, to first order, in nats per token
    and as the mean over the seeds; `low` and `high` are the least and the most of these. `rank` is
    1 for the set that is damaged most. `layers` are the parts of `predicted`.
    """

    name: str
    predicted: float
    low: float
    high: float
    rank: int
    layers: Mapping[str, float] = field(repr=False)

    @property
    def reason(self) -> str:
        """Where the risk rises most."""
        rises = {layer: rise for layer, rise in self.layers.items() if rise > 0}
        if not rises:
            return "no layer raises it"
        most = max(rises, key=rises.__getitem__)
        return f"{percent(rises[most] / sum(rises.values()))} of the rise in {most}"


def plan(
    model: nn.Module,
    sets: Mapping[str, Items],
    *,
    forget: Items,
    objective: Objective | Mapping[str, float] | str,
    probe: Probe,
    retain: Items | None = None,
    pad_token_id: int = 0,
) -> list[Prediction]:
    """Which sets an unlearning will damage most, first the worst: from K steps on a copy.

    With theta_K the parameters after the K steps of a probe, a set S and its risk R_S,

        predicted_S = <grad R_S(theta_K), theta_K - theta_0>

    Sets are ranked in each probe by itself, and then by their mean rank over the seeds: where one
    probe diverges, a mean of values would be its own. The model stays as it is, to the bit, and so
    do random numbers.

    - `sets`: items with `input_ids` and `labels`, by name: what may be damaged.
    - `forget`, `retain`: the data of the objective; `retain` where that takes it.
    - `objective`: an `Objective`, a name of the catalogue, or weights of risks.
    - `probe`: how the steps are taken.

    Raises a ValueError for an objective that lacks its data, and for a probe that diverges.

    Memory: a copy of the model, the state of AdamW, and two gradients. Time: K steps and one
    gradient of each set, for each seed.
    """
    minimised = as_objective(objective)
    _check(minimised, sets, forget, retain)
    sides = {FORGET: forget} if retain is None else {FORGET: forget, RETAIN: retain}
    for given in (sides, sets):
        check_known(given, model)
    device = next(iter(trainable(model).values())).device
    held: dict[str, list[Batch]] = {}
    for name, items in sets.items():
        with noting_risk(name):
            every = [items[place] for place in range(len(items))]
            own = batched(every, probe.batch_size, pad_token_id=pad_token_id)
            held[name] = [on_device(batch, device) for batch in own]
    found: list[dict[str, dict[str, float]]] = []
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        for seed in probe.seeds:
            torch.manual_seed(seed)
            draws = _draws(sides, probe, seed, pad_token_id, device)
            probed = _probed(model, minimised, draws, probe)
            found.append(_damage(model, probed, held))
    return _ranked([*sets], found)


def plan_of(
    model: Folder,
    sets: Mapping[str, Path],
    *,
    forget: Path,
    objective: Objective,
    probe: Probe,
    retain: Path | None = None,
    **options: Any,
) -> list[Prediction]:
    """The plan of a model in a folder, and of data files.

    Options are `base`, `device`, `tokenizer`, `template`, `max_length` and `show`, as for
    `geffect.replay`. Of an adapter its factors are trained.
    """
    chosen: dict[str, Any] = {**dict.fromkeys(OPTIONS), "template": True} | options
    check_folder(model)
    device = there(chosen["device"])
    own_base = base_of(model)
    base = chosen["base"] or own_base
    configured = model if own_base is None or base is None else base
    given = {FORGET: forget, **({} if retain is None else {RETAIN: retain}), **sets}
    check_files(given, configured)
    folders = [folder for folder in (chosen["tokenizer"], model, base) if folder is not None]
    tokenizer = tokenizer_of(folders[:1] if chosen["tokenizer"] is not None else folders)

    def items(name: str, path: Path, answers: Sequence[str] = ()) -> Items:
        read_items = read(
            path,
            tokenizer,
            template=chosen["template"],
            answers=answers,
            max_length=chosen["max_length"],
            positions=positions_of(configured),
        )
        if chosen["show"] is not None:
            for side, item in batches_in({name: read_items[0]}):
                chosen["show"](side, spelled(item, tokenizer))
        return read_items

    loaded = Loader(base=chosen["base"], device=device).load(model)
    return plan(
        loaded.eval(),
        {name: items(name, path) for name, path in sets.items()},
        forget=items(FORGET, forget, answers_of(objective, FORGET)),
        retain=None if retain is None else items(RETAIN, retain),
        objective=objective,
        probe=probe,
        pad_token_id=pad_token_of(tokenizer),
    )


def _check(
    objective: Objective, sets: Mapping[str, Items], forget: Items, retain: Items | None
) -> None:
    if not sets:
        raise ValueError(
            "`sets` should name a set that may be damaged. Found none. Pass, say, "
            '{"neighbours": items}.'
        )
    for name, items in ((FORGET, forget), (RETAIN, retain), *sets.items()):
        if items is not None and not len(items):
            raise ValueError(
                f"`{name}` should have an item or more. Found none. Leave it out, or fill it."
            )
    given = {FORGET: forget[0], **({} if retain is None else {RETAIN: retain[0]})}
    check_sides(objective, given, add="Pass {side}=items, on the command line --{side}.")
    if retain is not None and not any(s.partition(".")[0] == RETAIN for s in objective.sides):
        raise ValueError(
            f"`retain` should go with an objective that takes it. Found {objective!r}, which does "
            "not. Leave it out, or name it among the sets."
        )


def _draws(
    sides: Mapping[str, Items], probe: Probe, seed: int, pad_token_id: int, device: torch.device
) -> Iterator[Pair]:
    """Batches of both sides, without replacement until too few items are left."""

    def drawn(name: str, items: Items) -> Iterator[Any]:
        size = min(probe.batch_size, len(items))
        order = random.Random(f"{seed} {name}")
        while True:
            places = order.sample(range(len(items)), len(items))
            for start in range(0, len(places) - size + 1, size):
                chosen = [items[place] for place in places[start : start + size]]
                yield on_device(collate(chosen, pad_token_id=pad_token_id), device)

    each = {name: drawn(name, items) for name, items in sides.items()}
    while True:
        yield {name: next(batches) for name, batches in each.items()}


def _probed(
    model: nn.Module, objective: Objective, draws: Iterator[Pair], probe: Probe
) -> nn.Module:
    """A copy of the model after the steps of a probe."""
    copied = copy.deepcopy(model).eval()
    parameters = [*trainable(copied).values()]
    running = objective.begin(copied)
    before = None
    if objective.reference != "none":
        before = FrozenModel.copied(model) if model.training else FrozenModel(model)
    optimizer = torch.optim.AdamW(parameters, lr=probe.learning_rate, weight_decay=0.0)
    for step in range(probe.steps):
        optimizer.zero_grad()
        loss = running(SharedForward(copied), next(draws), before)
        if not math.isfinite(loss.item()):
            raise ValueError(
                f"The objective should be finite in every step of a probe. Found {loss.item()} at "
                f"step {step}. Lower the learning rate of {probe.learning_rate:g}."
            )
        loss.backward()
        optimizer.step()
        running.advance()
    optimizer.zero_grad()
    return copied


def _damage(
    model: nn.Module, probed: nn.Module, sets: Mapping[str, Sequence[Batch]]
) -> dict[str, dict[str, float]]:
    """<grad R_S(theta_K), theta_K - theta_0> of each set, by layer."""
    before, after = ([*trainable(m).values()] for m in (model, probed))
    moved = Differences([p.detach() for p in before], after, [True] * len(after))
    layers = [parameter.layer for parameter in describe(model)]
    damage: dict[str, dict[str, float]] = {}
    for name, batches in sets.items():
        with noting_risk(name):
            gradient = risk_gradient(probed, batches).vector
        damage[name] = dict.fromkeys(layers, 0.0)
        for layer, g, d in zip(layers, gradient, moved, strict=True):
            damage[name][layer] += _inner(g, d)
    return damage


def _inner(gradient: Tensor | None, moved: Tensor | None) -> float:
    return 0.0 if gradient is None else float(dots.gram([gradient, moved])[0, 1])


def _ranked(
    names: Sequence[str], found: Sequence[Mapping[str, Mapping[str, float]]]
) -> list[Prediction]:
    """The sets, first those of the least mean rank; of two alike those that rise more."""
    totals = {name: [math.fsum(of[name].values()) for of in found] for name in names}
    of_seeds = [ranks([-totals[name][seed] for name in names]) for seed in range(len(found))]
    standing = {name: sum(own[i] for own in of_seeds) for i, name in enumerate(names)}
    mean = {name: math.fsum(own) / len(found) for name, own in totals.items()}
    order = sorted(names, key=lambda name: (standing[name], -mean[name]))
    return [
        Prediction(
            name, mean[name], min(totals[name]), max(totals[name]), place,
            {
                layer: math.fsum(of[name][layer] for of in found) / len(found)
                for layer in found[0][name]
            },
        )
        for place, name in enumerate(order, start=1)
    ]  # fmt: skip
