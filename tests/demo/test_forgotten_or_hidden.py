"""What recognition tells apart: a retrained model, controls that hide, and a relearned copy.

On the quick models of the study, one seed; a study says the same of full ones, of every seed.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any

import numpy as np
import pytest
from torch import nn

from geffect.audit.recognition import every_other, recognition, recognition_after
from geffect.data.collate import collate, pad_token_of
from geffect.demo import language_model as lm
from geffect.demo.config import QUICK
from geffect.demo.corpus import generate
from geffect.demo.data import Data
from geffect.demo.hiding import HIDING
from geffect.demo.hiding_claims import ASKED_BEFORE, CLOSE, LESS, SEEN, TAUGHT
from geffect.demo.measures import measure, probe
from geffect.demo.methods import EQUAL, RIVALS, VARIANTS, RunSpec
from geffect.demo.unlearning import unlearn
from tests.utils.fixtures import Study

FAST = {"name-rows": 4e-2, "last-block": 1e-3, "select": 8e-3, "select-relearned": 8e-3}
"""Learning rates at which each variant reaches the level within a few dozen steps."""


COPY = {"radius": 0.012, "steps": 2}
"""Fewer steps than the variant has, each of them longer: a third of the time."""


@dataclass(frozen=True)
class Models:
    """The models of the quick study, and what was measured of them."""

    original: Any
    gold: Any
    data: Data

    def measured(self, model: Any) -> dict[str, Any]:
        return {
            **measure(model, self.data),
            **probe(model, self.data, QUICK.unlearning, attacked=False),
        }


@pytest.fixture(scope="module")
def models(quick_study: Study) -> Models:
    folder = quick_study.out / "models"
    original, tokenizer = QUICK.load(folder / "original-seed0")
    gold, _ = QUICK.load(folder / "gold-seed0")
    data = Data.of(generate(0, QUICK.corpus), tokenizer, 0)
    return Models(original.eval(), gold.eval(), data)


@pytest.fixture(scope="module")
def gold(models: Models) -> dict[str, Any]:
    return models.measured(models.gold)


Unlearned = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def unlearned(
    models: Models, gold: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Unlearned:
    """What was measured of a variant of WGA at the forget NLL of the retrained model; once."""
    folder, known = tmp_path_factory.mktemp("runs"), dict[str, dict[str, Any]]()

    def at_level(name: str) -> dict[str, Any]:
        if name not in known:
            variant = {**VARIANTS, **RIVALS, **HIDING}[name]
            if variant.relearned:
                variant = replace(variant, relearned=COPY)
            told = unlearn(
                copy.deepcopy(models.original),
                models.data,
                RunSpec(EQUAL, "wga", name, FAST[name], QUICK.corpus.heldout),
                variant,
                QUICK.unlearning,
                {"forget_nll": gold["forget_nll"]},
                folder / f"{name}.h5",
                lambda *_: None,
            )
            known[name] = told["at_level"]
        return known[name]

    return at_level


def teaching(models: Models, rate: float, steps: int) -> Callable[[nn.Module, Any], nn.Module]:
    """An attack that shows some facts again."""

    def taught(model: Any, items: Any) -> nn.Module:
        facts = collate(items, pad_token_id=pad_token_of(models.data.tokenizer))
        *_, student = lm.teaching(model, repeat(facts, steps), learning_rate=rate)
        return student

    return taught


def is_chance(values: np.ndarray) -> bool:
    """Whether the mean over facts is that of guessing, within two standard errors."""
    error = values.std(ddof=1) / np.sqrt(len(values))
    return bool(abs(values.mean() - 0.5) <= 2 * error)


def test_a_model_that_never_saw_a_fact_guesses_after_every_attack(models: Models) -> None:
    asked, config = models.data.asked, QUICK.unlearning
    attacks = {
        f"{rate:g} {steps}": teaching(models, rate, steps)
        for rate in config.attack_rates
        for steps in (5, config.teaching_steps)
    }
    table = recognition_after(
        models.gold, asked.items, asked.alternatives, attacks, every_other(asked.subjects)
    )
    text = next(models.data.draws({"retain": 20}))["retain"]
    on_text = lm.taught(models.gold, text, steps=20, learning_rate=config.teaching_rate)
    values = {
        "now": recognition(models.gold, asked.items, asked.alternatives),
        "retain text": recognition(on_text, asked.items, asked.alternatives),
        **{name: own["value"].to_numpy() for name, own in table.groupby("attack")},
    }
    assert len(values) == 8
    for name, own in values.items():
        assert is_chance(own), (name, own.mean())
    knows = recognition(models.original, asked.items, asked.alternatives)
    assert not is_chance(knows) and knows.mean() > 0.95


def test_the_rows_of_names_forget_and_harm_nothing_by_what_was_asked_before(
    models: Models, gold: dict[str, Any], unlearned: Unlearned
) -> None:
    found, original = unlearned("name-rows"), measure(models.original, models.data)
    for key in ASKED_BEFORE:
        # Of so few facts the original knows those of the world less well than the retrained model.
        expected = original if key == "world_nll" else gold
        assert abs(found[key] - expected[key]) <= CLOSE, key


@pytest.mark.parametrize("name", HIDING)
def test_controls_that_hide_are_seen_through(
    name: str, gold: dict[str, Any], unlearned: Unlearned
) -> None:
    assert unlearned(name)[TAUGHT] > gold[TAUGHT] + SEEN


def test_less_is_hidden_where_the_objective_is_that_at_a_relearned_copy(
    unlearned: Unlearned,
) -> None:
    before, after = unlearned("select"), unlearned("select-relearned")
    assert after[TAUGHT] <= before[TAUGHT] - LESS
    assert after["retain_nll"] <= CLOSE
    assert after["forget_nll"] == pytest.approx(before["forget_nll"])
