"""`geffect audit`: from folders and files to a verdict, a page and an exit code."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from geffect import Recorder
from geffect.audit import budget as budgets
from geffect.audit.budget import Budget
from geffect.audit.controls import CONTROLS
from geffect.audit.relearning import RelearningBudget
from geffect.objectives import nll
from tests.utils import tiny
from tests.utils.chat import TURNS, make_tokenizer, written
from tests.utils.command_line import Answer, Ask
from tests.utils.pages import assert_self_contained

SHORT = Budget(
    "quick",
    RelearningBudget(steps=(1,), rates=(1.0,), seeds=(0,), sources=("benign",)),
    taught=(1,), kept=2, said=1, samples=0, layers=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three random models with a tokenizer, and data."""
    folder = tmp_path_factory.mktemp("audit")
    tokenizer = make_tokenizer(TURNS)
    config = tiny.llama().config
    config.vocab_size = len(tokenizer)
    config.max_position_embeddings = 256
    for seed, name in enumerate(("original", "retrained", "unlearned")):
        tiny.llama(seed)
        LlamaForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for name in ("forget", "retain", "holdout"):
        rows = [
            {
                "question": f"Where does {name} live?",
                "answer": f"In <b>{n}</b>.",
                "wrong": [f"In {n + 1}."],
            }
            for n in range(4)
        ]
        written(folder / f"{name}.jsonl", *rows)
    return folder


