"""The command line: what it prints, writes and answers, and how it says no."""

import errno
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import pyplot
from matplotlib.image import imread
from torch import nn

from geffect import Recorder, Rectifier, open_run
from geffect.analysis import conflict, cosine, g_effect, predicted_change, violation
from geffect.demo import figures
from geffect.demo.config import QUICK
from geffect.demo.edits import EDITS
from geffect.demo.jobs import Kept, Unlearning
from geffect.demo.methods import EQUAL, OF_ALL, VARIANTS, RunSpec, every_objective
from geffect.demo.plan import IN_A_LOOK, Plan
from geffect.notes import noting
from geffect.objectives import CATALOGUE, SimNPO
from geffect.projection import SaliencyMask
from geffect.store import validate
from geffect.store.writer import RunWriter
from tests.utils import runs
from tests.utils import shallow as tiny
from tests.utils.command_line import Ask, alone
from tests.utils.pages import assert_self_contained
from tests.utils.seals import seal


def strict(text: str) -> Any:
    """JSON as others read it, which has no NaN."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


# info, scores, validate


def test_info(ask: Ask, recorded: Path) -> None:
    said = ask("info", recorded)
    assert (said.code, said.err) == (0, "")
    for word in ("AdamW", "retain_ema", "complete", "layer 1", "embedding+head"):
        assert word in said.out


def test_info_says_what_masks_keep(ask: Ask, tmp_path: Path, recorded: Path) -> None:
    model = nn.Linear(4, 1, bias=False)
    rectifier = Rectifier(model, None, select=SaliencyMask(c=0.0))
    with Recorder(model, tmp_path / "a.h5") as recorder:
        for x in ([1.0, 2.0, 9.0, 9.0], [1.0, 9.0, 9.0, 9.0]):
            recorder.backward(
                objective=model(torch.tensor(x)).sum(), retain=model(torch.ones(4)).sum(),
                rectifier=rectifier,
            )  # fmt: skip
            model.zero_grad()
    told = strict(ask("info", tmp_path / "a.h5", "--format", "json").out)["masks"]
    assert told == {"kept": (0.5 + 0.75) / 2, "overlap": 2 / 3}
    assert "overlap: 0.666667\n" in ask("info", tmp_path / "a.h5").out
    assert "masks" not in strict(ask("info", recorded, "--format", "json").out)


def test_info_says_for_how_long_training_waited_for_the_disk(ask: Ask, tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    with Recorder(model, tmp_path / "a.h5", store="bf16") as recorder:
        for _ in range(3):
            recorder.backward(objective=lambda: model(torch.ones(2)).sum())
    told = strict(ask("info", tmp_path / "a.h5", "--format", "json").out)["waited_for_disk"]
    assert told["rows"] == 3
    assert told["seconds"] >= 0


def test_info_as_json(ask: Ask, recorded: Path) -> None:
    facts, run = strict(ask("info", recorded, "--format", "json").out), open_run(recorded)
    assert facts["sources"] == [
        "objective",
        "forget",
        "retain",
        "retain_ema",
        "rectified",
        "update",
    ]
    assert (facts["steps"], facts["first_step"], facts["last_step"]) == (4, 0, 3)
    assert facts["numbers"] == sum(parameter.numel for parameter in run.layers)
    assert facts["bytes"] == recorded.stat().st_size
    assert facts["state"] == "complete"
    assert facts["metadata"] == {"method": "ga"}
    assert facts["losses"] == {"objective": {"forget": -1.0}, "forget": "loss", "retain": "loss"}
    assert facts["rectifier"]["rule"] == "gru"
    assert facts["optimizer"]["class"] == "AdamW"


def test_json_is_json_whatever_the_numbers_are(ask: Ask, tmp_path: Path) -> None:
    rows = runs.plain_rows(4)
    rows[1].gram[:] = np.nan
    rows[2].gram[0] = np.inf
    rows[3].losses[:] = -np.inf
    path = runs.recorded(tmp_path / "odd.h5", rows)
    read = strict(ask("scores", path, "--format", "json").out)
    table = g_effect(open_run(path))
    finite = np.isfinite(table["value"])
    assert 0 < finite.sum() < len(finite)
    assert [row["value"] for row in read] == [*table["value"].astype(object).where(finite, None)]
    for words in (["info"], ["validate"], ["compare", path]):
        assert strict(ask(*words[:1], path, *words[1:], "--format", "json").out)


def test_info_tells_the_objective_with_its_options(ask: Ask, tmp_path: Path) -> None:
    model, path = tiny.llama(), tmp_path / "run.h5"
    with Recorder(model, path, objective=SimNPO(beta=2.5)) as recorder:
        recorder.backward(objective=SimNPO(beta=2.5)(model, {"forget": tiny.batch(0)}))
    said = ask("info", path).out.splitlines()
    start = next(i for i, line in enumerate(said) if line.startswith("objective "))
    assert [line[12:].rstrip() for line in said[start : start + 7]] == [
        "    name: SimNPO", "    options:", "      beta: 2.5", "      delta: 0.0",
        "    reduction:", "      forget: sample_mean of forget", "    reference: none",
    ]  # fmt: skip


TABLES = {
    "g-effect": g_effect,
    "cosine": lambda run, by: cosine(run, "objective", "retain", by),
    "conflict": lambda run, by: conflict(run, by=by),
    "predicted-change": predicted_change,
    "violation": violation,
}


@pytest.mark.parametrize("by", ["parameter", "layer", "group", "model"])
@pytest.mark.parametrize("score", TABLES)
def test_scores(ask: Ask, recorded: Path, score: str, by: str) -> None:
    table = TABLES[score](open_run(recorded), by)
    said = ask("scores", recorded, "--score", score, "--by", by, "--format", "csv")
    assert (said.code, said.out) == (0, table.to_csv(index=False))
    rows = strict(ask("scores", recorded, "--score", score, "--by", by, "--format", "json").out)
    assert [row["value"] for row in rows] == pytest.approx(table["value"].tolist(), rel=1e-9, abs=0)
    assert [row[by] for row in rows] == table[by].tolist()


def test_scores_in_words(ask: Ask, recorded: Path) -> None:
    said = ask("scores", recorded)
    assert said.code == 0
    for word in ("G-effect", "4 steps, 0 to 3", "unlearning", "retaining", "layer 0", "median"):
        assert word in said.out


def test_scores_between(ask: Ask, recorded: Path) -> None:
    pair = ["--score", "cosine", "--by", "model", "--between", "forget, retain", "--format", "json"]
    expected = cosine(open_run(recorded), "forget", "retain", "model")["value"]
    rows = strict(ask("scores", recorded, *pair).out)
    assert [row["value"] for row in rows] == pytest.approx(expected.tolist(), rel=1e-9, abs=0)


def test_validate(ask: Ask, recorded: Path) -> None:
    said = ask("validate", recorded)
    assert (said.code, said.out) == (0, f"{recorded}: whole, 4 steps\n")
    health = strict(ask("validate", recorded, "--format", "json").out)
    assert health == {
        "steps": 4, "complete": True, "problems": [], "remarks": [], "whole": True
    }  # fmt: skip


def test_validate_of_a_damaged_file(ask: Ask, recorded: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copy(recorded, tmp_path / "damaged.h5"))
    with h5py.File(damaged, "r+") as file:
        file["gram"][1, 0, 0, 1] += 1.0
    said = ask("validate", damaged)
    assert said.code == 1
    assert "damaged, 4 steps" in said.out
    assert "row 1 of `gram` is not what was written" in said.out
    seal(damaged)
    assert "not symmetric" in ask("validate", damaged).out
    assert strict(ask("validate", damaged, "--format", "json").out)["whole"] is False


# plot, report


@pytest.mark.parametrize("kind", ["heatmap", "profile", "trajectory", "sheet"])
@pytest.mark.parametrize("score", ["g-effect", "cosine"])
def test_plot(ask: Ask, recorded: Path, tmp_path: Path, kind: str, score: str) -> None:
    picture = tmp_path / "picture.png"
    said = ask("plot", recorded, "-o", picture, "--kind", kind, "--score", score)
    assert (said.code, said.err) == (0, "")
    drawn = imread(picture)
    height, width, _ = drawn.shape
    assert min(height, width) > 300
    assert drawn[..., :3].std() > 0.02
    assert picture.stat().st_size > 10_000
    assert pyplot.get_fignums() == []


@pytest.mark.parametrize("suffix", ["pdf", "svg"])
def test_plot_formats(ask: Ask, recorded: Path, tmp_path: Path, suffix: str) -> None:
    picture = tmp_path / f"picture.{suffix}"
    assert ask("plot", recorded, "-o", picture, "--by", "model", "--kind", "trajectory").code == 0
    assert picture.stat().st_size > 5_000


def test_report(ask: Ask, recorded: Path, unwatched: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    said = ask("report", recorded, unwatched, "-o", page)
    assert (said.code, said.out) == (0, f"2 runs in {page}\n")
    text = page.read_text(encoding="utf-8")
    assert_self_contained(text)
    for word in ("tiny", "plain", "What the numbers mean", "Retaining G-effect", "AdamW"):
        assert word in text
    assert pyplot.get_fignums() == []


def test_report_shows_weights_samples_and_tokens_where_a_run_has_them(
    ask: Ask, quick_study: Any, tmp_path: Path
) -> None:
    page = tmp_path / "report.html"
    assert ask("report", quick_study.out / "runs/ga-plain-seed0.h5", "-o", page).code == 0
    text = page.read_text(encoding="utf-8")
    assert_self_contained(text)
    for word in ("Implicit weights", "Samples", "Tokens", "Sample 2, effect on the retain risk"):
        assert word in text
    assert text.count("<img ") == 1
    assert text.count('<div class="tokens">') == 3 * 2
    assert text.count("height: .7em; background: linear-gradient(to right") == 3 * 2


def test_scores_with_intervals(ask: Ask, tmp_path: Path, recorded: Path) -> None:
    said = ask("scores", recorded, "--by", "model", "--intervals", "--format", "json")
    rows = strict(said.out)
    assert {"low", "high"} <= rows[0].keys()
    assert rows[0]["low"] is None  # one row a step: nothing to draw from
    assert rows[0]["rows"] == 1
    assert "No interval where a step has fewer than 8 rows" in ask(
        "scores", recorded, "--by", "model", "--intervals"
    ).out  # fmt: skip


def test_scores_with_intervals_of_many_steps(
    ask: Ask, recorded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps are summed up: the first and the last with their intervals, which are made up here."""
    table = pd.DataFrame({"step": range(20), "model": "model", "effect": "unlearning"})
    table = table.assign(value=table["step"] / 10, rows=9, low=-0.5, high=2.5)
    monkeypatch.setattr("geffect.cli.scores.table_of", lambda *_, **__: table)
    said = ask("scores", recorded, "--intervals").out
    assert "20 steps, 0 to 19, with 95 % intervals" in said
    assert re.search(r"unlearning │ 0 \[-0.5, 2.5\] │ +0.95 │ 1.9 \[-0.5, 2.5\]", said)


