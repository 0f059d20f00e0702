"""A replay of checkpoints, against plain autograd on each of them."""

import copy
import json
import re
import shutil
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from geffect import open_run
from geffect.analysis import cosine, drift, predicted_change
from geffect.capture.recorder import Recorder
from geffect.checkpoints import estimators
from geffect.checkpoints.estimators import full, reference_ema, same_batch, split_batch
from geffect.checkpoints.folders import by_step, tokenizer_of
from geffect.checkpoints.loading import Loader
from geffect.checkpoints.replay import _tell_rows, replay
from geffect.data.collate import batched
from geffect.data.examples import read
from geffect.objectives import (
    NPO,
    Component,
    FrozenModel,
    GradDiff,
    Objective,
    Reduction,
    Reference,
    WeightedGradientAscent,
    as_objective,
)
from geffect.objectives import reference as references
from geffect.risk import sequence_sum, token_log_probabilities
from geffect.store import validate
from tests.utils import reference
from tests.utils import shallow as tiny
from tests.utils.chat import TURNS, make_tokenizer, written
from tests.utils.checkpoints import FORGET, GA, RETAIN, digests, effects, loaded, naive

# What is recorded


@pytest.mark.parametrize(
    "objective", [GA, WeightedGradientAscent(), GradDiff(forget=NPO(beta=0.5), weight=2.0)]
)
def test_each_step_is_a_checkpoint(run_folder: Path, tmp_path: Path, objective: Any) -> None:
    before, told = digests(run_folder), []
    run = replay(
        [run_folder / f"checkpoint-{step}" for step in (10, 15, 5)],
        tmp_path / "run.h5",
        objective=objective,
        forget=FORGET,
        retain=RETAIN,
        estimator=same_batch,
        metadata={"method": "mine"},
        report=lambda *news: told.append(news),
    )
    assert run.steps.tolist() == [5, 10, 15] and run.rows.tolist() == [4, 4, 4]
    assert run.sources == ("objective", "forget", "retain") and run.state == "complete"
    assert run.metadata["method"] == "mine"
    assert run.metadata["checkpoints"] == {str(s): f"checkpoint-{s}" for s in (5, 10, 15)}
    assert told[3] == ("checkpoint-5", 4, 4) and len(told) == 12
    original = loaded(run_folder / "checkpoint-5")
    for step in (5, 10, 15):
        model = loaded(run_folder / f"checkpoint-{step}")
        rows = [naive(model, objective, f, r, original)
                for f, r in zip(FORGET, RETAIN, strict=True)]  # fmt: skip
        for effect, risk in {"unlearning": "forget", "retaining": "retain"}.items():
            expected = np.mean([reference.inner(g["objective"], g[risk]) for g in rows])
            assert effects(run)[step, effect] == pytest.approx(expected, rel=1e-4)
    assert digests(run_folder) == before


def test_how_it_was_made_stands_in_the_file(run_folder: Path, tmp_path: Path) -> None:
    replay(
        run_folder / "checkpoint-5", tmp_path / "run.h5",
        objective=NPO(beta=0.5), forget=FORGET, retain=RETAIN, risks={"facts": RETAIN[:2]},
    )  # fmt: skip
    run = open_run(tmp_path / "run.h5")
    assert run.sources == ("objective", "forget", "retain", "facts")
    how = run.manifest["replay"]
    assert run.manifest["objective"] == {
        "name": "NPO", "options": {"beta": 0.5}, "reduction": {"forget": "sequence_sum of forget"},
        "reference": {"needs": "likelihoods", "is": "checkpoint-5, the first checkpoint"},
    }  # fmt: skip
    assert how["estimator"] == "split_batch" and how["seed"] == 0
    assert how["batches"] == how["batches_used"] == {"forget": 4, "retain": 4, "facts": 2}
    assert how["biased"] is False and run.manifest["versions"]["geffect"]
    assert run.manifest["losses"]["objective"] == "loss"
    assert str(tmp_path) not in json.dumps(dict(run.manifest))


