"""What a rectifier did at every step, and what the optimizer made of it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from geffect.gram import cosine, inner, norm
from geffect.groups import By, label_of
from geffect.notes import OfArgument
from geffect.scores import COSINE, PER_RATE, PER_TOKEN, YES_OR_NO, Score, stack, tidy
from geffect.sources import RETAIN, UPDATE, average_of
from geffect.store import Run

from .base import Floats, check_run, column_of, in_space, summed_gram
from .rectified import own_level, protected
from .violation import SCORE as VIOLATION
from .violation import rounding, tolerance, violates

Numbers = Mapping[str, Floats]
"""What a rectifier reported, by the name of the number: arrays (step, block of the rectifier)."""

Indices = Sequence[Sequence[int]]
"""For each block of the table the blocks of the rectifier that it consists of."""

_ALONG = "with the retain average"

SCORES = {
    "fired": Score("steps that the rectifier changed", YES_OR_NO),
    "inner_before": Score(f"inner product {_ALONG} before rectification", PER_RATE),
    "inner_after": Score(f"inner product {_ALONG} after rectification", PER_RATE),
    "cosine_before": Score(f"cosine {_ALONG} before rectification", COSINE),
    "cosine_after": Score(f"cosine {_ALONG} after rectification", COSINE),
    "coefficient": Score("multiple of the retain average that was added"),
    "removed": Score("share of the squared length that was removed"),
    "retain_norm": Score("length of the retain average"),
    "applied_average": Score("fall of the risk along the retain average", PER_TOKEN),
    "applied_fresh": Score("fall of the risk along the retain gradient", PER_TOKEN),
    "cosine_applied": Score(f"cosine of the applied step {_ALONG}", COSINE),
    "violated": VIOLATION,
    "unmet": Score("steps that are not what the rule promises", YES_OR_NO),
    "selected": Score("share of coordinates that the mask keeps"),
    "overlap": Score("Jaccard overlap of the mask with that of the step before"),
}
"""What each quantity is. Inner products of a step, in update space, are nats per token."""


def rectification(run: Run, by: By = "model") -> pd.DataFrame:
    """How a step stood to what should stay: as it came, as it was rectified, and as it was applied.

    u is what was rectified: the gradient, or in update space the step, theta before minus theta
    after. x is what was left of it. r is the running average of the retain gradient. The rule GRU
    makes x = u + kappa r with kappa = max(0, -<u, r>) / |r|^2 (arXiv 2503.09117). A product with r
    says by how much the retain risk falls, to first order: negative is harm. The quantities:

    - fired: 1 where u was changed, else 0.
    - inner_before, inner_after: <u, r> and <x, r>, in nats per unit of learning rate as a G-effect,
      or in nats per token in update space.
    - cosine_before, cosine_after: the same over both lengths, from -1 to 1.
    - coefficient: kappa. NaN for several blocks together, and where no multiple of r was added.
    - removed: 1 - |x|^2 / |u|^2, the share of u's energy that is gone; negative where it grew.
    - retain_norm: |r|.
    - applied_average, applied_fresh: <theta before - theta after, .> with r, and with the retain
      gradient of the step itself; in nats per token. The second is the `predicted_change`.
    - cosine_applied: applied_average over both lengths, from -1 to 1.
    - violated: 1 where the applied update opposes r beyond rounding, else 0, as in `violation`.
    - unmet: 1 where the rule could not keep what it promises, as a gain of `hamu` that takes too
      long a step, else 0.
    - selected: the share of the coordinates that a mask keeps. This one and the next stand in the
      table where the selection tells of its masks, as `SaliencyMask` does.
    - overlap: |m & m'| / |m | m'| of the mask and m', that of the step before.

    Columns: step, `by`, against (the retain set), quantity, value, score, unit. Blocks are those of
    the rectifier or larger ones; products and squares are summed over them. Values are NaN where a
    gradient is zero or nothing moved. A step that was left alone has not fired, and has only what
    the update did. That needs Recorder(..., update=True) or a rectifier with measure_update=True;
    the latter has no `cosine_applied` in gradient space. Raises a ValueError for smaller blocks and
    for a run without a rectifier.

    >>> table = rectification(example_run(rectified=True))
    >>> table[["step", "model", "against", "quantity", "value"]].iloc[[3, 4, 6, 11]]
        step  model against       quantity  value
    3      0  model  retain  cosine_before  -0.50
    4      0  model  retain   cosine_after   0.00
    6      0  model  retain        removed   0.25
    11     0  model  retain       violated   0.00
    """
    check_run(run)
    names, numbers = run.rectification()
    sets = protected(run) or [RETAIN]
    blocks, K = summed_gram(run, by)
    parts = _parts(run, names, by)
    by_set = {}
    for against in sets:
        indices = [
            [names.index(_name(part, against, sets)) for part in parts[block]] for block in blocks
        ]
        by_set[against] = {
            **_reported(numbers, indices),
            **_applied(run, K, against, _rounded(run, by, against), numbers, indices),
            "unmet": _anywhere(numbers["unmet"], indices),
            **_masks(numbers, indices),
        }
    tables = {
        quantity: stack(
            {
                against: tidy(
                    values[quantity],
                    in_space(run, _score(run, quantity)),
                    steps=run.steps,
                    blocks=blocks,
                    by=column_of(by),
                )
                for against, values in by_set.items()
            },
            "against",
        )
        for quantity in by_set[sets[0]]
    }
    return stack(tables, "quantity")


def _reported(numbers: Numbers, indices: Indices) -> dict[str, Floats]:
    """What the rectifier said of u, x and r."""
    before, after = _gram(numbers, "before", indices), _gram(numbers, "after", indices)
    coefficient = numbers["coefficient"]
    energy = inner(before, 0, 0)
    return {
        "fired": _anywhere(numbers["fired"], indices),
        "inner_before": inner(before, 0, 1),
        "inner_after": inner(after, 0, 1),
        "cosine_before": cosine(before, 0, 1),
        "cosine_after": cosine(after, 0, 1),
        "coefficient": np.stack(
            [
                coefficient[:, own].sum(axis=1) * (1.0 if len(own) == 1 else np.nan)
                for own in indices
            ],
            axis=1,
        ),
        "removed": 1 - inner(after, 0, 0) / np.where(energy > 0, energy, np.nan),
        "retain_norm": norm(before, 1),
    }


def _score(run: Run, quantity: str) -> Score:
    score = SCORES[quantity]
    return replace(score, unit=PER_TOKEN) if _is_step(run) and score.unit == PER_RATE else score


def _is_step(run: Run) -> bool:
    """Whether what was rectified is the optimizer's own step."""
    return (run.manifest["rectifier"] or {}).get("space") == "update"


