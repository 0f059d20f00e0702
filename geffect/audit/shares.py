"""Recoverable shares: how much of what the original knew an attack brings back.

Every attack A is made on the unlearned model u and on a retrained one g, which never knew. The
share is what u shows beyond g, of what the original o, which is not attacked, shows beyond g:

    share = (m_A(u) - m_A(g)) / (m(o) - m_A(g))

0 is no more than a model that never knew, 1 as much as the original. m is a mean over items. Where
less means that more is known, as in an NLL, both differences change their signs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import hypot, isinf, isnan, nan, sqrt
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from geffect.evaluation.resampling import DRAWS, resamples

from .table import LIMITS, resampled_means, units_of

Floats = NDArray[np.float64]

ALIKE = 2
"""A noise of retraining that was measured elsewhere counts as much as so many further models."""

REACH = 1.96
"""So many standard deviations to each side are 95 %."""


@dataclass(frozen=True)
class Share:
    """A recoverable share, with the bounds of 95 % of a bootstrap over subjects.

    `n` is how many items it is of. `floor_estimated`: what a model that never knew would show was
    not measured on a retrained one. NaN where it is undefined: the original shows no more than the
    floor, or there is nothing to draw.
    """

    value: float
    low: float
    high: float
    n: int
    floor_estimated: bool = False


@dataclass(frozen=True)
class Strongest:
    """The attack that brings most back, and what would look like it by chance.

    The largest of several shares is too large on average. `noise` is how large the same maximum is
    where nothing is hidden: of the retrained model on one half of the items, with the other half as
    its floor.
    """

    attack: str
    share: Share
    noise: float


@dataclass(frozen=True)
class Floor:
    """What a model shows under an attack that never knew what is asked, a value an item.

    Either a retrained model on the items themselves, or, with `subjects`, the original on other
    items, which no model has seen: then the floor is estimated.

    >>> Floor([3.5, 3.7], subjects=["Ada", "Bo"]).estimated
    True
    """

    values: ArrayLike
    subjects: Sequence[str] | None = None

    @property
    def estimated(self) -> bool:
        """Whether it is of other items."""
        return self.subjects is not None


def recoverable_share(
    unlearned: ArrayLike,
    floor: Floor | ArrayLike,
    original: ArrayLike,
    subjects: Sequence[str],
    *,
    rises: bool = False,
    draws: int = DRAWS,
    seed: int = 0,
) -> Share:
    """The recoverable share of one attack, from a value for each item.

    - `unlearned`: the attacked model; `floor`: the retrained one under the same attack, or a
      `Floor`; `original`: not attacked.
    - `subjects`: what each item is about. Those of one are drawn together, the same for all models.
    - `rises`: whether a larger value means that more is known; False for an NLL.

    An item without a value in one of them is left out of all. A draw in which the original shows no
    more than the floor counts against both bounds.

    >>> share = recoverable_share([2.0, 3.0], [4.0, 4.0], [0.0, 0.0], ["Ada", "Bo"])
    >>> share.value, share.low, share.high
    (0.375, 0.25, 0.5)
    """
    asked = _Asked.of(unlearned, floor, original, subjects, rises)
    value = asked.share()
    if asked.n < 2 or np.isnan(value):
        return Share(value, nan, nan, asked.n, asked.estimated)
    low, high = _bounds(asked.drawn(draws, seed))
    return Share(value, low, high, asked.n, asked.estimated)


def recoverable_shares(
    unlearned: Mapping[str, ArrayLike],
    floor: Mapping[str, Floor | ArrayLike],
    original: ArrayLike,
    subjects: Sequence[str],
    *,
    rises: bool = False,
    draws: int = DRAWS,
    seed: int = 0,
) -> pd.DataFrame:
    """The recoverable share of every attack of one metric, by the name of the attack.

    Columns attack, value, low, high, n, floor_estimated. All as for `recoverable_share`.

    >>> recoverable_shares({"int4": [2.0]}, {"int4": [4.0]}, [0.0], ["Ada"])["value"].tolist()
    [0.5]
    """
    _check_same(unlearned, floor)
    rows = []
    for attack, values in unlearned.items():
        share = recoverable_share(
            values, floor[attack], original, subjects, rises=rises, draws=draws, seed=seed
        )
        rows.append({"attack": attack, **asdict(share)})
    return pd.DataFrame(rows)


def strongest(
    shares: pd.DataFrame,
    floor: Mapping[str, Floor | ArrayLike],
    original: ArrayLike,
    subjects: Sequence[str],
    *,
    rises: bool = False,
) -> Strongest | None:
    """The attack with the largest share, and the noise of that maximum; None where none is defined.

    - `shares`: of `recoverable_shares`, of which the others are what that was given.

    >>> floor = {"int4": [4.0, 4.0], "int8": [4.0, 4.2]}
    >>> given = floor, [0.0, 0.0], ["Ada", "Bo"]
    >>> found = recoverable_shares({"int4": [2.0, 2.0], "int8": [3.0, 4.0]}, *given)
    >>> most = strongest(found, *given)
    >>> most.attack, most.share.value, round(most.noise, 3)
    ('int4', 0.5, 0.048)
    """
    rows = {row.pop("attack"): Share(**row) for row in _records(shares)}
    known = [attack for attack, share in rows.items() if not isnan(share.value)]
    if not known:
        return None
    attack = max(known, key=lambda attack: rows[attack].value)
    levels = [noise_level(values, original, subjects, rises=rises) for values in floor.values()]
    noise = max((level for level in levels if not isnan(level)), default=nan)
    return Strongest(attack, rows[attack], noise)


def noise_level(
    floor: Floor | ArrayLike,
    original: ArrayLike,
    subjects: Sequence[str],
    *,
    rises: bool = False,
) -> float:
    """The share that a model which never knew seems to have: half of it, beside its other half.

    The larger one of both ways. Halves are every other subject, or item where subjects are few.
    Of an estimated floor they are halves of the items that it is of, and the original's mean.

    >>> noise_level([4.0, 3.0], [0.0, 0.0], ["Ada", "Bo"])
    0.25
    """
    given = floor if isinstance(floor, Floor) else Floor(floor)
    values, known = _floats(given.values), _floats(original)
    about = subjects
    if given.subjects is not None:
        there = known[~np.isnan(known)]
        mean = there.mean() if len(there) else nan
        about, known = given.subjects, np.full(len(values), mean)
    _check("floor", values, about, "subjects")
    _check("original", known, about, "subjects")
    halves = units_of(about) % 2 == 0
    if halves.all():
        return nan
    ways = []
    for half in (halves, ~halves):
        other = Floor(
            values[~half], [subject for subject, x in zip(about, half, strict=True) if not x]
        )
        own = [subject for subject, x in zip(about, half, strict=True) if x]
        ways.append(_Asked.of(values[half], other, known[half], own, rises).share())
    return float(np.nanmax(ways)) if not np.isnan(ways).all() else nan


def retraining_noise(retrained: ArrayLike, gap: float, default: float) -> float:
    """By how much a share differs when the model is another retrained one: a standard deviation.

    - `retrained`: the values of k retrained models under one attack, `Float64[model, item]`.
    - `gap`: by how much the original differs from their mean, which a share is a share of.
    - `default`: the noise of one retrained model's share, as it is stated for this attack.

    With the variance s^2 of one model's mean beside what its items vary by (the component of a
    two-way analysis of variance, at least 0), the variance of a mean over k models and of one more
    is

        (2 default^2 + (k - 1) s^2 / gap^2) / (k + 1) (1 + 1 / k)

    >>> round(retraining_noise([[4.0, 4.0]], 4.0, 0.04), 4)
    0.0566
    >>> round(retraining_noise([[3.0, 3.0], [5.0, 5.0]], 4.0, 0.04), 4)
    0.2532
    """
    values = _floats(retrained)
    values = values[:, ~np.isnan(values).any(axis=0)]
    count, items = values.shape
    variance = default**2
    if count > 1 and items and gap:
        means = values.mean(axis=1)
        own = float(means.var(ddof=1))
        if items > 1:
            rest = values - values.mean(axis=0) - means[:, None] + values.mean()
            own -= float((rest**2).sum()) / ((count - 1) * (items - 1)) / items
        spread = max(0.0, own) / gap**2
        variance = (ALIKE * variance + (count - 1) * spread) / (ALIKE + count - 1)
    return sqrt(variance * (1 + 1 / count))


def widened(share: Share, noise: float) -> Share:
    """The share with the bounds of items and of a noise that is independent of them.

    >>> widened(Share(0.5, 0.2, 0.8, 20), 0.4 / REACH)
    Share(value=0.5, low=0.0, high=1.0, n=20, floor_estimated=False)
    """
    reach = REACH * noise
    low = share.value - hypot(share.value - share.low, reach)
    high = share.value + hypot(share.high - share.value, reach)
    return replace(share, low=low, high=high)


@dataclass(frozen=True)
class _Asked:
    """The values of one attack, of the items that have one of every model; larger is known."""

    unlearned: Floats
    floor: Floats
    original: Floats
    subjects: Sequence[str]
    floor_subjects: Sequence[str] | None

    @classmethod
    def of(
        cls,
        unlearned: ArrayLike,
        floor: Floor | ArrayLike,
        original: ArrayLike,
        subjects: Sequence[str],
        rises: bool,
    ) -> "_Asked":
        given = floor if isinstance(floor, Floor) else Floor(floor)
        sign = 1.0 if rises else -1.0
        own = {"unlearned": _floats(unlearned), "original": _floats(original)}
        other = _floats(given.values)
        if given.subjects is None:
            own["floor"] = other
        for name, values in own.items():
            _check(name, values, subjects, "subjects")
        there = ~np.isnan(sum(own.values()))
        kept = {name: sign * values[there] for name, values in own.items()}
        about = [subject for subject, x in zip(subjects, there, strict=True) if x]
        if given.subjects is None:
            return cls(kept["unlearned"], kept["floor"], kept["original"], about, None)
        _check("floor", other, given.subjects, "subjects of the floor")
        told = ~np.isnan(other)
        beside = [subject for subject, x in zip(given.subjects, told, strict=True) if x]
        return cls(kept["unlearned"], sign * other[told], kept["original"], about, beside)

    @property
    def n(self) -> int:
        return len(self.unlearned)

    @property
    def estimated(self) -> bool:
        return self.floor_subjects is not None

    def share(self) -> float:
        """The share itself; NaN without items, or where the original shows no more."""
        if not self.n or not len(self.floor):
            return nan
        u, g, o = (float(x.mean()) for x in (self.unlearned, self.floor, self.original))
        return float((u - g) / (o - g)) if o > g else nan

    def drawn(self, draws: int, seed: int) -> Floats:
        """The share of each draw; NaN where it is undefined."""
        weights = resamples(units_of(self.subjects), draws, seed)
        beside = weights
        if self.floor_subjects is not None:
            # Other items: drawn by themselves, by numbers of their own.
            beside = resamples(units_of(self.floor_subjects), draws, seed + 1)
        u, o = (resampled_means(x, weights) for x in (self.unlearned, self.original))
        g = resampled_means(self.floor, beside)
        shares: Floats = np.full(draws, nan)
        np.divide(u - g, o - g, out=shares, where=o > g)
        return shares


def _bounds(drawn: Floats) -> tuple[float, float]:
    """The bounds of 95 % of the draws, of which undefined ones lie beyond both."""
    undefined = np.isnan(drawn)
    if not undefined.any():
        low, high = np.percentile(drawn, LIMITS)
        return float(low), float(high)
    low = np.percentile(np.where(undefined, -np.inf, drawn), LIMITS[0], method="lower")
    high = np.percentile(np.where(undefined, np.inf, drawn), LIMITS[1], method="higher")
    return (nan, nan) if isinf(low) or isinf(high) else (float(low), float(high))


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


def _floats(values: ArrayLike) -> Floats:
    return np.asarray(values, dtype=np.float64)


def _check(name: str, values: Floats, others: Sequence[str], what: str) -> None:
    if values.shape != (len(others),):
        raise ValueError(
            f"`{name}` should have a value for each of the {len(others)} {what}. Found the shape "
            f"{values.shape}. Give NaN where an item has none."
        )
    if np.isinf(values).any():
        raise ValueError(
            f"`{name}` should be finite, or NaN where an item has no value. Found infinity. Look "
            "at the logits of that model: some are infinite."
        )


def _check_same(unlearned: Mapping[str, ArrayLike], floor: Mapping[str, object]) -> None:
    if not unlearned or unlearned.keys() != floor.keys():
        alone = ", ".join(map(repr, sorted(unlearned.keys() ^ floor.keys()))) or "none"
        raise ValueError(
            "`unlearned` and `floor` should be under the same attacks, one or more. Found "
            f"{alone} in one alone. Attack both models in the same way."
        )
