"""Which layers to train: gains as a loop finds them, the optimum of all choices, and warnings."""

import json
import re
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import nn

from geffect import Recorder, Run, open_run
from geffect.analysis import recommended_layers
from geffect.layers import Parameter, describe
from geffect.risk import nll
from geffect.store.schema import Contents, Row
from geffect.store.writer import RunWriter
from tests.utils import tiny
from tests.utils.command_line import Ask

SOURCES = ("objective", "forget", "retain", "world", "update")


def parameter(place: int, size: int = 4) -> Parameter:
    """Of a block of the network, of its embedding (-1) or its head (-2)."""
    name = {-1: "model.embed_tokens.weight", -2: "lm_head.weight"}.get(
        place, f"model.layers.{place}.mlp.weight"
    )
    layer = {-1: "embedding", -2: "head"}.get(place, f"layer {place}")
    return Parameter(name, layer, layer, max(-1, place), "weight", (size,), "float32", ())


def recorded(
    path: Path,
    gains: np.ndarray,
    harms: Sequence[np.ndarray],
    parameters: Sequence[Parameter] | None = None,
) -> Run:
    """A run with these inner products (step, parameter) of risks and update."""
    parameters = parameters or [parameter(place) for place in range(gains.shape[1])]
    writer = RunWriter(path, parameters, overwrite=True)
    writer.begin(Contents(SOURCES, {"metadata": {}}))
    risks = dict(zip(SOURCES[1:4], (gains, *harms), strict=True))
    for step in range(len(gains)):
        gram = np.tile(np.eye(len(SOURCES)), (len(parameters), 1, 1))
        for name, values in risks.items():
            place = SOURCES.index(name)
            gram[:, place, -1] = gram[:, -1, place] = values[step]
        writer.append(Row(step=step, lr=0.1, losses=np.zeros(len(SOURCES)), gram=gram))
    writer.close(complete=True)
    return open_run(path)


def steady(values: Sequence[float], steps: int = 10) -> np.ndarray:
    return np.tile(np.asarray(values, dtype=float) / steps, (steps, 1))


def test_gain_and_harm_are_what_a_loop_finds(tmp_path: Path) -> None:
    model = tiny.llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    names = [name for name, _ in model.named_parameters()]
    found: dict[str, dict[str, float]] = {}
    with Recorder(model, tmp_path / "run.h5", update=True) as recorder:
        for pair in tiny.pairs(9):
            pair["world"] = tiny.batch(7)
            losses = {name: nll(model, batch) for name, batch in pair.items()}
            grads = {
                name: torch.autograd.grad(loss, [*model.parameters()], retain_graph=True)
                for name, loss in losses.items()
            }
            before = [p.detach().clone() for p in model.parameters()]
            recorder.backward(objective={"forget": -1.0}, **losses)
            optimizer.step()
            optimizer.zero_grad()
            for name, of_risk in grads.items():
                for of, g, p, b in zip(names, of_risk, model.parameters(), before, strict=True):
                    layer = found.setdefault(name, {})
                    block = re.search(r"layers\.\d", of)
                    key = block.group() if block else of
                    layer[key] = layer.get(key, 0.0) + float((g.double() * (p - b)).sum().detach())
    table = recommended_layers(open_run(tmp_path / "run.h5")).table
    expected = found["forget"]
    harm = {k: sum(max(0.0, found[s][k]) for s in ("retain", "world")) for k in expected}
    keys = ["model.embed_tokens.weight", "layers.0", "layers.1", "model.norm.weight"]
    assert [*table["layer"]] == ["embedding", "layer 0", "layer 1", "final norm", "head"]
    for column, values in (("gain", expected), ("harm", harm)):
        own = [values[key] for key in (*keys, "lm_head.weight")]
        assert table[column].to_numpy() == pytest.approx(own, rel=1e-3)
    assert table["parameters"].sum() == sum(p.numel() for p in model.parameters())