def test_the_update_is_the_way_to_the_next_checkpoint(run_folder: Path, tmp_path: Path) -> None:
    paths = [run_folder / f"checkpoint-{step}" for step in (5, 10, 15)]
    run = replay(
        paths, tmp_path / "run.h5",
        objective=GA, forget=FORGET, retain=RETAIN, estimator=full,
        update=True,
    )  # fmt: skip
    table = predicted_change(run, by="model").set_index(["step", "risk"])["value"]
    for here, there in pairwise(paths):
        model, after = loaded(here), dict(loaded(there).named_parameters())
        moved = {name: (after[name] - p).detach() for name, p in model.named_parameters()}
        losses = [reference.nll(model, batch) for batch in RETAIN]
        tokens = [float((batch["labels"][:, 1:] != -100).sum()) for batch in RETAIN]
        risk = sum(n * loss for n, loss in zip(tokens, losses, strict=True)) / sum(tokens)
        expected = -reference.inner(reference.gradient(model, risk), moved)
        step = int(here.name.removeprefix("checkpoint-"))
        assert table[step, "retain"] == pytest.approx(expected, rel=1e-4)
    assert np.isnan(table[15, "retain"])
    norms = run.gram()[:, :, -1, -1].sum(axis=1)
    assert norms[1] == pytest.approx(reference.inner(moved, moved), rel=1e-6)


def test_it_is_what_a_recorder_writes(run_folder: Path, tmp_path: Path) -> None:
    """A plain gradient ascent step at the same weights, on the same batch."""
    model = loaded(run_folder / "checkpoint-5")
    with Recorder(model, tmp_path / "live.h5") as recorder:
        forget, retain = reference.nll(model, FORGET[0]), reference.nll(model, RETAIN[0])
        recorder.backward(objective={"forget": -1.0}, forget=forget, retain=retain)
    run = replay(
        run_folder / "checkpoint-5", tmp_path / "run.h5",
        objective=GA, forget=FORGET[:1], retain=RETAIN[:1], estimator=same_batch,
    )  # fmt: skip
    live = open_run(tmp_path / "live.h5")
    assert [p.name for p in run.layers] == [p.name for p in live.layers]
    assert run.gram() == pytest.approx(live.gram(), rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("make", [tiny.t5, tiny.bart], ids=["t5", "bart"])
def test_an_encoder_decoder_is_replayed_by_its_own_loss(make: Any, tmp_path: Path) -> None:
    for step in (0, 1):
        make(step).save_pretrained(tmp_path / f"checkpoint-{step}")
    forget, retain = ([tiny.translation(s + i, rows=1 + i) for i in range(3)] for s in (0, 9))
    given: dict[str, Any] = {"objective": GA, "retain": retain}
    checkpoints = [tmp_path / f"checkpoint-{step}" for step in (0, 1)]
    run = replay(checkpoints, tmp_path / "run.h5", forget=forget, estimator=full, **given)
    for row in (0, 1):
        model = make(row).eval()
        counts = [int((batch["labels"] != -100).sum()) for batch in forget]
        losses = [n * model(**batch).loss for n, batch in zip(counts, forget, strict=True)]
        g = reference.flat(reference.gradient(model, sum(losses) / sum(counts)))
        assert run.gram()[row, :, 1, 1].sum() == pytest.approx(float(g @ g), rel=1e-7)
    data = written(tmp_path / "rows.jsonl", {"question": "Who?", "answer": "Ada."})
    with pytest.raises(ValueError, match="`forget` should be batches for an encoder-decoder such"):
        replay(checkpoints, tmp_path / "other.h5", forget=data, **given)


# Several answers inside of a side


def answers(seed: int, rows: int = 2) -> dict[str, Any]:
    return {"original": tiny.batch(seed, rows), "alternate": tiny.batch(seed + 50, rows)}


@pytest.mark.parametrize("estimator", [same_batch, full])
def test_sides_with_several_answers_are_replayed(tmp_path: Path, estimator: Any) -> None:
    """On one batch of a set both estimators are exact; the risk is that of the original."""
    tiny.llama(3).save_pretrained(tmp_path / "checkpoint-0")
    model = loaded(tmp_path / "checkpoint-0")
    forget, retain = answers(0), RETAIN[0]
    for objective in (PrefersTheAlternate(), as_objective({"forget.alternate": 2.0})):
        run = replay(
            tmp_path / "checkpoint-0", tmp_path / "run.h5", objective=objective, forget=[forget],
            retain=[retain], estimator=estimator, overwrite=True,
        )  # fmt: skip
        pair = {"forget": forget, "retain": retain}
        before = FrozenModel(copy.deepcopy(model))
        losses = {
            "objective": objective(model, pair, before),
            "forget": reference.nll(model, forget["original"]),
            "retain": reference.nll(model, retain),
        }
        assert run.sources == tuple(losses)
        g = torch.stack(
            [reference.flat(reference.gradient(model, loss)).double() for loss in losses.values()]
        )
        assert run.gram()[0].sum(0) == pytest.approx((g @ g.T).numpy(), rel=1e-4, abs=1e-6)


def test_shares_of_an_answer_inside_of_a_side_are_its_own(tmp_path: Path) -> None:
    tiny.llama(3).save_pretrained(tmp_path / "checkpoint-0")
    model = loaded(tmp_path / "checkpoint-0")
    forget = [answers(seed, rows=1 + seed) for seed in range(3)]
    run = replay(
        tmp_path / "checkpoint-0", tmp_path / "run.h5", objective={"forget.alternate": 1.0},
        forget=forget, retain=RETAIN, estimator=full,
    )  # fmt: skip
    alternates = [side["alternate"] for side in forget]
    counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in alternates]
    losses = [n * reference.nll(model, b) for n, b in zip(counts, alternates, strict=True)]
    g = reference.flat(reference.gradient(model, sum(losses) / sum(counts))).double()
    assert run.gram()[0, :, 0, 0].sum() == pytest.approx(float(g @ g), rel=1e-4)


