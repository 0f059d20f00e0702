"""Settings: the objective of a run, its regulariser and its options, as a figure names them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from geffect.numbers import is_whole
from geffect.sources import FORGET, OBJECTIVE, RETAIN
from geffect.store import Run

from .base import check_run
from .rectified import acts

SHORT = {
    "GradientAscent": "GA",
    "WeightedGradientAscent": "WGA",
    "GradientDescent": "GD",
    "ProxyKL": "proxy KL",
}
"""The names of the papers, where a class has another."""

ASCENT, DESCENT = SHORT["GradientAscent"], SHORT["GradientDescent"]


@dataclass(frozen=True)
class Setting:
    """What a run minimised.

    - `objective`: the part on the forget data, such as "NPO"; None where the file does not say.
    - `regulariser`: the part on the retain data, such as "KL"; None without one.
    - `options`: of both parts, by name.
    - `rectified`: whether a rectifier changed its steps.
    - `seed`: that of the metadata; None where they have none.
    """

    objective: str | None
    regulariser: str | None
    options: Mapping[str, Any]
    rectified: bool
    seed: int | None

    @property
    def name(self) -> str:
        """Both parts in words; "unknown" where the file does not say.

        >>> Setting("NPO", "KL", {"beta": 0.1}, rectified=False, seed=None).name
        'NPO + KL'
        """
        return " + ".join(filter(None, [self.objective or "unknown", self.regulariser]))


def setting(run: Run) -> Setting:
    """The setting of a run, from what its file says of its objective.

    A run that was recorded without an objective of geffect has that of its losses: an ascent on the
    forget risk is GA, with a descent on the retain risk GA + GD, and any other loss is unknown.

    >>> setting(example_run()).name
    'unknown'
    """
    check_run(run)
    seed = run.metadata.get("seed")
    objective, regulariser, options = _parts(run)
    return Setting(
        objective,
        regulariser,
        options,
        rectified=acts(run),
        seed=seed if is_whole(seed) else None,
    )


def _parts(run: Run) -> tuple[str | None, str | None, Mapping[str, Any]]:
    told = run.manifest.get("objective")
    if told is None:
        return _of_risks((run.manifest.get("losses") or {}).get(OBJECTIVE))
    name, options = told["name"], told["options"]
    if isinstance(forget := options.get("forget"), Mapping):
        added = options.get("regulariser", {"name": "GradientDescent", "options": {}})
        rest = {n: value for n, value in options.items() if n not in ("forget", "regulariser")}
        return (
            _short(forget["name"]),
            _short(added["name"]),
            {**forget["options"], **added["options"], **rest},
        )
    if name == "Combination":
        return _of_risks(told.get("risks"))
    return _short(name), None, options


def _of_risks(weights: object) -> tuple[str | None, str | None, Mapping[str, Any]]:
    """The parts of a combination of risks."""
    if not isinstance(weights, Mapping) or not {*weights} <= {FORGET, RETAIN}:
        return None, None, {}
    forget, retain = weights.get(FORGET, 0.0), weights.get(RETAIN, 0.0)
    if not forget < 0 <= retain:
        return None, None, {}
    return (ASCENT, DESCENT, {"weight": -retain / forget}) if retain else (ASCENT, None, {})


def _short(name: str) -> str:
    return SHORT.get(name, name)
