"""What a callback refuses: probes, training and runs that it could not record."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers import Trainer

from geffect import distributed
from geffect.optimizers import check_descends, unwrapped
from geffect.risk import RiskSet, as_batches, check_data, check_each
from geffect.sources import check_risks

from .loop import check_gradients_can_be_had

log = logging.getLogger(__name__)


def check_training(
    trainer: Trainer, optimizer: torch.optim.Optimizer | None, probes: Mapping[str, RiskSet]
) -> None:
    """Refuse training without gradients to see, or that climbs, and probes without labels."""
    check_gradients_can_be_had(trainer, optimizer)
    if optimizer is not None:
        check_descends(unwrapped(optimizer))
    with distributed.raise_on_all_ranks():
        check_each(probes, check_data)


def check_probes(probes: Mapping[str, RiskSet]) -> None:
    """Refuse probes that are no data."""
    check_risks("probes", probes)
    if not probes:
        raise ValueError(
            "`probes` should have at least one set of batches. Found none. Pass "
            'probes={"forget": ..., "retain": ...}.'
        )
    check_each(probes, as_batches)


def check_sources(path: Path, recorded: Sequence[str], found: Sequence[str]) -> None:
    """Refuse a step with other sources than the run that it continues, if there is one."""
    if recorded and set(recorded) != set(found):
        raise ValueError(
            "`probes`, `update` and the rectifier should stay those of the run in "
            f"`{path}`, which has the sources {', '.join(recorded)}. Found {', '.join(found)}. "
            "Pass the same, or record into another file."
        )


def check_begins(path: Path, steps: range, due: Sequence[int]) -> None:
    """Refuse a schedule without a step; tell of a run that begins in the midst of training."""
    if steps and not due:
        raise ValueError(
            "A step of this training should be one that `every` or `when` captures. Found "
            f"none from step {steps.start} to {steps[-1]}. Pass a schedule that has some "
            "of these, such as every=1."
        )
    if steps.start and distributed.is_main_process():
        log.warning(
            "`%s` has no row of an earlier step to continue: a run begins there at step %d, where "
            "training is resumed.",
            path,
            steps.start,
        )
