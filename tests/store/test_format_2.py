"""A run file of format 2, which an earlier geffect wrote, is read and continued."""

import zipfile
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from geffect.layers import placed
from geffect.store import RunFileError, open_run, validate
from geffect.store.schema import VERSION
from geffect.store.writer import RunWriter
from tests.utils.runs import (
    BLOCKS,
    MANIFEST,
    ODD,
    PARAMETERS,
    SKETCH,
    SOURCES,
    WEIGHTS,
    append,
    assert_same_bits,
    odd_row,
    row_of,
)

WRITTEN = Path(__file__).with_name("data") / "format_2.zip"
TEXTS = ["naïve", "", "zwei\nZeilen"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The file with five steps; gradients of every other one lie beside it."""
    with zipfile.ZipFile(WRITTEN) as written:
        written.extractall(tmp_path)
    return tmp_path / "a.h5"


def test_all_of_it_is_read(path: Path) -> None:
    run, odd = open_run(path), [odd_row(step) for step in range(5)]
    assert (run.state, run.sources, run.manifest) == ("complete", SOURCES, MANIFEST)
    assert (run.layers, run.contents.sketch) == (placed(PARAMETERS), SKETCH)
    assert run.contents.version == 2
    assert run.steps.tolist() == [0, 1, 2, 3, 4]
    assert_same_bits(run.gram(), [row_of(step).gram for step in range(5)])
    assert_same_bits(run.column("lr"), [row.lr for row in odd])
    assert run.column("n_micro").tolist() == [1, 2, 3, 4, 5]
    assert run.stepped().tolist() == [[True, True], [True, False]] * 2 + [[True, True]]
    blocks, numbers = run.rectification()
    assert blocks == BLOCKS
    # What came later is not known of it.
    known, later = [*numbers.values()][:9], [*numbers.values()][9:]
    written = [np.resize(np.roll(ODD, step), (len(BLOCKS), len(known))) for step in range(5)]
    assert_same_bits(np.stack(known, -1), written)
    assert np.isnan(later).all()
    assert tuple(run.weights()) == WEIGHTS
    assert_same_bits(run.sketch("forget"), [row.sketches[1] for row in odd])  # type: ignore[index]
    assert run.tables == ("samples",)
    assert run.table("samples")["text"].tolist() == TEXTS
    assert np.array_equal(run.table("samples")["value"], np.arange(3) / 3)
    assert run.stored_steps.tolist() == [0, 2, 4]
    for step in (0, 2, 4):
        assert run.gradient("retain", step)[0].tolist() == (np.eye(6)[step] * (step + 1)).tolist()


def test_it_has_no_checksums_and_validate_says_so(path: Path) -> None:
    health = validate(path)
    assert health.whole
    assert any("format 2, which has no checksums" in remark for remark in health.remarks)
    with h5py.File(path, "r+") as file:
        file["losses"][1, 0] = 17.0
    assert open_run(path).losses()["objective"][1] == 17.0
    assert validate(path).whole


def test_its_gradients_are_held_against_the_gram_matrix(path: Path) -> None:
    with h5py.File(path.with_suffix(".gradients") / "000.rank0.h5", "r+") as file:
        file["forget/layer 0/values"][1, 0] = 5.0
    (problem,) = validate(path).problems
    assert problem.startswith("the gradient of `forget` in layer 0 at step 2 is not as long")


def test_one_with_gradients_is_not_continued(path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(RunFileError, match=r"format 3\. Found format 2 in .*into another file"):
        RunWriter(path, PARAMETERS, resume=True)
    assert path.read_bytes() == before


def test_sketches_of_other_layers_are_not_continued(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        for name in ("gradients", "stored", "encoding"):
            del file[name]
    moved = [replace(parameter, layer=f"text {parameter.layer}") for parameter in PARAMETERS]
    with pytest.raises(ValueError, match=r"keeps sketches .* Found 2 parameters in other layers"):
        RunWriter(path, moved, resume=True)


@pytest.mark.parametrize("further", [0, 1])
def test_one_without_gradients_is_continued_in_the_format_of_today(
    path: Path, further: int
) -> None:
    with h5py.File(path, "r+") as file:
        for name in ("gradients", "stored", "encoding"):
            del file[name]
    resumed = RunWriter(path, PARAMETERS, resume=True)
    for step in range(5, 5 + further):
        append(resumed, replace(odd_row(step), request=0, batch=0))
    resumed.close(complete=True)
    run = open_run(path)
    assert run.contents.version == VERSION
    assert run.steps.tolist() == list(range(5 + further))
    assert_same_bits(run.gram()[:5], [row_of(step).gram for step in range(5)])
    assert run.table("samples")["text"].tolist() == TEXTS
    assert not any("checksums" in remark for remark in validate(path).remarks)
    with h5py.File(path, "r+") as file:
        file["losses"][1, 0] = 17.0
    with pytest.raises(RunFileError, match=r"row 1 of `losses` with another checksum"):
        open_run(path).losses()
