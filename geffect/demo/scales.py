"""G-effects on scales that methods and edits share, whatever their loss is a sum or a mean of."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from geffect import open_run
from geffect.analysis.base import summed_gram
from geffect.gram import cosine, inner, norm
from geffect.sources import FORGET, OBJECTIVE, RETAIN, UPDATE

Floats = NDArray[np.float64]

HARMLESS = 1e-3
"""Nats per token: what is lost over less damage than that has no ratio."""

SCALES = {
    "cosine": "cos(risk, objective)",
    "per_length": "e / length of the objective's gradient",
    "of_updates": "e of the applied updates, summed",
}
"""What is taken of each risk, by name, in words."""

REMOVED = "removal_per_damage"


def on_common_scales(path: Path, until: float | None = None) -> dict[str, float | None]:
    """The G-effects of a run of the model, up to a step, on scales that objectives share.

    e = <grad R, grad L_u> of the risk R and the loss L_u that is minimised compares within one
    objective alone. On these scales it compares between all; the part of a step before `until`
    counts as that part:

    - `cosine_R`: e / (|grad R| |grad L_u|), the mean over steps.
    - `per_length_R`: e / |grad L_u|, in nats per token and unit of length, the mean over steps.
    - `of_updates_R`: -<grad R, D> of the update D that was applied, in nats per token: by how much
      the risk falls, to first order, all steps together.
    - `removal_per_damage`: by how much the forget risk rises so over how much the retain risk
      changes; None where that is less than a thousandth.

    R is `forget` or `retain`. None stands for what is not defined, as an angle of zero gradients.
    """
    run = open_run(path)
    K = summed_gram(run, "model")[1][:, 0]
    steps = np.arange(len(K))
    share = np.ones(len(K)) if until is None else np.clip(until - steps, 0.0, 1.0)
    objective, update = run.index(OBJECTIVE), run.index(UPDATE)
    length: Floats = norm(K, objective)
    found: dict[str, float | None] = {}
    fallen: dict[str, float] = {}
    for risk in (FORGET, RETAIN):
        at = run.index(risk)
        with np.errstate(invalid="ignore", divide="ignore"):
            per_length = inner(K, at, objective) / length
        found[f"cosine_{risk}"] = _mean(cosine(K, at, objective), share)
        found[f"per_length_{risk}"] = _mean(per_length, share)
        fallen[risk] = found[f"of_updates_{risk}"] = float(np.nansum(-inner(K, at, update) * share))
    harm = abs(fallen[RETAIN])
    found[REMOVED] = -fallen[FORGET] / harm if harm >= HARMLESS else None
    return found


def _mean(values: Floats, share: Floats) -> float | None:
    """The mean of those that are defined, each by its share."""
    known = np.isfinite(values) & (share > 0)
    return float(np.average(values[known], weights=share[known])) if known.any() else None
