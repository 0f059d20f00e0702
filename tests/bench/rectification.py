"""What it costs to rectify a step, beside the optimizer's own, and how exactly it is done."""

import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from geffect import Recorder, Rectifier
from geffect.gradients import Gradients, differentiate
from geffect.losses import Loss
from geffect.objectives import nll
from geffect.projection import orthogonal
from geffect.sources import OBJECTIVE

from .bars import Bar, Row
from .capture import stepping_of
from .memory import gradient_bytes, live_gradients, peak_gradients
from .products import exact, heavy_tailed
from .rounds import Load, Ratio, ratio
from .workload import Workload

# The rule that always projects: what one round has rectified is in no conflict in the next.
UPDATE_SPACES: Mapping[str, Mapping[str, Any]] = {
    "update space": {"rule": orthogonal},
    "coordinates in update space": {"scope": "coordinate"},
}


def rows(workload: Workload, folder: Path) -> Iterator[Row]:
    """Time and memory in either space, what a projection leaves, and recording it all."""
    yield from time(workload)
    yield from memory(workload.minute())
    yield conflict_left(workload)
    yield from recorded(workload, folder)


def time(workload: Workload) -> Iterator[Row]:
    """What a rectification adds to the passes and to the step."""
    gradients = differentiate(workload.parameters, ascent(workload))
    optimizer = apart(workload, gradients)
    alone = Rectifier(workload.model, orthogonal)
    seconds = workload.seconds(
        {"rectified": partial(rectify, alone, gradients), "step": optimizer.step}
    )
    yield Row(
        "gradient space: rectification / AdamW foreach",
        ratio(seconds["rectified"], seconds["step"]),
        Bar(0.5),
    )
    for name, options in UPDATE_SPACES.items():
        stepping = foreach(workload)
        rectifier = Rectifier(workload.model, space="update", optimizer=stepping, **options)

        def rectified_step(rectifier: Rectifier = rectifier, step: Load = stepping.step) -> None:
            rectify(rectifier, gradients)
            step()

        seconds = workload.seconds({"rectified": rectified_step, "step": optimizer.step})
        rectifier.detach()
        added = [a - b for a, b in zip(seconds["rectified"], seconds["step"], strict=True)]
        yield Row(f"{name}: rectification / AdamW foreach", ratio(added, seconds["step"]), Bar(1.0))


def memory(workload: Workload) -> Iterator[Row]:
    """Gradients that are kept from step to step, and those alive beyond that while one is taken."""
    kept, more = memory_of(workload, Rectifier(workload.model))
    yield Row("gradient space: memory kept / one gradient", Ratio(kept), Bar(1.0))
    yield Row("gradient space: more memory at peak / one gradient", Ratio(more), Bar(0.0))
    # The average, and the parameters before the step: all of them, or those of a few tensors.
    for (name, options), bar in zip(UPDATE_SPACES.items(), (Bar(2.0), Bar(1.0)), strict=True):
        stepping = foreach(workload)
        rectifier = Rectifier(workload.model, space="update", optimizer=stepping, **options)
        kept, more = memory_of(workload, rectifier, stepping.step)
        rectifier.detach()
        yield Row(f"{name}: memory at peak / one gradient", Ratio(kept + more), bar)


def memory_of(
    workload: Workload, rectifier: Rectifier, step: Load = lambda: None
) -> tuple[float, float]:
    """What a first step leaves, and the peak of a second one beyond that of gradient ascent."""

    def rectified() -> None:
        rectifier.backward(**ascent(workload))
        step()
        workload.model.zero_grad()

    def plain() -> None:
        (-nll(workload.model, workload.pair["forget"])).backward()
        step()
        workload.model.zero_grad()

    plain()  # the optimizer's own state is not counted
    with live_gradients(workload) as live:
        rectified()
        kept = live.now
    more = peak_gradients(workload, rectified) - peak_gradients(workload, plain)
    return kept / gradient_bytes(workload), more / gradient_bytes(workload)


