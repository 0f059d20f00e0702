"""`geffect edit`: from a folder and files to an edited folder, a run file and a table."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from geffect import open_run
from geffect.analysis import edited
from geffect.cli.edit import edit_of
from geffect.cli.fields import GIVEN
from geffect.edits import CATALOGUE, options_of
from geffect.store import validate
from tests.utils import shallow as tiny
from tests.utils.chat import TURNS, make_tokenizer, written
from tests.utils.command_line import Answer, Ask


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models of tiny Llamas with a tokenizer, and data."""
    folder = tmp_path_factory.mktemp("edit")
    tokenizer = make_tokenizer(TURNS)
    config = tiny.llama().config
    config.vocab_size = len(tokenizer)
    for seed, name in enumerate(("model", "tuned")):
        tiny.llama(seed)
        LlamaForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for name in ("forget", "retain", "facts"):
        rows = [{"question": f"Where does {name} live?", "answer": f"In {n}."} for n in range(4)]
        written(folder / f"{name}.jsonl", *rows)
    return folder


@pytest.fixture
def edit(folder: Path, ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ask:
    """The command, with what every edit needs; it writes into `out`."""
    monkeypatch.setenv("COLUMNS", "160")

    def edit(*options: object, method: str = "ssd", model: Path = folder / "model") -> Answer:
        data = [word for side in ("forget", "retain")
                for word in (f"--{side}", folder / f"{side}.jsonl")]  # fmt: skip
        words = [model, "--method", method, *data, "-o", tmp_path / "out", "--device", "cpu"]
        return ask("edit", *words, *options)

    return edit


def test_an_edit_and_every_command_that_reads_its_run(
    edit: Ask, ask: Ask, folder: Path, tmp_path: Path
) -> None:
    code, out, err = edit("--fraction", "0.05", "--risk", f"facts={folder / 'facts.jsonl'}")
    assert (code, err) == (0, "")
    path = tmp_path / "out" / "edit.h5"
    run = open_run(path)
    assert validate(path).whole and run.sources[-2:] == ("facts", "update")
    assert "SSD of weights: predicted falls of the risks, in nats per token" in out
    assert re.search(r"layer +┃ +forget ┃ +retain ┃ +facts ┃ +\|D\| ┃ +touched", out)
    own = edited(run)
    model = own[own["layer"] == "model"].set_index("risk")
    for column, label in (("measured", "measured"), ("predicted", "model")):
        number = f"{model[column]['forget']:.4g}"
        assert re.search(rf"{label} +│ +{re.escape(number)} ", out)
    assert "batches: 4 of forget, 4 of retain" in out and "First row of facts" in out
    assert LlamaForCausalLM.from_pretrained(tmp_path / "out") is not None
    for score in ("g-effect", "cosine", "conflict", "predicted-change"):
        code, table, err = ask("scores", path, "--score", score)
        assert (code, err) == (0, "") and len(table.splitlines()) > 3
    assert ask("info", path)[0] == ask("validate", path)[0] == 0
    assert ask("plot", path, "-o", tmp_path / "run.png")[0] == 0
    assert ask("report", path, "-o", tmp_path / "run.html")[0] == 0
    assert (tmp_path / "run.png").stat().st_size and (tmp_path / "run.html").stat().st_size


def test_what_first_order_does_not_tell_is_said_with_both_numbers(
    edit: Ask, ask: Ask, tmp_path: Path
) -> None:
    """By the command and by the page of its run, of the risks of which that holds alone."""
    code, out, _ = edit("--fraction", "0.6", "--dampening", "0.01")
    assert code == 0
    own = edited(open_run(tmp_path / "out" / "edit.h5"), by="model")
    assert ask("report", tmp_path / "out" / "edit.h5", "-o", tmp_path / "run.html")[0] == 0
    page = (tmp_path / "run.html").read_text(encoding="utf-8")
    far = 0
    for _, risk, _, predicted, measured, *_ in own.itertuples():
        same_sign = predicted * measured > 0
        ratio = max(predicted / measured, measured / predicted) if same_sign else 0
        start = f"First order does not tell what the edit does to the {risk} risk"
        assert (start in out) == (start in page) == (not same_sign or ratio > 2)
        if start in out:
            far += 1
            (line,) = [line for line in out.splitlines() if line.startswith(start)]
            assert f"{abs(predicted):.4g} nats" in line and f"{abs(measured):.4g} was" in line
    assert far


def test_the_table_for_a_script(edit: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = LlamaForCausalLM.save_pretrained

    def telling(*given: Any, **how: Any) -> None:
        print("what a library logs")  # as DeepSpeed does where transformers loads it
        save(*given, **how)

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", telling)
    run = tmp_path / "run.h5"
    code, out, err = edit("--edit-option", "alpha=1.1", "--run", run, "--format", "json")
    said = json.loads(out)
    assert code == 0 and "First row of forget" in err and "what a library logs" in err
    assert said["run"] == str(run) and said["edit"]["options"]["alpha"] == 1.1
    last = said["effects"][-1]
    assert (last["risk"], last["layer"]) == ("retain", "model") and last["measured"]
    assert said["effects"][0]["measured"] is None


OPTIONS = {
    "alpha": "0.7", "fraction": "0.05", "dampening": "0.5", "against": "all", "fisher_batch": "2",
    "include": "*up_proj*", "exclude": "*norm*", "level": "0.9", "tolerance": "0.01", "k": "2",
    "side": "input", "basis": "retain", "strength": "hard", "length": "2", "damping": "50",
    "scale": "300", "steps": "15", "repeats": "2", "seed": "3",
}  # fmt: skip
"""A text for each option of the catalogue that is not its default."""


@pytest.mark.parametrize(
    ("method", "option"),
    [(name, option) for name, e in CATALOGUE.items() for option in options_of(e)],
)
def test_every_option_is_one_of_the_command_line(method: str, option: str) -> None:
    """Made alone, as what the text says; and no default is told."""
    context: Any = SimpleNamespace(meta={GIVEN: {option: OPTIONS[option]}})
    found, default = edit_of(context, method), CATALOGUE[method]
    assert str(getattr(found, option)) in (OPTIONS[option], f"{OPTIONS[option]}.0")
    assert getattr(found, option) != getattr(default, option)
    assert found == replace(default, **{option: getattr(found, option)})


@pytest.mark.parametrize("options", [[], ["--side", "input", "--basis", "retain"]], ids=str)
def test_repselect_with_so_many_directions(
    edit: Ask, folder: Path, tmp_path: Path, options: list[str]
) -> None:
    code, _, err = edit("--k", "2", *options, method="repselect")
    assert (code, err) == (0, "")
    run = open_run(tmp_path / "out" / "edit.h5")
    assert run.manifest["edit"]["options"]["k"] == 2
    before, after = (
        LlamaForCausalLM.from_pretrained(path) for path in (folder / "model", tmp_path / "out")
    )
    moved = torch.cat(
        [(p - q).flatten() for p, q in zip(after.parameters(), before.parameters(), strict=True)]
    )
    assert moved.norm().item() == pytest.approx(1.0, rel=1e-4)


def test_negation_and_tsv(edit: Ask, folder: Path) -> None:
    state = ["--state", f"tuned={folder / 'tuned'}", "--alpha", "0.1"]
    code, out, _ = edit(*state, "--format", "tsv", method="negation")
    lines = out.splitlines()
    assert code == 0
    assert lines[0].split("\t") == ["risk", "layer", "predicted", "measured", "length", "touched"]


@pytest.mark.parametrize(
    ("options", "method", "code", "says"),
    [
        (["--alpha", "1", "--fraction", "1"], "ssd", 2, "`alpha` of SSD should be left out"),
        (["--alpha", "much"], "ssd", 2, "should be positive. Found `alpha = 'much'`"),
        (["--fisher-batch", "x"], "ssd", 2, "should be a number such as 1. Found `x`"),
        (["--alpha", "1", "--edit-option", "alpha=2"], "ssd", 2, "should be given once"),
        (["--dampening", "1"], "negation", 2, "Found `dampening`"),
        ([], "sdd", 2, "should be one of ssd"),
        ([], "negation", 1, "`states` of TaskVectorNegation should be `tuned`"),
        (["--state", "tuned"], "negation", 2, "`--state` should be a name and its data"),
        (["--risk", "forget=x"], "ssd", 2, "should have names of their own"),
        (["--merge"], "ssd", 1, "`merge` should go with adapters"),
        (["--alpha", "1e300", "--against", "all"], "ssd", 1, "changes none of its numbers"),
        (["--include", "*nothing*"], "ssd", 1, "which none of them has"),
    ],
)  # fmt: skip
def test_requests_that_are_refused(
    edit: Ask, tmp_path: Path, options: list[str], method: str, code: int, says: str
) -> None:
    found, _, err = edit(*options, method=method)
    assert found == code and says in err and len(err.strip().splitlines()[-1:]) == 1
    assert not (tmp_path / "out").exists() and not [*tmp_path.iterdir()]


def test_newton_on_a_checkpoint(edit: Ask, tmp_path: Path, folder: Path) -> None:
    code, out, err = edit("--scale", "300", "--steps", "15", method="newton")
    assert (code, err) == (0, "")
    told = open_run(tmp_path / "out" / "edit.h5").manifest["edit"]
    assert told["facts"]["residual"] < 0.01 and "Newton of weights" in out
    half = LlamaForCausalLM.from_pretrained(folder / "model").bfloat16()
    half.save_pretrained(tmp_path / "half")
    make_tokenizer(TURNS).save_pretrained(tmp_path / "half")
    shutil.rmtree(tmp_path / "out")
    code, out, err = edit(method="newton", model=tmp_path / "half")
    assert code and "float32 or float64. Found torch.bfloat16" in err.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_it_overwrites_nothing(edit: Ask, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    code, _, err = edit("--fraction", "0.1")
    assert code == 1 and "should not exist yet" in err and not [*(tmp_path / "out").iterdir()]


def test_the_page_of_help_names_the_edits_and_their_options(ask: Ask) -> None:
    page = ask("edit", "--help").out
    for word in ("ssd, lfssd, negation, mix", "--fisher-batch VALUE", "--edit-option NAME=VALUE"):
        assert word in page
    assert "Of ssd, lfssd, negation (1.0), mix." in " ".join(page.split())
    assert "Of ssd (nothing), lfssd (nothing), newton (nothing)" in " ".join(page.split())
