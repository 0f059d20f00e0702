"""Trainers of the kind that unlearning libraries have: a forget loss, and a retain loss behind it.

Each computes a loss of its own from batches {"forget": ..., "retain": ...}, and knows nothing of
gradients. What they have in common: GradDiff's `compute_retain_loss(model, retain_inputs)`.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback

from geffect import Rectifier
from tests.utils import tiny, trainers

SGD = {"optim": "sgd", "lr_scheduler_type": "constant", "learning_rate": 0.05}


RETAIN = [tiny.batch(seed, rows=2) for seed in range(70, 75)]


class GradAscent(Trainer):
    """Minus the NLL of the forget batch; no retain term."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs["forget"])
        return (-outputs.loss, outputs) if return_outputs else -outputs.loss


class CEU(GradAscent):
    """Towards the model's own predictions without the true token: UNDIAL at its limit."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs["forget"])
        logits, tokens = at_answers(outputs, inputs["forget"])
        loss = F.cross_entropy(logits, lowered(logits, tokens, by=math.inf))
        return (loss, outputs) if return_outputs else loss


class GradDiff(Trainer):
    """gamma times minus the NLL of the forget batch, plus alpha times a retain loss."""

    def __init__(
        self,
        *args: Any,
        gamma: float = 1.0,
        alpha: float = 1.0,
        retain_loss_type: str = "NLL",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.gamma, self.alpha, self.retain_loss_type = gamma, alpha, retain_loss_type
        self.ref_model = copy.deepcopy(self.model).eval()

    def forget_loss(self, model: Any, forget: Any) -> tuple[Tensor, Any]:
        outputs = model(**forget)
        return -outputs.loss, outputs

    def compute_retain_loss(self, model: Any, retain_inputs: Any) -> Tensor:
        outputs = model(**retain_inputs)
        if self.retain_loss_type == "NLL":
            return outputs.loss
        with torch.no_grad():
            # Sharper than it starts, so that there is a gradient at the first step.
            reference = (1.1 * self.ref_model(**retain_inputs).logits).log_softmax(-1)
        log_p = outputs.logits.log_softmax(-1).flatten(0, 1)
        return F.kl_div(log_p, reference.flatten(0, 1), log_target=True, reduction="batchmean")

    def combined(self, forget: Tensor, retain: Tensor) -> Tensor:
        return self.gamma * forget + self.alpha * retain

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        forget, outputs = self.forget_loss(model, inputs["forget"])
        retain = self.compute_retain_loss(model=model, retain_inputs=inputs["retain"])
        loss = self.combined(forget, retain)
        return (loss, outputs) if return_outputs else loss


class KL(GradDiff):
    """GradDiff that keeps the predictions on the retain batch where they were."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, retain_loss_type="KL", **kwargs)


class NPO(GradDiff):
    """Negative preference: the answers should become less likely than the reference has them."""

    def forget_loss(self, model: Any, forget: Any) -> tuple[Tensor, Any]:
        log_p, outputs = of_answers(model, forget)
        with torch.no_grad():
            reference, _ = of_answers(self.ref_model, forget)
        return -2 / 0.1 * F.logsigmoid(-0.1 * (log_p - reference)).mean(), outputs


class SimNPO(GradDiff):
    """Negative preference without a reference: the mean over an answer's tokens, and a margin."""

    def forget_loss(self, model: Any, forget: Any) -> tuple[Tensor, Any]:
        log_p, outputs = of_answers(model, forget)
        nll = -log_p / (forget["labels"][:, 1:] != -100).sum(dim=1)
        return -2 / 0.1 * F.logsigmoid(0.1 * nll - 0.5).mean(), outputs


class DPO(GradDiff):
    """Prefers the alternate answers of a forget batch to the original ones, in a batch each."""

    def forget_loss(self, model: Any, forget: Any) -> tuple[Tensor, Any]:
        wins, outputs = of_answers(model, forget["alternate"])
        loses, _ = of_answers(model, forget["original"])
        with torch.no_grad():
            before = of_answers(self.ref_model, forget["alternate"])[0]
            before = before - of_answers(self.ref_model, forget["original"])[0]
        return -2 / 0.1 * F.logsigmoid(0.1 * (wins - loses - before)).mean(), outputs