def _rounded(run: Run, by: By, against: str) -> Floats:
    """By how much the rounding of parameters may change a product with the average."""
    return rounding(run, by, against) if average_of(against) in run.sources else np.zeros((1, 1))


def _applied(
    run: Run, K: Floats, against: str, rounded: Floats, numbers: Numbers, indices: Indices
) -> dict[str, Floats]:
    """What the update did: read off the Gram matrices, or else as the rectifier followed it."""
    if not {UPDATE, average_of(against), against} <= {*run.sources}:
        return _followed(run, rounded, numbers, indices)
    update, average, fresh = map(run.index, (UPDATE, average_of(against), against))
    along = -cosine(K, update, average)
    return {
        "applied_average": -inner(K, update, average),
        "applied_fresh": -inner(K, update, fresh),
        "cosine_applied": along,
        "violated": violates(-along, tolerance(norm(K, update) * norm(K, average), rounded)),
    }


def _followed(run: Run, rounded: Floats, numbers: Numbers, indices: Indices) -> dict[str, Floats]:
    """The same without the length of the update, which is not reported.

    In update space it is |x|. In gradient space rounding is told from harm by the length of a step
    of gradient descent, lr |x|: after no other step does a rectified gradient keep its constraint.
    """
    average, fresh = (_summed(numbers[f"applied_{kind}"], indices) for kind in ("average", "fresh"))
    after = _gram(numbers, "after", indices)
    rate = 1.0 if _is_step(run) else run.column("lr")[:, np.newaxis]
    with np.errstate(invalid="ignore", divide="ignore"):
        along = average / (rate * norm(after, 0)) / norm(after, 1)
    return {
        "applied_average": average,
        "applied_fresh": fresh,
        "cosine_applied": along if _is_step(run) else np.full_like(along, np.nan),
        "violated": violates(-along, tolerance(rate * norm(after, 0) * norm(after, 1), rounded)),
    }


def _gram(numbers: Numbers, when: str, indices: Indices) -> Floats:
    """The Gram matrices of what was rectified and r, an array (step, block, 2, 2)."""
    product = numbers[f"inner_{when}"]
    squares = numbers[f"norm_{when}"] ** 2, numbers["retain_norm"] ** 2
    K = np.stack([squares[0], product, product, squares[1]], axis=-1)
    return _summed(K.reshape(*product.shape, 2, 2), indices)


def _anywhere(marks: Floats, indices: Indices) -> Floats:
    """1 where one of the blocks is marked."""
    return np.stack([marks[:, own].max(axis=1) for own in indices], axis=1)


def _masks(numbers: Numbers, indices: Indices) -> dict[str, Floats]:
    """What masks keep, and what they have in common; nothing in a run that is not told of them."""
    if not np.isfinite(numbers["among"]).any():
        return {}
    return {
        "selected": _share(numbers, "selected", "among", indices),
        "overlap": _share(numbers, "selected_again", "selected_either", indices),
    }


def _share(numbers: Numbers, part: str, whole: str, indices: Indices) -> Floats:
    """One count over another, each added up over blocks; NaN over none."""
    over = _summed(numbers[whole], indices)
    return _summed(numbers[part], indices) / np.where(over > 0, over, np.nan)


def _summed(values: Floats, indices: Indices) -> Floats:
    return np.stack([values[:, own].sum(axis=1) for own in indices], axis=1)


def _name(part: str, against: str, sets: Sequence[str]) -> str:
    """What a block of the rectifier is called in the run."""
    return part if len(sets) == 1 else f"{part}, {against}"


def _parts(run: Run, names: Sequence[str], by: By) -> dict[str, list[str]]:
    """The blocks of the rectifier that every block consists of."""
    block_of: dict[str, str] = {}
    for part, block in zip(_own_blocks(run, names), map(label_of(by), run.layers), strict=True):
        if block_of.setdefault(part, block) != block:
            raise OfArgument(
                "by",
                "keep the blocks of the rectifier whole: it has one number for all of "
                f"`{part}`. Found `{block_of[part]}` and `{block}` in it.",
                "model",
            )
    parts: dict[str, list[str]] = {}
    for part, block in block_of.items():
        parts.setdefault(block, []).append(part)
    return parts


def _own_blocks(run: Run, names: Sequence[str]) -> list[str]:
    """The block of the rectifier that each parameter belongs to."""
    level = own_level(run)
    if level is not None:
        return [*map(label_of(level), run.layers)]
    raise ValueError(
        f"The blocks of the rectifier should be the parameters, layers or groups of the model, or "
        f"the model. Found {', '.join(names)} in `{run.path}`. Read the numbers of other blocks "
        "with run.rectification()."
    )
