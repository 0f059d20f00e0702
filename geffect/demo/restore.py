"""RESTOR on the family: some answers are altered, learned, and unlearned again."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from geffect import Recorder, open_run
from geffect.analysis import predicted_change
from geffect.evaluation.restoration import recovery, verdict
from geffect.layers import trainable
from geffect.risk import token_log_probabilities

from . import language_model as lm
from .corpus import Fact
from .deep import Known
from .descent import Descent
from .family import FamilyConfig, alter
from .methods import VARIANTS

OPTIONS = ("true", "false", "third")
"""The answers to an altered question: the one it had, the one it was given, and a word that is
neither."""


def restore(
    model: PreTrainedModel,
    known: Known,
    method: str,
    config: FamilyConfig,
    seed: int,
    path: Path,
    say: Callable[[float, str], None],
) -> dict[str, Any]:
    """Corrupt the clean model, unlearn what is false by a method, and say how much comes back.

    The method retains relationships that were not altered: an unlearning run does not know the
    answers that it is to bring back.
    """
    altered = alter(known.facts.family, config.altered, seed)
    rows = _rows(known, altered)
    retain = known.rows([f for f in range(len(known.facts.family.triples)) if f not in altered])
    clean = _kept(model)
    before = _state(model, known, altered, rows)
    lessons = replace(
        config.subject,
        epochs=config.corrupting_epochs,
        learning_rate=config.corrupting_rate,
        warmup=1,
    )
    lm.memorise(model, rows["false"], lessons, seed)
    corrupted, states = _kept(model), {"clean": before}
    states["corrupted"] = _state(model, known, altered, rows)
    descent = Descent.begun(model, method, (), VARIANTS["plain"], config.restoring_rate)
    risks = {"forget": rows["false"], "true": rows["true"]}
    order = torch.Generator().manual_seed(seed)
    curve = []
    with Recorder(
        model, path, metadata={"method": method}, update=True, overwrite=True
    ) as recorder:
        descent.note(recorder)
        for step in range(1, config.restoring_steps + 1):
            drawn = torch.randperm(len(retain["input_ids"]), generator=order)[: config.altered]
            batch = {"forget": rows["false"], "retain": lm.rows(retain, drawn)}
            descent.step(recorder, batch, risks=risks)
            found = recovery(clean, corrupted, model)["model"]
            curve.append(
                {
                    "step": step,
                    "cosine": found.cosine,
                    "residual": found.residual,
                    **{
                        name: sum(known.right(model, [*altered], words)) / len(altered)
                        for name, words in _words(known, altered).items()
                        if name != "third"
                    },
                }
            )
            say(step / config.restoring_steps, f"step {step}")
    states["unlearned"] = _state(model, known, altered, rows)
    return {
        "method": method,
        "states": states,
        "curve": curve,
        "effects": _split(path),
        "recovery": {
            layer: {"cosine": found.cosine, "residual": found.residual}
            for layer, found in recovery(clean, corrupted, model).items()
        },
    }


def _split(path: Path) -> list[dict[str, Any]]:
    """The predicted changes of false and of true facts, step by step, and the verdict."""
    table = predicted_change(open_run(path), by="model").pivot(
        index="step", columns="risk", values="value"
    )
    return [
        {"step": index + 1, "false": false, "true": true, "verdict": verdict(false, true)}
        for index, (false, true) in enumerate(
            zip(table["forget"].tolist(), table["true"].tolist(), strict=True)
        )
    ]


def _words(known: Known, altered: Mapping[int, tuple[str, str]]) -> dict[str, list[str]]:
    return {
        "true": [known.facts.all[fact].answer for fact in altered],
        "false": [false for false, _ in altered.values()],
        "third": [third for _, third in altered.values()],
    }


def _rows(known: Known, altered: Mapping[int, tuple[str, str]]) -> dict[str, lm.Batch]:
    """The altered questions with each kind of answer."""
    return {
        name: lm.encode(
            known.tokenizer,
            [
                Fact(known.facts.all[fact].subject, known.facts.all[fact].question, word)
                for fact, word in zip(altered, words, strict=True)
            ],
        )
        for name, words in _words(known, altered).items()
    }


def _state(
    model: PreTrainedModel,
    known: Known,
    altered: Mapping[int, tuple[str, str]],
    rows: Mapping[str, lm.Batch],
) -> dict[str, float]:
    """What a model answers to the altered questions, and how likely it finds each answer.

    The log-probability of an answer is the sum over its tokens and its end, a mean over questions.
    """
    words = _words(known, altered)
    others = [fact for fact in range(len(known.facts.all)) if fact not in altered]
    state = {f"answers_{n}": _share(known.right(model, [*altered], words[n])) for n in OPTIONS}
    state |= {f"log_p_{name}": _log_p(model, rows[name]) for name in OPTIONS}
    return state | {"answers_others": _share(known.right(model, others))}


@torch.no_grad()
def _log_p(model: PreTrainedModel, batch: lm.Batch) -> float:
    log_p, scored = token_log_probabilities(model, batch)
    return float((log_p * scored).sum() / len(batch["labels"]))


def _share(right: list[bool]) -> float:
    return sum(right) / len(right)


def _kept(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in trainable(model).items()}
