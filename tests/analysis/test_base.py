"""What analyzers take: an open run, and nothing else."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from geffect import analysis
from geffect.analysis import drift, g_effect, intervals, kept

OF_A_MODEL = {"instances", "tokens", "as_columns"}
OF_TABLES = {"agreement", "read_evaluations"}
OF_MORE = {"intervals", "kept", "cosine", "compare", "join"}
LOOKS: dict[str, Callable[[Any], object]] = {
    **{
        name: getattr(analysis, name)
        for name in analysis.__all__
        if name.islower() and name not in OF_A_MODEL | OF_TABLES | OF_MORE
    },
    "compare": lambda run: analysis.compare(run, run),
    "cosine": lambda run: analysis.cosine(run, "forget", "retain"),
    "join": lambda run: analysis.join(run, pd.DataFrame(columns=["step", "metric", "value"])),
    "intervals": lambda run: intervals(g_effect, run),
    "kept": lambda run: kept(run, "samples"),
}


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize(
    "other", ["run.h5", Path("run.h5"), None, pd.DataFrame(), {}], ids=lambda x: type(x).__name__
)
def test_what_is_no_open_run_is_refused_by_all_alike(look: str, other: object) -> None:
    says = rf"`run` should be an open run\. Found `{type(other).__name__}`\. Pass geffect.open_run"
    with pytest.raises(TypeError, match=says):
        LOOKS[look](other)


def test_the_other_run_of_a_drift_is_an_open_run(example_run: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match=r"should be an open run\. Found `str`"):
        drift(example_run(sketch=True), other="run.h5")  # type: ignore[arg-type]


def test_every_analyzer_of_a_run_is_tried() -> None:
    of_runs = {
        name
        for name in analysis.__all__
        if callable(found := getattr(analysis, name))
        and "run" in inspect.signature(found).parameters
    }
    assert of_runs == {*LOOKS}
