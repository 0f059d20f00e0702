"""Two runs held against each other: each injected fault is named."""

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from geffect import Recorder, Rectifier, Run, open_run
from geffect.analysis import compare
from geffect.projection import gru
from geffect.risk import nll
from geffect.store.writer import RunWriter
from tests.utils import shallow as tiny
from tests.utils.command_line import Ask
from tests.utils.runs import PARAMETERS, PLAIN, SOURCES, row_of

STEPS = 6

Fault = Callable[[int, nn.Module, torch.optim.Optimizer, dict[str, Any]], None]


def nothing(step: int, model: nn.Module, optimizer: torch.optim.Optimizer, data: Any) -> None:
    """No fault."""


def recorded(
    path: Path, fault: Fault = nothing, *, steps: int = STEPS, layers: int = 4, **how: Any
) -> Run:
    """A training by gradient difference, with a fault that is called before each step."""
    torch.manual_seed(0)
    config = tiny.llama().config
    config.num_hidden_layers = layers
    model = LlamaForCausalLM(config).to(how.pop("dtype", torch.float32))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rectifier = how.pop("rectifier", lambda model, optimizer: None)(model, optimizer)
    with Recorder(model, path, **{"update": True} | how) as recorder:
        for step in range(steps):
            data = {"forget": tiny.batch(step), "retain": tiny.batch(100 + step)}
            fault(step, model, optimizer, data)
            losses = {name: nll(model, batch) for name, batch in data.items()}
            recorder.backward(
                objective={"forget": -1.0, "retain": 1.0}, **losses,
                **({"rectifier": rectifier} if rectifier else {}),
            )  # fmt: skip
            optimizer.step()
            optimizer.zero_grad()
    return open_run(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return recorded(tmp_path_factory.mktemp("compare") / "whole.h5")


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Fault], Run]:
    """The training with a fault, recorded once."""
    folder = tmp_path_factory.mktemp("faulty")
    return cache(lambda fault: recorded(folder / f"{fault.__name__}.h5", fault))


def faster(step: int, model: nn.Module, optimizer: torch.optim.Optimizer, data: Any) -> None:
    optimizer.param_groups[0]["lr"] = 1.1e-3 if step == 3 else 1e-3


def frozen(step: int, model: nn.Module, optimizer: torch.optim.Optimizer, data: Any) -> None:
    if step == 3:
        for group in optimizer.param_groups:
            kept = [p for n, p in model.named_parameters() if ".layers.3." not in n]
            group["params"] = kept


def swapped(step: int, model: nn.Module, optimizer: torch.optim.Optimizer, data: Any) -> None:
    if step == 2:
        ids = data["retain"]["input_ids"].clone()
        ids[0] = tiny.batch(999)["input_ids"][0]
        data["retain"] = {**data["retain"], "input_ids": ids, "labels": ids}


def all_swapped(step: int, model: nn.Module, optimizer: torch.optim.Optimizer, data: Any) -> None:
    if step == 2:
        data |= {name: tiny.batch(999 + i) for i, name in enumerate(data)}


def scaled(step: int, model: nn.Module, optimizer: torch.optim.Optimizer, data: Any) -> None:
    if step == 0:
        model.model.layers[2].register_full_backward_hook(
            lambda module, inner, outer: tuple(None if g is None else 1.5 * g for g in inner)
        )


def scaled_itself(step: int, model: nn.Module, optimizer: torch.optim.Optimizer, data: Any) -> None:
    if step == 2:
        model.model.layers[2].mlp.up_proj.weight.register_hook(lambda gradient: 1.5 * gradient)


def other_parameters(step: int, model: nn.Module, optimizer: Any, data: Any) -> None:
    if step == 0:
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(1.5)


def test_a_training_that_is_repeated_is_identical(whole: Run, tmp_path: Path) -> None:
    found = compare(whole, recorded(tmp_path / "again.h5"))
    assert (found.level, found.step, found.layers) == ("identical", None, ())
    assert found.sentence == f"The runs are identical: all {STEPS} steps are the same, bit for bit."
    assert found.table["value"].eq(0).all() and len(found.table) == STEPS * len(whole.layers)


