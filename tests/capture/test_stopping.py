"""The rule that stops: each clause against plain numbers, and training as if nobody had looked."""

import copy
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from geffect import Recorder, StopWhen, open_run
from geffect.capture.rows_seen import Seen
from geffect.projection import free_forgetting
from geffect.risk import nll
from tests.utils import shallow as tiny

STEEP = 0.5
"""The curvature of the forget risk of the toy."""


class Toy(nn.Module):
    """Risks 1/2 a x^2 for the forget data, and 1/2 (y - x / 4)^2 for the retain data."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
        self.y = nn.Parameter(torch.tensor([0.0], dtype=torch.float64))

    def forget(self) -> Tensor:
        return (0.5 * STEEP * self.x**2).sum()

    def retain(self) -> Tensor:
        return (0.5 * (self.y - 0.25 * self.x) ** 2).sum()


def ascended(
    path: Path, stop: StopWhen | None, *, lr: float = 0.1, scale: float = 1.0, steps: int = 60,
    **options: Any,
) -> tuple[Toy, int]:  # fmt: skip
    """The toy after gradient ascent, and how many updates were made."""
    model = Toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    with Recorder(model, path, **{"update": True, "stop": stop} | options) as recorder:
        for step in range(steps):
            recorder.backward(
                objective={"forget": -1.0},
                forget=lambda: scale * model.forget(),
                retain=lambda: scale * model.retain(),
            )
            optimizer.step()
            optimizer.zero_grad()
            if stop is not None and stop.fired:
                return model, step + 1
    return model, steps


def rows(gains: Sequence[float], harms: Sequence[float], risk: float = 1.0) -> list[Seen]:
    return [
        Seen(step, risk, np.array([[1.0, 0.0, g], [0.0, 1.0, h], [g, h, 1.0]]), 0.1)
        for step, (g, h) in enumerate(zip(gains, harms, strict=True))
    ]


@pytest.mark.parametrize("level", [0.26, 0.8, 2.0, 5.0])
def test_a_quadratic_stops_at_its_known_crossing(level: float, tmp_path: Path) -> None:
    """Where R is R(0) (1 + lr a)^2t."""
    crossing = math.log(level / (0.5 * STEEP)) / (2 * math.log(1 + 0.1 * STEEP))
    stop = StopWhen(level=level)
    model, updates = ascended(tmp_path / "run.h5", stop)
    assert stop.fired is not None and stop.fired.clause == "level"
    assert 0 <= updates - crossing <= 1.5
    assert model.forget().item() >= level
    assert float(stop.fired.message.split()[-2]) == pytest.approx(crossing, abs=0.5)
    # Without the update the risk before each step is all that is known.
    plain = StopWhen(level=level)
    _, later = ascended(tmp_path / "plain.h5", plain, update=False)
    assert later == math.ceil(crossing) + 1


def test_the_level_is_seen_through_the_noise_of_batches() -> None:
    draw, slope = np.random.default_rng(0), 0.05
    late = []
    for _ in range(40):
        stop = StopWhen(level=2.0)
        noisy = [
            replace(row, risk=slope * row.step + 0.15 * draw.standard_normal())
            for row in rows([slope] * 90, [0.0] * 90)
        ]
        fired = next(found for row in noisy if (found := stop.see(row)) is not None)
        late.append(fired.step + 1 - 2.0 / slope)
    # The first batch above the level comes some seven steps too early.
    assert np.abs(np.mean(late)) < 2
    assert np.min(late) > -5


def test_identical_gradients_leave_nothing_free_and_stop_at_once(tmp_path: Path) -> None:
    model, stop = tiny.llama(), StopWhen(free_forgetting=1e-4, vocabulary=10**6)
    batch = tiny.batch(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Recorder(model, tmp_path / "run.h5", stop=stop) as recorder:
        recorder.backward(
            objective={"forget": -1.0},
            forget=lambda: nll(model, batch),
            retain=lambda: nll(model, batch),
        )
        optimizer.step()
    assert stop.fired is not None
    assert (stop.fired.step, stop.fired.clause) == (0, "free forgetting")
    assert stop.fired.value == pytest.approx(0.0, abs=1e-6)


def test_free_forgetting_is_that_of_the_rule() -> None:
    K = torch.tensor([[4.0, 3.0], [3.0, 9.0]], dtype=torch.float64)
    seen = Seen(0, 1.0, np.pad(K.numpy(), (0, 1)), lr=0.1)
    for wanted, stops in ((0.5, False), (0.519615, False), (0.519616, True), (0.52, True)):
        assert (StopWhen(free_forgetting=wanted).see(seen) is not None) is stops
    draw = np.random.default_rng(1)
    for _ in range(20):
        G = draw.standard_normal((2, 5))
        row = Seen(0, 1.0, np.pad(G @ G.T, (0, 1)), lr=0.3)
        for radius in (None, 0.2):
            stop = StopWhen(free_forgetting=1e9, radius=radius).see(row)
            expected = free_forgetting(torch.tensor(G @ G.T), radius=radius, learning_rate=0.3)
            assert stop is not None and stop.value == pytest.approx(expected.item(), rel=1e-9)


def test_without_a_retain_gradient_all_is_free_and_without_a_forget_gradient_nothing() -> None:
    alone = Seen(0, 1.0, np.diag([4.0, 0.0, 0.0]), lr=0.1)
    assert StopWhen(free_forgetting=0.39, radius=0.2).see(alone) is None
    assert StopWhen(free_forgetting=0.41, radius=0.2).see(alone) is not None
    still = Seen(0, 1.0, np.diag([0.0, 4.0, 0.0]), lr=0.1)
    stop = StopWhen(free_forgetting=0.1).see(still)
    assert stop is not None and stop.value == 0.0


def test_the_exchange_rate_is_what_a_loop_finds_whatever_the_losses_are_scaled_by(
    tmp_path: Path,
) -> None:
    found = []
    for scale in (1.0, 7.0):
        stop = StopWhen(exchange_rate=1e-3)
        _, updates = ascended(tmp_path / f"{scale}.h5", stop, lr=0.1 / scale, scale=scale)
        assert stop.fired is not None and stop.fired.clause == "exchange rate"
        found.append((updates, stop.fired.value))
    assert found[0] == (found[1][0], pytest.approx(found[1][1], rel=1e-12))
    model, rates = Toy(), []
    for _ in range(found[0][0]):
        gains, before = [], [p.detach().clone() for p in model.parameters()]
        forget, retain = (
            torch.autograd.grad(risk(), [*model.parameters()], materialize_grads=True)
            for risk in (model.forget, model.retain)
        )
        with torch.no_grad():
            for p, g in zip(model.parameters(), forget, strict=True):
                p += 0.1 * g
        for gradient in (forget, retain):
            moved = zip(gradient, model.parameters(), before, strict=True)
            gains.append(sum((g * (p.detach() - b)).sum() for g, p, b in moved))
        rates.append(float(gains[1] / gains[0]))
    assert len(rates) == 5
    assert found[0][1] == pytest.approx(np.median(rates), rel=1e-9)


def test_steps_that_learn_again_have_no_rate_and_are_told() -> None:
    stop = StopWhen(exchange_rate=0.5)
    seen = rows([1, 1, -1, 1, 0, 1, 1], [9, 0.6, 50, 0.6, 50, 0.1, 0.7])
    fired = [stop.see(row) for row in seen]
    assert [f is None for f in fired] == [True] * 6 + [False]
    assert stop.fired is not None
    assert stop.fired.value == 0.6
    assert "2 of the last 5 steps learn again" in stop.fired.message


def test_a_run_at_a_standstill_ends_but_not_one_that_has_not_begun() -> None:
    slow, fast = 0.01, 0.3
    stop = StopWhen(exchange_rate=5.0, level=3.0)
    gains = [slow] * 9 + [fast] + [slow, -slow, slow, slow] + [fast] + [slow] * 5
    fired = [stop.see(row) for row in rows(gains, [0.0] * len(gains))]
    assert [f is None for f in fired] == [True] * 19 + [False]
    assert stop.fired is not None and stop.fired.clause == "exchange rate"
    assert (stop.fired.value, stop.fired.limit) == (slow, pytest.approx(0.03))


def test_what_is_above_guessing_is_no_forgetting(tmp_path: Path) -> None:
    """V is that of the config; the first clause is told, whatever others hold."""
    model, batch, known = tiny.llama(), tiny.batch(0), 30
    assert nll(model, batch) < math.log(known)
    stop = StopWhen()
    Recorder(model, tmp_path / "never.h5", stop=stop).close()
    assert stop.vocabulary == tiny.VOCABULARY
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    stop = StopWhen(vocabulary=known)
    risks = []
    with Recorder(model, tmp_path / "run.h5", stop=stop) as recorder:
        while stop.fired is None:
            risks.append(nll(model, batch).item())
            recorder.backward(objective={"forget": -1.0}, forget=lambda: nll(model, batch))
            optimizer.step()
            optimizer.zero_grad()
    assert stop.fired.clause == "anti-knowledge"
    assert len(risks) > 1
    assert max(risks[:-1]) <= math.log(known) < risks[-1]
    assert StopWhen(level=3.0, vocabulary=50).see(replace(rows([0], [0])[0], risk=4.0)).clause == (
        "anti-knowledge"
    )
    assert StopWhen(vocabulary=50).see(replace(rows([0], [0])[0], risk=math.nan)) is None


def test_training_until_the_stop_is_that_of_nobody_who_looks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start = tiny.llama()
    options: dict[str, Any] = {"level": 3.6, "exchange_rate": 50.0, "vocabulary": 100}
    ends: list[Any] = []
    for stop, steps in ((StopWhen(**options), 40), (None, 0)):
        model = copy.deepcopy(start)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        recorder = stop and Recorder(model, tmp_path / "run.h5", update=True, stop=stop)
        taken = 0
        for pair in tiny.pairs(steps or ends[0][1]):
            losses = {name: nll(model, batch) for name, batch in pair.items()}
            if recorder:
                recorder.backward(objective={"forget": -1.0}, **losses)
            else:
                (-losses["forget"]).backward()
            optimizer.step()
            optimizer.zero_grad()
            taken += 1
            if stop and stop.fired:
                break
        if recorder:
            recorder.close()
        ends.append((model.state_dict(), taken))
    (watched, taken), (plain, _) = ends
    assert 0 < taken < 40
    assert all(torch.equal(watched[name], plain[name]) for name in plain)
    run = open_run(tmp_path / "run.h5")
    table = run.table("stop")
    assert (run.steps[-1], table["step"].tolist()) == (taken - 1, [taken - 1])
    assert table["message"][0] in caplog.text
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert run.manifest["stop"] == options
    again = StopWhen(**options).would_stop(run)
    assert again is not None and again.message == table["message"][0]


def test_a_run_that_is_continued_stops_where_the_whole_one_does(tmp_path: Path) -> None:
    whole = StopWhen(exchange_rate=1e-3)
    _, updates = ascended(tmp_path / "whole.h5", whole)
    path, model = tmp_path / "run.h5", Toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def go(count: int, **options: Any) -> StopWhen:
        stop = StopWhen(exchange_rate=1e-3)
        with Recorder(model, path, update=True, stop=stop, **options) as recorder:
            for _ in range(count):
                recorder.backward(
                    objective={"forget": -1.0}, forget=model.forget, retain=model.retain
                )
                optimizer.step()
                optimizer.zero_grad()
        return stop

    assert go(updates - 2).fired is None
    kept = copy.deepcopy(model.state_dict())
    assert go(2, resume=True).fired == whole.fired
    assert len(open_run(path).table("stop")["step"]) == 1
    # What is said of a step that comes again goes with it.
    model.load_state_dict(kept)
    with Recorder(model, path, update=True, resume=True, next_step=updates - 2) as recorder:
        recorder.backward(objective={"forget": -1.0}, forget=model.forget, retain=model.retain)
        optimizer.step()
    assert open_run(path).table("stop")["step"].tolist() == []


def test_what_moves_after_the_row_was_written_is_taken_in() -> None:
    first, amended = rows([0.5, 0.1], [0.0, 0.0])
    stop = StopWhen(level=1.3)
    assert stop.see(replace(first, risk=0.7)) is None
    assert stop.see(replace(amended, step=0, risk=1.25)) is not None


def test_steps_that_were_not_captured_are_not_carried_over() -> None:
    stop = StopWhen(level=2.0)
    a, b = (replace(row, step=5 * row.step) for row in rows([0.3, 0.3], [0.0, 0.0]))
    assert stop.see(replace(a, risk=1.0)) is None
    fired = stop.see(replace(b, risk=1.8))
    assert fired is not None and fired.value == pytest.approx(2.1)
    assert "crossed it after 5.4 updates" in fired.message


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"vocabulary": 1}, r"a whole number of tokens, 2 or more. Found `vocabulary = 1`"),
        ({"vocabulary": 2.5}, r"a whole number of tokens, 2 or more. Found `vocabulary = 2.5`"),
        ({"level": 0.0}, r"`level` of StopWhen should be a number above 0. Found `level = 0.0`"),
        ({"level": math.nan}, "`level`.*nan"),
        ({"exchange_rate": True}, "`exchange_rate`.*True"),
        ({"free_forgetting": "0.1"}, "`free_forgetting`.*'0.1'"),
        ({"radius": 0.1}, "`radius` of StopWhen should come with `free_forgetting`"),
        ({"vocabulary": -3}, "`vocabulary`.*-3"),
    ],
    ids=["one token", "half a token", "zero", "nan", "true", "text", "radius alone", "vocabulary"],
)
def test_numbers_that_say_nothing_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        StopWhen(**options)


@pytest.mark.parametrize(
    ("rule", "losses", "said"),
    [
        (StopWhen(level=1.0), ["retain"], "looks at forget. Found .*Record forget too"),
        (StopWhen(free_forgetting=1.0), ["forget"], "looks at forget, retain.*Record retain too"),
        (
            StopWhen(exchange_rate=0.5),
            ["forget", "retain"],
            r"looks at forget, retain, update. .*Record update too \(update=True\)",
        ),
        (StopWhen(), ["forget"], "`stop` should have a clause. Found none: the config"),
    ],
    ids=["forget", "retain", "update", "nothing"],
)
def test_a_run_that_lacks_what_is_looked_at_is_refused_before_a_step(
    rule: StopWhen, losses: list[str], said: str, tmp_path: Path
) -> None:
    model = Toy()
    risks = {name: getattr(model, name) for name in losses}
    with (
        pytest.raises(ValueError, match=said),
        Recorder(model, tmp_path / "run.h5", stop=rule) as recorder,
    ):
        recorder.backward(objective=model.forget, **risks)
    assert model.x.grad is None


def test_a_step_by_hand_has_no_learning_rate(tmp_path: Path) -> None:
    model = Toy()
    stop = StopWhen(free_forgetting=1e-9)
    recorder = Recorder(model, tmp_path / "run.h5", stop=stop)
    with pytest.raises(ValueError, match="`radius` of StopWhen should be given"), recorder:
        for _ in range(2):
            recorder.backward(objective={"forget": -1.0}, forget=model.forget, retain=model.retain)
            model.x.data += 0.1
            model.x.grad = None


@pytest.mark.parametrize("rule", ["level", 3.9, {"level": 3.9}, StopWhen])
def test_what_is_no_rule(rule: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"`stop` should be a rule\. Found"):
        Recorder(Toy(), tmp_path / "run.h5", stop=rule)
    assert not (tmp_path / "run.h5").exists()
