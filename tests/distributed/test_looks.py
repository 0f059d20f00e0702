"""Looks at a model in two processes: where they run forwards together, all look if one has to."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from geffect.objectives import RMU
from geffect.risk import nll
from tests.utils import reductions, two_ranks
from tests.utils.architectures import batch_for, made
from tests.utils.layouts import ddp

NEEDED = "look_at"  # whether one of them needs a look: one question a forward
SEEN = ["_change"] * 3  # what changes, what rounding may, and what comes too late


def packed(rank: int) -> dict[str, Tensor]:
    """The first process has two texts in a row, the second one a text a row."""
    batch = batch_for("llama", seed=rank, rows=2)
    if rank:
        return batch
    rows = {name: x.view(1, -1) for name, x in batch.items() if name != "attention_mask"}
    return {**rows, "position_ids": torch.arange(6).repeat(1, 2)}


def sharded(model: nn.Module) -> Any:
    """With layers of their own, which are put together again in each forward."""
    for module in model.modules():
        if type(module).__name__.endswith("DecoderLayer"):
            fully_shard(module)
    return fully_shard(model)


LAYOUTS = {"ddp": ddp, "fsdp": sharded}


def losses_on_a_rank(layout: str) -> tuple[list[list[float]], list[list[str]]]:
    """Two losses of each kind, here and on one process; and what was asked for each."""
    own, found, asked = packed(dist.get_rank()), [], []
    model, whole = LAYOUTS[layout](made("llama")), made("llama")
    objective = RMU(layer=1)
    for loss in (nll, lambda m, b: objective.begin(whole)(m, {"forget": b})):
        for _ in range(2):
            with reductions.named() as names:
                found.append([loss(model, own).item(), loss(whole, own).item()])
            asked.append(names)
    return found, asked


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("fsdp", [[NEEDED, *SEEN, *SEEN], [NEEDED], [NEEDED], [NEEDED]]),
        ("ddp", [[]] * 4),
    ],
)
def test_rows_that_are_packed_on_one_process_alone_leave_none_waiting(
    layout: str, expected: list[list[str]]
) -> None:
    for found, asked in two_ranks.run(losses_on_a_rank, layout):
        for own, alone in found:
            assert own == pytest.approx(alone, rel=1e-5)
        assert asked == expected


def refusal_on_a_rank(layout: str) -> str:
    try:
        nll(LAYOUTS[layout](made("opt")), packed(dist.get_rank()))
    except ValueError as error:
        return str(error)
    return ""


def test_a_model_that_joins_texts_is_refused_on_all_processes_together() -> None:
    says = "`FSDPOPTForCausalLM` should keep the texts of a packed row apart."
    assert all(found.startswith(says) for found in two_ranks.run(refusal_on_a_rank, "fsdp"))
    first, second = two_ranks.run(refusal_on_a_rank, "ddp")
    assert first.startswith(says.replace("FSDP", "")) and not second


def unproved_on_a_rank() -> list[list[str]]:
    """What is asked for a head of zeros, which shows nothing, and for one that has learned."""
    model = made("llama")
    head = model.lm_head.weight.data.clone()
    model.lm_head.weight.data.zero_()
    model, asked = sharded(model), []
    for _ in range(3):
        with reductions.named() as names:
            nll(model, batch_for("llama", seed=dist.get_rank()))
        asked.append(names)
        if len(asked) == 1:
            model.reshard()
            own = model.lm_head.weight.to_local().data
            own.copy_(head.chunk(dist.get_world_size())[dist.get_rank()])
    return asked


def test_a_head_of_zeros_is_looked_at_again() -> None:
    for asked in two_ranks.run(unproved_on_a_rank):
        assert asked == [[NEEDED, *SEEN], [NEEDED, *SEEN], [NEEDED]]
