"""The trainer for unlearning, against a plain loop."""

import copy
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from geffect import Recorder, Rectifier, open_run
from geffect.data.pairs import Pairing
from geffect.objectives import (
    NPO,
    WTNPO,
    FrozenModel,
    GradDiff,
    GradientAscent,
    Objective,
    WeightedGradientAscent,
)
from geffect.projection import nearest
from geffect.trainers.unlearning import UnlearningTrainer
from tests.utils import reference
from tests.utils import shallow as tiny
from tests.utils.trainers import same
from tests.utils.unlearning_runs import (
    BATCH,
    FORGET,
    OBJECTIVES,
    RETAIN,
    SEED,
    WEIGHT,
    WORLD,
    Item,
    arguments,
    flat_gradient,
    followed,
    ga,
    items,
    padded,
    plus_retain,
    states,
    trained,
)


def naive(
    model: nn.Module,
    loss_of: Callable[..., Tensor],
    rule: Callable[[Tensor, Tensor], Tensor] | None = None,
    ema: float = 0.8,
) -> nn.Module:
    """A copy of the model after plain SGD, its gradient rectified against the average, clipped."""
    origin = copy.deepcopy(model)

    def gradient_of(model: nn.Module, window: list[dict[str, Item]]) -> Tensor:
        return flat_gradient(model, [loss_of(model, origin, batch) for batch in window])

    return followed(model, gradient_of, rule, ema)


def assert_close(a: nn.Module, b: nn.Module, tolerance: float) -> None:
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("watched", [False, True])
def test_trains_like_a_plain_loop(name: str, watched: bool, tmp_path: Path) -> None:
    objective, loss_of = OBJECTIVES[name]
    model = tiny.gpt2()
    expected = naive(model, loss_of)
    recorder = partial(Recorder, path=tmp_path / "run.h5") if watched else None
    trained(tmp_path, model, objective, recorder=recorder)
    assert_close(model, expected, 1e-12)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("watched", [False, True])
def test_rectifies_like_a_plain_loop(name: str, watched: bool, tmp_path: Path) -> None:
    objective, loss_of = OBJECTIVES[name]
    model = tiny.gpt2()
    expected, plain = naive(model, loss_of, reference.gru), naive(model, loss_of)
    assert not all(map(torch.equal, expected.parameters(), plain.parameters()))
    recorder = partial(Recorder, path=tmp_path / "run.h5") if watched else None
    trained(tmp_path, model, objective, rectifier=Rectifier(model), recorder=recorder)
    assert_close(model, expected, 1e-8)  # the average is kept in float32


def test_the_forget_part_alone_is_rectified(tmp_path: Path) -> None:
    def rule(u: Tensor, r: Tensor) -> Tensor:
        return reference.gru(u - WEIGHT * r, r) + WEIGHT * r

    model = tiny.gpt2()
    expected = naive(model, plus_retain(ga), rule, ema=1.0)
    rectifier = Rectifier(model, part="forget", ema=1.0)
    trained(tmp_path, model, GradDiff(weight=WEIGHT), rectifier=rectifier)
    assert_close(model, expected, 1e-8)


@pytest.mark.parametrize("watched", [False, True])
def test_of_an_objective_without_retain_term_all_is_forget_part(
    watched: bool, tmp_path: Path
) -> None:
    ends = []
    for part in ("total", "forget"):
        model = tiny.gpt2()
        recorder = partial(Recorder, path=tmp_path / f"{part}.h5") if watched else None
        rectifier = Rectifier(model, part=part)
        objective = NPO(beta=0.5)  # its weight is -4, which rounds nothing
        trainer = trained(tmp_path, model, objective, rectifier=rectifier, recorder=recorder)
        ends.append(states(model))
    assert same(*ends)
    assert any(log.get("rectify/fired") for log in trainer.state.log_history)


def test_the_applied_update_harms_nothing(tmp_path: Path) -> None:
    """Under AdamW, whose steps break what the gradient satisfies."""
    logged = {}
    for space in ("gradient", "update"):
        model = tiny.llama(layers=2)
        rectifier = Rectifier(model, space=space, measure_update=True)
        options = {"optim": "adamw_torch", "num_train_epochs": 6}
        history = trained(
            tmp_path, model, GradientAscent(), rectifier=rectifier, **options
        ).state.log_history
        logged[space] = [log["rectify/applied_average"] for log in history if "loss" in log]
    assert min(logged["gradient"]) < -1e-5
    assert min(logged["update"]) > -1e-8


