"""Gradients of two processes against those of one: DDP and FSDP2 on the CPU, gloo between them."""

from collections.abc import Mapping
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from geffect import distributed
from geffect.gradients import Gradients, differentiate, stream
from geffect.layers import describe, trainable
from geffect.losses import plan
from tests.utils import reference, two_ranks
from tests.utils.layouts import LAYOUTS, Small, fsdp, nothing_is_gathered
from tests.utils.shares import (
    SIDES,
    assert_same_geometry,
    batch,
    everything,
    losses_of_a_rank,
    token_means,
    trained_in,
)

OBJECTIVE = {"forget": -1.0, "retain": 0.5}


def separated(model: nn.Module) -> Gradients:
    """The gradients of the step as they are averaged over the processes."""
    distributed.check_layout(model)
    losses = losses_of_a_rank(model)
    distributed.check_unsynchronised(model)
    parameters = list(trainable(model).values())
    with distributed.gradient_sync(model):
        step = differentiate(parameters, {"objective": OBJECTIVE, **losses})
    vectors = distributed.average(parameters, step.vectors)
    means = dict(zip(step.losses, distributed.mean([*step.losses.values()]), strict=True))
    return Gradients(parameters, step.others, vectors, step.weights, means)


def gram_on_a_rank(layout: str) -> tuple[np.ndarray, dict[str, float], list[str]]:
    model = LAYOUTS[layout](trained_in(layout))
    with nothing_is_gathered():
        step = separated(model)
        return step.gram().numpy(), step.losses, [p.name for p in describe(model)]


def gram_of_one_process(layout: str) -> tuple[np.ndarray, dict[str, float]]:
    """Plain autograd on all of the data, and a loop."""
    model, losses = trained_in(layout), {}
    for side in SIDES:
        losses |= token_means(model, side, everything(side))
    total = sum(weight * losses[name] for name, weight in OBJECTIVE.items())
    losses = {"objective": total, **losses}
    vectors = [reference.gradient(model, loss) for loss in losses.values()]
    K = [[[reference.inner(a, b, n) for b in vectors] for a in vectors] for n in vectors[0]]
    return np.array(K), {name: loss.item() for name, loss in losses.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gram_matrices_are_those_of_one_process(layout: str) -> None:
    expected, losses = gram_of_one_process(layout)
    answers = two_ranks.run(gram_on_a_rank, layout)
    names = [p.name for p in describe(trained_in(layout))]
    for found, means, parameters in answers:
        assert_same_geometry(found, expected)
        assert means == pytest.approx(losses, rel=1e-6)
        assert parameters == names
    assert np.array_equal(answers[0][0], answers[1][0])


def micro_batches_on_a_rank() -> None:
    """A window whose first micro-batch does not synchronise, as accumulation has it."""
    model, plain = fsdp(Small()), fsdp(Small())
    rank = dist.get_rank()
    for own in (batch("forget", rank), batch("retain", rank)):
        token_means(plain, "forget", own)["forget"].backward()
    model.set_requires_gradient_sync(False)
    with distributed.gradient_sync(model):
        token_means(model, "forget", batch("forget", rank))["forget"].backward()
    assert all(p.grad is not None for p in trainable(model).values())
    kept = {name: p.grad.to_local().clone() for name, p in trainable(model).items()}
    token_means(model, "forget", batch("retain", rank))["forget"].backward()
    # The user's setting is back: this one has not been reduced.
    for name, p in trainable(model).items():
        assert torch.equal(p.grad.to_local(), kept[name])
    with (
        pytest.raises(RuntimeError, match=r"Found \d+ parameters with sums of an earlier backward"),
        distributed.gradient_sync(model),
    ):
        pytest.fail("entered")
    model.set_requires_gradient_sync(True)
    token_means(model, "forget", batch("retain", rank))["forget"].mul(0.0).backward()
    for name, p in trainable(plain).items():
        found = trainable(model)[name].grad.to_local()
        torch.testing.assert_close(found, p.grad.to_local(), rtol=1e-5, atol=1e-7)


def test_micro_batches_that_do_not_synchronise_are_reduced_or_named() -> None:
    two_ranks.run(micro_batches_on_a_rank)


def hooks_on_a_rank(layout: str) -> list[bool]:
    """Whether a hook sees what stands in `.grad` when the backward pass is over."""
    model = LAYOUTS[layout](trained_in(layout))
    seen: dict[str, Tensor] = {}

    def look(name: str, parameter: Tensor) -> None:
        seen[name] = distributed.local(parameter.grad).clone()

    for name, parameter in trainable(model).items():
        parameter.register_post_accumulate_grad_hook(partial(look, name))
    token_means(model, "forget", batch("forget", dist.get_rank()))["forget"].backward()
    final = {name: distributed.local(p.grad) for name, p in trainable(model).items()}
    return [torch.equal(seen[name], final[name]) for name in final]


def test_hooks_see_reduced_gradients_under_fsdp_and_only_there() -> None:
    assert all(all(same) for same in two_ranks.run(hooks_on_a_rank, "fsdp"))
    assert not any(any(same) for same in two_ranks.run(hooks_on_a_rank, "ddp"))


def streamed_on_a_rank() -> list[str]:
    """Where gradients that are shown one by one differ from those that are taken together."""
    model = fsdp(Small())
    parameters = list(trainable(model).values())
    shown: dict[tuple[str, int], Tensor] = {}

    def show(place: int, tensors: Mapping[str, Tensor | None]) -> None:
        shown.update(
            {
                (name, place): distributed.local(x).clone()
                for name, x in tensors.items()
                if x is not None
            }
        )

    with distributed.gradient_sync(model):
        stream(
            parameters, plan(parameters, {"objective": OBJECTIVE, **losses_of_a_rank(model)}), show
        )
    together = {
        (name, place): distributed.local(x)
        for name, vector in separated(model).vectors.items()
        for place, x in enumerate(vector[: len(parameters)])
        if x is not None
    }
    return [
        f"{name} of parameter {place}"
        for name, place in together.keys() | shown.keys()
        if not torch.equal(shown.get((name, place), torch.empty(0)), together[name, place])
    ]


def test_sharded_gradients_can_be_streamed() -> None:
    assert two_ranks.run(streamed_on_a_rank) == [[], []]
