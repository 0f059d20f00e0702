"""DeepSpeed engines on the CPU, and the same training under DDP."""

import logging
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from geffect import distributed
from tests.utils.layouts import Small, labelled, without_reduction
from tests.utils.shares import SIDES, batch

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.1),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
}

SETTINGS: dict[str, dict[str, Any]] = {
    "stage 1": {"stage": 1},
    "stage 1, offload": {"stage": 1, "offload_optimizer": {"device": "cpu"}},
    "stage 2": {"stage": 2},
    "stage 2, offload": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "stage 3": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "stage 3, persistent": {"stage": 3, "sub_group_size": 100},
    "stage 3, offload": {"stage": 3, "offload_optimizer": {"device": "cpu"}},
}


def loaded() -> Any:
    """DeepSpeed, on the CPU."""
    os.environ |= {
        "LOCAL_RANK": str(dist.get_rank()),
        "LOCAL_SIZE": str(dist.get_world_size()),  # or a program is asked for it, many times
    }
    os.environ.pop("ACCELERATE_USE_CPU", None)  # with which a Trainer takes DDP in place of it
    import deepspeed

    deepspeed.logger.setLevel(logging.ERROR)
    deepspeed.utils.nvtx.enable_nvtx = False  # every call is announced to a profiler otherwise
    # It would be compiled at first use.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed("gloo", verbose=False)
    return deepspeed


def engine(
    setting: str,
    optimizer: str = "sgd",
    *,
    model: nn.Module | None = None,
    micro_batches: int = 1,
    clip: float = 0.0,
    half: bool = False,
    **options: Any,
) -> Any:
    """An engine of a small model in float32, or in bfloat16."""
    deepspeed = loaded()
    model = Small() if model is None else model
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": clip,
        "zero_optimization": {**SETTINGS[setting], **options},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": half},
        "steps_per_print": None,
    }
    made, *_ = deepspeed.initialize(
        model=model, optimizer=OPTIMIZERS[optimizer](groups(model)), config=config
    )
    return made


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two of them: matrices, and what does not decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() > 1]},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]


def risks(model: nn.Module, step: int, sides: Iterable[str] = SIDES) -> dict[str, Tensor]:
    """The risks of what a process has of a step, each of a forward of its own."""
    found = {}
    for side in sides:
        own = batch(side, dist.get_rank())
        ids, labels = (own[key].roll(step, dims=0) for key in ("input_ids", "labels"))
        with without_reduction(model):
            logits = model(ids)[:, :-1].flatten(0, 1).float()
        mean = nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
        found[side] = mean * distributed.token_share(labelled(own))
    return found


def whole_parameters(model: Any) -> list[Tensor]:
    """Those that are trained, as the model computes with them and, in an engine, as it steps them.

    The second are compared with the first here.
    """
    if not hasattr(model, "zero_optimization_stage"):
        return [p.detach().clone() for p in model.parameters() if p.requires_grad]
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    stepped = []
    for parameter in (p for p in model.parameters() if p.requires_grad):
        master = safe_get_full_fp32_param(parameter)
        with deepspeed.zero.GatheredParameters([parameter]):
            torch.testing.assert_close(parameter.data, master.to(parameter.dtype), rtol=0, atol=0)
        stepped.append(master.clone())
    return stepped
