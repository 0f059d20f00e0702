"""The sets of an UnlearningTrainer: which it draws its batches from, and which it evaluates."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset

from geffect.batch import ORIGINAL, batches_in
from geffect.data.others import WithOthers, among_others
from geffect.data.pairs import Items, Pairing, Pairs
from geffect.objectives import Objective, answers_of, check_sides
from geffect.sources import FORGET, RETAIN


@dataclass(frozen=True)
class TrainingSets:
    """The forget set and those of retain data, or ready pairs, whose sets are only evaluated."""

    sets: Mapping[str, Items]
    pairs: Dataset[Any] | None

    @classmethod
    def of(
        cls,
        forget: Items | None,
        retain: Items | Mapping[str, Items] | None,
        pairs: Dataset[Any] | None,
    ) -> "TrainingSets":
        """From what a trainer is given. Raises ValueError where there is nothing to draw from."""
        several = retain if isinstance(retain, Mapping) else {RETAIN: retain}
        sets = {FORGET: forget, **several}
        found = {name: items for name, items in sets.items() if items is not None}
        if pairs is None and not {FORGET, RETAIN} <= found.keys():
            raise ValueError(
                "`forget` and `retain` should both be sets of items, or `train_dataset` pairs of "
                f"them. Found {', '.join(found) or 'none'}. Pass forget=..., retain=...: the risk "
                "on retain data is evaluated and protected, also where the objective does not use "
                "it."
            )
        return cls(found, pairs)

    def for_training(self, objective: Objective, seed: int) -> Dataset[Any]:
        """The pairs that an objective trains on, with the answers of other items that it takes."""
        if self.pairs is not None:
            return self.pairs
        answered = _with_answers(objective, self.sets, seed)
        _check_items(objective, answered)
        return Pairs(answered)

    def pairing(self, seed: int) -> Pairing:
        """Which of their items meet."""
        return Pairing(tuple(map(len, self.sets.values())), seed)

    def evaluated(self, further: Mapping[str, Items] | None) -> dict[str, Items]:
        """All sets that are evaluated, by their names; further ones may stand in place of others.

        Raises TypeError for what has no names.
        """
        if not isinstance(further, Mapping | None):
            raise TypeError(
                "`eval_dataset` should be sets of items by their names. Found "
                f'`{type(further).__name__}`. Pass eval_dataset={{"world": items}}.'
            )
        return {**self.sets, **(further or {})}

    def check_protected(self, names: Iterable[str]) -> None:
        """Refuse a rectifier that protects data which no batch is going to have."""
        unknown = sorted({*names} - {*self.sets}) if self.pairs is None else []
        if unknown:
            raise ValueError(
                "`protect` of the rectifier should name sets of retain data. Found "
                f"{', '.join(unknown)}, and the sets {', '.join(self.sets)}. Pass "
                f"retain={{'{RETAIN}': ..., '{unknown[0]}': ...}}."
            )


def _with_answers(objective: Objective, sets: Mapping[str, Items], seed: int) -> dict[str, Items]:
    """The sets with those answers of other items that the objective takes and they lack."""

    def answered(name: str, items: Items) -> Items:
        drawn = among_others(answers_of(objective, name))
        lacking = [answer for answer in drawn if len(items) and answer not in items[0]]
        return WithOthers(items, lacking, seed=seed) if lacking else items

    return {name: answered(name, items) for name, items in sets.items()}


def _check_items(objective: Objective, sets: Mapping[str, Items]) -> None:
    """Refuse items without a side that the objective takes, or without the original answer."""
    first = {name: items[0] for name, items in sets.items() if len(items)}
    inside = {side for side, _ in batches_in(first)}
    for name in sets:
        answers = [side for side in inside if side.startswith(f"{name}.")]
        if answers and f"{name}.{ORIGINAL}" not in answers:
            raise ValueError(
                f"Items of `{name}` with several answers should have the `{ORIGINAL}` among them, "
                f"whose risk is recorded, protected and evaluated. Found {', '.join(answers)}. "
                f'Name that answer "{ORIGINAL}".'
            )
    check_sides(objective, first, add=f"Pass retain={{{{'{RETAIN}': ..., '{{side}}': ...}}}}.")