def conflict_left(workload: Workload) -> Row:
    """The larger |<x, r>| / |x||r|: of the model's own gradients, and of heavy-tailed ones."""
    own = differentiate(workload.parameters, ascent(workload))
    a, b = next(heavy_tailed(sum(p.numel() for p in workload.parameters), workload.device))
    heavy = {"objective": shaped(b - a / 2, workload), "retain": shaped(a, workload)}
    of_losses = {name: {name: 1.0} for name in heavy}
    cosines = []
    for gradients in (own, Gradients(workload.parameters, [], heavy, of_losses, {})):
        rectify(Rectifier(workload.model, orthogonal), gradients)
        x = torch.cat([parameter.grad.flatten() for parameter in workload.parameters])
        r = torch.cat([part.flatten() for part in gradients.of("retain")])
        cosines.append(abs(exact(x, r)) / math.sqrt(exact(x, x) * exact(r, r)))
        workload.model.zero_grad()
    return Row(
        "rectified gradient: conflict left / |x| |r|", Ratio(max(cosines), len(cosines)), Bar(1e-6)
    )


def recorded(workload: Workload, folder: Path) -> Iterator[Row]:
    """A step that is rectified and recorded, beside one that is rectified."""
    stepping, rectifier = stepping_of(workload), Rectifier(workload.model)
    with Recorder(workload.model, folder / "rectified.h5") as recorder:
        loads = {
            "rectified": stepping(lambda: rectifier.backward(**ascent(workload))),
            "recorded": stepping(
                lambda: recorder.backward(**ascent(workload), rectifier=rectifier)
            ),
        }
        passes = {name: passes_of(workload, load) for name, load in loads.items()}
        seconds = workload.seconds(loads)
    yield Row(
        "rectified and recorded: forward and backward passes / rectified",
        Ratio(passes["recorded"] / passes["rectified"]),
        Bar(1.0),
    )
    yield Row(
        "rectified and recorded step / rectified step",
        ratio(seconds["recorded"], seconds["rectified"]),
        Bar(1.05),
    )


def ascent(workload: Workload) -> dict[str, Loss]:
    """The two gradients of gradient ascent beside data to retain."""
    forget, retain = (nll(workload.model, workload.pair[side]) for side in ("forget", "retain"))
    return {"objective": {"forget": -1.0}, "forget": forget, "retain": retain}


def rectify(rectifier: Rectifier, gradients: Gradients) -> None:
    """Leave the rectified gradient in `.grad`, or arm the optimizer."""
    for parameter in gradients.parameters:
        parameter.grad = None
    rectifier.observe(gradients)
    rectifier.rectify(gradients)


def apart(workload: Workload, gradients: Gradients) -> torch.optim.Optimizer:
    """That step on copies, by a gradient that no rectifier has left: it may be taken again."""
    copies = [p.detach().clone().requires_grad_() for p in workload.parameters]
    for parameter, grad in zip(copies, gradients.of(OBJECTIVE), strict=True):
        parameter.grad = None if grad is None else grad.clone()
    return torch.optim.AdamW(copies, lr=1e-7, foreach=True)


def foreach(workload: Workload) -> torch.optim.Optimizer:
    """AdamW that takes all tensors at once, at a rate at which the model stays what it is."""
    return torch.optim.AdamW(workload.parameters, lr=1e-7, foreach=True)


def passes_of(workload: Workload, load: Load) -> int:
    """How often a load goes through the model, forward or backward."""
    count = 0

    def one_more(*_: object) -> None:
        nonlocal count
        count += 1

    hooks = [
        workload.model.register_forward_pre_hook(one_more),
        workload.model.lm_head.weight.register_hook(one_more),
    ]
    load()
    for hook in hooks:
        hook.remove()
    return count


def shaped(vector: Tensor, workload: Workload) -> list[Tensor | None]:
    """A flat vector as one tensor a parameter."""
    parts = vector.split([parameter.numel() for parameter in workload.parameters])
    return [part.view_as(p) for part, p in zip(parts, workload.parameters, strict=True)]
