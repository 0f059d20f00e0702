"""The page on costs and README's table show the figures of the benchmark."""

import json
from pathlib import Path

import pytest

from tests.bench.page import SHORT, costs_page, main, with_figures

ROOT = Path(__file__).parents[2]


def row(quantity: str, ratio: float, device: str = "CPU, one thread") -> dict[str, object]:
    return {
        "quantity": quantity, "ratio": ratio, "bar": 0.8, "at_least": True, "holds": True,
        "rounds": 7, "spread": 0.012, "device": device, "workload": "Llama of 34M parameters",
    }  # fmt: skip


def test_every_row_is_in_the_page_under_its_device() -> None:
    rows = [row("a / |b|", 1.2345), row("c", 2.0), row("d", 3.0, "a GPU")]
    page = costs_page(rows)
    cpu, gpu = page.split("## a GPU")
    assert "## CPU, one thread\n\n`make bench`, Llama of 34M parameters." in cpu
    assert "| a / \\|b\\| | 1.23 | ≥ 0.8 | 0.012 | 7 |" in cpu
    assert "| c | 2 |" in cpu and "| d |" not in cpu
    assert "| d | 3 |" in gpu


def test_readme_gets_the_figures(tmp_path: Path) -> None:
    bench, readme = tmp_path / "bench.json", tmp_path / "README.md"
    rows = [row(quantity, i + 0.256) for i, quantity in enumerate(SHORT)]
    bench.write_text(json.dumps([row("c", 2.0), *rows]))
    before = (ROOT / "README.md").read_text(encoding="utf-8")
    readme.write_text(before, encoding="utf-8")
    page = tmp_path / "costs.md"
    main(
        [
            str(bench),
            "--page",
            str(page),
            "--readme",
            str(readme),
            "--sizes",
            str(tmp_path / "none"),
        ]
    )
    assert page.read_text(encoding="utf-8") == costs_page(json.loads(bench.read_text()))
    changed = set(readme.read_text(encoding="utf-8").splitlines()) - set(before.splitlines())
    assert {line.split("|")[2].strip() for line in changed} == {
        f"{i}.26" for i in range(len(SHORT))
    }


def test_a_readme_without_the_row_is_refused() -> None:
    with pytest.raises(ValueError, match=r"should have one row .* Found 0"):
        with_figures("# A page", [row(next(iter(SHORT)), 1.0)])
