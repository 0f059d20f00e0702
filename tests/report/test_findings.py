"""Findings, with numbers that are taken here from the rows of the file, one by one."""

from pathlib import Path

import numpy as np
import pytest

from geffect import open_run
from geffect.report.findings import findings
from geffect.report.read import Read, opened
from tests.utils.many_runs import SOURCES, random_run


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Read:
    path = random_run(tmp_path_factory.mktemp("run") / "run.h5", 10, rectified=True)
    return opened([open_run(path)], "layer")[0]


def said(read: Read, start: str) -> str:
    (found,) = [sentence for sentence in findings(read) if sentence.startswith(start)]
    return found


def test_risks(read: Read) -> None:
    losses = read.run.losses()
    ends = [f"{losses[name][at]:.4g}" for name in ("forget", "retain") for at in (0, -1)]
    assert said(read, "The forget risk") == (
        f"The forget risk went from {ends[0]} to {ends[1]} nats and the retain risk went from "
        f"{ends[2]} to {ends[3]} nats from the first to the last step."
    )


def test_harm(read: Read) -> None:
    products = [sum(K[0, 2] for K in row) for row in read.run.gram()]
    count, worst = sum(value < 0 for value in products), int(np.argmin(products))
    found = said(read, "The retaining G-effect of the model, before rectification,")
    assert (
        f"in {count} of 10 steps; it is lowest at step {worst}, with {min(products):.4g}" in found
    )


def test_where(read: Read) -> None:
    sizes = [sum(abs(row[layer][0, 1]) for row in read.run.gram()) for layer in range(3)]
    found = said(read, "The unlearning G-effect is largest")
    assert f"in layer {int(np.argmax(sizes))}: {max(sizes) / sum(sizes):.0%} of its" in found


def test_rates(read: Read) -> None:
    whole = [sum(row) for row in read.run.gram()]
    assert f"in {np.mean([K[0, 2] < 0 for K in whole]):.1%} of steps" in said(read, "Objective and")
    update, average = SOURCES.index("update"), SOURCES.index("retain_ema")
    harm = np.mean([K[update, average] > 0 for K in whole])
    assert said(read, "Share of updates") == (
        f"Share of updates that violate the constraint: {harm:.1%}."
    )


def test_rectified(read: Read) -> None:
    assert said(read, "The rectifier fired in 50.0% of the steps")
    total = -sum(sum(K[SOURCES.index("update"), 2] for K in row) for row in read.run.gram())
    word = "lowered" if total >= 0 else "raised"
    assert f"{word} the retain risk by {abs(total):.4g} nats" in said(read, "To first order")


def test_a_run_without_numbers_says_nothing_of_them(tmp_path: Path) -> None:
    run = open_run(random_run(tmp_path / "run.h5", 2, layers=1))
    (read,) = opened([run], "layer")
    assert not [sentence for sentence in findings(read) if "nan" in sentence]
    assert not [sentence for sentence in findings(read) if "rectifier" in sentence]
