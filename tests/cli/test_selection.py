"""Which options a score or a picture takes: each changes what comes out, or is refused."""

from itertools import chain, product
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn
from typer.main import get_command

from geffect import Recorder, Rectifier
from geffect.cli.main import app
from geffect.cli.plot import Kind
from geffect.cli.selection import OF_SOME, By, ScoreName
from tests.utils.command_line import Answer, Ask

OPTIONS: dict[str, list[str]] = {
    "--between": ["forget,retain"],
    "--intervals": [],
    "--all-parameters": [],
    "--by": ["group"],
    "--format": ["tsv"],
}
"""Every option of a score, at a value that is not its default."""

COMMANDS: Any = get_command(app)


@pytest.fixture(scope="module")
def partly_stepped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with all that scores ask for, whose optimizer leaves one of two layers alone."""
    path = tmp_path_factory.mktemp("options") / "run.h5"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
    rectifier = Rectifier(model)
    with Recorder(model, path, update=True) as recorder:
        for step in range(3):
            forget, retain = (model(torch.tensor(x)).sum() ** 2 for x in ([1.0, step], [step, 2.0]))
            recorder.backward(
                objective={"forget": -1.0}, forget=forget, retain=retain, rectifier=rectifier
            )
            optimizer.step()
            model.zero_grad()
    return path


def options_of(command: str) -> set[str]:
    names = {max(p.opts, key=len) for p in COMMANDS.commands[command].params}
    return {name for name in names if name.startswith("--")} - {"--help"}


def test_every_option_of_a_score_is_asked_about_here() -> None:
    assert options_of("scores") == {*OPTIONS, "--score"}
    assert {*OPTIONS} >= OF_SOME


@pytest.mark.parametrize(("score", "option"), list(product(ScoreName, OPTIONS)))
def test_an_option_changes_the_table_or_is_refused(
    ask: Ask, partly_stepped: Path, score: ScoreName, option: str
) -> None:
    told = {"--by": ["parameter"], "--format": ["csv"]}
    if score == ScoreName.RECTIFICATION:
        del told["--by"]

    def asked(options: dict[str, list[str]]) -> Answer:
        words = chain.from_iterable([name, *values] for name, values in options.items())
        return ask("scores", partly_stepped, "--score", score, *words)

    plain, with_it = asked(told), asked(told | {option: OPTIONS[option]})
    assert plain.code == 0
    if option in OF_SOME - {*score.takes}:
        assert (with_it.code, with_it.out) == (2, "")
        assert with_it.err.startswith(f"geffect: `{option}` should go with one of the scores ")
    elif with_it.code:  # a rectifier of the model has no numbers of its parts
        assert (score, option, with_it.out) == (ScoreName.RECTIFICATION, "--by", "")
    else:
        assert with_it.out != plain.out


@pytest.mark.parametrize(("kind", "score"), list(product(Kind, ScoreName)))
def test_a_picture_is_of_the_score_or_is_refused(
    ask: Ask,
    partly_stepped: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: Kind,
    score: ScoreName,
) -> None:
    monkeypatch.setattr("geffect.cli.plot.draw", lambda table, kind: Figure((1, 1)))
    picture = tmp_path / "picture.png"
    said = ask("plot", partly_stepped, "-o", picture, "--kind", kind, "--score", score)
    of_one = {
        "rectification": {"rectification"},
        "timeline": {"conflict", "violation"},
        "accumulated": {"accumulated"},
        "walk": {"accumulated"},
        "angles": {"angles"},
        "norm-ratio": {"norm-ratio"},
        "noise-floor": {"noise-floor"},
    }
    of_all = {*ScoreName} - ({*set().union(*of_one.values())} - {"conflict", "violation"})
    if score in of_one.get(kind, of_all):
        assert (said.code, said.err) == (0, "") and f"{score} in {picture}" in said.out
    else:
        assert (said.code, said.out, picture.exists()) == (2, "", False)
        assert f"Found `--kind {kind}` with `--score {score}`." in said.err


OF_ONE_BLOCK = {Kind.RECTIFICATION, Kind.ACCUMULATED, Kind.WALK, Kind.ANGLES}
"""The pictures with room for one block, or of a rectifier that has one."""

SEVERAL = {By.PARAMETER, By.LAYER, By.GROUP, By.PAPER}
"""What makes more than one block of two layers."""


@pytest.mark.parametrize(("kind", "by"), list(product(Kind, By)))
def test_what_refuses_blocks_names_the_option(
    ask: Ask,
    partly_stepped: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: Kind,
    by: By,
) -> None:
    monkeypatch.setattr("geffect.plots.figures.save", lambda *_, **__: None)
    told = ["plot", partly_stepped, "-o", tmp_path / "picture.png", "--kind", kind, "--by", by]
    said = ask(*told)
    if by is not By.EXPERT and not (kind in OF_ONE_BLOCK and by in SEVERAL):
        assert (said.code, said.err) == (0, "")
    else:
        assert (said.code, said.err.count("\n")) == (2, 1)
        assert said.err.startswith("geffect: `--by` should ")
        assert "--by model" in said.err or "--by layer" in said.err
        assert "`table`" not in said.err and "by=" not in said.err
    if kind in ("walk", "accumulated", "angles") and by is By.LAYER:
        assert said.code == 2 and ask(*told, "--layers", "0").code == 0


def test_a_gradient_that_is_not_there_is_one_of_its_option(
    ask: Ask, partly_stepped: Path, tmp_path: Path
) -> None:
    between = ["--between", "moon,retain"]
    for score in (s for s in ScoreName if "--between" in s.takes):
        for command in (["scores"], ["plot", "-o", tmp_path / "picture.png"]):
            said = ask(*command, partly_stepped, "--score", score, *between)
            assert (said.code, said.out) == (2, "")
            assert said.err.startswith("geffect: Each of `--between` should be one of objective,")
            assert "Found `moon`." in said.err


@pytest.mark.parametrize("score", ScoreName)
def test_an_option_changes_the_picture_or_is_refused(
    ask: Ask,
    partly_stepped: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    score: ScoreName,
) -> None:
    tables = []
    monkeypatch.setattr(
        "geffect.cli.plot.draw", lambda table, kind: tables.append(table) or Figure((1, 1))
    )
    told = ["plot", partly_stepped, "-o", tmp_path / "picture.png", "--score", score]
    told += ["--overwrite"]
    of_the_score = {"--between", "--by", "--kind", "--output", "--score"}
    parts = {"--steps", "--layers"}  # of any score: what they leave is tested by itself
    assert options_of("plot") == of_the_score | parts | {"--style", "--overwrite"}
    assert ask(*told, "--by", "model").code == 0
    said = ask(*told, "--by", "model", "--between", "forget,retain")
    if "--between" in score.takes:
        assert said.code == 0 and not tables[0].equals(tables[1])
    else:
        assert said.code == 2 and "`--between` should go with" in said.err


@pytest.mark.parametrize(
    ("told", "says"),
    [
        (["--score", "cosin"], "Found `cosin`. Did you mean `cosine`?"),
        (["--score", "cosine", "--between", "objective,retian"], "Did you mean `retain`?"),
        (["--by", "layers"], "Did you mean `layer`?"),
        (["--format", "jsno"], "Did you mean `json`?"),
        (["--formt", "json"], "Did you mean `--format`?"),
    ],
)
def test_what_is_near_to_a_misspelt_name_is_told(
    ask: Ask, partly_stepped: Path, told: list[str], says: str
) -> None:
    said = ask("scores", partly_stepped, *told)
    assert (said.code, said.out) == (2, "")
    assert says in said.err and said.err.count("\n") == 1


@pytest.mark.parametrize(
    "twice", [["--by", "layer", "--by", "group"], ["--format", "tsv", "--format=tsv"]], ids=str
)
def test_an_option_that_is_given_twice_is_refused(ask: Ask, twice: list[str]) -> None:
    code, out, err = ask("scores", "run.h5", *twice)
    assert (code, out) == (2, "")
    assert f"`{twice[0]}` should be given once. Found it 2 times." in err


def test_an_option_of_an_objective_that_is_given_twice_is_refused(ask: Ask) -> None:
    needed = ["--objective", "npo", "--forget", "f.jsonl", "--retain", "r.jsonl", "-o", "a.h5"]
    code, _, err = ask("replay", ".", *needed, "--beta", "0.1", "--beta", "0.2")
    assert code == 2
    assert "`--beta` should be given once" in err