@dataclass(frozen=True)
class PrefersTheAlternate(Objective):
    """DPO: the alternate answer is preferred to the original."""

    reference = "likelihoods"
    sides = ("forget", "forget.alternate")

    def components(
        self, model: Any, batch: Any, reference: Reference | None = None
    ) -> dict[str, Component]:
        gain = 0.0
        for sign, answer in ((1, "alternate"), (-1, "original")):
            log_p, scored = token_log_probabilities(model, batch["forget"][answer])
            before = self.compared(reference).log_probabilities(batch["forget"][answer])
            gain = gain + sign * sequence_sum(log_p - 0.5 * before, scored)
        return {"forget": Component(-nn.functional.logsigmoid(gain).mean())}

    @property
    def reductions(self) -> dict[str, Reduction]:
        return {"forget": Reduction("forget", "sequence_sum")}


# Data


def test_data_from_files(run_folder: Path, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(TURNS)
    tokenizer.save_pretrained(tmp_path / "checkpoint-3")
    config = tiny.llama().config
    config.vocab_size = len(tokenizer)
    type(tiny.llama())(config).save_pretrained(tmp_path / "checkpoint-3")
    rows = [{"question": "Where?", "answer": f"In {n} Paris."} for n in range(6)]
    forget, retain = written(tmp_path / "f", *rows), written(tmp_path / "r", *rows[::-1])
    given = {"objective": GA, "forget": forget, "retain": retain}
    run = replay(tmp_path / "checkpoint-3", tmp_path / "run.h5", batch_size=2, **given)
    # Batches of two would be three, and one row: smaller ones make as many rows as there can be.
    assert run.manifest["replay"]["batches"] == {"forget": 6, "retain": 6}
    assert run.rows.tolist() == [3]
    same = replay(
        tmp_path / "checkpoint-3",
        tmp_path / "same.h5",
        **given,
        estimator=same_batch,
        batch_size=2,
    )  # its bias is that of the size that was asked for
    assert same.manifest["replay"]["batches"] == {"forget": 3, "retain": 3}
    by_hand = batched(read(forget, tokenizer), 2, seed=7)
    data = {"forget": forget, "retain": by_hand}
    whole = replay(
        tmp_path / "checkpoint-3", tmp_path / "whole.h5", objective=GA, estimator=full, **data
    )
    K = whole.gram().sum(axis=1)[0]
    # The same questions in another order and other batches: the same gradient of the whole set.
    assert K[1, 2] == pytest.approx(K[1, 1], rel=1e-5) and K[1, 2] == pytest.approx(
        K[2, 2], rel=1e-5
    )
    ordered = replay(tmp_path / "checkpoint-3", tmp_path / "o.h5", batch_size=2, seed=None, **given)
    assert ordered.manifest["replay"]["seed"] is None
    assert not np.allclose(ordered.gram(), run.gram(), rtol=1e-3)


def test_the_first_tokenizer_that_is_there(run_folder: Path, tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    assert tokenizer_of([run_folder / "checkpoint-5", tmp_path]).eos_token == "<eos>"
    with pytest.raises(FileNotFoundError, match="tokenizer should be with the checkpoints"):
        tokenizer_of([run_folder / "checkpoint-5"])


# Steps


@pytest.mark.parametrize(
    ("names", "steps"),
    [
        (["a", "b", "c"], [0, 1, 2]),
        (["checkpoint-10", "checkpoint-5"], [5, 10]),
        (["original", "checkpoint-10", "checkpoint-5", "final"], [0, 5, 10, 11]),
        (["run/checkpoint-5", "my-checkpoint-3"], [5, 6]),
    ],
)
def test_steps(names: list[str], steps: list[int]) -> None:
    assert list(by_step(names)) == steps


@pytest.mark.parametrize(
    "names", [["a/checkpoint-5", "b/checkpoint-5"], ["a", "b", "checkpoint-1"]]
)
def test_steps_that_do_not_increase(names: list[str]) -> None:
    with pytest.raises(ValueError, match="should increase"):
        by_step(names)


# How it says no


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"checkpoints": []}, "Found none"),
        ({"checkpoints": ["nowhere"]}, "Found nothing at"),
        ({"reference": "nowhere"}, "Found nothing at"),
        ({"objective": {"sun": 1.0}}, "`objective` should be of the sets forget, retain. .*sun"),
        ({"objective": {}}, "not all zero"),
        ({"objective": "magic"}, "`objective` should be one of ga, wga.* Found `magic`"),
        ({"objective": 3}, "`objective` should be an Objective"),
        ({"risks": {"update": RETAIN}}, "names of their own"),
        ({"risks": {"forget": RETAIN}}, "names of their own"),
        ({"risks": {"objective.x": RETAIN}}, "names of their own"),
        ({"risks": {"forgte": RETAIN}}, "Did you mean `forget`"),
        (
            {"batchsize": 2},
            r"should be one of reference, .*Found `batchsize`\. Did you mean `batch_size`",
        ),
        ({"estimator": "full"}, "`estimator` should be a function .* Found 'full'"),
        ({"update": True}, "two or more"),
        ({"forget": []}, "`forget` should have a batch or more"),
        (
            {"device": "cuda:99"},
            r"`device` should be one of this machine.*Found `cuda:99`",
        ),
        (
            {"device": "magic"},
            r"`device` should be one of this machine.*Found `magic`",
        ),
        (
            {"device": "meta"},
            r"`device` should be one of this machine.*Found `meta`",
        ),
        ({"forget": FORGET[:1]}, "two batches or more"),
    ],
)
def test_refusals(run_folder: Path, tmp_path: Path, given: dict[str, Any], says: str) -> None:
    fine: dict[str, Any] = {"checkpoints": [run_folder / "checkpoint-5"], "objective": GA,
                            "forget": FORGET, "retain": RETAIN}  # fmt: skip
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=says):
        replay(path=tmp_path / "run.h5", **fine | given)
    assert not (tmp_path / "run.h5").exists()


