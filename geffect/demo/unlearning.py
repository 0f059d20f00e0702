"""One unlearning run of the study: a method in a variant, recorded, up to equal forgetting."""

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from geffect import Recorder
from geffect.audit import AuditSet
from geffect.batch import ORIGINAL, Pair, on_device
from geffect.data.collate import collate, pad_token_of
from geffect.data.others import WithOthers, among_others
from geffect.devices import swap
from geffect.objectives import ALTERNATE, options_of

from . import language_model as lm
from .config import LEVELS, UnlearningConfig
from .corpus import Corpus
from .descent import Descent
from .effects import keep_effects
from .hiding import all_trained
from .methods import RunSpec, Variant
from .recognised import forget_set, recognised, value_nll_of

Metrics = dict[str, Any]

CPU = torch.device("cpu")

APPRECIABLE = 0.01
"""Of the level: a forget NLL that rises by less stands still."""


@dataclass(frozen=True)
class Data:
    """The encoded facts of one seed, by what they are for: whole, and in batches by length.

    `answers` are further answers to the questions of a set, row by row: `forget.alternate`. Those
    of other rows are drawn by the seed.
    """

    corpus: Corpus
    sets: Mapping[str, lm.Batch]
    batches: Mapping[str, list[lm.Batch]]
    tokenizer: Any
    seed: int = 0  # of the order in which batches are drawn
    answers: Mapping[str, lm.Batch] = field(default_factory=dict)
    judged: Callable[[PreTrainedModel], Metrics] = lambda model: {}  # what an audit says of it

    @classmethod
    def of(
        cls, corpus: Corpus, tokenizer: Any, seed: int = 0, device: torch.device = CPU
    ) -> "Data":
        """All sets of a corpus, on a device."""
        facts = {
            "forget": corpus.forget,
            "retain": corpus.retain,
            "retain_heldout_authors": corpus.retain_heldout_authors,
            "world": corpus.world,
            "forget_paraphrase": corpus.forget_paraphrases,
        }
        facts[ALTERNATE] = corpus.forget_unknown
        sets = {
            name: on_device(lm.encode(tokenizer, chosen), device) for name, chosen in facts.items()
        }
        answers = {ALTERNATE: sets.pop(ALTERNATE)}
        batches = {name: lm.by_length(batch) for name, batch in sets.items()}
        return cls(corpus, sets, batches, tokenizer, seed, answers)

    @cached_property
    def asked(self) -> AuditSet:
        """The facts to forget, each with other values of its attribute."""
        return forget_set(self.corpus, self.tokenizer)

    def draws(self, sizes: Mapping[str, int], sides: Sequence[str] = ()) -> Iterator[Pair]:
        """Batches of some sets without end, those of each the same whatever the others are.

        With the further answers that are among the `sides`, to the same questions.
        """
        drawn = {
            name: _draws(self._answered(name, sides), size, _order(self.seed, name))
            for name, size in sizes.items()
        }
        while True:
            yield {name: next(batches) for name, batches in drawn.items()}

    def _answered(self, name: str, sides: Sequence[str]) -> Mapping[str, lm.Batch]:
        """A set by its answers: the original and those among the sides."""
        further = {
            side.partition(".")[2]: answer
            for side, answer in self.answers.items()
            if side in sides and side.startswith(f"{name}.")
        }
        own = [side.partition(".")[2] for side in sides if side.startswith(f"{name}.")]
        return {ORIGINAL: self.sets[name], **further, **self._of_others(name, among_others(own))}

    def _of_others(self, name: str, answers: Sequence[str]) -> dict[str, lm.Batch]:
        """Answers of other rows to the questions of a set."""
        if not answers:
            return {}
        batch = self.sets[name]
        rows = [{c: values[i] for c, values in batch.items()} for i in range(len(batch["labels"]))]
        drawn = WithOthers(rows, answers, seed=self.seed)
        answered = collate(
            [drawn[i] for i in range(len(rows))], pad_token_id=pad_token_of(self.tokenizer)
        )
        device = batch["input_ids"].device
        return {answer: on_device(answered[answer], device) for answer in answers}


