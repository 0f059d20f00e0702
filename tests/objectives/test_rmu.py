"""RMU against a loop, its target, and what it leaves alone."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from geffect import Recorder, open_run
from geffect.checkpoints.replay import replay
from geffect.objectives import (
    RMU,
    RR,
    AdapterBase,
    FrozenModel,
    Regularised,
    SharedForward,
    named,
    nll,
)
from tests.utils import reference, tiny

DIRECTION = torch.rand(12, generator=torch.Generator().manual_seed(3))
UNIT = DIRECTION / DIRECTION.norm()


def naive(
    model: Any, batch: reference.Batch, k: int, goal: torch.Tensor
) -> list[list[torch.Tensor]]:
    """(1/d) sum_d (h_k - c u)^2 of the answer tokens of each sample, one coordinate at a time."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    states = model(**inputs, output_hidden_states=True).hidden_states[k]
    return [
        [
            torch.stack([(h - u) ** 2 for h, u in zip(states[row, i], goal, strict=True)]).mean()
            for i, label in enumerate(labels)
            if i > 0 and label != -100
        ]
        for row, labels in enumerate(batch["labels"])
    ]


def test_the_target_is_that_of_the_seed_whatever_type_tensors_have(
    default_dtype: torch.dtype,
) -> None:
    drawn = RMU(seed=3).direction(12)
    assert drawn.dtype == torch.float32
    assert torch.equal(drawn, DIRECTION)


@pytest.mark.parametrize(
    ("objective", "k", "goal"),
    [
        (RMU(seed=3), 1, 2.0 * DIRECTION),
        (RMU(layer=0, coefficient=0.5, seed=3), 0, 0.5 * DIRECTION),
        (
            RMU(2, 20.0, normalize_target=True, seed=3),
            2,
            20.0 * (DIRECTION / DIRECTION.norm()).double(),
        ),
    ],
    ids=["default", "embedding", "last"],
)
def test_it_is_its_formula(objective: RMU, k: int, goal: torch.Tensor) -> None:
    model, pair = tiny.gpt2(), {"forget": tiny.batch(0, padding=2)}
    values = [value for row in naive(model, pair["forget"], k, goal.double()) for value in row]
    expected = torch.stack(values).mean()
    for begun in (objective, objective.begin(model)):
        loss = begun(model, pair)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
        found, gradient = reference.gradient(model, loss), reference.gradient(model, expected)
        torch.testing.assert_close(found, gradient, rtol=1e-8, atol=1e-14)


def test_the_numbers_of_open_unlearning() -> None:
    """Samples of 2 and 5 tokens whose squares sum to 2 and 20."""
    labels = torch.tensor([[-100, 7, 7, -100, -100, -100], [-100, 7, 7, 7, 7, 7]])
    squares = torch.tensor([[9.0, 1.0, 1.0, 9.0, 9.0, 9.0], [9.0, 4.0, 4.0, 4.0, 4.0, 4.0]])
    states = (2.0 * RMU().direction(8) + squares.sqrt()[..., None]).requires_grad_()
    batch = {"input_ids": torch.arange(12).view(2, 6), "labels": labels}

    def model_of(rows: torch.Tensor) -> Any:
        rows = rows.view(-1, 6, 8)
        output = SimpleNamespace(logits=torch.zeros(len(rows), 6, 9), hidden_states=(rows, rows))
        return lambda input_ids, output_hidden_states: output

    model, pair = model_of(states), {"forget": batch}
    assert RMU()(model, pair).item() == pytest.approx(22 / 7, abs=1e-6)
    assert RMU(legacy=True)(model, pair).item() == pytest.approx(3.85, abs=1e-6)
    alone = [
        RMU(legacy=True)(model_of(row), {"forget": {n: v[i : i + 1] for n, v in batch.items()}})
        for i, row in enumerate(states)
    ]
    assert sum(loss.item() for loss in alone) / 2 == pytest.approx(2.5, abs=1e-6)  # what was meant
    assert RMU(legacy=True).reductions == {}


def test_the_target_is_in_the_file_and_is_read_back_exactly(tmp_path: Path) -> None:
    model = tiny.llama()
    objective = RMU(seed=5).begin(model)
    assert objective == RMU(seed=5) and repr(objective) == repr(RMU(seed=5))
    pair = tiny.pairs(1)[0]
    with Recorder(model, tmp_path / "run.h5") as recorder:
        recorder.note_objective(objective)
        recorder.backward(objective=objective(model, pair))
    kept = open_run(tmp_path / "run.h5").table("rmu_target")["target"]
    drawn = torch.rand(16, generator=torch.Generator().manual_seed(5))
    assert np.asarray(kept).dtype == np.float32 and np.array_equal(kept, drawn.numpy())
    other = RMU(seed=6).begin(model)
    other.load_state_dict(objective.state_dict())
    assert torch.equal(other(model, pair), objective(model, pair))


def test_replayed_checkpoints_have_one_target(tmp_path: Path) -> None:
    for step in (0, 1):
        tiny.llama(step).save_pretrained(tmp_path / f"checkpoint-{step}")
    batches = [tiny.batch(seed, rows=2) for seed in range(2)]
    run = replay(
        [tmp_path / f"checkpoint-{step}" for step in (0, 1)], tmp_path / "run.h5",
        objective="rmu+rr", forget=batches, retain=batches,
    )  # fmt: skip
    assert len(run.table("rmu_target")["target"]) == 16


