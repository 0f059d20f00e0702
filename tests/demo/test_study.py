"""A plan says what is run; a run ends at its levels, whatever the variant."""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from geffect import StopWhen, open_run
from geffect.demo import language_model as lm
from geffect.demo.config import QUICK
from geffect.demo.corpus import UNKNOWN, Size, generate
from geffect.demo.data import Data
from geffect.demo.edits import EDITS
from geffect.demo.findings import KEEPING, shares
from geffect.demo.hiding import HIDING
from geffect.demo.jobs import KINDS, Editing, Kept, Probing, Training, Unlearning
from geffect.demo.levels import Rising
from geffect.demo.measures import measure
from geffect.demo.methods import (
    EQUAL,
    FEW,
    HIDES,
    METHODS,
    RATES,
    RETAIN_SETS,
    RIVALS,
    SETS,
    VARIANTS,
    RunSpec,
)
from geffect.demo.plan import Plan
from geffect.demo.study import claim, run_study, whole
from geffect.demo.unlearning import unlearn
from geffect.demo.workers import Job, Say
from geffect.edits import CATALOGUE, named, options_of
from tests.utils.subject import TINY

EVERY = VARIANTS | RETAIN_SETS | RIVALS | HIDING
STUDY = Plan(all_variants=True, controls=True)

Unlearn = Callable[..., dict[str, Any]]


def test_a_look_is_a_part_of_the_study() -> None:
    look, comparison = (Plan(all_variants=every).specs() for every in (False, True))
    assert set(look) < set(comparison) < set(STUDY.specs())
    assert {spec.part for spec in comparison} == {EQUAL}
    assert set(look) < set(Plan(controls=True).specs()) < set(STUDY.specs())
    assert [spec.name for spec in Plan(quick=True).specs()] == [
        "ga-plain", "ga-gru", "ga-gru-update", "ga-gru-coordinate", "ga-select"
    ]  # fmt: skip


def test_a_study_runs_every_method_in_every_variant_with_both_feeds() -> None:
    specs = STUDY.specs()
    assert len({spec.name for spec in specs}) == len(specs)
    for part, heldout in ((EQUAL, 4), (FEW, 15)):
        run = {(c.method, c.variant): c for c in specs if c.part == part}
        assert run.keys() == {(method, variant) for method in METHODS for variant in VARIANTS}
        assert {spec.heldout for spec in run.values()} == {heldout}
        assert all(c.learning_rate == VARIANTS[c.variant].learning_rates[0] for c in run.values())
    assert {spec.variant for spec in specs if spec.part == SETS} == set(RETAIN_SETS)


def test_named_variants_and_rivals_are_run_alone_by_every_method() -> None:
    named = Plan(methods=("ga", "npo"), named=("sago", "hamu", "gu"))
    assert [(spec.method, spec.variant) for spec in named.specs()] == [
        (method, variant) for method in ("ga", "npo") for variant in ("sago", "hamu", "gu")
    ]
    assert {named.levels(spec) for spec in named.specs()} == {("forget_nll", "value_nll")}
    controlled = replace(named, controls=True).specs()
    assert {s.variant for s in controlled if s.part in (FEW, RATES)} == {"sago", "hamu", "gu"}
    assert {s.variant for s in controlled if s.part == SETS} == set(RETAIN_SETS)
    for spec in controlled:
        assert named.variant(spec) is EVERY[spec.variant]
    assert not {spec.variant for spec in STUDY.specs()} & set(RIVALS)
    assert not set(VARIANTS) & set(RIVALS)
    for names, said in ((("hamo",), "`hamo`.*hamu.*Choose"), (("gu", "gu"), "each once.*`gu`")):
        with pytest.raises(ValueError, match=f"`variants` should be some of .*{said}"):
            Plan(named=names)


