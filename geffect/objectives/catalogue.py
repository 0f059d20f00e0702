"""The catalogue: objectives by the names that people type, each with its default options."""

from collections.abc import Mapping
from typing import Any

from geffect.near import meant

from .base import Objective
from .combination import Combination
from .likelihood import GradientAscent, WeightedGradientAscent
from .options import with_options
from .preference import NPO, TNPO, WTNPO
from .retain import GradDiff
from .simnpo import SimNPO

CATALOGUE: Mapping[str, Objective] = {
    "ga": GradientAscent(),
    "wga": WeightedGradientAscent(),
    "npo": NPO(),
    "tnpo": TNPO(),
    "wtnpo": WTNPO(),
    "graddiff": GradDiff(),
    "npo+gd": GradDiff(NPO()),
    "simnpo": SimNPO(),
}


def named(name: str, options: Mapping[str, Any] | None = None) -> Objective:
    """The objective of a name, with other values of some of its options.

    >>> named("npo+gd", {"beta": 0.5})
    GradDiff(forget=NPO(beta=0.5), weight=1.0)
    """
    if name not in CATALOGUE:
        raise ValueError(
            f"`objective` should be one of {', '.join(CATALOGUE)}. Found `{name}`."
            f"{meant(name, CATALOGUE)} Choose one of those."
        )
    return with_options(CATALOGUE[name], options or {})


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
