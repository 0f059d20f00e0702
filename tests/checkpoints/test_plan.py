"""A plan: probing steps as a loop takes them, on a copy, and the order that they give."""

import copy
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from geffect import Probe, plan
from geffect.checkpoints.plan import Prediction, _ranked
from geffect.data.collate import collate
from tests.utils import reference, tiny
from tests.utils.chat import TURNS, make_tokenizer, written
from tests.utils.command_line import Ask
from tests.utils.unlearning_runs import items

FORGET, RETAIN = items(9, 30), items(9, 230)
SETS = {"same": FORGET, "near": items(5, 90), "far": items(6, 150)}


def by_hand(model: nn.Module, probe: Probe, seed: int) -> dict[str, float]:
    """The rises of gradient ascent, by plain autograd."""
    student = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW(student.parameters(), lr=probe.learning_rate, weight_decay=0.0)
    order, places = random.Random(f"{seed} forget"), []
    for _ in range(probe.steps):
        if len(places) < probe.batch_size:
            places = order.sample(range(len(FORGET)), len(FORGET))
        chosen, places = places[: probe.batch_size], places[probe.batch_size :]
        optimizer.zero_grad()
        (-reference.nll(student, collate([FORGET[i] for i in chosen]))).backward()
        optimizer.step()
    rises = {}
    for name, own in SETS.items():
        loss = reference.nll(student, collate(own))
        gradients = torch.autograd.grad(loss, [*student.parameters()], allow_unused=True)
        rises[name] = sum(
            float((g.double() * (now.detach() - before.detach())).sum())
            for g, now, before in zip(
                gradients, student.parameters(), model.parameters(), strict=True
            )
            if g is not None
        )
    return rises


def test_a_plan_is_what_plain_steps_find() -> None:
    model, probe = tiny.llama(tied=True), Probe(1e-2, steps=4, seeds=(0, 5), batch_size=4)
    found = {one.name: one for one in plan(model, SETS, forget=FORGET, objective="ga", probe=probe)}
    rises = [by_hand(model, probe, seed) for seed in probe.seeds]
    for name, one in found.items():
        own = sorted(rise[name] for rise in rises)
        assert [one.low, one.high] == pytest.approx(own, rel=1e-3, abs=1e-6)
        assert one.predicted == pytest.approx(sum(own) / 2, rel=1e-3, abs=1e-6)
        assert sum(one.layers.values()) == pytest.approx(one.predicted, rel=1e-9)
        assert [*one.layers] == ["embedding+head", "layer 0", "layer 1", "final norm"]


@pytest.mark.parametrize("objective", ["ga", "npo", "wga", "graddiff", "rmu"])
def test_the_model_stays_as_it_is_and_the_forget_set_ranks_first(objective: str) -> None:
    model = tiny.llama(dropout=0.2).train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    needs = {"retain": RETAIN} if objective == "graddiff" else {}
    found = plan(
        model, SETS, forget=FORGET, objective=objective, probe=Probe(1e-2, batch_size=4), **needs
    )
    assert [one.rank for one in found] == [1, 2, 3]
    assert objective == "rmu" or found[0].name == "same"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_a_probe_that_diverges_does_not_turn_the_order() -> None:
    """A mean of values would be that of one seed."""
    seeds = [{"a": 0.3, "b": 0.2}, {"a": 0.3, "b": 0.2}, {"a": -90.0, "b": 50.0}]
    found = _ranked(["a", "b"], [{n: {"l": v} for n, v in s.items()} for s in seeds])
    assert [(one.name, one.rank) for one in found] == [("a", 1), ("b", 2)]
    assert found[0].predicted < found[1].predicted


def test_sets_alike_share_their_rank() -> None:
    seeds = [{"a": 1.0, "b": 1.0, "c": 0.0}, {"a": 0.0, "b": 0.5, "c": 0.0}]
    found = _ranked(["a", "b", "c"], [{n: {"l": v} for n, v in s.items()} for s in seeds])
    assert [one.name for one in found] == ["b", "a", "c"]


