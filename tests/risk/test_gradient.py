"""Probes: the gradient of a whole set, and not a trace in the model that it was taken of."""

import copy
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from geffect import distributed
from geffect.batch import Batch
from geffect.risk import mean_nll, risk_gradient, undisturbed
from tests.utils import reference, tiny, two_ranks


def unequal(count: int = 5) -> list[Batch]:
    """Batches of different sizes, lengths and numbers of answer tokens."""
    return [tiny.batch(seed, rows=1 + seed % 3, length=6 + 2 * seed) for seed in range(count)]


def naive(model: nn.Module, batches: Sequence[Batch]) -> tuple[dict[str, Tensor], float, int]:
    """The gradient of the mean over all tokens: one loss of all of them, one plain gradient."""
    losses = [-log_p for b in batches for row in reference.token_log_p(model, b) for log_p in row]
    loss = torch.stack(losses).mean()
    return reference.gradient(model, loss), loss.item(), len(losses)


def assert_close(
    vector: Any, gradient: dict[str, Tensor], rtol: float = 1e-9, atol: float = 1e-12
) -> None:
    for tensor, (name, expected) in zip(vector, gradient.items(), strict=True):
        torch.testing.assert_close(
            torch.as_tensor(tensor), expected, rtol=rtol, atol=atol, msg=name
        )


def test_every_answer_token_of_the_set_weighs_the_same() -> None:
    model = tiny.gpt2()
    gradient, loss, tokens = naive(model, unequal())
    risk = risk_gradient(model, unequal())
    assert_close(risk.vector, gradient)
    assert risk.loss == pytest.approx(loss, rel=1e-12)
    assert risk.tokens == tokens
    means = [reference.gradient(model, reference.nll(model, b)) for b in unequal()]
    wrong = reference.flat({n: sum(m[n] for m in means) / 5 for n in gradient})
    right = reference.flat(gradient)
    assert float((wrong - right).norm() / right.norm()) > 0.05  # what the mean of means is off by


def test_the_value_alone_is_that_of_the_gradient() -> None:
    model = tiny.gpt2()
    _, loss, _ = naive(model, unequal())
    assert mean_nll(model, unequal()) == pytest.approx(loss, rel=1e-12)
    assert mean_nll(model, unequal()) == risk_gradient(model, unequal()).loss


def test_the_gradient_of_an_encoder_decoder_is_that_of_its_own_loss() -> None:
    model, batch = tiny.t5().eval(), tiny.translation(1)
    own = model(**batch).loss
    risk = risk_gradient(model, batch)
    assert risk.loss == pytest.approx(own.item(), rel=1e-12)
    assert risk.tokens == int((batch["labels"] != -100).sum())
    # Its attention is in float32, where gradients of a mean and of a sum round differently.
    assert_close(risk.vector, reference.gradient(model, own), rtol=1e-6, atol=1e-8)