def test_several_retain_sets(tmp_path: Path) -> None:
    model = tiny.llama()
    rectifier = Rectifier(model, nearest, protect=("retain", "world"), ema=1.0)
    data = {"forget": FORGET, "retain": {"retain": RETAIN, "world": WORLD}}
    trainer = trained(tmp_path, model, NPO(), rectifier=rectifier, data=data)
    steps = [log for log in trainer.state.log_history if "loss" in log]
    for log in steps:
        assert min(log["rectify/cosine_after_retain"], log["rectify/cosine_after_world"]) > -1e-5
        assert log["world_nll"] > 0
    assert any(log["rectify/cosine_before_world"] < 0 for log in steps)


# All steps, all kinds of models.


class Logits(nn.Embedding):
    """The least of a language model: the logits of the next token, by the one before it."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(tiny.VOCABULARY, tiny.VOCABULARY)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=super().forward(input_ids))


def test_every_step_of_partial_windows_is_rectified(tmp_path: Path) -> None:
    """18 micro-batches, 8 a step, 3 epochs: 3 steps an epoch."""
    model = Logits().double()
    data = {"forget": items(18, 0), "retain": items(18, 50)}
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
    path = tmp_path / "run.h5"
    rectifier = Rectifier(model, ema=1.0)
    trainer = trained(
        tmp_path,
        model,
        NPO(),
        rectifier=rectifier,
        recorder=partial(Recorder, path=path, update=True),
        data=data,
        num_train_epochs=3,
        **options,
    )
    run = open_run(path)
    assert run.column("n_micro").tolist() == [8, 8, 2] * 3
    logged = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logged) == 9
    assert rectifier.skipped == 0
    K = run.gram().sum(axis=1)
    update, retain = run.sources.index("update"), run.sources.index("retain_ema")
    assert (K[:, update, update] > 0).all()  # none is empty
    for log, k in zip(logged, K, strict=True):
        # Of what SGD did, which is minus the rectified gradient, nothing harms.
        assert k[update, retain] <= 1e-6 * math.sqrt(k[update, update] * k[retain, retain])
        assert log["rectify/cosine_after"] >= -1e-6
    assert any(log["rectify/fired"] for log in logged)


def test_adapters(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    frozen = tiny.llama()
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(copy.deepcopy(frozen), config)
    path = tmp_path / "run.h5"
    trainer = trained(
        tmp_path,
        model,
        NPO(),
        rectifier=Rectifier(model, space="update"),
        recorder=partial(Recorder, path=path),
        optim="adamw_torch",
        save_strategy="steps",
        save_steps=2,
    )
    assert trainer.state.global_step == 4
    assert len(open_run(path).layers) == 2 * 2
    base = {n.replace("base_layer.", ""): t for n, t in model.get_base_model().named_parameters()}
    for name, tensor in frozen.named_parameters():
        assert torch.equal(tensor, base[name])
    again = peft.get_peft_model(copy.deepcopy(frozen), config)
    trained(
        tmp_path,
        again,
        NPO(),
        rectifier=Rectifier(again, space="update"),
        optim="adamw_torch",
        resume=str(tmp_path / "out/checkpoint-2"),
    )
    assert same(states(model), states(again))


def test_checkpointed_activations(tmp_path: Path) -> None:
    ends = []
    for checkpointed in (False, True):
        model = tiny.llama(dropout=0.2)
        trained(
            tmp_path,
            model,
            GradDiff(),
            rectifier=Rectifier(model),
            gradient_checkpointing=checkpointed,
        )
        ends.append(states(model))
    assert same(*ends)


# The model before unlearning.


@pytest.mark.parametrize("objective", [GradientAscent(), GradDiff(), WeightedGradientAscent()])
def test_no_reference_is_made_where_none_is_used(
    objective: Objective, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FrozenModel, "copied", None)
    trainer = UnlearningTrainer(
        tiny.llama(), arguments(tmp_path), objective=objective, forget=FORGET, retain=RETAIN
    )
    assert trainer.objective is objective and trainer.reference is None


@pytest.mark.parametrize("objective", [NPO(), WTNPO(), GradDiff(forget=NPO())])
def test_the_reference_is_the_model_before_unlearning(objective: Objective, tmp_path: Path) -> None:
    model = tiny.llama(dropout=0.2)
    before = states(model)
    trainer = trained(tmp_path, model, objective)
    kept = trainer.reference.model
    assert same(states(kept), before)
    assert not same(states(model), before)
    assert not kept.training
    assert not any(p.requires_grad for p in kept.parameters())
    assert trainer.objective is objective


def test_a_reference_that_is_given_is_used(tmp_path: Path) -> None:
    given = FrozenModel(tiny.llama(seed=1).eval())
    options = {"forget": FORGET, "retain": RETAIN}
    trainer = UnlearningTrainer(
        tiny.llama(), arguments(tmp_path), objective=NPO(), reference=given, **options
    )
    assert trainer.reference is given


def test_the_reference_runs_in_the_precision_of_the_model(tmp_path: Path) -> None:
    """Then the first loss of NPO is -(2 / beta) log sigmoid(0), in half precision too."""
    trainer = trained(tmp_path, tiny.llama(), NPO(beta=0.1), bf16=True, rectifier=None)
    first = next(log["loss"] for log in trainer.state.log_history if "loss" in log)
    assert first == pytest.approx(20 * math.log(2), rel=1e-6)


# Evaluation.


@pytest.mark.parametrize("size", [1, 4])
def test_evaluation_is_a_mean_over_all_tokens(size: int, tmp_path: Path) -> None:
    model = tiny.gpt2()
    trainer = UnlearningTrainer(
        model,
        arguments(tmp_path, per_device_eval_batch_size=size),
        objective=NPO(),
        forget=FORGET,
        retain=RETAIN,
        eval_dataset={"world": WORLD},
    )
    metrics = trainer.evaluate()
    for name, data in {"forget": FORGET, "retain": RETAIN, "world": WORLD}.items():
        expected = reference.nll(model, padded(data)).item()
        assert metrics[f"eval_{name}_nll"] == pytest.approx(expected, rel=1e-6)
    alone = trainer.evaluate(WORLD)
    assert alone["eval_nll"] == pytest.approx(metrics["eval_world_nll"])


def test_evaluation_in_training_changes_nothing(tmp_path: Path) -> None:
    ends = []
    for evaluated in ("no", "steps"):
        model = tiny.llama()
        trainer = trained(
            tmp_path,
            model,
            NPO(),
            rectifier=Rectifier(model),
            eval_strategy=evaluated,
            eval_steps=1,
        )
        ends.append(states(model))
    assert same(*ends)
    retained = [log for log in trainer.state.log_history if "eval_retain_nll" in log]
    assert [log["step"] for log in retained] == [1, 2, 3, 4]


# Data.


def test_pairs_that_are_given(tmp_path: Path) -> None:
    """Nested items come as they are, past the Trainer's removal of columns; so do columns."""
    pairs = [{"forget": f, "retain": r} for f, r in zip(FORGET, RETAIN, strict=False)]
    model, objective = tiny.llama(), GradDiff()
    data = {"train_dataset": pairs, "forget": FORGET, "retain": RETAIN}
    trainer = trained(tmp_path, model, objective, rectifier=Rectifier(model), data=data)
    assert trainer.state.global_step == 4
    assert trainer.evaluate()["eval_retain_nll"] > 0


