"""Geometry: whether what a metric shows over a run is what the updates predict to first order."""

import numpy as np
import pandas as pd

from geffect.correlation import fit, rank_correlation
from geffect.scores import blocks_of

from .tokens import Floats

RISK = "risk"
"""The metric that is the risk itself, which the predicted change is of."""


def accumulated(changes: pd.DataFrame) -> pd.DataFrame:
    """A_S(t), the predicted fall of each risk by all updates before step t.

    - `changes`: the table of `geffect.analysis.predicted_change` for a run that has the update of
      every step, or of a replay with the way from each checkpoint to the next. Between them rows
      have to cover all that moved the model: a run with each fifth step alone lacks four fifths.

    Step t is the model as it was when row t was taken, before its update: for a Trainer that of
    `checkpoint-t`. 0 at the first row; the row behind the last has the whole run. Columns: step,
    the blocks, risk, value.

    >>> steps = {"step": [0, 1, 2], "model": "model", "risk": "forget", "value": [-0.4, -0.2, 0.1]}
    >>> accumulated(pd.DataFrame(steps))[["step", "value"]].round(3).to_numpy().tolist()
    [[0.0, 0.0], [1.0, -0.4], [2.0, -0.6], [3.0, -0.5]]
    """
    missing = [column for column in ("step", "risk", "value") if column not in changes.columns]
    if missing:
        raise ValueError(
            "`changes` should be a table of geffect.analysis.predicted_change. Found no column "
            f"`{missing[0]}` in {', '.join(map(str, changes.columns))}. Pass that of a run with "
            "update=True."
        )
    block = blocks_of(changes)
    keys = [block, "risk"]
    ordered = changes.sort_values("step", kind="stable")
    parts = []
    for key, part in ordered.groupby(keys, sort=False, observed=True):
        steps = part["step"].to_numpy()
        after = steps[-1] + (steps[-1] - steps[-2] if len(steps) > 1 else 1)
        sums = np.concatenate([[0.0], np.cumsum(part["value"].to_numpy(np.float64))])
        named = dict(zip(keys, key, strict=True))
        parts.append(pd.DataFrame({"step": [*steps, after], **named, "value": sums}))
    return pd.concat(parts, ignore_index=True)


def geometry(changes: pd.DataFrame, metrics: pd.DataFrame) -> pd.DataFrame:
    """How far first-order effects explain each metric over the checkpoints of a run.

    - `changes`: as for `accumulated`, for the model as a whole: `predicted_change(run, "model")`.
    - `metrics`: columns step, set, metric, value: the mean of a metric on a set at a checkpoint,
      whose step is as for `accumulated`. A set is a risk of the run by its name. The metric `risk`
      is the risk itself, as `geffect.risk.mean_nll` takes it on the batches of the run.

    Columns: metric, set, rho, slope, predicted, measured, gap, c. Over the c checkpoints that have
    a value and an A_S(t), `rho` is Spearman's rank correlation of the metric and A_S(t), and
    `slope` that of the line of least squares through them. From the first of them to the last,
    `predicted` and `measured` are by how much the risk falls, A_S and R_S; over all of them

        gap = sum_t |A_S(t) - (R_S(0) - R_S(t))| / sum_t |R_S(0) - R_S(t)|   from the first on.

    Where |rho| is high and the gap small, the metric is explained by first-order effects; ES and EM
    saturate. NaN: rho of fewer than 8 checkpoints or of values that do not vary, and what needs the
    metric `risk` where that is not there.
    """
    _check(changes, metrics)
    sums = accumulated(changes)
    block = blocks_of(sums)
    of_model = sums.drop(columns=block).rename(columns={"risk": "set", "value": "predicted"})
    of_model["set"] = of_model["set"].astype(str)
    both = metrics.assign(set=metrics["set"].astype(str)).merge(of_model, on=["step", "set"])
    both = both.dropna(subset=["value", "predicted"]).sort_values("step", kind="stable")
    lost = {*map(tuple, metrics[["set", "metric"]].astype(str).to_numpy())} - {
        *map(tuple, both[["set", "metric"]].astype(str).to_numpy())
    }
    if lost:
        raise ValueError(
            "`metrics` should be of risks of the run, at steps that it has. Found none such for "
            f"{', '.join(' of '.join(pair[::-1]) for pair in sorted(lost)[:3])}. The run has the "
            f"risks {', '.join(of_model['set'].unique())}, and the steps "
            f"{of_model['step'].min()} to {of_model['step'].max()}."
        )
    rows = []
    for (name, metric), part in both.groupby(["set", "metric"], sort=False):
        risk = both[(both["set"] == name) & (both["metric"] == RISK)]
        x, y = _floats(part["predicted"]), _floats(part["value"])
        rho, slope = fit(x, y)
        rows.append((metric, name, rho, slope, *_gap(risk), len(part)))
    columns = ["metric", "set", "rho", "slope", "predicted", "measured", "gap", "c"]
    return pd.DataFrame(rows, columns=columns)


