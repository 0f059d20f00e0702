"""The embedded study: train, unlearn in every method and variant, compare at equal forgetting."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .findings import as_markdown, equal_forgetting, findings
from .jobs import KINDS, Drawing, Training, Unlearning
from .methods import METHODS, VARIANTS
from .recipe import ALPHA, BETA, EMA, FORGET_BATCH, FULL, MOST_STEPS, QUICK, RETAIN_BATCH, Recipe
from .workers import Report, working

FORMAT = 1
EVERYWHERE = ("plain", "gru", "gru-update")
IN_EVERY_VARIANT = ("ga", "npo")
QUICK_METHODS = ("ga",)


@dataclass(frozen=True)
class Plan:
    """What a study runs."""

    seeds: Sequence[int] = (0,)
    methods: Sequence[str] = ()  # none named: all, or QUICK_METHODS of a quick study
    all_variants: bool = False
    quick: bool = False
    workers: int = 2

    def __post_init__(self) -> None:
        if not self.methods:
            object.__setattr__(self, "methods", QUICK_METHODS if self.quick else tuple(METHODS))
        unknown = [method for method in self.methods if method not in METHODS]
        if unknown:
            raise ValueError(
                f"`methods` should be some of {', '.join(METHODS)}. "
                f"Found {', '.join(unknown)}. Choose from those."
            )
        repeated = len(set(self.seeds)) < len(self.seeds) or len(set(self.methods)) < len(
            self.methods
        )
        if repeated or not self.seeds or self.workers < 1:
            raise ValueError(
                "A study should have seeds and methods that are all different, and a worker. Found "
                f"seeds {tuple(self.seeds)}, methods {tuple(self.methods)}, {self.workers} "
                "workers. Pass, say, seeds=(0, 1) and workers=2."
            )

    @property
    def recipe(self) -> Recipe:
        """Corpus, model and training."""
        return QUICK if self.quick else FULL

    @property
    def weight(self) -> float:
        """How much work the plan is, in plain unlearning runs."""
        durations = [VARIANTS[v].duration for m in self.methods for v in self.variants(m)]
        return len(self.seeds) * (len(KINDS) * Training.weight + sum(durations))

    def variants(self, method: str) -> list[str]:
        """The variants in which a method is run."""
        every = self.all_variants or method in IN_EVERY_VARIANT
        return list(VARIANTS) if every else list(EVERYWHERE)


def run_study(out: Path, plan: Plan, report: Report) -> dict[str, Any]:
    """Run the plan and leave run files, models, figures, summary and table in `out`.

    The same seed gives the same numbers. Returns what summary.json holds.
    """
    clock = _Clock()
    for folder in ("runs", "models", "figures"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    with working(plan.workers, report) as run:
        with clock.stage("train"):
            training = [
                Training(out, seed, kind, plan.recipe) for seed in plan.seeds for kind in KINDS
            ]
            trained: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}
            for job, measured in zip(training, run(training), strict=True):
                trained[job.kind][str(job.seed)] = measured
        with clock.stage("unlearn"):
            runs = run(
                [
                    Unlearning(
                        out,
                        seed,
                        method,
                        variant,
                        trained["gold"][str(seed)]["forget_nll"],
                        plan.recipe,
                    )
                    for seed in plan.seeds
                    for method in plan.methods
                    for variant in plan.variants(method)
                ]
            )
        summary = {
            "format": FORMAT,
            "versions": {p: version(p) for p in ("geffect", "torch", "transformers", "tokenizers")},
            "seeds": list(plan.seeds),
            "config": _config(plan),
            "wall_seconds": {},
            **trained,
            "runs": runs,
            "findings": findings(runs),
        }
        with clock.stage("figures"):
            from . import figures

            run([Drawing(out, name, summary) for name in figures.names(summary, out)])
    table = equal_forgetting(summary)
    table.to_csv(out / "equal_forgetting.csv", index=False)
    (out / "equal_forgetting.md").write_text(as_markdown(table), encoding="utf-8")
    summary["wall_seconds"] = {"total": clock.total(), "stages": clock.stages}
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return summary


def _config(plan: Plan) -> dict[str, Any]:
    return {
        "quick": plan.quick,
        "recipe": asdict(plan.recipe),
        "ema": EMA,
        "npo_beta": BETA,
        "wga_alpha": ALPHA,
        "optimizer": "AdamW, betas (0.9, 0.999), no weight decay",
        "batch": {"forget": FORGET_BATCH, "retain": RETAIN_BATCH},
        "most_steps": MOST_STEPS,
        "variants": {name: asdict(variant) for name, variant in VARIANTS.items()},
    }


@dataclass
class _Clock:
    """Wall seconds since the start, and of the stages that have ended."""

    started: float = field(default_factory=time.perf_counter)
    stages: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.stages[name] = round(time.perf_counter() - start, 2)

    def total(self) -> float:
        return round(time.perf_counter() - self.started, 2)
