"""The battery of a run file: how far an unlearning's own updates explain what was measured of it.

A run says, to first order, by how much each update has moved each risk, and in which layer. That
is held against what was measured: the loss of each step, the metrics of checkpoints, and how much
of the answers each block of the unlearned model has lost.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import nn

from geffect.analysis import accumulated, agreement, join, predicted_change
from geffect.checkpoints.folders import by_step
from geffect.correlation import fit
from geffect.evaluation.ends import ends_of
from geffect.evaluation.memorised import memorised
from geffect.evaluation.tokens import evaluate_tokens
from geffect.layers import canonical_name
from geffect.places import is_adapter
from geffect.sources import FORGET, UPDATE, is_risk
from geffect.store import Run

from .attacks import DEPTH, PATCHED
from .depth import TAU
from .models import RETRAINED, UNLEARNED
from .sets import AuditSet, AuditSets

GEOMETRY = "geometry"

LOSS = "loss"
"""The metric that a run holds itself: the loss of the batch of each step."""

ERASED = "erased depth"
"""The metric of the blocks: how much of the answer each of them has lost."""

COLUMNS = ("metric", "set", "rho", "slope", "gap", "n")

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Geometry:
    """What the battery found of a run.

    - `table`: a row a metric and set, with the columns of `geometry`; the last of them the blocks.
    - `course`: how far each risk has risen, as the updates predict it and as it was measured, of
      `geffect.analysis.accumulated`.
    """

    table: pd.DataFrame = field(repr=False)
    course: pd.DataFrame = field(repr=False)

    @classmethod
    def of(
        cls, run: Run, metrics: pd.DataFrame | None, depths: tuple[Floats, Floats] | None
    ) -> "Geometry":
        """That of a run; `metrics` as for `geometry`, `depths` as for `along_depth`."""
        table = geometry(run, metrics)
        if depths is not None:
            rho, slope, n = along_depth(run, *depths)
            row = ERASED, FORGET, rho, slope, np.nan, n
            table = pd.concat([table, pd.DataFrame([row], columns=[*COLUMNS])], ignore_index=True)
        return cls(table, accumulated(run))


def geometry(run: Run, metrics: pd.DataFrame | None = None) -> pd.DataFrame:
    """How far metrics of sets go with what the updates of a run did to these sets, to first order.

    With the updates D as the optimizer made them, the predicted fall of the risk of a set S is

        A_S(t) = sum_{s < t} -<grad R_S(theta_s), D_s>

    - `metrics`: step, set, metric, value, of checkpoints, as `checkpoint_metrics` reads them. The
      loss of each step, which the run holds, is told in any case.

    Columns: metric, set; `rho`, the Spearman correlation of metric and A_S, from 8 points on, else
    NaN; `slope`, of a line through both; `gap`, how far A_S is from the measured fall of the risk,
    relative to that, at the last step where both are known; `n`, the points. A |rho| near 1 and a
    small gap say that first-order effects explain the metric. ES and EM saturate.

    >>> geometry(example_run(update=True))[["metric", "set", "n"]]
      metric     set  n
    0   loss  forget  1
    1   loss  retain  1
    """
    rows = [*_of_losses(run)]
    if metrics is not None and len(metrics):
        joined = join(run, metrics.rename(columns={"set": "suite"}))
        own = agreement(joined[joined["suite"] == joined["risk"]])
        named = own.rename(columns={"suite": "set", "checkpoints": "n"})
        rows += [tuple(row) for row in named[[*COLUMNS]].itertuples(index=False)]
    return pd.DataFrame(rows, columns=[*COLUMNS])


def _of_losses(run: Run) -> Iterator[tuple[str, str, float, float, float, int]]:
    table = accumulated(run)
    losses = run.losses()
    for risk, part in table[table["how"] == "predicted"].groupby("risk", sort=False, observed=True):
        if (loss := losses.get(str(risk))) is None:
            continue
        fall, gaps = -part["value"].to_numpy(np.float64), part["gap"].dropna()
        known = np.isfinite(loss) & np.isfinite(fall)
        gap = float(gaps.iloc[-1]) if len(gaps) else np.nan
        yield LOSS, str(risk), *fit(fall[known], loss[known]), gap, int(known.sum())


def checkpoint_metrics(
    folders: Iterable[str | os.PathLike[str]],
    load: Callable[[str | os.PathLike[str]], nn.Module],
    sets: Iterable[AuditSet],
    tokenizer: object = None,
) -> pd.DataFrame:
    """What checkpoints say of sets when they are asked: step, set, metric, value, means over items.

    - `folders`: numbered as they are named, `checkpoint-60`, else in their order.
    - `load`: makes a model of one. They are loaded one after another.
    - `tokenizer`: tells the tokens that end an answer.
    """
    asked = [*sets]
    rows = []
    for step, folder in by_step([*folders]).items():
        model = load(folder)
        ends = ends_of(model, tokenizer)
        for of in asked:
            found = memorised(evaluate_tokens(model, of.items, ends=ends))
            means = found.groupby("metric", sort=False)["value"].mean()
            rows += [(step, of.name, metric, value) for metric, value in means.items()]
    return pd.DataFrame(rows, columns=["step", "set", "metric", "value"])


def along_depth(run: Run, unlearned: Floats, retrained: Floats) -> tuple[float, float, int]:
    """Whether a block has lost the answers where the updates raised the forget risk.

    - `unlearned`, `retrained`: `Float64[item, block]`, by how much the blocks of these models
      lower log p of the answers, as `DepthProbe.patched` finds it.

    Returns Spearman's correlation over blocks, from 8 on, the slope, and the number of blocks. Of a
    block the rise of the forget risk, sum_t <grad R_forget, D_t>, goes with the mean over items of
    clip(d_unlearned / d_retrained, 0, 1), as the depth of unlearning counts it. A block that was
    not trained has a rise of 0.
    """
    changes = predicted_change(run, by="layer")
    own = changes[changes["risk"] == FORGET]
    rises = -own.groupby("layer", observed=True)["value"].sum()
    named = _blocks(run)
    rise = np.array([rises.get(named.get(i, ""), 0.0) for i in range(unlearned.shape[1])])
    counted = retrained > TAU
    share = np.divide(unlearned, retrained, out=np.full_like(unlearned, np.nan), where=counted)
    known = counted.any(axis=0)
    erased = np.nanmean(share.clip(0, 1)[:, known], axis=0)
    return *fit(rise[known], erased), int(known.sum())


def _blocks(run: Run) -> Mapping[int, str]:
    """The blocks of the last tower by their places, as a run names them."""
    inside = [p for p in run.layers if p.index >= 0]
    return {p.index: p.layer for p in inside if p.tower == inside[-1].tower}


def depths_in(items: pd.DataFrame) -> tuple[Floats, Floats] | None:
    """By how much the blocks of the unlearned and the retrained model lower log p, if measured.

    - `items`: the table of items of an audit.
    """
    own = items[
        (items["battery"] == DEPTH)
        & items["metric"].str.startswith(PATCHED)
        & (items["set"] == FORGET)
    ]
    own = own.assign(block=own["metric"].str.removeprefix(PATCHED).astype(int))
    wide = own.pivot(index="item", columns=["model", "block"], values="value")
    if not {UNLEARNED, RETRAINED} <= {*own["model"]}:
        return None
    return wide[UNLEARNED].to_numpy(np.float64), wide[RETRAINED].to_numpy(np.float64)


def sets_in(run: Run, sets: AuditSets) -> list[AuditSet]:
    """The sets that are risks of the run, by the same name."""
    return [sets[name] for name in sets if name in run.sources and is_risk(name)]


def check_run_of_updates(run: Run) -> None:
    """Refuse a run that does not say what its updates did to the forget set."""
    lacking = [name for name in (FORGET, UPDATE) if name not in run.sources]
    if lacking:
        raise ValueError(
            f"`run` should be recorded with the risk `{FORGET}` and with update=True. Found no "
            f"`{lacking[0]}` among {', '.join(run.sources)} in `{run.path}`. Record the "
            "unlearning so, or replay its checkpoints with update=True."
        )


def check_run_of(run: Run, model: nn.Module) -> None:
    """Refuse a run of another model than the one that was unlearned."""
    parameters = model.named_parameters(remove_duplicate=False)
    shapes = {canonical_name(name): tuple(tensor.shape) for name, tensor in parameters}
    for parameter in run.layers:
        own = shapes.get(parameter.name)
        if own != parameter.shape and not is_adapter(parameter.name):
            raise ValueError(
                "`run` should be of the training that made the unlearned model of the original. "
                f"Found `{parameter.name}` of {parameter.shape} in `{run.path}`, and in the model "
                f"{own or 'none'}. Pass the run of this model."
            )