def test_edits_are_made_in_every_seed() -> None:
    plan = Plan(seeds=(0, 1), methods=("ga",), named=("plain",), edits=("ssd", "newton"))
    assert plan.weight == Plan(seeds=(0, 1), methods=("ga",), named=("plain",)).weight + 8.0
    for names, said in ((("newtn",), "`newtn`.*newton.*Choose"), (("mix", "mix"), "each once")):
        with pytest.raises(ValueError, match=f"`edits` should be some of .*{said}"):
            Plan(edits=names)
    assert {studied.edit for studied in EDITS.values()} <= {*CATALOGUE}
    for studied in EDITS.values():
        edit = named(studied.edit, studied.options)
        assert studied.strength in options_of(edit)
        assert (studied.state,) == edit.states or not (studied.state or edit.states)


def test_a_study_with_edits_counts_and_resumes_them(tmp_path: Path) -> None:
    plan = Plan(methods=("ga",), named=("plain",), edits=("mix",), resume=True, quick=True)
    claim(tmp_path, plan)
    jobs: list[Job] = [
        *(Training(tmp_path, 0, kind, QUICK) for kind in KINDS),
        *(Probing(tmp_path, 0, kind, QUICK) for kind in KINDS),
        Editing(tmp_path, 0, "mix", EDITS["mix"], 3.0, QUICK),
    ]
    for job in jobs:
        kept = {"job": repr(job), "result": {"forget_nll": 3.0, "value_nll": 3.0}}
        (tmp_path / "results" / f"{job.name}.json").write_text(json.dumps(kept))
    assert whole(tmp_path, plan) == (5, 6)
    claim(tmp_path, plan)
    with pytest.raises(ValueError, match="Found a result of another: edit-mix-seed0"):
        claim(tmp_path, replace(plan, edits=()))


def test_nothing_is_reported_of_no_study(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="Found none in"):
        run_study(tmp_path / "none", Plan(quick=True, so_far=True), lambda _: None)
    assert not (tmp_path / "none").exists()


def test_every_variant_is_run_at_three_learning_rates_and_with_both_feeds() -> None:
    rates: dict[tuple[str, int], set[float]] = {}
    for spec in STUDY.specs():
        if spec.method == "ga" and spec.part not in (SETS, HIDES):
            rates.setdefault((spec.variant, spec.heldout), set()).add(spec.learning_rate)
    assert rates.keys() == {(variant, heldout) for variant in VARIANTS for heldout in (4, 15)}
    for (variant, heldout), of_variant in rates.items():
        assert len(set(VARIANTS[variant].learning_rates)) == 3
        several = heldout == 4  # with many facts that feed the retain gradient
        assert of_variant == set(VARIANTS[variant].learning_rates[: 3 if several else 1])


@dataclass(frozen=True)
class Counted:
    """A job that says how often it was run."""

    size: int
    ran: list[int] = field(repr=False)
    name: str = "count"
    stage: str = "train"
    weight: float = 1.0

    def run(self, say: Say) -> dict[str, int]:
        self.ran.append(self.size)
        return {"size": self.size}


def test_a_study_that_is_resumed_runs_no_job_twice(tmp_path: Path) -> None:
    ran: list[int] = []

    def result(size: int, *, resume: bool) -> Any:
        return Kept(Counted(size, ran), tmp_path, resume).run(lambda done, says: None)

    assert result(1, resume=True) == result(1, resume=True) == {"size": 1}
    assert ran == [1]
    assert result(2, resume=True) == {"size": 2}  # another job, though of the same name
    assert result(2, resume=False) == {"size": 2}
    assert ran == [1, 2, 2]
    jobs = [Unlearning(tmp_path, 0, c, STUDY.variant(c), {}, TINY) for c in STUDY.specs()]
    assert len({repr(job) for job in jobs}) == len(jobs)
    assert " at 0x" not in "".join(map(repr, jobs))


