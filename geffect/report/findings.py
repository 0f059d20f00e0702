"""What a run shows, in sentences with their numbers."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pandas as pd

from geffect.analysis.edited import RISKS, TOUCHED, beyond_first_order, edited
from geffect.numbers import counted, percent
from geffect.scores import blocks_of
from geffect.store.background import waited_for_disk

from .read import Numbers, Read
from .summary import conflict_rate, in_percent, last, mean, violation_rate

ALIKE = 0.05
"""Forget risks up to this share apart count as equal."""

DRIFT = 2.0
"""A risk has moved from the first to the last step where it has by more than so many times what
steps differ by from one to the next."""

_FIRSTS: tuple[tuple[str, Callable[[Read], float], bool, Callable[[float], str]], ...] = (
    (
        "The forget risk at the last step is highest in",
        lambda read: last(read.loss("forget")),
        True,
        "{:.4g} nats".format,
    ),
    (
        "The retain risk at the last step is lowest in",
        lambda read: last(read.loss("retain")),
        False,
        "{:.4g} nats".format,
    ),
    ("Conflicts are rarest in", conflict_rate, False, in_percent),
    ("Updates violate the constraint least often in", violation_rate, False, in_percent),
)
"""What runs are ordered by: the words, the value, whether high is first, how it is written."""


def findings(read: Read) -> list[str]:
    """Sentences on what a run did to the risks, where, how often against what should stay."""
    said = (_risks, _harm, _where, _rates, _rectified, _edited, _waited)
    return [sentence for say in said for sentence in say(read)]


def compared(several: Sequence[Read]) -> list[str]:
    """Which run is first by what counts, and what makes the runs hard to compare."""
    said = [*_firsts(several)]
    forgotten = {read.name: last(read.loss("forget")) for read in several}
    known = {name: value for name, value in forgotten.items() if np.isfinite(value)}
    if len(known) > 1:
        low, high = min(known, key=known.__getitem__), max(known, key=known.__getitem__)
        if known[high] - known[low] > ALIKE * abs(known[high]):
            said.append(
                f"The runs did not forget alike: at their last steps the forget risk lies between "
                f"{known[low]:.4g} ({low}) and {known[high]:.4g} nats ({high}). A run that forgets "
                "less harms less, so compare damage where the forget risks are equal."
            )
    return said


def _firsts(several: Sequence[Read]) -> Iterator[str]:
    for words, of, highest, form in _FIRSTS:
        values = {read.name: of(read) for read in several}
        known = {name: value for name, value in values.items() if np.isfinite(value)}
        if len(known) > 1:
            sign = -1 if highest else 1
            order = sorted(known, key=lambda name: sign * known[name])
            first, end = order[0], order[-1]
            if known[first] != known[end]:
                far = end if len(known) == 2 else f"the other end, {end},"
                yield f"{words} {first}, with {form(known[first])}; {far} has {form(known[end])}."


def _risks(read: Read) -> Iterator[str]:
    said = []
    for name in ("forget", "retain"):
        known = read.loss(name)
        known = known[~np.isnan(known)]
        if len(known):
            said.append(f"the {name} risk went from {known[0]:.4g} to {known[-1]:.4g} nats")
    if said:
        yield f"{' and '.join(said).capitalize()} from the first to the last step."


def _harm(read: Read) -> Iterator[str]:
    values = read.effect("retaining")
    known = ~np.isnan(values)
    if not known.any():
        return
    worst = int(np.nanargmin(values))
    count = int((values[known] < 0).sum())
    before = ", before rectification," if read.rectified else ""
    yield (
        f"The retaining G-effect of the model{before} is negative, which is damage, in {count} of "
        f"{known.sum()} steps; it is lowest at {read.across} {read.steps[worst]}, with "
        f"{values[worst]:.4g}."
    )


def _where(read: Read) -> Iterator[str]:
    table = read.block_effects
    for effect in ("unlearning", "retaining"):
        own = table[table["effect"] == effect]
        sizes = own["value"].abs().groupby(own[blocks_of(own)], observed=True).sum()
        total = float(sizes.sum())
        if len(sizes) > 1 and np.isfinite(total) and total > 0:
            yield (
                f"The {effect} G-effect is largest in {sizes.idxmax()}: "
                f"{percent(sizes.max() / total)} of its size, summed over blocks and steps."
            )


def _rates(read: Read) -> Iterator[str]:
    rate = conflict_rate(read)
    if np.isnan(rate):
        return
    told = f"{in_percent(rate)} of {_counted(read)}"
    yield f"Objective and retain gradient are in conflict in {told}."
    if read.violations is not None:
        broken = violation_rate(read)
        told = "cannot be told" if np.isnan(broken) else in_percent(broken)
        yield f"Share of updates that violate the constraint: {told}."


def _counted(read: Read) -> str:
    by = blocks_of(read.conflicts)
    return "steps" if by == "model" else f"steps and {by}s"


def _rectified(read: Read) -> Iterator[str]:
    table = read.rectifications.get("model")
    if table is None:
        return
    fired, removed = mean(_of(table, "fired")), mean(_of(table, "removed"))
    applied = last(np.nancumsum(_of(table, "applied_fresh")))
    if read.rectified and not np.isnan(fired):
        gone = (
            "" if np.isnan(removed) else f" and removed {in_percent(removed)} of the squared length"
        )
        yield f"The rectifier fired in {in_percent(fired)} of the steps{gone} on average."
    if np.isfinite(_of(table, "applied_fresh")).any():
        yield (
            f"To first order all updates together {_moved(-applied)} the retain risk by "
            f"{abs(applied):.4g} nats per token.{_measured(read, -applied)}"
        )


def _edited(read: Read) -> Iterator[str]:
    if {RISKS, TOUCHED} <= {*read.run.tables}:
        yield from beyond_first_order(edited(read.run, by="model"))


def _measured(read: Read, told: float) -> str:
    """That the retain risk went the other way than it was `told` to rise, where it did."""
    known = read.loss("retain")
    known = known[np.isfinite(known)]
    if len(known) < 2:
        return ""
    rise = known[-1] - known[0]
    # Steps are of different batches: what they differ by from one to the next is no change.
    from_step_to_step = np.sqrt(np.mean(np.diff(known) ** 2))
    if rise * told >= 0 or abs(rise) <= DRIFT * from_step_to_step:
        return ""
    return (
        f" Measured from the first to the last step it {'rose' if rise > 0 else 'fell'} by "
        f"{abs(rise):.4g}, which first order does not see."
    )


def _moved(rise: float) -> str:
    return "raised" if rise > 0 else "lowered"


def _of(table: pd.DataFrame, quantity: str) -> Numbers:
    one = table[table["quantity"] == quantity]
    return one.groupby("step")["value"].mean().to_numpy(dtype=float)


def _waited(read: Read) -> Iterator[str]:
    told = waited_for_disk(read.run)
    if told is None:
        return
    seconds, rows = told
    yield (
        f"Training waited {seconds:.3g} s for the disk over {counted(rows, 'row')} with gradients "
        f"that are kept, of {last(read.run.column('wall_seconds')):.3g} s that the run took."
    )