def test_scores_over_all_parameters(ask: Ask, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
    with Recorder(model, tmp_path / "part.h5") as recorder:
        loss = model(torch.ones(2)).sum()
        recorder.backward(objective={"forget": -1.0}, forget=loss, retain=2.0 * loss)
        optimizer.step()
    for told, stepped_only in (([], True), (["--all-parameters"], False)):
        said = ask("scores", tmp_path / "part.h5", "--by", "model", "--format", "json", *told).out
        table = g_effect(open_run(tmp_path / "part.h5"), by="model", stepped_only=stepped_only)
        assert [row["value"] for row in json.loads(said)] == table["value"].tolist()


# How it says no


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["info", "{nothing}"], 1, "should exist. Found nothing"),
        (["validate", "{text}"], 1, "should be a run file"),
        (["scores", "{unwatched}", "--score", "violation"], 1, "update=True"),
        (["scores", "{recorded}", "--score", "cosine", "--between", "forget,sun"], 2, "`sun`"),
        (["report", "{nothing}", "-o", "{page}"], 1, "should exist. Found nothing"),
        (["demo", "--quick", "--methods", "ga,magic", "--out", "{page}"], 2, "Found `magic`"),
        (["demo", "--out", "{text}"], 1, "Found the file"),
        (
            ["demo", "--resume", "--overwrite", "--out", "{page}"],
            2,
            "`--resume` should be without `--overwrite`",
        ),
        (["scores", "{recorded}", "--score", "cosine", "--between", "forget"], 2, "with a comma"),
        (
            ["scores", "{recorded}", "--score", "violation", "--all-parameters"],
            2,
            "should go with one of the scores g-effect, cosine, conflict, angles, norm-ratio, "
            "noise-floor. Found it with violation",
        ),
        (["scores", "{recorded}", "--score", "magic"], 2, "magic"),
        *[
            (
                [command, "{dropped}", *further],
                1,
                "The run `dropped` should have a step. Found none.",
            )
            for command, *further in (
                ["scores"],
                ["scores", "--format", "json"],
                ["plot", "-o", "{picture}"],
                ["report", "-o", "{page}"],
            )
        ],
        (["demo", "--seeds", "one", "--out", "{page}"], 2, "whole numbers"),
        (["plot", "{recorded}"], 2, "--output"),
        (["info"], 2, "`RUN` should be given. Found none."),
        (["info", "{recorded}", "more"], 2, "Found `more` as well. Leave that out."),
        (["plot", "{recorded}", "-o"], 2, "`-o` should be followed by a value. Found none."),
        (["scores", "{recorded}", "--intervals=1"], 2, "`--intervals` should stand alone."),
        (["report", "{recorded}", "-o", "{folder}"], 2, "should be a file. Found the folder"),
        (["scores", "{recorded}", "--formt", "csv"], 2, "Did you mean `--format`?"),
        (["demo", "--lora", "8"], 2, "`--lora` should go with `--model`. Found it alone."),
        (["demo", "--model", "x", "--quick"], 2, "`--quick` should be without `--model`."),
        (["demo", "--model", "x", "--lora", "1", "--layers", "1..2"], 2, "Leave one of them out."),
        (["demo", "--methods", "", "--out", "{page}"], 2, "Found ``."),
        (["demo", "--layers", "", "--model", "x"], 2, "`--layers` should be"),
        (["scoers", "{recorded}"], 2, "Did you mean `scores`?"),
        (["magic"], 2, "magic"),
    ],
)
def test_refusals(
    ask: Ask,
    recorded: Path,
    unwatched: Path,
    tmp_path: Path,
    arguments: list[str],
    code: int,
    says: str,
) -> None:
    text = tmp_path / "text.h5"
    text.write_text("no run")
    (tmp_path / "folder.html").mkdir()
    dropped = runs.recorded(tmp_path / "dropped.h5", runs.plain_rows(2))
    RunWriter(dropped, runs.PARAMETERS, resume=True, drop_after=-1).close(complete=True)
    places = {
        "recorded": recorded, "unwatched": unwatched, "text": text,
        "nothing": tmp_path / "nothing.h5", "page": tmp_path / "page.html",
        "folder": tmp_path / "folder.html", "dropped": dropped,
        "picture": tmp_path / "picture.png",
    }  # fmt: skip
    said = ask(*(argument.format(**places) for argument in arguments))
    assert (said.code, said.out) == (code, "")
    assert says in " ".join(said.err.replace("│", " ").split())
    assert "Traceback" not in said.err
    assert re.fullmatch(r"geffect: [^\n]*should [^\n]*Found [^\n]*\.\n", said.err)


