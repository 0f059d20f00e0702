"""What an edit does to each risk: the predicted fall of every block beside the measured one."""

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from geffect.gram import norm
from geffect.groups import By, label_of
from geffect.sources import UPDATE
from geffect.store import Run

from .base import check_run, column_of, summed_gram
from .predicted_change import predicted_change

RISKS, TOUCHED = "edit", "touched"
"""The tables that the run of an edit keeps: of each risk before and after, of each parameter."""

MODEL = "model"

ROUNDING = 1e-6
"""Nats per token that a difference of two losses in float32 does not tell."""


def edited(run: Run, by: By = "layer") -> pd.DataFrame:
    """What an edit does to each risk, block by block, in nats per token.

    - predicted: e_R(D) = -<grad R, D>, by how much the risk falls to first order; negative where
      it rises. Blocks add up to the model, which is the last one of each risk.
    - measured: the risk before minus the risk after, of the model alone; NaN for other blocks.
    - length: |D| of the block. touched: the part of its numbers that the edit changes.

    Columns: risk, `by`, predicted, measured, length, touched. Needs a run that `geffect.edit` or
    `geffect.record_edit` wrote.

    >>> tables = {"edit": {"risk": ["forget", "retain"], "before": np.array([1.0, 1.0]),
    ...                    "after": np.array([1.5, 1.125])},
    ...           "touched": {"parameter": ["model.layers.0.mlp.up_proj.weight"],
    ...                       "numbers": np.array([4])}}
    >>> edited(example_run(update=True, tables=tables), by="model").round(3)
         risk  model  predicted  measured  length  touched
    0  forget  model       -0.4    -0.500     0.2      1.0
    1  retain  model       -0.1    -0.125     0.2      1.0
    """
    check_run(run)
    measured = _measured(run)
    blocks, lengths = _lengths(run, by)
    touched = _touched(run, by, blocks)
    column = column_of(by)
    fallen = predicted_change(run, by)
    order = [*blocks] if column == MODEL else [*blocks, MODEL]
    rows = []
    for risk, fall in measured.items():
        own = fallen[fallen["risk"] == risk]["value"].to_numpy()
        parts = [(block, own[i], np.nan, lengths[i], touched[i]) for i, block in enumerate(blocks)]
        if column == MODEL:
            parts = []
        whole = (MODEL, own.sum(), fall, np.sqrt(np.square(lengths).sum()), touched[-1])
        rows += [(risk, *part) for part in (*parts, whole)]
    table = pd.DataFrame(
        rows, columns=["risk", column, "predicted", "measured", "length", "touched"]
    )
    table["risk"] = pd.Categorical(table["risk"], categories=[*measured], ordered=True)
    table[column] = pd.Categorical(table[column], categories=order, ordered=True)
    return table


def beyond_first_order(table: pd.DataFrame) -> list[str]:
    """A sentence for each risk of which first order leaves more than half untold.

    That is where |measured - predicted|, the share of second and higher orders, is more than half
    of the larger of the two: they differ by more than a factor of two, or in their signs.

    >>> table = pd.DataFrame({"risk": ["forget", "retain"], "predicted": [-0.1, 0.2],
    ...                       "measured": [-0.11, -0.5]})
    >>> [sentence.partition(": ")[2][:60] for sentence in beyond_first_order(table)]
    ['it predicts a fall by 0.2 nats per token, and a rise by 0.5 ']
    """
    sentences = []
    for row in table[table["measured"].notna()].to_dict("records"):
        predicted, measured = float(row["predicted"]), float(row["measured"])
        untold = abs(measured - predicted)
        if untold > max(ROUNDING, 0.5 * max(abs(measured), abs(predicted))):
            sentences.append(
                f"First order does not tell what the edit does to the {row['risk']} risk: it "
                f"predicts a {_moved(predicted)} nats per token, and a {_moved(measured)} was "
                "measured. Believe what was measured."
            )
    return sentences


def _moved(fall: float) -> str:
    return f"{'rise' if fall < 0 else 'fall'} by {abs(fall):.4g}"


def _measured(run: Run) -> dict[str, float]:
    """The measured fall of each risk."""
    if not {RISKS, TOUCHED} <= {*run.tables}:
        raise ValueError(
            f"`run` should be of an edit, as `geffect.edit` writes it. Found `{run.path}` without "
            "what an edit changed. For steps of training see `predicted_change`."
        )
    kept = run.table(RISKS)
    falls = kept["before"] - kept["after"]
    return {str(risk): float(fall) for risk, fall in zip(kept["risk"], falls, strict=True)}


def _lengths(run: Run, by: By) -> tuple[list[str], NDArray[np.float64]]:
    blocks, K = summed_gram(run, by)
    update = run.index(UPDATE)
    return blocks, norm(K, update)[0]


def _touched(run: Run, by: By, blocks: list[str]) -> NDArray[np.float64]:
    """Which part of the numbers of each block is touched, and last of the model."""
    kept = run.table(TOUCHED)
    numbers = dict(zip(map(str, kept["parameter"]), kept["numbers"], strict=True))
    label = label_of(by)
    labels = [label(parameter) for parameter in run.layers]
    sizes = np.array([parameter.numel for parameter in run.layers])
    changed = np.array([numbers[parameter.name] for parameter in run.layers])
    belongs = np.array([[own == block for own in labels] for block in blocks])
    fractions: NDArray[np.float64] = np.array(
        [changed[own].sum() / sizes[own].sum() for own in (*belongs, np.full(len(sizes), True))]
    )
    return fractions
