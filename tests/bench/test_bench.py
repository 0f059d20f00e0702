"""The benchmark measures what it says: rounds, ratios, bars and memory; and it runs."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from geffect import Rectifier, dots
from geffect.costs.live_bytes import LiveBytes
from geffect.gradients import differentiate
from tests.bench import __main__ as bench
from tests.bench import (
    capture,
    constants,
    device,
    others,
    page,
    public_procedure,
    rectification,
    relearned,
)
from tests.bench.bars import Bar, Row
from tests.bench.memory import gradient_bytes, peak_bytes, peak_gradients
from tests.bench.products import heavy_tailed, relative_error
from tests.bench.public_procedure import WINDOW, PublicProcedure
from tests.bench.rounds import Load, Ratio, cpu_seconds, interleaved, ratio
from tests.bench.workload import Size, Workload

SMALLEST = Size(hidden=16, layers=1, vocabulary=32, samples=2, positions=16, vector=2**10, rounds=2)


class Machine:
    """A machine on which a load takes as long as it says, and which becomes slower and slower."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.last = 0.0

    def load(self, name: str, seconds: float) -> Load:
        def run() -> None:
            self.ran.append(name)
            self.last = seconds * (1 + 0.01 * len(self.ran))

        return run

    def clock(self, load: Load) -> float:
        load()
        return self.last


def test_rounds_alternate_and_the_first_is_not_counted() -> None:
    machine = Machine()
    loads = {"a": machine.load("a", 2.0), "b": machine.load("b", 1.0)}
    seconds = interleaved(machine.clock, 3, loads)
    assert machine.ran == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert [len(times) for times in seconds.values()] == [3, 3]
    assert seconds["a"][0] == pytest.approx(2 * 1.04)


def test_a_round_may_have_several_turns() -> None:
    machine = Machine()
    loads = {"a": machine.load("a", 2.0), "b": machine.load("b", 1.0)}
    seconds = interleaved(machine.clock, 2, loads, turns=3)
    assert machine.ran == [*"abbaab", *"baabba", *"abbaab"]
    assert seconds["b"] == pytest.approx([1.07 + 1.10 + 1.11, 1.14 + 1.15 + 1.18])


def test_the_ratio_of_known_loads_on_a_machine_that_slows_down() -> None:
    machine = Machine()
    loads = {"a": machine.load("a", 3.0), "b": machine.load("b", 2.0)}
    seconds = interleaved(machine.clock, 6, loads)
    found = ratio(seconds["a"], seconds["b"])
    assert found.ratio == pytest.approx(1.5, abs=0.01)
    assert found.rounds == 6


def test_ratio_and_spread_are_median_and_quartiles_of_the_rounds() -> None:
    over, under = np.random.default_rng(0).uniform(1, 2, (2, 9))
    found = ratio(over.tolist(), under.tolist())
    low, middle, high = np.percentile(over / under, [25, 50, 75])
    assert found == Ratio(pytest.approx(middle), 9, pytest.approx(high - low))


def test_the_processor_time_of_nothing_is_next_to_none() -> None:
    ran = []
    assert 0 <= cpu_seconds(lambda: ran.append(1)) < 1
    assert ran == [1]


@pytest.mark.parametrize(
    ("bar", "holding", "failing"),
    [
        (Bar(1.03), [1.03, 0.5, -1.0], [1.031, math.inf]),
        (Bar(0.8, at_least=True), [0.8, 2], [0.79]),
    ],
)
def test_bars_have_a_side(bar: Bar, holding: list[float], failing: list[float]) -> None:
    assert all(map(bar.holds, holding))
    assert not any(map(bar.holds, [*failing, math.nan]))


def test_memory_counts_what_is_alive_at_once() -> None:
    there = torch.ones(100)

    def load() -> None:
        there.view(10, 10).t()  # no memory of its own, nor new
        first = there * 2  # 400 bytes
        second = first.double()  # 800
        del first
        kept = second[:10]
        del second
        (kept + 1).sum()  # the view keeps all of it: 800 + 80 + 8

    assert peak_bytes(load) == 1200
    with LiveBytes() as live:
        kept = there + 1
        there.add(2)
    assert (live.now, live.peak) == (400, 800)
    del kept
    assert live.now == 0


