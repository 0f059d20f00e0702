"""What is printed: text that stays text, and tables that cut nothing however narrow they are."""

import io
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from rich.cells import cell_len
from rich.console import Console

from geffect.cli.options import Format
from geffect.cli.terminal import canvas, say, say_marked, show, terminal, write_table

NAMES = [
    "model.layers.10.mlp.up_proj.weight", "[/foo]", "[red]x", "語言模型的名字很長很長", ":warning:",
    "a|b",
]  # fmt: skip
HEADINGS = ["step", "parameter", "effect", "first", "median", "last"]
ROWS = [
    [str(10**i), name, "unlearning", f"-{i}.123e-05", f"{i}.5", f"-{i}.25 [-1.5, 2.25]"]
    for i, name in enumerate(NAMES)
]


def narrow(width: int) -> Console:
    return Console(
        file=io.StringIO(), width=width, markup=False, emoji=False, highlight=False, soft_wrap=True
    )


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_narrow_terminal_cuts_no_number_and_no_name(width: int) -> None:
    console = narrow(width)
    show(console, HEADINGS, ROWS, names=["parameter", "effect"], spare=["median", "first"])
    out = printed(console)
    table = [line for line in out.splitlines() if line.startswith(("│", "┃"))]
    gone = (
        " ".join(out.split())
        .partition("Left out for want of room: ")[2]
        .partition(".")[0]
        .split(", ")
    )
    shown = [heading for heading in HEADINGS if heading not in gone]
    assert "…" not in out and (width < 80) == (shown != HEADINGS)
    columns = [
        *zip(*(line.strip("│┃").replace("┃", "│").split("│") for line in table), strict=True)
    ]
    for heading, column in zip(shown, columns, strict=True):
        written = [row[HEADINGS.index(heading)] for row in ROWS]
        if heading in ("parameter", "effect"):
            together = "".join(part.strip() for part in column)
            assert together == "".join([heading, *written])
        else:
            assert [part.strip() for part in column if part.strip()] == [heading, *written]


@pytest.mark.parametrize("width", [24, 30, 40, 50])
def test_where_no_table_has_room_each_row_is_a_list_of_all_columns(width: int) -> None:
    console = narrow(width)
    rows = [[cell[:20] for cell in row] for row in ROWS]
    show(console, HEADINGS, rows, names=["parameter", "effect"], spare=["median", "first"])
    out = printed(console)
    assert all(cell_len(line) <= width for line in out.splitlines()) or width < 31
    lists = out.rstrip("\n").split("\n\n")
    assert len(lists) == len(rows)
    for row, told in zip(rows, lists, strict=True):
        words = [
            word for pair in zip(HEADINGS, row, strict=True) for word in " ".join(pair).split()
        ]
        assert told.split() == words


@pytest.mark.parametrize("width", [20, 40, 80])
def test_a_narrow_terminal_gets_lines_that_are_folded_between_words(width: int) -> None:
    console = narrow(width)
    path = "/a/folder/with-a-long/name/of/a-run/that/is/no/word/to/be/cut/anywhere/run.h5"
    words = f"  G-effect (nats per unit learning rate): 12 steps, 語言 in {path} and more".split(
        " "
    )
    say(console, " ".join(words))
    lines = printed(console).splitlines()
    assert [word for line in lines for word in line.split()] == [w for w in words if w]
    assert all(cell_len(line) <= width or line.strip() == path for line in lines) and len(lines) > 1
    assert lines[0].startswith("  G-effect")


@pytest.mark.parametrize(("columns", "wide"), [("0", 80), ("1", 22), ("120", 120)])
def test_a_terminal_of_no_or_few_columns_gets_all(
    monkeypatch: pytest.MonkeyPatch, columns: str, wide: int
) -> None:
    """What is drawn in columns is not cut, and a width of 0 is one that nobody knows."""
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr("sys.stdout", at := io.StringIO())
    monkeypatch.setattr(at, "isatty", lambda: True)
    assert canvas(80).width == wide
    say(terminal(), "all of it")
    assert at.getvalue().split() == ["all", "of", "it"]


