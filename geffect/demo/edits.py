"""The edits that a study compares with training: how strong each may be, and what it is made from.

What needs torch is imported where it is used: planning a study is done without.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

EDIT = "edit"
"""The variant of a row that is of an edit."""

DISRUPTION = 0.05
"""Nats per token of KL on retain answers: where edits are compared by what they disrupt."""


@dataclass(frozen=True)
class Lesson:
    """What another model is trained on from the one that is edited, and for how many steps.

    `objective` is as `geffect.objectives.as_objective` takes it. `masked`: only coordinates with a
    large gradient are trained, by SSU's mask.
    """

    objective: str | Mapping[str, float]
    steps: int
    masked: bool = False


@dataclass(frozen=True)
class StudiedEdit:
    """An edit of the catalogue, and the option that is its strength.

    - `between`: the least and the largest strength that are tried.
    - `state`, `lesson`: the name of the other model that it is made from, and what that learned.
    - `swapped`: the edit is of the other model, and the one of the study is its state.
    """

    summary: str
    edit: str
    strength: str
    between: tuple[float, float]
    options: Mapping[str, Any] = field(default_factory=dict)
    state: str = ""
    lesson: Lesson | None = None
    swapped: bool = False

    def described(self) -> dict[str, Any]:
        """What summary.json says of it."""
        return {
            "summary": self.summary,
            "edit": self.edit,
            "strength": self.strength,
            "options": dict(self.options),
        }


def _negation(summary: str, lesson: Lesson) -> StudiedEdit:
    return StudiedEdit(
        f"away from where {summary} leads", "negation", "alpha", (0.05, 200.0),
        state="tuned", lesson=lesson,
    )  # fmt: skip


EDITS: dict[str, StudiedEdit] = {
    "ssd": StudiedEdit(
        "the fraction of all numbers that matters most for the forget data alone is dampened",
        "ssd", "fraction", (1e-5, 0.5), {"dampening": 0.1},
    ),
    "lfssd": StudiedEdit(
        "the same without labels", "lfssd", "fraction", (1e-5, 0.5), {"dampening": 0.1},
    ),
    "negation": _negation("training on the forget data", Lesson({"forget": 1.0}, 20)),
    "negation-sku": _negation("SKU's learning step", Lesson("sku", 20)),
    "negation-ssu": _negation(
        "SSU's learning step, on the coordinates of its mask,",
        Lesson("ssu-acquire", 20, masked=True),
    ),
    "mix": StudiedEdit(
        "between the model before and that after 30 steps of GA", "mix", "alpha", (0.01, 1.0),
        state="before", lesson=Lesson("ga", 30), swapped=True,
    ),
    "repselect": StudiedEdit(
        "one step along the forget gradient of the MLPs, its own top directions made small",
        "repselect", "length", (0.05, 50.0), {"k": 12},
    ),
    "repselect-retain": StudiedEdit(
        "one step along the forget gradient of the MLPs, without the top directions of the retain "
        "gradient",
        "repselect", "length", (0.05, 50.0), {"k": 32, "basis": "retain", "strength": "hard"},
    ),
    "newton": StudiedEdit(
        "a part, or a multiple, of Newton's step to a minimum of the retain loss",
        "newton", "length", (0.1, 1e6), {"damping": 2.0, "scale": 20.0, "steps": 30},
    ),
}  # fmt: skip
"""By name: edits of the catalogue whose strength is known, some of them several times."""