@pytest.fixture(scope="module")
def run(subject: tuple[PreTrainedModel, Data], tmp_path_factory: pytest.TempPathFactory) -> Unlearn:
    """A function that unlearns with a copy of the tiny model, and says what became of it."""
    folder = tmp_path_factory.mktemp("runs")

    def run(method: str, variant: str, levels: dict[str, float], **changed: Any) -> dict[str, Any]:
        model, data = copy.deepcopy(subject[0]), subject[1]
        rate = changed.pop("learning_rate", 1e-3)
        file = folder / f"{method}-{variant}.h5"
        result = unlearn(
            model,
            data,
            RunSpec(FEW, method, variant, rate, 1),
            EVERY[variant],
            replace(TINY.unlearning, **changed),
            levels,
            file,
            lambda step, nll: None,
        )
        return result | {"model": model, "file": file}

    return run


def test_what_is_drawn_of_a_set_does_not_depend_on_the_others(
    subject: tuple[PreTrainedModel, Data],
) -> None:
    data = replace(subject[1], seed=3)
    alone = list(islice(data.draws({"retain": 5}), 3))
    beside = list(islice(data.draws({"forget": 2, "retain": 5, "world": 4}), 3))
    for a, b in zip(alone, beside, strict=True):
        assert torch.equal(a["retain"]["input_ids"], b["retain"]["input_ids"])
    other = next(replace(data, seed=4).draws({"retain": 5}))["retain"]["input_ids"]
    assert not torch.equal(other, alone[0]["retain"]["input_ids"])


def test_alternates_are_drawn_with_the_answers_to_the_same_questions() -> None:
    corpus = generate(0, Size(authors=4, forget=1, heldout=1, world=4))
    data = Data.of(corpus, lm.train_tokenizer(corpus), seed=3)
    alone = islice(data.draws({"forget": 3}), 4)
    both = islice(data.draws({"forget": 3}, ("forget", "forget.alternate")), 4)
    for original, drawn in zip(alone, both, strict=True):
        forget: Any = drawn["forget"]
        assert torch.equal(forget["original"]["input_ids"], original["forget"]["input_ids"])
        texts = [
            [data.tokenizer.decode(row).split("<sep>") for row in forget[answer]["input_ids"]]
            for answer in ("original", "alternate")
        ]
        for (asked, answer), (again, unknown) in zip(*texts, strict=True):
            assert asked == again and answer != unknown
            assert unknown.replace("<eos>", "").replace("<pad>", "").strip() in UNKNOWN


def test_a_run_goes_on_until_both_levels_are_crossed(run: Unlearn) -> None:
    levels = {"forget_nll": 1.0, "forget_es": 0.25}
    result = run("ga", "plain", levels)
    assert result["at_level"]["forget_nll"] == pytest.approx(1.0)
    assert result["at_es"]["forget_es"] == pytest.approx(0.25)
    last = max(result["at_level"]["step"], result["at_es"]["step"])
    assert last + TINY.unlearning.steps_beyond <= result["steps"] < TINY.unlearning.most_steps
    short = run("ga", "plain", {"forget_nll": 1.0})
    assert short["at_level"] == result["at_level"]
    assert short["at_es"] is None


@pytest.mark.parametrize("method", ["wga", "npo+gd"])
def test_a_rule_of_the_level_stops_where_the_study_interpolates(method: str, run: Unlearn) -> None:
    """Within two steps, as the batches of a run tell it; and that saves retain data."""
    result = run(method, "plain", {"forget_nll": 2.0}, steps_beyond=3, curve_every=1)
    stop = StopWhen(level=2.0).would_stop(open_run(result["file"]))
    assert stop is not None and stop.clause == "level"
    updates = stop.step + 1
    assert abs(updates - result["at_level"]["step"]) <= 2
    retain = result["curve"]["retain_nll"]
    assert retain[updates] <= retain[-1]


def test_a_level_that_is_not_reached_has_no_values(run: Unlearn) -> None:
    result = run("ga", "plain", {"forget_nll": 1e3}, most_steps=2)
    assert (result["reached_level"], result["at_level"], result["steps"]) == (False, None, 2)