@pytest.mark.parametrize("as_function", [False, True])
def test_what_is_above_its_layer_has_zeros_in_the_file(tmp_path: Path, as_function: bool) -> None:
    model, objective, pair = tiny.llama(), RMU(layer=1), tiny.pairs(1)[0]
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    shared = SharedForward(model)
    with Recorder(model, tmp_path / "run.h5") as recorder:
        losses: dict[str, Any] = {
            "objective": lambda: objective(shared, pair),
            "forget": lambda: nll(shared, pair["forget"]),
        }
        recorder.backward(**(losses if as_function else {n: f() for n, f in losses.items()}))
        optimizer.step()
    run = open_run(tmp_path / "run.h5")
    K = run.gram()[0]
    for index, parameter in enumerate(run.layers):
        above = any(part in parameter.name for part in ("layers.1.", "model.norm", "lm_head"))
        assert bool((K[index, 0] == 0).all()) is above and np.isfinite(K[index]).all()
        assert K[index, 1, 1] > 0
        moved = not torch.equal(model.state_dict()[parameter.name], before[parameter.name])
        assert moved is not above


def test_a_regulariser_of_another_layer_reaches_further() -> None:
    model, pair = tiny.gpt2(), tiny.pairs(1)[0]
    before = tiny.gpt2(seed=1).eval()
    objective = named("rmu+rr", {"layer": 1, "retain_layer": 2})
    assert objective == Regularised(RMU(layer=1), RR(retain_layer=2))
    found = reference.gradient(model, objective(model, pair, FrozenModel(before)))
    assert found["transformer.h.1.mlp.c_fc.weight"].abs().max() > 0


def test_only_adapters_below_its_layer_are_reached() -> None:
    model: Any = get_peft_model(
        tiny.llama(),  # type: ignore[arg-type]
        LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
    )
    pair, objective = tiny.pairs(1)[0], named("rmu+rr", {"layer": 1, "retain_layer": 1})
    begun = objective.begin(model)
    begun(model, pair, AdapterBase(model)).backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {n for n, p in model.named_parameters() if p.requires_grad and ".0." in n}


def test_its_parts_share_a_forward_of_one_batch() -> None:
    calls, model = [], tiny.llama()

    def counted(**inputs: Any) -> object:
        calls.append(1)
        return model(**inputs)

    batch = tiny.batch(0)
    shared, before = SharedForward(counted), FrozenModel(SharedForward(tiny.llama(1).eval()))
    named("rmu+rr")(shared, {"forget": batch, "retain": batch}, before)
    assert len(calls) == 1


def test_a_side_that_is_missing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`forget` among them. Found retain"):
        RMU()(tiny.llama(), {"retain": tiny.batch(0)})


def test_packed_rows_are_their_texts() -> None:
    model = tiny.llama()
    model.set_attn_implementation("eager")  # type: ignore[operator]
    ids = torch.tensor([[3, 5, 7], [4, 6, 8]])
    labels = torch.tensor([[-100, 5, 7], [-100, -100, 8]])
    apart = {"input_ids": ids, "labels": labels}
    packed = {
        "input_ids": ids.view(1, -1),
        "labels": labels.view(1, -1),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]]),
    }
    for objective in (RMU(), RMU(layer=2)):
        values = [objective(model, {"forget": batch}).item() for batch in (apart, packed)]
        assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_descent_raises_the_forget_risk_in_the_end() -> None:
    model, pair = tiny.llama(), tiny.pairs(1)[0]
    objective = RMU(layer=1).begin(model)

    def descend(loss_of: Any, steps: int) -> None:
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
        for _ in range(steps):
            optimizer.zero_grad()
            loss_of().backward()
            optimizer.step()

    descend(lambda: nll(model, pair["forget"]), 40)
    known = nll(model, pair["forget"]).item()
    descend(lambda: objective(model, pair), 20)
    assert known < 0.5 and nll(model, pair["forget"]).item() > 2 * known


def test_the_size_of_the_target_is_that_of_the_model() -> None:
    class Unnamed(nn.Module):
        pass

    with pytest.raises(ValueError, match=r"tell its hidden size as `config.hidden_size`. Found"):
        RMU().begin(Unnamed())
    wide = RMU().begin(tiny.llama())
    with pytest.raises(ValueError, match=r"Found 16, .* and hidden states of 12. Begin"):
        wide(tiny.gpt2(), {"forget": tiny.batch(0)})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"layer": -1}, "`layer` of RMU should be an index"),
        ({"coefficient": 0.0}, "`coefficient` of RMU should be a positive number"),
        ({"normalize_target": 1}, "`normalize_target` of RMU should be True or False"),
        ({"legacy": "no"}, "`legacy` of RMU should be True or False"),
        ({"seed": -1}, "`seed` of RMU should be"),
        ({"seed": 0.5}, "`seed` of RMU should be"),
    ],
    ids=repr,
)
def test_options_that_are_none_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        RMU(**options)


def test_a_layer_that_the_model_has_not_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`layer` should be .* 0 to 2, .* Found 7. Pass"):
        RMU(layer=7)(tiny.gpt2(), {"forget": tiny.batch(0)})
