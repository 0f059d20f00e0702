"""The catalogue: objectives by the names that people type, each with its default options."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from geffect.near import meant

from .acquisition import SKU, SSUAcquire
from .base import Objective
from .ceu import CEU
from .combination import Combination
from .control import CappedAscent, LikelihoodControl, LowestLossAscent, TemperedAscent
from .dpo import DPO
from .kl import KL
from .labels import AdversarialLabels, RandomLabels
from .likelihood import GradientAscent, WeightedGradientAscent
from .options import options_of, with_options
from .pdu import PDU
from .po import PO
from .preference import NPO, TNPO, WTNPO
from .proxy_kl import ProxyKL
from .retain import GradDiff, Regularised
from .rmu import RMU
from .rr import RR
from .satimp import SatImp
from .simnpo import SimNPO
from .undial import UNDIAL

CATALOGUE: Mapping[str, Objective] = {
    "ga": GradientAscent(),
    "wga": WeightedGradientAscent(),
    "npo": NPO(),
    "tnpo": TNPO(),
    "wtnpo": WTNPO(),
    "graddiff": GradDiff(),
    "simnpo": SimNPO(),
    "rmu": RMU(),
    "pdu": PDU(),
    "random-labels": RandomLabels(),
    "adversarial-labels": AdversarialLabels(),
    "po": PO(),
    "dpo": DPO(),
    "idk-dpo": DPO(),
    "undial": UNDIAL(),
    "satimp": SatImp(),
    "ceu": CEU(),
    "likelihood-control": LikelihoodControl(),
    "ga-capped": CappedAscent(),
    "ga-temperature": TemperedAscent(),
    "ga-lowest": LowestLossAscent(),
    "ssu-acquire": SSUAcquire(),
    "sku": SKU(),
}
"""Objectives by name."""

REGULARISERS: Mapping[str, Regularised] = {
    "gd": GradDiff(),
    "kl": Regularised(GradientAscent(), KL()),
    "rr": Regularised(GradientAscent(), RR()),
    "proxy-kl": Regularised(GradientAscent(), ProxyKL()),
}
"""Regularisers by name, each beside GA: any objective may take its place, `npo+kl`."""


def named(name: str, options: Mapping[str, Any] | None = None) -> Objective:
    """The objective of a name, with other values of some of its options.

    A name of the catalogue alone, or with one of the regularisers behind it.

    >>> named("npo+gd", {"beta": 0.5})
    GradDiff(forget=NPO(beta=0.5), weight=1.0)
    >>> named("npo+kl", {"weight": 20.0})
    Regularised(forget=NPO(beta=0.1), regulariser=KL(legacy_kl=False), weight=20.0)
    """
    if name not in names():
        raise ValueError(
            f"`objective` should be one of {spelt()}. Found `{name}`.{probable(name)} Choose one "
            "of those."
        )
    forget, plus, regulariser = name.partition("+")
    objective = CATALOGUE[forget]
    if plus:
        _check_apart(forget, regulariser)
        objective = replace(REGULARISERS[regulariser], forget=objective)
    return with_options(objective, options or {})


def names() -> list[str]:
    """All names: those of the catalogue, alone and with each regulariser.

    >>> "npo+kl" in names(), "kl" in names(), "npo+gd+kl" in names()
    (True, False, False)
    """
    return [*CATALOGUE, *(f"{name}+{added}" for name in CATALOGUE for added in REGULARISERS)]


CALLED = {"idk": "po", "altpo": "dpo"}
"""What else objectives are called, for their data."""


def probable(name: str) -> str:
    """A question that names the objective that was probably meant; empty where none is near.

    >>> probable("idk"), probable("simnop"), probable("magic")
    (' Did you mean `po`?', ' Did you mean `simnpo`?', '')
    """
    return meant(CALLED.get(name.lower(), name), names())


def spelt() -> str:
    """The names that there are, for errors and help texts."""
    *some, last = (f"+{name}" for name in REGULARISERS)
    return f"{', '.join(CATALOGUE)}, alone or with {', '.join(some)} or {last} behind it"


def _check_apart(forget: str, regulariser: str) -> None:
    """Refuse a regulariser beside an objective that has one of its own."""
    objective, added = CATALOGUE[forget], REGULARISERS[regulariser]
    twice = {"weight", *options_of(added.regulariser)} & options_of(objective).keys()
    twice |= objective.reductions.keys() & added.regulariser.reductions.keys()
    if twice:
        raise ValueError(
            f"`objective` should be without a part of its own for `{', '.join(sorted(twice))}` "
            f"where +{regulariser} is added. Found `{forget}`, {objective!r}. Choose another one, "
            f"such as ga+{regulariser}; or make a Regularised of geffect.objectives with other "
            "parts."
        )


def as_objective(given: Objective | Mapping[str, float] | str) -> Objective:
    """The objective that is meant: one as it is, weights of risks, or a name of the catalogue.

    >>> as_objective({"forget": -1.0, "retain": 1.0})
    Combination(weights={'forget': -1.0, 'retain': 1.0})
    >>> as_objective("wga")
    WeightedGradientAscent(alpha=1.0)
    """
    if isinstance(given, Objective):
        return given
    if isinstance(given, str):
        return named(given)
    if isinstance(given, Mapping):
        return Combination(dict(given))
    raise TypeError(
        "`objective` should be an Objective, weights of risks, or a name of the catalogue. Found "
        f'`{type(given).__name__}`. Pass, say, NPO(beta=0.1), {{"forget": -1.0}} or "npo".'
    )
