"""Single experts of tensors that hold several: as slices of plain autograd, and as they add up."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from geffect import Recorder, Run, open_run
from geffect.analysis import cosine, g_effect
from geffect.layers import describe, trainable
from geffect.objectives import nll
from tests.utils import shallow as tiny
from tests.utils.architectures import batch_for, made

FUSED = ["mixtral", "qwen2 moe", "qwen3 moe"]


def recorded(path: Path, model: nn.Module, batches: list[dict[str, Tensor]]) -> Run:
    """A run of one step of GA, and of one whose gradients are kept until after the step."""
    for update in (False, True):
        with Recorder(model, path / f"{update}.h5", update=update) as recorder:
            forget, retain = (nll(model, batch) for batch in batches)
            recorder.backward(objective={"forget": -1.0}, forget=forget, retain=retain)
        model.zero_grad()
    run, kept = open_run(path / "False.h5"), open_run(path / "True.h5")
    k = len(run.sources)
    np.testing.assert_array_equal(run.expert_gram(), kept.expert_gram()[..., :k, :k])
    return run


def by_hand(model: nn.Module, batches: list[dict[str, Tensor]]) -> dict[str, dict[str, float]]:
    """<grad R, -grad R_forget> of every expert, router and rest of a layer, for both risks."""
    parameters = trainable(model)
    gradients = [
        torch.autograd.grad(nll(model, b), [*parameters.values()], materialize_grads=True)
        for b in batches
    ]
    found: dict[str, dict[str, float]] = {"unlearning": {}, "retaining": {}}
    for effect, risk in zip(found, gradients, strict=True):
        for row, u, g in zip(describe(model), gradients[0], risk, strict=True):
            products = -(u.double() * g.double())
            parts = products.flatten(1).sum(1) if row.experts else [products.sum()]
            for expert, value in enumerate(parts):
                role = f"expert {expert}" if row.experts else row.role
                label = f"{row.layer} {role}".strip()
                found[effect][label] = found[effect].get(label, 0.0) + float(value)
    return found


@dataclass(frozen=True)
class Mixture:
    """A run of a model with fused experts, and its effects by hand."""

    run: Run
    right: dict[str, dict[str, float]]


@pytest.fixture(scope="module", params=FUSED)
def mixture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    model = made(request.param)
    batches = [batch_for(request.param, seed) for seed in (0, 1)]
    right = by_hand(model, batches)
    return Mixture(recorded(tmp_path_factory.mktemp("experts"), model, batches), right)


def test_experts_are_slices_of_autograd(mixture: Mixture) -> None:
    for effect, table in g_effect(mixture.run, by="expert").groupby("effect", observed=True):
        right = mixture.right[str(effect)]
        values = dict(zip(table["expert"], table["value"], strict=True))
        assert values.keys() == right.keys()
        for label, value in values.items():
            assert value == pytest.approx(right[label], rel=1e-9, abs=1e-15)


def test_experts_add_up_to_their_tensor_and_all_to_the_model(mixture: Mixture) -> None:
    run = mixture.run
    held = [i for i, row in enumerate(run.layers) if row.experts]
    parts = run.expert_gram().reshape(1, len(held), 4, *[len(run.sources)] * 2)
    np.testing.assert_allclose(parts.sum(axis=2), run.gram()[:, held], rtol=1e-12)
    words = ("expert", "layer", "group", "paper", "code", "tower", "model")
    tables = [g_effect(run, by=by) for by in words]
    sums = [table.groupby("effect", observed=True)["value"].sum() for table in tables]
    for own in sums:
        np.testing.assert_allclose(own, sums[-1], rtol=1e-12)


class Apart(nn.Module):
    """A mixture whose experts have tensors of their own, each reached by one input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(2, 3, bias=False)
        self.experts = nn.ModuleList(nn.Linear(2, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(-1)
        return sum(w * e(x).squeeze(-1) for w, e in zip(weights.T, self.experts, strict=True))


def test_experts_that_are_apart_have_the_same_labels(tmp_path: Path) -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleDict({"mlp": Apart()}) for _ in "ab")})
    with Recorder(model, tmp_path / "run.h5") as recorder:
        forget, retain = (
            sum(layer["mlp"](torch.eye(2) * scale).sum() for layer in model["layers"]) ** 2
            for scale in (1.0, 2.0)
        )
        recorder.backward(objective={"forget": -1.0}, forget=forget, retain=retain)
    run = open_run(tmp_path / "run.h5")
    angles = cosine(run, "forget", "retain", by="expert")
    assert list(angles["expert"]) == [
        f"layer {i} {role}"
        for i in range(2)
        for role in ("router", "expert 0", "expert 1", "expert 2")
    ]
    with pytest.raises(ValueError, match="should hold tensors of several experts"):
        run.expert_gram()


def test_a_model_without_experts_has_none(tmp_path: Path) -> None:
    run = recorded_dense(tmp_path)
    with pytest.raises(ValueError, match="`by` should be `expert` for a model with experts"):
        g_effect(run, by="expert")


def recorded_dense(path: Path) -> Run:
    model, pair = tiny.llama(), tiny.pairs(1)[0]
    with Recorder(model, path / "run.h5") as recorder:
        forget, retain = nll(model, pair["forget"]), nll(model, pair["retain"])
        recorder.backward(objective={"forget": -1.0}, forget=forget, retain=retain)
    return open_run(path / "run.h5")
