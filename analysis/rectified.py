"""What the rectifier of a run constrains, and which gradients are from before it, or elsewhere."""

from dataclasses import replace

from geffect.groups import By, label_of
from geffect.scores import LEVEL, Score
from geffect.sources import AVERAGE, OBJECTIVE, RECTIFIED
from geffect.store import Run
from geffect.store.schema import RELEARNED

from .base import column_of

COORDINATE = "coordinate"


def acts(run: Run) -> bool:
    """Whether a rectifier changed steps of the run; one that only watched did not."""
    told = run.manifest.get("rectifier") or {}
    changes = told.get("rule", "unknown") is not None or told.get("select") is not None
    return RECTIFIED in run.sources or (bool(run.contents.blocks) and changes)


def named(run: Run, source: str) -> str:
    """The source in words: the objective's gradient is the one before rectification.

    It says too where that was taken at a relearned copy.
    """
    before = acts(run) and source.partition(".")[0] == OBJECTIVE
    said = f"{source} before rectification" if before else source
    return f"{said}, at a relearned copy" if is_at_copy(run, source) else said


def is_at_copy(run: Run, source: str) -> bool:
    """Whether a gradient was taken at a relearned copy: that of the objective, or a part of it."""
    told = run.manifest.get(RELEARNED)
    of_objective = source.partition(".")[0] == OBJECTIVE
    return isinstance(told, dict) and of_objective and source not in (told.get("stays") or ())


def at_copy(run: Run, source: str, score: Score) -> Score:
    """The score, labelled where it is of an objective that was taken at a relearned copy."""
    copied = is_at_copy(run, OBJECTIVE if source == RECTIFIED else source)
    return (
        replace(score, label=f"{score.label}, objective at a relearned copy") if copied else score
    )


def protected(run: Run) -> list[str]:
    """The retain sets whose averages a rectifier protects, or watches."""
    return [name.removesuffix(AVERAGE) for name in run.sources if name.endswith(AVERAGE)]


def constrained(run: Run) -> str | None:
    """Each of what has a constraint of its own, such as "layer" or "coordinate"; None for nothing.

    A selection alone constrains nothing, and neither does a rectifier that only watches.
    """
    told = run.manifest.get("rectifier") or {}
    if not run.contents.blocks or told.get("rule", "unknown") is None:
        return None
    scope: str | None = told.get("scope")
    return scope or own_level(run)


def own_level(run: Run) -> str | None:
    """The blocks that the numbers of the rectifier are of; None where they are others than ours."""
    sets = protected(run)
    # Against several sets a block has a number for each: "layer 0, world".
    ends = [f", {name}" for name in sets] if len(sets) > 1 else [""]
    for level in ("model", "group", "layer", "parameter"):
        labels = {*map(label_of(level), run.layers)}
        if {*run.contents.blocks} == {label + end for label in labels for end in ends}:
            return level
    return None


def default_by(run: Run, otherwise: By) -> By:
    """The level at which the rectifier of the run constrains; else what is said.

    Of coordinates a run has no inner products: parameters are the finest that it has.
    """
    level = constrained(run)
    return "parameter" if level == COORDINATE else level or otherwise


def level_told(run: Run, by: By) -> dict[str, str]:
    """The column that says that the rectifier constrains others than these blocks; else none."""
    level = constrained(run)
    if level is None or level == by:
        return {}
    blocks, kept = (_each(name) for name in (column_of(by), level))
    finest = level == COORDINATE and by == "parameter"
    instead = f"; {blocks} is the finest of a run file" if finest else f", not {blocks}"
    return {LEVEL: f"the rectifier constrains {kept}{instead}"}


def _each(level: str) -> str:
    return "the model" if level == "model" else f"each {level}"
