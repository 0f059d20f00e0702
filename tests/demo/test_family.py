"""The study of a family, on one of six: what is measured, and what the page says of it."""

import json
import math
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from geffect import open_run
from geffect.demo import deep
from geffect.demo import family_page as page
from geffect.demo import language_model as lm
from geffect.demo.config import EmbeddedConfig
from geffect.demo.family import (
    END,
    GROUPS,
    LIVES,
    LOST,
    MINIMAL,
    NEAR,
    REST,
    Facts,
    FamilyConfig,
    alter,
    spread,
)
from geffect.demo.family_jobs import Forgetting, Learning, Relating, Restoring
from geffect.demo.family_study import METHODS, FamilyPlan, claim
from geffect.evaluation import deep_unlearning
from geffect.evaluation.edu_relat import Family, read
from geffect.layers import trainable
from tests.utils.command_line import Ask
from tests.utils.family import write_family

TINY = FamilyConfig(
    subject=EmbeddedConfig(layers=1, hidden=32, heads=2, epochs=120, batch=8, learning_rate=1e-2),
    targets=2,
    learning_rate=2e-3,
    most_steps=10,
    sampled=3,
    width=256,
    altered=3,
    corrupting_epochs=10,
    restoring_steps=3,
)


def silent(done: float, says: str) -> None:
    """Nobody is told how far it is."""


@dataclass(frozen=True)
class Studied:
    """A study that was run job by job in this process."""

    data: Path
    out: Path
    learned: dict[str, Any]
    targets: list[dict[str, Any]]
    restored: list[dict[str, Any]]
    cosines: dict[str, Any]

    @property
    def of(self) -> tuple[Path, Path, int, FamilyConfig]:
        return self.out, self.data, 0, TINY

    @property
    def summary(self) -> dict[str, Any]:
        config = {"subject": {"layers": 2, "hidden": 32}, "sampled": 3, "altered": 3, "width": 256}
        return {
            "versions": {"geffect": "0.1.0"},
            "seed": 0,
            "config": config,
            "learned": self.learned,
            "cosines": self.cosines,
            "restored": self.restored,
            "targets": self.targets,
        }


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> Studied:
    out = tmp_path_factory.mktemp("study")
    data = write_family(out / "data")
    claim(out, FamilyPlan(data))
    of = (out, data, 0, TINY)
    learned = Learning(*of).run(silent)
    return Studied(
        data,
        out,
        learned,
        [Forgetting(*of, target).run(silent) for target in (0, 1, 2)],
        [Restoring(*of, method).run(silent) for method in METHODS],
        Relating(*of).run(silent),
    )


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return read(write_family(tmp_path_factory.mktemp("family")))


def test_the_family_is_learned(studied: Studied) -> None:
    assert studied.learned == {"relationships": 1.0, "biographies": 1.0}


def test_groups_share_no_fact_and_near_is_one_instance_away(family: Family) -> None:
    facts = Facts(family)
    members = [
        {int(h), *map(int, b)}
        for h, b in zip(family.closure.head, family.closure.body, strict=True)
    ]
    for target in family.targets:
        groups = facts.groups(target.fact, target.minimal_sets[0], 3, seed=0)
        every = [fact for chosen in groups.values() for fact in chosen]
        assert len(set(every)) == len(every) and target.fact not in every
        assert {*groups.get(MINIMAL, [])} == {*target.minimal_sets[0]} - {target.fact}
        beside = {f for m in members if target.fact in m for f in m} - {target.fact}
        near = {f for f in beside if f < len(family.triples)} - {*target.minimal_sets[0]}
        assert {*groups.get(NEAR, [])} == near
        assert all(f >= len(family.triples) for f in groups[LIVES]) and len(groups[REST]) == 3


def test_targets_are_spread_over_relations(family: Family) -> None:
    same = replace(family, targets=(*family.targets, *family.targets))
    assert spread(same, 3) == [0, 1, 2]
    assert spread(same, 4) == [0, 1, 2, 3]
    assert spread(same, 99) == [0, 1, 2, 3, 4, 5]


def test_an_altered_answer_is_neither_the_true_one_nor_the_third(family: Family) -> None:
    words = alter(family, 5, seed=1)
    assert len(words) == 5 and words == alter(family, 5, seed=1) != alter(family, 5, seed=2)
    for fact, (false, third) in words.items():
        assert len({family.relationships[fact].answer, false, third}) == 3
        assert {false, third} <= {*family.relations}


