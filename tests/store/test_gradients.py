"""Whole gradients beside a run file: what was written is read."""

import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

from geffect.encodings import ENCODINGS
from geffect.store import RunFileError, open_run, validate
from geffect.store.writer import RunWriter
from tests.utils.stored_gradients import (
    LAYERS,
    PARAMETERS,
    SOURCES,
    assert_same,
    contents,
    decoded,
    encoded,
    record,
    row,
)
from tests.utils.subprocesses import in_another_process

pytestmark = pytest.mark.usefixtures("small_segments")


# What was written is read.


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_gradients_come_back_as_they_were_encoded(tmp_path: Path, encoding: str) -> None:
    run = record(tmp_path, encoding, steps=9)
    assert run.stored_steps.tolist() == [0, 2, 4, 6, 8]
    for step in run.stored_steps.tolist():
        for source in SOURCES:
            assert_same(run.gradient(source, step), decoded(source, step, encoding))
    assert validate(run.path).whole


@pytest.mark.parametrize(("encoding", "ranks"), [("int4", 1), ("bf16", 1), ("full", 3)])
def test_any_reader_of_hdf5_sees_them_in_the_run_file(
    tmp_path: Path, encoding: str, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(tmp_path, encoding, steps=9, ranks=ranks)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in ("a.h5", "a.gradients"):
        shutil.move(tmp_path / name, moved / name)
    monkeypatch.chdir(tmp_path)
    run = open_run(moved / "a.h5")
    with h5py.File(run.path) as file:
        assert file["gradients"].attrs["encoding"] == encoding
        numbers = file["stored"][:]
        assert numbers[:, 0].tolist() == [0, -1, 1, -1, 2, -1, 3, -1, 4]
        for source in SOURCES:
            group = file["gradients"][source]
            assert {layer: tuple(group[layer].attrs["parameters"]) for layer in group} == LAYERS
            for layer, found in zip(LAYERS, run.gradient(source, 6), strict=True):
                arrays = {name: group[layer][name][3] for name in group[layer]}
                assert np.array_equal(ENCODINGS[encoding].decode(arrays, found.size), found)


def test_what_is_missing_is_nan_to_other_readers_and_an_error_to_ours(tmp_path: Path) -> None:
    run = record(tmp_path, "bf16", steps=9)
    (tmp_path / "a.gradients" / "000.rank0.h5").unlink()
    assert_same(run.gradient("forget", 8), decoded("forget", 8, "bf16"))
    with pytest.raises(RunFileError, match=r"000\.rank0\.h5` should hold .* step 2 .*No such file"):
        run.gradient("forget", 2)
    with h5py.File(run.path) as file:
        bits = file["gradients/forget/head/bits"][1]
    assert np.isnan(ENCODINGS["bf16"].decode({"bits": bits}, bits.size)).all()
    assert run.gram().shape == (9, 9, 2, 2)
    assert len(validate(run.path).problems) == 2


def test_a_segment_that_is_cut_off_is_an_error(tmp_path: Path) -> None:
    run = record(tmp_path, "full", steps=3)
    segment = tmp_path / "a.gradients" / "000.rank0.h5"
    segment.write_bytes(segment.read_bytes()[:-1000])
    with pytest.raises(RunFileError, match=r"000\.rank0\.h5` should hold .* step 2 .* Found"):
        run.gradient("forget", 2)


def test_a_gradient_of_several_rows_is_their_mean(tmp_path: Path) -> None:
    to = RunWriter(tmp_path / "a.h5", PARAMETERS)
    to.begin(contents("full"))
    for batch, gradients in enumerate([encoded(0, "full"), encoded(1, "full"), None]):
        to.append(row(5, gradients, batch=batch))
    to.close(complete=True)
    found = open_run(to.path).gradient("forget", 5)
    for at, a, b in zip(found, decoded("forget", 0), decoded("forget", 1), strict=True):
        assert np.allclose(at, (a + b) / 2, atol=1e-6)


def test_a_source_that_was_absent_is_named_and_not_zero(tmp_path: Path) -> None:
    to = RunWriter(tmp_path / "a.h5", PARAMETERS)
    to.begin(contents("full"))
    to.append(row(0, {"objective": encoded(0, "full")["objective"]}))
    to.append(row(1, encoded(1, "full")))
    to.append(row(2, None))
    to.close(complete=True)
    run = open_run(to.path)
    assert run.stored_steps.tolist() == [0, 1]
    for step in (0, 2):
        with pytest.raises(ValueError, match=rf"`forget` was kept: \[1\]\. Found {step}\."):
            run.gradient("forget", step)


def test_gradients_need_no_torch_to_be_read(tmp_path: Path) -> None:
    record(tmp_path, "int4", steps=2)
    code = """
        import sys, geffect
        from geffect.store import segments, validate
        segments.FIRST_ROWS = 2
        run = geffect.open_run(sys.argv[1])
        run.gradient("forget", 0), validate(sys.argv[1])
        print([name for name in ("torch", "pandas") if name in sys.modules])
    """
    assert in_another_process(code, tmp_path / "a.h5") == "[]"