@pytest.mark.parametrize(
    ("fault", "step", "layers", "says"),
    [
        (faster, 3, None, r"step 3: update, in all .* factor of 1.1. .*learning rate differs"),
        (frozen, 3, ("layer 3",), r"step 3: update, in layer 3\. .*`\w+` does not move layer 3"),
        (swapped, 2, (), "step 2: forward, source retain. The other losses are equal"),
        (all_swapped, 2, (), "step 2: forward, all losses"),
        (scaled, 0, ("layer 1",), "step 0: backward. .* layer 1 is nearest to the loss"),
        (scaled_itself, 2, ("layer 2",), "step 2: backward. .*differ, in layer 2; "),
        (other_parameters, 0, (), "step 0: forward, all losses.* or the parameters to begin with"),
    ],
)
def test_a_fault_is_named(
    whole: Run,
    faulty: Callable[[Fault], Run],
    fault: Fault,
    step: int,
    layers: Any,
    says: str,
) -> None:
    other = faulty(fault)
    for a, b, factor in ((whole, other, "1.1"), (other, whole, "0.9091")):
        found = compare(a, b)
        assert (found.level, found.step) == ("diverged", step)
        assert layers is None or found.layers == layers
        assert re.search(says.replace("1.1", factor), found.sentence), found.sentence


def test_the_difference_is_that_of_a_loop(whole: Run, faulty: Callable[[Fault], Run]) -> None:
    other = faulty(scaled)
    table = compare(whole, other).table
    expected = []
    for K, L in zip(whole.gram(), other.gram(), strict=True):
        for k, l in zip(K, L, strict=True):  # noqa: E741
            worst, known = 0.0, [i for i in range(len(k)) if not np.isnan(k[i, i])]
            for i in known:
                for j in known:
                    lengths = [max(k[n, n], l[n, n]) ** 0.5 for n in (i, j)]
                    worst = max(worst, abs(k[i, j] - l[i, j]) / lengths[0] / lengths[1])
            expected.append(worst)
    assert len({*table["parameter"]}) == len(whole.layers)
    layers = {parameter.name: parameter.layer for parameter in whole.layers}
    assert table["layer"].tolist() == [layers[name] for name in table["parameter"]]
    found = table.pivot_table(index="step", columns="parameter", values="value", observed=True)
    names = [parameter.name for parameter in whole.layers]
    assert found[names].to_numpy().ravel() == pytest.approx(np.array(expected), rel=1e-9)


def test_what_a_rectifier_made_is_told_from_the_gradients(tmp_path: Path) -> None:
    def by(beta: float) -> Callable[[nn.Module, torch.optim.Optimizer], Rectifier]:
        return lambda model, optimizer: Rectifier(model, gru, ema=beta, optimizer=optimizer)

    a, b = (recorded(tmp_path / f"{i}.h5", rectifier=by(ema)) for i, ema in enumerate((0.9, 0.5)))
    found = compare(a, b)
    assert found.step == 1 and "step 1: rectifier. " in found.sentence
    assert "another rectifier" in found.sentence


def test_rounding_of_short_types_is_no_divergence(tmp_path: Path) -> None:
    a = recorded(tmp_path / "a.h5", steps=1, update=False)
    b = recorded(tmp_path / "b.h5", steps=1, update=False, dtype=torch.bfloat16)
    found = compare(a, b)
    assert found.level == "rounding" and 0 < found.table["value"].max() < 0.125
    assert "rounding of bfloat16 and float32" in found.sentence


def test_a_step_that_short_types_lose_is_one(whole: Run, tmp_path: Path) -> None:
    found = compare(whole, recorded(tmp_path / "b.h5", steps=1, dtype=torch.bfloat16))
    assert found.step == 0 and "`b` does not move layer 0" in found.sentence


