"""Evaluations beside a run: what others measured at its checkpoints, over its predicted change."""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from geffect.correlation import fit
from geffect.numbers import is_number
from geffect.store import Run
from geffect.text import plain

from .accumulated import before_steps, summed_before
from .base import check_run, risks_of
from .predicted_change import predicted_change


def read_evaluations(files: Iterable[str | os.PathLike[str]]) -> pd.DataFrame:
    """The metrics in files of open-unlearning and their checkpoints: step, suite, metric, value.

    - `files`: summaries such as `checkpoint-60/evals/TOFU_SUMMARY.json`, or the longer
      `TOFU_EVAL.json` beside them. The step is that of the checkpoint in the path; for a file that
      is not in one it stands before it: `60=evals/MUSE_SUMMARY.json`.

    A metric that was not computed, as the forget quality without a retrained model, is left out.
    Raises a ValueError for a file that holds no metrics, has no step, or contradicts another.

    >>> import tempfile
    >>> place = Path(tempfile.mkdtemp(), "TOFU_SUMMARY.json")
    >>> _ = place.write_text('{"model_utility": 0.6, "forget_quality": null}')
    >>> read_evaluations([f"60={place}"])
       step suite         metric  value
    0    60  TOFU  model_utility    0.6
    """
    found: dict[tuple[int, str, str], tuple[float, Path]] = {}
    for file in files:
        step, path = _placed(os.fspath(file))
        suite = re.sub(r"_(EVAL|SUMMARY)$", "", path.stem)
        for metric, value in _metrics(path):
            known, where = found.setdefault((step, suite, metric), (value, path))
            if known != value and not (np.isnan(known) and np.isnan(value)):
                raise ValueError(
                    f"`{plain(metric)}` of {plain(suite)} at step {step} should have one value. "
                    f"Found {known:g} in `{where}` and {value:g} in `{path}`. Leave one file out."
                )
    rows = [(*key, value) for key, (value, _) in found.items()]
    table = pd.DataFrame(rows, columns=["step", "suite", "metric", "value"])
    return table.sort_values("step", kind="stable", ignore_index=True)


def join(run: Run, evaluations: pd.DataFrame) -> pd.DataFrame:
    """Each metric at each checkpoint beside what the run had predicted for every risk by then.

    Checkpoint N is the model after N updates: after steps 0 to N - 1 of the run. With the updates D
    as the optimizer made them, and a risk R,

        change(N) = sum_{t < N} -<grad R(theta_t), D_t>

    the fall of the risk to first order, negative where it rises. `measured` is R at the first step
    minus R at step N, as far as the run has it. Where a run has captured some steps only, each
    stands for those up to the next, and `change` is an estimate.

    - `evaluations`: a table with the columns step, metric and value, maybe suite, as
      `read_evaluations` makes it.

    Columns: step, suite, metric, risk, change, measured, value. Raises a ValueError for a run
    without update, for checkpoints outside of it, for values that are no numbers, and for two of
    one metric at one checkpoint. NaN is a metric that could not be computed.

    >>> metrics = pd.DataFrame({"step": [0, 1], "metric": "ES", "value": [1.0, 0.8]})
    >>> join(example_run(update=True), metrics)[["step", "metric", "risk", "change", "value"]]
       step metric    risk  change  value
    0     0     ES  forget     0.0    1.0
    1     0     ES  retain     0.0    1.0
    2     1     ES  forget    -0.4    0.8
    3     1     ES  retain    -0.1    0.8
    """
    check_run(run)
    lacking = {"step", "metric", "value"} - {*evaluations.columns}
    if lacking or not len(evaluations):
        raise ValueError(
            "`evaluations` should be a table of metrics with the columns step, metric and value. "
            f"Found {', '.join(map(str, evaluations.columns))}, {len(evaluations)} rows. Read "
            "files with read_evaluations."
        )
    risks = risks_of(run)
    changes = predicted_change(run, by="model")
    held = evaluations.to_dict("records")
    suites = [row.get("suite", "") for row in held]
    suites = ["" if pd.isna(suite) else suite for suite in suites]
    steps = [_whole(row["step"]) for row in held]
    values = [_number(row["value"], row["metric"]) for row in held]
    _check_once([*zip(steps, suites, (row["metric"] for row in held), strict=True)])
    before = before_steps(run, steps)
    of_risk = {
        risk: summed_before(
            run, before, changes[changes["risk"] == risk]["value"].to_numpy()[:, np.newaxis]
        )[:, 0]
        for risk in risks
    }
    losses = run.losses()
    rows = []
    for place, (step, suite, row) in enumerate(zip(steps, suites, held, strict=True)):
        there = np.flatnonzero(run.steps == step)
        for risk in risks:
            change = float(of_risk[risk][place])
            loss = losses.get(risk)
            known = loss is not None and len(there)
            measured = float(loss[0] - loss[there[0]]) if loss is not None and known else np.nan
            rows.append((step, suite, row["metric"], risk, change, measured, values[place]))
    columns = ["step", "suite", "metric", "risk", "change", "measured", "value"]
    return pd.DataFrame(rows, columns=columns)


