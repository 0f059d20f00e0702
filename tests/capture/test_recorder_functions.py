"""Losses that are functions: asked one after the other; all else as with tensors, to the bit."""

import asyncio
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from geffect import Recorder, Rectifier, open_run
from geffect.objectives import (
    NPO,
    FrozenModel,
    GradDiff,
    SharedForward,
    WeightedGradientAscent,
    nll,
)
from geffect.risk import beside
from tests.utils import shallow as tiny
from tests.utils.architectures import batch_for, loss_of, made
from tests.utils.interrupts import grads_of, hooks_left, same

Functions = dict[str, Any]


def as_tensors(functions: Mapping[str, Any], model: nn.Module) -> Functions:
    """The losses by the tensors' way: those of the objective, then the others, in a fork."""
    terms = functions["objective"]
    own = [*terms] if isinstance(terms, Mapping) else ["objective"]
    losses = {name: f() for name, f in functions.items() if name in own and callable(f)}
    with beside(model):
        losses |= {n: f() for n, f in functions.items() if n not in losses and callable(f)}
    return {name: losses.get(name, loss) for name, loss in functions.items()}


def mixed(functions: Mapping[str, Any], model: nn.Module) -> Functions:
    """The first of them is a tensor."""
    first = next(name for name, loss in functions.items() if callable(loss))
    return {**functions, first: functions[first]()}


WAYS: dict[str, Callable[[Mapping[str, Any], nn.Module], Functions]] = {
    "functions": lambda functions, model: {**functions},
    "mixed": mixed,
}


def recorded(
    model: nn.Module, losses: Mapping[str, Any], path: Path, **how: Any
) -> tuple[np.ndarray, list[Tensor | None], dict[str, list[float]]]:
    with Recorder(model, path, **how) as recorder:
        recorder.backward(**losses)
    run = open_run(path)
    return run.gram(), grads_of(model), {name: v.tolist() for name, v in run.losses().items()}


# As with tensors.

