"""Replay of checkpoints: what is recorded of them, and that they stay as they are."""

import builtins
import copy
import hashlib
import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from geffect import open_run
from geffect.analysis import cosine, g_effect, predicted_change
from geffect.capture import checkpoints as folders
from geffect.capture import reference as references
from geffect.capture.checkpoints import Loader, by_step, tokenizer_of
from geffect.capture.data import batched, read
from geffect.capture.estimators import full, same_batch, split_batch
from geffect.capture.recorder import Recorder
from geffect.capture.reference import Likelihoods, with_reference
from geffect.capture.replay import replay
from geffect.objectives import NPO, TNPO, GradDiff, Objective, WeightedGradientAscent
from geffect.objectives.base import token_log_probabilities
from geffect.store import validate
from tests import reference, tiny
from tests.test_data import TURNS, make_tokenizer, without, written

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


def naive(model: nn.Module, objective: Any, forget: Any, retain: Any) -> dict[str, Any]:
    """The gradient of every source on one batch, by autograd."""
    risks = {"forget": reference.nll(model, forget), "retain": reference.nll(model, retain)}
    loss = (
        objective(model, {"forget": forget, "retain": retain})
        if isinstance(objective, Objective)
        else sum(weight * risks[name] for name, weight in objective.items())
    )
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
    if isinstance(objective, GradDiff):
        objective = with_reference(objective, loaded(run_folder / "checkpoint-5"))
    for step in (5, 10, 15):
        model = loaded(run_folder / f"checkpoint-{step}")
        rows = [naive(model, objective, f, r) for f, r in zip(FORGET, RETAIN, strict=True)]
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
    assert how["objective"] == "NPO(beta=0.5)" and how["reference"] == "checkpoint-5"
    assert how["estimator"] == "split_batch" and how["seed"] == 0
    assert how["batches"] == {"forget": 4, "retain": 4, "facts": 2}
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


# The reference model


@pytest.mark.parametrize("objective", [NPO(beta=0.5), TNPO(beta=2.0), GradDiff(forget=NPO())])
def test_remembered_likelihoods_are_those_of_the_model(objective: Objective) -> None:
    model, original = tiny.gpt2(0), tiny.gpt2(1)
    forget = FORGET[2]
    batch = {"forget": forget, "retain": RETAIN[1]}
    remembered = Likelihoods(original, FORGET)
    now, then = (token_log_probabilities(m, forget)[0] for m in (remembered, original))
    assert torch.allclose(now.double(), then, atol=1e-6)
    losses = [with_reference(objective, m)(model, batch) for m in (remembered, original)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    grads = [reference.flat(reference.gradient(model, loss)) for loss in losses]
    assert torch.allclose(grads[0], grads[1], rtol=1e-5, atol=1e-7)


def test_a_certain_token_is_remembered_as_certain() -> None:
    class Certain:
        def __call__(self, input_ids: Tensor, **_: Tensor) -> Any:
            logits = 1e4 * nn.functional.one_hot(input_ids.roll(-1, dims=1), 23).float()
            return type("Output", (), {"logits": logits})

    batch = FORGET[0]
    log_p, _ = token_log_probabilities(Likelihoods(Certain(), [batch]), batch)
    assert (log_p == 0).all()


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
    npo = NPO(beta=0.5, reference=loaded(run_folder / "checkpoint-15"))
    rows = [naive(model, npo, f, r) for f, r in zip(FORGET, RETAIN, strict=True)]
    expected = np.mean([reference.inner(g["objective"], g["forget"]) for g in rows])
    assert effects(run)[10, "unlearning"] == pytest.approx(expected, rel=1e-4)
    assert run.manifest["replay"]["reference"] == "checkpoint-15"


def test_an_objective_that_needs_all_of_the_reference_keeps_it(
    run_folder: Path, tmp_path: Path
) -> None:
    class Distance(Objective):
        """Minus the squared distance of the logits from those of the reference."""

        def __init__(self) -> None:
            self.reference: Any = None

        def components(self, model: Any, batch: Any) -> dict[str, tuple[Tensor, float]]:
            ids = batch["forget"]["input_ids"]
            with torch.no_grad():
                origin = self.reference(input_ids=ids).logits
            return {"forget": ((model(input_ids=ids).logits - origin).square().mean(), -1.0)}

    objective = Distance()
    run = replay(
        [run_folder / f"checkpoint-{step}" for step in (5, 10)], tmp_path / "run.h5",
        objective=objective, forget=FORGET, retain=RETAIN,
    )  # fmt: skip
    norms = run.gram()[:, :, 0, 0].sum(axis=1)
    assert norms[0] == pytest.approx(0.0, abs=1e-12) and norms[1] > 1e-6
    assert objective.reference is None


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
    # Three batches would leave one without a partner.
    assert run.manifest["replay"]["batches"] == {"forget": 4, "retain": 4}
    by_hand = batched(read(forget, tokenizer), 2, seed=7, padding=0)
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
        ({"objective": {"sun": 1.0}}, "`objective` should be"),
        ({"objective": "npo"}, "`objective` should be"),
        ({"risks": {"update": RETAIN}}, "names of their own"),
        ({"risks": {"forget": RETAIN}}, "names of their own"),
        ({"risks": {"objective.x": RETAIN}}, "names of their own"),
        ({"update": True}, "two or more"),
        ({"forget": FORGET[:1]}, "two batches or more"),
    ],
)
def test_refusals(run_folder: Path, tmp_path: Path, given: dict[str, Any], says: str) -> None:
    fine: dict[str, Any] = {"checkpoints": [run_folder / "checkpoint-5"], "objective": GA,
                            "forget": FORGET, "retain": RETAIN}  # fmt: skip
    with pytest.raises((ValueError, FileNotFoundError), match=says):
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
    data = {"forget": [tiny.batch(s) for s in range(6)], "retain": [tiny.batch(9), tiny.batch(10)]}
    path = tmp_path / "run.h5"
    checkpoint = run_folder / "checkpoint-5"
    run = replay(checkpoint, path, objective={"forget": -1.0}, **data, estimator=estimator)
    K = run.read("gram").sum(axis=1)
    assert len(K) > 1
    # What makes the check of these files another one: their rows are no Gram matrices.
    beyond = np.abs(K[:, 0, 2]) > np.sqrt(np.abs(K[:, 0, 0] * K[:, 2, 2])) * (1 + 1e-9)
    assert beyond.any() == (estimator is split_batch)
    assert validate(path).whole
