"""The family as a subject of study: what is learned, how it is unlearned, what is measured.

Planning needs no torch. Facts are numbered as in the data, the biographies after the
relationships.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from geffect.evaluation.edu_relat import Family

from .config import EmbeddedConfig
from .corpus import Corpus, Fact

MINIMAL, NEAR, REST, LIVES = "minimal", "near", "rest", "biographies"
GROUPS = (MINIMAL, NEAR, REST, LIVES)
"""Where effects are measured: on the minimal set without the target, on facts that one rule
instance holds together with it, on a sample of the other relationships, and on one of lives."""

LOST, END = "lost", "end"
"""Where a run is looked at: the first step after which the target itself is not answered, and the
last, which is the first after which it does not follow either."""


@dataclass(frozen=True)
class FamilyConfig:
    """How the family is learned, how many targets are unlearned from it and how, and restored."""

    subject: EmbeddedConfig = field(default_factory=lambda: EmbeddedConfig(layers=4, epochs=36))
    targets: int = 20
    learning_rate: float = 8e-4
    most_steps: int = 20
    sampled: int = 40
    """Of the rest and of the biographies: all of them would take most of the time."""
    width: int = 4096  # of a sketch
    altered: int = 40
    corrupting_rate: float = 1e-3
    corrupting_epochs: int = 12
    restoring_steps: int = 16
    restoring_rate: float = 3e-4


@dataclass(frozen=True)
class Facts:
    """All facts of the family in their order, as the embedded study trains and asks them."""

    family: Family

    @cached_property
    def all(self) -> tuple[Fact, ...]:
        """Relationships, then biographies."""
        asked = (*self.family.relationships, *self.family.biographies)
        return tuple(Fact(str(one.subject), one.question, one.answer) for one in asked)

    @property
    def corpus(self) -> Corpus:
        """Everything that is memorised."""
        known = len(self.family.relationships)
        return Corpus(
            forget=(),
            retain=self.all[:known],
            retain_heldout_authors=(),
            world=self.all[known:],
            forget_paraphrases=(),
            forget_unknown=(),
        )

    def groups(
        self, target: int, minimal_set: Sequence[int], sampled: int, seed: int
    ) -> dict[str, list[int]]:
        """The facts of each of the GROUPS that has any; no fact is in two."""
        known = len(self.family.relationships)
        away = self.family.closure.distances(target)[:known]
        minimal = [fact for fact in minimal_set if fact != target]
        near = [f for f in np.flatnonzero(away == 1).tolist() if f not in minimal]
        rest = [f for f in range(known) if f != target and f not in {*minimal, *near}]
        rng = random.Random(f"{seed} {target}")
        lives = range(known, len(self.all))
        groups = {
            MINIMAL: minimal,
            NEAR: near,
            REST: sorted(rng.sample(rest, min(sampled, len(rest)))),
            LIVES: sorted(rng.sample(lives, min(sampled, len(lives)))),
        }
        return {name: facts for name, facts in groups.items() if facts}


def spread(family: Family, count: int) -> list[int]:
    """The numbers of so many targets, of every relation in turn.

    The first of each relation come before the second of any.
    """
    seen: dict[str, int] = {}
    order = []
    for index, target in enumerate(family.targets):
        seen[target.relation] = seen.get(target.relation, -1) + 1
        order.append((seen[target.relation], index))
    return sorted(index for _, index in sorted(order)[:count])


def alter(family: Family, count: int, seed: int) -> dict[int, tuple[str, str]]:
    """So many relationships with a false word for each, and a third that is neither."""
    rng = random.Random(f"{seed} altered")
    chosen = sorted(rng.sample(range(len(family.triples)), min(count, len(family.triples))))
    words = {}
    for fact in chosen:
        others = [word for word in family.relations if word != family.relationships[fact].answer]
        false, third = rng.sample(others, 2)
        words[fact] = (false, third)
    return words