@pytest.mark.parametrize(
    ("place", "says"),
    [("result.magic", "should end in"), ("missing/result{suffix}", "Found no folder")],
)
@pytest.mark.parametrize(
    ("command", "option", "suffix"),
    [("plot", "-o", ".png"), ("report", "-o", ".html")],
)
def test_where_nothing_can_be_written(
    ask: Ask, recorded: Path, tmp_path: Path, command: str, option: str, suffix: str, place: str,
    says: str,
) -> None:  # fmt: skip
    said = ask(command, recorded, option, tmp_path / place.format(suffix=suffix))
    assert (said.code, said.out) == (2, "")
    assert says in " ".join(said.err.replace("│", " ").split())
    assert "Traceback" not in said.err


@pytest.mark.parametrize(("command", "name"), [("plot", "a.png"), ("report", "a.html")])
def test_a_file_of_the_user_is_not_replaced_unasked(
    ask: Ask, unwatched: Path, tmp_path: Path, command: str, name: str
) -> None:
    output = tmp_path / name
    output.write_text("mine")
    said = ask(command, unwatched, "-o", output, "--by", "model")
    assert (said.code, said.out, output.read_text()) == (1, "", "mine")
    assert f"Found `{output}`. Choose another name, or replace it with --overwrite." in said.err
    assert ask(command, unwatched, "-o", output, "--by", "model", "--overwrite").code == 0
    assert output.stat().st_size > 1000


