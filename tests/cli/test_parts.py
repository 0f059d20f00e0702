"""The options `--steps` and `--layers`: which rows are left, and what is refused."""

import numpy as np
import pandas as pd
import pytest
import typer

from geffect.cli.parts import chosen
from geffect.scores import Score, tidy

NAMES = ["embedding", *(f"layer {index}" for index in range(12)), "final norm", "head"]


def table(names: list[str] = NAMES, by: str = "layer") -> pd.DataFrame:
    steps = np.arange(0, 50, 5)
    return tidy(np.ones((10, len(names))), Score("x"), steps=steps, blocks=names, by=by)


@pytest.mark.parametrize(
    ("asked", "kept"),
    [("10:20", [10, 15, 20]), ("40:", [40, 45]), (":5", [0, 5]), ("25", [25]), ("11:16", [15])],
)
def test_steps_are_of_both_ends(asked: str, kept: list[int]) -> None:
    assert chosen(table(), asked, None)["step"].unique().tolist() == kept


@pytest.mark.parametrize("asked", ["", ":", "a:b", "10-20", "-5", "1:2:3", "1.5", "5 10"])
def test_steps_that_are_none_are_refused(asked: str) -> None:
    with pytest.raises(typer.BadParameter, match=r"`--steps` should be .* Found .* Pass, say"):
        chosen(table(), asked, None)


@pytest.mark.parametrize("asked", ["46:", "11:14", "20:10", "99"])
def test_steps_that_were_not_captured_are_refused(asked: str) -> None:
    with pytest.raises(typer.BadParameter, match=r"captured step, from 0 to 45\. Found"):
        chosen(table(), asked, None)


@pytest.mark.parametrize(
    ("asked", "kept"),
    [
        ("head", ["head"]),
        ("3", ["layer 3"]),
        ("0:2, head", ["layer 0", "layer 1", "layer 2", "head"]),
        ("10:", ["layer 10", "layer 11"]),
        (":1,layer 5", ["layer 0", "layer 1", "layer 5"]),
        ("layer 1*", ["layer 1", "layer 10", "layer 11"]),
        ("*norm,emb*", ["embedding", "final norm"]),
    ],
)
def test_layers_are_numbers_ranges_and_names(asked: str, kept: list[str]) -> None:
    found = chosen(table(), None, asked)
    assert found["layer"].astype(str).unique().tolist() == kept
    assert list(found["layer"].cat.categories) == NAMES  # in the order of the network


def test_parameters_and_towers_have_numbers_too() -> None:
    names = [f"model.layers.{index}.mlp.weight" for index in range(12)]
    found = chosen(table(names, "parameter"), None, "1:2")
    assert found["parameter"].astype(str).unique().tolist() == names[1:3]
    towers = ["vision layer 1", "vision layer 10", "layer 1"]
    assert chosen(table(towers), None, "1")["layer"].astype(str).unique().tolist() == [
        "vision layer 1", "layer 1"
    ]  # fmt: skip


@pytest.mark.parametrize("asked", ["", "12", "hed", "layer 99", "head,", "20:30", "5:3", "1 2"])
def test_layers_that_are_none_are_refused(asked: str) -> None:
    with pytest.raises(typer.BadParameter, match=r"`--layers` should name blocks .* Found `"):
        chosen(table(), None, asked)


def test_layers_of_a_model_as_a_whole_are_refused() -> None:
    with pytest.raises(typer.BadParameter, match=r"should go with several layers"):
        chosen(table(["model"], "model"), None, "0")
