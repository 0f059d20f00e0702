"""Findings, with numbers that are taken here from the rows of the file, one by one."""

from pathlib import Path

import numpy as np
import pytest

from geffect import open_run
from geffect.report.findings import compared, findings
from geffect.report.read import Read, opened
from geffect.store.writer import RunWriter
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
    assert (
        f"in layer {int(np.argmax(sizes))}: {100 * max(sizes) / sum(sizes):.0f} % of its" in found
    )


def test_rates(read: Read) -> None:
    whole = [sum(row) for row in read.run.gram()]
    assert f"in {100 * np.mean([K[0, 2] < 0 for K in whole]):.1f} % of steps" in said(
        read, "Objective and"
    )
    update, average = SOURCES.index("update"), SOURCES.index("retain_ema")
    harm = np.mean([K[update, average] > 0 for K in whole])
    assert said(read, "Share of updates") == (
        f"Share of updates that violate the constraint: {100 * harm:.1f} %."
    )


def test_rectified(read: Read) -> None:
    assert said(read, "The rectifier fired in 50.0 % of the steps")
    total = -sum(sum(K[SOURCES.index("update"), 2] for K in row) for row in read.run.gram())
    word = "lowered" if total >= 0 else "raised"
    assert f"{word} the retain risk by {abs(total):.4g} nats" in said(read, "To first order")


@pytest.mark.parametrize("rise", [-0.5, 0.0, 0.5])
def test_first_order_stands_beside_a_measured_change_that_goes_the_other_way(
    read: Read, monkeypatch: pytest.MonkeyPatch, rise: float
) -> None:
    total = -sum(sum(K[SOURCES.index("update"), 2] for K in row) for row in read.run.gram())
    losses = dict(read.losses) | {"retain": np.linspace(1.0, 1.0 + rise, 9)}
    monkeypatch.setitem(vars(read), "losses", losses)
    measured = f"it {'rose' if rise > 0 else 'fell'} by {abs(rise):.4g}, which"
    assert (measured in said(read, "To first order")) == (total * rise > 0)
    assert ("Measured" in said(read, "To first order")) == (total * rise > 0)


@pytest.mark.parametrize("rise", [-0.5, 0.5])
def test_what_batches_differ_by_is_no_measured_change(
    read: Read, monkeypatch: pytest.MonkeyPatch, rise: float
) -> None:
    losses = dict(read.losses) | {"retain": np.array([1.0, 2.0, 1.0, 2.0, 1.0 + rise])}
    monkeypatch.setitem(vars(read), "losses", losses)
    assert "Measured" not in said(read, "To first order")


def test_a_run_without_numbers_says_nothing_of_them(tmp_path: Path) -> None:
    run = open_run(random_run(tmp_path / "run.h5", 2, layers=1))
    (read,) = opened([run], "layer")
    assert not [sentence for sentence in findings(read) if "nan" in sentence]
    assert not [sentence for sentence in findings(read) if "rectifier" in sentence]


def test_runs_that_are_compared(tmp_path: Path) -> None:
    """One forgets for 60 steps, the other for 3."""
    several = opened(
        [open_run(random_run(tmp_path / f"{n}.h5", n, rectified=True)) for n in (60, 3)], "layer"
    )
    forget, retain = ([read.losses[name][-1] for read in several] for name in ("forget", "retain"))
    rates = [np.mean([sum(K[0, 2] for K in row) < 0 for row in r.run.gram()]) for r in several]
    first, second, third, *_, last = compared(several)
    assert first.startswith(
        f"The forget risk at the last step is highest in 60, with {forget[0]:.4g}"
    )
    assert first.endswith(f"; 3 has {forget[1]:.4g} nats."), "of two runs it is the other one"
    assert second.startswith(
        f"The retain risk at the last step is lowest in 3, with {retain[1]:.4g}"
    )
    fewer = int(np.argmin(rates))
    assert third.startswith(
        f"Conflicts are rarest in {(60, 3)[fewer]}, with {100 * min(rates):.1f} %;"
    )
    assert f"between {forget[1]:.4g} (3) and {forget[0]:.4g} nats (60)" in last


def test_the_same_run_twice_stands_out_in_nothing(read: Read) -> None:
    assert compared(opened([read.run, read.run], "layer")) == []


def test_how_long_training_waited_for_the_disk(read: Read, tmp_path: Path) -> None:
    assert not [sentence for sentence in findings(read) if "for the disk" in sentence]
    path = random_run(tmp_path / "kept.h5", 3)
    before = open_run(path)
    writer = RunWriter(path, before.layers, resume=True)
    writer.begin(before.contents)
    writer.keep("waited", {"seconds": np.array([0.25]), "rows": np.array([2])})
    writer.close(complete=True)
    (kept,) = opened([open_run(path)], "layer")
    assert said(kept, "Training waited").startswith(
        "Training waited 0.25 s for the disk over 2 rows with gradients that are kept, of "
    )
