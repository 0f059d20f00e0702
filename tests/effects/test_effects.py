"""PG-effects against one backward pass a sample and a token."""

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from geffect.effects import InstanceEffects, differential, direction, sample_effects, token_effects
from geffect.gradients import Vector
from geffect.layers import describe, trainable
from geffect.objectives import (
    NPO,
    TNPO,
    WTNPO,
    FrozenModel,
    GradientAscent,
    Objective,
    WeightedGradientAscent,
    nll,
)
from tests.utils import reference, tiny
from tests.utils.effects import MODELS, gradients, inner, made, sums_of_log_p, uneven

IN_FLOAT64 = ["gpt2", "phi", "neox"]  # the others take norms in float32 whatever they are


def in_context(model: nn.Module, batch: Mapping[str, Tensor], along: Vector) -> Tensor:
    """The effects of log p(s), collected around a loss of one's own."""
    with InstanceEffects(model, along) as effects:
        torch.stack(sums_of_log_p(model, batch)).sum().backward()
    model.zero_grad()
    return effects.by_parameter


def length(a: Sequence[Tensor | None]) -> float:
    return sum(float(x.double().square().sum()) for x in a if x is not None) ** 0.5


CASES = [(name, torch.float32, 1e-6) for name in MODELS] + [
    (name, torch.float64, 1e-13) for name in IN_FLOAT64
]


@pytest.mark.parametrize(("name", "dtype", "tolerance"), CASES)
def test_effects_are_those_of_one_backward_each(
    name: str, dtype: torch.dtype, tolerance: float
) -> None:
    model, batch = made(name, dtype), uneven(3)
    along = direction(model, [uneven(1)])
    by_token = token_effects(model, batch, along)
    samples = sample_effects(model, [batch, batch], {"forget": along})["forget"]
    assert torch.equal(by_token.values.isnan(), by_token.log_p.isnan())
    for row, sample in enumerate(reference.token_log_p(model, batch)):
        found = by_token.values[row][~by_token.values[row].isnan()]
        assert len(found) == len(sample)
        for value, log_p in zip(found, sample, strict=True):
            naive = gradients(model, log_p)
            error = abs(float(value - inner(naive, along).sum()))
            assert error <= tolerance * length(naive) * length(along)
        whole = gradients(model, torch.stack(sample).sum())
        scale = tolerance * length(whole) * length(along)
        for place in (row, row + 3):  # the second batch is measured with frozen parameters
            assert (samples[place] - inner(whole, along)).abs().max() <= scale
        assert abs(by_token.by_sample[row] - samples[row].sum()) <= len(sample) * scale


@pytest.mark.parametrize("name", IN_FLOAT64)
def test_effects_agree_with_autograd_to_ten_digits(name: str) -> None:
    model, batch = made(name, torch.float64), uneven(3)
    along = direction(model, [uneven(1)])
    naive = torch.stack([inner(gradients(model, s), along) for s in sums_of_log_p(model, batch)])
    samples = sample_effects(model, [batch], {"forget": along})["forget"]
    torch.testing.assert_close(samples.sum(dim=1), naive.sum(dim=1), rtol=1e-10, atol=0)
    by_sample = token_effects(model, batch, along).by_sample
    torch.testing.assert_close(by_sample, naive.sum(dim=1), rtol=1e-10, atol=0)


def test_direction_is_the_gradient_of_the_token_mean_over_all_batches() -> None:
    model, batches = tiny.gpt2(), [uneven(1), uneven(2, rows=2)]
    naive = torch.stack(
        [x for batch in batches for s in reference.token_log_p(model, batch) for x in s]
    )
    expected = gradients(model, -naive.mean())
    model.train()
    found = direction(model, batches)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-14)
    one = gradients(model, nll(model, batches[0]))
    for x, y in zip(direction(model, batches[:1]), one, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-14)


def test_direction_without_scored_tokens_is_refused() -> None:
    batch = uneven(1)
    batch["labels"][:] = -100
    with pytest.raises(ValueError, match=r"should have an answer token.* Found none .* Mark"):
        direction(tiny.gpt2(), [batch])


