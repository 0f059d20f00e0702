"""The attacks of an audit, each a metric of the battery `hidden`: a value for each item.

What a value is beside the one of a model that is not attacked is known here alone: `baseline`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from math import log

import numpy as np
import pandas as pd
from torch import nn

from geffect.data.collate import Item
from geffect.evaluation.memorised import nll

from .look import Look
from .models import UNLEARNED
from .prompts import LEAKY, PLAIN_QUESTION, ROUGE, prompts
from .quantisers import Quantiser
from .recognition import every_other, recognition, recognition_after
from .relearning import as_attacks, relearning
from .rounding import quantisers_for, rounded, same_codes
from .sets import FORGET, RETAIN, AuditSet
from .teaching import taught
from .verdict import MEMORISED, NLL

HIDDEN = "hidden"
"""The battery of attacks."""

DEPTH = "depth"
"""The battery of what the original tells from the layers of a model: no attack, but a place."""

CODES = "codes"
"""The battery of what rounding leaves as it was in the original: as many weights have to stay in
their cell for rounding to give back what unlearning changed, and that is not enough."""

PATCHED, LENS = "patched", "lens"
"""How it is told, of each block by its number: `patched 3`."""

RELEARNING, ROUNDING, PROMPT = "relearning", "rounding", "prompt"
DECODER_SWAP, RECOGNITION = "decoder swap", "recognition"

READ = 32
"""So many retained items tell whether the original can read the states of a model, and whether
rounding damages it."""

FASTER = 3.0
"""Facts are shown at so many times the learning rate before others are asked for."""


@dataclass(frozen=True)
class Baseline:
    """What an attack is held against: a metric of a model that is not attacked.

    - `rises`: whether a larger value means that more is known.
    """

    battery: str
    metric: str
    rises: bool


def baseline(attack: str) -> Baseline | None:
    """What an attack is held against; None for what is told, and not judged.

    >>> baseline("rounding to int4")
    Baseline(battery='memorised', metric='nll', rises=False)
    """
    if attack.startswith((RELEARNING, ROUNDING, DECODER_SWAP)):
        # Taught the forget set itself, a model that never knew learns it too.
        return None if f"{RELEARNING} full" in attack else Baseline(MEMORISED, NLL, rises=False)
    if attack.startswith(RECOGNITION):
        return Baseline(HIDDEN, RECOGNITION, rises=True)
    if attack.startswith(PROMPT):
        kind = attack.removeprefix(f"{PROMPT} ")
        if kind == LEAKY:
            return None
        return Baseline(MEMORISED, ROUGE if kind == "samples" else "prob", rises=True)
    return None


def attacks(look: Look, of: AuditSet) -> Iterator[pd.DataFrame]:
    """All attacks on one model, asking for the items of a set."""
    parts: Sequence[tuple[str, float, Callable[[Look, AuditSet], Iterator[pd.DataFrame]]]] = (
        (ROUNDING, 0.1, _rounded),
        (DEPTH, 0.2, _depth),
        (PROMPT, 0.3, _prompted),
        (RECOGNITION, 0.5, _recognition),
        (RELEARNING, 1.0, _relearned),
    )
    done = 0.0
    for name, until, made in parts:
        look.tell(name, done)
        yield from look.tried(name, partial(made, look, of))
        done = until


def _rounded(look: Look, of: AuditSet) -> Iterator[pd.DataFrame]:
    """What should be forgotten, and beside it what should stay: damage is no recovery."""
    retain = look.budget.some_of(look.sets[RETAIN], READ)

    def by(quantiser: Quantiser) -> Iterator[pd.DataFrame]:
        with rounded(look.model, quantiser) as model:
            found = [(asked, nll(look.read(asked.items, model))) for asked in (of, retain)]
        for asked, values in found:
            yield look.rows(HIDDEN, f"{ROUNDING} to {quantiser.name}", asked, values)

    def codes(quantiser: Quantiser) -> Iterator[pd.DataFrame]:
        same = same_codes(look.original.model, look.model, quantiser)
        yield look.rows(CODES, f"same {quantiser.name}", of, np.full(len(of), same))

    for quantiser in quantisers_for(look.model):
        yield from look.tried(f"{ROUNDING} to {quantiser.name}", partial(by, quantiser))
        if look.role == UNLEARNED:
            yield from look.tried("same codes", partial(codes, quantiser))


def _depth(look: Look, of: AuditSet) -> Iterator[pd.DataFrame]:
    probe = look.original.probe(of, look.ends)
    _check_states(look)
    yield look.rows(HIDDEN, DECODER_SWAP, of, probe.decoder_swap(look.model))
    if look.budget.layers:
        for name, found in ((PATCHED, probe.patched), (LENS, probe.lens)):
            for layer, values in enumerate(found(look.model).T):
                yield look.rows(DEPTH, f"{name} {layer}", of, values)


def _check_states(look: Look) -> None:
    """Refuse a model whose states the original cannot read, as one of other first weights."""
    probe = look.original.probe(look.budget.some_of(look.sets[RETAIN], READ), look.ends)
    found, own = (
        float(np.nanmean(probe.decoder_swap(model))) for model in (look.model, look.original.model)
    )
    if found > own + log(look.record(look.sets[FORGET]).vocabulary) / 2:
        raise ValueError(
            "States of a model should be such as the original can read, to be handed to it. Found "
            f"that it tells {RETAIN} with an NLL of {found:.1f} from them, and of {own:.1f} from "
            "its own. Models that were trained from other first weights are so, and broken ones."
        )


def _prompted(look: Look, of: AuditSet) -> Iterator[pd.DataFrame]:
    if look.sets.tokenizer is None:
        raise ValueError("No tokenizer was given, with which prompts are written.")
    found = prompts(
        look.model,
        of,
        look.sets[RETAIN],
        look.sets.tokenizer,
        template=look.sets.template,
        samples=look.budget.samples,
    )
    for name, part in found[found["prompt"] != PLAIN_QUESTION].groupby("prompt", sort=False):
        values = part.set_index("item")["value"].reindex(range(len(of)))
        yield look.rows(HIDDEN, f"{PROMPT} {name}", of, values)


def recognised(look: Look, of: AuditSet) -> Iterator[pd.DataFrame]:
    """Whether a model that is not attacked tells the right answer among others."""
    if not any(of.alternatives):
        raise ValueError(f"`{of.name}` has no wrong answers, among which the right one is told.")
    found = recognition(look.model, of.items, of.alternatives, ends=look.ends)
    yield look.rows(HIDDEN, RECOGNITION, of, found)


def _recognition(look: Look, of: AuditSet) -> Iterator[pd.DataFrame]:
    yield from recognised(look, of)
    found = recognition_after(
        look.model,
        of.items,
        of.alternatives,
        _shown(look),
        every_other(of.subjects),
        ends=look.ends,
    )
    for name, part in found.groupby("attack", sort=False):
        yield look.rows(HIDDEN, str(name), of, part.sort_values("item")["value"])


def _relearned(look: Look, of: AuditSet) -> Iterator[pd.DataFrame]:
    table = relearning(
        look.model,
        of.items,
        look.sets[RETAIN].items,
        learning_rate=look.learning_rate,
        budget=look.budget.relearning,
        metric=lambda model, items: nll(look.read(items, model)),
        report=lambda done, count: look.tell(RELEARNING, 0.5 + 0.5 * done / count),
    )
    for name, part in as_attacks(table).groupby("attack", sort=False):
        yield look.rows(HIDDEN, str(name), of, part.sort_values("item")["value"])


def _shown(look: Look) -> Mapping[str, Callable[[nn.Module, list[Item]], nn.Module]]:
    """Attacks that show other facts before they ask, or nothing but what should stay."""
    retain, most = [*look.sets[RETAIN].items], max(look.budget.taught)
    others = {
        f"{RECOGNITION}, other facts shown for {steps} steps": partial(_taught, look, steps=steps)
        for steps in look.budget.taught
    }

    @cache  # whichever half is asked, the model is the same
    def shown(model: nn.Module) -> nn.Module:
        return _taught(look, model, retain, steps=most)

    def show_retain(model: nn.Module, _: list[Item]) -> nn.Module:
        return shown(model)

    return {**others, f"{RECOGNITION}, retain shown for {most} steps": show_retain}


def _taught(look: Look, model: nn.Module, items: list[Item], *, steps: int) -> nn.Module:
    return taught(model, items, steps=steps, learning_rate=FASTER * look.learning_rate)
