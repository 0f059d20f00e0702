"""What the effects of samples and of tokens cost, beside the passes that training takes anyway."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from geffect.effects import InstanceEffects, direction, token_effects
from geffect.gradients import differentiate
from geffect.objectives import NPO, FrozenModel, nll

from .bars import Bar, Row
from .memory import peak_bytes
from .rounds import Ratio, ratio
from .workload import Workload


def rows(workload: Workload, folder: Path) -> Iterator[Row]:
    """Samples and layers inside of a step of NPO, and tokens by themselves."""
    yield from samples(workload)
    yield from tokens(workload)


def samples(workload: Workload) -> Iterator[Row]:
    """A step of NPO with GD, with and without the effect of every sample in every layer.

    Either takes the passes of retain and forget data, and the forward of NPO's reference model.
    """
    model, pair = workload.model, workload.pair
    objective = partial(NPO(), reference=FrozenModel.copied(model))
    optimizer = workload.optimizer()

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    def plain() -> None:
        nll(model, pair["retain"]).backward()
        objective(model, pair).backward()
        step()

    def measured() -> None:
        risk = differentiate(workload.parameters, {"retain": nll(model, pair["retain"])})
        with InstanceEffects(model, risk.of("retain")) as effects:
            objective(model, pair).backward()
        assert effects.by_layer.isfinite().all()
        for parameter, gradient in zip(workload.parameters, risk.of("retain"), strict=True):
            parameter.grad += gradient
        step()

    seconds = workload.seconds({"plain": plain, "measured": measured})
    yield Row(
        "NPO with effects of sample x layer: step / step",
        ratio(seconds["measured"], seconds["plain"]),
        Bar(1.15),
    )


def tokens(workload: Workload) -> Iterator[Row]:
    """The effects of the tokens of a batch, and a forward and backward pass of it."""
    model, batch = workload.model, workload.pair["forget"]
    along = direction(model, [workload.pair["retain"]])

    def passes() -> None:
        nll(model, batch).backward()
        model.zero_grad()

    def measured() -> None:
        token_effects(model, batch, along)

    seconds = workload.seconds({"passes": passes, "measured": measured})
    yield Row(
        "effects of tokens: time / forward and backward",
        ratio(seconds["measured"], seconds["passes"]),
        Bar(1.5),
    )
    yield Row(
        "effects of tokens: peak memory / forward and backward",
        Ratio(peak_bytes(measured) / peak_bytes(passes)),
        Bar(1.0),
    )