def agreement(changes: pd.DataFrame, erased: pd.DataFrame) -> pd.DataFrame:
    """Whether the harm recorded at a layer goes with what is erased there: columns set, rho, n.

    - `changes`: as for `accumulated`, by layer.
    - `erased`: columns layer, set, value: how much of a set is erased at a layer, such as the share
      of depth by patching; more is more erased.

    `rho` is Spearman's rank correlation, over the n layers that both tables have, of -A_S, by how
    much the updates of the layer were to raise the risk, and of what is erased there; 1 where they
    agree. NaN for fewer than 3 layers.
    """
    last = accumulated(changes).groupby(["layer", "risk"], observed=True)["value"].last()
    harm = (-last).rename("harm").reset_index().rename(columns={"risk": "set"})
    harm, told = (t.assign(layer=t["layer"].astype(str), set=t["set"].astype(str))
                  for t in (harm, erased))  # fmt: skip
    both = told.merge(harm, on=["layer", "set"]).dropna(subset=["value", "harm"])
    if both.empty:
        raise ValueError(
            "`erased` should have layers and sets of the run. Found none in common: the run has "
            f"the layers {', '.join(harm['layer'].unique()[:3])}, ... and the sets "
            f"{', '.join(harm['set'].unique())}. Name them so."
        )
    rows = [
        (name, rank_correlation(_floats(part["harm"]), _floats(part["value"]), least=3), len(part))
        for name, part in both.groupby("set", sort=False)
    ]
    return pd.DataFrame(rows, columns=["set", "rho", "n"])


def _floats(column: pd.Series) -> Floats:
    return column.to_numpy(np.float64)


def _gap(risk: pd.DataFrame) -> tuple[float, float, float]:
    """Predicted and measured fall from the first checkpoint to the last, and the gap of all."""
    if risk.empty:
        return np.nan, np.nan, np.nan
    predicted = _floats(risk["predicted"] - risk["predicted"].iloc[0])
    measured = _floats(risk["value"].iloc[0] - risk["value"])
    moved = np.abs(measured).sum()
    gap = np.abs(predicted - measured).sum() / moved if moved else np.nan
    return float(predicted[-1]), float(measured[-1]), float(gap)


def _check(changes: pd.DataFrame, metrics: pd.DataFrame) -> None:
    missing = [name for name in ("step", "set", "metric", "value") if name not in metrics.columns]
    if missing:
        raise ValueError(
            "`metrics` should have the columns step, set, metric and value. Found no "
            f"`{missing[0]}` in {', '.join(map(str, metrics.columns))}. Name them so."
        )
    twice = metrics[metrics.duplicated(["step", "set", "metric"])]
    if len(twice):
        first = twice.iloc[0]
        raise ValueError(
            "`metrics` should have one value for each step, set and metric. Found several of "
            f"`{first['metric']}` on `{first['set']}` at step {first['step']}. Take their mean."
        )
    block = blocks_of(changes)
    if changes[block].nunique() > 1:
        raise ValueError(
            f"`changes` should be of the model as a whole. Found {changes[block].nunique()} "
            f'blocks in its column `{block}`. Pass predicted_change(run, by="model").'
        )
