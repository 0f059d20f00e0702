"""Every objective of the catalogue, wherever it can be named."""

import copy
import json
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from geffect import Recorder, Rectifier, open_run
from geffect.checkpoints.replay import replay
from geffect.demo.config import EmbeddedConfig, UnlearningConfig
from geffect.demo.corpus import Size, generate
from geffect.demo.data import Data
from geffect.demo.methods import FEW, METHODS, VARIANTS, RunSpec
from geffect.demo.plan import Plan
from geffect.demo.unlearning import unlearn
from geffect.objectives import (
    CATALOGUE,
    KL,
    NPO,
    REGULARISERS,
    RR,
    FrozenModel,
    GradDiff,
    Objective,
    Regularised,
    SimNPO,
    as_objective,
    named,
    names,
    options_of,
    provenance,
)
from geffect.objectives.table import page
from geffect.trainers.unlearning import UnlearningTrainer
from tests.utils import shallow as tiny
from tests.utils.command_line import Ask
from tests.utils.sides import batches_of, items_of, pair_of
from tests.utils.unlearning_runs import arguments

TINY = EmbeddedConfig(
    corpus=Size(authors=3, forget=1, heldout=1, world=4),
    unlearning=UnlearningConfig(forget_batch=2, retain_batch=2, most_steps=1, relearning_steps=1),
    layers=1, hidden=16, heads=2, epochs=1,
)  # fmt: skip

NAMES = [*CATALOGUE, *(f"npo+{name}" for name in REGULARISERS)]


