"""Replay of checkpoints: what is recorded of them, and that they stay as they are."""

import builtins
import copy
import hashlib
import json
import shutil
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from geffect import open_run
from geffect.analysis import cosine, drift, g_effect, predicted_change
from geffect.capture.recorder import Recorder
from geffect.checkpoints import loading as folders
from geffect.checkpoints.estimators import full, reference_ema, same_batch, split_batch
from geffect.checkpoints.loading import Loader, by_step, tokenizer_of
from geffect.checkpoints.replay import replay
from geffect.data.collate import batched
from geffect.data.examples import read
from geffect.objectives import (
    NPO,
    TNPO,
    Component,
    FrozenModel,
    GradDiff,
    Likelihoods,
    Objective,
    Reduction,
    Reference,
    WeightedGradientAscent,
    as_objective,
)
from geffect.objectives import reference as references
from geffect.risk import sequence_sum, token_log_probabilities
from geffect.store import validate
from tests.utils import reference, tiny
from tests.utils.chat import TURNS, make_tokenizer, without, written

GA = {"forget": -1.0}
FORGET = [tiny.batch(i, rows=2) for i in range(4)]
RETAIN = [tiny.batch(20 + i, rows=3, padding=i) for i in range(4)]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three checkpoints of a tiny tied Llama with dropout."""
    folder = tmp_path_factory.mktemp("run")
    for step in (5, 10, 15):
        tiny.llama(seed=step, tied=True, dropout=0.5).save_pretrained(folder / f"checkpoint-{step}")
    return folder


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, an adapter as it is at the start, and one that has been trained."""
    peft = pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("adapters")
    base = tiny.llama(seed=1)
    base.save_pretrained(folder / "base")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(copy.deepcopy(base), config)
    model.base_model.model.config._name_or_path = str(folder / "base")
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    model.save_pretrained(folder / "checkpoint-0")
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder / "checkpoint-8")
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def loaded(folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder).eval()
    return model


def naive(
    model: nn.Module, objective: Any, forget: Any, retain: Any, before: nn.Module | None = None
) -> dict[str, Any]:
    """The gradient of every source on one batch, by autograd."""
    risks = {"forget": reference.nll(model, forget), "retain": reference.nll(model, retain)}
    compared = None if before is None else FrozenModel(before)
    pair = {"forget": forget, "retain": retain}
    loss = as_objective(objective)(model, pair, compared)
    every = {"objective": loss, **risks}
    return {name: reference.gradient(model, value) for name, value in every.items()}


def effects(run: Any) -> dict[tuple[int, str], float]:
    table = g_effect(run, by="model")
    return {(row.step, row.effect): row.value for row in table.itertuples()}


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


