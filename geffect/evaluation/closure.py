"""What follows from facts by Horn rules: the deductive closure, and every way to each triple."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Triple = tuple[int, str, int]
"""Subject, relation, object: `(0, "father", 1)` says that 1 is the father of 0."""

Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Rule:
    """A Horn rule: where all triples of the body hold, the head holds.

    Body and head are triples over variables, which are numbers too.
    """

    body: tuple[Triple, ...]
    head: Triple

    def __post_init__(self) -> None:
        bound = {variable for first, _, second in self.body for variable in (first, second)}
        if not {self.head[0], self.head[2]} <= bound:
            raise ValueError(
                "The variables of the head should stand in the body of a rule. Found the head "
                f"{self.head} and the body {self.body}. Bind each variable of the head."
            )


@dataclass(frozen=True, eq=False)
class Closure:
    """All triples that follow from some facts, and all rule instances among them.

    The first `facts` of the `triples` are the facts themselves, in their order. Instance i says
    that the triple `head[i]` follows from the triples `body[i]` by the rule `rule[i]`.
    """

    triples: tuple[Triple, ...]
    facts: int
    rule: NDArray[np.int64]
    head: NDArray[np.int64]
    body: NDArray[np.int64]  # [instance, atom]; a shorter body repeats its last triple

    def deduced(self, known: Flags) -> Flags:
        """Which triples, `Bool[triple]`, follow from those of the facts that are `known`.

        >>> rules = [Rule(((0, "wife", 1),), (1, "husband", 0))]
        >>> closure = close([(3, "wife", 4)], rules, lambda triple: True)
        >>> closure.triples, closure.deduced(np.array([True])).tolist()
        (((3, 'wife', 4), (4, 'husband', 3)), [True, True])
        """
        holds = np.zeros(len(self.triples), dtype=bool)
        holds[: self.facts] = known
        while True:
            fired = self.head[np.logical_and.reduce(holds[self.body.T])]
            if holds[fired].all():
                return holds
            holds[fired] = True

    def without(self, deleted: Sequence[int] | NDArray[np.int64]) -> Flags:
        """Which facts are left, `Bool[fact]`, where those at the indices `deleted` are gone."""
        known = np.ones(self.facts, dtype=bool)
        known[np.asarray(deleted, dtype=np.int64)] = False
        return known

    def distances(self, triple: int) -> NDArray[np.float64]:
        """How many rule instances lie between a triple and each, `Float64[triple]`; inf if none do.

        Two triples are one instance apart where one instance holds both, as its head or in its
        body.
        """
        members = np.column_stack([self.head, self.body])
        far = np.full(len(self.triples), np.inf)
        far[triple], reached = 0, 0
        while True:
            touched = members[(far[members] <= reached).any(1)]
            news = np.unique(touched[np.isinf(far[touched])])
            if not len(news):
                return far
            reached += 1
            far[news] = reached


def close(
    facts: Sequence[Triple], rules: Sequence[Rule], allowed: Callable[[Triple], bool]
) -> Closure:
    """The deductive closure of the facts. A head that is not `allowed` never follows."""
    triples = list(dict.fromkeys(facts))
    if len(triples) < len(facts):
        raise ValueError(
            "`facts` should hold each triple once. Found "
            f"{len(facts) - len(triples)} that are repeated. Leave out the repetitions."
        )
    while True:
        found = list(_instances(triples, rules, allowed))
        news = dict.fromkeys(head for _, head, _ in found).keys() - set(triples)
        if not news:
            break
        triples += [head for head in dict.fromkeys(head for _, head, _ in found) if head in news]
    number = {triple: index for index, triple in enumerate(triples)}
    width = max((len(rule.body) for rule in rules), default=1)
    bodies = [[number[t] for t in (*body, *[body[-1]] * (width - len(body)))] for *_, body in found]
    return Closure(
        triples=tuple(triples),
        facts=len(facts),
        rule=np.array([rule for rule, *_ in found], dtype=np.int64),
        head=np.array([number[head] for _, head, _ in found], dtype=np.int64),
        body=np.array(bodies, dtype=np.int64).reshape(-1, width),
    )


_Instance = tuple[int, Triple, tuple[Triple, ...]]
_Bound = Mapping[int, int]


def _instances(
    triples: Sequence[Triple], rules: Sequence[Rule], allowed: Callable[[Triple], bool]
) -> Iterator[_Instance]:
    """Each instance once: the number of its rule, its head, its body."""
    at: dict[tuple[str, int | None, int | None], list[Triple]] = defaultdict(list)
    for triple in triples:
        subject, relation, other = triple
        for key in ((subject, None), (None, other), (None, None), (subject, other)):
            at[relation, *key].append(triple)

    def matches(body: Sequence[Triple], bound: _Bound) -> Iterator[tuple[_Bound, list[Triple]]]:
        if not body:
            yield bound, []
            return
        (first, relation, second), *rest = body
        for triple in at[relation, bound.get(first), bound.get(second)]:
            if first != second or triple[0] == triple[2]:
                for whole, further in matches(rest, {**bound, first: triple[0], second: triple[2]}):
                    yield whole, [triple, *further]

    for index, rule in enumerate(rules):
        first, relation, second = rule.head
        found = dict.fromkeys(
            ((bound[first], relation, bound[second]), tuple(body))
            for bound, body in matches(rule.body, {})
        )
        yield from ((index, head, body) for head, body in found if allowed(head))