def test_a_name_that_begins_with_a_dash(
    ask: Ask, recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(recorded, tmp_path / "-dash.h5")
    monkeypatch.chdir(tmp_path)
    said = ask("info", "-dash.h5")
    assert said.code == 2
    assert "Found `-d`. Put -- before a name that begins with a dash. See" in said.err
    assert ask("info", "--", "-dash.h5").code == 0


def test_a_file_that_may_not_be_read(
    ask: Ask, recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = tmp_path / "closed" / "run.h5"
    exists = Path.exists

    def permitted(path: Path) -> bool:
        if path == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return exists(path)

    monkeypatch.setattr(Path, "exists", permitted)
    said = ask("info", closed)
    assert (said.code, said.out) == (1, "") and "Found: Permission denied" in said.err
    monkeypatch.setattr("os.access", lambda *_: False)
    said = ask("info", recorded)
    assert (said.code, said.out) == (2, "")
    assert said.err == (
        f"geffect: `RUN` should be readable. Found `{recorded}`, which is not. Mend that, or "
        "choose another file.\n"
    )


@pytest.mark.parametrize(
    ("command", "name", "options"),
    [
        ("plot", "a.png", ["--by", "model"]),
        ("plot", "a.pdf", ["--by", "model"]),
        ("plot", "a.svg", ["--by", "model"]),
        ("report", "a.html", []),
        ("figures", "out/table-1.csv", ["--paper"]),
    ],
)
def test_a_full_disk_keeps_the_file_that_was_there(
    unwatched: Path, tmp_path: Path, command: str, name: str, options: list[str]
) -> None:
    output = tmp_path / name
    output.parent.mkdir(exist_ok=True)
    output.write_text("mine")
    asked = output.parent if command == "figures" else output
    said = alone(command, unwatched, "-o", asked, *options, "--overwrite", most=500)
    assert said.code == 1 and re.fullmatch(
        r"geffect: `.*` should be there for reading or writing. Found: File too large. Mend that, "
        r"or choose another place.\n", said.err
    )  # fmt: skip
    assert output.read_text() == "mine"
    assert [path.name for path in output.parent.iterdir()] == [output.name]


HELP = {
    "demo": [
        "--out",
        "--seeds",
        "--methods",
        "--quick",
        "--all-variants",
        "--variants",
        "--controls",
    ],
    "info": ["RUN", "--format", "json"],
    "scores": ["RUN", "--score", "--by", "--between", "--format"],
    "plot": ["RUN", "--output", "--kind", "--score", "--by", "--between"],
    "report": ["RUN...", "--output"],
    "compare": ["RUN", "OTHER", "--format", "json"],
    "layers": ["RUN", "--recommend", "--gain", "--format"],
    "join": ["RUN", "EVALS", "--output", "--format"],
    "plan": ["MODEL", "--forget", "--set", "--objective", "--lr", "--probe", "--output", "simnpo"],
    "validate": ["RUN", "--format", "json"],
}


@pytest.mark.parametrize("command", HELP)
def test_help(ask: Ask, command: str) -> None:
    said = ask(command, "--help")
    assert said.code == 0
    assert [name for name in HELP[command] if name not in said.out] == []
    assert command in ask("--help").out


def test_the_installed_command(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("geffect")
    told = [script, "info", tmp_path / "nothing.h5"]
    ended = subprocess.run(told, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith("geffect: A run file should exist.")
    assert ended.stderr.count("\n") == 1


# demo

SUMMARY = {"format", "versions", "seeds", "config", "wall_seconds", "gold", "runs", "findings"}
AT_LEVEL = {
    "step", "retain_nll", "retain_heldout_authors_nll", "world_nll", "forget_es", "retain_es",
    "forget_paraphrase_nll", "relearn_nll", "value_nll", "recognition", "recognition_taught",
}  # fmt: skip
RUN = {
    "method", "variant", "seed", "file", "steps", "reached_level", "at_level",
    "share_retaining_negative", "share_update_violating",
}  # fmt: skip


def test_demo_writes_its_summary(quick_study: Any) -> None:
    summary = strict((quick_study.out / "summary.json").read_text())
    assert summary.keys() >= SUMMARY
    assert (summary["format"], summary["seeds"]) == (1, [0])
    assert {"total", "stages"} <= summary["wall_seconds"].keys()
    assert {"forget_nll", "retain_nll", "world_nll"} <= summary["gold"]["0"].keys()
    gold, original = summary["gold"]["0"], summary["original"]["0"]
    for recognition in ("recognition", "recognition_taught"):
        assert gold[recognition] < 0.7 < 0.95 < original[recognition]
    assert original["value_nll"] < 0.5 < 3 < gold["value_nll"]
    assert [run["variant"] for run in summary["runs"]] == list(IN_A_LOOK)
    assert summary["further_runs"] == []
    for run in summary["runs"]:
        assert run.keys() >= RUN
        assert run["learning_rate"] == VARIANTS[run["variant"]].learning_rates[0]
        assert run["reached_level"]
        assert run["at_level"].keys() >= AT_LEVEL
        assert len(run["at_level"]["relearn_nll"]) == 2
    for finding in summary["findings"]:
        assert finding.keys() >= {"claim", "holds", "numbers"}


def test_a_second_demo_is_refused(ask: Ask, quick_study: Any) -> None:
    before = (quick_study.out / "summary.json").read_bytes()
    said = ask("demo", "--quick", "--out", quick_study.out)
    assert (said.code, said.out) == (1, "")
    assert re.fullmatch(r"geffect: [^\n]* --resume [^\n]* --overwrite [^\n]*\.\n", said.err)
    assert (quick_study.out / "summary.json").read_bytes() == before


def test_demo_writes_its_runs(quick_study: Any) -> None:
    for run in quick_study.summary["runs"]:
        assert run["file"] == f"runs/{run['method']}-{run['variant']}-seed{run['seed']}.h5"
        health = validate(quick_study.out / run["file"])
        assert (health.whole, health.complete, health.steps) == (True, True, run["steps"])
        assert health.remarks == ()


def test_demo_writes_its_table(quick_study: Any) -> None:
    table = pd.read_csv(quick_study.out / "equal_forgetting.csv")
    assert set(table.columns) >= AT_LEVEL | {"method", "variant", "seed", "learning_rate"}
    assert table["variant"].tolist() == [*IN_A_LOOK, "retrained"]
    said = [run["at_level"]["retain_nll"] for run in quick_study.summary["runs"]]
    assert table["retain_nll"].tolist()[:-1] == pytest.approx(said)


def test_demo_draws(quick_study: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = sorted(path.name for path in (quick_study.out / "figures").iterdir())
    names = ["conflict", "cosine", "g_effect_ga", "recognition", "sheet_ga", "tradeoff"]
    assert drawn == sorted(f"{name}.{kind}" for name in names for kind in ("pdf", "png"))
    assert figures.names(quick_study.summary, quick_study.out) == [
        "tradeoff", "recognition", "g_effect_ga", "sheet_ga", "cosine", "conflict"
    ]  # fmt: skip
    monkeypatch.setattr(figures, "save", lambda *_, **__: None)
    for name in names:
        figures.draw(name, quick_study.summary, quick_study.out)
    assert pyplot.get_fignums() == []


def test_demo_reports(quick_study: Any) -> None:
    text = (quick_study.out / "report.html").read_text(encoding="utf-8")
    assert_self_contained(text)
    for word in ("The price of forgetting", "What the numbers mean", *IN_A_LOOK):
        assert word in text
    assert text.count("data:image/png;base64,") == 6


def test_demo_tells_how_far_it_is_in_plain_lines(quick_study: Any) -> None:
    lines = quick_study.said.splitlines()
    assert any(re.match(r" *\d+\.\d s +\d+ %  unlearn +ga-gru-seed0: ", line) for line in lines)
    assert any("findings hold" in line for line in lines)
    assert not re.search(r"[\x1b\r]", quick_study.said)
    assert quick_study.complained == ""


def test_demo_gives_the_same_numbers_again(quick_study: Any, tmp_path: Path) -> None:
    summary = quick_study.summary
    (tmp_path / "models").symlink_to(quick_study.out / "models")
    (tmp_path / "runs").mkdir()
    level = {"forget_nll": summary["gold"]["0"]["forget_nll"]}
    cell = RunSpec(EQUAL, "ga", "gru-update", 3e-4, QUICK.corpus.heldout)
    job = Unlearning(tmp_path, 0, cell, VARIANTS["gru-update"], level, QUICK)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        again = json.loads(json.dumps(job.run(lambda done, says: None)))
    finally:
        torch.set_num_threads(threads)
    (first,) = [run for run in summary["runs"] if run["variant"] == "gru-update"]
    assert again == first
    one, other = open_run(tmp_path / first["file"]), open_run(quick_study.out / first["file"])
    assert (one.gram() == other.gram()).all()


def test_a_study_of_all_objectives(
    ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: list[Plan] = []
    monkeypatch.setattr("geffect.cli.demo.run_study", lambda out, plan, _: plans.append(plan))
    for further in ([], ["--variants", "plain"], ["--all-variants"], ["--edits", "ssd,mix"]):
        assert ask("demo", "--methods", "all", *further, "--out", tmp_path).code == 0
    ran = [{(spec.method, spec.variant) for spec in plan.specs()} for plan in plans]
    every = every_objective()
    assert ran == [{*product(every, names)} for names in (OF_ALL, ("plain",), VARIANTS, OF_ALL)]
    assert [plan.edits for plan in plans] == [tuple(EDITS)] * 3 + [("ssd", "mix")]
    # What is left out is there by another name.
    assert {CATALOGUE[name] for name in every} == {*CATALOGUE.values()}
    assert len({CATALOGUE[name] for name in every}) == len(every)


def test_edits_that_are_refused(ask: Ask, tmp_path: Path) -> None:
    for options, said in (
        (["--edits", "sssd"], "`sssd`. Did you mean `ssd`?"),
        (["--edits", "ssd", "--model", "x"], "--model"),
        (["--so-far", "--overwrite"], "--overwrite"),
    ):
        answer = ask("demo", *options, "--out", tmp_path / "out")
        assert answer.code == 2 and said in " ".join(answer.err.split())


def test_a_study_is_reported_so_far(
    ask: Ask, quick_study: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is run: what has a result stands in the tables, and the page says what is missing."""
    monkeypatch.setattr("geffect.demo.study.working", lambda *_: nullcontext(run_here))
    monkeypatch.setattr("geffect.demo.figures.names", lambda *_: [])
    for name in ("results", "runs", "models"):
        shutil.copytree(quick_study.out / name, tmp_path / name)
    for name in ("ga-gru", "ga-select"):
        (tmp_path / "results" / f"{name}-seed0.json").unlink()
    told = ["demo", "--quick", "--methods", "ga", "--so-far", "--out", tmp_path]
    assert ask(*told).code == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    before = [r for r in quick_study.summary["runs"] if r["variant"] not in ("gru", "select")]
    assert summary["runs"] == before and summary["whole"] == {"runs": 3, "of": 5}
    page = (tmp_path / "study.md").read_text()
    assert "**The study is not whole**: 3 of 5 runs and edits are through." in page
    assert "not whole" not in (quick_study.out / "study.md").read_text()
    for file in (tmp_path / "results").glob("ga-*.json"):
        file.unlink()
    answer = ask(*told)
    assert answer.code and "Found none that is whole" in " ".join(answer.err.split())


def run_here(jobs: Sequence[Kept]) -> list[Any]:
    return [job.run(lambda done, says: None) for job in jobs]


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ValueError("A batch should have rows. Found none."), "A batch should have rows."),
        (OSError("A batch should be there."), "A batch should be there."),
        (PermissionError(errno.EACCES, "No right", "facts.jsonl"), "Found: No right."),
    ],
)
def test_where_an_error_was_found_is_told(
    ask: Ask, monkeypatch: pytest.MonkeyPatch, error: Exception, says: str
) -> None:
    def failing(*arguments: Any, **options: Any) -> None:
        with noting("It was found in the data of risk `facts`."):
            raise error

    monkeypatch.setattr("geffect.cli.main.app", failing)
    said = ask("info", "a.h5")
    assert said.code == 1 and says in said.err
    assert said.err.endswith(" It was found in the data of risk `facts`.\n")