def agreement(joined: pd.DataFrame) -> pd.DataFrame:
    """How far first-order effects explain each metric: a row a metric and risk.

    Columns: suite, metric, risk, checkpoints; `rho`, the Spearman correlation of metric and change,
    from 8 checkpoints on, else NaN; `slope`, of a line through both; `gap`, how far the change is
    from what was measured, relative to that, at the last checkpoint where both are known. A |rho|
    near 1 and a small gap say that the metric follows first-order effects. Extraction strength and
    exact match saturate.

    >>> steps = [*range(8)]
    >>> table = pd.DataFrame({"step": steps, "suite": "", "metric": "ES", "risk": "forget",
    ...     "change": [-0.1 * s for s in steps], "measured": [-0.1 * s for s in steps],
    ...     "value": [1 - s / 10 for s in steps]})
    >>> agreement(table).round(6)
      suite metric    risk  checkpoints  rho  slope  gap
    0           ES  forget            8  1.0    1.0  0.0
    """
    rows = []
    for key, part in joined.groupby(["suite", "metric", "risk"], sort=False, observed=True):
        known = part[np.isfinite(part["value"]) & np.isfinite(part["change"])]
        change, value = (known[name].to_numpy(dtype=float) for name in ("change", "value"))
        rows.append((*map(str, key), len(known), *fit(change, value), _gap(known)))
    columns = ["suite", "metric", "risk", "checkpoints", "rho", "slope", "gap"]
    return pd.DataFrame(rows, columns=columns)


def _whole(step: Any) -> int:
    told = isinstance(step, int | float | np.integer | np.floating) and not isinstance(step, bool)
    if not (told and float(step).is_integer()):
        raise ValueError(
            "`step` of an evaluation should be the whole number of updates before it. Found "
            f"{step!r}. Pass that of its checkpoint."
        )
    return int(step)


def _number(value: Any, metric: Any) -> float:
    if value is None or value is pd.NA or value != value:
        return np.nan
    own = value.item() if isinstance(value, np.generic) else value
    if not is_number(own):
        raise ValueError(
            f"`value` of an evaluation should be a number, or NaN. Found {own!r:.40} of "
            f"`{plain(str(metric))}`. Turn it into one, or leave the row out."
        )
    return float(own)


def _check_once(keys: Sequence[tuple[int, str, Any]]) -> None:
    """Refuse a metric that is there twice at one checkpoint: nothing tells which one holds."""
    (step, suite, metric), count = Counter(keys).most_common(1)[0]
    if count > 1:
        named = " ".join(filter(None, [plain(str(suite)), plain(str(metric))]))
        raise ValueError(
            f"`evaluations` should have a metric once at each step. Found {count} rows of "
            f"`{named}` at step {step}. Leave the others out, or name a `suite` of each."
        )


def _gap(known: pd.DataFrame) -> float:
    measured = known[known["measured"].notna() & (known["measured"] != 0)].sort_values("step")
    if not len(measured):
        return np.nan
    last = measured.iloc[-1]
    return float(abs(last["change"] - last["measured"]) / abs(last["measured"]))


def _placed(file: str) -> tuple[int, Path]:
    """The step of a file, and its path."""
    told = re.match(r"(\d+)=(.+)", file, re.DOTALL)
    path = Path(told[2] if told else file)
    steps = [int(m[1]) for part in path.parts if (m := re.fullmatch(r"checkpoint-(\d+)", part))]
    if told and steps and steps[-1] != int(told[1]):
        raise ValueError(
            f"`{path}` should be of the step that it is given. Found {told[1]} before it, and "
            f"checkpoint-{steps[-1]} in its path. Leave `{told[1]}=` out, or copy the file."
        )
    if told:
        return int(told[1]), path
    if not steps:
        raise ValueError(
            "A file of metrics should be in the folder of its checkpoint, as "
            f"checkpoint-60/evals/TOFU_SUMMARY.json, or told its step. Found `{file}`. Pass "
            f"60={file}, with the number of updates before it."
        )
    return steps[-1], path


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, whose names are each there once: only the last would hold."""
    held = dict(pairs)
    if len(held) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"`{plain(twice)}` stands in it more than once")
    return held


def _metrics(path: Path) -> Iterator[tuple[str, float]]:
    """The metrics of a file with their values."""
    try:
        held: Any = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"`{path}` should be JSON. Found: {error}. Pass a summary of open-unlearning."
        ) from error
    if not isinstance(held, dict) or not held:
        raise ValueError(
            f"`{path}` should hold metrics by their names. Found {type(held).__name__}, "
            f"{plain(str(held)[:40])}. Pass a summary of open-unlearning."
        )
    count = 0
    for metric, entry in held.items():
        value = entry.get("agg_value") if isinstance(entry, dict) else entry
        if value is None:
            continue
        if not is_number(value) and value == value:  # NaN is what could not be computed
            raise ValueError(
                f"`{plain(metric)}` in `{path}` should be a number, or have one as `agg_value`. "
                f"Found {plain(repr(value)[:40])}. Leave the file out, or mend it."
            )
        count += 1
        yield metric, float(value)
    if not count:
        raise ValueError(
            f"`{path}` should hold a metric that was computed. Found {', '.join(map(plain, held))} "
            "without values. Evaluate the checkpoint again."
        )
