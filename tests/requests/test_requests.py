"""Requests one after the other, against flattened vectors and risks taken by hand."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from geffect import Requests, Run, open_run
from geffect.analysis import cosine, g_effect, predicted_change, revivals, task_vectors
from geffect.analysis.requests import ALIKE, PAIRS
from geffect.layers import trainable
from geffect.objectives import NPO, FrozenModel
from geffect.plots import pairs
from geffect.risk import nll
from geffect.store import validate
from tests.utils import tiny

FORGET = {name: [tiny.batch(10 * i), tiny.batch(10 * i + 1)] for i, name in enumerate("abc")}
RETAIN = [tiny.batch(90), tiny.batch(91, padding=2)]


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in trainable(model).values()])


def descended(model: nn.Module, batches: Any, sign: float = -1.0, lr: float = 0.02) -> None:
    """A few steps up the risk of a set, or down."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for batch in batches:
        optimizer.zero_grad()
        (sign * nll(model, batch)).backward()
        optimizer.step()


def risk(model: nn.Module, batches: Any) -> float:
    """The mean over all tokens of all batches."""
    with torch.no_grad():
        values = [(nll(model, b), (b["labels"][:, 1:] != -100).sum()) for b in batches]
    return float(sum(v * n for v, n in values) / sum(n for _, n in values))


def gone_through(
    path: Path, model: nn.Module, **options: Any
) -> tuple[Run, list[Tensor], list[dict[str, float]]]:
    """The run, the parameters before each request and at the end, and all risks there."""
    sets = {**FORGET, "retain": RETAIN}
    states, risks = [flat(model)], [{name: risk(model, data) for name, data in sets.items()}]
    sign = 1.0 if options.get("negate") else -1.0
    with Requests(model, path, forget=FORGET, retain=RETAIN, **options) as requests:
        for number, (_, batches) in enumerate(requests):
            if number:
                states.append(flat(model))
                risks.append({name: risk(model, data) for name, data in sets.items()})
            descended(model, batches, sign)
    states.append(flat(model))
    risks.append({name: risk(model, data) for name, data in sets.items()})
    return open_run(path), states, risks


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return gone_through(tmp_path_factory.mktemp("requests") / "run.h5", tiny.gpt2(), share=0.05)


def test_each_request_is_a_row_with_its_displacement(three: Any) -> None:
    run, states, _ = three
    assert run.state == "complete" and validate(run.path).whole
    assert run.steps.tolist() == run.column("request").tolist() == [0, 1, 2]
    assert run.sources == ("objective", "forget", "a", "b", "c", "retain", "update")
    u = run.index("update")
    lengths = [float((after - before).square().sum()) for before, after in pairwise(states)]
    assert run.gram()[:, :, u, u].sum(axis=1) == pytest.approx(lengths, rel=1e-9)


def test_the_request_itself_is_the_forget_set(three: Any) -> None:
    run, _, _ = three
    K = run.gram()
    for number, name in enumerate("abc"):
        f, own = run.index("forget"), run.index(name)
        assert np.array_equal(K[number, :, f], K[number, :, own])
    assert (g_effect(run, by="model").query("effect == 'unlearning'")["value"] < 0).all()
    assert len(cosine(run, "objective", "retain", by="layer"))


def test_risks_fall_as_they_are_measured_and_as_the_gradients_say(three: Any) -> None:
    run, states, risks = three
    table = revivals(run).set_index(["request", "risk"])
    model = tiny.gpt2()
    for number, (name, state) in enumerate(zip("abc", states[:-1], strict=True)):
        torch.nn.utils.vector_to_parameters(state.clone(), trainable(model).values())
        for of, data in {**FORGET, "retain": RETAIN}.items():
            row = table.loc[(name, of)]
            assert row["before"] == pytest.approx(risks[number][of], rel=1e-9)
            assert row["after"] == pytest.approx(risks[number + 1][of], rel=1e-9)
            assert row["measured"] == pytest.approx(row["before"] - row["after"], abs=1e-12)
            total = sum((b["labels"][:, 1:] != -100).sum() for b in data)
            loss = sum(nll(model, b) * (b["labels"][:, 1:] != -100).sum() for b in data) / total
            gradients = torch.autograd.grad(loss, [*trainable(model).values()])
            g = torch.cat([gradient.flatten() for gradient in gradients])
            expected = -float(g @ (states[number + 1] - state))
            assert row["predicted"] == pytest.approx(expected, rel=1e-7, abs=1e-12)
            assert row["earlier"] == (of in "abc"[:number])
    assert len(predicted_change(run)) == len(run.steps) * 5 * len({p.layer for p in run.layers})