def test_a_run_is_looked_at_where_the_target_is_lost_and_at_its_end(studied: Studied) -> None:
    """The same steps taken by hand, with every answer asked for after each."""
    job = Forgetting(*studied.of, 0)
    known, family = job.known(), read(studied.data)
    target, said = family.targets[0], studied.targets[0]
    model, everything = job.model(), range(len(known.facts.all))
    optimizer = torch.optim.AdamW(model.parameters(), lr=TINY.learning_rate, weight_decay=0.0)
    row = lm.encode(known.tokenizer, [known.facts.all[target.fact]])
    lost = None
    for step in range(1, TINY.most_steps + 1):
        output = model(input_ids=row["input_ids"]).logits[0, :-1].log_softmax(-1)
        labels = row["labels"][0, 1:]
        scored = labels != -100
        output[scored, labels[scored]].mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        right = known.right(model, everything)
        report = deep_unlearning(family, target, right[: len(family.triples)], [True] * 12)
        lost = step if lost is None and not right[target.fact] else lost
        if report.succeeded:
            break
    assert said["points"][END]["step"] == step
    assert said["points"][END]["recall"] == pytest.approx(report.recall)
    assert said["points"][END]["succeeded"] == report.succeeded
    assert said["points"].get(LOST, {}).get("step") == lost


def test_effects_are_what_autograd_says(studied: Studied) -> None:
    """-<grad R, displacement> of the first step, for every group."""
    job, said = Forgetting(*studied.of, 0), studied.targets[0]
    known, target = job.known(), read(studied.data).targets[0]
    model, before = job.model(), job.model()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=TINY.learning_rate, weight_decay=0.0, fused=True
    )
    (-deep.nll(model, known.rows([target.fact]))).backward()
    optimizer.step()
    groups = known.facts.groups(target.fact, said["minimal_set"], 3, seed=0)
    assert said["groups"] == {name: len(facts) for name, facts in groups.items()}
    for name, facts in groups.items():
        before.zero_grad()
        deep.nll(before, known.rows(facts)).backward()
        expected = -sum(
            ((new - old) * old.grad).sum().item()
            for new, old in zip(trainable(model).values(), trainable(before).values(), strict=True)
        )
        found = [e["value"] for e in said["effects"] if e["risk"] == name and e["step"] == 1]
        assert math.fsum(found) == pytest.approx(expected, rel=1e-3, abs=1e-8)


def test_what_is_recorded_is_the_run_that_was_looked_at(studied: Studied) -> None:
    run = open_run(studied.out / "runs" / "target0-seed0.h5")
    assert len(run.steps) == studied.targets[0]["points"][END]["step"]
    assert {*studied.targets[0]["groups"]} < {*run.sources}
    assert run.losses()["forget"][-1] > run.losses()["forget"][0]


def test_cosines_by_distance_are_those_of_gradients(studied: Studied) -> None:
    job = Relating(*studied.of)
    known, model = job.known(), job.model()
    gradients = []
    count = len(known.facts.family.triples)
    for fact in range(count):
        model.zero_grad()
        deep.nll(model, known.rows([fact])).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    closure = known.facts.family.closure
    by_distance: dict[float, list[float]] = {}
    for a, b in product(range(count), repeat=2):
        if a < b and np.isfinite(closure.distances(a)[b]):
            angle = torch.cosine_similarity(gradients[a], gradients[b], dim=0).item()
            by_distance.setdefault(closure.distances(a)[b], []).append(angle)
    rows = {row["distance"]: row for row in studied.cosines["rows"]}
    assert {d: row["pairs"] for d, row in rows.items()} == {
        int(d): len(angles) for d, angles in by_distance.items()
    }
    for distance, angles in by_distance.items():
        assert rows[int(distance)]["cosine"] == pytest.approx(np.mean(angles), abs=0.15)
    r, low, high = (studied.cosines[name] for name in ("r", "low", "high"))
    assert len(by_distance) > 1 and low <= high and -1 <= r <= 1


def test_restoring_starts_from_what_is_false(studied: Studied) -> None:
    for said in studied.restored:
        states = said["states"]
        assert states["clean"]["answers_true"] == 1.0
        assert states["corrupted"]["log_p_false"] > states["clean"]["log_p_false"]
        assert states["corrupted"]["log_p_true"] < states["clean"]["log_p_true"]
        assert states["unlearned"]["log_p_false"] < states["corrupted"]["log_p_false"]
        assert len(said["effects"]) == len(said["curve"]) == 3
        last = said["curve"][-1]
        assert said["recovery"]["model"] == {n: last[n] for n in ("cosine", "residual")}
        for effect in said["effects"]:
            restores = effect["false"] < 0 and effect["true"] > 0
            assert (effect["verdict"] == "restorative") == restores