class RMU(GradDiff):
    """Steers hidden states of the forget batch, and keeps those of the retain batch in place."""

    def forget_loss(self, model: Any, forget: Any) -> tuple[Tensor, Any]:
        outputs = model(**forget, output_hidden_states=True)
        hidden = outputs.hidden_states[1]
        return F.mse_loss(hidden, torch.ones_like(hidden)), outputs

    def compute_retain_loss(self, model: Any, retain_inputs: Any) -> Tensor:
        hidden = model(**retain_inputs, output_hidden_states=True).hidden_states[1]
        with torch.no_grad():
            before = self.ref_model(**retain_inputs, output_hidden_states=True).hidden_states[1]
        # Away from where it starts, so that there is a gradient at the first step.
        return F.mse_loss(hidden, before + 0.1)


class WGA(GradDiff):
    """Ascent on each token, weighted by how sure of it the model is."""

    def forget_loss(self, model: Any, forget: Any) -> tuple[Tensor, Any]:
        outputs = model(**forget)
        scored = forget["labels"][:, 1:] != -100
        log_p = of_tokens(outputs, forget)[scored]
        return (log_p.detach().exp() * log_p).mean(), outputs

    def combined(self, forget: Tensor, retain: Tensor) -> Tensor:
        retain *= self.alpha  # in place, as one may
        return retain.add_(forget)


class SatImp(GradDiff):
    """Ascent on each token, weighted by how sure of it the model is, and by how unsure."""

    def forget_loss(self, model: Any, forget: Any) -> tuple[Tensor, Any]:
        outputs = model(**forget)
        log_p = -F.cross_entropy(*at_answers(outputs, forget), reduction="none")
        p = log_p.detach().exp()
        # Not the fifth power of p, as is usual: of the 1/23 here that would leave nothing.
        return (p**0.5 * (1 - p) ** 2 * log_p).mean(), outputs


class UNDIAL(GradDiff):
    """Learns from the reference, with the true token made less likely there."""

    def forget_loss(self, model: Any, forget: Any) -> tuple[Tensor, Any]:
        outputs = model(**forget)
        logits, tokens = at_answers(outputs, forget)
        with torch.no_grad():
            reference, _ = at_answers(self.ref_model(**forget), forget)
        return F.cross_entropy(logits, lowered(reference, tokens, by=3.0)), outputs


class PDU(GradDiff):
    """Weighs the two losses by their values: no sum with weights that are known beforehand."""

    def combined(self, forget: Tensor, retain: Tensor) -> Tensor:
        return torch.logaddexp(self.gamma * forget, self.alpha * retain) + 0.1 * retain**2


class Older(GradDiff):
    """With a training step of its own, and methods that take and pass what they took before."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        model.train()
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        loss = loss / self.args.gradient_accumulation_steps
        self.accelerator.backward(loss)
        return loss.detach()

    def compute_retain_loss(self, model: Any, retain_inputs: Any, **kwargs: Any) -> Tensor:
        return super().compute_retain_loss(model, retain_inputs)


class Twice(GradDiff):
    """Asks for its retain loss two times."""

    def combined(self, forget: Tensor, retain: Tensor) -> Tensor:
        return forget + retain

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss = super().compute_loss(model, inputs)
        return loss + 0.5 * self.compute_retain_loss(model, inputs["retain"])


class Sharing(GradDiff):
    """Runs both batches at once, so that its two losses share a forward pass."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        forget, retain = inputs["forget"], inputs["retain"]
        both = {name: torch.cat([forget[name], retain[name]]) for name in forget}
        self.logits = model(**both).logits.split([len(forget["labels"]), len(retain["labels"])])
        loss = -cross_entropy(self.logits[0], forget)
        return loss + self.compute_retain_loss(model, retain)

    def compute_retain_loss(self, model: Any, retain_inputs: Any) -> Tensor:
        return cross_entropy(self.logits[1], retain_inputs)


