"""geffect: what an unlearning run does to a model, layer by layer, and how to mend it.

`Recorder` writes the gradients of a training loop into a run file, `replay` those of checkpoints
that exist, and `geffect.trainers` those of a Trainer; `open_run` reads one. `edit` makes an edit of
`geffect.edits` and records what it does, `Requests` what requests to forget do one after the other.
`Rectifier` keeps unlearning steps from harming what should stay; with `relearned` their gradient is
taken where the facts are known again. Scores are in `geffect.analysis`, pictures in
`geffect.plots`, objectives in `geffect.objectives`, rules in `geffect.projection`, effects of
samples and tokens in `geffect.effects`, and which steps are captured in `geffect.capture`.
`geffect.evaluation` measures what a model knows, and `geffect.audit(unlearned, original, ...)` says
whether it forgot, or only hides it.

All of that is there after `import geffect`, and is loaded when it is first asked for.

>>> import geffect
>>> geffect.projection.gru.__name__
'gru'
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import (
        analysis,
        capture,
        edits,
        effects,
        evaluation,
        objectives,
        plots,
        projection,
        requests,
        trainers,
    )
    from .capture import Recorder, StopWhen
    from .checkpoints.edited import edit, record_edit
    from .checkpoints.plan import Probe, plan
    from .checkpoints.replay import replay
    from .costs import Estimate, estimate
    from .projection import Rectifier
    from .relearning import Relearned, relearned
    from .requests import Requests
    from .store import Run, RunFileError, open_run

    __version__: str

__all__ = [
    "Estimate",
    "Probe",
    "Recorder",
    "Rectifier",
    "Relearned",
    "Requests",
    "Run",
    "RunFileError",
    "StopWhen",
    "__version__",
    "analysis",
    "audit",
    "capture",
    "edit",
    "edits",
    "effects",
    "estimate",
    "evaluation",
    "objectives",
    "open_run",
    "plan",
    "plots",
    "projection",
    "record_edit",
    "relearned",
    "replay",
    "requests",
    "trainers",
]

# Loaded when first asked for: reading a run file needs no torch.
_HOMES = {
    "Estimate": "costs",
    "Probe": "checkpoints.plan",
    "Recorder": "capture",
    "Rectifier": "projection",
    "Relearned": "relearning",
    "Requests": "requests",
    "Run": "store",
    "RunFileError": "store",
    "StopWhen": "capture",
    "edit": "checkpoints.edited",
    "estimate": "costs",
    "open_run": "store",
    "plan": "checkpoints.plan",
    "record_edit": "checkpoints.edited",
    "relearned": "relearning",
    "replay": "checkpoints.replay",
}
_ROOMS = (
    "analysis",
    "audit",
    "capture",
    "edits",
    "effects",
    "evaluation",
    "objectives",
    "plots",
    "projection",
    "requests",
    "trainers",
)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    if name in _ROOMS:
        return import_module(f".{name}", __name__)
    if name == "__version__":
        from importlib.metadata import version

        return version("geffect")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