def test_memory_counts_backward_passes() -> None:
    layers = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(3)))
    matrix = 32 * 32 * 4
    with LiveBytes(lambda tensor: tensor.numel() == 32 * 32) as live:
        layers(torch.ones(1, 32)).sum().backward()
        assert live.now == live.peak == 3 * matrix
        layers(torch.ones(1, 32)).sum().backward()  # each is made, and added to what is there
        assert (live.now, live.peak) == (3 * matrix, 4 * matrix)
        layers.zero_grad()
    assert live.now == 0


def test_gradients_are_told_from_activations() -> None:
    workload = Workload.of(SMALLEST, "cpu").minute()
    matrices = [p for p in workload.model.parameters() if p.dim() > 1]
    assert gradient_bytes(workload) == sum(4 * p.numel() for p in matrices)

    def load() -> None:
        workload.model(**workload.pair["forget"]).loss.backward()

    assert peak_gradients(workload, load) == gradient_bytes(workload)
    with torch.no_grad():
        assert peak_gradients(workload, lambda: workload.model(**workload.pair["forget"])) == 0


def test_the_public_procedure_averages_and_keeps_three_gradients() -> None:
    workload = Workload.of(SMALLEST, "cpu")
    procedure = PublicProcedure(workload)
    procedure.micro_batch()
    first = {name: average.clone() for name, average in procedure._averages["retain"].items()}
    for _ in range(WINDOW):
        procedure.micro_batch()  # of the same data, at the same parameters
    assert sorted(procedure._averages) == ["forget", "objective", "retain"]
    for name, average in procedure._averages["retain"].items():
        torch.testing.assert_close(average, first[name])
    assert all(parameter.grad is None for parameter in workload.model.parameters())


def test_the_error_of_inner_products_is_seen_where_there_is_one() -> None:
    for a, b in heavy_tailed(2**16, "cpu"):
        assert relative_error(dots.gram([a, b])[0, 1].item(), a, b) < 1e-12
        assert relative_error(1.01 * dots.gram([a, a])[0, 0].item(), a, a) == pytest.approx(0.01)


def test_what_a_rectification_takes_is_counted() -> None:
    workload = Workload.of(SMALLEST, "cpu").minute()
    kept, more = rectification.memory_of(workload, Rectifier(workload.model))
    assert kept == 1.0 and more < 1.0
    loss = rectification.ascent(workload)["forget"]
    assert rectification.passes_of(workload, loss.backward) == 1
    workload.model.zero_grad()
    step = partial(Rectifier(workload.model).backward, **rectification.ascent(workload))
    assert rectification.passes_of(workload, step) == 2


def test_what_a_relearned_copy_takes_is_counted() -> None:
    workload = Workload.of(SMALLEST, "cpu")
    stepping = capture.stepping_of(workload)
    passes = [
        rectification.passes_of(workload, stepping(relearned.at_copy(workload, steps)))
        for steps in (0, 1, 5)
    ]
    assert passes == [4, 4 + 2, 4 + 10]  # of the objective and the retain risk, both ways
    assert all(relearned.passes(workload, steps).measured.ratio == 1 for steps in (1, 5))
    # Of matrices that are larger than what is looked at at a time.
    large = Workload.of(replace(SMALLEST, hidden=320, vocabulary=320), "cpu").minute()
    assert all(relearned.memory(large, steps).measured.ratio == 1 for steps in (1, 5))


def test_rows_are_written_as_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "QUICK", SMALLEST)
    out = tmp_path / "of a folder to come" / "bench.json"
    bench.main(["--quick", "--out", str(out)])
    rows = json.loads(out.read_text())
    assert len({row["quantity"] for row in rows}) == len(rows) == 29
    for row in rows:
        assert {"quantity", "ratio", "bar", "holds", "rounds", "spread"} <= row.keys()
        assert row["quick"] is True
        assert math.isfinite(row["ratio"]) and row["rounds"] >= 1 and row["spread"] >= 0
        bar = Bar(row["bar"], row["at_least"])
        assert row["holds"] is bar.holds(row["ratio"])
    assert [row["at_least"] for row in rows].count(True) == 1
    assert list(out.parent.iterdir()) == [out]  # what was recorded on the way is gone
    assert set(page.SHORT) <= {row["quantity"] for row in rows}
    assert {row["command"] for row in rows} == {"python -m tests.bench --quick"}
    bench.main(["--quick", "--only", "products", "--out", str(out)])
    some = json.loads(out.read_text())
    assert {row["quantity"] for row in some} == {row["quantity"] for row in rows}
    assert 0 < sum("--only products" in row["command"] for row in some) < len(some)


