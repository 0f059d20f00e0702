"""Requests to forget, one after the other: how alike they are, and what each does to the others."""

import numpy as np
import pandas as pd

from geffect.groups import By, label_of
from geffect.layers import in_network_order
from geffect.scores import COSINE, PER_TOKEN, Score
from geffect.store import Run

from .base import check_run, column_of
from .predicted_change import predicted_change

RISKS, PAIRS = "request_risks", "request_pairs"
"""The tables that `geffect.Requests` keeps with a run."""

ALIKE = Score("cosine of two displacements", COSINE)
OVERLAP = Score("overlap of what moves most")
FALL = Score("fall of the risk", PER_TOKEN)


def task_vectors(run: Run, by: By = "model") -> pd.DataFrame:
    """How alike the displacements of each two requests are, block by block.

    - cosine: of D and D', from -1 to 1; NaN where one of them does not move the block. What was
      negated has the cosine of its task vectors, whose signs go together.
    - overlap: of the numbers that both move most among those that either does (Jaccard), 0 to 1;
      NaN where neither has any in the block. Which those are is the `share` of Requests.

    Columns: request, other (the earlier one), `by`, quantity, value, score, unit. Needs a run that
    `geffect.Requests` wrote, of two requests or more.

    >>> pair = {"request": ["b"], "other": ["a"],
    ...         "parameter": ["model.layers.0.mlp.up_proj.weight"], "inner": np.array([3.0]),
    ...         "square": np.array([9.0]), "other_square": np.array([4.0]),
    ...         "both": np.array([1]), "either": np.array([4])}
    >>> tables = {"request_pairs": pair, "request_risks": {"request": ["a"]}}
    >>> task_vectors(example_run(tables=tables))[["request", "other", "quantity", "value"]]
      request other quantity  value
    0       b     a   cosine   0.50
    1       b     a  overlap   0.25
    """
    kept = _table(run, PAIRS)
    label = label_of(by)
    block_of = {parameter.name: label(parameter) for parameter in run.layers}
    column = column_of(by)
    pairs = pd.DataFrame(kept).assign(block=[block_of[name] for name in kept["parameter"]])
    numbers = ["inner", "square", "other_square", "both", "either"]
    keys = ["request", "other", "block"]
    sums = pairs.groupby(keys, sort=False)[numbers].sum().astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        # One length after the other: the product of two tiny ones would underflow.
        cosine = sums["inner"] / np.sqrt(sums["square"]) / np.sqrt(sums["other_square"])
        values = {"cosine": cosine.clip(-1, 1), "overlap": sums["both"] / sums["either"]}
    table = (
        pd.DataFrame(values)
        .reset_index(names=["request", "other", column])
        .melt(id_vars=["request", "other", column], var_name="quantity")
    )
    scores = {"cosine": ALIKE, "overlap": OVERLAP}
    table["score"] = [scores[quantity].label for quantity in table["quantity"]]
    table["unit"] = [scores[quantity].unit for quantity in table["quantity"]]
    blocks = in_network_order(run.layers, [label(parameter) for parameter in run.layers])
    table[column] = pd.Categorical(table[column], categories=blocks, ordered=True)
    order = [*dict.fromkeys([*kept["other"], *kept["request"]])]
    for name in ("request", "other"):
        table[name] = pd.Categorical(table[name], categories=order, ordered=True)
    return table


def revivals(run: Run) -> pd.DataFrame:
    """What each request does to each risk: does it revive what an earlier one had forgotten?

    - predicted: e_R(D) = -<grad R, D>, by how much the risk falls to first order.
    - measured: the risk before the request minus the risk after it.
    - earlier: whether the risk is that of a request before. It is revived where `measured` is
      positive: what was forgotten is known better again.

    In nats per token. Columns: request, risk, earlier, predicted, measured, before, after. Needs a
    run that `geffect.Requests` wrote.
    """
    kept = pd.DataFrame(_table(run, RISKS))
    names = [*dict.fromkeys(kept["request"])]
    fallen = predicted_change(run, by="model")
    numbers = dict(enumerate(names))
    predicted = {
        (numbers[int(row["step"])], str(row["risk"])): row["value"]
        for row in fallen.to_dict("records")
    }
    order = {name: number for number, name in enumerate(names)}
    pairs = [*zip(kept["request"], kept["risk"], strict=True)]
    table = pd.DataFrame(
        {
            "request": kept["request"],
            "risk": kept["risk"],
            "earlier": [order.get(risk, len(order)) < order[name] for name, risk in pairs],
            "predicted": [predicted[pair] for pair in pairs],
            "measured": kept["before"] - kept["after"],
            "before": kept["before"],
            "after": kept["after"],
        }
    )
    risks = [*dict.fromkeys(kept["risk"])]
    table["request"] = pd.Categorical(table["request"], categories=names, ordered=True)
    table["risk"] = pd.Categorical(table["risk"], categories=risks, ordered=True)
    return table


def _table(run: Run, name: str) -> dict[str, np.ndarray]:
    check_run(run)
    if name in run.tables:
        return run.table(name)
    if RISKS in run.tables:
        raise ValueError(
            f"`run` should be of two requests or more. Found one in `{run.path}`. Look at it with "
            "`revivals`, or as the run of an edit."
        )
    raise ValueError(
        f"`run` should be of requests, as `geffect.Requests` writes it. Found `{run.path}`, which "
        "has none. For single steps see `predicted_change`, for edits `edited`."
    )