ARCHITECTURES = ["llama", "gpt2", "qwen2", "mixtral", "nanogpt", "t5", "vit", "cnn", "lstm"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_are_those_of_tensors_to_the_bit(name: str, tmp_path: Path) -> None:
    sides = ("forget", "retain", "world")
    batches = {side: batch_for(name, seed) for seed, side in enumerate(sides)}
    objectives: list[Any] = [{"forget": -1.0}, {"forget": -1.0, "retain": 0.5}]
    for number, objective in enumerate(objectives):
        model, update = made(name), bool(number)

        def functions(model: nn.Module = model, objective: Any = objective) -> Functions:
            risks = {s: partial(loss_of, name, model, batch) for s, batch in batches.items()}
            return {"objective": objective, **risks}

        path = tmp_path / f"{number} tensors.h5"
        expected = recorded(model, as_tensors(functions(), model), path, update=update)
        for way, given in WAYS.items():
            model.zero_grad()
            path = tmp_path / f"{number} {way}.h5"
            found = recorded(model, given(functions(), model), path, update=update)
            assert np.array_equal(found[0], expected[0], equal_nan=True), way
            assert same(found[1], expected[1]), way
            assert found[2] == expected[2], way


class Dropped(nn.Module):
    """Dropout, running statistics and a power iteration; some activations are checkpointed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.Sequential(
            nn.utils.spectral_norm(nn.Linear(6, 8)), nn.BatchNorm1d(8), nn.Dropout(0.3)
        )
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.3))
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.inner, self.norm(x), use_reentrant=False))


def risk(model: nn.Module, seed: int) -> Tensor:
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(seed))
    return model(x.requires_grad_()).square().mean()


OBJECTIVES: dict[str, Any] = {
    "ascent": {"forget": -1.0},
    "difference": {"forget": -1.0, "retain": 0.5},
}
RECTIFIERS: dict[str, Any] = {
    "none": None,
    "gradient": {},
    "update": {"space": "update"},
    "measured": {"measure_update": True},
}


def functions_of(model: nn.Module, step: int, *, objective: Any, world: bool = True) -> Functions:
    sides = ("forget", "retain", *(["world"] if world else []))
    risks = {s: partial(risk, model, 10 * i + step) for i, s in enumerate(sides)}
    return {"objective": objective, **risks}


def trained(
    path: Path | None, way: str, objective: Any, rectifier: Any, *, micro: int = 1, **how: Any
) -> dict[str, Tensor]:
    """Two steps with dropout; the model, the optimizer and random numbers after them."""
    model = Dropped()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    torch.manual_seed(1)
    placed = {} if rectifier in (None, {}) else {"optimizer": optimizer}
    rectifies = None if rectifier is None else Rectifier(model, **rectifier, **placed)
    recorder = None if path is None else Recorder(model, path, **how)
    for step in range(2):
        for part in range(micro):
            losses = functions_of(
                model, step + 100 * part, objective=objective, world=recorder is not None
            )
            if way == "tensors":
                losses = as_tensors(losses, model)
            last = part == micro - 1
            if recorder is not None:
                recorder.backward(rectifier=rectifies, accumulate=not last, **losses)
            elif rectifies is not None:
                rectifies.backward(accumulate=not last, **losses)
            else:
                sum(w * as_tensors(losses, model)[n] for n, w in objective.items()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    if recorder is not None:
        recorder.close()
    if rectifies is not None:
        rectifies.detach()
    moments = [x for state in optimizer.state.values() for x in state.values()]
    return {
        **model.state_dict(),
        "moments": torch.cat([x.flatten() for x in moments]),
        "random": torch.get_rng_state(),
    }


def assert_alike(some: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> None:
    assert [name for name, x in some.items() if not torch.equal(x, others[name])] == []


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("update", [False, True])
@pytest.mark.parametrize("rectifier", RECTIFIERS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_watched_training_ends_as_unwatched_with_dropout(
    objective: str, rectifier: str, update: bool, micro: int, tmp_path: Path
) -> None:
    told = OBJECTIVES[objective], RECTIFIERS[rectifier]
    watched = trained(tmp_path / "a.h5", "functions", *told, micro=micro, update=update)
    tensors = trained(tmp_path / "b.h5", "tensors", *told, micro=micro, update=update)
    if objective == "ascent" or rectifier != "none":
        assert_alike(watched, trained(None, "functions", *told, micro=micro))
    assert_alike(watched, tensors)
    runs = [open_run(tmp_path / f"{which}.h5") for which in "ab"]
    assert np.array_equal(runs[0].gram(), runs[1].gram(), equal_nan=True)


def test_a_scaler_scales_what_is_asked_for(tmp_path: Path) -> None:
    model = tiny.llama()
    pair = tiny.pairs(1)[0]
    functions = {
        "objective": {"forget": -1.0},
        **{side: partial(nll, model, batch) for side, batch in pair.items()},
    }
    found = []
    for which, losses in enumerate((functions, as_tensors(functions, model))):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        with Recorder(model, tmp_path / f"{which}.h5") as recorder:
            recorder.backward(scaler=scaler, **losses)
        found.append((open_run(tmp_path / f"{which}.h5").gram(), grads_of(model)))
        model.zero_grad()
    assert np.array_equal(found[0][0], found[1][0])
    assert same(found[0][1], found[1][1])


# One graph at a time.


class Watch:
    """Wraps functions of losses: what their graphs hold is counted, by weak references."""

    def __init__(self) -> None:
        self.alive: list[tuple[str, weakref.ref[Any]]] = []
        self.at_start: dict[str, list[str]] = {}

    def over(self, functions: Mapping[str, Any]) -> Functions:
        return {n: partial(self._asked, n, f) if callable(f) else f for n, f in functions.items()}

    def holding(self) -> list[str]:
        """The losses of whose graphs something is alive."""
        return sorted({name for name, ref in self.alive if ref() is not None})

    def _asked(self, name: str, function: Callable[[], Tensor]) -> Tensor:
        self.at_start[name] = self.holding()

        def pack(tensor: Tensor) -> Any:
            # A tensor may be kept alive from C++ alone, an object of ours is kept by the graph. One
            # that held an output of its own node would keep itself alive.
            saved = _Saved(tensor.detach())
            if not isinstance(tensor, nn.Parameter):
                self.alive.append((name, weakref.ref(saved)))
            return saved

        with saved_tensors_hooks(pack, lambda saved: saved.tensor):
            return function()


class _Saved:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@pytest.mark.parametrize("how", [{}, {"update": True}, {"rectified": True}])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_graph_of_a_loss_is_gone_before_the_next_is_asked(
    objective: str, how: dict[str, bool], tmp_path: Path
) -> None:
    model, watch = tiny.llama(), Watch()
    batches = {**tiny.pairs(1)[0], "world": tiny.batch(7)}
    risks = {side: partial(nll, model, batch) for side, batch in batches.items()}
    functions = watch.over({"objective": OBJECTIVES[objective], **risks})
    rectifier = Rectifier(model) if how.get("rectified") else None
    with Recorder(model, tmp_path / "a.h5", update=how.get("update", False)) as recorder:
        recorder.backward(rectifier=rectifier, **functions)
        assert watch.at_start == {"forget": [], "retain": [], "world": []}
        assert watch.holding() == []
    if how.get("rectified"):
        watch.at_start.clear()
        model.zero_grad()
        Rectifier(model).backward(**functions)
        assert watch.at_start == {"forget": [], "retain": []}


def counted(model: nn.Module) -> list[int]:
    """How many rows each forward pass of the model gets."""
    rows: list[int] = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    return rows


@pytest.mark.parametrize("world", [False, True])
def test_a_shared_forward_is_run_once_and_gone_before_the_next(world: bool, tmp_path: Path) -> None:
    model = tiny.llama(dropout=0.2).train()
    before = FrozenModel.copied(model)
    pair = {**tiny.pairs(1)[0], **({"world": tiny.batch(7, rows=5)} if world else {})}

    def functions(model: nn.Module) -> Functions:
        shared = SharedForward(model)
        risks = {side: partial(nll, shared, batch) for side, batch in pair.items()}
        return {"objective": lambda: NPO()(shared, pair, before), **risks}

    watch, rows = Watch(), counted(model)
    torch.manual_seed(3)
    found = recorded(model, watch.over(functions(model)), tmp_path / "a.h5")
    assert rows == [3, 4, 5][: 3 if world else 2]
    assert watch.at_start["forget"] == ["objective"]
    assert watch.at_start["retain"] == ["objective"]  # of which the shared forward is let go later
    torch.manual_seed(3)
    model.zero_grad()
    expected = recorded(model, as_tensors(functions(model), model), tmp_path / "b.h5")
    assert np.array_equal(found[0], expected[0])
    assert same(found[1], expected[1])


def test_what_a_shared_forward_remembers_goes_before_the_model_runs_on_another_batch(
    tmp_path: Path,
) -> None:
    model, watch = tiny.llama(), Watch()
    pair = {**tiny.pairs(1)[0], "world": tiny.batch(7, rows=5)}
    at_forward: list[list[str]] = []
    model.register_forward_pre_hook(lambda *_: at_forward.append(watch.holding()))
    shared = SharedForward(model)
    risks = {side: partial(nll, shared, batch) for side, batch in pair.items()}
    losses = {"objective": lambda: WeightedGradientAscent()(shared, pair), **risks}
    with Recorder(model, tmp_path / "a.h5") as recorder:
        recorder.backward(**watch.over(losses))
    assert at_forward == [[], [], []]
    assert watch.holding() == []


def test_parts_that_share_a_forward_with_a_risk_are_run_once(tmp_path: Path) -> None:
    model = tiny.llama(dropout=0.2).train()
    pair, rows = tiny.pairs(1)[0], counted(model)

    def functions() -> Functions:
        shared = SharedForward(model)
        return {
            "objective": {"wga": 1.0, "retain": 0.5},
            "wga": lambda: WeightedGradientAscent()(shared, pair),
            "retain": partial(nll, shared, pair["retain"]),
            "forget": partial(nll, shared, pair["forget"]),
        }

    found = []
    for which, way in enumerate((WAYS["functions"], WAYS["mixed"], as_tensors)):
        model.zero_grad()
        rows.clear()
        torch.manual_seed(3)
        losses = way(functions(), model)
        found.append(recorded(model, losses, tmp_path / f"{which}.h5"))
        assert rows == [3, 4]
    for gram, grads, _ in found[:2]:
        assert np.array_equal(gram, found[2][0])
        assert same(grads, found[2][1])


def test_a_joint_objective_and_its_risks_share_their_forwards(tmp_path: Path) -> None:
    model = tiny.llama(dropout=0.2).train()
    before, rows = FrozenModel.copied(model), counted(model)
    pair = tiny.pairs(1)[0]
    objective = GradDiff(NPO(), weight=0.5)
    found = []
    for way in (WAYS["functions"], as_tensors):
        shared = SharedForward(model)
        functions = {
            "objective": partial(objective, shared, pair, before),
            **{side: partial(nll, shared, batch) for side, batch in pair.items()},
        }
        model.zero_grad()
        rows.clear()
        torch.manual_seed(3)
        found.append(recorded(model, way(functions, model), tmp_path / f"{len(found)}.h5"))
        assert rows == [3, 4]
    assert np.array_equal(found[0][0], found[1][0])
    assert same(found[0][1], found[1][1])


def test_a_rectifier_takes_tensors_and_functions_of_one_forward() -> None:
    found = []
    for tensors in ((), ("retain",), ("npo",), ("npo", "retain")):
        model, pair = tiny.llama(), tiny.pairs(1)[0]
        shared = SharedForward(model)
        losses: Functions = {
            "npo": partial(WeightedGradientAscent(), shared, pair),
            "retain": partial(nll, shared, pair["forget"]),  # on the same batch
        }
        losses |= {name: losses[name]() for name in tensors}
        Rectifier(model, rule=lambda K: torch.ones(len(K), 2)).backward(
            objective={"npo": -1.0}, **losses
        )
        found.append(grads_of(model))
    assert all(same(found[0], grads) for grads in found[1:])


def test_one_function_under_two_names_is_asked_once(tmp_path: Path) -> None:
    model, pair = tiny.llama(), tiny.pairs(1)[0]
    rows = counted(model)
    loss = partial(nll, model, pair["forget"])
    gram, _, _ = recorded(model, {"objective": loss, "forget": loss}, tmp_path / "a.h5")
    assert rows == [3]
    assert np.array_equal(gram[:, :, 0], gram[:, :, 1])


def test_implicit_weights_are_asked_for_with_the_objective(tmp_path: Path) -> None:
    model = tiny.llama(dropout=0.2).train()
    pair, rows = tiny.pairs(1)[0], counted(model)
    objective = WeightedGradientAscent()
    for which in range(3):
        shared = SharedForward(model)
        losses: Functions = {
            "objective": partial(objective, shared, pair),
            "retain": partial(nll, shared, pair["retain"]),
        }
        weights: Any = partial(objective.implicit_weights, shared, pair)
        rows.clear()
        torch.manual_seed(3)
        if which:
            losses = as_tensors(losses, model)
        if which == 2:
            weights = weights()
        with Recorder(model, tmp_path / f"{which}.h5") as recorder:
            recorder.backward(weights=weights, **losses)
        assert rows == [3, 4]
    runs = [open_run(tmp_path / f"{which}.h5").weights() for which in range(3)]
    assert runs[0].keys() == {"weight", "inverse confidence"}
    for found in runs[1:]:
        np.testing.assert_equal(runs[0], found)


# What is not captured is not asked.


def test_a_risk_that_is_not_due_is_not_asked(tmp_path: Path) -> None:
    model, asked = nn.Linear(6, 1), []

    def loss(name: str, seed: int) -> Tensor:
        asked.append(name)
        return risk(model, seed)

    with Recorder(model, tmp_path / "a.h5", when=lambda step: step == 1) as recorder:
        for _ in range(2):
            recorder.backward(
                retain=partial(loss, "retain", 0),
                objective={"forget": -1.0},
                forget=partial(loss, "forget", 1),
                weights=lambda: asked.append("weights") or {"w": torch.ones(2)},
            )
    assert asked == ["forget", "forget", "weights", "retain"]
    assert open_run(tmp_path / "a.h5").sources == ("retain", "objective", "forget")


# What a function may not do.


def ends_in_backward(model: nn.Module) -> Tensor:
    loss = risk(model, 1)
    loss.backward(retain_graph=True)
    return loss


def moves(model: nn.Module) -> Tensor:
    loss = risk(model, 1)
    with torch.no_grad():
        model.head.weight.add_(1.0)
    return loss


def steps(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
    optimizer.step()
    return risk(model, 1)


def raises(model: nn.Module) -> Tensor:
    risk(model, 1)
    raise ZeroDivisionError("in a loss")


async def later(model: nn.Module) -> Tensor:
    return risk(model, 1)


def no_graph(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return risk(model, 1)


RETURNS = (
    r"Loss `retain` should be a function that returns a scalar tensor with a graph. Found o.. "
)
ASKED = r"Loss `retain` should be given by a function without arguments. Found "
BAD: dict[str, tuple[Callable[..., Any], type[Exception], str]] = {
    "a float": (lambda m: lambda: 1.5, TypeError, RETURNS + "that returned `float`. Return the"),
    "nothing": (lambda m: lambda: None, TypeError, RETURNS + "that returned `NoneType`. Return"),
    "a function": (lambda m: lambda: risk, TypeError, RETURNS + "that returned `function`. Ret"),
    "a pair": (lambda m: lambda: (risk(m, 1), 1), TypeError, RETURNS + "that returned `tuple`."),
    "no scalar": (
        lambda m: lambda: m(torch.randn(3, 6)), ValueError,
        RETURNS + r"that returned shape \(3, 1\)",
    ),
    "no graph": (lambda m: partial(no_graph, m), ValueError, RETURNS + "that returned a tensor w"),
    "detached": (lambda m: lambda: risk(m, 1).detach(), ValueError, RETURNS + "that returned a te"),
    "not finite": (
        lambda m: lambda: risk(m, 1) * torch.inf, ValueError,
        "`retain` should be finite. Found inf",
    ),
    "another model": (
        lambda m: partial(risk, Dropped(), 1), ValueError,
        "Loss `retain` should be computed with the model that is watched. Found none",
    ),
    "an error": (lambda m: partial(raises, m), ZeroDivisionError, "in a loss"),
    "a backward pass": (
        lambda m: partial(ends_in_backward, m), RuntimeError,
        r"Loss `retain` should leave `.grad` alone.* Found gradients .* Let the function return",
    ),
    "moved parameters": (
        lambda m: partial(moves, m), RuntimeError,
        r"Loss `retain` should leave the parameters as they are.* Found .* Step after",
    ),
    "a step": (
        lambda m: partial(steps, m, torch.optim.AdamW(m.parameters(), fused=True)), RuntimeError,
        r"No step should be taken while a loss is asked.* Found .* after the backward",
    ),
    "a freed graph": (
        lambda m: partial(torch.clone, spent(m)), RuntimeError,
        r"Loss `retain` should have a graph that no .* Found one that was.* Compute it anew",
    ),
    "arguments": (lambda m: lambda x: risk(m, 1), TypeError, ASKED + r"one that takes `\(x\)`"),
    "a module": (lambda m: m, TypeError, ASKED + r"one that takes `.*`. Pass lambda"),
    "a coroutine": (lambda m: partial(later, m), TypeError, ASKED + "a coroutine. Pass a function"),
    "a hidden coroutine": (
        lambda m: lambda: later(m), TypeError, RETURNS + "that returned `coroutine`. Return the",
    ),
}  # fmt: skip


def spent(model: nn.Module) -> Tensor:
    loss = risk(model, 1)
    loss.backward()
    model.zero_grad()
    return loss


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("on_error", ["raise", "warn"])
@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("kind", BAD)
def test_a_function_that_is_no_loss_costs_nothing(
    kind: str, micro: int, on_error: Any, tmp_path: Path
) -> None:
    model, path = Dropped(), tmp_path / "a.h5"
    make, error, says = BAD[kind]
    forget = partial(risk, model, 0)
    with Recorder(model, path, on_error=on_error) as recorder:
        recorder.backward(objective={"forget": -1.0}, forget=forget, retain=partial(risk, model, 1))
        model.zero_grad()
        bad = make(model)
        recorder.backward(objective={"forget": -1.0}, forget=forget, retain=partial(risk, model, 1))
        written = open_run(path).steps.tolist()
        for part in range(1, micro):
            recorder.backward(
                objective={"forget": -1.0}, forget=forget, retain=partial(risk, model, part),
                accumulate=True,
            )  # fmt: skip
        before, hooks = grads_of(model), len(hooks_left(model))
        kept = [p.grad for p in model.parameters()]
        with pytest.raises(error, match=says):
            recorder.backward(objective={"forget": -1.0}, forget=forget, retain=bad)
        assert all(p.grad is grad for p, grad in zip(model.parameters(), kept, strict=True))
        assert same(grads_of(model), before)
        assert len(hooks_left(model)) == hooks
        assert written == [0]
        recorder.backward(objective={"forget": -1.0}, forget=forget, retain=partial(risk, model, 1))
    assert open_run(path).steps.tolist() == [0, 1, 2]
    rectifier = Rectifier(Dropped())
    model = rectifier._model
    with pytest.raises(error, match=says):
        rectifier.backward(
            objective={"forget": -1.0}, forget=partial(risk, model, 0), retain=make(model)
        )
    assert all(p.grad is None for p in model.parameters())
    assert not any(v is not None for v in rectifier.watched["retain_ema"])


@pytest.mark.parametrize("asks", ["recorder", "rectifier"])
def test_nothing_is_recorded_or_rectified_inside_of_a_loss(asks: str, tmp_path: Path) -> None:
    model = Dropped()
    rectifier = Rectifier(model)
    retain = partial(risk, model, 1)
    with Recorder(model, tmp_path / "a.h5") as recorder:

        def inner() -> Tensor:
            outer: Any = recorder if asks == "recorder" else rectifier
            outer.backward(objective=partial(risk, model, 0), retain=retain)
            return risk(model, 0)

        with pytest.raises(RuntimeError, match=r"No step should be taken while a loss is asked"):
            recorder.backward(objective=inner, retain=retain)
        assert all(p.grad is None for p in model.parameters())
        recorder.backward(objective=partial(risk, model, 0), retain=retain)
    assert open_run(tmp_path / "a.h5").steps.tolist() == [0]


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        (lambda: 3, "`weights` should be tensors by name, .* Found `int`. Pass what"),
        (lambda: {"x": 1.0}, "`weights` should be tensors by name, .* Found `float`. Pass what"),
        ({"x": [1.0]}, "`weights` should be tensors by name, .* Found `list`. Pass what"),
        (
            lambda batch: {},
            r"`weights` should be given by a function without .* Found .* `\(batch\)`",
        ),
    ],
)
@pytest.mark.parametrize("asked", [False, True])
def test_weights_that_are_none_cost_nothing(
    weights: Any, says: str, asked: bool, tmp_path: Path
) -> None:
    model = Dropped()
    objective = partial(risk, model, 0)
    with (
        Recorder(model, tmp_path / "a.h5") as recorder,
        pytest.raises(TypeError, match=says),
    ):
        recorder.backward(objective=objective if asked else objective(), weights=weights)
    assert all(p.grad is None for p in model.parameters())
    assert not (tmp_path / "a.h5").exists()


def test_tensors_and_functions_that_share_a_graph_otherwise_are_refused(tmp_path: Path) -> None:
    model = Dropped()
    kept: dict[str, Tensor] = {}

    def remembered() -> Tensor:
        kept.setdefault("loss", risk(model, 0))
        return kept["loss"] * 2

    with (
        Recorder(model, tmp_path / "a.h5") as recorder,
        pytest.raises(RuntimeError, match=r"Loss `forget` should have a graph .* by `geffect"),
    ):
        recorder.backward(objective=remembered, forget=lambda: remembered() * 3)
    assert all(p.grad is None for p in model.parameters())
    assert not (tmp_path / "a.h5").exists()


def test_the_loop_that_asks_may_be_one_of_coroutines(tmp_path: Path) -> None:
    model = Dropped()

    async def step() -> None:
        with Recorder(model, tmp_path / "a.h5") as recorder:
            recorder.backward(objective=partial(risk, model, 0), retain=partial(risk, model, 1))

    asyncio.run(step())
    assert open_run(tmp_path / "a.h5").steps.tolist() == [0]
