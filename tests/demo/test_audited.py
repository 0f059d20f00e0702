"""What an audit says of the models of a study, beside an audit of the same models."""

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from transformers import PreTrainedModel

from geffect.audit.beside import Beside
from geffect.audit.verdict import EXIT_CODES
from geffect.demo import audited
from geffect.demo.audited import BATTERIES, BENIGN, audited_sets
from geffect.demo.corpus import generate
from geffect.demo.jobs import KINDS, Kept, Probing, Reading, Training, Unlearning
from geffect.demo.methods import EQUAL, VARIANTS, RunSpec
from geffect.demo.plan import Plan
from geffect.demo.study import claim, whole
from geffect.demo.workers import Job
from tests.utils.models import bits
from tests.utils.subject import TINY

SMALL = replace(TINY, few_heldout=1)
BUDGET = replace(audited.BUDGET, taught=(1,), kept=4, said=2)
"""What stays is looked at less than in a study: here an audit is held against another one."""


@pytest.fixture(scope="module", autouse=True)
def _budget() -> Iterator[None]:
    with patch.object(audited, "BUDGET", BUDGET):
        yield


def say(done: float, says: str) -> None:
    """Nobody listens."""


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study whose models are trained and read."""
    out = tmp_path_factory.mktemp("study")
    claim(out, Plan(methods=("ga",), named=("plain",), subject=SMALL, audit=True))
    jobs: list[Job] = [Training(out, 0, kind, SMALL) for kind in KINDS]
    jobs += [*(Probing(out, 0, kind, SMALL) for kind in KINDS), Reading(out, 0, SMALL)]
    for job in jobs:
        Kept(job, out / "results", resume=True).run(say)
    return out


def test_the_model_at_the_level_is_audited(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    level = json.loads((out / "results" / "gold-seed0.json").read_text())["result"]["forget_nll"]
    spec = RunSpec(EQUAL, "ga", "plain", 3e-3, 1)
    job = Unlearning(out, 0, spec, VARIANTS["plain"], {"forget_nll": level}, SMALL, audit=True)
    models: list[PreTrainedModel] = []
    of_all = Beside.audited

    def seen(self: Beside, model: Any, *others: Any) -> Any:
        before = bits(model)
        found = of_all(self, model, *others)
        assert bits(model) == before
        models.append(copy.deepcopy(model))
        return found

    monkeypatch.setattr(Beside, "audited", seen)
    at_level = job.run(say)["at_level"]
    monkeypatch.undo()
    (model,) = models
    original, retrained = (SMALL.load(out / "models" / f"{kind}-seed0") for kind in KINDS)
    sets = audited_sets(generate(0, SMALL.corpus), original[1], 0)
    rate = SMALL.unlearning.relearning_rate
    beside = Beside(original[0], retrained[0], sets, rate, BUDGET, BATTERIES)
    verdict, table = beside.audited(model)
    own = table[(table["model"] == "unlearned") & (table["battery"] == "recoverable share")]
    shares = own.set_index("metric")["value"]
    assert at_level["verdict"] == verdict.verdict and at_level["verdict"] in EXIT_CODES
    assert at_level["audit_attack"] == verdict.attack
    for name, attack in (("benign", BENIGN), ("swap", "decoder swap"), ("most", verdict.attack)):
        assert at_level[f"audit_{name}"] == pytest.approx(shares[attack], abs=1e-6)


def test_a_plan_with_an_audit_reads_each_seed_first(out: Path) -> None:
    plan = Plan(methods=("ga",), named=("plain",), subject=SMALL, audit=True, resume=True)
    without = replace(plan, audit=False)
    assert plan.jobs == without.jobs + 1 and plan.weight == without.weight + Reading.weight
    assert whole(out, plan) == (5, 6)
    claim(out, plan)
    with pytest.raises(ValueError, match="Found a result of another: audit-seed0"):
        claim(out, without)
