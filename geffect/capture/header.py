"""What the rows of a run have in common: its first row fixes it, the others are held to it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from geffect.gradients import AtCopy, GradientTransform
from geffect.sources import OBJECTIVE
from geffect.store.reader import Run
from geffect.store.schema import RELEARNED

from .manifest import as_json

Declared = Mapping[str, Mapping[str, float] | str]
"""The losses of a step: weights of those that are combinations, "loss" for those that are not."""


@dataclass
class RunHeader:
    """The sources of a run, how its losses were declared, and the rectifier it ran with."""

    sources: tuple[str, ...] = ()
    declared: Declared = field(default_factory=dict)
    rectifier: Mapping[str, Any] | None = None
    objective: Mapping[str, Any] | None = None
    relearned: Mapping[str, Any] | None = None
    blocks: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    last_step: int = -1
    stored: int = 0  # rows with gradients
    mark: int = 1  # in the segments that hold those
    wall_seconds: float = 0.0

    def fix(
        self,
        sources: Iterable[str],
        declared: Declared,
        rectifier: GradientTransform | None,
        weights: Iterable[str],
    ) -> None:
        """Take over what the first row of the run has."""
        self.sources, self.declared, self.weights = tuple(sources), declared, tuple(weights)
        if rectifier is not None:
            self.rectifier = as_json(rectifier.options)
            self.blocks = rectifier.blocks

    @classmethod
    def of(cls, run: Run, stored: int) -> Self:
        """That of a run that is continued, where so many rows have gradients."""
        return cls(
            sources=run.sources,
            declared=run.manifest["losses"],
            rectifier=run.manifest["rectifier"],
            objective=run.manifest.get("objective"),
            relearned=run.manifest.get(RELEARNED),
            blocks=run.contents.blocks,
            weights=run.contents.weights,
            last_step=int(run.steps[-1]) if len(run.steps) else -1,
            stored=stored,
            mark=gradients.mark if (gradients := run.contents.gradients) else 1,
            wall_seconds=float(run.column("wall_seconds")[-1]) if len(run.steps) else 0.0,
        )

    def check_sources(self, names: Iterable[str]) -> None:
        """Refuse gradients that the first step did not have: they have no place in the file."""
        new = [name for name in names if self.sources and name not in self.sources]
        if new:
            raise ValueError(
                "The gradients of a step should be among those of the first step of the run: "
                f"{', '.join(self.sources)}. Found {', '.join(new)} as well. Name every loss, and "
                "pass the rectifier, in the first step; or record into another file."
            )

    def check_weights(self, names: Iterable[str]) -> None:
        """Refuse implicit weights that the first step did not have."""
        new = [name for name in names if self.sources and name not in self.weights]
        if new:
            raise ValueError(
                "The implicit weights of a step should be among those of the first step of the "
                f"run: {', '.join(self.weights) or 'none'}. Found {', '.join(new)} as well. Pass "
                "them in the first step, or record into another file."
            )

    @property
    def further(self) -> dict[str, Any]:
        """What the manifest says of it where there is something to say."""
        return {} if self.relearned is None else {RELEARNED: self.relearned}

    def hold(self, losses: Declared, relearned: AtCopy | None) -> Declared:
        """How the losses of a step count as declared, held to the first step of the run.

        An objective whose gradient is taken at a relearned copy is no combination of gradients at
        theta.
        """
        told = None if relearned is None else as_json(relearned.options, "relearned")
        if self.sources and told != self.relearned:
            raise ValueError(
                "`relearned` should be that of the first step of the run: "
                f"{self.relearned or 'none'}. Found {told or 'none'}. Pass the same, or record "
                "into another file."
            )
        self.relearned = told
        held = losses if told is None else {**losses, OBJECTIVE: "loss"}
        self.check_declared(held)
        return held

    def check_rectifier(self, rectifier: GradientTransform) -> None:
        """Refuse a rectifier that is set up in another way than that of the first step."""
        options = as_json(rectifier.options)
        if self.sources and (options != self.rectifier or rectifier.blocks != self.blocks):
            raise ValueError(
                f"The rectifier should be set up as in the first step of the run: "
                f"{self.rectifier} for {', '.join(self.blocks)}. Found {options} for "
                f"{', '.join(rectifier.blocks)}. Set it up the same, or record into another file."
            )

    def check_declared(self, declared: Declared) -> None:
        """Refuse a combination of losses with other weights than in the first step."""
        for name, weights in declared.items():
            first = self.declared.get(name, weights)
            if weights != first and "loss" not in (weights, first):
                raise ValueError(
                    f"The weights of loss `{name}` should stay those of the first step of the run: "
                    f"{first}. Found {weights}. Declare it the same, or record into another file."
                )