def test_a_run_that_goes_on_is_the_same_as_far_as_the_shorter_one(
    whole: Run, tmp_path: Path
) -> None:
    short = recorded(tmp_path / "short.h5", steps=4)
    found = compare(whole, short)
    assert found.level == "rounding" and found.step is None
    assert found.sentence == (
        "The runs are the same, bit for bit, in the 4 steps that both have. "
        f"`whole` has {STEPS - 4} steps that `short` has not."
    )


def test_without_the_update_what_is_not_known_is_said(tmp_path: Path) -> None:
    a, b = (recorded(tmp_path / f"{f.__name__}.h5", f, update=False) for f in (nothing, faster))
    found = compare(a, b)
    assert found.step == 4
    assert "or the parameters after step 3, whose update is not recorded" in found.sentence


def test_a_loss_that_is_infinite_in_one_run_is_a_difference(tmp_path: Path) -> None:
    for name, loss in (("a", 1.0), ("b", np.inf)):
        writer = RunWriter(tmp_path / f"{name}.h5", PARAMETERS)
        writer.begin(PLAIN)
        writer.append(row_of(0))
        writer.append(row_of(1, losses=np.array([1.0, loss, 1.0])))
        writer.close(complete=True)
    a, b = (open_run(tmp_path / f"{name}.h5") for name in "ab")
    for found in (compare(a, b), compare(b, a)):
        assert found.step == 1 and "forward, source forget" in found.sentence
    assert compare(b, b).level == "identical"


def test_negative_estimates_of_squares_are_compared_too(tmp_path: Path) -> None:
    shape = (len(PARAMETERS), len(SOURCES), len(SOURCES))
    estimates = np.random.default_rng(0).normal(size=shape)
    estimates = estimates + estimates.swapaxes(1, 2)
    assert (np.einsum("pii->pi", estimates) < 0).any()
    runs = []
    for name, factor in (("a", 1.0), ("b", 1.0 + 1e-9), ("c", 1.1)):
        writer = RunWriter(tmp_path / f"{name}.h5", PARAMETERS)
        writer.begin(PLAIN)
        writer.append(row_of(0, gram=factor * estimates))
        writer.close(complete=True)
        runs.append(open_run(tmp_path / f"{name}.h5"))
    a, b, c = runs
    assert (compare(a, b).level, compare(a, c).level) == ("rounding", "diverged")


def test_the_sign_of_a_zero_is_a_bit(tmp_path: Path) -> None:
    for name, loss in (("a", 0.0), ("b", -0.0), ("c", np.nan)):
        writer = RunWriter(tmp_path / f"{name}.h5", PARAMETERS)
        writer.begin(PLAIN)
        writer.append(row_of(0, losses=np.array([1.0, loss, 1.0])))
        writer.close(complete=True)
    a, b, c = (open_run(tmp_path / f"{name}.h5") for name in "abc")
    assert (compare(a, b).level, compare(b, a).level) == ("rounding", "rounding")
    assert [compare(run, run).level for run in (a, b, c)] == ["identical"] * 3


def test_other_models_are_refused(whole: Run, tmp_path: Path) -> None:
    other = recorded(tmp_path / "other.h5", steps=1, layers=2)
    with pytest.raises(ValueError, match=r"same parameters\. Found \d+ that differ between"):
        compare(whole, other)
    with pytest.raises(TypeError, match="`run` should be an open run"):
        compare(whole, "run.h5")  # type: ignore[arg-type]


def test_on_the_command_line(whole: Run, faulty: Callable[[Fault], Run], ask: Ask) -> None:
    other = faulty(frozen)
    assert ask("compare", whole.path, whole.path).code == 0
    said = ask("compare", whole.path, other.path)
    assert said.code == 1 and "layer 3" in said.out and "Farthest apart at step 3" in said.out
    assert re.search(r"mlp\.up_proj\.weight +│ layer 3 +│ ", said.out)
    facts = json.loads(ask("compare", whole.path, other.path, "--format", "json").out)
    assert (facts["level"], facts["step"], facts["layers"]) == ("diverged", 3, ["layer 3"])
    lines = ask("compare", whole.path, other.path, "--format", "tsv").out.splitlines()
    assert len(lines) == 1 + STEPS * len(whole.layers)
