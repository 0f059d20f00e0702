"""EDU-RELAT: the closure, its minimal sets and the evaluator, against loops that are naive."""

import json
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from geffect.evaluation import Family, Rule, Target, Triple, close, deep_unlearning, minimal_sets
from geffect.evaluation.edu_relat import Asked, read
from geffect.evaluation.minimal_sets import find, follows, is_minimal

SHARED = Path(__file__).parents[3] / "shared" / "data" / "edu_relat"
with_data = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data are not there")

# fmt: off
FATHER_IS_PARENT = Rule(((0, "father", 1),), (1, "child", 0))
CHILDREN = Rule(((0, "child", 1), (0, "child", 2)), (1, "brother", 2))
SYMMETRIC = Rule(((0, "brother", 1),), (1, "brother", 0))
# fmt: on
RULES = (FATHER_IS_PARENT, CHILDREN, SYMMETRIC)
FACTS: tuple[Triple, ...] = ((1, "father", 0), (0, "child", 2), (3, "father", 0), (2, "brother", 1))


def two_people(triple: Triple) -> bool:
    return triple[0] != triple[2]


def naive_instances(
    facts: Iterable[Triple], rules: Sequence[Rule], people: int
) -> tuple[set[Triple], set[tuple[int, Triple, tuple[Triple, ...]]]]:
    """Closure and instances, from every assignment of people to variables."""
    known = set(facts)
    while True:
        found = set()
        for index, rule in enumerate(rules):
            variables = sorted({v for a, _, b in (*rule.body, rule.head) for v in (a, b)})
            for people_of in product(range(people), repeat=len(variables)):
                to = dict(zip(variables, people_of, strict=True))
                body = tuple((to[a], r, to[b]) for a, r, b in rule.body)
                head = (to[rule.head[0]], rule.head[1], to[rule.head[2]])
                if all(t in known for t in body) and two_people(head):
                    found.add((index, head, body))
        news = {head for _, head, _ in found} - known
        if not news:
            return known, found
        known |= news


def naive_follows(closure: Any, target: int, deleted: Iterable[int]) -> bool:
    """One instance at a time, until nothing is new."""
    holds = set(range(closure.facts)) - set(deleted)
    while True:
        news = {
            int(head)
            for head, body in zip(closure.head, closure.body, strict=True)
            if {*body.tolist()} <= holds
        } - holds
        if not news:
            return target in holds
        holds |= news


def small_family() -> Family:
    asked = tuple(Asked(a, f"Who is {b} to {a}?", r) for a, r, b in FACTS)
    sets = tuple(minimal_sets(close(FACTS, RULES, two_people), 3, range(20)))
    return Family(
        is_male=(True,) * 4,
        triples=FACTS,
        relationships=asked,
        biographies=asked[:2],
        rules=RULES,
        targets=(Target(3, "brother", sets),),
    )


def test_a_closure_has_every_instance_once() -> None:
    closure = close(FACTS, RULES, two_people)
    triples, instances = naive_instances(FACTS, RULES, people=4)
    assert closure.triples[: closure.facts] == FACTS
    assert set(closure.triples) == triples and len(closure.triples) == len(triples)
    found = [
        (rule, closure.triples[head], tuple(closure.triples[b] for b in body))
        for rule, head, body in zip(
            closure.rule.tolist(), closure.head.tolist(), closure.body.tolist(), strict=True
        )
    ]
    padded = {(r, head, body if len(body) == 2 else body * 2) for r, head, body in instances}
    assert set(found) == padded and len(found) == len(padded)


def test_a_variable_that_a_body_repeats_is_one_person() -> None:
    selfish = Rule(((0, "likes", 0),), (0, "proud of", 0))
    closure = close([(1, "likes", 2), (3, "likes", 3)], [selfish], lambda triple: True)
    assert closure.triples[2:] == ((3, "proud of", 3),)


def test_no_rule_and_no_fact_close_to_nothing_new() -> None:
    assert close(FACTS, (), two_people).triples == FACTS
    assert close((), RULES, two_people).triples == ()
    with pytest.raises(ValueError, match="each triple once"):
        close([*FACTS, FACTS[0]], RULES, two_people)


def test_what_follows_is_what_a_loop_finds() -> None:
    closure, rng = close(FACTS, RULES, two_people), random.Random(0)
    for target, _ in product(range(len(FACTS)), range(16)):
        deleted = rng.sample(range(len(FACTS)), rng.randrange(5))
        assert follows(closure, target, deleted) == naive_follows(closure, target, deleted)