LIKELY = {"likelihood-control": {"delta": 60.0}}
"""Options with which the answers of the tiny models are not done with at the start."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("catalogue") / "checkpoint-0"
    tiny.llama().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Data]:
    folder, corpus = tmp_path_factory.mktemp("subject"), generate(0, TINY.corpus)
    TINY.learn(folder, corpus, corpus.memorised, 0, lambda done, total: None)
    model, tokenizer = TINY.load(folder)
    return model, Data.of(corpus, tokenizer)


def kept(path: Path) -> dict[str, Any]:
    return dict(open_run(path).manifest["objective"])


@pytest.mark.parametrize(
    ("name", "option"),
    [
        (name, option)
        for name in [*CATALOGUE, *(f"ga+{added}" for added in REGULARISERS)]
        for option, default in options_of(named(name)).items()
        if not isinstance(default, bool)
    ],
)
@pytest.mark.parametrize(
    "value",
    [
        "0.1",
        True,
        float("nan"),
        float("inf"),
        np.bool_(True),
        np.float32(0.5),
        torch.tensor(0.5),
        [1],
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_option_that_is_no_number_is_refused(name: str, option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"`{option}` .* should be .* Found .* Pass"):
        named(name, {option: value})


@pytest.mark.parametrize("option", ["npo beta", "rmu layer", "pdu dual", "simnpo delta", "sku cap"])
def test_an_option_beyond_all_floats_is_refused(option: str) -> None:
    name, field = option.split()
    with pytest.raises(ValueError, match=rf"`{field}` .* should be .* Found .* Pass"):
        named(name, {field: 10**400})


@pytest.mark.parametrize("weight", ["1.0", True, float("nan"), 10**400, None])
def test_a_weight_that_is_no_number_is_refused(weight: Any) -> None:
    with pytest.raises(ValueError, match="should be finite numbers"):
        as_objective({"forget": -1.0, "retain": weight})


@pytest.mark.parametrize("name", NAMES)
def test_every_entry_is_replayed(name: str, checkpoint: Path, tmp_path: Path) -> None:
    sets = batches_of(named(name))
    further = {of: batches for of, batches in sets.items() if of not in ("forget", "retain")}
    run = replay(
        checkpoint, tmp_path / "run.h5", objective=name, forget=sets["forget"],
        retain=sets["retain"], risks=further,
    )  # fmt: skip
    needed = named(name).reference != "none"
    assert kept(run.path) == provenance(
        named(name), "checkpoint-0, the first checkpoint" if needed else None
    )
    assert torch.as_tensor(run.gram()).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_every_entry_is_trained(name: str, tmp_path: Path) -> None:
    """Watched, it ends as it would have without, bit for bit."""
    path, ends = tmp_path / "run.h5", []
    for recorder in (None, partial(Recorder, path=path)):
        sets, model = items_of(named(name), 4), tiny.llama(dropout=0.3)
        torch.manual_seed(0)
        UnlearningTrainer(
            model, arguments(tmp_path, max_steps=2), objective=name, forget=sets.pop("forget"),
            retain=sets, recorder=recorder,
        ).train()  # fmt: skip
        ends.append(dict(model.named_parameters()))
    assert all(torch.equal(p, ends[1][n]) for n, p in ends[0].items())
    needed = named(name).reference != "none"
    assert kept(path) == provenance(named(name), "a frozen copy of the model" if needed else None)


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_entry_is_rectified(name: str, tmp_path: Path) -> None:
    """What is stepped by opposes the retain risk no more, whatever the objective asked for."""
    path, sets = tmp_path / "run.h5", items_of(named(name), 4)
    model = tiny.llama()
    UnlearningTrainer(
        model, arguments(tmp_path, max_steps=2), objective=named(name, LIKELY.get(name)),
        forget=sets.pop("forget"), retain=sets, rectifier=Rectifier(model, ema=1.0),
        recorder=partial(Recorder, path=path),
    ).train()  # fmt: skip
    run = open_run(path)
    at = [*run.sources].index
    K = run.gram().sum(axis=1)
    assert (K[:, at("objective"), at("objective")] > 0).all()
    agree = K[:, at("retain"), at("rectified")]
    assert (agree >= -1e-6 * K[:, at("retain"), at("retain")]).all()


@pytest.mark.parametrize("name", NAMES)
def test_every_entry_is_studied(name: str, subject: tuple[nn.Module, Data], tmp_path: Path) -> None:
    path, (model, data) = tmp_path / "run.h5", subject
    assert name in {spec.method for spec in Plan(methods=(name,)).specs()}
    options = tuple(options_of(named(name)).items())
    result = unlearn(
        copy.deepcopy(model), data, RunSpec(FEW, name, "plain", 1e-3, 1, options),
        VARIANTS["plain"], TINY.unlearning, {"forget_nll": 1e3}, path, lambda step, nll: None,
    )  # fmt: skip
    needed = named(name).reference != "none"
    assert kept(path) == provenance(named(name), "a frozen copy of the model" if needed else None)
    assert result["steps"] == 1 and result["options"] == dict(options)
    assert "inverse confidence" in open_run(path).weights()


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_entry_is_documented(name: str) -> None:
    row = next(line for line in page().splitlines() if line.startswith(f"| `{name}` |"))
    for option, default in options_of(CATALOGUE[name]).items():
        assert f"`{option}` {default}" in row
    assert f"`{CATALOGUE[name]!r}`" in row


@pytest.mark.parametrize("name", REGULARISERS)
def test_every_regulariser_is_documented(name: str) -> None:
    row = next(line for line in page().splitlines() if line.startswith(f"| `+{name}` |"))
    regulariser = REGULARISERS[name].regulariser
    for option, default in {"weight": 1.0, **options_of(regulariser)}.items():
        assert f"`{option}` {default}" in row
    assert f"`{regulariser!r}`" in row


def test_the_page_on_disk_is_the_one_that_is_generated() -> None:
    on_disk = Path(__file__).parents[2] / "docs" / "objectives.md"
    assert on_disk.read_text(encoding="utf-8") == page(), "python -m geffect.objectives.table"


@pytest.mark.parametrize("objective", CATALOGUE.values(), ids=CATALOGUE)
def test_its_fields_are_its_options(objective: Objective) -> None:
    assert is_dataclass(objective) and vars(objective).keys() == {
        field.name for field in fields(objective)
    }
    assert (
        objective.reductions.keys()
        == objective.components(
            tiny.gpt2(), pair_of(objective), FrozenModel(tiny.gpt2(1).eval())
        ).keys()
    )
    assert json.loads(json.dumps(provenance(objective))) == provenance(objective)
    with pytest.raises(ValueError, match=r"among those it has: .* Found `colour`"):
        named("ga", {"colour": 1})


def test_the_study_names_objectives_of_the_catalogue() -> None:
    assert set(METHODS) <= set(names())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--methods", "simnpo,ga", "--beta", "1"], "it has: none. Found `beta`"),
        (["--methods", "idk"], "Found `idk`. Did you mean `po`?"),
        (["--methods", "simnpo,magic"], "should be some of ga, wga"),
        (["--methods", "simnpo", "--delta", "x"], "`delta` should be a number such as 0.0"),
    ],
)
def test_a_study_refuses_what_an_objective_has_not(
    options: list[str], says: str, tmp_path: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    said = ask("demo", "--out", tmp_path, *options)
    assert said.code == 2 and says in said.err


def test_the_options_of_a_study_reach_its_runs() -> None:
    specs = Plan(methods=("simnpo",), options={"beta": 2.0}).specs()
    assert {spec.options for spec in specs} == {(("beta", 2.0),)}


def test_what_stands_for_an_objective() -> None:
    assert as_objective("npo+gd") == GradDiff(NPO())
    assert as_objective(SimNPO()) == SimNPO()
    pair, model = tiny.pairs(1)[0], tiny.gpt2()
    declared = as_objective({"forget": -1.0, "retain": 1.0})
    assert torch.equal(declared(model, pair), GradDiff()(model, pair))
    assert declared.sides == GradDiff().sides == ("forget", "retain")


APART = ("graddiff+gd", "graddiff+kl", "graddiff+rr", "graddiff+proxy-kl", "pdu+gd")
"""Objectives with a part of their own for what the regulariser adds."""


@pytest.mark.parametrize("name", names())
def test_every_objective_goes_with_every_regulariser(name: str) -> None:
    alone, _, added = name.partition("+")
    regulariser = REGULARISERS[added].regulariser if added else None
    if name in APART:
        with pytest.raises(ValueError, match=rf"without a part of its own .* Found `{alone}`"):
            named(name)
        return
    assert set(options_of(named(name))) == {
        *options_of(CATALOGUE[alone]), *(["weight", *options_of(regulariser)] if added else [])
    }  # fmt: skip


def in_turn() -> list[str]:
    """Each objective with one of the regularisers that it goes with, and all of these in turn."""
    beside = {
        name: [f"{name}+{added}" for added in REGULARISERS if f"{name}+{added}" not in APART]
        for name in CATALOGUE
    }
    pairs = [both[place % len(both)] for place, both in enumerate(beside.values()) if both]
    assert {name.partition("+")[2] for name in pairs} == {*REGULARISERS}
    return pairs


@pytest.mark.parametrize("name", in_turn())
def test_a_regulariser_is_added(name: str) -> None:
    alone, _, added = name.partition("+")
    pair, before = pair_of(named(name)), FrozenModel(tiny.gpt2(1).eval())
    expected = CATALOGUE[alone](tiny.gpt2(), pair, before)
    expected = expected + REGULARISERS[added].regulariser(tiny.gpt2(), pair, before)
    assert torch.equal(named(name)(tiny.gpt2(), pair, before), expected)


def test_options_go_to_the_part_that_has_them() -> None:
    assert named("npo+kl", {"beta": 0.5, "weight": 20.0, "legacy_kl": True}) == Regularised(
        NPO(0.5), KL(legacy_kl=True), weight=20.0
    )
    assert named("ga+rr", {"retain_layer": 2}) == Regularised(CATALOGUE["ga"], RR(2))
    with pytest.raises(ValueError, match=r"it has: `beta`, `legacy_kl`, `weight`. Found `layer`"):
        named("npo+kl", {"layer": 1})


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("npo+lk", r"with \+gd, .* behind it. Found `npo\+lk`. Did you mean `npo\+kl`"),
        ("noo+kl", r"one of ga, wga, .* Did you mean `npo\+kl`\?"),
        ("kl", "Found `kl`"),
        ("npo+", r"Found `npo\+`"),
        ("npo+gd+kl", r"Found `npo\+gd\+kl`"),
        ("graddiff+gd", r"for `retain, weight` where \+gd is added. .* such as ga\+gd"),
    ],
)  # fmt: skip
def test_a_name_that_is_none_is_refused(name: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        named(name)


def test_parts_of_one_name_are_refused() -> None:
    twice = Regularised(GradDiff(), GradDiff())
    with pytest.raises(ValueError, match=r"should have names of their own. Found `forget`"):
        twice(tiny.gpt2(), tiny.pairs(1)[0])
    with pytest.raises(ValueError, match="Found `weight` twice"):
        options_of(twice)
