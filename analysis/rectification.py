"""What a rectifier did at every step, and what the optimizer made of it."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from geffect.gram import cosine, inner, norm
from geffect.scores import BLOCKS, Score, stack, tidy
from geffect.sources import AVERAGE, RETAIN, UPDATE, average_of
from geffect.store import Run

from .base import By, Floats, column_of, in_space, label_of, summed_gram
from .violation import ROUNDING

Numbers = Mapping[str, Floats]
"""What a rectifier reported, by the name of the number: arrays (step, block of the rectifier)."""

Places = Sequence[Sequence[int]]
"""For each block of the table the blocks of the rectifier that it consists of."""

SCORE = Score("rectification", "what the rectifier did")


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

    Columns: step, `by`, against (the retain set), quantity, value. Blocks are those of the
    rectifier or larger ones; products and squares are summed over them. Values are NaN where a
    gradient is zero or nothing moved. A step that was left alone has not fired, and has only what
    the update did. That needs Recorder(..., update=True) or a rectifier with measure_update=True;
    the latter has no `cosine_applied` in gradient space. Raises a ValueError for smaller blocks and
    for a run without a rectifier.

    >>> table = rectification(example_run(rectified=True))
    >>> table[table["quantity"].isin(["cosine_before", "cosine_after", "removed", "violated"])]
       step  model against       quantity  value
    3     0  model  retain  cosine_before  -0.50
    4     0  model  retain   cosine_after   0.00
    6     0  model  retain        removed   0.25
    11    0  model  retain       violated   0.00
    """
    names, numbers = run.rectification()
    sets = [source.removesuffix(AVERAGE) for source in run.sources if source.endswith(AVERAGE)]
    sets = sets or [RETAIN]
    blocks, K = summed_gram(run, by)
    parts = _parts(run, names, sets, by)
    by_set = {}
    for against in sets:
        places = [
            [names.index(_name(part, against, sets)) for part in parts[block]] for block in blocks
        ]
        by_set[against] = _reported(numbers, places) | _applied(run, K, against, numbers, places)
    tables = {
        quantity: stack(
            {
                against: tidy(
                    values[quantity],
                    in_space(run, SCORE),
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


def _reported(numbers: Numbers, places: Places) -> dict[str, Floats]:
    """What the rectifier said of u, x and r."""
    before, after = _gram(numbers, "before", places), _gram(numbers, "after", places)
    coefficient = numbers["coefficient"]
    energy = inner(before, 0, 0)
    return {
        "fired": np.stack([numbers["fired"][:, own].max(axis=1) for own in places], axis=1),
        "inner_before": inner(before, 0, 1),
        "inner_after": inner(after, 0, 1),
        "cosine_before": cosine(before, 0, 1),
        "cosine_after": cosine(after, 0, 1),
        "coefficient": np.stack(
            [
                coefficient[:, own].sum(axis=1) * (1.0 if len(own) == 1 else np.nan)
                for own in places
            ],
            axis=1,
        ),
        "removed": 1 - inner(after, 0, 0) / np.where(energy > 0, energy, np.nan),
        "retain_norm": norm(before, 1),
    }


def _applied(
    run: Run, K: Floats, against: str, numbers: Numbers, places: Places
) -> dict[str, Floats]:
    """What the update did: read off the Gram matrices, or else as the rectifier followed it."""
    if not {UPDATE, average_of(against), against} <= {*run.sources}:
        return _followed(run, numbers, places)
    update, average, fresh = map(run.index, (UPDATE, average_of(against), against))
    along = -cosine(K, update, average)
    return {
        "applied_average": -inner(K, update, average),
        "applied_fresh": -inner(K, update, fresh),
        "cosine_applied": along,
        "violated": _violated(along),
    }


def _followed(run: Run, numbers: Numbers, places: Places) -> dict[str, Floats]:
    """The same without the length of the update, which is not reported.

    In update space it is |x|. In gradient space rounding is told from harm by the length of a step
    of gradient descent, lr |x|: after no other step does a rectified gradient keep its constraint.
    """
    average, fresh = (_summed(numbers[f"applied_{kind}"], places) for kind in ("average", "fresh"))
    after = _gram(numbers, "after", places)
    in_update_space = (run.manifest["rectifier"] or {}).get("space") == "update"
    rate = 1.0 if in_update_space else run.column("lr")[:, np.newaxis]
    with np.errstate(invalid="ignore", divide="ignore"):
        along = average / (rate * norm(after, 0)) / norm(after, 1)
    return {
        "applied_average": average,
        "applied_fresh": fresh,
        "cosine_applied": along if in_update_space else np.full_like(along, np.nan),
        "violated": _violated(along),
    }


def _violated(along: Floats) -> Floats:
    return np.where(np.isnan(along), np.nan, along < -ROUNDING)


def _gram(numbers: Numbers, when: str, places: Places) -> Floats:
    """The Gram matrices of what was rectified and r, an array (step, block, 2, 2)."""
    product = numbers[f"inner_{when}"]
    squares = numbers[f"norm_{when}"] ** 2, numbers["retain_norm"] ** 2
    K = np.stack([squares[0], product, product, squares[1]], axis=-1)
    return _summed(K.reshape(*product.shape, 2, 2), places)


def _summed(values: Floats, places: Places) -> Floats:
    return np.stack([values[:, own].sum(axis=1) for own in places], axis=1)


def _name(part: str, against: str, sets: Sequence[str]) -> str:
    """What a block of the rectifier is called in the run."""
    return part if len(sets) == 1 else f"{part}, {against}"


def _parts(run: Run, names: Sequence[str], sets: Sequence[str], by: By) -> dict[str, list[str]]:
    """The blocks of the rectifier that every block consists of."""
    block_of: dict[str, str] = {}
    for part, block in zip(
        _own_blocks(run, names, sets), map(label_of(by), run.layers), strict=True
    ):
        if block_of.setdefault(part, block) != block:
            raise ValueError(
                "`by` should keep the blocks of the rectifier whole: it has one number for all of "
                f"`{part}`. Found `{block_of[part]}` and `{block}` in it. Choose larger blocks, "
                'such as by="model".'
            )
    parts: dict[str, list[str]] = {}
    for part, block in block_of.items():
        parts.setdefault(block, []).append(part)
    return parts


def _own_blocks(run: Run, names: Sequence[str], sets: Sequence[str]) -> list[str]:
    """The block of the rectifier that each parameter belongs to."""
    for scope in BLOCKS:
        own = [*map(label_of(scope), run.layers)]
        if {_name(part, against, sets) for part in own for against in sets} == {*names}:
            return own
    raise ValueError(
        f"The blocks of the rectifier should be the parameters, layers or groups of the model, or "
        f"the model. Found {', '.join(names)} in `{run.path}`. Read the numbers of other blocks "
        "with run.rectification()."
    )