class Silent(GradDiff):
    """Has a retain loss and never asks for it."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return self.forget_loss(model, inputs["forget"])[0]


class Detached(GradDiff):
    """Has a retain loss without a gradient."""

    def compute_retain_loss(self, model: Any, retain_inputs: Any) -> Tensor:
        return super().compute_retain_loss(model, retain_inputs).detach()


def cross_entropy(logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


def of_tokens(outputs: Any, batch: Any) -> Tensor:
    labels = batch["labels"][:, 1:]
    log_p = outputs.logits[:, :-1].log_softmax(-1)
    return log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels != -100)


def of_answers(model: Any, batch: Any) -> tuple[Tensor, Any]:
    """The log-likelihood of each answer, and what the model returned."""
    outputs = model(**batch)
    return of_tokens(outputs, batch).sum(dim=1), outputs


def at_answers(outputs: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """The logits that predict a token of an answer, in rows, and these tokens."""
    labels = batch["labels"][:, 1:]
    return outputs.logits[:, :-1][labels != -100], labels[labels != -100]


def lowered(logits: Tensor, tokens: Tensor, *, by: float) -> Tensor:
    """Targets: what is predicted when the logit of each row's token is so much lower."""
    lower = logits.new_full((len(tokens), 1), -by)
    return logits.detach().scatter_add(-1, tokens[:, None], lower).softmax(-1)


def pairs(count: int = 5, *, alternate: bool = False) -> list[dict[str, Any]]:
    """Items with a forget and a retain side."""
    forget, retain = trainers.samples(count), trainers.samples(count, seed=100)
    if alternate:
        others = trainers.samples(count, seed=200)
        sides: list[Any] = [
            {"original": a, "alternate": b} for a, b in zip(forget, others, strict=True)
        ]
    else:
        sides = [*forget]
    return [{"forget": f, "retain": r} for f, r in zip(sides, retain, strict=True)]


def opposed_pairs(kind: type[Trainer] = GradDiff, count: int = 3) -> list[Any]:
    """Pairs whose retain side is close to the forget side, so that one harms the other."""
    rows = pairs(count, alternate=issubclass(kind, DPO))
    for row in rows:
        side = row["forget"].get("original", row["forget"])
        row["retain"] = {name: value.clone() for name, value in side.items()}
        row["retain"]["input_ids"][3] = 5
    return rows


class Collating:
    """A collator that stacks what is nested, and notes the batches that it made."""

    def __init__(self) -> None:
        self.batches: list[Any] = []

    def __call__(self, items: Sequence[Any]) -> Any:
        self.batches.append(stacked(items))
        return stacked(items)


def stacked(items: Sequence[Any]) -> Any:
    if isinstance(items[0], Tensor):
        return torch.stack([*items])
    return {name: stacked([item[name] for item in items]) for name in items[0]}


def unlearner(
    folder: Path,
    model: nn.Module | None = None,
    *callbacks: TrainerCallback,
    kind: type[Trainer] = GradDiff,
    data: Sequence[Any] | None = None,
    made: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """A trainer on pairs; `made` is what its class is given beside what every Trainer takes."""
    rows = pairs(alternate=issubclass(kind, DPO)) if data is None else data
    told: dict[str, Any] = {"data_collator": Collating()} | dict(made or {})
    return trainers.trainer(
        folder,
        tiny.gpt2(layers=1) if model is None else model,
        *callbacks,
        kind=partial(kind, **told),  # type: ignore[arg-type]
        data=rows,
        **{"remove_unused_columns": False} | options,
    )


class Reports(TrainerCallback):
    """The reports of a rectifier, step by step."""

    def __init__(self, rectifier: Rectifier) -> None:
        self.rectifier = rectifier
        self.all: list[Any] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.all.append(self.rectifier.report)

    @property
    def fired(self) -> list[bool]:
        return [any(report.fired) for report in self.all]


def apart(one: Any, other: Any) -> float:
    """The largest difference between the parameters of two trainers or models."""
    a, b = ((x.model if isinstance(x, Trainer) else x).parameters() for x in (one, other))
    return max(float((p - q).detach().abs().max()) for p, q in zip(a, b, strict=True))