def test_pairs_are_those_of_flattened_vectors(three: Any) -> None:
    run, states, _ = three
    D = [after - before for before, after in pairwise(states)]
    table = task_vectors(run).set_index(["request", "other", "quantity"])["value"]
    for i, j in ((1, 0), (2, 0), (2, 1)):
        key = ("abc"[i], "abc"[j])
        expected = float(D[i] @ D[j] / D[i].norm() / D[j].norm())
        assert table[(*key, "cosine")] == pytest.approx(expected, abs=1e-12)
        most = -(-len(D[0]) * 5 // 100)
        here, there = ({*d.abs().topk(most).indices.tolist()} for d in (D[i], D[j]))
        assert table[(*key, "overlap")] == pytest.approx(len(here & there) / len(here | there))
    blocks = task_vectors(run, by="layer")
    assert blocks["layer"].cat.categories.tolist() == [*dict.fromkeys(p.layer for p in run.layers)]
    kept = run.table(PAIRS)
    assert len(kept["inner"]) == 3 * len(run.layers)


def test_what_was_learned_is_negated(tmp_path: Path) -> None:
    run, states, _ = gone_through(tmp_path / "run.h5", tiny.gpt2(), negate=0.5)
    model = tiny.gpt2()
    for name, before, after in zip("abc", states[:-1], states[1:], strict=True):
        torch.nn.utils.vector_to_parameters(before.clone(), trainable(model).values())
        descended(model, FORGET[name], 1.0)
        assert torch.allclose(after, before - 0.5 * (flat(model) - before), rtol=0, atol=1e-14)
    assert (g_effect(run, by="model").query("effect == 'unlearning'")["value"] < 0).all()
    assert run.manifest["requests"] == {"names": ["a", "b", "c"], "negate": 0.5, "share": 0.01}


def test_recording_leaves_the_training_as_it_was(tmp_path: Path) -> None:
    def train(model: nn.Module, batches: Any) -> None:
        before = FrozenModel.copied(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for batch in batches:
            NPO()(model, {"forget": batch}, before).backward()
            optimizer.step()
            optimizer.zero_grad()

    torch.manual_seed(3)
    alone, watched = tiny.llama(dropout=0.1), tiny.llama(dropout=0.1)
    torch.manual_seed(4)
    for batches in FORGET.values():
        train(alone, batches)
    torch.manual_seed(4)
    with Requests(watched, tmp_path / "run.h5", forget=FORGET, retain=RETAIN) as requests:
        for _, batches in requests:
            train(watched, batches)
    assert torch.equal(flat(alone), flat(watched))


def test_a_request_that_fails_is_not_recorded(tmp_path: Path) -> None:
    model = tiny.gpt2()
    with (
        pytest.raises(RuntimeError, match="mine"),
        Requests(model, tmp_path / "run.h5", forget=FORGET, retain=RETAIN) as requests,
    ):
        for name, batches in requests:
            descended(model, batches)
            if name == "b":
                raise RuntimeError("mine")
    run = open_run(tmp_path / "run.h5")
    assert (run.state, len(run.steps)) == ("open", 1)
    assert revivals(run)["request"].unique().tolist() == ["a"]
    with pytest.raises(ValueError, match=r"should be of two requests or more\. Found one"):
        task_vectors(run)


@pytest.mark.parametrize("negate", [None, 1.0])
def test_a_loop_that_is_left_in_the_midst_of_a_request_is_refused(
    negate: float | None, tmp_path: Path
) -> None:
    """What it changed would stand in no row, and what it learned would stay in the model."""
    model, path = tiny.gpt2(), tmp_path / "run.h5"
    requests = Requests(model, path, forget=FORGET, retain=RETAIN, negate=negate)
    said = "midst of `b`: its change is in the model and in no row"
    said += ", and what was learned is not taken away" if negate else r"\."
    with pytest.raises(ValueError, match=said), requests:
        for name, batches in requests:
            descended(model, batches)
            if name == "b":
                break
    run = open_run(path)
    assert (run.state, run.steps.tolist()) == ("open", [0])


def test_a_loop_may_be_left_as_soon_as_a_request_is_named(tmp_path: Path) -> None:
    model, path = tiny.gpt2(), tmp_path / "run.h5"
    with Requests(model, path, forget=FORGET, retain=RETAIN) as requests:
        for name, batches in requests:
            if name == "c":
                break
            descended(model, batches)
    run = open_run(path)
    assert (run.state, run.steps.tolist()) == ("open", [0, 1])
    assert revivals(run)["request"].unique().tolist() == ["a", "b"]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"forget": {}}, "should have a set or more, by name. Found none"),
        ({"forget": {"retain": RETAIN}}, "names of their own"),
        ({"forget": {"forget": RETAIN}}, "names of their own"),
        ({"risks": {"a": RETAIN}}, "names of their own"),
        ({"negate": -1.0}, "`negate` of Requests should be None, or a positive number"),
        ({"share": 0}, "`share` of Requests should be a part of all numbers"),
        ({"share": True}, "`share` of Requests should be a part of all numbers"),
        ({"negate": True}, "`negate` of Requests should be None, or a positive number"),
        ({"retain": []}, "should yield a batch"),
    ],
)
def test_refusals(tmp_path: Path, given: dict[str, Any], says: str) -> None:
    fine: dict[str, Any] = {"forget": FORGET, "retain": RETAIN}
    with pytest.raises(ValueError, match=says):
        Requests(tiny.gpt2(), tmp_path / "run.h5", **fine | given)
    assert not (tmp_path / "run.h5").exists()


