"""Effects of samples where modules have no row a sample: one backward pass each, by definition."""

import copy
import logging
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from geffect.effects import direction, sample_effects, samples
from geffect.gradients import Vector
from geffect.layers import trainable
from tests.utils import tiny, two_ranks
from tests.utils.architectures import batch_for, made
from tests.utils.effects import gradients, inner, sums_of_log_p, uneven

WIDTH = 6


class Language(nn.Module):
    """A language model on a body of one's own."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Embedding(tiny.VOCABULARY, WIDTH)
        self.body = body
        self.head = nn.Linear(WIDTH, tiny.VOCABULARY)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.body(self.embed(input_ids))))


class Flattened(nn.Module):
    """Rows that are positions of all samples."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.linear(x.flatten(0, 1)).view_as(x)
        return mixed


class Checkpointed(Flattened):
    """The same, with its activations forgotten and found again in each backward pass."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = checkpoint(super().forward, x, use_reentrant=self.reentrant)
        return found


class Meeting(nn.Module):
    """Samples of a batch that meet, where it is large: each is held against their mean."""

    def __init__(self, least: int = 1) -> None:
        super().__init__()
        self.least = least
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.linear(x).tanh()
        return found - found.mean(dim=0) if len(x) >= self.least else found


class Counting(Flattened):
    """A forward that leaves something behind, by which the next one differs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen += 1
        return super().forward(x * self.calls + self.seen) + 0.1 * torch.rand(x.shape)


class Capacity(nn.Module):
    """Experts that take the first tokens that come, whichever sample they are of."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 2)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        shares = self.router(flat).softmax(dim=-1)
        out = flat.clone()
        for i, expert in enumerate(self.experts):
            chosen = (shares.argmax(dim=-1) == i).nonzero().flatten()[:4]
            out[chosen] += shares[chosen, i, None] * expert(flat[chosen])
        return out.view_as(x)


class InPlace(nn.Module):
    """What modules return is written into."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.linear = nn.Embedding(16, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        places = self.table(torch.arange(x.shape[1])[None])
        places *= 2.0
        x += places
        found: Tensor = self.linear(x)
        return found.tanh_()


class Scalar(nn.Module):
    """A module that returns one number, and one that returns whole numbers."""

    def __init__(self, *, whole: bool) -> None:
        super().__init__()
        self.whole = whole
        self.inside = _Numbers(whole=whole)
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.linear(x) * (1 + self.inside(x).sum())
        return found


class _Numbers(nn.Module):
    def __init__(self, *, whole: bool) -> None:
        super().__init__()
        self.whole, self.gain = whole, nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        weighed = (x[:, 0] * self.gain).mean()  # no token after the first is told
        return weighed.gt(0).long() if self.whole else weighed


class Twice(nn.Module):
    """A model that calls itself."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = Language(nn.Tanh())

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, again: bool = True
    ) -> SimpleNamespace:
        found: SimpleNamespace = self.plain(input_ids, attention_mask)
        if again:
            found.logits = found.logits + self(input_ids, attention_mask, again=False).logits
        return found


class Twofold(nn.Module):
    """A weight that is used by its module, and a little outside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.linear(x) + 1e-3 * nn.functional.linear(x, self.linear.weight)
        return found


class Longer(Twofold):
    """The same, where a text is long."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] < uneven(3)["input_ids"].shape[1]:
            plain: Tensor = self.linear(x)
            return plain
        return super().forward(super().forward(x)) + nn.functional.linear(x, self.linear.weight)


class Once(nn.Module):
    """A module that does not run a second time on what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH))
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        if self.runs > 1:
            raise RuntimeError("I was run already.")
        return x * self.gain


