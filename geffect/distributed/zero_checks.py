"""What of DeepSpeed can be watched and changed, and what is said of the rest."""

from typing import Any

from torch import Tensor

from .processes import world_size

WORKS = (
    "What works: ZeRO stages 1, 2 and 3 in float32 or bfloat16, with an optimizer of torch or "
    "DeepSpeed's Adam, on the device or offloaded to the CPU; or DDP or FSDP2."
)

OPTIMIZERS = ("DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3")
ONE_BIT = ("OnebitAdam", "OnebitLamb", "ZeroOneAdam")


def check_engine(engine: Any) -> None:
    """Refuse an engine whose gradients cannot be had, or written."""
    found = _unknown(engine)
    if found is not None:
        raise ValueError(
            "A DeepSpeed engine should keep gradients that can be read and written between "
            f"backward and step. Found {found}. {WORKS}"
        )


def _unknown(engine: Any) -> str | None:
    zero = engine.optimizer
    if zero is None or not hasattr(zero, "optimizer"):
        return "one without an optimizer of ZeRO"
    if engine.zero_optimization_stage() not in (1, 2, 3):
        return f"ZeRO stage {engine.zero_optimization_stage()}"
    if getattr(engine, "pipeline_parallelism", False):
        return "a pipeline"
    if engine.fp16_enabled():
        return "float16, whose loss scale the engine keeps to itself"
    if type(zero).__name__ not in OPTIMIZERS:
        return (
            f"`{type(zero).__name__}`, as of bfloat16 at stage 1 with gradients accumulated in "
            "float32, which stage 2 does without"
        )
    if type(zero.optimizer).__name__ in ONE_BIT:
        return f"`{type(zero.optimizer).__name__}`, which exchanges signs of gradients in its step"
    if not hasattr(Tensor, "grad_dtype"):
        return "a torch before 2.10, where a gradient has the type of its parameter"
    unusual = {
        "parameters on NVMe": getattr(zero, "params_in_nvme_and_cpu", False),
        "parameters offloaded to the CPU": getattr(zero, "offload_param", False),
        "an optimizer offloaded to NVMe": getattr(zero, "swap_optimizer", False),
        "ZenFlow": getattr(engine, "zenflow", False),
        "Muon": getattr(zero, "use_muon", False),
        "experts that are parallel": getattr(engine, "has_moe_layers", False),
        "gradients that the caller accumulates": not engine.managed_gradient_accumulation(),
        "a compiled engine": engine.is_deepcompile_enabled(),
        "several parallel groups": _processes(zero) != world_size(),
    }
    return next((name for name, found in unusual.items() if found), None) or _unstepped(engine)


def _processes(zero: Any) -> int:
    import torch.distributed as dist

    return dist.get_world_size(zero.dp_process_group)


def _unstepped(engine: Any) -> str | None:
    zero = engine.optimizer
    groups = getattr(zero, "fp16_groups", None) or zero.bit16_groups
    stepped = {id(parameter) for group in groups for parameter in group}
    trained = [(n, p) for n, p in engine.module.named_parameters() if p.requires_grad]
    names = [name for name, parameter in trained if id(parameter) not in stepped]
    if not names:
        return None
    return (
        f"{len(names)} parameters that require a gradient and that its optimizer does not step, "
        f"such as `{names[0]}`"
    )