@pytest.mark.parametrize("look", ["direction", "tokens", "samples"])
def test_a_look_leaves_no_trace(look: str) -> None:
    model = tiny.llama(dropout=0.3).train()
    model.model.norm.eval()
    model.register_buffer("calls", torch.zeros(1))
    model.register_forward_pre_hook(lambda module, args: module.calls.add_(1) and None)
    along = gradients(model, nll(model, uneven(1)))
    nll(model, uneven(2)).backward()
    before = copy.deepcopy(model)
    grads = [p.grad for p in model.parameters()]
    values = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    buffers = dict(model.named_buffers())
    random = torch.get_rng_state()
    looks: dict[str, Callable[[], Any]] = {
        "direction": lambda: direction(model, [uneven(1), uneven(2)]),
        "tokens": lambda: token_effects(model, uneven(1), along),
        "samples": lambda: sample_effects(model, [uneven(1), uneven(2)], {"a": along}),
    }
    looks[look]()
    assert torch.equal(random, torch.get_rng_state())
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    for p, value in zip(model.parameters(), values, strict=True):
        assert torch.equal(p.grad, value)
    for (name, p), old in zip(model.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(p, old) and p.requires_grad, name
    for name, buffer in model.named_buffers():
        assert buffer is buffers[name] and torch.equal(buffer, before.get_buffer(name)), name
    assert not any(m._forward_hooks for m in model.modules())
    assert not any(p._backward_hooks for p in model.parameters())


@pytest.mark.parametrize("name", ["gpt2", "llama, tied"])
def test_training_ends_bit_for_bit_as_unwatched(name: str) -> None:
    def trained(watch: bool) -> nn.Module:
        torch.manual_seed(0)
        model = made(name).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.2
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        along = direction(model, [uneven(9)])
        torch.manual_seed(1)
        for step in range(3):
            if watch:
                with InstanceEffects(model, along), InstanceEffects(model, along):
                    nll(model, uneven(step)).backward()
            else:
                nll(model, uneven(step)).backward()
            optimizer.step()
            optimizer.zero_grad()
        return model

    watched, unwatched = trained(True), trained(False)
    for x, y in zip(watched.parameters(), unwatched.parameters(), strict=True):
        assert torch.equal(x, y)


def test_effects_carry_the_weights_of_the_loss() -> None:
    model, batch = made("gpt2", torch.float64), uneven(3)
    along, other = direction(model, [uneven(1)]), direction(model, [uneven(2)])
    npo, before = NPO(0.5), FrozenModel(tiny.gpt2(seed=1).eval())
    with InstanceEffects(model, along) as effects, InstanceEffects(model, other) as further:
        npo(model, {"forget": batch}, before).backward()
    implicit = npo.implicit_weights(model, {"forget": batch}, before)
    weights = implicit["weight"] / 3  # their mean over samples
    naive = [gradients(model, s) for s in sums_of_log_p(model, batch)]
    for found, v in ((effects, along), (further, other)):
        expected = torch.stack([w * inner(g, v) for w, g in zip(weights, naive, strict=True)])
        torch.testing.assert_close(found.by_parameter, expected, rtol=1e-9, atol=1e-13)
    layers = [row.layer for row in describe(model)]
    assert effects.layers == ["embedding+head", "embedding", *(f"layer {i}" for i in range(2)),
                              "final norm"]  # fmt: skip
    for place, layer in enumerate(effects.layers):
        members = [i for i, name in enumerate(layers) if name == layer]
        expected = effects.by_parameter[:, members].sum(dim=1)
        torch.testing.assert_close(effects.by_layer[:, place], expected)


OBJECTIVES = [
    (GradientAscent(), "tokens"),
    (WeightedGradientAscent(0.7), "tokens"),
    (TNPO(2.0), "tokens"),
    (WTNPO(2.0, alpha=0.5), "tokens"),
    (NPO(0.5), "samples"),
]


@pytest.mark.parametrize(("objective", "kind"), OBJECTIVES, ids=repr)
def test_weighted_effects_are_the_g_effect_of_the_objective(
    objective: Objective, kind: str
) -> None:
    model, batch = made("gpt2", torch.float64), uneven(3)
    before = FrozenModel(tiny.gpt2(seed=1).eval())
    along = direction(model, [batch])
    e = inner(gradients(model, objective(model, {"forget": batch}, before)), along).sum()
    by_token = token_effects(model, batch, along)
    found = by_token.values
    effects = by_token.by_sample if kind == "samples" else found[~found.isnan()]
    implicit = objective.implicit_weights(model, {"forget": batch}, before)
    weights = implicit.get("weight", torch.ones(()))
    torch.testing.assert_close((weights * effects).mean(), e, rtol=1e-9, atol=0)


def test_micro_batches_follow_one_another() -> None:
    model = made("gpt2", torch.float64)
    along = direction(model, [uneven(1)])
    with InstanceEffects(model, along) as effects:
        for seed in (3, 4):
            nll(model, uneven(seed, rows=seed)).backward()
        with torch.no_grad():
            nll(model, uneven(5))
    assert len(effects.by_parameter) == 7
    with InstanceEffects(model, along) as second:
        nll(model, uneven(4, rows=4)).backward()
    torch.testing.assert_close(effects.by_parameter[3:], second.by_parameter)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_activations_change_nothing(reentrant: bool) -> None:
    model = made("llama").train()
    along = direction(model, [uneven(1)])
    with InstanceEffects(model, along) as plain:
        nll(model, uneven(3)).backward()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with InstanceEffects(model, along) as checkpointed:
        nll(model, uneven(3)).backward()
    torch.testing.assert_close(checkpointed.by_parameter, plain.by_parameter)


def test_layers_that_are_checkpointed_when_a_model_is_first_met() -> None:
    batch = uneven(3)
    for reentrant in (True, False):
        model = made("llama").train()
        along = direction(model, [uneven(1)])
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        says = r"should .* Found .* Take geffect.effects.sample_effects or"
        with pytest.raises(ValueError, match=says) if reentrant else nullcontext():
            found = in_context(model, batch, along)
        assert not any(p._backward_hooks for p in model.parameters())
    samples = sample_effects(model, [batch], {"a": along})["a"]
    torch.testing.assert_close(found, samples)


class Toy(nn.Module):
    """A language model of one's own, with every kind of use that a parameter can have."""

    def __init__(self, body: nn.Module, *, functional: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(tiny.VOCABULARY, 6)
        self.body = body
        self.lm_head = nn.Linear(6, tiny.VOCABULARY, bias=False)
        self.lm_head.weight = self.embed.weight
        self.functional = functional

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        hidden = self.body(self.embed(input_ids))
        head = self.lm_head
        return SimpleNamespace(
            logits=F.linear(hidden, head.weight) if self.functional else head(hidden)
        )


def toy(body: nn.Module, **options: bool) -> Toy:
    torch.manual_seed(0)
    return Toy(body, **options).double()


class Scale(nn.Module):
    """A module with a scalar and a vector, which no rule knows."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.gain).tanh() + self.shift


class Adapter(nn.Module):
    """A frozen matrix and a low-rank addition to it."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(6, 6).requires_grad_(False)
        self.lora_A, self.lora_B = nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.base_layer(x) + self.lora_B(self.lora_A(x))
        return added


@pytest.mark.parametrize("body", [Scale, Adapter, nn.LayerNorm], ids=lambda b: b.__name__)
@pytest.mark.parametrize("frozen", [False, True])
def test_modules_of_ones_own_adapters_and_frozen_parameters(
    body: Callable[..., nn.Module], frozen: bool
) -> None:
    model = toy(body(6) if body is nn.LayerNorm else body())
    model.embed.weight.requires_grad_(not frozen)
    batch = uneven(3)
    along = direction(model, [uneven(1)])
    naive = torch.stack([inner(gradients(model, s), along) for s in sums_of_log_p(model, batch)])
    assert naive.shape[1] == len(describe(model))
    samples = sample_effects(model, [batch, batch], {"a": along})["a"]
    torch.testing.assert_close(samples, torch.cat([naive, naive]), rtol=1e-9, atol=1e-14)
    by_sample = token_effects(model, batch, along).by_sample
    torch.testing.assert_close(by_sample, naive.sum(dim=1), rtol=1e-9, atol=1e-14)
    assert [p.requires_grad for p in trainable(model).values()] == [True] * naive.shape[1]


class _Fused(torch.autograd.Function):
    """A kernel of one's own without a forward rule."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, *deltas: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        (delta,) = deltas
        return delta * weight, (delta * x).sum(dim=(0, 1))


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 6))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _Fused.apply(x, self.weight)
        return out


class Looped(nn.Module):
    """A recurrent layer, whose kernel has no forward rule, in a module that returns one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(6, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.rnn(x)[0]
        return out


@pytest.mark.parametrize("body", [Fused, Looped], ids=lambda b: b.__name__)
def test_backward_passes_are_taken_and_said_where_a_forward_rule_is_missing(
    body: Callable[[], nn.Module], caplog: pytest.LogCaptureFixture
) -> None:
    model, batch = toy(body()).float(), uneven(3)
    if body is Fused:
        model.double()
    along = direction(model, [uneven(1)])
    naive = torch.stack([inner(gradients(model, s), along) for s in sums_of_log_p(model, batch)])
    differential._say.cache_clear()
    with caplog.at_level(logging.WARNING, logger="geffect"):
        by_token = token_effects(model, batch, along)
        token_effects(model, batch, along)
    assert caplog.text.count("One backward pass for each token or sample takes the place") == 1
    tight = {"rtol": 1e-9, "atol": 1e-12} if body is Fused else {"rtol": 1e-5, "atol": 1e-7}
    torch.testing.assert_close(by_token.by_sample, naive.sum(dim=1), **tight)
    expected = torch.stack(sums_of_log_p(model, batch)).double()
    torch.testing.assert_close(by_token.log_p.nansum(dim=1), expected, **tight)
    samples = sample_effects(model, [batch], {"a": along})["a"]
    torch.testing.assert_close(samples, naive, **tight)
    still = [torch.zeros_like(p) for p in trainable(model).values()]
    assert (token_effects(model, batch, still).by_sample == 0).all()


def test_a_use_outside_of_the_module_is_not_missed() -> None:
    model, batch = toy(Scale(), functional=True), uneven(3)
    along = direction(model, [uneven(1)])
    with pytest.raises(ValueError, match=r"samples should add up .* embed\.weight.* Take"):
        in_context(model, batch, along)
    naive = torch.stack([inner(gradients(model, s), along) for s in sums_of_log_p(model, batch)])
    by_sample = token_effects(model, batch, along).by_sample
    torch.testing.assert_close(by_sample, naive.sum(dim=1), rtol=1e-9, atol=1e-14)
    samples = sample_effects(model, [batch], {"a": along})["a"]
    torch.testing.assert_close(samples, naive, rtol=1e-9, atol=1e-14)


class Flattened(nn.Module):
    """Rows that are positions of all samples."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x.flatten(0, 1)).view_as(x)
        return out


def test_what_cannot_be_told_apart_is_refused() -> None:
    model, batch = toy(Flattened()), uneven(3)
    along = direction(model, [batch])
    says = (
        r"a row for each of the 3 samples\. Found \(27, 6\) from `body.linear` \(Linear\)\. Take "
    )
    takes = "geffect.effects.sample_effects or geffect.effects.token_effects, which need no rows"
    with pytest.raises(ValueError, match=says + takes):
        in_context(model, batch, along)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Positions(nn.Module):
    """A table of positions that all samples share, in the shapes that it is written in."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.table = kind, nn.Embedding(16, 6)
        self.gain = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])
        if self.kind == "column":
            return self.gain(x) + self.table(places)
        if self.kind == "first of one":
            return self.gain(x) + self.table(places[None])[0]
        if self.kind == "bias of pairs":
            apart = (places[:, None] - places[None]).abs()
            return self.gain(x) + (self.table(apart).softmax(dim=1)).mean(dim=1)
        if self.kind == "sorted rows":
            order = x.sum(dim=(1, 2)).argsort()
            found: Tensor = self.gain(x[order])[order.argsort()]
            return found
        if self.kind == "time first":
            by_time: Tensor = self.gain(x.transpose(0, 1))
            return by_time.transpose(0, 1)
        assert self.kind == "row"
        return self.gain(x) + self.table(places[None])


@pytest.mark.parametrize("rows", [1, 2, 9])
@pytest.mark.parametrize(
    "kind",
    ["row", "column", "first of one", "bias of pairs", "sorted rows", "time first"],
)
def test_an_equal_number_of_rows_proves_nothing(kind: str, rows: int) -> None:
    model = toy(Positions(kind))
    batch = tiny.batch(3, rows=rows)  # of nine positions
    along = direction(model, [uneven(1)])
    naive = torch.stack([inner(gradients(model, s), along) for s in sums_of_log_p(model, batch)])
    by_sample = token_effects(model, batch, along).by_sample
    torch.testing.assert_close(by_sample, naive.sum(dim=1), rtol=1e-9, atol=1e-14)
    samples = sample_effects(model, [batch], {"a": along})["a"]
    torch.testing.assert_close(samples, naive, rtol=1e-9, atol=1e-14)
    try:
        samples = in_context(model, batch, along)
    except ValueError as refused:
        assert (kind != "row" and rows > 1) or kind in ("column", "bias of pairs", "time first")
        assert "with parameters should return" in str(refused)
        assert "Take geffect.effects.sample_effects or" in str(refused)
    else:
        assert kind == "row" or rows == 1 or (kind, rows) == ("sorted rows", 2)
        torch.testing.assert_close(samples, naive, rtol=1e-9, atol=1e-14)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_module_that_takes_the_place_of_another_proves_itself() -> None:
    inside = nn.Sequential(Positions("row"))
    model, batch = toy(inside), tiny.batch(3, rows=3)
    sample_effects(model, [batch], {"a": direction(model, [uneven(1)])})
    inside[0] = Positions("sorted rows").double()
    with pytest.raises(ValueError, match="with parameters should return"):
        in_context(model, batch, direction(model, [uneven(1)]))


def test_rows_are_told_apart_in_training_bit_for_bit() -> None:
    def trained(watch: bool) -> nn.Module:
        torch.manual_seed(0)
        model = toy(nn.Sequential(Positions("row"), nn.Dropout(0.3))).train()
        along = direction(model, [uneven(9)])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for seed in range(3):
            batch = tiny.batch(seed, rows=9)
            with InstanceEffects(model, along) if watch else nullcontext():
                nll(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        return model

    for p, q in zip(trained(True).parameters(), trained(False).parameters(), strict=True):
        assert torch.equal(p, q)


def test_misuse_is_refused() -> None:
    model, batch = toy(Scale()), uneven(3)
    along = list(direction(model, [batch]))
    with (
        pytest.raises(RuntimeError, match=r"followed by one backward .* Found a second"),
        InstanceEffects(model, along),
    ):
        loss = nll(model, batch)
        loss.backward(retain_graph=True)
        loss.backward()
    with (
        pytest.raises(ValueError, match=r"followed by a backward .* Found one of 3 samples"),
        InstanceEffects(model, along),
    ):
        nll(model, batch)
    with (
        pytest.raises(ValueError, match=r"should run while .* Found none"),
        InstanceEffects(model, along),
    ):
        pass
    with (
        pytest.raises(ValueError, match=r"model itself should be called .* `embed` \(Embedding\)"),
        InstanceEffects(model, along),
    ):
        model.embed(batch["input_ids"])
    with InstanceEffects(model, along) as effects:
        loss = nll(model, batch)
        loss.backward(retain_graph=True)
    before = effects.by_parameter
    loss.backward()  # the context is over
    assert torch.equal(before, effects.by_parameter)
    for wrong in (along[1:], [along[0].T, *along[1:]]):
        with pytest.raises(
            ValueError, match=r"`direction` should have one tensor for each .* Found"
        ):
            InstanceEffects(model, wrong)
        with pytest.raises(
            ValueError, match=r"`direction` should have one tensor for each .* Found"
        ):
            token_effects(model, batch, wrong)
    with pytest.raises(ValueError, match=r"`batches` and `directions` should not be empty"):
        sample_effects(model, [], {"a": along})


def test_effects_do_not_depend_on_padding_and_questions() -> None:
    model = made("gpt2", torch.float64)
    along = direction(model, [tiny.batch(1)])
    short, long = tiny.batch(3), tiny.batch(3, padding=4)
    a, b = token_effects(model, short, along), token_effects(model, long, along)
    torch.testing.assert_close(b.values[:, :9], a.values, equal_nan=True)
    assert b.values[:, 9:].isnan().all()
    samples = sample_effects(model, [short, long], {"a": along})["a"]
    torch.testing.assert_close(samples[:3], samples[3:], rtol=1e-9, atol=1e-15)
    nothing = {**short, "labels": torch.full_like(short["labels"], -100)}
    assert (sample_effects(model, [nothing], {"a": along})["a"] == 0).all()


def test_a_parameter_that_the_risk_does_not_reach_stands_still() -> None:
    model, batch = toy(Scale()), uneven(3)
    along = list(direction(model, [uneven(1)]))
    names = list(trainable(model))
    along[names.index("body.gain")] = None
    samples = sample_effects(model, [batch], {"a": along})["a"]
    assert (samples[:, names.index("body.gain")] == 0).all()
    by_sample = token_effects(model, batch, along).by_sample
    torch.testing.assert_close(samples.sum(dim=1), by_sample, rtol=1e-9, atol=1e-14)
