"""A look at a model in training: what is left of it is nothing."""

import copy
import random
from collections import Counter, deque
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from geffect.risk import beside, mean_nll, nll, risk_gradient, undisturbed
from tests.utils import shallow as tiny


class Norm(nn.Module):
    """Batch statistics where a Llama has its last norm."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(16)

    def forward(self, states: Tensor) -> Tensor:
        return self.bn(states.mT).mT


class Counted(nn.Module):
    """A head whose graph saves a buffer that each forward then moves, and that two names share."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head
        self.register_buffer("scale", torch.ones(tiny.VOCABULARY))
        self.register_buffer("same", self.scale)
        self.calls = 0
        self.last: Tensor | None = None

    def forward(self, states: Tensor) -> Tensor:
        self.calls += 1
        with torch.no_grad():
            self.same.mul_(1.5)
        self.last = states.detach()
        self.lazily = states.shape
        self.further = float(self.calls)
        return self.head(states) * self.scale


def made(kind: str) -> nn.Module:
    model = tiny.llama(dropout=0.2).train()
    if kind == "batch norm":
        model.model.norm = Norm()
    elif kind == "power iterations":
        nn.utils.parametrizations.spectral_norm(model.lm_head)
    elif kind == "power iterations in hooks":
        nn.utils.spectral_norm(model.model.layers[0].mlp.up_proj)
    elif kind == "a buffer in the graph":
        model.lm_head = Counted(model.lm_head)
    elif kind == "growing positions":
        torch.manual_seed(0)
        config = copy.deepcopy(model.config)
        config.max_position_embeddings, config.attention_dropout = 8, 0.0
        config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
        model = LlamaForCausalLM(config).train()
    return model


KINDS = [
    "dropout",
    "batch norm",
    "power iterations",
    "power iterations in hooks",
    "a buffer in the graph",
    "growing positions",
]


