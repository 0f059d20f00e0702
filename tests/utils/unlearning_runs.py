"""Unlearnings that a plain loop can follow: their arguments, data, and the loop's losses."""

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from transformers import TrainingArguments

from geffect import Rectifier
from geffect.data.pairs import Pairing
from geffect.objectives import NPO, GradDiff, GradientAscent, Objective, WeightedGradientAscent
from geffect.trainers.unlearning import UnlearningTrainer
from tests.utils import reference, tiny, two_ranks
from tests.utils.rectified_trainers import stepped
from tests.utils.trainers import Sharding

LR, BATCH, WINDOW, EPOCHS, SEED = 1e-2, 2, 2, 2, 3


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    """SGD for a naive loop to follow, without what is not under test."""
    usual: dict[str, Any] = {
        "output_dir": str(folder / "out"),
        "num_train_epochs": EPOCHS,
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": WINDOW,
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": SEED,
    }
    return TrainingArguments(**usual | options)


Item = dict[str, Tensor]

WEIGHT = 0.01  # of the retain term: conflicts are left


def items(count: int, seed: int) -> list[Item]:
    """Samples of unequal length."""
    rows = [tiny.batch(seed + i, rows=1, length=5 + (3 * i) % 4) for i in range(count)]
    return [{name: value[0] for name, value in row.items()} for row in rows]


def alike_items(count: int, seed: int) -> list[Item]:
    """Samples with as many answer tokens each: means of means are the mean."""
    rows = []
    for i in range(count):
        item = {name: value[0] for name, value in tiny.batch(seed + i, rows=1).items()}
        item["labels"] = item["input_ids"].clone()
        item["labels"][:4] = -100
        rows.append(item)
    return rows


FORGET, RETAIN, WORLD = items(5, 30), items(8, 130), items(4, 230)
"""Two epochs of 3 micro-batches of a pair or two: windows of 2 and 1, and no retain item twice."""


def trained(
    folder: Path,
    model: nn.Module,
    objective: Objective,
    *,
    rectifier: Rectifier | None = None,
    recorder: Any = None,
    data: dict[str, Any] | None = None,
    resume: Any = None,
    callbacks: Sequence[Any] = (),
    **options: Any,
) -> UnlearningTrainer:
    """A trainer that has trained the model."""
    trainer = UnlearningTrainer(
        model,
        arguments(folder, **options),
        objective=objective,
        **({"forget": FORGET, "retain": RETAIN} if data is None else data),
        rectifier=rectifier,
        recorder=recorder,
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def states(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def windows(**sets: Sequence[Item]) -> Iterator[list[dict[str, Item]]]:
    """The micro-batches of each step, padded by hand."""
    pairing = Pairing([len(of_set) for of_set in sets.values()], SEED)
    for pairing.epoch in range(EPOCHS):
        places = list(pairing)
        batches = []
        for start in range(0, len(places), BATCH):
            chosen = places[start : start + BATCH]
            columns = zip(sets.items(), zip(*chosen, strict=True), strict=True)
            batches.append({name: padded([s[i] for i in which]) for (name, s), which in columns})
        for start in range(0, len(batches), WINDOW):
            yield batches[start : start + WINDOW]


def padded(chosen: Sequence[Item]) -> Item:
    length = max(len(item["input_ids"]) for item in chosen)
    fill = {"input_ids": 7, "attention_mask": 0, "labels": -100}
    return {
        name: torch.tensor(
            [[*item[name].tolist(), *[value] * (length - len(item[name]))] for item in chosen]
        )
        for name, value in fill.items()
    }


def ga(model: Any, origin: Any, batch: Any) -> Tensor:
    return -reference.nll(model, batch["forget"])


def wga(model: Any, origin: Any, batch: Any) -> Tensor:
    log_p = [p for row in reference.token_log_p(model, batch["forget"]) for p in row]
    return torch.stack([p.exp().detach() * p for p in log_p]).mean()


def npo(model: Any, origin: Any, batch: Any) -> Tensor:
    now, then = (reference.token_log_p(m, batch["forget"]) for m in (model, origin))
    losses = [
        -20 * torch.nn.functional.logsigmoid(0.1 * (sum(b).detach() - sum(a)))
        for a, b in zip(now, then, strict=True)
    ]
    return torch.stack(losses).mean()


def plus_retain(forget: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def objective(model: Any, origin: Any, batch: Any) -> Tensor:
        return forget(model, origin, batch) + WEIGHT * reference.nll(model, batch["retain"])

    return objective


OBJECTIVES = {
    "ga": (GradientAscent(), ga),
    "wga": (WeightedGradientAscent(), wga),
    "npo": (NPO(beta=0.1), npo),
    "graddiff": (GradDiff(weight=WEIGHT), plus_retain(ga)),
    "npo+gd": (GradDiff(forget=NPO(beta=0.1), weight=WEIGHT), plus_retain(npo)),
}


def flat_gradient(model: nn.Module, losses: list[Tensor]) -> Tensor:
    return reference.flat(reference.gradient(model, torch.stack(losses).mean()))


def followed(
    model: nn.Module,
    gradient_of: Callable[[nn.Module, list[dict[str, Item]]], Tensor],
    rule: Callable[[Tensor, Tensor], Tensor] | None = None,
    ema: float = 0.8,
) -> nn.Module:
    """A copy of the model after plain SGD, its gradient rectified against the average, clipped."""
    model = copy.deepcopy(model)
    average = None
    for window in windows(forget=FORGET, retain=RETAIN):
        u = gradient_of(model, window)
        if rule is not None:
            r = flat_gradient(model, [reference.nll(model, batch["retain"]) for batch in window])
            average = r if average is None else ema * r + (1 - ema) * average
            u = rule(u, average)
        stepped(model, u, rate=LR, limit=1.0)
    return model


class ShardingUnlearning(Sharding, UnlearningTrainer):
    """One that shards its model by FSDP2, which it does by itself on GPUs alone."""


KINDS = {"ddp": UnlearningTrainer, "fsdp2": ShardingUnlearning}
"""How a trainer spreads its model over processes."""


def ends_of(folder: str, runs: Sequence[tuple[str, Any]], end: Callable[..., Any]) -> Any:
    """What one of two processes has to say of runs, each a kind and what else `end` is told."""
    two_ranks.tell_place()
    said = {}
    for kind, how in runs:
        place = Path(folder, kind)
        place.mkdir(exist_ok=True)
        AcceleratorState._reset_state(reset_partial_state=True)
        said[kind, how] = end(place, KINDS[kind], how)
    return said
