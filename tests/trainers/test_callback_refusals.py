"""What the callback refuses, and by what names: trainings, gradients and probes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

from geffect import open_run
from geffect.risk import check_data
from geffect.trainers import GEffectCallback
from geffect.trainers.loop import firing_loop
from tests.utils import shallow as tiny
from tests.utils import trainers
from tests.utils.trainers import At, trainer

PROBES = {"forget": tiny.batch(50, rows=1), "retain": [tiny.batch(s) for s in (51, 52)]}


def test_a_learning_rate_that_turns_negative_is_refused_at_its_step(tmp_path: Path) -> None:
    def turn(optimizer: Any, **_: Any) -> None:
        optimizer.param_groups[0]["lr"] = -0.1

    model = tiny.llama()
    training = trainer(
        tmp_path, model, At("on_step_begin", 1, turn),
        GEffectCallback(tmp_path / "run.h5", probes=PROBES),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"rate of AdamW should not be negative.* Found -0\.1"):
        training.train()
    assert open_run(tmp_path / "run.h5").steps.tolist() == [0]


def layerwise(model: nn.Module) -> Any:
    inner = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}
    return LayerWiseDummyOptimizer(optimizer_dict=inner, lr=0.1)


class AdaLomo(torch.optim.SGD):
    """By its name, an optimizer that steps in its own backward pass."""


@pytest.mark.parametrize("make", [layerwise, lambda model: AdaLomo(model.parameters(), lr=0.1)])
def test_optimizers_that_step_inside_of_the_backward_pass_are_refused(
    make: Any, tmp_path: Path
) -> None:
    model = tiny.llama()
    training = trainer(tmp_path, model, GEffectCallback(tmp_path / "run.h5", probes=PROBES))
    training.optimizer = make(model)
    with pytest.raises(RuntimeError, match=r"which steps each layer inside.*What works"):
        training.train()


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_optimizers_that_are_fused_with_the_backward_pass_are_refused(tmp_path: Path) -> None:
    from torch.distributed.optim import _apply_optimizer_in_backward

    model = tiny.llama()
    _apply_optimizer_in_backward(torch.optim.SGD, model.parameters(), {"lr": 0.1})
    training = trainer(tmp_path, model, GEffectCallback(tmp_path / "run.h5", probes=PROBES))
    with pytest.raises(RuntimeError, match="free the gradient there"):
        training.train()


def test_gradients_that_are_gone_before_the_step_are_missed(tmp_path: Path) -> None:
    def take(model: nn.Module, **_: Any) -> None:
        model.zero_grad()

    training = trainer(
        tmp_path, tiny.llama(), At("on_pre_optimizer_step", 2, take),
        GEffectCallback(tmp_path / "run.h5", probes=PROBES),
    )  # fmt: skip
    with pytest.raises(
        RuntimeError,
        match=r"should have a gradient .* none at step 2.*inside of the backward pass.*What works",
    ):
        training.train()


CHANGED = r"changed between clipping and this callback.*inside of the backward pass.*What works"


def test_gradients_that_something_else_has_changed_are_noticed(tmp_path: Path) -> None:
    def halve(model: nn.Module, **_: Any) -> None:
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad *= 0.5

    change = At("on_pre_optimizer_step", 1, halve)
    for update in (False, True):
        late = GEffectCallback(tmp_path / f"{update}.h5", probes=PROBES, update=update)
        with pytest.raises(RuntimeError, match=CHANGED):
            trainer(tmp_path, tiny.llama(), change, late).train()
    first = GEffectCallback(tmp_path / "first.h5", probes=PROBES)
    trainer(tmp_path, tiny.llama(), first, change).train()
    assert len(open_run(tmp_path / "first.h5").steps) == 6


def test_events_of_something_else_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"should be fired by a `transformers\.Trainer`"):
        firing_loop()


@pytest.mark.parametrize(
    "name",
    ["objective", "update", "rectified", "retain_ema", "objective.forget", "a/b", "", "..", 7],
)
def test_probes_have_names_of_their_own(name: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"`probes` should have .* Found {name!r}"):
        GEffectCallback(tmp_path / "run.h5", probes={name: tiny.batch(0)})
    with pytest.raises(ValueError, match="`probes` should have at least one"):
        GEffectCallback(tmp_path / "run.h5", probes={})
    with pytest.raises(TypeError, match="a list of batches or a loader"):
        GEffectCallback(tmp_path / "run.h5", probes={"forget": iter([tiny.batch(0)])})


def test_hooks_that_step_inside_of_the_backward_pass_are_refused(tmp_path: Path) -> None:
    model = tiny.llama()
    with torch.no_grad():
        before = model.lm_head.weight.clone()
    hook = model.lm_head.weight.register_post_accumulate_grad_hook(lambda p: p.data.zero_())
    training = trainer(tmp_path, model, GEffectCallback(tmp_path / "run.h5", probes=PROBES))
    with pytest.raises(RuntimeError, match=r"No hook should run after a gradient .*replay"):
        training.train()
    assert torch.equal(model.lm_head.weight, before)
    hook.remove()
    # What the Trainer hooks itself, to average what FSDP2 does not manage, is no step.
    model.lm_head.weight.register_post_accumulate_grad_hook(lambda p: None)
    model.lm_head.weight._replicated_grad_hook_registered = True
    training.train()
    assert len(open_run(tmp_path / "run.h5").steps) == 6


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in tiny.batch(0).items() if key != name}


DATA: dict[str, tuple[Any, str]] = {
    "path": ("facts.jsonl", r"Found `str`.*geffect\.data\.examples\.read"),
    "path object": (Path("facts.jsonl"), r"Found `PosixPath`.*read"),
    "empty": ([], "should yield a batch in each pass"),
    "no mappings": ([torch.ones(3)], "should map names to tensors.*Found `Tensor`"),
    "lists": ([{k: v.tolist() for k, v in tiny.batch(0).items()}], "Found `list` as its `input"),
    "no labels": ([without("labels")], "should have `labels`.*the keys input_ids, attention_mask"),
    "samples": (trainers.samples(2), r"`labels`, a token.* with shape \(9,\)"),
    "no answer": (
        [{**tiny.batch(0), "labels": torch.full((3, 9), -100)}],
        "should have an answer token",
    ),
}


@pytest.mark.parametrize("kind", DATA)
def test_probes_are_batches_of_tensors_with_labels(kind: str, tmp_path: Path) -> None:
    data, message = DATA[kind]
    model = tiny.llama()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises((TypeError, ValueError), match=message) as raised:
        trainer(
            tmp_path, model, GEffectCallback(tmp_path / "run.h5", probes={**PROBES, "facts": data})
        ).train()
    assert raised.value.__notes__ == ["It was found in the data of risk `facts`."]
    assert not (tmp_path / "run.h5").exists()
    assert all(map(torch.equal, before, model.parameters()))


def test_a_look_at_the_probes_draws_no_random_numbers() -> None:
    loader = torch.utils.data.DataLoader(trainers.samples(4), batch_size=2, shuffle=True)
    before = torch.get_rng_state()
    next(iter(loader))
    assert not torch.equal(torch.get_rng_state(), before)
    torch.set_rng_state(before)
    check_data(loader)
    assert torch.equal(torch.get_rng_state(), before)
