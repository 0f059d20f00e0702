"""An edit of a checkpoint: the folder, the run file, and every analyzer that reads it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import geffect
from geffect import open_run, record_edit
from geffect.analysis import conflict, cosine, edited, g_effect, predicted_change
from geffect.checkpoints import edited as module
from geffect.checkpoints.loading import Loader, whole_of
from geffect.edits import SSD, Change, Edit, Mixing, Outcome, TaskVectorNegation
from geffect.layers import trainable
from geffect.risk import mean_nll
from geffect.store import validate
from tests.utils import reference
from tests.utils import shallow as tiny
from tests.utils.chat import make_tokenizer, written
from tests.utils.checkpoints import FORGET, RETAIN, digests, loaded

SETS = {"forget": FORGET, "retain": RETAIN}


@dataclass(frozen=True)
class Nudge(Edit):
    """Adds noise to the head and the first norm."""

    size: float = 1e-3

    def outcome(self, model: nn.Module, data: Any) -> Outcome:
        draw = torch.Generator().manual_seed(0)
        every = list(trainable(model).items())
        return Outcome({
            name: p.detach() + self.size * torch.randn(p.shape, generator=draw).to(p)
            for name, p in every[:3]
        })  # fmt: skip


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return dict(loaded(folder).state_dict())


def test_the_edited_model_is_saved(run_folder: Path, tmp_path: Path) -> None:
    source, out = run_folder / "checkpoint-5", tmp_path / "edited"
    before = digests(run_folder)
    run = geffect.edit(source, out, SSD(alpha=1.5), **SETS)
    assert digests(run_folder) == before
    change = SSD(alpha=1.5).change(loaded(source), SETS)
    assert change.displacement
    with change as made:
        expected = {n: t.clone() for n, t in _model_of(made).items()}
    found = tensors(out)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor)
    assert run.path == out / "edit.h5" and validate(run.path).whole and run.state == "complete"
    told = run.manifest["edit"]
    assert (told["name"], told["options"]["alpha"], told["space"]) == ("SSD", 1.5, "weights")
    assert told["facts"]["selected"] == change.facts["selected"]
    assert run.metadata == {"model": "checkpoint-5"}
    assert [path.name for path in tmp_path.iterdir()] == ["edited"]
    kept, original = (loaded(folder).config.to_dict() for folder in (out, source))
    assert {**kept, "_name_or_path": ""} == {**original, "_name_or_path": ""}


def _model_of(change: Change) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in change.parameters.items()}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, nn.Module, Change]:
    model = tiny.gpt2()
    change = Nudge(1e-6).change(model, {})
    path = tmp_path_factory.mktemp("edit") / "run.h5"
    facts = [tiny.batch(40)]
    run = record_edit(model, change, path, risks={**SETS, "facts": facts}, edit=Nudge(1e-6))
    return run, model, change


def test_effects_against_autograd(recorded: tuple[Any, nn.Module, Change]) -> None:
    run, model, change = recorded
    assert run.sources == ("objective", "forget", "retain", "facts", "update")
    tokens = [int((batch["labels"][:, 1:] != -100).sum()) for batch in FORGET]
    total = sum(n * reference.nll(model, b) for n, b in zip(tokens, FORGET, strict=True))
    gradient = reference.gradient(model, total / sum(tokens))
    table = predicted_change(run, "parameter")
    own = table[table["risk"] == "forget"].set_index("parameter")["value"]
    for name, parameter in gradient.items():
        moved = change.displacement.get(name, torch.zeros(()))
        assert own[name] == pytest.approx(-float((parameter * moved).sum()), rel=1e-9, abs=1e-18)


def test_sums_and_finite_differences(recorded: tuple[Any, nn.Module, Change]) -> None:
    run, model, change = recorded
    table = edited(run)
    assert list(table.columns) == [
        "risk", "layer", "predicted", "measured", "length", "touched"
    ]  # fmt: skip
    for risk, batches in {**SETS, "facts": [tiny.batch(40)]}.items():
        own = table[table["risk"] == risk].set_index("layer")
        layers = own.drop(index="model")
        assert layers["predicted"].sum() == pytest.approx(own.loc["model", "predicted"], rel=1e-12)
        assert layers["measured"].isna().all()
        fall = mean_nll(model, batches)
        with change:
            fall -= mean_nll(model, batches)
        assert own.loc["model", "measured"] == pytest.approx(fall, rel=1e-9)
        assert own.loc["model", "predicted"] == pytest.approx(fall, rel=1e-3)
        squares = sum(float(d.square().sum()) for d in change.displacement.values())
        assert own.loc["model", "length"] == pytest.approx(squares**0.5)
        assert np.square(layers["length"]).sum() == pytest.approx(squares)
    numbers = sum(p.numel() for p in model.parameters())
    part = sum(change.touched.values()) / numbers
    assert table[table["layer"] == "model"]["touched"].tolist() == pytest.approx([part] * 3)
    assert own.loc["final norm", ["length", "touched"]].tolist() == [0.0, 0.0]
    assert edited(run, by="model")["predicted"].tolist() == pytest.approx(
        table[table["layer"] == "model"]["predicted"].tolist()
    )


def test_every_analyzer_reads_it(recorded: tuple[Any, nn.Module, Change]) -> None:
    """The edit is a step of rate 1 along minus its displacement: its G-effects are e_R(D)."""
    run, _, _ = recorded
    fallen = predicted_change(run, "model").set_index("risk")["value"]
    effects = g_effect(run, "model", stepped_only=False).set_index("effect")["value"]
    assert effects["unlearning"] == pytest.approx(fallen["forget"], rel=1e-12)
    assert effects["retaining"] == pytest.approx(fallen["retain"], rel=1e-12)
    assert g_effect(run, "model").set_index("effect")["value"]["retaining"] == pytest.approx(
        fallen["retain"]
    )
    layers = g_effect(run).set_index("layer")["value"]
    assert np.isnan(layers["final norm"]).all()  # which the edit does not touch
    angle = cosine(run, "update", "retain", "model")["value"].item()
    assert conflict(run, by="model")["value"].item() == (angle > 0)


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = tiny.llama(dropout=0.5).train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    state = torch.get_rng_state()
    run = record_edit(
        model, Nudge().change(model, {}), tmp_path / "run.h5", risks=SETS, store="full"
    )
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert run.contents.gradients is not None and run.manifest["edit"]["facts"] == {}


def test_negation_of_checkpoints(run_folder: Path, tmp_path: Path) -> None:
    one, two = run_folder / "checkpoint-5", run_folder / "checkpoint-10"
    geffect.edit(
        one, tmp_path / "out", TaskVectorNegation(0.5), states={"tuned": two},
        run=tmp_path / "run.h5", **SETS,
    )  # fmt: skip
    first, second, found = tensors(one), tensors(two), tensors(tmp_path / "out")
    for name, tensor in first.items():
        expected = tensor.double() - 0.5 * (second[name].double() - tensor.double())
        assert torch.equal(found[name], expected.float())
    assert not (tmp_path / "out" / "edit.h5").exists()
    run = open_run(tmp_path / "run.h5")
    length = edited(run, "model")["length"].iloc[0]
    names = dict(loaded(one).named_parameters())
    squares = sum(float((found[n] - first[n]).double().square().sum()) for n in names)
    assert length == pytest.approx(squares**0.5, rel=1e-6)


@pytest.mark.parametrize("merge", [False, True])
def test_adapters(adapters: Path, tmp_path: Path, merge: bool) -> None:
    """Without merging the factors are edited, and an adapter is saved."""
    source, out = adapters / "checkpoint-8", tmp_path / "out"
    run = geffect.edit(source, out, SSD(alpha=1.5), merge=merge, **SETS)
    assert run.manifest["edit"]["space"] == ("weights" if merge else "adapter")
    assert (out / "adapter_config.json").exists() is not merge
    labels = " ".join(dict.fromkeys(predicted_change(run)["score"]))
    assert ("adapter space" in labels) is not merge
    again = loaded(out) if merge else Loader().load(out)
    fresh = whole_of(source, None, "cpu") if merge else Loader().load(source)
    with SSD(alpha=1.5).change(fresh, SETS) as change:
        assert any(change.touched.values())
        after = [p.detach().clone() for p in trainable(fresh).values()]
    own = trainable(again.requires_grad_()) if merge else trainable(again)
    assert all(torch.equal(a, p) for a, p in zip(after, own.values(), strict=True))


def test_negation_of_an_adapter_is_of_merged_weights(adapters: Path, tmp_path: Path) -> None:
    base, tuned = adapters / "base", adapters / "checkpoint-8"
    with pytest.raises(ValueError, match="on the command line with --merge"):
        geffect.edit(base, tmp_path / "out", "negation", states={"tuned": tuned}, **SETS)
    assert not any(tmp_path.iterdir())
    geffect.edit(base, tmp_path / "out", "negation", states={"tuned": tuned}, merge=True, **SETS)
    own, merged, found = tensors(base), whole_of(tuned, None, "cpu"), tensors(tmp_path / "out")
    for name, parameter in merged.named_parameters():
        expected = 2 * own[name].double() - parameter.detach().double()
        assert torch.equal(found[name], expected.float())


def test_files_and_a_tokenizer(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    config = tiny.llama().config
    config.vocab_size = len(tokenizer)
    type(tiny.llama())(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    files = {
        name: written(
            tmp_path / f"{name}.jsonl",
            *[{"question": f"Where is {name}?", "answer": f"In {n}."} for n in range(5)],
        )
        for name in ("forget", "retain", "facts")
    }
    shown: list[str] = []
    run = geffect.edit(
        tmp_path / "model", tmp_path / "out", SSD(fraction=0.01),
        forget=files["forget"], retain=files["retain"], risks={"facts": files["facts"]},
        show=lambda name, text: shown.append(text), max_length=30,
    )  # fmt: skip
    assert (tmp_path / "out" / "tokenizer_config.json").exists()
    assert run.manifest["edit"]["facts"]["batches"] == {"forget": 5, "retain": 5}
    assert len(shown) == 3 and "facts" in run.sources


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"edit": "negative"}, ValueError, "Did you mean `negation`"),
        ({"edit": 3}, TypeError, "should be an Edit"),
        ({"edit": SSD(alpha=1e9, against="all")}, ValueError, "changes none of its numbers"),
        ({"states": {"tuned": "x"}}, ValueError, "no other model. Found `tuned`. Leave them"),
        ({"edit": "negation"}, ValueError, "`tuned`. Found none. .*--state tuned=DIR"),
        ({"merge": True}, ValueError, "`merge` should go with adapters"),
        ({"base": "x"}, ValueError, "`base` should go with adapters"),
        ({"risks": {"forget": FORGET}}, ValueError, "`risks` should have names of their own"),
        ({"risks": {"retian": FORGET}}, ValueError, "Did you mean `retain`"),
        ({"forget": []}, ValueError, "`forget` should have a batch or more"),
        ({"model": "nowhere"}, FileNotFoundError, "Found nothing at"),
        ({"device": "cuda:77"}, ValueError, "`device` should be one of this machine"),
        ({"overwrite": True}, TypeError, "An option of `edit` should be one of"),
        ({"run": "nowhere/run.h5"}, OSError, "nowhere"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)  # fmt: skip
def test_what_is_refused_leaves_nothing(
    run_folder: Path, tmp_path: Path, options: dict[str, Any], error: Any, says: str
) -> None:
    given = {"model": run_folder / "checkpoint-5", "edit": SSD(alpha=1.5), **SETS, **options}
    with pytest.raises(error, match=says):
        geffect.edit(output=tmp_path / "out", **given)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("what", ["file", "folder", "link", "no parent"])
def test_an_output_that_is_there_is_refused(run_folder: Path, tmp_path: Path, what: str) -> None:
    out = tmp_path / "out"
    make: dict[str, Callable[[], object]] = {
        "file": out.touch,
        "folder": out.mkdir,
        "link": lambda: out.symlink_to(tmp_path / "nowhere"),
        "no parent": lambda: None,
    }
    make[what]()
    place = tmp_path / "none" / "out" if what == "no parent" else out
    with pytest.raises(OSError, match="The folder of an edited model should"):
        geffect.edit(run_folder / "checkpoint-5", place, SSD(alpha=1.5), **SETS)
    assert len([*tmp_path.iterdir()]) == (what != "no parent")


@pytest.mark.parametrize("at", ["save", "record_edit", "mean_nll"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupt_leaves_no_folder(
    run_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    at: str,
    error: type[BaseException],
) -> None:
    def fail(*given: Any, **how: Any) -> Any:
        raise error

    monkeypatch.setattr(module, at, fail)
    with pytest.raises(error):
        geffect.edit(run_folder / "checkpoint-5", tmp_path / "out", SSD(alpha=1.5), **SETS)
    assert not any(tmp_path.iterdir())


def test_a_run_of_training_is_no_edit(tmp_path: Path) -> None:
    model = tiny.llama()
    recorder = geffect.Recorder(model, tmp_path / "run.h5", update=True)
    recorder.backward(
        objective={"forget": -1.0},
        forget=lambda: reference.nll(model, FORGET[0]),
        retain=lambda: reference.nll(model, RETAIN[0]),
    )
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    recorder.close()
    with pytest.raises(ValueError, match="`run` should be of an edit"):
        edited(open_run(tmp_path / "run.h5"))


def test_mixing_of_checkpoints(run_folder: Path, tmp_path: Path) -> None:
    one, two = run_folder / "checkpoint-5", run_folder / "checkpoint-10"
    for alpha, source in ((0.0, two), (0.5, None)):
        out = tmp_path / str(alpha)
        geffect.edit(one, out, Mixing(alpha=alpha), states={"before": two}, **SETS)
        found, first, second = tensors(out), tensors(one), tensors(two)
        for name, tensor in found.items():
            half = (first[name].double() + second[name].double()) / 2
            assert torch.equal(tensor, second[name] if source else half.to(tensor))
    with pytest.raises(ValueError, match="changes none of its numbers"):
        geffect.edit(one, tmp_path / "1", Mixing(alpha=1), states={"before": two}, **SETS)


def test_a_change_that_is_made_or_of_another_model_is_refused(tmp_path: Path) -> None:
    model = tiny.llama()
    change = Nudge().apply(model, {})
    with pytest.raises(ValueError, match="should not be made yet"):
        record_edit(model, change, tmp_path / "run.h5", risks=SETS)
    change.revert()
    with pytest.raises(ValueError, match="should be of `model`"):
        record_edit(tiny.llama(), change, tmp_path / "run.h5", risks=SETS)
    assert not any(tmp_path.iterdir())
    assert record_edit(model, change, tmp_path / "run.h5", risks=SETS).state == "complete"