def cheapest(gain: np.ndarray, harm: np.ndarray, wanted: float) -> float:
    """The least harm of all choices that reach the gain: some whole, and one in part."""
    costs = []
    for size in range(len(gain) + 1):
        for whole in combinations(range(len(gain)), size):
            had, cost = gain[[*whole]].sum(), harm[[*whole]].sum()
            if had >= wanted - 1e-12:
                costs.append(cost)
            for part in {*range(len(gain))} - {*whole}:
                share = (wanted - had) / gain[part]
                if 0 <= share <= 1:
                    costs.append(cost + share * harm[part])
    return min(costs)


def test_the_choice_is_the_optimum_of_all_choices(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    for _ in range(12):
        gain, harm = draw.uniform(0.1, 1, 6), draw.uniform(-0.2, 1, 6)
        share = float(draw.uniform(0.1, 1))
        run = recorded(tmp_path / "run.h5", steady(gain), [steady(harm), steady(harm * 0)])
        chosen = recommended_layers(run, share=share)
        fraction = chosen.table["fraction"].to_numpy()
        assert gain @ fraction == pytest.approx(share * gain.sum())
        paid = np.maximum(0.0, harm)
        assert paid @ fraction == pytest.approx(cheapest(gain, paid, share * gain.sum()))
        assert len(chosen.layers) == (fraction > 0).sum()
        by_count = recommended_layers(run, count=3).layers
        ratios = chosen.table.set_index("layer")["ratio"]
        assert [*by_count] == [*ratios.sort_values(ascending=False).index[:3]]


def test_no_layer_is_chosen_for_what_rounding_leaves(tmp_path: Path) -> None:
    """One layer has enough of the gain by itself: the next would give some 1e-16 of its own."""
    draw = np.random.default_rng(0)
    for _ in range(40):
        gain = np.array([draw.uniform(2, 3), *draw.uniform(0.1, 0.4, 2)])
        run = recorded(tmp_path / "run.h5", steady(gain), [steady([0.1, 1, 1]), steady(gain * 0)])
        chosen = recommended_layers(run, share=0.5)
        assert chosen.layers == ("layer 0",)


def test_a_share_that_cannot_be_had_is_told(tmp_path: Path) -> None:
    gains = steady([1, 1, 1])
    run = recorded(
        tmp_path / "run.h5", gains, [gains, gains * 0], [parameter(p) for p in (-1, 0, 1)]
    )
    chosen = recommended_layers(run, share=0.9)
    assert chosen.layers == ("layer 0", "layer 1")
    assert "have 2 of the 2.7 nats that were asked for" in chosen.warnings[0]


def test_more_layers_than_there_are_cannot_be_chosen(tmp_path: Path) -> None:
    gains = steady([1, 1])
    run = recorded(tmp_path / "run.h5", gains, [gains, gains * 0], [parameter(p) for p in (-1, 0)])
    chosen = recommended_layers(run, count=4)
    assert chosen.layers == ("layer 0",)
    assert "1, and not 4: there are no others beside embedding, norm" in chosen.warnings[0]
    with pytest.raises(ValueError, match=r"`share` should be above 0 .* Found `share = 'half'`"):
        recommended_layers(run, share="half")  # type: ignore[arg-type]


def test_a_run_that_learns_again_is_told(tmp_path: Path) -> None:
    gains = steady([1, -3])
    chosen = recommended_layers(recorded(tmp_path / "run.h5", gains, [gains, gains * 0]))
    assert chosen.layers == ()
    assert "does not forget: its gain is -2 nats" in chosen.warnings[0]


def test_of_two_alike_the_smaller_one_comes_first(tmp_path: Path) -> None:
    run = recorded(
        tmp_path / "run.h5", steady([1, 1, 1]), [steady([1, 1, 1]), steady([0, 0, 0])],
        [parameter(0, 9), parameter(1, 3), parameter(2, 6)],
    )  # fmt: skip
    assert recommended_layers(run, count=3).layers == ("layer 1", "layer 2", "layer 0")


def test_harm_of_one_set_is_not_made_good_by_another(tmp_path: Path) -> None:
    run = recorded(tmp_path / "run.h5", steady([1, 1]), [steady([3, 2]), steady([-3, -1])])
    assert recommended_layers(run).table["harm"].tolist() == pytest.approx([3, 2])
    # While the steps of one set do: what a step takes, another may give back.
    swinging = steady([2, 2]) * np.where(np.arange(10) % 2, 1, -1)[:, None]
    run = recorded(tmp_path / "run.h5", steady([1, 1]), [swinging, steady([0, 0])])
    assert recommended_layers(run).table["harm"].tolist() == pytest.approx([0, 0], abs=1e-12)


def test_a_layer_that_may_gain_nothing_is_not_chosen(tmp_path: Path) -> None:
    draw = np.random.default_rng(1)
    gains = steady([1.0, 0.1, -1.0, 0.0], 12)
    gains[:, 1] += draw.standard_normal(12)
    run = recorded(tmp_path / "run.h5", gains, [steady([1, 1e-6, 0, 0], 12)] * 2)
    chosen = recommended_layers(run, count=4)
    table = chosen.table
    assert chosen.layers == ("layer 0",)
    assert table["low"][0] == pytest.approx(1)
    assert table["low"][1] < 0 < table["high"][1]
    assert chosen.warnings[0].startswith("Layers that are chosen: 1, and not 4: of the others")


def test_the_interval_holds_the_gain_of_new_steps(tmp_path: Path) -> None:
    """Of twelve steps that vary, in some nineteen of twenty layers."""
    gains = 0.3 + np.random.default_rng(2).standard_normal((12, 400))
    run = recorded(tmp_path / "run.h5", gains, [gains * 0] * 2)
    table = recommended_layers(run).table
    held = table["low"].le(12 * 0.3) & table["high"].ge(12 * 0.3)
    assert 0.92 < held.mean() < 0.98


@pytest.mark.parametrize(
    ("gains", "count", "said"),
    [
        ([1, 1, 1, 1, 1], 2, None),
        ([1, 1, 1, 1, 6], 2, "70 % of the gain of the run is in layer 2 and head"),
        ([1, 1, 1, 6, 1], 1, "70 % of the gain of the run is in layer 2 and head"),
        ([1, 0.5, 0.5, 1, 0.1], 1, "100 % of the gain of the layers that are chosen is in layer 2"),
    ],
    ids=["even", "head", "last", "chosen"],
)  # fmt: skip
def test_a_gain_near_the_output_is_warned_of(
    gains: list[float], count: int, said: str | None, tmp_path: Path
) -> None:
    parameters = [parameter(place) for place in (-1, 0, 1, 2, -2)]
    costs = steady([9, 1, 1.1, 0.2 if "100 %" in str(said) else 4, 0.001])
    run = recorded(tmp_path / "run.h5", steady(gains), [costs, costs * 0], parameters)
    chosen = recommended_layers(run, count=count)
    assert not {"embedding", "head"} & {*chosen.layers}
    assert len(chosen.warnings) == (said is not None)
    assert said is None or (said in chosen.warnings[0] and "audit" in chosen.warnings[0])


def adapted() -> nn.Module:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(tiny.llama(), config)


@pytest.mark.parametrize(
    ("make", "pattern"),
    [
        (tiny.llama, r"^model\.layers\.(0|1)\..*$"),
        (tiny.gpt2, r"^transformer\.h\.(0|1)\..*$"),
        (adapted, r"^model\.layers\.(0|1)\..*$"),
        (tiny.t5, r"^(?:encoder\.block\.(0|1)\..*|decoder\.block\.(0|1)\..*)$"),
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), None),
    ],
    ids=["llama", "gpt2", "lora", "t5", "no lists"],
)
def test_the_pattern_finds_the_chosen_parameters_alone(
    make: Any, pattern: str | None, tmp_path: Path
) -> None:
    parameters = describe(make())
    gains = steady([1.0] * len(parameters))
    chosen = recommended_layers(
        recorded(tmp_path / "run.h5", gains, [gains, gains * 0], parameters), count=99
    )
    own = {p.name for p in parameters if p.layer in chosen.layers}
    assert own == {p.name for p in parameters if re.fullmatch(chosen.pattern, p.name)}
    assert own == {p.name for p in parameters if re.search(chosen.pattern, p.name)}
    assert pattern is None or chosen.pattern == pattern
    one = recommended_layers(
        recorded(tmp_path / "run.h5", gains, [gains, gains * 0], parameters), count=1
    )
    assert {p.layer for p in parameters if re.fullmatch(one.pattern, p.name)} == {*one.layers}
    nothing = recommended_layers(
        recorded(tmp_path / "run.h5", -gains, [gains, gains * 0], parameters)
    )
    assert nothing.layers == ()
    assert not any(re.search(nothing.pattern, p.name) for p in parameters)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"count": 1, "share": 0.5}, "`count` or `share` should say.*Found both"),
        ({"count": 0}, "`count` should be a whole number of at least 1. Found `count = 0`"),
        ({"count": True}, "Found `count = True`"),
        ({"share": 1.5}, "`share` should be above 0 and at most 1"),
        ({"share": float("nan")}, "`share`.*nan"),
    ],
    ids=["both", "zero", "true", "more", "nan"],
)
def test_what_says_nothing_is_refused(options: dict[str, Any], said: str, example_run: Any) -> None:
    with pytest.raises(ValueError, match=said):
        recommended_layers(example_run(update=True, steps=8), **options)