def test_the_reason_is_the_layer_that_rises_most() -> None:
    layers = {"embedding": -3.0, "layer 0": 1.0, "layer 1": 3.0}
    assert Prediction("a", 1.0, 1.0, 1.0, 1, layers).reason == "75 % of the rise in layer 1"
    assert Prediction("a", -1.0, -1.0, -1.0, 1, {"l": -1.0}).reason == "no layer raises it"


def refused(said: str, sets: Mapping[str, Sequence[Any]] = SETS, **changed: Any) -> None:
    given: dict[str, Any] = {"forget": FORGET, "objective": "ga", "probe": Probe(1e-2)}
    with pytest.raises(ValueError, match=said):
        plan(tiny.llama(), sets, **given | changed)


def test_plans_that_say_nothing_are_refused() -> None:
    refused("`sets` should name a set that may be damaged", {})
    refused("`a` should have an item or more", {"a": []})
    refused("`forget` should have an item or more", forget=[])
    refused("retain.*Pass retain=items", objective="graddiff")
    refused("`retain` should go with an objective that takes it", retain=RETAIN)
    refused("should be finite in every step.*Lower the learning rate", probe=Probe(1e30))
    unknown = [{"input_ids": [1, 999], "labels": [-100, 999]}]
    refused("`a` should have tokens of the model, 0 to .*. Found 999", {"a": unknown})
    refused("`forget` should have tokens of the model", forget=unknown)
    refused("`objective`|Did you mean", objective="gaa")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": 2}, "`steps` of a probe should be at least 3.*predict nothing.*Found 2"),
        ({"steps": True}, "Found True"),
        ({"learning_rate": 0.0}, "`learning_rate` of a probe should be a number above 0"),
        ({"learning_rate": float("nan")}, "Found nan"),
        ({"seeds": ()}, "`seeds` of a probe should be whole numbers, each once"),
        ({"seeds": (1, 1)}, "Found .1, 1."),
        ({"batch_size": 0}, "`batch_size` of a probe should be a whole number above 0"),
    ],
    ids=["few", "true", "no rate", "nan", "no seeds", "twice", "no batch"],
)
def test_probes_that_say_nothing_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Probe(**{"learning_rate": 1e-2} | options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with its tokenizer, and data."""
    folder = tmp_path_factory.mktemp("plan")
    tokenizer = make_tokenizer(TURNS)
    config = tiny.llama().config
    config.vocab_size = len(tokenizer)
    type(tiny.llama())(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for name, where in (("forget", "Lund"), ("near", "Ystad"), ("far", "Oslo")):
        rows = [{"question": f"Who lives at {n}?", "answer": f"{where} {n}."} for n in range(6)]
        written(folder / f"{name}.jsonl", *rows)
    return folder


def test_the_command(ask: Ask, folder: Path, tmp_path: Path) -> None:
    told = [
        "plan", folder / "model", "--forget", folder / "forget.jsonl", "--objective", "npo",
        "--set", f"same={folder / 'forget.jsonl'}", "--set", f"far={folder / 'far.jsonl'}",
    ]  # fmt: skip
    out = tmp_path / "plan.json"
    said = ask(*told, "--lr", 1e-2, "--beta", 0.2, "--seeds", 2, "-o", out)
    assert (said.code, said.err) == (0, "")
    assert "Spearman" in said.out and "same" in said.out
    held = json.loads(out.read_text())
    assert [row["set"] for row in held] == ["same", "far"]
    assert [row["rank"] for row in held] == [1, 2]
    assert sum(held[0]["layers"].values()) == pytest.approx(held[0]["predicted"])
    rows = ask(*told, "--lr", 1e-2, "--format", "tsv").out.splitlines()
    assert rows[0].split("\t") == ["set", "predicted", "low", "high", "rank", "reason"]
    for options, code, why in (
        (("--lr", 1e-2, "--probe", 2), 2, "`--probe` should be a whole number of at least 3"),
        (("--lr", 0), 2, "`--lr` should be a learning rate above 0"),
        (("--lr", 1e-2, "-o", out), 1, "The output should not exist yet"),
        (("--lr", 1e-2, "--retain", folder / "near.jsonl"), 1, "`retain` should go with"),
    ):
        refused = ask(*told, *options)
        assert refused.code == code, refused
        assert why in refused.err