def test_what_is_no_terminal_has_room_for_all(capsys: pytest.CaptureFixture[str]) -> None:
    show(terminal(), HEADINGS, ROWS, names=["parameter", "effect"], spare=["median", "first"])
    say(terminal(), "word " * 100)
    out = capsys.readouterr().out
    assert len(out.splitlines()) == len(ROWS) + 4 + 1
    assert "\x1b" not in out and all(heading in out for heading in HEADINGS)


@pytest.mark.parametrize("name", NAMES)
def test_names_are_no_markup(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    say(terminal(), f"of {name}")
    assert capsys.readouterr().out == f"of {name}\n"


def test_tables_as_data(capsys: pytest.CaptureFixture[str]) -> None:
    table = pd.DataFrame({"layer": ["a\tb\nc", '"q",'], "value": [1e-17 / 3, float("nan")]})
    write_table(table, Format.TSV)
    assert capsys.readouterr().out == f'layer\tvalue\na\\tb\\nc\t{1e-17 / 3}\n"q",\t\n'
    write_table(table, Format.CSV)
    read = pd.read_csv(io.StringIO(capsys.readouterr().out))
    pd.testing.assert_frame_equal(read, table)
    write_table(table, Format.JSON)
    assert '"value": null' in capsys.readouterr().out


@pytest.mark.parametrize(
    "words", [["scores", "{}", "--format", "csv"], ["info", "{}"], ["scores", "{}"], ["--help"]]
)
def test_nobody_reads_on(recorded: Path, words: list[str]) -> None:
    script = Path(sys.executable).with_name("geffect")
    told = [script, *(word.format(recorded) for word in words)]
    with subprocess.Popen(told, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None and run.stderr is not None
        run.stdout.close()
        said = run.stderr.read()
    assert (run.returncode, said) == (141, "")


def test_words_of_names_stay_whole_where_a_column_may_go() -> None:
    rows = [["model", "inner_before", "1.25", "-0.123456"], ["model", "retain_norm", "2.5", "0.5"]]
    console = narrow(36)
    show(console, ["of", "quantity", "first", "last"], rows, names=["of", "quantity"], spare=["of"])
    out = printed(console)
    assert "inner_before" in out and "retain_norm" in out
    assert "Left out for want of room: of." in out


def test_further_lines_of_what_is_folded_hang() -> None:
    console = narrow(24)
    say(console, "sources   objective, forget, retain, update", hang=10)
    first, *others = printed(console).splitlines()
    assert first.startswith("sources   objective,") and others
    assert all(line.startswith(" " * 10) and len(line) <= 24 for line in others)
    assert " ".join(" ".join([first, *others]).split()).endswith("forget, retain, update")


@pytest.mark.parametrize("width", [8, 40, 80, 100_000])
def test_what_stands_behind_a_mark_is_folded_below_its_beginning(width: int) -> None:
    console, text = narrow(width), "a claim of many words: 0.0405 nats against 0.0576 " * 3
    say_marked(console, "holds", "green", text)
    first, *others = printed(console).splitlines()
    assert first.startswith("  holds a") and " ".join([first, *others]).split()[1:] == text.split()
    assert all(line.startswith(" " * 8) and line[8] != " " for line in others)
    assert bool(others) == (width < len(text))
    if width > 20:
        assert max(map(cell_len, [first, *others])) <= width


def test_columns_without_room_are_told_with_what_has_them() -> None:
    console = narrow(30)
    show(console, HEADINGS, ROWS[:1], names=HEADINGS[1:3], spare=HEADINGS[:0:-1], whole="a.csv")
    assert "and so does a.csv." in " ".join(printed(console).split())


@pytest.mark.parametrize("width", range(12, 40))
def test_a_number_stays_on_the_line_of_its_per_cent(width: int) -> None:
    console = narrow(width)
    say(console, text := "a step 93 % of 7, else 100 %; " * 4)
    lines = printed(console).splitlines()
    assert not [line for line in lines if line.startswith("%")]
    assert " ".join(lines).split() == text.split() and max(map(cell_len, lines)) <= width