def test_a_request_that_changes_nothing_is_refused(tmp_path: Path) -> None:
    requests = Requests(tiny.gpt2(), tmp_path / "run.h5", forget=FORGET, retain=RETAIN)
    with requests, pytest.raises(ValueError, match="`a` should change the model"):
        list(requests)


def wrapped(model: nn.Module) -> None:
    model.lm_head = nn.Linear(12, 23, bias=False).double()


def frozen(model: nn.Module) -> None:
    next(model.parameters()).requires_grad_(False)


@pytest.mark.parametrize("replace", [wrapped, frozen])
def test_parameters_that_are_replaced_in_a_request_are_refused(
    tmp_path: Path, replace: Any
) -> None:
    model = tiny.gpt2()
    requests = Requests(model, tmp_path / "run.h5", forget=FORGET, retain=RETAIN)
    with requests, pytest.raises(ValueError, match="`a` should train the parameters of the model"):
        for _, batches in requests:
            descended(model, batches)
            replace(model)
    assert not (tmp_path / "run.h5").exists() or not len(open_run(tmp_path / "run.h5").steps)


def test_requests_are_gone_through_once(tmp_path: Path) -> None:
    model = tiny.gpt2()
    with Requests(model, tmp_path / "run.h5", forget=FORGET, retain=RETAIN) as requests:
        for _, batches in requests:
            descended(model, batches)
        with pytest.raises(RuntimeError, match="gone through once"):
            next(iter(requests))


def test_other_runs_are_refused(recorded: Path) -> None:
    for analyzer in (task_vectors, revivals):
        with pytest.raises(ValueError, match=r"should be of requests, as `geffect\.Requests`"):
            analyzer(open_run(recorded))


def test_pairs_are_drawn_with_their_numbers(three: Any) -> None:
    table = task_vectors(three[0])
    overlap = table[table["quantity"] == "overlap"]
    ax = pairs(overlap)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["b", "c"]
    assert [text.get_text() for text in ax.texts] == [f"{value:.2f}" for value in overlap["value"]]
    unknown = overlap.assign(value=overlap["value"].where(overlap["request"] == "b"))
    assert [text.get_text() for text in pairs(unknown).texts].count("undefined") == 2
    with pytest.raises(ValueError, match="one row for each two requests"):
        pairs(table)


def test_requests_stand_in_their_order_whatever_their_names_are() -> None:
    names = ["zoe", "mira", "ada"]
    rows = [(names[1], names[0], 0.1), (names[2], names[0], 0.2), (names[2], names[1], 0.3)]
    table = pd.DataFrame(rows, columns=["request", "other", "value"]).assign(model="model")
    ax = pairs(table.assign(score=ALIKE.label, unit=ALIKE.unit))
    assert [label.get_text() for label in ax.get_yticklabels()] == names[1:]
    assert [label.get_text() for label in ax.get_xticklabels()] == names[:-1]
    cells = ax.collections[0].get_array()
    assert cells.filled(-1).tolist() == [[0.1, -1], [0.2, 0.3]]


@pytest.mark.parametrize("names", [["a", "b"], ["a name that is long, of people", "b", "c"]])
def test_nothing_of_pairs_is_clipped(names: list[str], tmp_path: Path) -> None:
    rows = [(later, other, 0.5) for i, later in enumerate(names) for other in names[:i]]
    table = pd.DataFrame(rows, columns=["request", "other", "value"]).assign(model="model")
    figure = pairs(table.assign(score=ALIKE.label, unit=ALIKE.unit)).figure
    figure.canvas.draw()
    shown = figure.get_tightbbox()
    width, height = figure.get_size_inches()
    assert shown.x0 >= 0 and shown.y0 >= 0 and shown.x1 <= width and shown.y1 <= height
