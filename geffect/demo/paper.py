"""The runs behind the figures of the G-effect paper: each objective at several of its options."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import SubjectConfig
from .corpus import generate
from .jobs import Kept, model_of, original_of
from .methods import Variant
from .plan import Plan
from .workers import OnProgress, Say, working

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from geffect.objectives import Objective, Reference

    from .data import Data

FOLDER = "paper"
"""Where a study keeps these runs and their figures."""

LAYER = "layer"

RUNS: tuple[tuple[str, Mapping[str, float]], ...] = (
    ("ga", {}),
    *(("wga", {"alpha": alpha}) for alpha in (0.5, 1.0, 2.0)),
    *(("npo", {"beta": beta}) for beta in (0.05, 0.1, 0.5)),
    *(("tnpo", {"beta": beta}) for beta in (1.0, 4.0)),
    ("po", {}),
    *(("rmu", {LAYER: layer, "coefficient": 2.0}) for layer in (1 / 3, 2 / 3)),
    ("rmu", {LAYER: 1 / 3, "coefficient": 20.0}),
    *((f"ga+{regulariser}", {}) for regulariser in ("gd", "kl", "rr")),
)
"""The objectives and the options that are set apart from their defaults."""

WEIGHED = ("npo",)
"""The objectives whose samples are looked at one by one."""

CHECKPOINTS = (5, 10, 15)
"""After so many updates that is done; the figure pools them."""


@dataclass(frozen=True)
class PaperRun:
    """One of these runs: so many steps without a rectifier, recorded with what its figures need."""

    out: Path = field(repr=False)
    seed: int
    method: str
    options: tuple[tuple[str, float], ...]
    variant: Variant
    subject: SubjectConfig
    stage: str = "paper"
    weight: float = 1.0

    @property
    def name(self) -> str:
        """A name for files."""
        told = (f"{name}{value:.3g}" for name, value in self.options)
        return "-".join([self.method, *told, f"seed{self.seed}"])

    @property
    def file(self) -> str:
        """The run file, in the folder of the study."""
        return f"{FOLDER}/{self.name}.h5"

    def run(self, say: Say) -> str:
        model, data = original_of(self, generate(self.seed, self.subject.corpus))
        retrained, _ = model_of(self, "gold")
        self._unlearn(model, data, retrained, say)
        return self.file

    def _unlearn(
        self, model: "PreTrainedModel", data: "Data", retrained: "PreTrainedModel", say: Say
    ) -> None:
        """Record every step, keep the effects of single samples, and metrics at the end."""
        from geffect import Recorder
        from geffect.analysis import METRICS, SAMPLES, as_columns

        from .descent import Descent
        from .paper_metrics import metrics

        config, rate = self.subject.unlearning, self.variant.learning_rates[0]
        descent = Descent.begun(model, self.method, self.options, self.variant, rate)
        batches = data.draws(config.sizes(()), descent.objective.sides)
        metadata = {"method": self.method, "seed": self.seed, "figures": FOLDER}
        samples: list[Any] = []
        with Recorder(
            model, self.out / self.file, metadata=metadata, update=True, overwrite=True
        ) as recorder:
            descent.note(recorder)
            for step in range(1, config.plain_steps + 1):
                descent.step(recorder, next(batches))
                say(step / config.plain_steps, f"step {step} of {config.plain_steps}")
                if self.method in WEIGHED and step in CHECKPOINTS:
                    table = weighed(model, data, descent.objective, descent.original)
                    samples.append(table.assign(step=step))
            if samples:
                import pandas as pd

                recorder.keep_table(SAMPLES, as_columns(pd.concat(samples, ignore_index=True)))
            recorder.keep_table(METRICS, metrics(model, data, retrained))


def weighed(
    model: "PreTrainedModel", data: "Data", objective: "Objective", reference: "Reference | None"
) -> Any:
    """The PG-effects of the forget samples on both risks, with the weight that each is given."""
    import numpy as np

    from geffect.analysis import instances
    from geffect.effects import direction
    from geffect.sources import FORGET, RETAIN

    batches = data.batches[FORGET]
    directions = {risk: direction(model, data.batches[risk]) for risk in (FORGET, RETAIN)}
    table = instances(model, batches, directions, by="model")
    weights = np.concatenate(
        [
            objective.implicit_weights(model, {FORGET: batch}, reference)["weight"].numpy()
            for batch in batches
        ]
    )
    return table.assign(weight=weights[table["sample"].to_numpy()])


def jobs(out: Path, plan: Plan) -> Iterator[PaperRun]:
    """The runs, of the first seed of a study."""
    variant, studied = plan.variants["plain"], plan.studied
    for method, options in RUNS:
        own = tuple(placed(options, studied.layers).items())
        yield PaperRun(out, plan.seeds[0], method, own, variant, studied)


def placed(options: Mapping[str, float], layers: int | None) -> Mapping[str, float]:
    """Options with the index of a layer for a share of them, where it is known how many there are.

    It is rounded up, so that two shares are two layers in a model of two.

    >>> [placed({"layer": share}, 2) for share in (1 / 3, 2 / 3)], placed({"layer": 0.5}, None)
    ([{'layer': 1.0}, {'layer': 2.0}], {'layer': 0.5})
    """
    if layers is None or LAYER not in options:
        return options
    return {**options, LAYER: float(ceil(options[LAYER] * layers))}


def weight(plan: Plan) -> float:
    """How much work they are, in plain unlearning runs."""
    return sum(job.weight for job in jobs(Path(), plan))


def run_paper(out: Path, plan: Plan, report: OnProgress) -> list[Path]:
    """Make the runs in a study's folder, from its original model, and say where they are.

    Runs that are there are taken as they are where the plan says to `resume`.
    """
    (out / FOLDER).mkdir(parents=True, exist_ok=True)
    kept = [Kept(job, out / FOLDER, plan.resume) for job in jobs(out, plan)]
    with working(plan.workers, report, plan.threads) as run:
        return [out / file for file in run(kept)]
