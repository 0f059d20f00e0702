"""Objectives that learn what is to go, against naive loops, and the Gram matrix of their parts."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from geffect import Recorder, Rectifier, open_run
from geffect.checkpoints.estimators import full
from geffect.checkpoints.replay import replay
from geffect.data.collate import collate
from geffect.data.others import WithOthers, others
from geffect.objectives import SKU, FrozenModel, Objective, SSUAcquire, step_losses
from geffect.projection import SaliencyMask
from geffect.trainers.unlearning import UnlearningTrainer
from tests.utils import reference
from tests.utils import shallow as tiny
from tests.utils.sides import batches_of, pair_of
from tests.utils.unlearning_runs import arguments


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny.gpt2()


@pytest.fixture(scope="module")
def before() -> nn.Module:
    return tiny.gpt2(seed=1).eval()


def of_random(model: nn.Module, forget: Any, count: int) -> Tensor:
    """The mean over samples and answers of the mean NLL of the tokens of each."""
    means = [
        -torch.stack(tokens).mean()
        for number in range(1, count + 1)
        for tokens in reference.token_log_p(model, forget[f"random{number}"])
    ]
    return torch.stack(means).mean()


def distances(model: nn.Module, before: nn.Module, batch: Any) -> list[Tensor]:
    """KL(p_o || p_theta) at each scored token, one at a time."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits, known = model(**inputs).logits, before(**inputs).logits.detach()
    found = []
    for row, labels in enumerate(batch["labels"].tolist()):
        for place, label in enumerate(labels):
            if place and label != -100:
                p = known[row, place - 1].softmax(-1)
                q = logits[row, place - 1].softmax(-1)
                found.append((p * (p.log() - q.log())).sum())
    return found


def expected_parts(
    objective: Objective, model: nn.Module, before: nn.Module, pair: Any
) -> dict[str, tuple[float, Tensor]]:
    """Each part with its weight."""
    if isinstance(objective, SSUAcquire):
        return {
            "answers": (1.0, reference.nll(model, pair["forget"]["original"])),
            "random_answers": (
                objective.eps, of_random(model, pair["forget"], objective.answers)
            ),
        }  # fmt: skip
    assert isinstance(objective, SKU)
    apart = distances(model, before, pair["retain"])
    return {
        "guided_distortion": (
            objective.distortion, reference.nll(model, pair["forget"]["original"])
        ),
        "random_disassociation": (
            objective.disassociation, of_random(model, pair["forget"], objective.answers)
        ),
        "preservation_divergence": (objective.divergence, -torch.stack(apart).mean()),
    }  # fmt: skip


OBJECTIVES = [
    SSUAcquire(), SSUAcquire(eps=2.0, answers=1), SKU(), SKU(0.5, 1.0, 1.0, answers=2)
]  # fmt: skip


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_parts_against_loops(objective: Objective, model: nn.Module, before: nn.Module) -> None:
    pair = pair_of(objective)
    parts = objective.components(model, pair, FrozenModel(before))
    expected = expected_parts(objective, model, before, pair)
    assert parts.keys() == expected.keys()
    for name, (weight, loss) in expected.items():
        assert parts[name].weight == weight
        found = parts[name].loss
        assert found.item() == pytest.approx(loss.item(), rel=1e-10)
        grads = [reference.flat(reference.gradient(model, one)) for one in (found, loss)]
        torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("objective", [SSUAcquire(), SKU()], ids=repr)
@pytest.mark.parametrize("rectified", [False, True])
def test_the_gram_matrix_of_the_parts_is_recorded(
    objective: Objective, rectified: bool, before: nn.Module, tmp_path: Path
) -> None:
    model, pair = tiny.gpt2(), pair_of(objective)
    expected = {
        name: reference.gradient(model, loss)
        for name, (_, loss) in expected_parts(objective, model, before, pair).items()
    }
    parts = objective.components(model, pair, FrozenModel(before))
    losses: dict[str, Any] = step_losses(parts, apart=True)
    if rectified:
        losses["retain"] = lambda: reference.nll(model, pair["retain"])
    with Recorder(model, tmp_path / "run.h5") as recorder:
        recorder.backward(**losses, rectifier=Rectifier(model) if rectified else None)
    run = open_run(tmp_path / "run.h5")
    names = [component.risk or f"objective.{name}" for name, component in parts.items()]
    assert set(names) <= set(run.sources)
    index = [run.sources.index(name) for name in names]
    gram = torch.as_tensor(run.gram()[0].sum(0))[index][:, index]
    wanted = [[reference.inner(a, b) for b in expected.values()] for a in expected.values()]
    torch.testing.assert_close(gram.double(), torch.tensor(wanted).double(), rtol=1e-6, atol=1e-9)


def test_the_parts_of_all_data_are_those_of_their_batches(tmp_path: Path) -> None:
    tiny.llama().save_pretrained(tmp_path / "checkpoint-0")
    sets = batches_of(SSUAcquire(), count=3)
    run = replay(
        tmp_path / "checkpoint-0", tmp_path / "run.h5", objective="ssu-acquire",
        forget=sets["forget"], retain=sets["retain"], estimator=full,
    )  # fmt: skip
    model = tiny.llama()
    of_batches = [of_random(model, batch, 3) for batch in sets["forget"]]
    tokens = [int((batch["original"]["labels"] != -100).sum()) for batch in sets["forget"]]
    risks = [reference.nll(model, batch["original"]) for batch in sets["forget"]]
    risk = sum(n * r for n, r in zip(tokens, risks, strict=True)) / sum(tokens)
    loss = risk + 0.5 * torch.stack(of_batches).mean()
    found = run.losses()["objective"][0]
    assert float(found) == pytest.approx(float(loss), rel=1e-5)


