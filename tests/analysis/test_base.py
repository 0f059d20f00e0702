"""What analyzers take: an open run, and nothing else."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from geffect import analysis
from geffect.analysis import drift, g_effect

OF_RUNS = [
    name
    for name in analysis.__all__
    if callable(found := getattr(analysis, name)) and "run" in inspect.signature(found).parameters
]
BESIDE = {
    "a": "forget",
    "b": "retain",
    "evaluations": pd.DataFrame(columns=["step", "metric", "value"]),
    "name": "samples",
    "other": None,
    "score": g_effect,
}
"""What an analyzer has to be given beside a run, by the names of parameters."""


def given(look: Callable[..., object]) -> dict[str, object]:
    """What this one has to be given."""
    return {
        name: BESIDE[name]
        for name, parameter in inspect.signature(look).parameters.items()
        if name != "run"
        and parameter.default is parameter.empty
        and parameter.kind is not parameter.VAR_KEYWORD
    }


@pytest.mark.parametrize("name", OF_RUNS)
@pytest.mark.parametrize(
    "other", ["run.h5", Path("run.h5"), None, pd.DataFrame(), {}], ids=lambda x: type(x).__name__
)
def test_what_is_no_open_run_is_refused_by_all_alike(name: str, other: object) -> None:
    says = rf"`run` should be an open run\. Found `{type(other).__name__}`\. Pass geffect.open_run"
    with pytest.raises(TypeError, match=says):
        look = getattr(analysis, name)
        look(run=other, **given(look))


def test_the_other_run_of_a_drift_is_an_open_run(example_run: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match=r"should be an open run\. Found `str`"):
        drift(example_run(sketch=True), other="run.h5")  # type: ignore[arg-type]


def test_there_are_analyzers_of_runs() -> None:
    assert {"g_effect", "cosine", "compare", "intervals"} < {*OF_RUNS}
