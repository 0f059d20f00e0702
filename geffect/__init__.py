"""geffect: what an unlearning run does to a model, layer by layer, and how to mend it.

`Recorder` writes the gradients of a training loop into a run file, `replay` those of checkpoints
that exist, and `geffect.trainers` those of a Trainer; `open_run` reads one. `Rectifier` keeps
unlearning steps from harming what should stay. Scores are in `geffect.analysis`, pictures in
`geffect.plots`, objectives in `geffect.objectives`, rules in `geffect.projection`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .capture import Recorder
    from .checkpoints.replay import replay
    from .projection import Rectifier
    from .store import Run, RunFileError, open_run

__all__ = ["Recorder", "Rectifier", "Run", "RunFileError", "open_run", "replay"]

# Loaded when first asked for: reading a run file needs no torch.
_HOMES = {
    "Recorder": "capture",
    "Rectifier": "projection",
    "Run": "store",
    "RunFileError": "store",
    "open_run": "store",
    "replay": "checkpoints.replay",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
