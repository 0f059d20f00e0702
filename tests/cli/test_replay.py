"""`geffect replay`: from folders and files to a run file and a table."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import LlamaForCausalLM

from geffect import open_run
from geffect.analysis import g_effect, intervals
from geffect.capture.store_options import STORES
from geffect.cli.replay import StoreName
from geffect.objectives import (
    CATALOGUE,
    KL,
    NPO,
    PDU,
    RMU,
    WTNPO,
    GradDiff,
    Objective,
    Regularised,
    WeightedGradientAscent,
    named,
    provenance,
)
from tests.utils import shallow as tiny
from tests.utils.chat import TURNS, make_tokenizer, written
from tests.utils.command_line import Answer, Ask


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of a tiny Llama with a tokenizer, and data."""
    folder = tmp_path_factory.mktemp("cli")
    tokenizer = make_tokenizer(TURNS)
    config = tiny.llama().config
    config.vocab_size = len(tokenizer)
    for step in (5, 10):
        tiny.llama(step)  # seeds
        LlamaForCausalLM(config).save_pretrained(folder / f"checkpoint-{step}")
        tokenizer.save_pretrained(folder / f"checkpoint-{step}")
    for name in ("forget", "retain", "facts"):
        rows = [{"question": f"Where does {name} live?", "answer": f"In {n}."} for n in range(16)]
        written(folder / f"{name}.jsonl", *rows)
    written(folder / "bad.jsonl", {"q": "a"})
    written(folder / "long.jsonl", {"text": "word " * 40})
    (folder / "latin.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xeb"}\n')
    return folder