def unlearn(
    model: PreTrainedModel,
    data: Data,
    spec: RunSpec,
    variant: Variant,
    config: UnlearningConfig,
    levels: Mapping[str, float],
    path: Path,
    report: Callable[[int, float], None],
) -> dict[str, Any]:
    """Unlearn until every one of the levels is reached, recording every step into `path`.

    `levels` has the forget NLL, which rises to its level, and maybe the forget extraction strength,
    which falls to it. A run that comes no nearer to the first ends. `report(step, forget_nll)` is
    called after every step. Returns what summary.json says of a run, with the curve of forget and
    retain NLL. What is measured at a level is interpolated linearly between the two steps around
    the first crossing; relearning and recognition are of the step after it.
    """
    whole = [parameter for parameter in model.parameters() if parameter.requires_grad]
    variant = variant.begun(model, data.corpus, data.tokenizer)
    descent = Descent.begun(model, spec.method, spec.options, variant, spec.learning_rate)
    objective = descent.objective
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rectifier = variant.rectifier(model, descent.optimizer, config.ema)
    sizes = config.sizes(variant.protect)
    if variant.retain_batch is not None:
        sizes["retain"] = min(variant.retain_batch, len(data.sets["retain"]["input_ids"]))
    if variant.whole:
        sizes = {name: len(data.sets[name]["input_ids"]) for name in sizes}
    batches = data.draws(sizes, objective.sides)
    place = variant.place(model, data.sets["forget"])
    forget = _looked_at(model, data, levels)
    curve = [{"step": 0, **forget, **_kept(model, data, outside=spec.compared)}]
    start = forget["forget_nll"]
    rising = Rising(levels["forget_nll"], start, config.patience, highest=start)
    valued = None
    if "value_nll" in levels:
        known = forget["value_nll"]
        valued = Rising(levels["value_nll"], known, config.patience, highest=known)
    crossings: dict[str, Metrics] = {}
    earlier = [parameter.detach().clone() for parameter in trained]
    least = config.plain_steps if spec.shown else 0
    metadata = {**asdict(spec), "seed": data.seed, "levels": dict(levels)}
    with Recorder(model, path, metadata=metadata, update=True, overwrite=True) as recorder:
        descent.note(recorder)
        for step in range(1, config.most_steps + 1):
            descent.step(recorder, next(batches), rectifier=rectifier, place=place)
            before, forget = forget, _looked_at(model, data, levels)
            if not math.isfinite(forget["forget_nll"]):
                break
            report(step, forget["forget_nll"])
            for name, share in _crossed(levels, before, forget):
                if LEVELS[name] in crossings:
                    continue
                with all_trained(whole):
                    crossings[LEVELS[name]] = {
                        "step": step - 1 + share,
                        **_between(model, trained, earlier, data, share),
                        "relearn_nll": relearn(model, data, config),
                        **probe(
                            model,
                            data,
                            config,
                            attacked="value_nll" in levels and name == "forget_nll",
                        ),
                        **(data.judged(model) if name == "forget_nll" else {}),
                    }
                if spec.shown and name == "forget_nll":
                    keep_effects(recorder, model, data.batches, data.tokenizer)
                least = max(least, step + config.steps_beyond)
            reached_all = len(crossings) == len(levels) and step >= least
            stands = not rising.goes_on(forget["forget_nll"]) and "at_level" not in crossings
            if valued is not None and not valued.goes_on(forget["value_nll"]):
                # What is left to reach is out of reach.
                stands = stands or levels.keys() - {"value_nll"} == {
                    name for name in levels if LEVELS[name] in crossings
                }
            last = reached_all or stands or step == config.most_steps
            if last or step % config.curve_every == 0:
                curve.append({"step": step, **forget, **_kept(model, data, outside=spec.compared)})
            if last:
                break
            _copy(trained, earlier)
    rectifier.detach()
    return {
        "steps": step,
        "reached_level": "at_level" in crossings,
        "highest_forget_nll": rising.highest,
        **{key: crossings.get(key) for key in LEVELS.values()},
        "options": options_of(objective),
        "curve": {name: [point[name] for point in curve] for name in curve[0]},
    }


