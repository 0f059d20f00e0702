"""A run that is looked at says what it is."""

import html
import re
from pathlib import Path

import numpy as np

from geffect import open_run
from geffect.store.summary import size_of
from tests.utils.runs import PARAMETERS, SOURCES, plain_rows, recorded


def test_a_run_says_its_steps_parameters_sources_and_size(tmp_path: Path) -> None:
    path = recorded(tmp_path / "a.h5", plain_rows(5, first=2))
    said = repr(open_run(path))
    numbers = sum(int(np.prod(parameter.shape)) for parameter in PARAMETERS)
    assert "\n" not in said
    assert said == (
        f"<Run a: state complete; steps 5, from 2 to 6; parameters {len(PARAMETERS)} with "
        f"{numbers:,} numbers; sources {', '.join(SOURCES)}; size {path.stat().st_size / 1e3:.3g} "
        f"kB; file {path}>"
    )


def test_a_run_that_was_not_closed_says_so(tmp_path: Path) -> None:
    run = open_run(recorded(tmp_path / "a.h5", plain_rows(3), complete=False))
    assert "state open (its writer has not closed it); steps 3, from 0 to 2;" in repr(run)
    assert "steps 0; parameters" in repr(run.until(-1))


def test_the_size_is_that_of_all_files_of_the_run(tmp_path: Path) -> None:
    path, beside = tmp_path / "a.h5", tmp_path / "a.gradients"
    path.write_bytes(bytes(700))
    assert size_of(path) == "700 bytes"
    beside.mkdir()
    (beside / "000.rank0.h5").write_bytes(bytes(1800))
    assert size_of(path) == "2.5 kB"


def test_a_run_whose_file_is_gone_can_be_looked_at(tmp_path: Path) -> None:
    run = open_run(recorded(tmp_path / "a.h5", plain_rows(1)))
    run.path.unlink()
    assert "size gone" in repr(run)


def test_a_notebook_shows_the_same_as_a_table(tmp_path: Path) -> None:
    run = open_run(recorded(tmp_path / "<b> & co.h5", plain_rows(2)))
    page = run._repr_html_()
    assert page.startswith("<table>") and page.endswith("</table>")
    assert "<b> &" not in page
    cells = [html.unescape(cell) for cell in re.findall(r"<t[hd].*?>(.*?)</t[hd]>", page)]
    said = dict(zip(cells[::2], cells[1::2], strict=True))
    assert list(said) == ["state", "steps", "parameters", "sources", "size", "file"]
    assert said["file"] == str(run.path)
    assert all(f"{name} {words}" in repr(run) for name, words in said.items())