@pytest.fixture
def replayed(folder: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> Ask:
    """The command, with what every replay needs."""
    monkeypatch.setenv("COLUMNS", "160")

    def replayed(*options: object, only: int = 2, **given: object) -> Answer:
        defaults = {
            "objective": "ga",
            "forget": folder / "forget.jsonl",
            "retain": folder / "retain.jsonl",
            "device": "cpu",
        }
        words = [word for name, value in {**defaults, **given}.items()
                 for word in (f"--{name.replace('_', '-')}", value)]  # fmt: skip
        checkpoints = [folder / f"checkpoint-{step}" for step in (5, 10)][:only]
        return ask("replay", *checkpoints, *words, *options)

    return replayed


def test_replay(replayed: Ask, tmp_path: Path) -> None:
    code, out, err = replayed("-o", tmp_path / "run.h5", batch_size=2)
    assert (code, err) == (0, "")
    run = open_run(tmp_path / "run.h5")
    assert run.steps.tolist() == [5, 10] and run.rows.tolist() == [8, 8]
    assert f"2 checkpoints in {tmp_path / 'run.h5'}" in out
    assert re.search(r"10 │ checkpoint-10 │ +8 │ +\S+ \[\S+, \S+\] │ +\S+ \[\S+, \S+\]", out)
    assert "split_batch, with 95 % intervals over batches, in nats per unit learning rate" in out
    assert "Batches used: 16 of 16 of forget, 16 of 16 of retain." in out
    assert "Reference" not in out and "iased" not in out and "No intervals" not in out
    assert "checkpoint-5: batch 16 of 16" in out
    first = "<|user|>Where does forget live?<end>\n<|assistant|>[[In 0.<end>]]"
    assert f"First row of forget, scored between [[ and ]]:\n{first}\n" in out
    assert out.index(first) < out.index("checkpoint-5: batch")


def test_an_objective_at_a_relearned_copy(replayed: Ask, ask: Ask, tmp_path: Path) -> None:
    path = tmp_path / "run.h5"
    way = ["--relearned-radius", 0.5, "--relearned-steps", 3, "--relearned-unit", "loss"]
    code, out, err = replayed("-o", path, *way, only=1, objective="wga")
    assert (code, err) == (0, "")
    assert "Objective at a copy that has relearned the forget set: 3 steps, 0.5 of loss." in out
    told = open_run(path).manifest["relearned"]
    assert (told["radius"], told["steps"], told["unit"]) == (0.5, 3, "loss")
    assert "the forget set" in ask("info", path)[1]
    code, out, _ = replayed("-o", path, "--overwrite", "--format", "json", *way, only=1)
    assert json.loads(out)["how"]["relearned"] == told
    assert replayed("-o", path, "--overwrite", only=1)[1].count("copy") == 0


def test_a_summary_without_intervals(replayed: Ask, folder: Path, tmp_path: Path) -> None:
    """Of one checkpoint, with rows that are biased and few."""
    given = {"estimator": "same_batch", "batch_size": 4, "forget": folder / "facts.jsonl"}
    code, out, _ = replayed("-o", tmp_path / "run.h5", only=1, **given)
    assert code == 0 and "1 checkpoint in" in out
    assert "same_batch (biased), in nats per unit learning rate" in out
    assert "Biased by the variance of a batch" in out and "No intervals: fewer than 8 rows." in out
    assert "95 %" not in out and re.search(r"5 │ checkpoint-5 │ +4 │ +\S+ │ +\S+ │", out)


def test_the_summary_as_json(replayed: Ask, tmp_path: Path) -> None:
    code, out, err = replayed("-o", tmp_path / "run.h5", "--format", "json", objective="npo")
    said = json.loads(out)
    assert code == 0 and said["output"] == str(tmp_path / "run.h5")
    assert said["unit"] == "nats per unit learning rate"
    of_reference = said["how"]["objective"]["reference"]
    assert of_reference["is"] == "checkpoint-5, the first checkpoint"
    assert said["how"]["biased"] is False
    assert [(e["step"], e["checkpoint"], e["effect"], e["rows"]) for e in said["effects"]] == [
        (step, f"checkpoint-{step}", effect, 8)
        for effect in ("unlearning", "retaining") for step in (5, 10)
    ]  # fmt: skip
    assert all(e["low"] < e["value"] < e["high"] for e in said["effects"])
    assert "First row of forget" in err


def test_no_template_sketches_and_a_length(replayed: Ask, tmp_path: Path) -> None:
    path = tmp_path / "run.h5"
    told = ["--no-template", "--store", "sketch", "--max-length", 30]
    code, out, _ = replayed("-o", path, *told)
    assert code == 0 and "Question: Where does forget live?\nAnswer:" in out
    assert open_run(path).contents.sketch is not None
    assert replayed("-o", path, "--overwrite", "--no-template", "--store", "int4")[0] == 1


@pytest.mark.parametrize("name", StoreName)
def test_what_may_be_kept_has_a_name_on_the_command_line(name: StoreName) -> None:
    assert name.value in STORES and len(StoreName) == len(STORES)


@pytest.mark.parametrize(
    ("objective", "options", "said", "compared"),
    [
        ("wga", ["--alpha", "2"], WeightedGradientAscent(alpha=2.0), False),
        ("npo", ["--objective-option", "beta=0.5"], NPO(beta=0.5), True),
        ("wtnpo", ["--alpha", "1", "--legacy-eps", "1e-5"],
         WTNPO(alpha=1.0, legacy_eps=1e-5), True),
        ("graddiff", ["--weight", "0.5"], GradDiff(weight=0.5), False),
        ("npo+gd", ["--beta", "2", "--weight", "3"], GradDiff(NPO(2.0), weight=3.0), True),
        ("npo+kl", ["--weight", "20"], Regularised(NPO(), KL(), weight=20.0), True),
        ("rmu", ["--layer", "1", "--objective-option", "seed=4"], RMU(layer=1, seed=4), False),
        ("pdu", ["--epsilon", "0.5", "--legacy-mask", "true"],
         PDU(epsilon=0.5, legacy_mask=True), False),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)  # fmt: skip
def test_objectives(
    replayed: Ask,
    tmp_path: Path,
    objective: str,
    options: list[str],
    said: Objective,
    compared: bool,
) -> None:
    path = tmp_path / "run.h5"
    code, out, _ = replayed("-o", path, *options, objective=objective)
    kept = open_run(path).manifest["objective"]
    is_first = "checkpoint-5, the first checkpoint" if compared else None
    assert code == 0 and kept == provenance(said, is_first)
    losses = open_run(path).manifest["losses"]["objective"]
    assert losses == ({"forget": -1.0, "retain": 0.5} if objective == "graddiff" else "loss")
    assert ("Reference model: checkpoint-5, the first checkpoint." in out) is compared


@pytest.mark.parametrize(
    ("options", "estimator", "rows", "seed"),
    [
        (["--estimator", "full"], "full", 16, 0),
        (["--estimator", "same_batch", "--seed", "3"], "same_batch", 8, 3),
        (["--reference-ema"], "reference_ema", 2, None),
    ],
)
def test_estimators(
    replayed: Ask, tmp_path: Path, options: list[str], estimator: str, rows: int, seed: int | None
) -> None:
    path = tmp_path / "run.h5"
    code, out, _ = replayed("-o", path, *options, batch_size=2)
    run = open_run(path)
    assert code == 0 and estimator in out
    assert run.rows.tolist() == [rows, rows]
    assert run.manifest["replay"]["estimator"] == estimator
    assert run.manifest["replay"]["seed"] == seed
    assert ("[" in out.split("checkpoint-10")[-1]) is (rows >= 8)


def test_further_risks_the_update_and_a_reference(
    replayed: Ask, folder: Path, tmp_path: Path
) -> None:
    path, facts = tmp_path / "run.h5", folder / "facts.jsonl"
    told = ["--risk", f"facts={facts}", "--risk", f"more={facts}", "--update"]
    code, out, _ = replayed("-o", path, *told, objective="npo", reference=folder / "checkpoint-10")
    assert code == 0
    assert open_run(path).sources == ("objective", "forget", "retain", "facts", "more", "update")
    assert "Reference model: checkpoint-10.\n" in out
    again = replayed("-o", path)
    assert again[0] == 1 and "should not exist yet" in again[2] and "--overwrite" in again[2]
    assert "First row" not in again[1], "nothing has been read"
    assert replayed("-o", path, "--overwrite")[0] == 0
    assert open_run(path).sources == ("objective", "forget", "retain")


@pytest.mark.parametrize(
    ("options", "given", "code", "says"),
    [
        (["checkpoint-9"], {}, 1, "Found nothing at `checkpoint-9`"),
        ([], {"forget": "{folder}/bad.jsonl"}, 1, "bad.jsonl`, line 1, should have `question`"),
        ([], {"retain": "{folder}/none.jsonl"}, 1, "A data file should exist"),
        ([], {"tokenizer": "{folder}"}, 1, "no `tokenizer_config.json`"),
        ([], {"batch_size": 8, "beta": 1.0}, 2, "among those it has: none. Found `beta`"),
        ([], {"objective": "npo", "beta": "much"}, 2, "`beta` should be a number such as 0.1"),
        ([], {"objective_option": "beta"}, 2, "should be a name and its value"),
        ([], {"objective": "npo", "beta": -1.0}, 2, "positive number"),
        (
            [],
            {"objective": "npo", "beta": 1, "objective_option": "beta=2"},
            2,
            "`beta` should be given once. Found `1` and `2`",
        ),
        (
            [],
            {"objective": "npo+gd", "alpha": 1.0, "beta": 0.5},
            2,
            "it has: `beta`, `weight`. Found `alpha`",
        ),
        ([], {"device": "cuda:99"}, 1, "`device` should be one of this machine"),
        ([], {"max_length": 2}, 1, "line 1, should have some of its answer in the first 2"),
        ([], {"forget": "{folder}/latin.jsonl"}, 1, "latin.jsonl`, line 2, should be text in UTF"),
        ([], {"forget": "{folder}/long.jsonl"}, 1, "long.jsonl`, line 1, should have at most 32"),
        ([], {"objective": "magic"}, 2, "should be one of ga, wga,"),
        ([], {"risk": "facts.jsonl"}, 2, "a name and its data"),
        (["--risk", "a=x"], {"risk": "a=y"}, 2, "given once for each name. Found `a` twice"),
        ([], {"risk": "forgte=x"}, 2, "Did you mean `forget`?"),
        ([], {"risk": "update=x"}, 2, "names of their own"),
        ([], {"objective": "npoo"}, 2, "Found `npoo`. Did you mean `npo`?"),
        ([], {"objective": "ga", "reference": "{folder}/checkpoint-5"}, 1, "compares with none"),
        ([], {"base": "{folder}/checkpoint-5"}, 1, "`base` should go with adapters"),
        (["--reference-ema", "--seed", "0"], {}, 2, "`--reference-ema` should be without `--seed`"),
        (
            [],
            {"batch_size": 0},
            2,
            "`--batch-size` should be a whole number of at least 1. Found `0`",
        ),
        ([], {"estimator": "same-batch"}, 2, "Did you mean `same_batch`?"),
        (["--reference-ema"], {"estimator": "full"}, 2, "Leave one of them out"),
        ([], {"output": "run.csv"}, 2, ".h5"),
        (["--relearned-steps", "3"], {}, 2, "should go with `--relearned-radius`"),
        (["--relearned-unit", "loss"], {}, 2, "should go with `--relearned-radius`"),
        (["--relearned-radius", "inf"], {}, 2, "a number from 0"),
        (
            ["--relearned-radius", "2", "--relearned-unit", "loss"],
            {},
            2,
            "`radius` should be a number from 0 to 1",
        ),
    ],
)
def test_how_it_says_no(
    replayed: Ask, folder: Path, tmp_path: Path, options: list[str], given: dict[str, Any],
    code: int, says: str,
) -> None:  # fmt: skip
    named = {name: str(value).format(folder=folder) for name, value in given.items()}
    ended, out, err = replayed(*options, **{"output": tmp_path / "run.h5", **named})
    assert ended == code and "batch 1" not in out
    words = re.sub(r"[\s│]+", " ", err)
    assert says in words
    assert "Traceback" not in err
    assert not (tmp_path / "run.h5").exists()


def test_the_file_is_read_by_the_other_subcommands(replayed: Ask, ask: Ask, tmp_path: Path) -> None:
    replayed("-o", tmp_path / "run.h5")

    def scores(*options: object) -> str:
        said = ask("scores", tmp_path / "run.h5", *options)
        assert said.code == 0
        return said.out

    rows = json.loads(scores("--format", "json"))
    assert {row["effect"] for row in rows} == {"unlearning", "retaining"}
    assert {row["step"] for row in rows} == {5, 10}
    shown = scores("--intervals", "--by", "model")
    table = intervals(g_effect, open_run(tmp_path / "run.h5"), by="model")
    assert "with 95 % intervals" in shown and "No interval" not in shown
    for row in table.itertuples():
        words = f"{row.value:.4g} [{row.low:.3g}, {row.high:.3g}]"
        line = next(line for line in shown.splitlines() if words in line)
        assert line.split("│")[1:4] == [f"{row.step:>5} ", " model ", f" {row.effect:<10} "]
        assert " 8 " in line
    assert "[" not in scores("--by", "model")


@pytest.mark.parametrize("objective", [*CATALOGUE])
def test_every_objective_is_replayed_by_its_name_with_rows_that_bring_alternates(
    objective: str, replayed: Ask, folder: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in (folder / "forget.jsonl").read_text().splitlines()]
    alternates = [{**row, "alternate": "Nobody knows."} for row in rows]
    forget = written(tmp_path / "forget.jsonl", *alternates)
    said = replayed("-o", tmp_path / "run.h5", objective=objective, forget=forget, only=1)
    assert said.code == 0, said.err
    assert np.isfinite(open_run(tmp_path / "run.h5").gram()).all()
    taken = "forget.alternate" in named(objective).sides
    assert taken == ("First row of forget.alternate, scored between" in said.out)
    if not taken:
        return
    said = replayed("-o", tmp_path / "other.h5", objective=objective)
    assert said.code != 0 and "should have an answer in `alternate`" in said.err
    assert "line 1" in said.err and not (tmp_path / "other.h5").exists()


def test_random_answers_are_drawn_from_the_rows(replayed: Ask, tmp_path: Path) -> None:
    said = replayed("-o", tmp_path / "run.h5", "--eps", "2", objective="ssu-acquire")
    assert said.code == 0 and "First row of forget.random3, scored between" in said.out
    run = open_run(tmp_path / "run.h5")
    assert np.isfinite(run.gram()).all()
    assert run.manifest["objective"]["options"] == {"eps": 2.0, "answers": 3}