def test_constants_tell_where_and_by_what_they_were_measured(tmp_path: Path) -> None:
    """The shipped ones have no other source: what is too small to mean anything is left out."""
    workload = Workload.of(SMALLEST, "cpu")
    place = bench.place(workload, bench._options([]))
    assert place["torch"] == torch.__version__
    assert place["machine"].endswith(" cores") and place["command"] == "python -m tests.bench"
    step = Row("two gradients: recorded step / step", Ratio(1.25, 3, 0.5), Bar(1.03)).as_json()
    measured, out = tmp_path / "bench.json", tmp_path / "constants.json"
    of_run = {"workload": str(workload), **place}
    rows = [step | of_run | {"quick": quick} for quick in (True, False)]
    measured.write_text(json.dumps(rows))
    constants.main([str(measured), "--out", str(out)])
    (row,) = json.loads(out.read_text())["rows"]
    assert (row["quantity"], row["ratio"]) == ("recorder, two gradients", 1.25)
    assert place.items() <= row.items()


def test_sizes_are_those_of_models_that_are_unlearned() -> None:
    def count(size: Size) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in Workload.built(size).parameters())

    assert count(device.SIZES["361m"]) == pytest.approx(361e6, rel=0.01)
    assert count(device.SIZES["1b"]) == pytest.approx(1.24e9, rel=0.01)


def test_a_size_has_its_table_beside_its_bars(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(device.SIZES, "small", replace(SMALLEST, dtype=torch.bfloat16))
    monkeypatch.setattr(device, "STEPS", 1)
    monkeypatch.setattr(device, "RECTIFIERS", {"select": device.RECTIFIERS["select"]})
    monkeypatch.setattr(public_procedure, "rows", lambda *_: iter(()))  # of the other table
    out = tmp_path / "bench-cpu.json"
    other = {"workload": "another size", "quantity": "a quantity"}
    out.write_text(json.dumps([other]))
    bench.main(["--size", "small", "--out", str(out)])
    first, *rows = json.loads(out.read_text())
    assert first == other  # of a size that was measured before
    quantities = [row["quantity"] for row in rows]
    assert len(set(quantities)) == len(quantities) == 13
    assert all(row["device"] == "CPU, one thread" for row in rows)
    assert all(math.isfinite(row["ratio"]) and row["ratio"] > 0 for row in rows)
    bars = {row["quantity"]: row["bar"] for row in rows}
    assert bars["recorder, two gradients / plain step"] == 1.08
    assert bars["rectifier, select / plain step"] == 1.3


def test_what_others_do_is_what_they_say() -> None:
    workload = Workload.of(SMALLEST, "cpu")
    gradients = differentiate(workload.parameters, rectification.ascent(workload))
    K = gradients.gram().sum(dim=0)
    others.PublicGRU(torch.float64).rectify(gradients)
    x = torch.cat([p.grad.double().flatten() for p in workload.parameters])
    u, r = (
        torch.cat([t.double().flatten() for t in gradients.of(n)]) for n in ("objective", "retain")
    )
    torch.testing.assert_close(x, u - (u @ r) / (r @ r) * r, rtol=1e-4, atol=1e-7)
    workload.model.zero_grad()
    losses = device.two(workload)
    loop = others.AutogradLoop(workload.parameters, {n: losses[n] for n in ("forget", "retain")})
    loop.backward()
    found = torch.tensor(loop.products, dtype=torch.float64).sum(dim=1)
    torch.testing.assert_close(found, K[[1, 1, 2], [1, 2, 2]], rtol=1e-4, atol=1e-4)
    gramian = others.gramian_of_torchjd(workload)().double()
    torch.testing.assert_close(gramian, K[1:, 1:], rtol=1e-4, atol=1e-4)


def test_a_row_says_what_it_measured() -> None:
    row = Row("a quantity", Ratio(1.5, rounds=7, spread=0.25), Bar(1.25))
    assert row.as_json() == {
        "quantity": "a quantity", "ratio": 1.5, "rounds": 7, "spread": 0.25,
        "bar": 1.25, "at_least": False, "holds": False,
    }  # fmt: skip