def test_a_run_that_comes_no_nearer_ends(run: Unlearn) -> None:
    result = run("sku", "plain", {"forget_nll": 1e3}, patience=3)
    assert (result["reached_level"], result["steps"]) == (False, 3)
    assert result["highest_forget_nll"] == max(result["curve"]["forget_nll"]) < 10
    assert result["curve"]["step"][-1] == 3


def test_what_rises_by_a_hundredth_of_the_level_goes_on() -> None:
    rising = Rising(level=1.0, mark=0.0, patience=2, highest=0.0)
    # A step below the mark and one above it by less count as standing still.
    steps = [(0.011, True), (0.02, True), (0.0215, True), (0.03, True), (0.02, False)]
    assert [rising.goes_on(nll) for nll, _ in steps] == [goes_on for _, goes_on in steps]
    assert rising.highest == 0.03


def test_what_is_measured_at_a_level_lies_between_two_steps(
    run: Unlearn, subject: tuple[PreTrainedModel, Data]
) -> None:
    """The naive twin: plain gradient ascent, with all there is measured at every step."""
    model, data = copy.deepcopy(subject[0]), subject[1]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    batches = data.draws({"forget": 5, "retain": 5})
    points = [measure(model, data)]
    while points[-1]["forget_nll"] < 1.0:
        batch = next(batches)["forget"]
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1)
        (-torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten())).backward()
        optimizer.step()
        optimizer.zero_grad()
        points.append(measure(model, data))
    result = run("ga", "plain", {"forget_nll": 1.0}, steps_beyond=0)
    assert result["steps"] == len(points) - 1
    before, after = points[-2:]
    share = (1.0 - before["forget_nll"]) / (after["forget_nll"] - before["forget_nll"])
    assert result["at_level"]["step"] == pytest.approx(len(points) - 2 + share, rel=1e-4)
    for name in after:
        expected = before[name] + share * (after[name] - before[name])
        assert result["at_level"][name] == pytest.approx(expected, rel=1e-3, abs=1e-6)
    # Looking at the step before has left the model where it was.
    for name, value in measure(result["model"], data).items():
        assert value == pytest.approx(after[name], rel=1e-3, abs=1e-6)


def test_the_step_is_constrained_where_a_rule_projects_it() -> None:
    projected = [
        name
        for name, variant in EVERY.items()
        if variant.options.get("space") == "update" and variant.rule() is not None
    ]
    assert sorted(KEEPING) == sorted(projected)


@pytest.fixture(scope="module")
def plain(run: Unlearn) -> dict[str, Any]:
    return run("npo+gd", "plain", {"forget_nll": 1e3}, most_steps=4)


@pytest.mark.parametrize("variant", [name for name in EVERY if name != "plain"])
def test_every_variant_takes_its_steps(variant: str, run: Unlearn, plain: dict[str, Any]) -> None:
    result = run("npo+gd", variant, {"forget_nll": 1e3}, most_steps=4)
    violating = shares(result["file"])["share_update_violating"]
    assert 0 <= violating <= 1
    if variant in KEEPING:
        assert violating == 0
    assert result["steps"] == plain["steps"] == 4
    assert result["curve"]["forget_nll"] != plain["curve"]["forget_nll"]


def test_a_rule_that_adds_the_retain_gradient_takes_the_place_of_a_retain_term(
    run: Unlearn,
) -> None:
    levels = {"forget_nll": 1e3}
    one, other = (run(m, "sago", levels, most_steps=3)["curve"] for m in ("ga", "graddiff"))
    assert one == other
    assert run("graddiff", "gru", levels, most_steps=3)["curve"] != other


def test_answers_are_scored_as_the_subject_encodes_them(
    subject: tuple[PreTrainedModel, Data],
) -> None:
    model, data = subject
    facts = generate(0, TINY.corpus).retain
    assert measure(model, data)["retain_nll"] == pytest.approx(
        lm.nll(model, [lm.encode(data.tokenizer, facts)]), rel=1e-5
    )