MODELS: Mapping[str, Callable[[], nn.Module]] = {
    "rows of positions": lambda: Language(Flattened()),
    "checkpointed": lambda: Language(Checkpointed(reentrant=False)),
    "checkpointed, reentrant": lambda: Language(Checkpointed(reentrant=True)),
    "samples that meet": lambda: Language(Meeting()),
    "experts of limited capacity": lambda: Language(Capacity()),
    "written in place": lambda: Language(InPlace()),
    "one number": lambda: Language(Scalar(whole=False)),
    "whole numbers": lambda: Language(Scalar(whole=True)),
    "calls itself": Twice,
    "a little outside of its module": lambda: Language(Twofold()),
    "outside of its module where texts are long": lambda: Language(Longer()),
    "compiled": lambda: torch.compile(Language(nn.Tanh()), backend="eager"),
    "runs once": lambda: Language(Once()),
    "state and random numbers": lambda: Language(Counting()),
}


def double(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().double().eval()


def naive(model: nn.Module, batch: Mapping[str, Tensor], along: Vector) -> Tensor:
    """One backward pass a sample, of one forward of a copy."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, Checkpointed):
            module.reentrant = False  # which torch.autograd.grad cannot take
    random = torch.get_rng_state()
    rows = torch.stack([inner(gradients(twin, s), along) for s in sums_of_log_p(twin, batch)])
    torch.set_rng_state(random)
    return rows


def drawn(model: nn.Module) -> Vector:
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(p.shape, generator=draw, dtype=p.dtype) for p in trainable(model).values()]


@pytest.mark.parametrize("name", MODELS)
def test_every_model_has_effects_of_samples(name: str) -> None:
    model, batches = double(name), [uneven(3), uneven(4, rows=1), uneven(5, rows=2)]
    along = drawn(model)
    other = [None if i % 2 else 2 * v for i, v in enumerate(along)]
    expected = {
        risk: torch.cat([naive(model, batch, v) for batch in batches])
        for risk, v in {"retain": along, "forget": other}.items()
    }
    found = sample_effects(model, batches, {"retain": along, "forget": other})
    assert list(found) == ["retain", "forget"]
    for risk, values in expected.items():
        torch.testing.assert_close(found[risk], values, rtol=1e-9, atol=1e-13)


def test_rows_are_given_up_in_the_batch_where_they_do_not_fit() -> None:
    model = double("samples that meet")
    batches = [uneven(3, rows=1), uneven(4), uneven(5)]
    along = drawn(model)
    found = sample_effects(model, batches, {"a": along})["a"]
    expected = torch.cat([naive(model, batch, along) for batch in batches])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)


def test_samples_that_meet_in_larger_batches_alone_are_told_there() -> None:
    model = Language(Meeting(least=4)).double().eval()
    batches = [uneven(3), uneven(6, rows=4)]
    along = drawn(model)
    found = sample_effects(model, batches, {"a": along})["a"]
    expected = torch.cat([naive(model, batch, along) for batch in batches])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)


def test_a_batch_without_scored_tokens_proves_nothing() -> None:
    model, nothing, batch = double("a little outside of its module"), uneven(3), uneven(4)
    nothing |= {"labels": torch.full_like(nothing["labels"], -100)}
    along = drawn(model)
    found = sample_effects(model, [nothing, batch], {"a": along})["a"]
    zeros, rest = found.split([len(nothing["labels"]), len(batch["labels"])])
    assert not zeros.any()
    torch.testing.assert_close(rest, naive(model, batch, along), rtol=1e-9, atol=1e-13)


def test_a_use_outside_of_its_module_is_seen_in_a_later_batch() -> None:
    model, batches = double("outside of its module where texts are long"), [uneven(3), uneven(4)]
    batches[0] = {name: column[:, :-1] for name, column in batches[0].items()}
    along = drawn(model)
    found = sample_effects(model, batches, {"a": along})["a"]
    expected = torch.cat([naive(model, batch, along) for batch in batches])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)


def test_the_slower_way_is_said_once_by_the_name_of_the_module(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, batch = double("samples that meet"), uneven(3)
    samples._say.cache_clear()
    with caplog.at_level(logging.WARNING, logger="geffect"):
        sample_effects(model, [uneven(3, rows=1)], {"a": drawn(model)})
        assert not caplog.records
        for _ in range(2):
            sample_effects(model, [batch, batch], {"a": drawn(model)})
    (record,) = caplog.records
    assert "a backward pass for each sample here, in place of one for each batch" in record.message
    assert "slower" in record.message and "`embed` (Embedding)" in record.message


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["mixtral", "llama"])
def test_layers_that_checkpoint_their_activations_go_on_doing_so(
    name: str, reentrant: bool
) -> None:
    model, batch = made(name), batch_for(name, 1)
    along = direction(model, [batch_for(name, 2)])
    plain = sample_effects(model, [batch], {"a": along})["a"]
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = sample_effects(model, [batch], {"a": along})["a"]
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-9)


class Stopped(Exception):
    """Raised in the middle of a backward pass."""


@pytest.mark.parametrize("fails_at", [None, 1, 2, 3])
@pytest.mark.parametrize("error", [Stopped, KeyboardInterrupt])
def test_nothing_is_left_behind_also_where_it_fails(
    fails_at: int | None, error: type[BaseException]
) -> None:
    model, batch = double("state and random numbers").train(), uneven(3)
    model.head.eval()
    prompt = torch.zeros(WIDTH, dtype=torch.float64, requires_grad=True)
    prompt.grad = torch.ones_like(prompt)
    seen: list[int] = []

    def add(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output + prompt

    def stop(gradient: Tensor) -> None:
        seen.append(1)
        if len(seen) == fails_at:
            raise error

    model.embed.register_forward_hook(add)
    model.embed.weight.register_hook(stop)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    before = copy.deepcopy(model)
    grads = [(p, p.grad, p.grad.clone()) for p in [*model.parameters(), prompt]]
    hooks = [[*of] for of in _hooks(model)]
    buffers, random = dict(model.named_buffers()), torch.get_rng_state()
    if fails_at is None:
        sample_effects(model, [batch], {"a": drawn(model)})
        assert len(seen) == len(batch["labels"])
    else:
        with pytest.raises(error):
            sample_effects(model, [batch], {"a": drawn(model)})
    assert torch.equal(random, torch.get_rng_state())
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    for p, grad, value in grads:
        assert p.grad is grad and torch.equal(grad, value)
    for (name, p), old in zip(model.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(p, old) and p.requires_grad, name
    for name, buffer in model.named_buffers():
        assert buffer is buffers[name] and torch.equal(buffer, before.get_buffer(name)), name
    assert model.body.calls == 0
    assert [[*of] for of in _hooks(model)] == hooks


def _hooks(model: nn.Module) -> list[Any]:
    of_modules = [
        of
        for module in model.modules()
        for of in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    ]
    of_tensors = [p._backward_hooks or {} for p in model.parameters()]
    added = [getattr(p, "_post_accumulate_grad_hooks", None) or {} for p in model.parameters()]
    return [*of_modules, *of_tensors, *added]


def test_a_direction_of_nothing_has_no_effect() -> None:
    for name in ("rows of positions", "written in place"):
        model = double(name)
        found = sample_effects(model, [uneven(3)], {"a": [None] * len(trainable(model))})["a"]
        assert found.shape == (3, len(trainable(model))) and not found.any()


def test_an_optimizer_inside_of_the_backward_pass_is_refused() -> None:
    model = double("rows of positions")
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model.head.weight.register_post_accumulate_grad_hook(lambda p: optimizer.step())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="No hook should run after a gradient is accumulated"):
        sample_effects(model, [uneven(3)], {"a": drawn(model)})
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def of_each_rank() -> list[float]:
    """By how much effects differ under DDP, where each process has its own samples."""
    rank, off = dist.get_rank(), []
    for name in ("rows of positions", "a little outside of its module"):
        model, batches = double(name), [uneven(10 * rank + i) for i in range(2 + rank)]
        along = {"a": drawn(model)}
        alone, wrapped = (
            sample_effects(m, batches, along)["a"] for m in (model, DistributedDataParallel(model))
        )
        off.append(float((alone - wrapped).abs().max()))
    return off


def test_each_process_has_the_effects_of_its_own_samples() -> None:
    assert two_ranks.run(of_each_rank) == [[0.0, 0.0]] * 2
