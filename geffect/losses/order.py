"""The order of the backward passes of a step, and what each loss is in terms of them."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from itertools import islice

from torch import Tensor

from geffect.sources import OBJECTIVE

from .given import Scalar, seeds_of, tensors_among


@dataclass(frozen=True)
class Order:
    """The different scalars of a step in the order of their passes, a pass each.

    First comes what training takes: the tensors that are there, then the functions of the
    objective. Then, `aside`, what is only looked at. Those of `moved`, which are functions of the
    objective, come first where there are any, at other parameters.

    - `terms`: every source as a combination of the scalars.
    - `seeds`: what a pass starts from where that is not one.
    - `scale`: that of a GradScaler, by which all gradients come out multiplied.
    """

    given: Mapping[str, Scalar]
    terms: Mapping[str, Mapping[str, float]]
    seeds: Mapping[str, float]
    aside: Collection[str]
    moved: Collection[str]
    scale: float

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The scalars that are there already."""
        return tensors_among(self.given)

    @property
    def last(self) -> str:
        """The name of the pass that runs last."""
        return list(self.given)[-1]

    @property
    def names(self) -> list[str]:
        """The scalars in the order of the sources, whenever their passes come."""
        return list(dict.fromkeys(name for terms in self.terms.values() for name in terms))

    @property
    def weights(self) -> Mapping[str, Mapping[str, float]]:
        """Every source in terms of what the passes leave, so that a combination costs no pass."""
        return {
            source: {name: weight / self.seeds.get(name, 1.0) for name, weight in terms.items()}
            for source, terms in self.terms.items()
        }

    def behind(self, name: str) -> dict[str, Scalar]:
        """The scalars whose passes come after this one, at the same parameters."""
        place = list(self.given).index(name)
        behind = islice(self.given.items(), place + 1, None)
        return {n: s for n, s in behind if (n in self.moved) == (name in self.moved)}

    def of(self, sources: Collection[str]) -> "Order":
        """The passes that some of the sources need, in the same order."""
        terms = {name: terms for name, terms in self.terms.items() if name in sources}
        needed = {name for own in terms.values() for name in own}
        given = {name: loss for name, loss in self.given.items() if name in needed}
        aside = [name for name in self.aside if name in needed]
        moved = [name for name in self.moved if name in needed]
        return replace(self, given=given, terms=terms, aside=aside, moved=moved)


def ordered(
    given: Mapping[str, Scalar],
    terms: Mapping[str, Mapping[str, float]],
    *,
    scale: float = 1.0,
    protected: Collection[str] = (),
    moved: Collection[str] = (),
) -> Order:
    """The order of scalars, and of the sources that are combinations of them.

    `protected` are sources that training takes beside its objective. What training takes does not
    depend on what is watched beside it.

    >>> import torch
    >>> tensor, function = torch.zeros(()), lambda: torch.zeros(())
    >>> given = {"retain": function, "forget": tensor, "objective": function}
    >>> order = ordered(given, {name: {name: 1.0} for name in given})
    >>> [*order.given], order.aside
    (['objective', 'forget', 'retain'], ['forget', 'retain'])
    """
    single = seeds_of(terms)
    turns = _turns(given, terms, protected, moved)
    names = sorted(given, key=turns.__getitem__)
    return Order(
        given={name: given[name] for name in names},
        terms=terms,
        seeds={n: scale * single.get(n, 1.0) for n in given} if scale != 1.0 else single,
        aside=[name for name in names if turns[name][0] == 2],
        moved=moved,
        scale=scale,
    )


def taken_elsewhere(
    given: Mapping[str, Scalar],
    terms: Mapping[str, dict[str, float]],
    stays: Collection[str],
) -> tuple[dict[str, Scalar], dict[str, dict[str, float]], list[str]]:
    """The scalars and terms where the objective's gradient is taken elsewhere, and which move.

    A scalar that a source needs beside the objective and its parts is asked twice, once at each
    place.
    """
    tensors = tensors_among(given)
    if tensors:
        raise ValueError(
            "Every loss should be a function where the gradient of the objective is taken at a "
            f"relearned copy. Found a tensor for {', '.join(f'`{name}`' for name in tensors)}, "
            "computed before the parameters move. Pass lambda: ... with the forward inside."
        )
    staying = {scalar for name in stays for scalar in terms.get(name, ())}
    of_objective = [source for source in terms if source.partition(".")[0] == OBJECTIVE]
    others = {n for source, own in terms.items() if source not in of_objective for n in own}
    # No source has a slash in its name.
    places = {
        name: f"{name}/copy" if name in others else name
        for source in of_objective
        for name in terms[source]
        if name not in staying
    }
    if not places and OBJECTIVE in terms:
        raise ValueError(
            "The objective should have a part that is taken at the relearned copy. Found "
            f"{', '.join(f'`{name}`' for name in terms[OBJECTIVE])} alone, which stays where the "
            "parameters are. Name what is to be forgotten otherwise, or leave `relearned` out."
        )
    here = {name: s for name, s in given.items() if name not in places or name in others}
    there = {place: given[name] for name, place in places.items()}
    moved = {
        source: {places.get(name, name): weight for name, weight in terms[source].items()}
        for source in of_objective
    }
    return {**here, **there}, {**terms, **moved}, [*places.values()]


def _turns(
    given: Mapping[str, Scalar],
    terms: Mapping[str, Collection[str]],
    protected: Collection[str],
    moved: Collection[str],
) -> dict[str, tuple[int, bool, bool]]:
    """What the passes are ordered by; those that are aside begin with 2."""
    of_objective = {*terms.get(OBJECTIVE, given)}
    of_protected = {part for name in protected for part in terms.get(name, ())}

    def turn(name: str) -> tuple[int, bool, bool]:
        is_there, is_other = isinstance(given[name], Tensor), name not in of_protected
        if is_there and (name in of_objective or not is_other):
            return 0, is_other, False
        of_turn = (1, name not in moved, False)
        return of_turn if name in of_objective else (2, is_other, not is_there)

    return {name: turn(name) for name in given}
