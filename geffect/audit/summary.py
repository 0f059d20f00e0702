"""From the values of items to the table of an audit: means, shares, and differences of AUC."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import exp, isnan, nan

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from geffect.evaluation.membership import Scores, auc, membership
from geffect.evaluation.resampling import resamples
from geffect.evaluation.utility import kept_share

from .attacks import DEPTH, HIDDEN, LENS, PATCHED, Baseline, baseline
from .batteries import PARAPHRASED, TOKEN_NLL
from .depth import unlearning_depth
from .models import ORIGINAL, RETRAINED, UNLEARNED, retrained_roles
from .prompts import ROUGE
from .sets import FORGET, HOLDOUT, KEPT
from .shares import (
    REACH,
    Floor,
    Share,
    noise_level,
    recoverable_share,
    retraining_noise,
    widened,
)
from .table import SUMMED, interval, parts_of, resampled_means, summed, units_of
from .thresholds import Thresholds
from .verdict import (
    DIFFERENCE,
    DIRECT,
    GAINED,
    KEPT_SHARE,
    KNOWN,
    MEMORISED,
    NLL,
    PRIVACY,
    PRIVLEAK,
    RECOVERABLE,
    TOLD_APART,
    UNTOLD,
    UTILITY,
)

DIRECTLY = ("prob", "es", "em", ROUGE, PARAPHRASED)
"""The metrics of what a model says when asked; all rise with what it knows."""

OF_ALL = " of all"
"""Where the original shows no more than the floor: the share is of a perfect answer."""

PRIVLEAK_OF = f"{PRIVLEAK} "

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Values:
    """The values of items by battery, metric, set and model, in the order of the items."""

    by_key: Mapping[tuple[str, str, str, str], Floats]
    subjects: Mapping[tuple[str, str], Sequence[str]]

    @classmethod
    def of(cls, items: pd.DataFrame) -> "Values":
        """Those of a table of items."""
        by_key: dict[tuple[str, str, str, str], Floats] = {}
        subjects: dict[tuple[str, str], list[str]] = {}
        for (battery, metric, of, model), values, asked in parts_of(items):
            by_key[battery, metric, of, model] = values
            subjects.setdefault((battery, of), asked)
        return cls(by_key, subjects)

    def get(self, battery: str, metric: str, of: str, model: str) -> Floats | None:
        """The values of one metric; None where it was not measured."""
        return self.by_key.get((battery, metric, of, model))

    def metrics(self, battery: str, model: str, of: str = FORGET) -> list[str]:
        """What was measured of a model on a set, in that order."""
        return [m for b, m, s, role in self.by_key if (b, s, role) == (battery, of, model)]

    @property
    def roles(self) -> tuple[str, ...]:
        """The retrained models, each by itself: of several not their mean."""
        there = {role for *_, role in self.by_key if role.startswith(RETRAINED)}
        return retrained_roles(max(1, len(there) - 1)) if there else ()

    def retrained(self, battery: str, metric: str) -> list[Floats]:
        """The values of each retrained model that has some."""
        found = [self.get(battery, metric, FORGET, role) for role in self.roles]
        return [values for values in found if values is not None]

    def floor(self, battery: str, metric: str) -> Floor | None:
        """What a model that never knew shows: the retrained one, or the original on the holdout."""
        measured = self.get(battery, metric, FORGET, RETRAINED)
        if measured is not None:
            return Floor(measured)
        if any(model == RETRAINED for *_, model in self.by_key):
            return None  # it was not measured on the model that is there
        measured = self.get(battery, metric, HOLDOUT, ORIGINAL)
        return None if measured is None else Floor(measured, self.subjects[battery, HOLDOUT])


def table_of(items: pd.DataFrame, limits: Thresholds) -> pd.DataFrame:
    """The table of an audit, `battery, metric, set, model, value, low, high, n`, from its items.

    - `limits`: say how much models that were retrained from different seeds differ. The intervals
      of shares and of differences of AUC hold that.

    Means of all that was measured, and behind them what is judged: kept shares, what the original
    knows beyond a model that never knew, direct shares, recoverable shares, differences of AUC. The
    recoverable shares of the retrained model (of the original, where the floor is estimated) are
    noise: of a half of the items beside the other.
    """
    values, means = Values.of(items), summed(items)
    made = [
        *_kept(values),
        *_perplexity(means),
        *_known(values),
        *_direct(values, limits),
        *_recoverable(values, limits),
        *_aucs(values, limits.retraining_auc),
        *_depth(values),
    ]
    return pd.concat([means, pd.DataFrame(made, columns=[*SUMMED])], ignore_index=True)


Row = tuple[str, str, str, str, float, float, float, int]


def _row(battery: str, metric: str, model: str, share: Share, of: str = FORGET) -> Row:
    return battery, metric, of, model, share.value, share.low, share.high, share.n


def _kept(values: Values) -> Iterator[Row]:
    """ES of a model over that of the original, of each retained set."""
    for of in KEPT:
        before = values.get(UTILITY, "es", of, ORIGINAL)
        for model in (RETRAINED, UNLEARNED):
            after = values.get(UTILITY, "es", of, model)
            if before is None or after is None:
                continue
            weights = resamples(units_of(values.subjects[UTILITY, of]))
            drawn = _ratio(resampled_means(after, weights), resampled_means(before, weights))
            n = _count(after + before)
            low, high = interval(drawn) if n > 1 else (nan, nan)
            share = Share(kept_share(after, before), low, high, n)
            yield _row(UTILITY, KEPT_SHARE, model, share, of)


def _perplexity(means: pd.DataFrame) -> Iterator[Row]:
    """exp of the NLL of a token of running text."""
    for row in means[means["metric"] == TOKEN_NLL].to_dict("records"):
        value, low, high = (exp(row[column]) for column in ("value", "low", "high"))
        share = Share(value, low, high, int(row["n"]))
        yield _row(UTILITY, "perplexity", str(row["model"]), share, str(row["set"]))


def _ratio(after: Floats, before: Floats) -> Floats:
    found: Floats = np.full(len(after), nan)
    np.divide(after, before, out=found, where=before > 0)
    return found


def _known(values: Values) -> Iterator[Row]:
    """What the original shows, asked directly, beyond a model that never knew; NLL in nats."""
    for metric in (NLL, *DIRECTLY):
        known = values.get(MEMORISED, metric, FORGET, ORIGINAL)
        floor = values.floor(MEMORISED, metric)
        if known is not None and floor is not None:
            gap = _mean(known) - _mean(floor.values)
            n = int((~np.isnan(known)).sum())
            yield _row(KNOWN, metric, ORIGINAL, Share(-gap if metric == NLL else gap, nan, nan, n))


def _direct(values: Values, limits: Thresholds) -> Iterator[Row]:
    for metric in DIRECTLY:
        known = values.get(MEMORISED, metric, FORGET, ORIGINAL)
        floor = values.floor(MEMORISED, metric)
        if known is None or floor is None:
            continue
        name, never = metric, _mean(floor.values)
        if not _mean(known) - never >= TOLD_APART:
            known, name = np.ones_like(known), metric + OF_ALL
        own = values.get(MEMORISED, metric, FORGET, UNLEARNED)
        if own is None or not _mean(known) - never >= TOLD_APART:  # nothing is left to be shared
            continue
        share = recoverable_share(own, floor, known, values.subjects[MEMORISED, FORGET], rises=True)
        noise = _noise(values, (MEMORISED, metric), known, limits.noise_of(metric))
        yield _row(DIRECT, name, UNLEARNED, widened(share, noise))


def _recoverable(values: Values, limits: Thresholds) -> Iterator[Row]:
    there: dict[Baseline, float | None] = {}
    for attack in values.metrics(HIDDEN, UNLEARNED):
        beside, floor = baseline(attack), values.floor(HIDDEN, attack)
        own = values.get(HIDDEN, attack, FORGET, UNLEARNED)
        if beside is None or floor is None or own is None:
            continue
        known = values.get(beside.battery, beside.metric, FORGET, ORIGINAL)
        plain = values.floor(beside.battery, beside.metric)
        if known is None or plain is None:
            continue
        subjects = values.subjects[HIDDEN, FORGET]
        share = recoverable_share(own, floor, known, subjects, rises=beside.rises)
        # Retrained models differ by as much as without an attack, where more is left to know.
        gap, left = (abs(_mean(known) - _mean(of.values)) for of in (plain, floor))
        stated = limits.noise_of(beside.metric) * (gap / left if left else nan)
        noise = _noise(values, (HIDDEN, attack), known, stated)
        share = widened(share, noise)
        is_wide = REACH * noise > limits.vague
        tells = left >= TOLD_APART and (not is_wide or limits.prove(share.value, share.low))
        yield _row(RECOVERABLE if tells else UNTOLD, attack, UNLEARNED, share)
        if beside not in there:
            there[beside] = _there(values, beside, known, plain)
        if (without := there[beside]) is not None:
            gained = Share(share.value - without, nan, nan, share.n)
            yield _row(GAINED, attack, UNLEARNED, gained)
        halves = noise_level(floor, known, subjects, rises=beside.rises)
        if tells and not isnan(halves):
            model = ORIGINAL if floor.estimated else RETRAINED
            yield _row(RECOVERABLE, attack, model, Share(halves, nan, nan, share.n))


def _there(values: Values, beside: Baseline, known: Floats, floor: Floor) -> float | None:
    """The share that is there without an attack; None where an attack is but another question."""
    own = values.get(beside.battery, beside.metric, FORGET, UNLEARNED)
    if own is None or beside.battery != MEMORISED:
        return None
    subjects = values.subjects[MEMORISED, FORGET]
    return recoverable_share(own, floor, known, subjects, rises=beside.rises).value


def _noise(values: Values, of: tuple[str, str], known: Floats, stated: float) -> float:
    """By how much a share differs between retrained models: as stated, and as those given do."""
    floor = values.floor(*of)
    assert floor is not None
    several = values.retrained(*of) or [np.asarray(floor.values, np.float64)]
    return retraining_noise(np.stack(several), _mean(known) - _mean(floor.values), stated)


def _mean(values: ArrayLike) -> float:
    given = np.asarray(values, np.float64)
    there = given[~np.isnan(given)]
    return float(there.mean()) if len(there) else nan


def _aucs(values: Values, retraining: float) -> Iterator[Row]:
    """P(score of holdout > score of forget) of each model, and how far it is from retraining."""
    for attack in values.metrics(PRIVACY, UNLEARNED):
        scores = {
            model: (Scores(forget, holdout), min(map(_count, (forget, holdout))))
            for model in (ORIGINAL, *values.roles, UNLEARNED)
            if (forget := values.get(PRIVACY, attack, FORGET, model)) is not None
            and (holdout := values.get(PRIVACY, attack, HOLDOUT, model)) is not None
        }
        aucs = {m: (auc(of.forget, of.holdout), n) for m, (of, n) in scores.items()}
        retrained = [model for model in values.roles if model in scores]
        if len(retrained) > 1:
            mean = float(np.mean([aucs[model][0] for model in retrained]))
            aucs[RETRAINED] = mean, min(aucs[model][1] for model in retrained)
        for model, (found, n) in aucs.items():
            yield _row(PRIVACY, f"AUC {attack}", model, Share(found, nan, nan, n))
        if not retrained or UNLEARNED not in scores:
            continue
        subjects = {of: units_of(values.subjects[PRIVACY, of]).tolist() for of in (FORGET, HOLDOUT)}
        beside = [
            membership(
                scores[UNLEARNED][0],
                scores[model][0],
                forget_subjects=subjects[FORGET],
                holdout_subjects=subjects[HOLDOUT],
            )
            for model in retrained
        ]
        n = min(min(found.n_forget, found.n_holdout) for found in beside)
        difference, low, high, leak = np.mean(
            [(x.difference, x.low, x.high, x.privleak) for x in beside], axis=0
        ).tolist()
        noise = retraining_noise([[x.retrained] for x in beside], 1.0, retraining)
        yield _row(DIFFERENCE, attack, UNLEARNED, widened(Share(difference, low, high, n), noise))
        yield _row(PRIVACY, PRIVLEAK_OF + attack, UNLEARNED, Share(leak, nan, nan, n))


def _count(values: Floats) -> int:
    return int((~np.isnan(values)).sum())


def _depth(values: Values) -> Iterator[Row]:
    """UDS of the unlearned model: 0 where layers have kept it all, 1 where as gone as retrained."""
    for kind, name in ((PATCHED, "UDS"), (LENS, "lens depth")):
        layers = [m for m in values.metrics(DEPTH, UNLEARNED) if m.startswith(kind)]
        of = {
            model: [x for m in layers if (x := values.get(DEPTH, m, FORGET, model)) is not None]
            for model in (RETRAINED, UNLEARNED)
        }
        if not layers or len(of[RETRAINED]) < len(layers):
            continue
        found = unlearning_depth(np.stack(of[UNLEARNED], 1), np.stack(of[RETRAINED], 1))
        mean, low, high = nan, nan, nan
        n = int((~np.isnan(found)).sum())
        if n:
            mean = float(np.nanmean(found))
        if n > 1:
            weights = resamples(units_of(values.subjects[DEPTH, FORGET]))
            low, high = interval(resampled_means(found, weights))
        yield _row(DEPTH, name, UNLEARNED, Share(mean, low, high, n))
