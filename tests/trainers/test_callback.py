"""The callback: training ends as if it were not there, and the file holds what a loop finds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import peft
import pytest
import torch
import trl
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast
from transformers.trainer_utils import IntervalStrategy

from geffect import gram, open_run
from geffect.capture import at
from geffect.layers import trainable
from geffect.trainers import GEffectCallback
from tests.utils import reference, trainers
from tests.utils import shallow as tiny
from tests.utils.trainers import Noting, same, trainer

PROBES = {
    "forget": [tiny.batch(50, rows=1), tiny.batch(51, rows=3, length=12)],
    "retain": tiny.batch(52, rows=2),
    "facts": torch.utils.data.DataLoader(trainers.samples(4, 60), batch_size=2, shuffle=True),
}
"""A list, a batch, and a loader that draws random numbers."""


def adapted(seed: int = 0, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "up_proj"], lora_dropout=dropout, task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(tiny.llama(dropout=dropout), config)


PRECISIONS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "float32": (lambda: tiny.llama(dropout=0.3), {}),
    "bfloat16 autocast": (lambda: tiny.llama(dropout=0.3), {"bf16": True}),
    "checkpointing": (
        lambda: tiny.llama(dropout=0.3),
        {"activation_checkpointing": True},
    ),
    "lora": (lambda: adapted(dropout=0.3), {}),
    "momentum, unclipped": (
        lambda: tiny.llama(dropout=0.3),
        {"optim": "sgd", "optim_args": "momentum=0.9", "max_grad_norm": 0.0},
    ),
}


@pytest.mark.parametrize("kind", PRECISIONS)
def test_training_ends_bitwise_as_it_would_have_ended_unwatched(kind: str, tmp_path: Path) -> None:
    make, options = PRECISIONS[kind]
    ends = []
    for watched in (False, True):
        training = trainer(tmp_path, make(), **options)
        if watched:
            training.add_callback(GEffectCallback(tmp_path / "run.h5", probes=PROBES))
        training.train()
        ends.append((training, torch.get_rng_state()))
    (plain, before), (watched_one, after) = ends
    assert same(plain.model.state_dict(), watched_one.model.state_dict())
    assert same(plain.optimizer.state_dict(), watched_one.optimizer.state_dict())
    assert torch.equal(before, after)
    assert all(p.grad is None for p in watched_one.model.parameters())
    run = open_run(tmp_path / "run.h5")
    assert run.steps.tolist() == [0, 1, 2, 3, 4, 5]
    assert run.column("n_micro").tolist() == [2, 2, 1, 2, 2, 1]
    assert run.state == "complete"


class Averaging(torch.optim.SGD):
    """An optimizer that shows an average of the parameters in evaluation, as schedule-free ones."""

    shown: list[Tensor] | None = None

    def eval(self) -> None:
        if self.shown is None:
            self.shown = self._swapped(lambda p: 0.5 * p)

    def train(self) -> None:
        if self.shown is not None:
            own = iter(self.shown)
            self.shown = None
            self._swapped(lambda p: next(own))

    @torch.no_grad()
    def _swapped(self, other: Callable[[Tensor], Tensor]) -> list[Tensor]:
        parameters = [p for group in self.param_groups for p in group["params"]]
        before = [p.clone() for p in parameters]
        for p in parameters:
            p.copy_(other(p))
        return before


def test_probes_are_taken_at_the_parameters_that_are_trained(tmp_path: Path) -> None:
    """And not at the average that an evaluation before the step has left in their place."""
    ends = []
    for evaluated in ("no", "steps"):
        probes = {"forget": PROBES["forget"], "retain": PROBES["retain"]}
        recorder = GEffectCallback(tmp_path / f"{evaluated}.h5", probes=probes)
        model = tiny.llama()
        training = trainer(tmp_path, model, recorder, eval_steps=1)
        training.args.eval_strategy = IntervalStrategy(evaluated)
        training.eval_dataset = trainers.samples(2, 90)
        training.optimizer = Averaging(model.parameters(), lr=1e-2)
        training.train()
        training.optimizer.train()
        ends.append((open_run(tmp_path / f"{evaluated}.h5"), model.state_dict()))
    (plain, a), (between, b) = ends
    assert same(a, b)
    for name, losses in plain.losses().items():
        assert losses.tolist() == between.losses()[name].tolist()
    assert np.array_equal(plain.gram()[:, :, :3, :3], between.gram()[:, :, :3, :3])


def vectors_of(training: Noting, step: int) -> dict[str, dict[str, Tensor]]:
    """What a plain loop finds at one step: gradients of means over tokens, and the update."""
    model, later = training.models[step].eval(), training.models[step + 1]
    sets = {"objective": training.windows[step], **PROBES}
    found = {}
    for name, data in sets.items():
        batches = [data] if isinstance(data, dict) else list(data)
        losses = [-p for b in batches for row in reference.token_log_p(model, b) for p in row]
        found[name] = reference.gradient(model, torch.stack(losses).mean())
    after = trainable(later)
    found["update"] = {name: (after[name] - p).detach() for name, p in trainable(model).items()}
    return found


def test_rows_hold_what_a_plain_loop_finds(tmp_path: Path) -> None:
    recorder = GEffectCallback(tmp_path / "run.h5", probes=PROBES, metadata={"method": "ft"})
    training = trainer(tmp_path, tiny.llama(), recorder, kind=Noting)
    training.train()
    run = open_run(tmp_path / "run.h5")
    assert run.sources == ("objective", "forget", "retain", "facts", "update")
    assert run.metadata == {"method": "ft"}
    recorded = run.gram()
    for step in range(6):
        vectors = vectors_of(training, step)
        for i, a in enumerate(run.sources):
            for j, b in enumerate(run.sources):
                for layer, name in enumerate(trainable(training.model)):
                    exact = reference.inner(vectors[a], vectors[b], name)
                    length = (
                        reference.inner(vectors[a], vectors[a], name)
                        * reference.inner(vectors[b], vectors[b], name)
                    ) ** 0.5
                    assert abs(recorded[step, layer, i, j] - exact) <= 1e-3 * length
        forget = reference.nll(training.models[step], PROBES["retain"])
        assert run.losses()["retain"][step] == pytest.approx(forget.item(), rel=1e-6)
    assert set(run.losses()) == {"forget", "retain", "facts"}
    assert run.column("epoch") == pytest.approx([0, 2 / 5, 4 / 5, 1, 1 + 2 / 5, 1 + 4 / 5])
    rates = [1e-2 * (1 - step / 6) for step in range(6)]
    assert run.column("lr") == pytest.approx(rates)
    assert run.manifest["trainer"]["class"] == "Noting"
    assert run.manifest["optimizer"]["class"] == "AdamW"


@pytest.mark.parametrize("limit", [0.0, 0.1, 1e9])
@pytest.mark.parametrize("update", [False, True])
def test_the_objective_is_recorded_before_clipping(
    limit: float, update: bool, tmp_path: Path
) -> None:
    recorder = GEffectCallback(tmp_path / "run.h5", probes=PROBES, update=update)
    training = trainer(tmp_path, tiny.llama(), recorder, kind=Noting, max_grad_norm=limit)
    training.train()
    run = open_run(tmp_path / "run.h5")
    assert run.sources[-1] == ("update" if update else "facts")
    for step in range(6):
        before = torch.cat([g.double().flatten() for g in training.unclipped[step]])
        after = torch.cat([g.double().flatten() for g in training.clipped[step]])
        scale = run.column("clip_scale")[step]
        assert scale == pytest.approx(float(after @ before / (before @ before)), rel=1e-6)
        assert (scale < 0.9) == (limit == 0.1)
        norm = run.gram()[step, :, 0, 0].sum() ** 0.5
        assert norm == pytest.approx(float(before.norm()), rel=1e-6)


def test_a_row_each_k_steps_or_when_a_schedule_says_so(tmp_path: Path) -> None:
    fifth = GEffectCallback(tmp_path / "k.h5", probes=PROBES, every=5)
    chosen = GEffectCallback(tmp_path / "when.h5", probes=PROBES, when=at(1, 3), log=False)
    trainer(tmp_path, tiny.llama(), fifth).train()
    trainer(tmp_path, tiny.llama(), chosen).train()
    assert open_run(tmp_path / "k.h5").steps.tolist() == [0, 5]
    assert open_run(tmp_path / "when.h5").steps.tolist() == [1, 3]
    assert open_run(tmp_path / "when.h5").column("n_micro").tolist() == [2, 2]


def test_effects_of_adapters_are_those_of_their_factors(tmp_path: Path) -> None:
    recorder = GEffectCallback(tmp_path / "run.h5", probes=PROBES)
    training = trainer(tmp_path, adapted(), recorder)
    training.train()
    run = open_run(tmp_path / "run.h5")
    assert run.manifest["model"]["space"] == "adapter"
    logged = {n for e in training.state.log_history for n in e if n.startswith("geffect/")}
    assert "geffect/adapter/unlearning_g_effect" in logged
    assert all(name.startswith("geffect/adapter/") for name in logged)
    names = [p.name for p in run.layers]
    assert names[0] == "model.layers.0.self_attn.q_proj.lora_A.weight"
    first = run.gram()[0]
    for place, name in enumerate(names):
        cosine = gram.cosine(first[place], 0, 1)
        if "lora_A" in name:  # as long as B is zero
            assert first[place, 0, 0] == first[place, 1, 1] == 0
            assert np.isnan(cosine)
        else:
            assert first[place, 0, 0] > 0
            assert np.isfinite(cosine)


def test_scores_are_logged_beside_what_the_trainer_logs(tmp_path: Path) -> None:
    logs = []
    for log in (None, False, True):
        path = tmp_path / f"{log}.h5"
        watching = [] if log is None else [GEffectCallback(path, probes=PROBES, log=log)]
        training = trainer(tmp_path, tiny.llama(), *watching)
        training.train()
        logs.append(training.state.log_history)
    plain, silent, full = logs
    mine = [entry for entry in full if "geffect/unlearning_g_effect" in entry]
    others = [entry for entry in full if entry not in mine]
    for history in (silent, others):
        assert [untimed(entry) for entry in history] == [untimed(entry) for entry in plain]
    K = open_run(tmp_path / "True.h5").gram().sum(axis=1)
    assert [entry["step"] for entry in mine] == [1, 2, 3, 4, 5, 6]
    effects = {"forget": "unlearning", "retain": "retaining", "facts": "facts"}
    for entry, k in zip(mine, K, strict=True):
        scores = {name: value for name, value in entry.items() if name.startswith("geffect/")}
        expected = {}
        for i, (risk, effect) in enumerate(effects.items(), start=1):
            expected[f"geffect/{effect}_g_effect"] = k[0, i]
            expected[f"geffect/cosine_objective_{risk}"] = k[0, i] / (k[0, 0] * k[i, i]) ** 0.5
        assert scores == pytest.approx(expected, rel=1e-9)


def untimed(entry: dict[str, Any]) -> dict[str, Any]:
    timed = ("runtime", "per_second")
    return {name: value for name, value in entry.items() if not name.endswith(timed)}


def test_sft_of_trl_is_watched_like_any_trainer(tmp_path: Path) -> None:
    words = {"<eos>": 0} | {str(i): i for i in range(1, tiny.VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<eos>")),
        eos_token="<eos>",
        pad_token="<eos>",
    )
    rows = datasets.Dataset.from_list(
        [{"input_ids": row["input_ids"].tolist()} for row in trainers.samples()]
    )
    ends = []
    for watched in (False, True):
        arguments = trl.SFTConfig(
            output_dir=str(tmp_path / "out"), num_train_epochs=2, logging_steps=2, use_cpu=True,
            per_device_train_batch_size=1, gradient_accumulation_steps=2, max_grad_norm=0.1,
            save_strategy="no", report_to=[], disable_tqdm=True, seed=3, learning_rate=1e-2,
        )  # fmt: skip
        training = trl.SFTTrainer(
            tiny.llama(dropout=0.3), arguments, train_dataset=rows, processing_class=tokenizer
        )
        if watched:
            training.add_callback(GEffectCallback(tmp_path / "run.h5", probes=PROBES))
        training.train()
        ends.append(training)
    plain, seen = ends
    assert same(plain.model.state_dict(), seen.model.state_dict())
    assert same(plain.optimizer.state_dict(), seen.optimizer.state_dict())
    others = [e for e in seen.state.log_history if "geffect/unlearning_g_effect" not in e]
    assert [untimed(e) for e in others] == [untimed(e) for e in plain.state.log_history]
    assert "mean_token_accuracy" in others[0]
    assert open_run(tmp_path / "run.h5").steps.tolist() == [0, 1, 2, 3, 4, 5]