def test_the_model_sees_every_column(tmp_path: Path) -> None:
    model = tiny.llama()
    seen: list[dict[str, Any]] = []
    model.register_forward_pre_hook(lambda *call: seen.append(call[2]), with_kwargs=True)
    pictures = torch.rand(len(FORGET), 3, 4, 4)
    forget = [
        {**item, "position_ids": torch.arange(len(item["labels"])) + 3, "pixel_values": picture}
        for item, picture in zip(FORGET, pictures, strict=True)
    ]
    trained(tmp_path, model, GradientAscent(), data={"forget": forget, "retain": RETAIN})
    pairing = Pairing((len(FORGET), len(RETAIN)), SEED)
    places = [forget for forget, _ in pairing][:BATCH]
    columns = {"input_ids", "attention_mask", "position_ids", "pixel_values"}
    assert all(call.keys() >= columns for call in seen)
    assert torch.equal(seen[0]["pixel_values"], pictures[places])
    for row, place in zip(seen[0]["position_ids"], places, strict=True):
        own = forget[place]["position_ids"]
        assert torch.equal(row[: len(own)], own) and not row[len(own) :].any()


def test_what_cannot_be_trained_on(tmp_path: Path) -> None:
    make = partial(UnlearningTrainer, tiny.llama(), objective=NPO(), args=arguments(tmp_path))
    with pytest.raises(ValueError, match=r"should both be sets of items.*Found forget"):
        make(forget=FORGET)
    with pytest.raises(ValueError, match="Found forget, world"):
        make(forget=FORGET, retain={"world": WORLD})
    with pytest.raises(TypeError, match=r"`eval_dataset` should be .* Found `list`\. Pass"):
        make(forget=FORGET, retain=RETAIN, eval_dataset=WORLD)
