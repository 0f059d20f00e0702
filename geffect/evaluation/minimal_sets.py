"""Minimal deep unlearning sets: the fewest facts without which a target no longer follows."""

from collections.abc import Iterable, Sequence

import numpy as np

from .closure import Closure


def minimal_sets(closure: Closure, target: int, seeds: Iterable[int]) -> list[tuple[int, ...]]:
    """Sets of facts of which `find` finds one with each seed, each set once, in order.

    A sample, not an enumeration: a target may have more of them than seeds can find.
    """
    return sorted({find(closure, target, seed) for seed in seeds})


def find(closure: Closure, target: int, seed: int) -> tuple[int, ...]:
    """A minimal set of facts, as sorted indices, after whose deletion the target does not follow.

    From the target downwards: of every rule instance that yields a deleted triple, one triple of
    the body, drawn at random, is deleted too. Of the facts among these each is put back, in random
    order, unless the target then follows (arXiv 2410.15153, algorithm 1).

    >>> from .closure import Rule, close
    >>> rules = [Rule(((0, "wife", 1),), (1, "husband", 0))]
    >>> find(close([(3, "wife", 4), (4, "husband", 3)], rules, lambda t: True), target=1, seed=0)
    (0, 1)
    """
    _check_fact(closure, target)
    rng = np.random.default_rng(seed)
    deleted = {target}
    waiting = [target]
    while waiting:
        for body in closure.body[closure.head == waiting.pop()]:
            if deleted.isdisjoint(body.tolist()):
                chosen = int(rng.choice(np.unique(body)))
                deleted.add(chosen)
                waiting.append(chosen)
    kept = {triple for triple in deleted if triple < closure.facts}
    for fact in rng.permutation(sorted(kept)).tolist():
        if not follows(closure, target, kept - {fact}):
            kept.remove(fact)
    return tuple(sorted(kept))


def follows(closure: Closure, target: int, deleted: Iterable[int]) -> bool:
    """Whether the target is among the facts that are not deleted, or follows from them."""
    return bool(closure.deduced(closure.without(list(deleted)))[target])


def is_minimal(closure: Closure, target: int, deleted: Sequence[int]) -> bool:
    """Whether deleting these facts unlearns the target, and deleting all but any one does not."""
    return not follows(closure, target, deleted) and all(
        follows(closure, target, {*deleted} - {fact}) for fact in deleted
    )


def _check_fact(closure: Closure, target: int) -> None:
    if not 0 <= target < closure.facts:
        raise ValueError(
            f"`target` should be the index of a fact, from 0 to {closure.facts - 1}. "
            f"Found `target = {target}`. Choose one of the facts."
        )