def test_one_batch_a_list_and_a_loader_are_the_same_risk() -> None:
    model = tiny.llama()
    rows = tiny.batch(0, rows=4)
    samples = [{name: value[i] for name, value in rows.items()} for i in range(4)]
    loader = torch.utils.data.DataLoader(samples, batch_size=2, shuffle=True)
    risks = [risk_gradient(model, data) for data in (rows, [rows], loader, loader)]
    for risk in risks:
        assert risk.tokens == risks[0].tokens
        assert risk.loss == pytest.approx(risks[0].loss, rel=1e-6)
        for a, b in zip(risk.vector, risks[0].vector, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_an_answer_in_no_batch_is_no_risk() -> None:
    batch = tiny.batch(0)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    with pytest.raises(ValueError, match="should have an answer token"):
        risk_gradient(tiny.llama(), [batch])


@pytest.mark.parametrize("data", [iter([tiny.batch(0)]), 7])
def test_what_can_be_gone_through_once_is_refused(data: Any) -> None:
    with pytest.raises(TypeError, match="a list of batches or a loader"):
        risk_gradient(tiny.llama(), data)


class Restless(nn.Module):
    """A model that counts its passes in one buffer, replaces another, and draws numbers."""

    config = None

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny.llama(dropout=0.5)
        self.register_buffer("passes", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(3))
        self.frozen = nn.Parameter(torch.zeros(2), requires_grad=False)

    def forward(self, **inputs: Tensor) -> Any:
        self.passes += 1
        self.replaced = torch.randn(3)
        random.random()
        np.random.random()
        return self.inner(**inputs)


def test_the_model_and_the_random_numbers_are_left_as_they_were() -> None:
    model = Restless().train()
    model.inner.model.layers[1].eval()  # modes that differ stay different
    model.inner.lm_head.weight.grad = kept = torch.ones_like(model.inner.lm_head.weight)
    model.frozen.grad = frozen = torch.ones(2)
    before = {
        "modes": [m.training for m in model.modules()],
        "buffers": [(id(b), b.clone()) for b in model.buffers()],
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state(),
    }
    risk = risk_gradient(model, unequal())
    # No dropout, in spite of both kinds of mode.
    exact, _, _ = naive(copy.deepcopy(model.inner).eval(), unequal())
    assert_close(risk.vector, exact, rtol=1e-4, atol=1e-6)
    assert [m.training for m in model.modules()] == before["modes"]
    for buffer, (place, value) in zip(model.buffers(), before["buffers"], strict=True):
        assert id(buffer) == place
        assert torch.equal(buffer, value)
    assert torch.equal(torch.get_rng_state(), before["torch"])
    assert random.getstate() == before["python"]
    assert all(
        np.array_equal(a, b) for a, b in zip(np.random.get_state(), before["numpy"], strict=True)
    )
    assert model.inner.lm_head.weight.grad is kept
    assert torch.equal(kept, torch.ones_like(kept))
    assert model.frozen.grad is frozen
    assert all(
        p.grad is None
        for n, p in model.named_parameters()
        if n not in ("inner.lm_head.weight", "frozen")
    )


def test_the_model_is_left_as_it_was_also_when_a_probe_fails() -> None:
    model = tiny.llama(dropout=0.5).train()
    state = torch.get_rng_state()
    with pytest.raises(KeyError, match="broken"), undisturbed(model):
        torch.rand(3)
        model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
        raise KeyError("broken")
    assert model.training
    assert model.lm_head.weight.grad is None
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_stay_so_where_there_is_no_dropout(
    dropout: float, reentrant: bool
) -> None:
    model = tiny.llama(dropout=dropout)
    gradient, _, _ = naive(copy.deepcopy(model).eval(), unequal(2))
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    calls = []
    for layer in model.model.layers:
        run = layer._gradient_checkpointing_func
        layer._gradient_checkpointing_func = lambda *a, run=run, **k: (
            calls.append(1) or run(*a, **k)
        )
    risk = risk_gradient(model, unequal(2))
    assert_close(risk.vector, gradient, rtol=1e-4, atol=1e-6)
    assert len(calls) == (0 if dropout else 2 * 2)


def test_sums_of_many_batches_do_not_drown_in_half_precision() -> None:
    model = tiny.llama().bfloat16()
    batches = [tiny.batch(seed, rows=1) for seed in range(60)]
    exact = [torch.zeros_like(p, dtype=torch.float64) for p in model.parameters()]
    tokens = 0
    for batch in batches:
        risk = risk_gradient(model, batch)
        tokens += risk.tokens
        for total, grad in zip(exact, risk.vector, strict=True):
            total += grad.double() * risk.tokens
    whole = torch.cat([(e / tokens).flatten() for e in exact])
    found = torch.cat([g.double().flatten() for g in risk_gradient(model, batches).vector])
    assert float((found - whole).norm() / whole.norm()) < 2e-3


def test_a_probe_inside_of_autocast_leaves_training_as_it_was() -> None:
    results = []
    for probed in (False, True):
        model = tiny.llama()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if probed:  # what is cast for it must not be taken for the weights of later
                risk_gradient(model, unequal(2))
            with torch.no_grad():
                model.lm_head.weight.mul_(2)
            first = reference.nll(model, tiny.batch(0))
            if probed:  # nor may it free what a graph of training has in common with it
                risk_gradient(model, unequal(2))
            loss = first + reference.nll(model, tiny.batch(1))
        loss.backward()
        results.append([p.grad for p in model.parameters()])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_autocast_is_that_of_the_caller() -> None:
    model = tiny.llama()
    plain, same = risk_gradient(model, unequal(2)), risk_gradient(model, unequal(2))
    cast = risk_gradient(
        model, unequal(2), autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16)
    )
    assert plain.loss == same.loss != cast.loss
    assert cast.loss == pytest.approx(plain.loss, rel=1e-2)
    assert {v.dtype for v in cast.vector if v is not None} == {torch.float32}


COUNTS = (3, 1)
"""How many batches: one process has fewer than the other, or none."""


def of_two(kind: str) -> list[dict[str, Any]]:
    """Risks on one of two processes, and a step of training after each."""
    model = tiny.llama()
    if kind == "ddp":
        trained = DistributedDataParallel(model)
    else:
        for layer in model.model.layers:
            fully_shard(layer)
        trained = fully_shard(model)
    said = []
    for count in COUNTS:
        risk = risk_gradient(model, unequal(count))
        trained.zero_grad()
        reference.nll(trained, tiny.batch(distributed.rank())).backward()
        said.append(
            {
                "vector": [whole(v) for v in risk.vector],
                "loss": risk.loss,
                "value": mean_nll(model, unequal(count)),
                "tokens": risk.tokens,
                "training": [whole(p.grad) for p in model.parameters()],
            }
        )
    return said


def whole(tensor: Any) -> np.ndarray:
    """A tensor with all of its parts, in a form that another process can be sent."""
    return (tensor.full_tensor() if distributed.is_sharded(tensor) else tensor).numpy()


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_share_the_batches_of_a_risk(kind: str) -> None:
    model = tiny.llama()
    losses = [reference.nll(model, tiny.batch(rank)) for rank in range(2)]
    training = reference.gradient(model, sum(losses) / 2)
    for of_rank in two_ranks.run(of_two, kind):
        for count, said in zip(COUNTS, of_rank, strict=True):
            gradient, loss, tokens = naive(model, unequal(count))
            assert said["loss"] == pytest.approx(loss, rel=1e-5)
            assert said["value"] == pytest.approx(loss, rel=1e-5)
            assert said["tokens"] == tokens
            assert_close(said["vector"], gradient, rtol=1e-4, atol=1e-6)
            assert_close(said["training"], training, rtol=1e-4, atol=1e-6)
