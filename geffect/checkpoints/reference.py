"""The model before unlearning in a replay: which it is, and what is kept of it."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from geffect.batch import Batch, labels_of
from geffect.objectives import AdapterBase, FrozenModel, Likelihoods, Objective, Reference

from .folders import Folder, number_of
from .loading import Loader, model_of

log = logging.getLogger(__name__)

GIVEN, BASE, FIRST = "given", "the model that the adapters are for", "the first checkpoint"


@dataclass(frozen=True)
class Before:
    """The model before unlearning, and how it came to be that."""

    folder: Folder
    what: str

    @property
    def described(self) -> str:
        """What a run file says of it: its name, no path."""
        name = Path(self.folder).name
        return name if self.what == GIVEN else f"{name}, {self.what}"


def model_before(
    objective: Objective, given: Folder | None, first: Path, base: Folder | None
) -> Before | None:
    """The model that an objective asks for, if it does; `base` is the model of adapters."""
    if objective.reference == "none":
        return None
    if given is not None:
        return Before(given, GIVEN)
    if base is not None:
        return Before(base, BASE)
    if number_of(first):
        log.warning(
            "`reference` should be the model before unlearning. Found none, and `%s` is taken, "
            "which may have unlearned already. Pass it, on the command line with --reference.",
            first.name,
        )
    return Before(first, FIRST)


def reference_of(
    before: Before | None,
    objective: Objective,
    forget: Sequence[Batch],
    loader: Loader,
    new_loader: Callable[[], Loader],
) -> Reference | None:
    """What is kept of that model: what it said of the forget answers where that is enough.

    The loader holds the first checkpoint, an adapter where the model is the base of adapters.
    """
    if before is None:
        return None
    adapted = loader.adapted if before.what == BASE else None
    model: Reference
    if objective.reference == "likelihoods" and before.what == FIRST:
        model = FrozenModel(loader.load(before.folder))
    elif objective.reference == "likelihoods" and adapted is not None:
        model = AdapterBase(adapted)
    elif before.what == BASE:
        device = labels_of(forget[0]).device
        model = FrozenModel(model_of(before.folder).to(device))
    else:
        model = FrozenModel(new_loader().load(before.folder).requires_grad_(False))
    # Kept alone, likelihoods let another model than that of the checkpoints go at once.
    return Likelihoods(model, forget) if objective.reference == "likelihoods" else model