def test_one_model_is_made_and_the_weights_of_each_are_read(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    monkeypatch.setattr(folders, "_model_of", lambda path: made.append(path) or loaded(path))
    replay(
        [run_folder / f"checkpoint-{step}" for step in (5, 10, 15)], tmp_path / "run.h5",
        objective=NPO(), forget=FORGET, retain=RETAIN, estimator=full, update=True,
    )  # fmt: skip
    assert made == [run_folder / "checkpoint-5"]


def test_the_model_holds_exactly_the_weights_of_the_checkpoint(run_folder: Path) -> None:
    loader = Loader()
    for step in (5, 15, 10):
        model = loader.load(run_folder / f"checkpoint-{step}")
        there = loaded(run_folder / f"checkpoint-{step}").state_dict()
        assert all(torch.equal(there[name], here) for name, here in model.state_dict().items())
        assert not model.training and all(p.requires_grad for p in model.parameters())
        assert all(p.grad is None for p in model.parameters())


def test_weights_in_several_files_and_under_other_names(tmp_path: Path) -> None:
    for seed in (0, 1):
        tiny.gpt2(seed).save_pretrained(tmp_path / str(seed), max_shard_size="5KB")
    assert (tmp_path / "1" / "model.safetensors.index.json").is_file()
    # The base alone, whose names lack a prefix that those of the whole model have.
    tiny.gpt2(2).transformer.save_pretrained(tmp_path / "2")
    loader = Loader()
    for seed in (0, 1, 2):
        model, expected = loader.load(tmp_path / str(seed)), tiny.gpt2(seed)
        for name, parameter in expected.named_parameters():
            assert torch.equal(model.get_parameter(name), parameter), (seed, name)


def test_half_precision_stays_as_it_was_saved(tmp_path: Path) -> None:
    tiny.llama().bfloat16().save_pretrained(tmp_path / "half")
    model = Loader().load(tmp_path / "half")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_the_update_is_the_way_to_the_next_checkpoint(run_folder: Path, tmp_path: Path) -> None:
    paths = [run_folder / f"checkpoint-{step}" for step in (5, 10, 15)]
    run = replay(
        paths, tmp_path / "run.h5",
        objective=GA, forget=FORGET, retain=RETAIN, estimator=full, update=True,
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


# The reference model


@pytest.mark.parametrize("objective", [NPO(beta=0.5), TNPO(beta=2.0), GradDiff(forget=NPO())])
def test_remembered_likelihoods_are_those_of_the_model(objective: Objective) -> None:
    model, original = tiny.gpt2(0), tiny.gpt2(1)
    forget = FORGET[2]
    batch = {"forget": forget, "retain": RETAIN[1]}
    there = FrozenModel(original.eval())
    remembered = Likelihoods(there, FORGET)
    assert torch.equal(remembered.log_probabilities(forget), there.log_probabilities(forget))
    losses = [objective(model, batch, before) for before in (remembered, there)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    grads = [reference.flat(reference.gradient(model, loss)) for loss in losses]
    assert torch.allclose(grads[0], grads[1], rtol=1e-5, atol=1e-7)


def test_a_certain_token_is_remembered_as_certain() -> None:
    class Certain:
        def __call__(self, input_ids: Tensor, **_: Tensor) -> Any:
            logits = 1e4 * nn.functional.one_hot(input_ids.roll(-1, dims=1), 23).float()
            return type("Output", (), {"logits": logits})

    batch = FORGET[0]
    assert (Likelihoods(FrozenModel(Certain()), [batch]).log_probabilities(batch) == 0).all()


def test_the_reference_is_asked_once_for_each_batch_and_let_go(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def count(model: nn.Module, batch: Any) -> Any:
        asked.append(batch)
        return token_log_probabilities(model, batch)

    monkeypatch.setattr(references, "token_log_probabilities", count)
    replay(
        [run_folder / "checkpoint-10", run_folder / "checkpoint-15"], tmp_path / "run.h5",
        objective=NPO(), forget=FORGET, retain=RETAIN, reference=run_folder / "checkpoint-5",
    )  # fmt: skip
    assert len(asked) == len(FORGET)


def test_another_reference(run_folder: Path, tmp_path: Path) -> None:
    run = replay(
        run_folder / "checkpoint-10", tmp_path / "run.h5", objective=NPO(beta=0.5),
        forget=FORGET, retain=RETAIN, reference=run_folder / "checkpoint-15",
        estimator=same_batch,
    )  # fmt: skip
    model = loaded(run_folder / "checkpoint-10")
    before, npo = loaded(run_folder / "checkpoint-15"), NPO(beta=0.5)
    rows = [naive(model, npo, f, r, before) for f, r in zip(FORGET, RETAIN, strict=True)]
    expected = np.mean([reference.inner(g["objective"], g["forget"]) for g in rows])
    assert effects(run)[10, "unlearning"] == pytest.approx(expected, rel=1e-4)
    assert run.manifest["objective"]["reference"]["is"] == "checkpoint-15"


def test_an_objective_that_needs_all_of_the_reference_keeps_it(
    run_folder: Path, tmp_path: Path
) -> None:
    class Distance(Objective):
        """Minus the squared distance of the logits from those of the reference."""

        reference = "logits"

        def components(
            self, model: Any, batch: Any, reference: Reference | None = None
        ) -> dict[str, Component]:
            logits = model(input_ids=batch["forget"]["input_ids"]).logits
            before = self.compared(reference).logits(batch["forget"])
            return {"forget": Component((logits - before).square().mean(), -1.0)}

    run = replay(
        [run_folder / f"checkpoint-{step}" for step in (5, 10)], tmp_path / "run.h5",
        objective=Distance(), forget=FORGET, retain=RETAIN,
    )  # fmt: skip
    norms = run.gram()[:, :, 0, 0].sum(axis=1)
    assert norms[0] == pytest.approx(0.0, abs=1e-12) and norms[1] > 1e-6


# LoRA


def test_adapters(adapters: Path, tmp_path: Path) -> None:
    before = digests(adapters)
    run = replay(
        [adapters / "checkpoint-0", adapters / "checkpoint-8"], tmp_path / "run.h5",
        objective=GA, forget=FORGET, retain=RETAIN, estimator=same_batch, update=True,
    )  # fmt: skip
    assert run.steps.tolist() == [0, 8]
    assert all(p.module.endswith(("lora_A", "lora_B")) for p in run.layers)
    import peft

    for step in (0, 8):
        model = peft.PeftModel.from_pretrained(
            loaded(adapters / "base"), adapters / f"checkpoint-{step}", is_trainable=True
        ).eval()
        rows = [naive(model, GA, f, r) for f, r in zip(FORGET, RETAIN, strict=True)]
        expected = np.mean([reference.inner(g["objective"], g["retain"]) for g in rows])
        assert effects(run)[step, "retaining"] == pytest.approx(expected, rel=1e-4)
    # With B at zero nothing reaches A: no length, no angle.
    norm = run.gram()[0, :, 1, 1]
    angle = cosine(run, "forget", "retain", by="parameter").query("step == 0")
    for parameter, squared, row in zip(run.layers, norm, angle["value"], strict=True):
        at_start = parameter.module.endswith("lora_A")
        assert (squared == 0) == at_start == np.isnan(row)
    assert predicted_change(run, by="model").query("step == 0")["value"].notna().all()
    assert digests(adapters) == before


def test_a_base_that_has_moved(adapters: Path, tmp_path: Path) -> None:
    shutil.copytree(adapters / "base", tmp_path / "elsewhere")
    shutil.copytree(adapters / "checkpoint-8", tmp_path / "checkpoint-8")
    config = tmp_path / "checkpoint-8" / "adapter_config.json"
    said = json.loads(config.read_text())
    config.write_text(json.dumps({**said, "base_model_name_or_path": "gone/away"}))
    model = Loader(base=tmp_path / "elsewhere").load(tmp_path / "checkpoint-8")
    assert sum(parameter.requires_grad for parameter in model.parameters()) == 16


def test_adapters_of_another_set_up_are_refused(adapters: Path, tmp_path: Path) -> None:
    shutil.copytree(adapters / "checkpoint-8", tmp_path / "checkpoint-9")
    config = tmp_path / "checkpoint-9" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 99}))
    loader = Loader()
    loader.load(adapters / "checkpoint-8")
    for other in (tmp_path / "checkpoint-9", adapters / "base"):
        with pytest.raises(ValueError, match="set up in another way"):
            loader.load(other)


def test_peft_is_named_where_it_is_missing(adapters: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtins, "__import__", without("peft"))
    with pytest.raises(ImportError, match="pip install peft"):
        Loader().load(adapters / "checkpoint-0")


# Data


def test_data_from_files(run_folder: Path, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(TURNS)
    tokenizer.save_pretrained(tmp_path / "checkpoint-3")
    config = tiny.llama().config
    config.vocab_size = len(tokenizer)
    type(tiny.llama())(config).save_pretrained(tmp_path / "checkpoint-3")
    rows = [{"question": "Where?", "answer": f"In {n} Paris."} for n in range(6)]
    forget, retain = written(tmp_path / "f", *rows), written(tmp_path / "r", *rows[::-1])
    given = {"objective": GA, "forget": forget, "retain": retain, "batch_size": 2}
    run = replay(tmp_path / "checkpoint-3", tmp_path / "run.h5", **given)
    # Batches of two would be three, and one row: smaller ones make as many rows as there can be.
    assert run.manifest["replay"]["batches"] == {"forget": 6, "retain": 6}
    assert run.rows.tolist() == [3]
    same = replay(
        tmp_path / "checkpoint-3", tmp_path / "same.h5", **given, estimator=same_batch
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
    ordered = replay(tmp_path / "checkpoint-3", tmp_path / "o.h5", **given | {"seed": None})
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
        ({"update": True}, "two or more"),
        ({"forget": []}, "`forget` should have a batch or more"),
        ({"device": "cuda:99"}, r"`device` should be one of this machine.*Found `cuda:99`"),
        ({"device": "magic"}, r"`device` should be one of this machine.*Found `magic`"),
        ({"forget": FORGET[:1]}, "two batches or more"),
    ],
)
def test_refusals(run_folder: Path, tmp_path: Path, given: dict[str, Any], says: str) -> None:
    fine: dict[str, Any] = {"checkpoints": [run_folder / "checkpoint-5"], "objective": GA,
                            "forget": FORGET, "retain": RETAIN}  # fmt: skip
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=says):
        replay(path=tmp_path / "run.h5", **fine | given)
    assert not (tmp_path / "run.h5").exists()


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
        ("tie_word_embeddings", False, "only one of them has"),
    ]
    for option, value, says in cases:
        config = tiny.llama(tied=True).config
        setattr(config, option, value)
        type(tiny.llama())(config).save_pretrained(tmp_path / f"{option}-{value}")
        loader = Loader()
        loader.load(run_folder / "checkpoint-5")
        with pytest.raises(ValueError, match=f"same model as.*{says}"):
            loader.load(tmp_path / f"{option}-{value}")


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
        for k, name in ((0, "forget"), (9, "retain"))
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
    rows = [naive(model, GradDiff(), *pair) for pair in zip(*sets.values(), strict=True)]
    share = np.full(count, 1 / count)
    if estimator is full:
        tokens = np.array([(b["labels"][:, 1:] != -100).sum() for b in sets["retain"]], dtype=float)
        share = tokens / tokens.sum()
    elif estimator is reference_ema:
        averages, steps = np.zeros((count, count)), np.eye(count)
        for b in range(count):
            averages[b] = steps[b] if not b else 0.6 * averages[b - 1] + 0.4 * steps[b]
        share = averages[3::4].mean(axis=0)
    # On random tokens of one length the gradient of a set is that of its batches.
    mean = {name: sum(s * row["retain"][name] for s, row in zip(share, rows, strict=True))
            for name in rows[0]["retain"]}  # fmt: skip
    assert run.contents.sketch is not None
    expected = sum(
        run.contents.sketch.fold(torch.as_tensor(mean[p.name]).flatten(), p.name)
        for p in run.layers if p.layer == "layer 1"
    )  # fmt: skip
    place = list(dict.fromkeys(p.layer for p in run.layers)).index("layer 1")
    found = run.sketch("retain")[0, place]
    assert found == pytest.approx(np.asarray(expected), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("estimator", [same_batch, full])
@pytest.mark.parametrize("store", ["full", "sketch"])
def test_drift_between_checkpoints(
    estimator: Any, store: str, run_folder: Path, tmp_path: Path
) -> None:
    sets = {name: [tiny.batch(s + k, rows=2) for s in range(8)]
            for k, name in ((0, "forget"), (50, "retain"))}  # fmt: skip
    paths = [run_folder / f"checkpoint-{step}" for step in (5, 10)]
    run = replay(
        paths, tmp_path / "run.h5", objective=GA, **sets, estimator=estimator, store=store
    )  # fmt: skip
    assert validate(run.path).whole
    table = drift(run, "forget", by="model")
    found = {(row.step, row.other_step): row.value for row in table.itertuples()}
    flat = []
    for path in paths:
        model = loaded(path)
        losses = [reference.nll(model, batch) for batch in sets["forget"]]
        tokens = [float((b["labels"][:, 1:] != -100).sum()) for b in sets["forget"]]
        weights = tokens if estimator is full else [1.0] * 8
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


def test_a_first_checkpoint_that_has_unlearned_is_no_reference_in_silence(
    run_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def told(**given: Any) -> str:
        caplog.clear()
        fine: dict[str, Any] = {"objective": NPO(), "forget": FORGET, "retain": RETAIN}
        checkpoint = given.pop("checkpoint", run_folder / "checkpoint-5")
        replay(checkpoint, tmp_path / "run.h5", overwrite=True, **fine | given)
        return caplog.text

    assert "`checkpoint-5` is taken" in told() and "--reference" in caplog.text
    assert told(reference=run_folder / "checkpoint-10") == ""
    assert told(objective=GA) == ""
    shutil.copytree(run_folder / "checkpoint-5", tmp_path / "checkpoint-0")
    shutil.copytree(run_folder / "checkpoint-5", tmp_path / "original")
    assert (
        told(checkpoint=tmp_path / "checkpoint-0") == told(checkpoint=tmp_path / "original") == ""
    )


@pytest.mark.parametrize("needs", ["likelihoods", "logits"])
def test_the_reference_of_adapters_is_the_model_they_are_for(
    adapters: Path, tmp_path: Path, needs: str, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(NPO, "reference", needs)
    before = digests(adapters)
    run = replay(
        adapters / "checkpoint-8", tmp_path / "run.h5", objective=NPO(beta=0.5),
        forget=FORGET, retain=RETAIN, estimator=same_batch,
    )  # fmt: skip
    import peft

    model = peft.PeftModel.from_pretrained(
        loaded(adapters / "base"), adapters / "checkpoint-8", is_trainable=True
    ).eval()
    original, npo = loaded(adapters / "base"), NPO(beta=0.5)
    rows = [naive(model, npo, f, r, original) for f, r in zip(FORGET, RETAIN, strict=True)]
    expected = np.mean([reference.inner(g["objective"], g["forget"]) for g in rows])
    assert effects(run)[8, "unlearning"] == pytest.approx(expected, rel=1e-4)
    said = run.manifest["objective"]["reference"]
    assert said == {"needs": needs, "is": "base, the model that the adapters are for"}
    assert caplog.text == "" and digests(adapters) == before


@pytest.mark.parametrize(
    "options",
    [{"bias": "all"}, {"modules_to_save": ["lm_head"]}, {"init_lora_weights": "pissa"}],
    ids=str,
)
def test_the_base_of_adapters_that_change_it_is_read_from_its_folder(
    options: dict[str, Any], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=23, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, initializer_range=0.3,
        tie_word_embeddings=False,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "base")
    how = peft.LoraConfig(r=2, target_modules=["v_proj"], task_type="CAUSAL_LM", **options)
    trained = peft.get_peft_model(loaded(tmp_path / "base"), how)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    trained.save_pretrained(tmp_path / "checkpoint-2")
    run = replay(
        tmp_path / "checkpoint-2", tmp_path / "run.h5", objective=NPO(beta=0.5),
        forget=FORGET[:2], retain=RETAIN[:2], estimator=same_batch, base=tmp_path / "base",
    )  # fmt: skip
    model = peft.PeftModel.from_pretrained(
        loaded(tmp_path / "base"), tmp_path / "checkpoint-2", is_trainable=True
    ).eval()
    original = loaded(tmp_path / "base")
    rows = [
        naive(model, NPO(beta=0.5), f, r, original)
        for f, r in zip(FORGET[:2], RETAIN[:2], strict=True)
    ]
    expected = np.mean([reference.inner(g["objective"], g["forget"]) for g in rows])
    assert effects(run)[2, "unlearning"] == pytest.approx(expected, rel=1e-3)


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
