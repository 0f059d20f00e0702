"""The sets that an UnlearningTrainer draws its batches from."""

from collections.abc import Mapping

from geffect.batch import ORIGINAL, batches_in
from geffect.data.others import WithOthers, among_others
from geffect.data.pairs import Items
from geffect.objectives import Objective, answers_of, check_sides
from geffect.sources import FORGET, RETAIN


def training_sets(
    forget: Items | None, retain: Items | Mapping[str, Items] | None, *, given: bool
) -> dict[str, Items]:
    """The sets that training draws from, or that belong to the pairs which are given."""
    several = retain if isinstance(retain, Mapping) else {RETAIN: retain}
    sets = {FORGET: forget, **several}
    found = {name: items for name, items in sets.items() if items is not None}
    if not given and not {FORGET, RETAIN} <= found.keys():
        raise ValueError(
            "`forget` and `retain` should both be sets of items, or `train_dataset` pairs of them. "
            f"Found {', '.join(found) or 'none'}. Pass forget=..., retain=...: the risk on retain "
            "data is evaluated and protected, also where the objective does not use it."
        )
    return found


def with_answers(objective: Objective, sets: Mapping[str, Items], seed: int) -> dict[str, Items]:
    """The sets with those answers of other items that the objective takes and they lack."""

    def answered(name: str, items: Items) -> Items:
        drawn = among_others(answers_of(objective, name))
        lacking = [answer for answer in drawn if len(items) and answer not in items[0]]
        return WithOthers(items, lacking, seed=seed) if lacking else items

    return {name: answered(name, items) for name, items in sets.items()}


def check_items(objective: Objective, sets: Mapping[str, Items]) -> None:
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