@dataclass
class Rising:
    """Whether the forget NLL of a run still rises towards its level."""

    level: float
    mark: float
    patience: int
    highest: float
    since: int = 0  # steps after the mark was set

    def goes_on(self, forget_nll: float) -> bool:
        """Told of the NLL after each step: whether it has risen appreciably of late."""
        self.highest = max(self.highest, forget_nll)
        self.since += 1
        if forget_nll >= self.mark + APPRECIABLE * self.level:
            self.mark, self.since = forget_nll, 0
        return self.since < self.patience


def measure(model: PreTrainedModel, data: Data) -> Metrics:
    """Everything that the tables say of a model, but for relearning and recognition."""
    measured = {}
    for name, batches in data.batches.items():
        result = lm.evaluate(model, batches)
        measured[f"{name}_nll"] = result.nll
        if name in ("forget", "retain"):
            measured[f"{name}_es"] = result.extraction_strength
    return measured


def relearn(model: PreTrainedModel, data: Data, config: UnlearningConfig) -> list[float]:
    """NLL of each half of the forget set after a few steps on the other half."""
    forget = data.sets["forget"]
    half = len(forget["input_ids"]) // 2
    first, second = lm.rows(forget, range(half)), lm.rows(forget, range(half, 2 * half))
    return list(
        lm.relearn_nll(
            model,
            first,
            second,
            steps=config.relearning_steps,
            learning_rate=config.relearning_rate,
        )
    )


def probe(
    model: PreTrainedModel, data: Data, config: UnlearningConfig, *, attacked: bool
) -> Metrics:
    """What is recognised; where it is attacked, also after every attack."""
    text = None
    if attacked:
        size = min(config.retain_batch, len(data.sets["retain"]["input_ids"]))
        drawn = data.draws({"retain": size})
        text = (dict(batch["retain"]) for batch in drawn)
    return {**recognised(model, data.asked, data.tokenizer, config, text)}


def _looked_at(model: PreTrainedModel, data: Data, levels: Mapping[str, float]) -> Metrics:
    result = lm.evaluate(model, data.batches["forget"])
    found = {"forget_nll": result.nll, "forget_es": result.extraction_strength}
    if "value_nll" in levels:
        found["value_nll"] = value_nll_of(model, data.asked, data.tokenizer) or 0.0
    return found


def _kept(model: PreTrainedModel, data: Data, *, outside: bool) -> Metrics:
    names = ("retain", "retain_heldout_authors") if outside else ("retain",)
    return {f"{name}_nll": lm.nll(model, data.batches[name]) for name in names}


def _crossed(
    levels: Mapping[str, float], before: Metrics, after: Metrics
) -> Iterator[tuple[str, float]]:
    """The levels that a step has reached, each with the share of the step that it took."""
    for name, level in levels.items():
        sign = -1 if name == "forget_es" else 1  # losses rise to their level, the strength falls
        if sign * before[name] < sign * level <= sign * after[name]:
            yield name, (level - before[name]) / (after[name] - before[name])


def _between(
    model: PreTrainedModel,
    trained: Sequence[Tensor],
    earlier: Sequence[Tensor],
    data: Data,
    share: float,
) -> Metrics:
    """What is measured a share of the way from the model with its earlier parameters to this."""
    after = measure(model, data)
    swap(trained, earlier)
    before = measure(model, data)
    swap(trained, earlier)
    return {name: (1 - share) * before[name] + share * after[name] for name in after}


@torch.no_grad()
def _copy(source: Sequence[Tensor], target: Sequence[Tensor]) -> None:
    for old, new in zip(target, source, strict=True):
        old.copy_(new)


def _order(seed: int, name: str) -> torch.Generator:
    return torch.Generator().manual_seed(random.Random(f"{seed} {name}").getrandbits(32))


def _draws(
    answers: Mapping[str, lm.Batch], size: int, generator: torch.Generator
) -> Iterator[dict[str, Any]]:
    """Batches of `size` rows, without replacement until too few are left, then from the start.

    Where there is one answer they are those of it, else those of each by its name.
    """
    while True:
        order = torch.randperm(len(answers[ORIGINAL]["input_ids"]), generator=generator)
        for index in order.split(size):
            if len(index) == size:
                drawn = {name: lm.rows(batch, index) for name, batch in answers.items()}
                yield drawn if len(drawn) > 1 else drawn[ORIGINAL]
