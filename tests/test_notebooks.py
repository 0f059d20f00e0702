"""The notebooks run, from their first cell to their last, and show what they speak of."""

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest

PLACE = Path(__file__).parents[1] / "notebooks"

# How many figures stand under each heading.
FIGURES = {
    "audit": {"What comes back, attack by attack": 1},
    "capture": {"What is in the file": 1, "Is it true?": 1},
    "read_the_geometry": {
        "The G-effect": 1,
        "Where": 2,
        "The cosine": 1,
        "Conflict": 1,
        "The predicted change": 1,
        "The rectifier": 1,
        "Violation": 1,
        "The price": 1,
    },
    "rectify": {
        "The plain run": 1,
        "One line": 1,
        "Another line": 1,
        "The same as a table": 1,
        "What it was good for": 1,
    },
}


@pytest.fixture(params=FIGURES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def notebook(name: str) -> Any:
    return nbformat.read(PLACE / f"{name}.ipynb", as_version=4)


def test_all_of_them_are_tested() -> None:
    assert {place.stem for place in PLACE.glob("*.ipynb")} == set(FIGURES)


def test_it_is_kept_without_outputs(notebook: Any) -> None:
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)


@pytest.mark.usefixtures("quick_study")  # so that it is among the first
def test_it_runs(name: str, executed: Callable[[str], Path]) -> None:
    notebook = nbformat.read(executed(name), as_version=4)
    drawn = {title.partition(":")[0]: n for title, n in pictures(notebook).items() if n}
    assert drawn == FIGURES[name]
    said = [output for cell in code(notebook) for output in cell.outputs]
    assert not [output for output in said if output.output_type in ("error", "stream")]
    assert [output for output in said if output.get("data", {}).get("text/plain") == "True"]


def code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def pictures(notebook: Any) -> dict[str, int]:
    """How many figures, each more than an empty frame, stand under each heading."""
    heading, count = "", {}
    for cell in notebook.cells:
        titles = [line for line in cell.source.splitlines() if line.startswith("## ")]
        if cell.cell_type == "markdown" and titles:
            heading = titles[-1].removeprefix("## ")
        for output in cell.get("outputs", []):
            if image := output.get("data", {}).get("image/png"):
                assert len(base64.b64decode(image)) > 5_000
                count[heading] = count.get(heading, 0) + 1
    return count