@pytest.mark.filterwarnings("error")
def test_too_few_batches_are_refused_once(run_folder: Path, tmp_path: Path) -> None:
    """No word of intervals that no row could have."""
    with pytest.raises(ValueError, match=r"Found 1\. Pass more rows or smaller batches"):
        replay(
            run_folder / "checkpoint-5", tmp_path / "run.h5", objective=GA, forget=FORGET[:1],
            retain=RETAIN,
        )  # fmt: skip


def test_folders_that_are_no_checkpoints(run_folder: Path, tmp_path: Path) -> None:
    loader = Loader()
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="without either"):
        loader.load(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="Found a file"):
        loader.load(run_folder / "checkpoint-5" / "config.json")
    loader.load(run_folder / "checkpoint-5")
    shutil.copytree(run_folder / "checkpoint-5", tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "model.bin")
    with pytest.raises(FileNotFoundError, match="weights as safetensors"):
        loader.load(tmp_path / "pickled")


def test_checkpoints_of_another_model(run_folder: Path, tmp_path: Path) -> None:
    cases: list[tuple[str, Any, str]] = [
        ("intermediate_size", 32, "mlp.* of shape"),
        ("num_hidden_layers", 5, "only one of them has"),
        ("num_hidden_layers", 3, "only one of them has"),
        ("tie_word_embeddings", False, "apart from what is one tensor"),
    ]
    for option, value, says in cases:
        config = tiny.llama(tied=True, layers=2).config
        setattr(config, option, value)
        type(tiny.llama())(config).save_pretrained(tmp_path / f"{option}-{value}")
        loader = Loader()
        loader.load(run_folder / "checkpoint-5")
        with pytest.raises(ValueError, match=f"same model as.*{says}"):
            loader.load(tmp_path / f"{option}-{value}")


