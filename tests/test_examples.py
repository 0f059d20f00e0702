"""Every example runs: in the docstrings, in README, and in the pages of docs."""

import doctest
import glob
import importlib
import itertools
import linecache
import os
import pkgutil
import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from accelerate import Accelerator
from matplotlib import pyplot
from transformers import LlamaForCausalLM, TrainingArguments

import geffect
from geffect import Run
from geffect.analysis import conflict, cosine, g_effect, predicted_change, violation
from geffect.cli.main import app, main
from geffect.risk import nll
from geffect.store import validate
from tests.utils import tiny, trainers, unlearning_trainers
from tests.utils.chat import TURNS, make_tokenizer, written

ROOT = Path(__file__).parents[1]
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
FENCED = re.DOTALL | re.MULTILINE

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]


def _side(side: str) -> list[dict[str, torch.Tensor]]:
    return [pair[side] for pair in tiny.pairs(3)]


def _ascended(model: torch.nn.Module, batches: list[dict[str, torch.Tensor]]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for batch in batches:
        (-nll(model, batch)).backward()
        optimizer.step()
        optimizer.zero_grad()


# What a page takes for granted, made for those that name it.
NAMES: dict[str, Callable[[Path], Any]] = {
    "accelerator": lambda folder: Accelerator(cpu=True),
    "training_arguments": lambda folder: TrainingArguments(
        str(folder / "our trainer"), num_train_epochs=1, use_cpu=True, report_to=[]
    ),
    "model": lambda folder: tiny.llama(),
    "original_model": lambda folder: tiny.llama(1),
    "retrained_model": lambda folder: tiny.llama(2),
    "batches": lambda folder: tiny.pairs(3),
    "forget_batches": lambda folder: _side("forget"),
    "retain_batches": lambda folder: _side("retain"),
    "march_batches": lambda folder: _side("forget")[:1],
    "april_batches": lambda folder: _side("forget")[1:],
    "unlearn": lambda folder: _ascended,
    "trainer": lambda folder: trainers.trainer(folder / "trainer", tiny.llama()),
    "tokenizer": lambda folder: None,
    "unlearning_trainer": lambda folder: unlearning_trainers.unlearner(folder / "their trainer"),
    "TheirGradDiff": lambda folder: unlearning_trainers.GradDiff,
    "forget_items": lambda folder: trainers.samples(4),
    "retain_items": lambda folder: trainers.samples(6, seed=50),
    "general_items": lambda folder: trainers.samples(5, seed=90),
}

MODULES = sorted(
    {"geffect", *(m.name for m in pkgutil.walk_packages(geffect.__path__, "geffect."))}
)


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    """What an example draws is not left for the tests after it."""
    yield
    pyplot.close("all")


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(
    name: str, example_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Before each docstring the debugger, which nobody calls, looks every source up on the disk.
    monkeypatch.setattr(linecache, "checkcache", lambda *_: None)
    if name.startswith("geffect.kernels"):
        pytest.importorskip("triton")
    module = importlib.import_module(name)
    known = {"example_run": example_run}
    assert doctest.testmod(module, extraglobs=known, optionflags=OPTIONS).failed == 0


def test_there_are_examples_to_run() -> None:
    assert {"geffect.analysis.g_effect", "geffect.plots.heatmap"} <= set(MODULES)


def test_the_run_of_the_examples_is_a_run(example_run: Callable[..., Run]) -> None:
    run = example_run(update=True)
    assert validate(run.path).whole
    assert (abs(run.gram() - run.gram().swapaxes(-1, -2)) == 0).all()
    values = {
        "unlearning": g_effect(run, "model").query("effect == 'unlearning'"),
        "retaining": g_effect(run, "model").query("effect == 'retaining'"),
        "cosine": cosine(run, "forget", "retain", "model"),
        "conflict": conflict(run, by="model"),
        "forget": predicted_change(run, "model").query("risk == 'forget'"),
        "retain": predicted_change(run, "model").query("risk == 'retain'"),
        "violation": violation(run),
    }
    said = [-4.0, -1.0, 0.5, 1.0, -0.4, -0.1, 1.0]
    assert [table["value"].item() for table in values.values()] == pytest.approx(said)


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_pages(
    page: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recorded: Path,
    checkpoints: Path,
) -> None:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), FENCED)
    # What a command answers is shown on a console, and tested with the command.
    assert {language for language, _ in blocks} <= {*RUN, "bibtex", "console"}
    text = "".join(block for _, block in blocks)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(checkpoints, tmp_path, dirs_exist_ok=True)
    if not re.search(r'Recorder\(model, "run\.h5"', text):
        shutil.copy(recorded, "run.h5")
    names = {name: make(tmp_path) for name, make in NAMES.items() if name in text}
    if "optimizer" in text:
        names["optimizer"] = torch.optim.AdamW(names["model"].parameters(), lr=1e-3)
    for language, block in blocks:
        if language in RUN:
            RUN[language](block, names, monkeypatch)
    written = set(re.findall(r'"(\w+\.(?:h5|png))"', text))
    assert written <= set(os.listdir(tmp_path))


def test_the_pages_have_examples() -> None:
    assert ROOT / "README.md" in PAGES and len(PAGES) > 8
    assert "```python" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, and with two checkpoints of a tiny Llama in `run`."""
    folder = tmp_path_factory.mktemp("pages")
    tokenizer = make_tokenizer(TURNS)
    config = tiny.llama().config
    config.vocab_size = len(tokenizer)
    for step in (5, 10):
        LlamaForCausalLM(config).save_pretrained(folder / "run" / f"checkpoint-{step}")
        tokenizer.save_pretrained(folder / "run" / f"checkpoint-{step}")
    (folder / "TOFU_SUMMARY.json").write_text('{"model_utility": 0.6}')
    for name in ("forget", "retain"):
        rows = [{"question": f"Where does {name} live?", "answer": f"In {n}."} for n in range(16)]
        written(folder / f"{name}.jsonl", *rows)
    return folder


def run_python(block: str, names: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A block of Python, in the names of those before it."""
    exec(compile(block, "a block of Python", "exec"), names)


def run_diff(block: str, names: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that shows a change: what was there before it, then what is there after it."""
    for left_out, kept in (("+", "-"), ("-", "+")):
        lines = [line for line in block.splitlines() if not line.startswith(left_out)]
        assert any(line.startswith(kept) for line in lines)
        run_python("\n".join(line[1:] for line in lines), names, monkeypatch)


def run_shell(block: str, names: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands: ours are run, the slow ones only read; what others name has to be there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for line in block.replace("\\\n", " ").splitlines():
        match shlex.split(line.partition(" > ")[0], comments=True):
            case [
                "geffect",
                "audit" | "demo" | "plot" | "report" | "compare" | "layers" | "join" as name,
                *options,
            ]:
                group: Any = typer.main.get_command(app)
                group.commands[name].make_context(name, options)
            case ["geffect", *options]:
                found = [sorted(glob.glob(option)) or [option] for option in options]
                monkeypatch.setattr(sys, "argv", ["geffect", *itertools.chain(*found)])
                with pytest.raises(SystemExit) as ended:
                    main()
                assert not ended.value.code, line
            case ["make", target]:
                assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
            case ["pip", "install", "-e", "."]:
                pass
            case ["pip", "install", named]:
                distribution, _, extra = named.removesuffix("]").partition("[")
                assert distribution == project["name"]
                assert extra in {"", *project["optional-dependencies"]}
            case []:
                pass
            case other:
                pytest.fail(f"A page should show commands that a test knows. Found {other}.")


RUN = {"python": run_python, "diff": run_diff, "sh": run_shell}