def test_the_page_says_what_the_summary_holds(studied: Studied) -> None:
    text = page.family_page(studied.summary)
    for target in studied.targets:
        end = target["points"][END]
        assert (
            f"| {target['relation']} | {len(target['minimal_set'])} | end | {end['step']} |" in text
        )
    assert "It then answers\n100.0 % of the relationships" in text
    assert all(f"unlearned by {method}" in text for method in METHODS)
    assert text == page.family_page(json.loads(json.dumps(studied.summary)))
    nothing = {**studied.summary, "cosines": {"rows": [], "r": None, "low": None, "high": None}}
    assert "over all pairs: none, none to none" in page.family_page(nothing)


def test_claims_hold_where_the_interval_has_their_sign() -> None:
    rng = np.random.default_rng(0)

    def target(effect: float, recall: float) -> dict[str, Any]:
        point = {"step": 2, "recall": recall, "accuracy_relationships": 1.0}
        point |= {"accuracy_biographies": float(rng.random())}
        effects = [
            {"step": step, "layer": "layer 0", "risk": risk, "value": value}
            for risk in GROUPS
            for step, value in ((1, effect), (2, effect), (3, 100.0))
        ]
        return {"points": {END: point}, "effects": effects, "groups": dict.fromkeys(GROUPS, 1)}

    targets = [target(-x, x + 0.01 * rng.normal()) for x in rng.random(20)]
    assert page.summed(targets[0], MINIMAL, END) == 2 * targets[0]["effects"][0]["value"]
    found = {(claim, point): (c, holds) for claim, point, c, holds in page.claims(targets)}
    said, holds = found[page.CLAIMS[0][2], page.POINTS[END]]
    assert holds and said.r < -0.9 and said.count == 20
    turned = [target(x, x + 0.01 * rng.normal()) for x in rng.random(20)]
    assert not {(c[0], c[1]): c[3] for c in page.claims(turned)}[page.CLAIMS[0][2], "end"]
    assert math.isnan(found[page.CLAIMS[2][2], page.POINTS[END]][0].r)
    assert found[page.CLAIMS[0][2], page.POINTS[LOST]][0].count == 0


# Folders and the command line


def test_a_folder_with_another_study_is_refused(tmp_path: Path) -> None:
    plan = FamilyPlan(tmp_path)
    (tmp_path / "summary.json").write_text('{"runs": []}', encoding="utf-8")
    with pytest.raises(FileExistsError, match=r"Found `.*summary\.json`"):
        claim(tmp_path, plan)
    for how in ("resume", "overwrite"):
        with pytest.raises(FileExistsError, match="Found another study"):
            claim(tmp_path, replace(plan, **{how: True}))
    (tmp_path / "summary.json").write_text('{"data": "edu_relat"}', encoding="utf-8")
    claim(tmp_path, replace(plan, overwrite=True))
    assert not (tmp_path / "summary.json").exists()
    with pytest.raises(FileExistsError, match="Found the file"):
        claim(write_family(tmp_path / "data") / "rules.json", plan)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--data", "edu_relat"], 2, "`--data` should go with `--data-folder`"),
        (["--data-folder", "{here}"], 2, "`--data-folder` should go with `--data`"),
        (["--data", "tofu", "--data-folder", "{here}"], 2, "Found `tofu`"),
        (["--data", "edu_relat", "--data-folder", "{here}/no"], 1, "Found no folder there"),
        (["--data", "edu_relat", "--data-folder", "{here}"], 1, "Found no people.json"),
        (["--data", "edu_relat", "--data-folder", "{here}", "--quick"], 2, "without"),
        (["--data", "edu_relat", "--data-folder", "{here}", "--seeds", "0,1"], 2, "one seed"),
        (["--data", "edu_relat", "--data-folder", "{here}", "--beta", "1"], 2, "Leave them out"),
    ],
)
def test_what_is_asked_wrongly_is_refused_before_a_folder_is_made(
    ask: Ask, tmp_path: Path, arguments: list[str], code: int, said: str
) -> None:
    out = tmp_path / "out"
    answer = ask("demo", *(a.format(here=tmp_path) for a in arguments), "--out", out)
    assert (answer.code, said in answer.err) == (code, True), answer.err
    assert not out.exists()
