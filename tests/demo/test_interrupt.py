"""A study that is interrupted ends at once, says what is whole, and is gone on with."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from geffect.demo.config import LEVELS, EmbeddedConfig
from geffect.demo.jobs import Training
from geffect.demo.plan import Plan
from geffect.demo.study import PAGES, claim, whole

DEMO = [sys.executable, "-m", "geffect", "demo", "--quick", "--out"]


def heeds_interrupts() -> None:
    """As in a terminal, also where the tests run in the background of a shell."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def still_running(group: int) -> list[str]:
    """What runs in a process group, but for what has ended and was not fetched yet."""
    found = []
    for process in psutil.process_iter(["status", "cmdline"]):
        with suppress(ProcessLookupError):  # it has ended since
            if process.info["status"] != psutil.STATUS_ZOMBIE and os.getpgid(process.pid) == group:
                found.append(" ".join(process.info["cmdline"] or []))
    return found


@pytest.mark.parametrize("whom", ["one process", "all of them"])
def test_an_interrupt_ends_the_study_and_its_workers(tmp_path: Path, whom: str) -> None:
    """`all of them` is what a terminal does."""
    out = tmp_path / "study"
    with subprocess.Popen(
        [*DEMO, out], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, preexec_fn=heeds_interrupts,
    ) as study:  # fmt: skip
        while not (out / "results").exists():
            assert study.poll() is None
            time.sleep(0.05)
        time.sleep(int.from_bytes(os.urandom(2)) / 2**16 * 4)
        assert study.poll() is None, "the quick study should take longer than that"
        (os.kill if whom == "one process" else os.killpg)(study.pid, signal.SIGINT)
        _, complained = study.communicate(timeout=60)
    assert study.returncode == 130
    there, jobs = whole(out, Plan(quick=True))
    assert complained == (
        f"geffect: The study was interrupted. {there} of {jobs} runs are whole in `{out}`. The "
        "same command with --resume goes on from there.\n"
    )
    # The process that tidies up behind multiprocessing ends once it has seen the study end.
    until = time.monotonic() + 10
    while still_running(study.pid) and time.monotonic() < until:
        time.sleep(0.05)
    assert still_running(study.pid) == []


@pytest.fixture
def held(tmp_path: Path) -> Path:
    """A folder with a result of a study."""
    (tmp_path / "results").mkdir()
    job = Training(tmp_path, 0, "gold", Plan().studied)
    kept = {"job": repr(job), "result": dict.fromkeys(LEVELS, 1.0)}
    (tmp_path / "results" / "gold-seed0.json").write_text(json.dumps(kept), encoding="utf-8")
    (tmp_path / "own.txt").write_text("of the user", encoding="utf-8")
    return tmp_path


def test_a_folder_that_holds_a_study_is_refused(held: Path) -> None:
    with pytest.raises(FileExistsError, match=r"Found one in .*--resume .*--overwrite "):
        claim(held, Plan())
    (held / "results" / "gold-seed0.json").unlink()
    (held / "summary.json").write_text('{"runs": [], "findings": []}', encoding="utf-8")
    with pytest.raises(FileExistsError, match="Found one in"):
        claim(held, Plan())


@pytest.mark.parametrize("how", [{}, {"resume": True}, {"overwrite": True}], ids=str)
@pytest.mark.parametrize(
    "name", ["results/of_mine.json", "summary.json", "report.html", "equal_forgetting.csv"]
)
def test_a_file_of_the_user_by_a_name_of_a_study_is_not_replaced(
    tmp_path: Path, name: str, how: dict[str, Any]
) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / name).write_text('{"mine": 1}', encoding="utf-8")
    with pytest.raises(FileExistsError, match=rf"Found `.*{name}`, of no study\. Choose another"):
        claim(tmp_path, Plan(**how))
    assert (tmp_path / name).read_text(encoding="utf-8") == '{"mine": 1}'


def test_all_that_a_study_writes_beside_its_folders_is_known(quick_study: Any) -> None:
    written = {file.name for file in quick_study.out.iterdir() if file.is_file()}
    assert "summary.json" in written
    assert written <= {*PAGES, "summary.json"}


def test_what_is_gone_on_with_keeps_its_results(held: Path) -> None:
    claim(held, Plan(resume=True))
    claim(held, Plan(resume=True, seeds=(1, 0)))
    moved = held.rename(held.with_name("moved"))
    claim(moved, Plan(resume=True, edits=("mix",)))
    claim(moved, Plan(resume=True, all_variants=True))
    assert (moved / "results" / "gold-seed0.json").exists()
    assert whole(moved, Plan())[0] == 1


@pytest.mark.parametrize(
    "other",
    [
        {"seeds": (1,)},
        {"quick": True},
        {"subject": EmbeddedConfig(epochs=3)},
    ],
    ids=str,
)
def test_another_study_is_not_gone_on_with(held: Path, other: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Found a result of another: gold-seed0"):
        claim(held, Plan(resume=True, **other))
    assert (held / "results" / "gold-seed0.json").exists()


def test_what_is_overwritten_loses_its_results_and_nothing_of_the_user(held: Path) -> None:
    (held / "report.html").write_text("of the study", encoding="utf-8")
    claim(held, Plan(overwrite=True))
    assert not (held / "report.html").exists()
    assert list((held / "results").iterdir()) == []
    assert (held / "own.txt").exists()
    claim(held, Plan())


def test_a_study_is_gone_on_with_or_overwritten() -> None:
    with pytest.raises(ValueError, match="should not both be True"):
        Plan(resume=True, overwrite=True)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(FileExistsError, match=r"should be a folder, or not exist\. Found"):
        claim(tmp_path / "file", Plan())
