"""Pages of help: no word and no choice is broken, however narrow the terminal is."""

import re
from typing import Any

import pytest
from typer.main import get_command

from geffect.cli.main import app
from geffect.cli.plot import Kind
from geffect.cli.selection import By, ScoreName
from tests.utils.command_line import Ask

GROUP: Any = get_command(app)


@pytest.mark.parametrize("width", [40, 60, 80, 100, 200])
@pytest.mark.parametrize("command", ["", *GROUP.commands])
def test_a_page_breaks_between_words(
    ask: Ask, monkeypatch: pytest.MonkeyPatch, command: str, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    page = ask(*command.split(), "--help").out
    monkeypatch.setenv("COLUMNS", "100")
    assert page.split() == ask(*command.split(), "--help").out.split()
    assert "…" not in page
    for line in page.splitlines():
        assert len(line) <= max(width, 6 + max(map(len, line.split()), default=0))
    parameters = (GROUP.commands[command] if command else GROUP).params
    for option in (name for parameter in parameters for name in parameter.opts):
        assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", page) or option.islower()


@pytest.mark.parametrize("names", [ScoreName, By])
def test_choices_are_whole_words(ask: Ask, names: type[ScoreName] | type[By]) -> None:
    words = re.findall(r"[\w-]+", ask("scores", "--help").out)
    assert {*names} <= {*words}
    assert {*Kind} <= {*re.findall(r"[\w-]+", ask("plot", "--help").out)}
