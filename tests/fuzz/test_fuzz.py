"""Damaged run files are read right or refused; and the search for those that are not finds them."""

import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from geffect.store import checksums, open_run, rows
from tests.fuzz import mutations, runner
from tests.fuzz.__main__ import main
from tests.fuzz.mutations import DAMAGES, HARMLESS
from tests.fuzz.oracle import REFUSED, alarm, answers, verdict
from tests.fuzz.originals import Original, originals

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks what may crash")

MUTANTS, AT_ONCE = 500, 125


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Original, ...]:
    return originals(tmp_path_factory.mktemp("originals"))


@pytest.mark.parametrize("first", range(0, MUTANTS, AT_ONCE))
def test_no_damage_is_silent_foreign_endless_or_fatal(
    runs: tuple[Original, ...], first: int
) -> None:
    seeds = range(first, first + AT_ONCE)
    assert runner.faults(runs, seeds, processes=1, questions=2) == []


def test_every_question_is_answered_of_what_is_whole(
    runs: tuple[Original, ...], tmp_path: Path
) -> None:
    for run in runs:
        (tmp_path / run.name).mkdir()
        found = answers(run.put(tmp_path / run.name))
        assert [type(answer) for answer in found.values()] == [bytes] * 25


@pytest.mark.parametrize("harmless", HARMLESS)
def test_what_is_only_padded_or_laid_out_anew_is_read(
    runs: tuple[Original, ...], tmp_path: Path, harmless: mutations.Damage
) -> None:
    path = runs[0].put(tmp_path)
    right = answers(path)
    harmless(path, random.Random(0))
    assert path.read_bytes() != runs[0].files["a.h5"]
    assert alarm(answers(path), right) == ""


@pytest.mark.parametrize("damage", dict.fromkeys(DAMAGES), ids=lambda damage: damage.__name__)
def test_each_damage_does_some(
    runs: tuple[Original, ...], tmp_path: Path, damage: mutations.Damage
) -> None:
    path = runs[0].put(tmp_path)
    for seed in range(10):
        damage(path, random.Random(seed))
        if path.read_bytes() != runs[0].files["a.h5"]:
            return
    pytest.fail("nothing changed")


# That it can fail.


def test_without_checksums_damage_is_silent(
    runs: tuple[Original, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = answers(runs[0].put(tmp_path))
    monkeypatch.setattr(rows, "_compare", lambda *_: None)
    silent = 0
    for seed in range(10):
        path = runs[0].put(tmp_path)
        mutations.change_number(path, random.Random(seed))
        silent += verdict(answers(path, random.Random(seed), 6), right).startswith("silent")
    assert silent > 0


def test_an_error_of_another_class_is_foreign(
    runs: tuple[Original, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = runs[0].put(tmp_path)
    right = answers(path)

    def broken(*_: object) -> int:
        raise IndexError("broken")

    monkeypatch.setattr("geffect.store.committed_rows.entry_shapes", broken)
    assert verdict(answers(path), right).startswith("foreign error: IndexError: broken of")


def test_a_refusal_is_no_fault_of_what_is_damaged_and_one_of_what_is_whole() -> None:
    right: dict[str, bytes | str] = {"open": b"1", "gram": b"2"}
    assert verdict({"open": REFUSED}, right) == ""
    assert verdict({"open": b"1", "gram": b"3"}, right) == "silent difference: gram"
    assert alarm({"open": REFUSED}, right) == "false alarm: open"


@pytest.mark.parametrize(
    ("does", "named"),
    [(lambda: time.sleep(60), "hang"), (lambda: os._exit(3), "crash with 3")],
    ids=["hangs", "crashes"],
)
def test_what_hangs_or_crashes_is_one_fault_and_the_rest_goes_on(
    runs: tuple[Original, ...],
    monkeypatch: pytest.MonkeyPatch,
    does: Callable[[], object],
    named: str,
) -> None:
    def mutant(original: Original, right: object, seed: int, folder: Path, questions: int) -> str:
        if seed == 1:
            does()
        return "wrong" if seed == 2 else ""

    monkeypatch.setattr(runner, "mutant", mutant)
    monkeypatch.setattr(runner, "answers", lambda path: {})
    monkeypatch.setattr(runner, "PATIENCE", 2.0)
    found = runner.faults(runs[2:], range(4), processes=1)
    assert found == [f"{named}, seed 1", "wrong"]


def test_who_is_slow_beside_the_quick_does_not_hang(
    runs: tuple[Original, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def mutant(original: Original, right: object, seed: int, folder: Path, questions: int) -> str:
        time.sleep(1 if seed == 1 else 0.01 * (seed % 2 == 0))
        return ""

    monkeypatch.setattr(runner, "mutant", mutant)
    monkeypatch.setattr(runner, "answers", lambda path: {})
    assert runner.faults(runs[2:], range(80), processes=2) == []


def test_the_command_counts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--mutants", "2", "--processes", "1"]) == 0
    assert capsys.readouterr().out.startswith("2 mutants, 0 faults")


def test_a_checksum_is_of_what_is_stored(runs: tuple[Original, ...], tmp_path: Path) -> None:
    run = open_run(runs[0].put(tmp_path))
    gram = run.gram()
    assert checksums.of_rows("gram", gram).tolist() == [
        checksums.of_row("gram", i, row) for i, row in enumerate(gram)
    ]