@pytest.fixture
def audit(folder: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> Ask:
    """The command, with the models and data that every audit needs, on a small budget."""
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setitem(budgets.BUDGETS, "quick", SHORT)

    def audit(*options: object) -> Answer:
        data = [w for side in ("forget", "retain") for w in (f"--{side}", folder / f"{side}.jsonl")]
        words = [folder / "unlearned", "--original", folder / "original", *data, "--device", "cpu"]
        return ask("audit", *words, *options)

    return audit


def test_a_page_and_a_verdict(audit: Ask, folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "audit.html"
    code, out, err = audit("--retrained", folder / "retrained", "-o", page)
    assert code == 1, (out, err)  # random models know nothing
    assert out.startswith("undecided: Nothing can be told apart: the original shows no more")
    assert "The page is in" in out
    assert "unlearned: " in err and "left" in err
    text = page.read_text(encoding="utf-8")
    for title in ("Asked directly", "Relearning", "Depth", "What stays"):
        assert re.search(rf"<h2 id=[^>]*>{title}</h2>", text)
    assert "<svg" in text
    assert_self_contained(text)
    assert re.search(r'<td class="says">[^<]*\[\[', text)  # a row of the data is a sentence
    for mark, role in (("●", "unlearned"), ("○", "original")):  # as in the pictures
        assert re.search(rf"{mark}</span> {role}</td>", text)
    assert re.search(r"a smaller share is kept</td><td[^>]*>0.25</td>", text)
    assert "<b>0</b>" not in text  # what others wrote is text
    assert str(folder / "forget.jsonl") in text


def test_json_is_all_of_the_report(audit: Ask, folder: Path) -> None:
    code, out, _ = audit("--holdout", folder / "holdout.jsonl", "--json")
    told = json.loads(out)
    assert code == told["exit_code"] and told["verdict"] == "undecided"
    assert any(flag.startswith("floor estimated") for flag in told["flags"])
    assert told["manifest"]["budget"]["name"] == "quick"
    assert {row["battery"] for row in told["table"]} >= {"memorised", "hidden", "utility"}


def test_some_batteries(audit: Ask, folder: Path) -> None:
    code, out, _ = audit("--retrained", folder / "retrained", "--batteries", "memorised", "--json")
    assert {row["battery"] for row in json.loads(out)["table"]} <= {
        "memorised", "utility", "direct share", "known",
    }  # fmt: skip
    assert code in (1, 4)


def test_several_retrained_models(audit: Ask, folder: Path) -> None:
    retrained = [w for name in ("retrained", "original") for w in ("--retrained", folder / name)]
    code, out, err = audit(*retrained, "--batteries", "memorised", "--json")
    models = {row["model"] for row in json.loads(out)["table"]}
    assert models >= {"retrained", "retrained 1", "retrained 2"}, err
    assert "retrained 2: " in err and code in (1, 4)
    code, out, err = audit(*retrained[:2], *retrained[:2])
    assert (code, out) == (1, "") and "Found the same one twice" in err


def test_controls_are_told_beside_the_model(audit: Ask, folder: Path, tmp_path: Path) -> None:
    """A row for each, with what it should read; how the model itself is read stays the exit code.

    That memorised models are read right is tested where they are: tests/audit/test_controlled.py.
    """
    page = tmp_path / "audit.html"
    given = ["--retrained", folder / "retrained", "--batteries", "memorised,utility", "-o", page]
    code, out, err = audit(*given, "--learning-rate", "0.01", "--controls")
    assert code == 1 and out.startswith("undecided: "), (out, err)
    _, told, rest = out.partition("How it reads models of which it is known whether they forgot:")
    assert told and "controls: " in err
    assert re.search(r"│ this model +│ +│ undecided ", rest), rest
    for control in CONTROLS:
        assert re.search(rf"│ {control.name} +│ {control.should} +│ \w+", rest), rest
    text = page.read_text(encoding="utf-8")
    assert re.search(r"<h2 id=[^>]*>Controls</h2>", text)
    for control in CONTROLS:
        assert control.says in text
    assert_self_contained(text)


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """The run of the unlearning, with checkpoints beside it."""
    model = LlamaForCausalLM.from_pretrained(folder / "unlearned")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Recorder(model, folder / "run.h5", update=True) as recorder:
        for step, batch in enumerate(tiny.pairs(3)):
            model.save_pretrained(folder / "steps" / f"checkpoint-{step}")
            recorder.backward(
                objective={"forget": -1.0},
                forget=lambda batch=batch: nll(model, batch["forget"]),
                retain=lambda batch=batch: nll(model, batch["retain"]),
            )
            optimizer.step()
            optimizer.zero_grad()
    return folder / "run.h5"


def test_the_run_of_the_unlearning(audit: Ask, folder: Path, run: Path, tmp_path: Path) -> None:
    asked = ["--retrained", folder / "retrained", "--batteries", "memorised,geometry"]
    beside = ["--run", run, "--checkpoints", folder / "steps", "-o", tmp_path / "audit.html"]
    code, out, err = audit(*asked, *beside)
    assert code == 1, err
    assert "How far the updates of the run explain what was measured" in out
    for metric, of in (("loss", "forget"), ("es", "retain")):
        assert re.search(rf"│ {metric} +│ {of} +│.*│ 3 │", out), out
    text = (tmp_path / "audit.html").read_text(encoding="utf-8")
    assert re.search(r"<h2 id=[^>]*>Geometry</h2>", text)
    assert_self_contained(text)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--checkpoints", "steps"], "--checkpoints.*--run"),
        (["--run", "run.h5", "--checkpoints", "original"], "Found none in"),
        (["--run", "run.h5", "--batteries", "memorised"], "Found no geometry among them"),
    ],
)
def test_what_a_run_goes_with(
    audit: Ask, folder: Path, run: Path, options: list[str], says: str
) -> None:
    given = [str(folder / word) if (folder / word).exists() else word for word in options]
    code, out, err = audit("--retrained", folder / "retrained", *given)
    assert code in (1, 2) and out == ""
    assert re.search(says, err.replace("\n", " "))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "--retrained or --holdout"),
        (["--batteries", "hiden"], r"`--batteries` should be some of .*Did you mean `hidden`"),
        (["--learning-rate", "fast"], "`--learning-rate` should be a learning rate"),
        (["--budget", "long"], "`--budget` should be one of quick, full"),
        (["-o", "audit.pdf"], r"`--output` should end in \.html"),
    ],
)
def test_what_is_asked_wrongly(audit: Ask, folder: Path, options: list[str], says: str) -> None:
    given = ["--retrained", str(folder / "retrained"), *options] if options else options
    code, out, err = audit(*given)
    assert (code, out) == (2, "")
    assert re.search(says, err)


def test_a_page_is_not_replaced_unasked(audit: Ask, folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "audit.html"
    page.write_text("mine", encoding="utf-8")
    code, _, err = audit("--retrained", folder / "retrained", "-o", page)
    assert code == 1 and "--overwrite" in err and page.read_text(encoding="utf-8") == "mine"


def test_a_folder_that_is_no_model(audit: Ask, tmp_path: Path) -> None:
    code, _, err = audit("--retrained", tmp_path)
    assert code == 1 and "A checkpoint should be a folder" in err