def test_the_cap_holds_each_token_and_stops_its_gradient(
    model: nn.Module, before: nn.Module
) -> None:
    pair = pair_of(SKU())
    apart = distances(model, before, pair["retain"])
    cap = 1.001 * float(torch.stack(apart).median())
    expected = -torch.stack([d.clamp(max=cap) for d in apart]).mean()
    part = SKU(cap=cap).components(model, pair, FrozenModel(before))["preservation_divergence"]
    assert part.loss.item() == pytest.approx(expected.item(), rel=1e-10)
    grads = [reference.flat(reference.gradient(model, one)) for one in (part.loss, expected)]
    torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-12)
    low = SKU(cap=1e-9).components(model, pair, FrozenModel(before))["preservation_divergence"]
    assert not reference.flat(reference.gradient(model, low.loss)).any()


def test_without_a_cap_the_divergence_has_no_bound(before: nn.Module) -> None:
    model, pair = tiny.gpt2(), pair_of(SKU())
    values = []
    for scale in (1, 10, 100):
        sharp = copy.deepcopy(model)
        with torch.no_grad():
            sharp.get_submodule("transformer.ln_f").weight.mul_(scale)
        parts = SKU().components(sharp, pair, FrozenModel(before))
        values.append(parts["preservation_divergence"].loss.item())
    assert values[2] < 5 * values[1] < 0


def test_what_is_learned_is_taken_away_by_the_turned_step(model: nn.Module) -> None:
    objective = SSUAcquire()
    pair = pair_of(objective)
    moved = copy.deepcopy(model)
    start = reference.nll(model, pair["forget"]["original"])
    objective(moved, pair).backward()
    with torch.no_grad():
        for old, new in zip(model.parameters(), moved.parameters(), strict=True):
            learned = -1e-4 * new.grad
            new.copy_(old - learned)
    assert reference.nll(moved, pair["forget"]["original"]) > start


@pytest.mark.parametrize("objective", [SSUAcquire(), SKU()], ids=repr)
def test_the_mask_acts_on_the_summed_gradient(objective: Objective, before: nn.Module) -> None:
    model, pair = tiny.gpt2(), pair_of(objective)
    weighted = expected_parts(objective, model, before, pair).values()
    summed = reference.gradient(model, sum(weight * loss for weight, loss in weighted))
    size = reference.flat(summed).abs()
    bound = size.mean() + size.std(correction=0)
    parts = objective.components(model, pair, FrozenModel(before))
    losses: dict[str, Any] = step_losses(parts, apart=True)
    retain = {"retain": reference.nll(model, pair["retain"])}
    Rectifier(model, None, select=SaliencyMask(1.0)).backward(**losses, **retain)
    for name, parameter in model.named_parameters():
        kept = torch.where(summed[name].abs() >= bound, summed[name], 0.0)
        torch.testing.assert_close(parameter.grad, kept, rtol=1e-8, atol=1e-12)


def plain_item(number: int) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(number)
    ids = torch.randint(0, tiny.VOCABULARY, (5 + number,), generator=draw)
    return {"input_ids": ids, "labels": torch.cat([torch.full((2,), -100), ids[2:]])}


def test_the_trainer_draws_random_answers(tmp_path: Path) -> None:
    items = [plain_item(i) for i in range(5)]
    paths = [tmp_path / "drawn.h5", tmp_path / "given.h5"]
    with_others = [WithOthers(items, others(3), seed=42)[i] for i in range(5)]
    for path, forget in zip(paths, (items, with_others), strict=True):
        trainer = UnlearningTrainer(
            tiny.llama(), arguments(tmp_path, max_steps=2, seed=42), objective="ssu-acquire",
            forget=forget, retain=items, recorder=partial(Recorder, path=path),
        )  # fmt: skip
        trainer.train()
    drawn, given = map(open_run, paths)
    assert np.array_equal(drawn.gram(), given.gram())
    assert not np.array_equal(drawn.gram(), np.zeros_like(drawn.gram()))


def test_the_trainer_evaluates_the_answers_that_are_there(tmp_path: Path) -> None:
    items = [plain_item(i) for i in range(5)]
    trainer = UnlearningTrainer(
        tiny.llama(), arguments(tmp_path), objective="ssu-acquire", forget=items, retain=items
    )
    assert trainer.evaluate()["eval_forget_nll"] == pytest.approx(
        reference.nll(trainer.model, collate(items)).item(), rel=1e-5
    )


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (lambda: SSUAcquire(eps=0.0), "`eps` of SSUAcquire should be a positive number"),
        (lambda: SSUAcquire(answers=0), "`answers` of SSUAcquire should be how many"),
        (lambda: SSUAcquire(answers=2.0), "`answers` of SSUAcquire should be how many"),
        (lambda: SKU(cap=-1.0), "`cap` of SKU should be a positive number"),
        (lambda: SKU(divergence=float("inf")), "`divergence` of SKU should be a positive"),
        (lambda: SKU(answers=True), "`answers` of SKU should be how many"),
    ],
)
def test_options_that_mean_nothing_are_refused(made: Any, says: str) -> None:
    with pytest.raises(ValueError, match=rf"{says}.* Found .* Pass"):
        made()
