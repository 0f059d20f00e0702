"""The work of a study of the family: learn it, unlearn a target, take gradients, restore."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from geffect.evaluation.edu_relat import read

from .family import Facts, FamilyConfig
from .jobs import learn
from .workers import Say


@dataclass(frozen=True)
class FamilyJob:
    """What every job has: where the study is, where its data are, and how it is done."""

    out: Path = field(repr=False)
    data: Path = field(repr=False)
    seed: int
    config: FamilyConfig

    @property
    def facts(self) -> Facts:
        """The facts of the family."""
        return Facts(read(self.data))

    @property
    def model_folder(self) -> Path:
        """Where the model that has learned the family lies."""
        return self.out / "models" / f"family-seed{self.seed}"

    def known(self) -> Any:
        """What the learned model knows, to be asked."""
        from transformers.utils.logging import disable_progress_bar

        from .deep import Known

        disable_progress_bar()
        return Known(self.facts, self.config.subject.load(self.model_folder)[1])

    def model(self) -> Any:
        """The learned model, anew."""
        return self.config.subject.load(self.model_folder)[0]


@dataclass(frozen=True)
class Learning(FamilyJob):
    """Make a model learn the family by heart."""

    stage: str = "train"
    weight: float = 10.0

    @property
    def name(self) -> str:
        return f"family-seed{self.seed}"

    def run(self, say: Say) -> dict[str, Any]:
        facts, subject = self.facts, self.config.subject
        learn(subject, self.model_folder, facts.corpus, facts.all, self.seed, say)
        right = self.known().right(self.model(), range(len(facts.all)))
        split = len(facts.family.relationships)
        return {
            "relationships": sum(right[:split]) / split,
            "biographies": sum(right[split:]) / len(right[split:]),
        }


@dataclass(frozen=True)
class Forgetting(FamilyJob):
    """Unlearn one target."""

    target: int
    stage: str = "unlearn"
    weight: float = 1.0

    @property
    def name(self) -> str:
        return f"target{self.target}-seed{self.seed}"

    def run(self, say: Say) -> dict[str, Any]:
        from .deep import unlearn_deeply

        known = self.known()
        target = known.facts.family.targets[self.target]
        path = self.out / "runs" / f"{self.name}.h5"
        return unlearn_deeply(self.model, known, target, self.config, self.seed, path, say)


@dataclass(frozen=True)
class Relating(FamilyJob):
    """Cosines of the gradients of all relationships, by how far rules are between them."""

    stage: str = "unlearn"
    weight: float = 2.0

    @property
    def name(self) -> str:
        return f"cosines-seed{self.seed}"

    def run(self, say: Say) -> dict[str, Any]:
        import numpy as np

        from .deep import by_distance, fact_sketches

        known = self.known()
        sketches = fact_sketches(self.model(), known, self.config.width, say)
        angles, apart = by_distance(known, sketches)
        rows = [
            {
                "distance": int(distance),
                "pairs": int((apart == distance).sum()),
                "cosine": float(angles[apart == distance].mean()),
            }
            for distance in np.unique(apart)
        ]
        return {"rows": rows, **self._certain(known, sketches)}

    def _certain(self, known: Any, sketches: Any) -> dict[str, float]:
        """Spearman's correlation, with an interval over people's facts that are drawn anew."""
        import numpy as np

        from geffect.correlation import correlation, ranks
        from geffect.sketch import cosine

        closure, count = known.facts.family.closure, len(sketches)
        away = np.stack([closure.distances(fact)[:count] for fact in range(count)])
        angles, rng = cosine(sketches, sketches), np.random.default_rng(self.seed)

        def of(chosen: Any) -> float:
            first, second = (chosen[i] for i in np.triu_indices(len(chosen), 1))
            apart, angle = away[first, second], angles[first, second]
            there = (first != second) & np.isfinite(apart) & np.isfinite(angle)
            return correlation(ranks(angle[there]), ranks(apart[there])).r

        drawn = [of(rng.integers(count, size=count)) for _ in range(200)]
        known_ones = [r for r in drawn if np.isfinite(r)] or [np.nan]
        low, high = np.quantile(known_ones, [0.025, 0.975])
        return {"r": of(np.arange(count)), "low": float(low), "high": float(high)}


@dataclass(frozen=True)
class Restoring(FamilyJob):
    """Corrupt the family, and unlearn what is false by one method."""

    method: str
    stage: str = "unlearn"
    weight: float = 2.0

    @property
    def name(self) -> str:
        return f"restore-{self.method}-seed{self.seed}"

    def run(self, say: Say) -> dict[str, Any]:
        from .restore import restore

        path = self.out / "runs" / f"{self.name}.h5"
        return restore(self.model(), self.known(), self.method, self.config, self.seed, path, say)