def test_runs_that_do_not_tell_are_refused(example_run: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"at least 8 steps with an update.*Found 7"):
        recommended_layers(example_run(update=True, steps=7))
    with pytest.raises(ValueError, match="update"):
        recommended_layers(example_run(steps=8))
    model = nn.Linear(2, 1)
    with Recorder(model, tmp_path / "run.h5", update=True) as recorder:
        recorder.backward(objective={"forget": -1.0}, forget=lambda: model(torch.ones(2)).sum())
    with pytest.raises(ValueError, match="a risk on data that should stay"):
        recommended_layers(open_run(tmp_path / "run.h5"))


def test_the_command(ask: Ask, tmp_path: Path) -> None:
    gains = steady([1, 4, 2])
    run = recorded(tmp_path / "run.h5", gains, [steady([1, 1, 1]), gains * 0])
    said = ask("layers", run.path, "--recommend", 2)
    assert (said.code, said.err) == (0, "")
    assert "To train: layer 1, layer 2" in said.out
    for heading in ("gain", "harm", "needed"):  # what the columns are
        assert re.search(rf"{heading}(?:,|\)|:)", said.out), heading
    assert r"Parameters: ^model\.layers\.(1|2)\..*$" in said.out
    facts = json.loads(ask("layers", run.path, "--gain", 0.5, "--format", "json").out)
    assert facts["layers"] == ["layer 1"]
    assert [row["chosen"] for row in facts["table"]] == [False, True, False]
    rows = ask("layers", run.path, "--format", "tsv").out.splitlines()
    assert rows[0].split("\t")[:5] == ["layer", "gain", "low", "high", "harm"]
    assert len(rows) == 4
    for options, why in (
        (("--recommend", 2, "--gain", 0.5), "`--recommend` should be without `--gain`"),
        (("--recommend", 0), "`--recommend` should be a whole number of at least 1"),
        (("--gain", "most"), "`--gain` should be a share above 0 and at most 1. Found `most`"),
    ):
        refused = ask("layers", run.path, *options)
        assert (refused.code, refused.out) == (2, "")
        assert why in refused.err
