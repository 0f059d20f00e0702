"""Models of many architectures: what is measured of them is autograd's, or it is refused."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from geffect import Recorder, Rectifier, open_run
from geffect.analysis import instances, tokens
from geffect.effects import InstanceEffects, direction, token_effects
from geffect.layers import describe, trainable
from geffect.risk import token_log_probabilities
from tests.utils import reference
from tests.utils.architectures import ARCHITECTURES, batch_for, loss_of, made

TOLERANCE = 1e-6
"""Of |a||b|, for <a, b>."""

UNSCORED = {"bert", "vit", "cnn"}
"""Models that are no causal language models: their losses are recorded, and not made here."""

WITHOUT_ROWS = {
    "opt", "mixtral", "qwen2 moe", "qwen3 moe", "mamba", "mamba2", "qwen2 vl", "t5", "lstm",
    "nanogpt",
}  # fmt: skip
"""Models whose modules work on positions, states or tables, in a context around one's own loss."""


def gradient(model: nn.Module, loss: Tensor) -> Tensor:
    return reference.flat(reference.gradient(model, loss)).double()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_recorder_and_rectifier_agree_with_autograd(name: str, tmp_path: Path) -> None:
    model = made(name)
    batches = {"forget": batch_for(name, 1), "retain": batch_for(name, 2, rows=4)}
    losses = {side: loss_of(name, model, batch) for side, batch in batches.items()}
    f, r = (gradient(model, loss) for loss in losses.values())
    with Recorder(model, tmp_path / "a.h5") as recorder:
        recorder.backward(objective={"forget": -1.0}, **losses)
    found = open_run(tmp_path / "a.h5").gram()[0].sum(axis=0)
    vectors = torch.stack([-f, f, r])
    lengths = vectors.norm(dim=1)
    off = (torch.tensor(found) - vectors @ vectors.T).abs()
    assert (off <= TOLERANCE * lengths[:, None] * lengths).all()

    losses = {side: loss_of(name, model, batch) for side, batch in batches.items()}
    harms = {"forget": -1.0 if torch.dot(f, r) > 0 else 1.0, "retain": -0.1}
    model.zero_grad()
    Rectifier(model).backward(objective=harms, **losses)
    u = harms["forget"] * f + harms["retain"] * r
    left = torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in _trained(model)]
    ).double()
    expected = reference.gru(u, r)
    assert torch.dot(u, r) < 0
    assert (left - expected).norm() <= TOLERANCE * u.norm()
    assert abs(torch.dot(left, r)) <= TOLERANCE * u.norm() * r.norm()


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in UNSCORED])
def test_effects_of_samples_and_tokens_agree_with_autograd(name: str) -> None:
    model, batch = made(name), batch_for(name, 1)
    along = direction(model, [batch_for(name, 2, rows=4)])
    v = torch.cat(
        [
            (torch.zeros_like(p) if x is None else x).flatten()
            for p, x in zip(_trained(model), along, strict=True)
        ]
    ).double()
    log_p, scored = token_log_probabilities(model, batch)
    of_tokens = [
        [gradient(model, p) for p in row[told]] for row, told in zip(log_p, scored, strict=True)
    ]

    by_token = tokens(model, [batch], along)
    for row, expected in enumerate(of_tokens):
        found = by_token[by_token["sample"] == row]["value"]
        for value, g in zip(found, expected, strict=True):
            assert abs(value - float(torch.dot(g, v))) <= TOLERANCE * g.norm() * v.norm()

    # The second batch is measured with frozen parameters where there are rows.
    by_parameter = instances(model, [batch, batch], along, by="parameter")
    starts = [0, *itertools.accumulate(p.numel() for p in _trained(model))]
    for sample in range(2 * len(of_tokens)):
        g = torch.stack(of_tokens[sample % len(of_tokens)]).sum(dim=0)
        found = by_parameter[by_parameter["sample"] == sample].set_index("parameter")["value"]
        for row, start, end in zip(describe(model), starts, starts[1:], strict=False):
            exact = float(torch.dot(g[start:end], v[start:end]))
            assert abs(found[row.name] - exact) <= TOLERANCE * g.norm() * v.norm()


@pytest.mark.parametrize("name", sorted(WITHOUT_ROWS))
def test_what_has_no_rows_is_refused_around_a_loss_of_ones_own(name: str) -> None:
    model, batch = made(name), batch_for(name, 1)
    along = direction(model, [batch_for(name, 2, rows=4)])
    says = r"should .* Found .* geffect.effects.sample_effects or geffect.effects.token_effects"
    with pytest.raises(ValueError, match=says), InstanceEffects(model, along):
        loss_of(name, model, batch).backward()


@pytest.mark.parametrize("name", sorted(UNSCORED))
def test_a_risk_is_not_made_of_what_is_no_causal_model(name: str) -> None:
    model, batch = made(name), batch_for(name, 1)
    says = rf"should be .* Found .*`{type(model).__name__}`"
    nothing = [None] * len(_trained(model))
    looks: Sequence[Callable[[], object]] = [
        lambda: direction(model, [batch]),
        lambda: instances(model, [batch], nothing),
        lambda: token_effects(model, batch, nothing),
    ]
    for look in looks:
        with pytest.raises(ValueError, match=says):
            look()


def _trained(model: nn.Module) -> Sequence[Tensor]:
    return [*trainable(model).values()]