@pytest.mark.parametrize(
    ("estimator", "batches", "says"),
    [
        ("split_batch", 12, r"Found 6, which is what `split_batch` .* 12 of forget.* pass 16 bat"),
        ("same_batch", 7, r"Found 7, .* pass 8 batches of each set"),
        ("full", 7, r"Found 1, .* pass 8 batches of each set"),
        ("split_batch", 16, None),
        ("same_batch", 8, None),
    ],
)
def test_too_few_rows_for_intervals_are_told(
    estimator: str, batches: int, says: str | None, recwarn: pytest.WarningsRecorder
) -> None:
    traits = getattr(estimators, estimator).traits
    _tell_rows(estimator, traits, dict.fromkeys(("forget", "retain"), batches))
    found = [str(warning.message) for warning in recwarn]
    assert len(found) == (says is not None)
    assert says is None or re.search(says, found[0])


def test_a_replay_that_fails_leaves_the_file_open(run_folder: Path, tmp_path: Path) -> None:
    tiny.gpt2().save_pretrained(tmp_path / "checkpoint-99")
    with pytest.raises(ValueError, match="same model"):
        replay(
            [run_folder / "checkpoint-5", tmp_path / "checkpoint-99"], tmp_path / "run.h5",
            objective=GA, forget=FORGET, retain=RETAIN, estimator=split_batch,
        )  # fmt: skip
    run = open_run(tmp_path / "run.h5")
    assert run.state == "open" and run.steps.tolist() == [5]


@pytest.mark.parametrize("estimator", [same_batch, split_batch, full])
def test_a_replay_is_a_whole_file(estimator: Any, run_folder: Path, tmp_path: Path) -> None:
    data = {
        name: [tiny.batch(s + k, rows=1) for s in range(8)]
        for k, name in ((0, "forget"), (30, "retain"))
    }
    path = tmp_path / "run.h5"
    checkpoint = run_folder / "checkpoint-5"
    run = replay(checkpoint, path, objective={"forget": -1.0}, **data, estimator=estimator)
    K = run.read("gram").sum(axis=1)
    assert len(K) > 1
    # What makes the check of these files another one: their rows are no Gram matrices.
    beyond = np.abs(K[:, 0, 2]) > np.sqrt(np.abs(K[:, 0, 0] * K[:, 2, 2])) * (1 + 1e-9)
    assert beyond.any() == (estimator is split_batch)
    assert validate(path).whole


