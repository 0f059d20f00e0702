"""One target of the family unlearned by gradient ascent: what goes with it, and its effects."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from geffect import Recorder, open_run
from geffect.analysis import predicted_change
from geffect.data.examples import example
from geffect.evaluation import DeepUnlearning, Target, deep_unlearning
from geffect.evaluation.answers import are_right
from geffect.risk import nll, risk_gradient
from geffect.sketch import Sketch, cosine

from . import language_model as lm
from .family import END, LOST, Facts, FamilyConfig


@dataclass
class Known:
    """A model and what it has learned: all facts as rows, and as questions to be answered."""

    facts: Facts
    tokenizer: Any
    items: Sequence[Mapping[str, Any]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.items = [
            example({"question": fact.question, "answer": fact.answer}, self.tokenizer)
            for fact in self.facts.all
        ]

    def rows(self, facts: Sequence[int]) -> lm.Batch:
        """Some facts as one batch."""
        return lm.encode(self.tokenizer, [self.facts.all[fact] for fact in facts])

    def right(
        self, model: PreTrainedModel, facts: Sequence[int], words: Sequence[str] = ()
    ) -> list[bool]:
        """Which of the facts the model answers right, or with the word that is given for each."""
        answers = words or [self.facts.all[fact].answer for fact in facts]
        return are_right(model, self.tokenizer, [self.items[fact] for fact in facts], answers)


def unlearn_deeply(
    load: Callable[[], PreTrainedModel],
    known: Known,
    target: Target,
    config: FamilyConfig,
    seed: int,
    path: Path,
    say: Callable[[float, str], None],
) -> dict[str, Any]:
    """Ascend on the target until it does not follow from what is left, and record why into `path`.

    The run is taken twice, since the minimal set that goes is known at its end: `load` gives the
    model anew. Watching changes nothing, so that both are one. Returns what summary.json says.
    """
    model = load()
    relationships = range(len(known.facts.family.relationships))
    points: dict[str, tuple[int, DeepUnlearning]] = {}
    gone: list[DeepUnlearning] = []
    for step in _steps(model, known.rows([target.fact]), config):
        say(step / config.most_steps / 2, f"step {step}")
        lost = LOST in points or not known.right(model, [target.fact])[0]
        if not lost and step < config.most_steps:
            continue
        right = known.right(model, relationships)
        gone.append(deep_unlearning(known.facts.family, target, right, _all_of(known)))
        ends = gone[-1].succeeded or step == config.most_steps
        for name, is_there in ((LOST, lost and LOST not in points), (END, ends)):
            if is_there:
                lives = known.right(model, _lives(known))
                points[name] = (
                    step,
                    deep_unlearning(known.facts.family, target, right, lives),
                )
        if ends:
            break
    last, report = points[END]
    groups = known.facts.groups(target.fact, report.minimal_set, config.sampled, seed)
    effects = _recorded(load(), known, target, config, groups, last, path, say)
    return {
        "target": target.fact,
        "relation": target.relation,
        "minimal_set": list(report.minimal_set),
        "groups": {name: len(facts) for name, facts in groups.items()},
        "points": {name: {"step": step, **_said(found)} for name, (step, found) in points.items()},
        "effects": effects,
    }


def fact_sketches(
    model: PreTrainedModel,
    known: Known,
    width: int,
    say: Callable[[float, str], None],
) -> np.ndarray:
    """The sketch `Float32[relationship, width]` of the gradient of every relationship's risk."""
    from geffect.layers import describe

    sketch, parameters = Sketch(width=width), describe(model)
    count = len(known.facts.family.relationships)
    sketches = []
    for fact in range(count):
        vector = risk_gradient(model, known.rows([fact])).vector
        sketches.append(sketch.layers(vector, parameters).sum(0).numpy())
        if fact % 20 == 0:
            say(fact / count, f"gradient {fact} of {count}")
    return np.stack(sketches)


def by_distance(known: Known, sketches: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and rule distance of every pair of relationships that rules connect, each once."""
    closure = known.facts.family.closure
    count = len(sketches)
    away = np.stack([closure.distances(fact)[:count] for fact in range(count)])
    pairs = np.triu_indices(count, 1)
    angles = cosine(sketches, sketches)[pairs]
    apart = away[pairs]
    there = np.isfinite(apart) & np.isfinite(angles)
    return angles[there], apart[there]


def _steps(model: PreTrainedModel, forget: lm.Batch, config: FamilyConfig) -> Iterator[int]:
    """Steps of gradient ascent, counted from 1."""
    optimizer = _optimizer(model, config)
    for step in range(1, config.most_steps + 1):
        (-nll(model, forget)).backward()
        optimizer.step()
        optimizer.zero_grad()
        yield step


def _recorded(
    model: PreTrainedModel,
    known: Known,
    target: Target,
    config: FamilyConfig,
    groups: dict[str, list[int]],
    steps: int,
    path: Path,
    say: Callable[[float, str], None],
) -> list[dict[str, Any]]:
    """The same steps with the predicted change of the risk of every group, by layer and step."""
    optimizer = _optimizer(model, config)
    batches = {n: known.rows(facts) for n, facts in ({"forget": [target.fact]} | groups).items()}
    risks: dict[str, Any] = {name: partial(nll, model, rows) for name, rows in batches.items()}
    metadata = {"target": target.fact, "relation": target.relation, **asdict(config)}
    with Recorder(model, path, metadata=metadata, update=True, overwrite=True) as recorder:
        for step in range(1, steps + 1):
            recorder.backward(objective={"forget": -1.0}, **risks)
            optimizer.step()
            optimizer.zero_grad()
            say(0.5 + step / steps / 2, f"step {step} of {steps}, recorded")
    table = predicted_change(open_run(path), by="layer")
    return [
        {"step": int(step) + 1, "layer": str(layer), "risk": str(risk), "value": float(value)}
        for step, layer, risk, value in zip(
            table["step"], table["layer"], table["risk"], table["value"], strict=True
        )
    ]


def _optimizer(model: PreTrainedModel, config: FamilyConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=0.0, fused=True
    )


def _lives(known: Known) -> range:
    return range(len(known.facts.family.relationships), len(known.facts.all))


def _all_of(known: Known) -> list[bool]:
    """Biographies decide nothing of whether a run ends: they are asked where it is looked at."""
    return [True] * len(known.facts.family.biographies)


def _said(found: DeepUnlearning) -> dict[str, Any]:
    said = asdict(found)
    del said["minimal_set"]
    return said
