"""Scores of a recorded run against naive autograd, on a GPT-2 in float64 and a Llama in float32."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from geffect import Recorder, Rectifier, Run, open_run
from geffect.analysis import conflict, cosine, g_effect, predicted_change, violation
from geffect.gram import cosine as cosine_of
from geffect.gram import norm
from geffect.layers import describe
from geffect.objectives import WeightedGradientAscent, nll
from geffect.scores import score_of
from tests.utils import reference, tiny

STEPS = 4
Named = dict[str, Tensor]


@dataclass(frozen=True)
class Recorded:
    """A run, and by step what plain autograd says of the same gradients."""

    run: Run
    gradients: list[dict[str, Named]]
    tolerance: float


@pytest.fixture(scope="module", params=["gpt2-float64", "llama-float32", "llama-tied"])
def recorded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """Four steps of WGA under AdamW, with every gradient taken a second time."""
    models = {
        "gpt2-float64": (tiny.gpt2, 1e-10),
        "llama-float32": (tiny.llama, 1e-5),
        "llama-tied": (lambda: tiny.llama(tied=True), 1e-5),
    }
    make, tolerance = models[request.param]
    model, path = make(), tmp_path_factory.mktemp("run") / "run.h5"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rectifier = Rectifier(model, None, ema=0.5)
    objective = WeightedGradientAscent(2.0)
    gradients, average = [], None
    with Recorder(model, path, update=True) as recorder:
        for pair in tiny.pairs(STEPS):
            naive = {
                "objective": reference.gradient(model, objective(model, pair)),
                "forget": reference.gradient(model, reference.nll(model, pair["forget"])),
                "retain": reference.gradient(model, reference.nll(model, pair["retain"])),
            }
            average = {
                n: r if average is None else 0.5 * r + 0.5 * average[n]
                for n, r in naive["retain"].items()
            }
            before = {n: p.detach().clone() for n, p in model.named_parameters()}
            recorder.backward(
                objective=objective(model, pair),
                forget=nll(model, pair["forget"]),
                retain=nll(model, pair["retain"]),
                rectifier=rectifier,
            )
            optimizer.step()
            optimizer.zero_grad()
            update = {n: p.detach() - before[n] for n, p in model.named_parameters()}
            gradients.append({**naive, "retain_ema": average, "update": update})
    return Recorded(open_run(path), gradients, tolerance)


def expected(recorded: Recorded, a: str, b: str, names: list[str]) -> list[tuple[float, float]]:
    """(<a, b>, |a||b|) of the parameters, for every step."""
    values = []
    for step in recorded.gradients:
        inner = sum(reference.inner(step[a], step[b], n) for n in names)
        lengths = [sum(reference.inner(step[s], step[s], n) for n in names) ** 0.5 for s in (a, b)]
        values.append((inner, lengths[0] * lengths[1]))
    return values


def blocks(run: Run, by: str) -> dict[str, list[str]]:
    """The parameter names of each block, by the name alone."""
    labels = {"parameter": lambda p: p.name, "layer": lambda p: p.layer,
              "group": lambda p: p.group, "model": lambda p: "model"}  # fmt: skip
    found: dict[str, list[str]] = {}
    for parameter in run.layers:
        found.setdefault(labels[by](parameter), []).append(parameter.name)
    return found


def values(table: pd.DataFrame, **where: str) -> np.ndarray:
    for column, value in where.items():
        table = table[table[column] == value]
    return table.sort_values("step")["value"].to_numpy()


@pytest.mark.parametrize("by", ["parameter", "layer", "group", "model"])
def test_g_effect(recorded: Recorded, by: str) -> None:
    table = g_effect(recorded.run, by=by)
    assert list(table.columns) == ["step", by, "effect", "value", "score", "unit"]
    for effect, risk in (("unlearning", "forget"), ("retaining", "retain")):
        for block, names in blocks(recorded.run, by).items():
            found = values(table, **{by: block, "effect": effect})
            naive = expected(recorded, risk, "objective", names)
            for value, (inner, lengths) in zip(found, naive, strict=True):
                assert abs(value - inner) <= recorded.tolerance * lengths


@pytest.mark.parametrize("by", ["parameter", "layer", "group", "model"])
@pytest.mark.parametrize("pair", [("forget", "retain"), ("objective", "retain_ema"),
                                  ("update", "objective")])  # fmt: skip
def test_cosine_and_conflict(recorded: Recorded, by: str, pair: tuple[str, str]) -> None:
    # The running average is kept in float32, also for a model in float64.
    tolerance = max(recorded.tolerance, 1e-6 if "retain_ema" in pair else 0.0)
    table, conflicts = cosine(recorded.run, *pair, by=by), conflict(recorded.run, *pair, by=by)
    for block, names in blocks(recorded.run, by).items():
        naive = expected(recorded, *pair, names)
        found, against = values(table, **{by: block}), values(conflicts, **{by: block})
        for value, opposed, (inner, lengths) in zip(found, against, naive, strict=True):
            assert value == pytest.approx(inner / lengths, abs=tolerance)
            if abs(inner) > tolerance * lengths:
                assert opposed == float(inner < 0)


@pytest.mark.parametrize("by", ["layer", "model"])
def test_predicted_change(recorded: Recorded, by: str) -> None:
    table = predicted_change(recorded.run, by=by)
    assert set(table["risk"]) == {"forget", "retain"}
    for risk in ("forget", "retain"):
        for block, names in blocks(recorded.run, by).items():
            naive = expected(recorded, risk, "update", names)
            for value, (inner, lengths) in zip(
                values(table, **{by: block, "risk": risk}), naive, strict=True
            ):
                assert abs(value + inner) <= 10 * recorded.tolerance * lengths


def test_violation(recorded: Recorded) -> None:
    names = [parameter.name for parameter in recorded.run.layers]
    naive = expected(recorded, "update", "retain_ema", names)
    assert values(violation(recorded.run)).tolist() == [
        float(inner / lengths > 1e-6) for inner, lengths in naive
    ]


def test_parameters_add_up_to_layers_groups_and_the_model(recorded: Recorded) -> None:
    sums = {
        by: g_effect(recorded.run, by=by).groupby(["step", "effect"], observed=True)["value"].sum()
        for by in ("parameter", "layer", "group", "model")
    }
    size = g_effect(recorded.run, "parameter").assign(value=lambda t: t["value"].abs())
    scale = size.groupby(["step", "effect"], observed=True)["value"].sum()
    for by in ("parameter", "layer", "group"):
        assert ((sums[by] - sums["model"]).abs() <= 1e-14 * scale).all(), by


def test_blocks_come_in_network_order(recorded: Recorded) -> None:
    depth = 2  # of every model here
    layers = list(g_effect(recorded.run)["layer"].cat.categories)
    first = layers.index("layer 0")
    assert all(name.startswith("embedding") for name in layers[:first]) and first > 0
    assert layers[first : first + depth] == [f"layer {i}" for i in range(depth)]
    assert layers[first + depth] == "final norm"


def test_groups_of_ones_own(recorded: Recorded) -> None:
    def kind(parameter: object) -> str:
        return "attention" if "attn" in parameter.module else "rest"  # type: ignore[attr-defined]

    table = cosine(recorded.run, "forget", "retain", by=kind)
    names = [p.name for p in recorded.run.layers if "attn" in p.name]
    naive = expected(recorded, "forget", "retain", names)
    for value, (inner, lengths) in zip(values(table, group="attention"), naive, strict=True):
        assert value == pytest.approx(inner / lengths, abs=recorded.tolerance)


def test_unknown_blocks_and_sources_are_refused(recorded: Recorded) -> None:
    with pytest.raises(ValueError, match=r"`by` should be one of parameter, .* Found `by = 'blo"):
        g_effect(recorded.run, by="block")
    with pytest.raises(ValueError, match=r"should be one of objective, .* Found `nothing`"):
        cosine(recorded.run, "nothing", "retain")


def test_a_run_without_updates_says_how_to_record_them(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    with Recorder(model, tmp_path / "run.h5") as recorder:
        loss = model(torch.ones(2)).sum()
        recorder.backward(objective={"forget": -1.0}, forget=loss)
    run = open_run(tmp_path / "run.h5")
    with pytest.raises(ValueError, match=r"Found `update`. Record with .*update=True"):
        predicted_change(run)
    with pytest.raises(ValueError, match="Found `retain`"):
        g_effect(run)


def test_a_zero_gradient_has_no_cosine_and_no_conflict(tmp_path: Path) -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 1), nn.Linear(2, 1)])})
    first, second = model["layers"]  # type: ignore[misc]
    with Recorder(model, tmp_path / "run.h5") as recorder:
        recorder.backward(
            objective=first(torch.ones(2)).sum() + 0 * second(torch.ones(2)).sum(),
            retain=first(torch.ones(2)).sum(),
        )
    run = open_run(tmp_path / "run.h5")
    for table in (cosine(run, "objective", "retain"), conflict(run)):
        assert np.isnan(table.set_index("layer")["value"]["layer 1"])
        assert not np.isnan(table.set_index("layer")["value"]["layer 0"])
    assert run.gram()[0, 2:, 0, 0].tolist() == [0.0, 0.0], "the norm is kept as what it is: zero"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_an_estimate_with_a_negative_square_has_no_norm(kind: Callable[..., Any]) -> None:
    """NaN, without a warning of numpy: some rows of an unbiased estimate are like that."""
    estimate = kind([[-1.0, -2.0], [-2.0, 4.0]])
    assert np.isnan(float(norm(estimate, 0))) and float(norm(estimate, 1)) == 2.0
    assert np.isnan(float(cosine_of(estimate, 0, 1)))


def test_layers_of_the_file_are_those_of_the_model(recorded: Recorded) -> None:
    if recorded.tolerance < 1e-8:
        assert recorded.run.layers == describe(tiny.gpt2())


def test_effects_of_adapters_are_labelled(tmp_path: Path) -> None:
    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lora_A = nn.ModuleDict({"default": nn.Linear(2, 1)})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.lora_A["default"](x)

    layers = nn.ModuleDict({"q_proj": Adapted()})
    with Recorder(layers, tmp_path / "run.h5") as recorder:
        loss = layers["q_proj"](torch.ones(2)).sum()
        recorder.backward(objective={"forget": -1.0}, forget=loss, retain=loss * loss)
    run = open_run(tmp_path / "run.h5")
    assert [p.name for p in run.layers] == ["q_proj.lora_A.weight", "q_proj.lora_A.bias"]
    for table in (g_effect(run), cosine(run, "objective", "retain"), conflict(run)):
        assert score_of(table).label.endswith(", adapter space")