def test_a_cosine_that_no_vectors_have_is_not_printed_as_minus_one(
    run_folder: Path, tmp_path: Path
) -> None:
    run = replay(
        run_folder / "checkpoint-5", tmp_path / "run.h5",
        objective=GA, forget=FORGET[:2], retain=RETAIN[:2],
    )  # fmt: skip
    K = run.gram()[0]
    with np.errstate(invalid="ignore"):
        quotient = K[:, 1, 2] / np.sqrt(K[:, 1, 1]) / np.sqrt(K[:, 2, 2])
    out = np.isnan(quotient) | (np.abs(quotient) > 1 + 1e-6)
    assert (np.abs(quotient) > 1 + 1e-6).any()
    angles = cosine(run, "forget", "retain", by="parameter")["value"].to_numpy()
    assert (np.isnan(angles) == out).all() and (np.abs(angles[~out]) < 1).all()


# What is kept beside the Gram matrices


@pytest.mark.parametrize("estimator", [same_batch, split_batch, full, reference_ema])
@pytest.mark.parametrize("count", [8])
def test_sketches_are_those_of_the_mean_gradients(
    estimator: Any, count: int, run_folder: Path, tmp_path: Path
) -> None:
    sets = {name: [tiny.batch(s + k, rows=2) for s in range(count)]
            for k, name in ((0, "forget"), (50, "retain"))}  # fmt: skip
    run = replay(
        run_folder / "checkpoint-5", tmp_path / "run.h5", objective=GradDiff(), **sets,
        estimator=estimator, store="sketch",
    )  # fmt: skip
    assert validate(run.path).whole and len(run.read("sketches", 0)) == run.rows.sum()
    model = loaded(run_folder / "checkpoint-5")
    rows = [reference.gradient(model, reference.nll(model, batch)) for batch in sets["retain"]]
    share = np.full(count, 1 / count)
    if estimator is full:
        tokens = np.array([(b["labels"][:, 1:] != -100).sum() for b in sets["retain"]], dtype=float)
        share = tokens / tokens.sum()
    elif estimator is reference_ema:
        averages, steps = np.zeros((count, count)), np.eye(count)
        for b in range(count):
            averages[b] = steps[b] if not b else 0.6 * averages[b - 1] + 0.4 * steps[b]
        share = averages[2::4].mean(axis=0)
    # On random tokens of one length the gradient of a set is that of its batches.
    mean = {name: sum(s * row[name] for s, row in zip(share, rows, strict=True))
            for name in rows[0]}  # fmt: skip
    assert run.contents.sketch is not None
    expected = sum(
        run.contents.sketch.fold(torch.as_tensor(mean[p.name]).flatten(), p.name)
        for p in run.layers if p.layer == "layer 0"
    )  # fmt: skip
    place = list(dict.fromkeys(p.layer for p in run.layers)).index("layer 0")
    found = run.sketch("retain")[0, place]
    assert found == pytest.approx(np.asarray(expected), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("estimator", [same_batch, full])
@pytest.mark.parametrize("store", ["full", "sketch"])
def test_drift_between_checkpoints(
    estimator: Any, store: str, run_folder: Path, tmp_path: Path
) -> None:
    sets = {name: [tiny.batch(s + k, rows=2) for s in range(4)]
            for k, name in ((0, "forget"), (50, "retain"))}  # fmt: skip
    paths = [run_folder / f"checkpoint-{step}" for step in (5, 10)]
    run = replay(
        paths, tmp_path / "run.h5", objective=GA, **sets, estimator=estimator,
        store=store,
    )  # fmt: skip
    assert validate(run.path).whole
    table = drift(run, "forget", by="model")
    found = {(row.step, row.other_step): row.value for row in table.itertuples()}
    flat = []
    for path in paths:
        model = loaded(path)
        losses = [reference.nll(model, batch) for batch in sets["forget"]]
        tokens = [float((b["labels"][:, 1:] != -100).sum()) for b in sets["forget"]]
        weights = tokens if estimator is full else [1.0] * 4
        loss = sum(w * one for w, one in zip(weights, losses, strict=True)) / sum(weights)
        flat.append(reference.flat(reference.gradient(model, loss)).double())
    expected = float(flat[0] @ flat[1] / flat[0].norm() / flat[1].norm())
    assert found[5, 10] == pytest.approx(expected, abs=1e-4 if store == "full" else 0.06)
    assert found[5, 5] == pytest.approx(1.0, abs=1e-3)


def test_gradients_that_all_rows_share_are_kept_once(
    run_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sets = {
        name: [tiny.batch(s + k) for s in range(8)] for k, name in ((0, "forget"), (50, "retain"))
    }
    given = {"objective": GA, **sets, "store": "bf16"}
    whole = replay(run_folder / "checkpoint-5", tmp_path / "f.h5", **given, estimator=full)
    assert (whole.read("stored", 0) >= 0).tolist() == [True] + [False] * 15
    assert "will take" in caplog.text
    each = replay(run_folder / "checkpoint-5", tmp_path / "s.h5", **given, estimator=same_batch)
    assert (each.read("stored", 0) >= 0).all() and each.rows.tolist() == [8]
    with pytest.raises(ValueError, match='`store` should be "gram" or "sketch" with `split_batch`'):
        replay(run_folder / "checkpoint-5", tmp_path / "n.h5", **given)


# Before anything is run


def test_the_output_is_looked_at_before_any_model_is_run(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(references, "token_log_probabilities", lambda *_: pytest.fail("was run"))
    (tmp_path / "run.h5").write_text("mine")
    with pytest.raises(FileExistsError, match="should not exist yet"):
        replay(
            run_folder / "checkpoint-5", tmp_path / "run.h5",
            objective=NPO(), forget=FORGET, retain=RETAIN,
        )  # fmt: skip
    assert (tmp_path / "run.h5").read_text() == "mine"


def test_the_tokenizer_of_the_base_of_an_adapter(adapters: Path, tmp_path: Path) -> None:
    shutil.copytree(adapters / "checkpoint-8", tmp_path / "checkpoint-8")
    shutil.copytree(adapters / "base", tmp_path / "base")
    config = tmp_path / "checkpoint-8" / "adapter_config.json"
    said = {**json.loads(config.read_text()), "base_model_name_or_path": str(tmp_path / "base")}
    config.write_text(json.dumps(said))
    words = models.WordLevel({"<eos>": 0, "<unk>": 1, "Ada": 2, "Paris": 3}, unk_token="<unk>")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(tmp_path / "base")
    data = written(tmp_path / "rows.jsonl", *[{"prompt": "Ada", "completion": " Paris"}] * 4)
    shown = []
    run = replay(
        tmp_path / "checkpoint-8", tmp_path / "run.h5", objective=GA, forget=data, retain=data,
        show=lambda name, text: shown.append((name, text)),
    )  # fmt: skip
    assert run.state == "complete"
    assert shown[0] == ("forget", "Ada[[Paris <eos>]]") and [name for name, _ in shown] == [
        "forget",
        "retain",
    ]


def test_rows_and_batches_that_are_longer_than_the_model(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    config = tiny.llama().config
    config.vocab_size = len(tokenizer)
    type(tiny.llama())(config).save_pretrained(tmp_path / "original")
    tokenizer.save_pretrained(tmp_path / "original")
    rows = [{"text": "Ada lives."}, {"text": "Ada " * 40}]
    data = written(tmp_path / "rows.jsonl", *rows)
    given: dict[str, Any] = {"objective": GA, "retain": data, "path": tmp_path / "run.h5"}
    with pytest.raises(ValueError, match=r"rows.jsonl`, line 2, should have at most 32 tokens"):
        replay(tmp_path / "original", forget=data, **given)
    with pytest.raises(ValueError, match=r"batch 1 of `forget` should have at most 32 tokens"):
        replay(tmp_path / "original", forget=[FORGET[0], tiny.batch(0, length=33)], **given)
    run = replay(tmp_path / "original", forget=data, max_length=32, **given)
    assert run.state == "complete"