def trained(kind: str, look: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Steps, each with a look before its forward and one before its backward."""
    model = made(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(5)
    for step in range(3):
        look(model)
        loss = nll(model, tiny.batch(step, length=9 + step))
        look(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


@cache
def unwatched(kind: str) -> tuple[nn.Module, Tensor]:
    """The model after a training without a look, and the random numbers of torch."""
    plain, _ = trained(kind, lambda model: None)
    return plain, torch.get_rng_state()


def glance(model: nn.Module) -> None:
    with beside(model):
        random.random()
        np.random.random()
        nll(model, tiny.batch(7, length=20))


LOOKS = {
    "gradient": lambda model: risk_gradient(model, [tiny.batch(7, length=20), tiny.batch(8)]),
    "value": lambda model: mean_nll(model, [tiny.batch(7, length=20), tiny.batch(8)]),
    "beside": glance,
}


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("kind", KINDS)
def test_training_ends_bit_for_bit_as_without_a_look(kind: str, look: str) -> None:
    plain, drawn = unwatched(kind)
    before = random.getstate(), np.random.get_state()[1].tolist()
    watched, _ = trained(kind, LOOKS[look])
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), drawn)
    assert [*plain.state_dict()] == [*watched.state_dict()]
    for (name, a), b in zip(plain.named_parameters(), watched.parameters(), strict=True):
        assert torch.equal(a, b), name
    for (name, a), b in zip(plain.named_buffers(), watched.buffers(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_look_would_have_been_noticed(kind: str) -> None:
    """The models of the test above are disturbed by what is not kept from them."""
    plain, _ = trained(kind, lambda model: None)

    def look(model: nn.Module) -> None:
        with torch.no_grad():
            model(input_ids=tiny.batch(7, length=20)["input_ids"])

    try:
        disturbed, _ = trained(kind, look)
    except RuntimeError as error:  # of autograd, where the graph has saved what was moved
        assert "modified by an inplace operation" in str(error)
        return
    a, b = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (plain, disturbed))
    assert any(not torch.equal(a[name], b[name]) for name in a)


def test_a_loss_from_beside_has_the_gradient_of_its_own_forward() -> None:
    model = made("a buffer in the graph")
    twin = copy.deepcopy(model)
    torch.manual_seed(3)
    with beside(model):
        loss = nll(model, tiny.batch(1))
    torch.manual_seed(3)
    expected = nll(twin, tiny.batch(1))
    nll(model, tiny.batch(2))  # moves the buffers again, before the first graph is gone through
    loss.backward()
    expected.backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_attributes_and_shared_buffers_are_those_from_before() -> None:
    model = made("a buffer in the graph")
    head = model.lm_head
    scale = head.scale
    with beside(model):
        assert head.scale is head.same is not scale
        nll(model, tiny.batch(1))
        assert head.calls == 1 and head.scale[0] == 1.5
    assert head.scale is head.same is scale
    assert head.calls == 0 and head.last is None and not hasattr(head, "further")
    assert scale.eq(1).all()


def test_a_trained_tensor_that_is_no_parameter_is_worked_on_itself() -> None:
    class Prompted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.prompt = torch.zeros(3, requires_grad=True)

    model = Prompted()
    prompt = model.prompt
    with beside(model):
        model.prompt.sum().backward()
    assert model.prompt is prompt and prompt.grad is not None


def test_layers_go_on_checkpointing_only_where_they_may() -> None:
    model = tiny.llama()
    model.activation_checkpointing_enable({"use_reentrant": False})
    for recompute in (True, False):
        with undisturbed(model.train(), recompute=recompute):
            modes = {layer.training for layer in model.model.layers}
            assert modes == {recompute}
            assert not model.lm_head.training


def test_what_a_model_notes_of_its_hooks_stays_true() -> None:
    model = tiny.llama().eval()
    batch = {name: x for name, x in tiny.batch(1).items() if name != "labels"}
    expected = tiny.llama().eval()(**batch, output_hidden_states=True).hidden_states
    for _ in range(2):
        with beside(model):
            model(**batch, output_hidden_states=True)
        found = model(**batch, output_hidden_states=True).hidden_states
        assert len(found) == len(expected)
        assert all(map(torch.equal, found, expected))


class Remembering(nn.Module):
    """Keeps what it has seen in containers, inside of each other and shared with another module."""

    def __init__(self, shared: list[torch.Tensor]) -> None:
        super().__init__()
        self.past: dict[str, Any] = {"states": deque(maxlen=2), "seen": set(), "calls": Counter()}
        self.shared = shared
        self.past["itself"] = self.past

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.shared[0] *= 0.5
        self.shared.append(x.detach().mean())
        self.past["states"].append(x.detach())
        self.past["calls"]["all"] += 1
        self.past["seen"].add(len(self.shared))
        self.past["last"] = x.detach()
        return x * sum(self.shared) + len(self.past["states"]) * self.past["calls"]["all"]


def test_what_modules_remember_in_containers_is_what_they_would_have_seen_alone() -> None:
    ends = []
    for watched in (False, True):
        shared = [torch.ones(())]
        model = nn.Sequential(Remembering(shared), Remembering(shared))
        for step in range(3):
            if watched:
                with beside(model):
                    model(torch.full((2,), 7.0))
            out = model(torch.full((2,), float(step)))
        past = model[0].past
        ends.append([*shared, *past["states"], past["last"], out, torch.tensor([*past["seen"]])])
        assert model[1].shared is shared
    assert all(map(torch.equal, *ends)) and len(ends[0]) == len(ends[1])


class Warming:
    """An object that counts its calls, and averages what it has seen in a tensor of its own."""

    def __init__(self) -> None:
        self.calls, self.mean, self.draws = 0, None, {"at": random.Random(3)}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.mean is None:
            self.mean = x.detach().mean()
            self.since = self.calls
        self.mean.lerp_(x.detach().mean(), 0.5)
        return x * self.mean / self.calls + self.draws["at"].random() + self.since


class Stateful(nn.Module):
    """Has a state that no buffer holds, made by a function."""

    def __init__(self, made: Callable[[], Callable[[torch.Tensor], torch.Tensor]]) -> None:
        super().__init__()
        self.state = made()
        self.inside = [made()]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return drawn(self.state, x) + drawn(self.inside[0], x)


def drawn(state: Any, x: torch.Tensor) -> torch.Tensor:
    if isinstance(state, torch.Generator):
        return x + torch.randn(x.shape, generator=state)
    return state(x) if callable(state) else x + state.random()


STATES: dict[str, Callable[[], Any]] = {
    "an object": Warming,
    "a generator of torch": lambda: torch.Generator().manual_seed(1),
    "a generator of numpy": lambda: np.random.default_rng(1),
    "an older one of numpy": lambda: np.random.RandomState(1),
    "one of Python": lambda: random.Random(1),
}


@pytest.mark.parametrize("look", [None, "beside", "plain"])
@pytest.mark.parametrize("kind", STATES)
def test_what_objects_of_a_module_remember_is_what_they_would_have_seen_alone(
    kind: str, look: str | None
) -> None:
    """The last look is one that would have been noticed."""
    model, twin = Stateful(STATES[kind]), Stateful(STATES[kind])
    kept = model.state
    for step in range(3):
        if look:
            with beside(model) if look == "beside" else nullcontext():
                model(torch.full((2,), 7.0))
        out, expected = (m(torch.full((2,), float(step))) for m in (model, twin))
    assert model.state is kept
    assert torch.equal(out, expected) == (look != "plain")


def test_sets_that_nothing_changes_keep_their_order() -> None:
    model = nn.Linear(2, 2)
    model.names = set(range(64))
    model.names.difference_update({*range(64)} - {1, 33, 40})
    order = [*model.names]
    assert order != [*set(order)]  # that of a set which is filled anew
    with beside(model):
        model(torch.ones(2))
    assert [*model.names] == order


def test_a_hook_from_before_is_called_and_may_go_inside() -> None:
    model, calls = nn.Linear(2, 2), []
    first = model.register_forward_hook(lambda *_: calls.append("first"))
    second = model.register_forward_hook(lambda *_: calls.append("second"))
    with beside(model):
        model.register_forward_pre_hook(lambda *_: calls.append("inside"))
        first.remove()
        model(torch.ones(2))
    model(torch.ones(2))
    second.remove()
    model(torch.ones(2))
    assert calls == ["inside", "second", "second"]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_may_be_differentiated_by_cudnn(kind: type[nn.RNNBase]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(kind(4, 3, num_layers=2, dropout=0.5), nn.Dropout(0.5)).eval()
    x = torch.randn(5, 2, 4)
    expected = model[0](x)[0]
    for mode in (True, False):
        model.train(mode)
        with undisturbed(model):
            assert model[0].training and not model[1].training  # cuDNN knows no other gradient
            assert torch.equal(model[0](x)[0], expected)
        assert [m.training for m in model.modules()] == [mode] * 3
        assert model[0].dropout == 0.5
