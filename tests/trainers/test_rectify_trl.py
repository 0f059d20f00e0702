"""Trainers of TRL, rectified against retain batches by the call that any Trainer takes."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import trl
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from geffect import Rectifier
from geffect.trainers import rectify
from tests.utils import shallow as tiny
from tests.utils.trainers import same
from tests.utils.unlearning_trainers import RETAIN, Reports, apart

WORDS = {"<eos>": 0} | {str(i): i for i in range(1, tiny.VOCABULARY)}
KINDS = ["SFT", "DPO", "KTO"]


def text(seed: int) -> str:
    ids = tiny.batch(seed, rows=1)["input_ids"][0].clamp(min=1)
    return " ".join(map(str, ids.tolist()))


def rows(kind: str) -> datasets.Dataset:
    """Samples, some to be preferred to others, as each kind wants them."""
    made: list[dict[str, Any]] = []
    for seed in range(4):
        prompt, good, bad = text(seed), " " + text(seed + 10), " " + text(seed + 20)
        made.append(
            {
                "SFT": {"text": prompt + good},
                "DPO": {"prompt": prompt, "chosen": good, "rejected": bad},
                "KTO": {"prompt": prompt, "completion": good, "label": seed % 2 == 0},
            }[kind]
        )
    return datasets.Dataset.from_list(made)


def trainer(kind: str, folder: Path) -> Any:
    inner = Tokenizer(models.WordLevel(WORDS, unk_token="<eos>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<eos>", pad_token="<eos>"
    )
    options = getattr(trl, f"{kind}Config")(
        output_dir=str(folder), num_train_epochs=2, logging_steps=1, use_cpu=True, seed=3,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2,
        save_strategy="no", report_to=[], disable_tqdm=True, max_length=30, bf16=False,
    )  # fmt: skip
    reference = {} if kind == "SFT" else {"ref_model": tiny.llama()}
    return getattr(trl, f"{kind}Trainer")(
        tiny.llama(),
        args=options,
        train_dataset=rows(kind),
        processing_class=tokenizer,
        **reference,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_trainer_of_trl_is_rectified(kind: str, tmp_path: Path) -> None:
    plain = trainer(kind, tmp_path)
    plain.train()
    watched = trainer(kind, tmp_path)
    rectify(watched, Rectifier(watched.model, rule=None), retain=RETAIN)
    watched.train()
    assert same(plain.model.state_dict(), watched.model.state_dict())
    changed = trainer(kind, tmp_path)
    rectifier = Rectifier(changed.model, scope="parameter", space="update", measure_update=True)
    reports = Reports(rectifier)
    attached = rectify(changed, rectifier, retain=RETAIN)
    changed.add_callback(reports)
    changed.train()
    assert len(reports.all) == changed.state.global_step == 2
    assert all(reports.fired)
    for report in reports.all:
        # What is applied harms nothing, to the rounding of a step in float32.
        for inner, u, r in zip(
            report.applied_average, report.norm_after, report.retain_norm, strict=True
        ):
            assert not inner < -1e-4 * u * r
    assert apart(changed, plain) > 1e-4
    # Its own numbers are logged beside.
    first = plain.state.log_history[0].keys()
    assert first < changed.state.log_history[0].keys()
    attached.detach()
    assert type(changed) is type(plain)
    assert torch.isfinite(torch.cat([p.flatten() for p in changed.model.parameters()])).all()
