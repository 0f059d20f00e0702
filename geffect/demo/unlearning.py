"""One unlearning run of the study: a method in a variant, recorded, up to equal forgetting."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from geffect import Recorder
from geffect.layers import trainable
from geffect.objectives import options_of

from .config import LEVELS, UnlearningConfig
from .data import Data
from .descent import Descent
from .effects import keep_effects
from .hiding import all_trained
from .levels import Levels
from .measures import Metrics, between, forgotten, kept, probe, relearn
from .methods import RunSpec, Variant


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
    run = _Run(model, data, spec, variant, config, levels)
    metadata = {**asdict(spec), "seed": data.seed, "levels": dict(levels)}
    with Recorder(model, path, metadata=metadata, update=True, overwrite=True) as recorder:
        run.descent.note(recorder)
        while run.goes_on(recorder, report):
            pass
    run.rectifier.detach()
    return run.summary()


class _Run:
    """A model while it unlearns, what is measured of it, and how far it has come."""

    def __init__(
        self,
        model: PreTrainedModel,
        data: Data,
        spec: RunSpec,
        variant: Variant,
        config: UnlearningConfig,
        levels: Mapping[str, float],
    ) -> None:
        self._model, self._data, self._spec, self._config = model, data, spec, config
        self._whole = list(trainable(model).values())
        variant = variant.begun(model, data.corpus, data.tokenizer)
        self.descent = Descent.begun(model, spec.method, spec.options, variant, spec.learning_rate)
        self._trained = self.descent.trained
        self.rectifier = variant.rectifier(model, self.descent.optimizer, config.ema)
        self._batches = data.draws(_sizes(data, variant, config), self.descent.objective.sides)
        self._place = variant.place(model, data.sets["forget"])
        self._wanted = levels
        self._forgotten = forgotten(model, data, levels)
        self._levels = Levels(levels, self._forgotten, config.patience)
        self._step = 0
        self._curve: list[Metrics] = []
        self._note()
        self._crossings: dict[str, Metrics] = {}
        self._earlier = [parameter.detach().clone() for parameter in self._trained]
        self._least = config.plain_steps if spec.shown else 0  # steps, whatever is reached

    def goes_on(self, recorder: Recorder, report: Callable[[int, float], None]) -> bool:
        """Take a step, and measure the model where that reaches a level."""
        self._step += 1
        batch = next(self._batches)
        self.descent.step(recorder, batch, rectifier=self.rectifier, place=self._place)
        before = self._forgotten
        after = self._forgotten = forgotten(self._model, self._data, self._wanted)
        if not math.isfinite(after["forget_nll"]):
            return False
        report(self._step, after["forget_nll"])
        for name, share in self._levels.reached(before, after):
            self._measure(name, share)
            if self._spec.shown and name == "forget_nll":
                data = self._data
                keep_effects(recorder, self._model, data.batches, data.tokenizer)
        is_last = self._is_over()
        if is_last or self._step % self._config.curve_every == 0:
            self._note()
        self._keep_parameters()
        return not is_last

    def summary(self) -> dict[str, Any]:
        """What summary.json says of the run."""
        return {
            "steps": self._step,
            "reached_level": "at_level" in self._crossings,
            "highest_forget_nll": self._levels.highest_forget_nll,
            **{key: self._crossings.get(key) for key in LEVELS.values()},
            "options": options_of(self.descent.objective),
            "curve": {name: [point[name] for point in self._curve] for name in self._curve[0]},
        }

    def _measure(self, name: str, share: float) -> None:
        """Measure all at a level, which was reached after this share of the step."""
        model, data, config = self._model, self._data, self._config
        is_loss = name == "forget_nll"
        attacked = "value_nll" in self._wanted and is_loss
        with all_trained(self._whole):
            self._crossings[LEVELS[name]] = {
                "step": self._step - 1 + share,
                **between(model, self._trained, self._earlier, data, share),
                "relearn_nll": relearn(model, data, config),
                **probe(model, data, config, attacked=attacked),
                **(data.judged(model) if is_loss else {}),
            }
        self._least = max(self._least, self._step + config.steps_beyond)

    def _is_over(self) -> bool:
        out_of_reach = self._levels.are_out_of_reach(self._forgotten)
        is_done = self._levels.are_reached and self._step >= self._least
        return out_of_reach or is_done or self._step == self._config.most_steps

    def _note(self) -> None:
        """A point of the curve."""
        stays = kept(self._model, self._data, outside=self._spec.compared)
        self._curve.append({"step": self._step, **self._forgotten, **stays})

    @torch.no_grad()
    def _keep_parameters(self) -> None:
        for old, new in zip(self._earlier, self._trained, strict=True):
            old.copy_(new)


def _sizes(data: Data, variant: Variant, config: UnlearningConfig) -> dict[str, int]:
    """How many rows of each set a step has."""
    sizes = config.sizes(variant.protect)
    if variant.retain_batch is not None:
        sizes["retain"] = min(variant.retain_batch, len(data.sets["retain"]["input_ids"]))
    if variant.whole:
        sizes = {name: len(data.sets[name]["input_ids"]) for name in sizes}
    return sizes