def test_minimal_sets_are_all_that_a_search_of_all_subsets_finds() -> None:
    closure = close(FACTS, RULES, two_people)
    for target in range(len(FACTS)):
        subsets = [[i for i in range(4) if bits >> i & 1] for bits in range(16)]
        unlearns = [s for s in subsets if not naive_follows(closure, target, s)]
        least = {tuple(s) for s in unlearns if not any(set(o) < set(s) for o in unlearns)}
        assert set(minimal_sets(closure, target, range(40))) == least
        assert all(is_minimal(closure, target, s) for s in least)
    assert not is_minimal(closure, 3, [0, 1, 2, 3])
    with pytest.raises(ValueError, match="Found `target = 9`"):
        find(closure, 9, 0)


def test_distances_count_rule_instances() -> None:
    closure = close(FACTS, RULES, two_people)
    members = [{h, *b} for h, b in zip(closure.head.tolist(), closure.body.tolist(), strict=True)]
    for start in range(len(closure.triples)):
        far = {start: 0}
        while True:
            news = {
                (other, far[t] + 1) for t in far for m in members if t in m for other in m - {*far}
            }
            if not news:
                break
            nearest = min(steps for _, steps in news)
            far |= {t: steps for t, steps in news if steps == nearest}
        expected = [far.get(t, np.inf) for t in range(len(closure.triples))]
        assert closure.distances(start).tolist() == expected


# The evaluator


def naive_report(
    family: Family, target: Target, right: Sequence[bool], bio: Sequence[bool]
) -> list[tuple[float, ...]]:
    """Recall, both accuracies and their mean by size, of every minimal set."""
    found = []
    for chosen in target.minimal_sets:
        gone = [i for i in range(len(right)) if not right[i]]
        recall = sum(i in chosen for i in gone) / len(chosen)
        others = len(right) - len(chosen)
        relationships = 1 - sum(i not in chosen for i in gone) / others
        biographies = sum(bio) / len(bio)
        everything = (len(bio) * biographies + others * relationships) / (len(bio) + others)
        found.append((recall, relationships, biographies, everything))
    return found


def test_the_best_minimal_set_is_told_by_a_loop() -> None:
    family, rng = small_family(), random.Random(1)
    target = family.targets[0]
    for _ in range(50):
        right, bio = [rng.random() < 0.6 for _ in FACTS], [rng.random() < 0.5 for _ in range(2)]
        report = deep_unlearning(family, target, right, bio)
        rows = naive_report(family, target, right, bio)
        recall, relationships, biographies, everything = max(
            rows, key=lambda row: (round(row[0], 9), round(row[3], 9))
        )
        assert report.recall == pytest.approx(recall)
        assert report.accuracy_relationships == pytest.approx(relationships)
        assert report.accuracy_biographies == pytest.approx(biographies)
        assert report.accuracy == pytest.approx(everything)
        gone = [i for i, flag in enumerate(right) if not flag]
        assert report.succeeded != naive_follows(family.closure, target.fact, gone)


def test_ties_go_to_the_smaller_set_and_then_to_the_first() -> None:
    family = small_family()
    target = replace(family.targets[0], minimal_sets=((2, 3), (1, 3), (0, 1, 3)))
    nothing = deep_unlearning(family, target, [True] * 4, [True] * 2)
    assert (nothing.minimal_set, nothing.recall, nothing.succeeded) == ((1, 3), 0.0, False)
    # Recall is 1/2 for two of them: more is left beside the one that holds what is lost.
    one = deep_unlearning(family, target, [True, True, False, True], [True] * 2)
    assert (one.minimal_set, one.recall, one.accuracy_relationships) == ((2, 3), 0.5, 1.0)


def test_what_was_not_known_is_neither_unlearned_nor_lost() -> None:
    family = small_family()
    target, right = family.targets[0], [False, True, True, False]
    report = deep_unlearning(family, target, right, [True, True], right_before=right)
    assert (report.recall, report.accuracy, report.succeeded) == (0.0, 1.0, False)


@pytest.mark.parametrize("flags", [[True] * 3, [0.5] * 4, [[True]] * 4])
def test_flags_that_are_none_are_refused(flags: Any) -> None:
    family = small_family()
    with pytest.raises(ValueError, match="`relationships_right` should be 4 flags"):
        deep_unlearning(family, family.targets[0], flags, [True, True])


def test_a_target_without_minimal_sets_and_a_rule_without_body_are_refused() -> None:
    family = small_family()
    target = replace(family.targets[0], minimal_sets=())
    with pytest.raises(ValueError, match="Found none for the fact 3"):
        deep_unlearning(family, target, [True] * 4, [True] * 2)
    with pytest.raises(ValueError, match="should stand in the body"):
        Rule((), (0, "wife", 1))


