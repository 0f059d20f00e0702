"""What is said of a step, by the Gram matrices of its direction and of the retain averages."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from geffect.gradients import Rectification
from geffect.gram import norm

from .blocks import Blocks, block_names
from .masks import Masks


def reported(
    blocks: Blocks,
    sets: Sequence[str],
    before: Tensor,
    *,
    inner_after: Tensor,
    norm_after: Tensor,
    coefficient: Tensor,
    fired: Tensor,
    unmet: Tensor,
) -> Rectification:
    """The report of a step, with a number for each block and retain set."""
    count = len(sets)

    def numbers(table: Tensor) -> tuple[float, ...]:
        return tuple(table.double().expand(len(blocks.names), count).flatten().tolist())

    unknown = numbers(torch.tensor(torch.nan))
    return Rectification(
        blocks=block_names(blocks, sets),
        fired=numbers(fired[:, None]),
        coefficient=numbers(coefficient),
        inner_before=numbers(before[:, 0, 1:]),
        inner_after=numbers(inner_after),
        norm_before=numbers(norm(before, 0)[:, None]),
        norm_after=numbers(norm_after[:, None]),
        retain_norm=numbers(before.diagonal(dim1=1, dim2=2)[:, 1:] ** 0.5),
        applied_average=unknown,
        applied_fresh=unknown,
        unmet=numbers(unmet[:, None]),
        among=unknown,
        selected=unknown,
        selected_again=unknown,
        selected_either=unknown,
    )


def skipped(blocks: tuple[str, ...]) -> Rectification:
    """The report of a step that was left alone because a gradient was zero or not finite."""
    nothing, unknown = (0.0,) * len(blocks), (float("nan"),) * len(blocks)
    return Rectification(blocks, nothing, nothing, *[unknown] * 12)


def with_masks(report: Rectification, masks: Masks, sets: int) -> Rectification:
    """The report with what masks keep of each block, the same for each retain set."""
    among, selected, again, either = (
        tuple(number for number in numbers for _ in range(sets))
        for numbers in masks.counts().values()
    )
    return replace(
        report, among=among, selected=selected, selected_again=again, selected_either=either
    )


def without_retain(report: Rectification) -> Rectification:
    """The report of a step that had no retain gradient: what was changed, and nothing beside it."""
    unknown = (float("nan"),) * len(report.blocks)
    return replace(report, inner_before=unknown, inner_after=unknown, retain_norm=unknown)
