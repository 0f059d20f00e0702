"""A rectified loop in accelerate, against plain autograd: windows, precisions, adapters."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import peft
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.utils.data import DataLoader

from geffect import Rectifier
from geffect.data.collate import collate
from geffect.data.pairs import Pairs
from geffect.objectives import SharedForward, nll
from tests.utils import reference
from tests.utils import shallow as tiny
from tests.utils.trainers import same

LR, WINDOW, CLIP = 1e-2, 3, 0.5


@pytest.fixture(autouse=True)
def _no_state_of_other_tests() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def loader() -> DataLoader[Any]:
    """Seven micro-batches of two pairs: windows of 3, 3 and 1."""
    forget, retain = (tiny.batch(seed, rows=14) for seed in (0, 1))
    pairs = Pairs(
        {name: rows(of_set) for name, of_set in {"forget": forget, "retain": retain}.items()}
    )
    return DataLoader(pairs, batch_size=2, sampler=[(i, i) for i in range(14)], collate_fn=collate)


def rows(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    return [{name: value[i] for name, value in batch.items()} for i in range(len(batch["labels"]))]


def train(
    model: nn.Module,
    *,
    scale: float | None = None,
    weight: float = 1.0,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
    epochs: int = 2,
    mixed_precision: str = "no",
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    **options: Any,
) -> Rectifier:
    """The loop, as its user writes it."""
    accelerator = Accelerator(
        cpu=True, gradient_accumulation_steps=WINDOW, mixed_precision=mixed_precision
    )
    if scale is not None:  # which accelerate makes and unscales itself for fp16, on GPUs alone
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    rectifier = Rectifier(model, **options)
    model, prepared, batches = accelerator.prepare(
        model, optimizer([p for p in model.parameters() if p.requires_grad], lr=LR), loader()
    )
    if rectifier.needs_optimizer:
        rectifier.attach(prepared)
    share = weight / accelerator.gradient_accumulation_steps
    for _ in range(epochs):
        for batch in batches:
            with accelerator.accumulate(model):
                shared = SharedForward(model)
                with autocast():
                    risks = {name: share * nll(shared, batch[name]) for name in batch}
                rectifier.backward(
                    objective={"forget": -1.0},
                    **risks,
                    accumulate=not accelerator.sync_gradients,
                    scaler=accelerator.scaler,
                )
                if accelerator.sync_gradients:
                    if scale is not None:
                        accelerator.scaler.unscale_(prepared.optimizer)
                    accelerator.clip_grad_norm_(model.parameters(), CLIP)
                prepared.step()
                prepared.zero_grad()
    return rectifier


def naive(
    model: nn.Module,
    *,
    epochs: int = 2,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> nn.Module:
    """A copy of the model after as many steps of plain SGD, rectified by hand, and clipped."""
    model = copy.deepcopy(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    average: Tensor | None = None

    def gradient(side: str, window: list[Any]) -> Tensor:
        with autocast():
            losses = [reference.nll(model, batch[side]) for batch in window]
        return reference.flat(reference.gradient(model, torch.stack(losses).sum() / WINDOW))

    for _ in range(epochs):
        batches = list(loader())
        for start in range(0, len(batches), WINDOW):
            window = batches[start : start + WINDOW]
            u, r = -gradient("forget", window), gradient("retain", window)
            average = r if average is None else 0.8 * r + 0.2 * average
            x = reference.gru(u, average)
            step = LR * x * min(1.0, CLIP / (x.norm().item() + 1e-6))
            with torch.no_grad():
                parts = step.split([p.numel() for p in trained])
                for parameter, part in zip(trained, parts, strict=True):
                    parameter -= part.view_as(parameter)
    return model


def assert_close(a: nn.Module, b: nn.Module, tolerance: float) -> None:
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=tolerance)


@pytest.mark.parametrize("scale", [None, 2.0**16])
def test_windows(scale: float | None) -> None:
    model = tiny.gpt2()
    expected = naive(model)
    rectifier = train(model, scale=scale)
    assert_close(model, expected, 1e-8)  # the average is kept in float32
    assert rectifier.skipped == 0
    assert rectifier.report is not None


def test_bfloat16() -> None:
    model = tiny.llama()
    expected = naive(model, autocast=partial(torch.autocast, "cpu", torch.bfloat16))
    train(model, mixed_precision="bf16")
    assert_close(model, expected, 3e-5)


def test_float16() -> None:
    """Which accelerate does on GPUs alone; here its parts are put together by hand."""
    autocast = partial(torch.autocast, "cpu", torch.float16)
    model = tiny.llama()
    expected = naive(model, autocast=autocast)
    train(model, scale=2.0**10, autocast=autocast)
    assert_close(model, expected, 5e-6)


def test_adapters() -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(tiny.llama(), config)
    expected, before = naive(model), copy.deepcopy(model)
    train(model)
    assert_close(model, expected, 1e-6)
    kept = [*map(torch.equal, before.parameters(), model.parameters())]
    frozen = [not parameter.requires_grad for parameter in model.parameters()]
    assert all(a for a, of_base in zip(kept, frozen, strict=True) if of_base)
    assert not all(kept)


@pytest.mark.parametrize("space", ["gradient", "update"])
def test_a_step_that_overflows_leaves_no_trace(space: str) -> None:
    """A scale that is too large for all three steps: they are skipped, as if they had not been."""
    model = tiny.llama()
    before = copy.deepcopy(model)
    rectifier = train(model, scale=2.0**127, weight=1e3, epochs=1, space=space)
    assert_close(model, before, 0.0)
    assert rectifier.skipped == 0
    assert rectifier.report is None
    assert not any(tensor is not None for tensor in rectifier.watched["retain_ema"])


@pytest.mark.parametrize("scale", [None, 2.0**10])
def test_the_applied_update_harms_nothing(scale: float | None) -> None:
    model = tiny.llama()
    rectifier = train(
        model, scale=scale, optimizer=torch.optim.AdamW, space="update", measure_update=True
    )
    report = rectifier.report
    assert report is not None
    assert min(report.applied_average) >= -1e-8
    assert max(report.norm_after) > 0


def test_a_scale_changes_nothing() -> None:
    """A power of two, by which no bit is lost."""
    ends = []
    for scale in (None, 2.0**10):
        model = tiny.llama()
        rectifier = train(model, scale=scale, optimizer=torch.optim.AdamW, space="update")
        ends.append([model.state_dict(), rectifier.state_dict()])
    assert same(*ends)