# The data themselves


@pytest.fixture(scope="module")
def family() -> Family:
    return read(SHARED)


def parsed(name: str) -> Any:
    return json.loads((SHARED / name).read_text(encoding="utf-8"))


@with_data
def test_the_closure_is_the_published_one(family: Family) -> None:
    closure, published = family.closure, parsed("closure.json")
    expected = [tuple(triple) for triple in published["triples"]]
    assert (len(closure.triples), len(closure.head), closure.facts) == (562, 2141, 400)
    assert set(closure.triples) == set(expected)
    assert list(closure.triples[:400]) == expected[:400]
    instances = {
        (g["rule"], expected[g["head"]], frozenset(expected[b] for b in g["body"]))
        for g in published["groundings"]
    }
    found = {
        (rule, closure.triples[head], frozenset(closure.triples[b] for b in body))
        for rule, head, body in zip(
            closure.rule.tolist(), closure.head.tolist(), closure.body.tolist(), strict=True
        )
    }
    assert found == instances
    silent = {rule["id"] for rule in parsed("rules.json") if not rule["can_fire"]}
    assert set(range(48)) - set(closure.rule.tolist()) == silent


@with_data
def test_every_published_minimal_set_is_one_and_no_single_fact_is(family: Family) -> None:
    sets = [(target.fact, chosen) for target in family.targets for chosen in target.minimal_sets]
    assert len(sets) == 593
    assert all(is_minimal(family.closure, fact, chosen) for fact, chosen in sets)
    assert all(follows(family.closure, fact, [fact]) for fact in range(400))


@with_data
def test_the_search_finds_minimal_sets_of_the_published_sizes(family: Family) -> None:
    for target in family.targets[::11]:
        found = minimal_sets(family.closure, target.fact, range(30))
        assert all(is_minimal(family.closure, target.fact, chosen) for chosen in found)
        assert set(found) & set(target.minimal_sets)


@with_data
def test_the_worked_example_comes_out(family: Family) -> None:
    example = parsed("example_evaluation.json")
    report = deep_unlearning(
        family,
        family.targets[example["target_index"]],
        example["relationships_correct"],
        example["biographies_correct"],
    )
    assert report.recall == 0.75
    assert report.accuracy_relationships == pytest.approx(0.25, abs=1e-9)
    assert report.accuracy_biographies == pytest.approx(0.0233333, abs=1e-7)
    assert report.accuracy == pytest.approx(0.1522989, abs=1e-7)


# What is no EDU-RELAT


def test_a_folder_without_the_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="Found no folder there"):
        read(tmp_path / "nowhere")
    (tmp_path / "people.json").write_text("[]", encoding="utf-8")
    with pytest.raises(FileNotFoundError, match=r"Found no relationships\.json, biographies"):
        read(tmp_path)


@with_data
@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("people.json", lambda rows: rows[1:], "not numbered from 0"),
        ("people.json", lambda rows: {}, "0 entries"),
        ("people.json", lambda rows: [{**rows[0], "gender": "x"}, *rows[1:]], "KeyError: 'x'"),
        ("biographies.json", lambda rows: [{**rows[0], "person": 100}], "a person 100, of none"),
        ("relationships.json", lambda rows: [{**rows[0], "object": -1}], "a person 69 or -1"),
        ("relationships.json", lambda rows: [{**rows[0], "object": [1]}], "[1] for a number"),
        ("biographies.json", lambda rows: [{**rows[0], "qa_main": {}}], "KeyError: 'question'"),
        ("rules.json", lambda rows: [{**rows[0], "head": [0, "wife", 7]}], "stand in the body"),
        ("rules.json", lambda rows: [{**rows[0], "body": []}], "stand in the body"),
        ("targets.json", lambda rows: [{**rows[0], "fact_id": 1}], "for the target 1"),
        ("targets.json", lambda rows: [{**rows[0], "minimal_sets": []}], "no minimal set"),
        (
            "relationships.json",
            lambda rows: [rows[0], {**rows[0], "id": 1}],
            "a triple twice",
        ),
    ],
)  # fmt: skip
def test_files_with_something_else_are_refused(
    tmp_path: Path, name: str, damage: Any, said: str
) -> None:
    for file in SHARED.glob("*.json"):
        text = file.read_text(encoding="utf-8")
        if file.name == name:
            text = json.dumps(damage(json.loads(text)))
        (tmp_path / file.name).write_text(text, encoding="utf-8")
    with pytest.raises(
        ValueError, match=f"{name}` should be a file of EDU-RELAT .*{re.escape(said)}"
    ):
        read(tmp_path)
