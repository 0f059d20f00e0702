"""What was written is read, and what is no run file is refused."""

from pathlib import Path

import h5py
import numpy as np
import pytest

from geffect.store import RunFileError, open_run
from geffect.store.growing_file import FIRST_CAPACITY
from geffect.store.schema import (
    FORMAT,
    READABLE,
    RECTIFICATION_COLUMNS,
    STEP_COLUMNS,
    VERSION,
    WEIGHT_STATISTICS,
)
from geffect.store.writer import RunWriter
from tests.utils.runs import (
    BLOCKS,
    MANIFEST,
    PARAMETERS,
    SKETCH,
    SOURCES,
    WEIGHTS,
    append,
    assert_same_bits,
    odd_row,
    plain_rows,
    recorded,
    row_of,
    squared,
)
from tests.utils.subprocesses import in_another_process

# What was written is read.


def test_every_dataset_comes_back_bit_for_bit(tmp_path: Path) -> None:
    rows = [odd_row(step) for step in range(5)]
    run = open_run(recorded(tmp_path / "a.h5", rows))
    assert (run.name, run.state, run.sources) == ("a", "complete", SOURCES)
    assert run.layers == PARAMETERS
    assert run.manifest == MANIFEST
    assert run.metadata == MANIFEST["metadata"]
    assert run.steps.tolist() == [0, 1, 2, 3, 4]
    assert_same_bits(run.gram(), [row.gram for row in rows])
    for name, dtype in STEP_COLUMNS.items():
        expected = np.array([getattr(row, name) for row in rows], dtype=dtype)
        assert_same_bits(run.column(name), expected)
    stored = stored_dataset(run.path, "losses")
    assert_same_bits(stored, [row.losses for row in rows])
    blocks, numbers = run.rectification()
    assert blocks == BLOCKS
    assert tuple(numbers) == RECTIFICATION_COLUMNS
    assert_same_bits(np.stack(list(numbers.values()), axis=-1), [row.rectification for row in rows])
    for i, (weight, statistics) in enumerate(run.weights().items()):
        assert (WEIGHTS[i], WEIGHT_STATISTICS) == (weight, tuple(statistics))
        found = np.stack(list(statistics.values()), axis=-1)
        assert_same_bits(found, [row.weights[i] for row in rows])
    assert run.contents.sketch == SKETCH
    for i, source in enumerate(SOURCES):
        assert_same_bits(run.sketch(source), [row.sketches[i] for row in rows])


def test_a_source_without_a_value_is_no_loss(tmp_path: Path) -> None:
    losses = np.array([1.0, np.nan, 2.0])
    run = open_run(recorded(tmp_path / "a.h5", [row_of(0, losses=losses)]))
    assert {name: values.tolist() for name, values in run.losses().items()} == {
        "objective": [1.0],
        "retain": [2.0],
    }


def test_a_run_without_a_rectifier_says_so(tmp_path: Path) -> None:
    run = open_run(recorded(tmp_path / "a.h5", plain_rows(2)))
    with pytest.raises(ValueError, match=r"should hold .* Found a run without any\. Record with"):
        run.rectification()


@pytest.mark.parametrize(
    ("source", "hint"),
    [
        ("displaced", "Name one of those"),
        ("retan", r"Did you mean `retain`\? Name one of those"),
        ("update", r"Record with .*update=True"),
        ("retain_ema", r"Record with recorder\.backward\(\.\.\., rectifier=rectifier\)"),
        ("rectified", r"Record with recorder\.backward\(\.\.\., rectifier=rectifier\)"),
    ],
)
def test_an_unknown_source_is_named(tmp_path: Path, source: str, hint: str) -> None:
    run = open_run(recorded(tmp_path / "a.h5", plain_rows(1)))
    assert run.index("retain") == 2
    with pytest.raises(ValueError, match=rf"objective, forget, retain in .* `{source}`\. {hint}"):
        run.index(source)


@pytest.mark.parametrize("count", [1, FIRST_CAPACITY, FIRST_CAPACITY + 1, 4 * FIRST_CAPACITY + 1])
def test_it_grows_and_gives_back_what_is_left(tmp_path: Path, count: int) -> None:
    path = recorded(tmp_path / "a.h5", plain_rows(count), complete=None)
    assert open_run(path).steps.tolist() == list(range(count))
    assert len(stored_dataset(path, "gram")) > count or count % FIRST_CAPACITY == 0
    path = recorded(tmp_path / "b.h5", plain_rows(count))
    for name in ("gram", "losses", "steps/step", "steps/lr"):
        assert len(stored_dataset(path, name)) == count
    assert open_run(path).gram()[:, 0, 0, 0].tolist() == [squared(step) for step in range(count)]


def test_dimension_scales_are_attached(small_capacity: None, tmp_path: Path) -> None:
    path = recorded(tmp_path / "a.h5", plain_rows(5))
    axes = {"gram": ["step", "name", "sources", "sources"], "losses": ["step", "sources"]}
    with h5py.File(path) as file:
        for name, labels in axes.items():
            scales = [axis[0] for axis in file[name].dims]
            assert [scale.name.split("/")[-1] for scale in scales] == labels
            assert [len(scale) for scale in scales] == list(file[name].shape)


def test_nothing_but_the_file_is_left_behind(small_capacity: None, tmp_path: Path) -> None:
    recorded(tmp_path / "a.h5", plain_rows(9))
    recorded(tmp_path / "a.h5", plain_rows(3, first=9), resume=True)
    recorded(tmp_path / "a.h5", plain_rows(3), overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == ["a.h5"]


def test_what_a_killed_writer_left_half_made_is_removed(tmp_path: Path) -> None:
    others = [".a.h5.notes.draft", ".b.h5.77.draft", "a.h5.77.draft"]
    for name in [".a.h5.77.draft", *others]:
        (tmp_path / name).write_text("half")
    recorded(tmp_path / "a.h5", plain_rows(1))
    assert {file.name for file in tmp_path.iterdir()} == {"a.h5", *others}


def test_the_reader_needs_neither_torch_nor_pandas(tmp_path: Path) -> None:
    path = recorded(tmp_path / "a.h5", [odd_row(0)])
    code = """
        import sys, geffect
        from geffect.store import validate
        run = geffect.open_run(sys.argv[1])
        run.gram(), run.losses(), run.rectification(), validate(sys.argv[1])
        print([name for name in ("torch", "pandas", "matplotlib") if name in sys.modules])
    """
    assert in_another_process(code, path) == "[]"


def test_a_run_is_readable_while_it_is_written(small_capacity: None, tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    writing = RunWriter(path, PARAMETERS)
    append(writing, row_of(0))
    early = open_run(path)
    code = "import sys, geffect; run = geffect.open_run(sys.argv[1]); print(run.gram().tolist())"
    for count in range(2, 12):
        append(writing, row_of(count - 1))
        run = open_run(path)
        assert (run.state, run.steps.tolist()) == ("open", list(range(count)))
        assert run.gram()[:, 0, 0, 0].tolist() == [squared(step) for step in range(count)]
    assert in_another_process(code, path) == str(open_run(path).gram().tolist())
    append(writing, row_of(11))  # the readers did not lock it
    writing.close(complete=True)
    assert early.gram().shape[0] == 1  # as it was when opened
    assert len(open_run(path).steps) == 12


# A file that is none.


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"exist\. Found nothing at .*a\.h5`\. Check"):
        open_run(tmp_path / "a.h5")
    with pytest.raises(FileNotFoundError, match="Found a folder at"):
        open_run(tmp_path)


@pytest.mark.parametrize("how", ["read", "resume"])
@pytest.mark.parametrize("kind", ["empty", "text", "other", "half", "segment", "older", "newer"])
def test_a_file_of_another_kind_is_refused_by_name(tmp_path: Path, kind: str, how: str) -> None:
    path = tmp_path / "a.h5"
    found, advice = {
        "empty": ("not HDF5, or that is cut off", "record again"),
        "text": ("not HDF5, or that is cut off", "record again"),
        "other": (r"HDF5 file of another kind, with \['weights'\]", "that a Recorder wrote"),
        "half": (r"HDF5 file of another kind, with \['weights'\]", "that a Recorder wrote"),
        "segment": ("Found a segment with the gradients of one", "as `a.h5` beside"),
        "older": (f"Found format {READABLE[0] - 1}", "with the geffect that wrote it"),
        "newer": (f"Found format {VERSION + 1}", "Update geffect"),
    }[kind]
    make_file_of_kind(path, kind)
    before = path.read_bytes()
    with pytest.raises(RunFileError, match=rf"a\.h5` should be a run file.*{found}.*{advice}"):
        open_run(path) if how == "read" else RunWriter(path, PARAMETERS, resume=True)
    assert path.read_bytes() == before


@pytest.mark.parametrize("complete", [True, None])
def test_a_file_that_is_cut_off_is_refused_at_every_length(
    tmp_path: Path, complete: bool | None
) -> None:
    whole = recorded(tmp_path / "a.h5", plain_rows(3), complete=complete).read_bytes()
    cut = tmp_path / "cut.h5"
    for length in {1, 7, 8, 100, 2048, *range(4096, len(whole), 4096), len(whole) - 1}:
        cut.write_bytes(whole[:length])
        with pytest.raises(RunFileError, match=r"cut\.h5` should be .* cut off.* earlier copy"):
            open_run(cut)
    cut.write_bytes(whole)
    assert len(open_run(cut).steps) == 3


def stored_dataset(path: Path, name: str) -> np.ndarray:
    with h5py.File(path) as file:
        stored: np.ndarray = file[name][:]
        return stored


def make_file_of_kind(path: Path, kind: str) -> None:
    if kind in ("empty", "text"):
        path.write_text("" if kind == "empty" else "step,loss\n1,2\n")
    elif kind in ("older", "newer"):
        recorded(path, plain_rows(1))
        with h5py.File(path, "r+") as file:
            file.attrs["format_version"] = {"older": READABLE[0], "newer": VERSION + 2}[kind] - 1
    else:
        with h5py.File(path, "w") as file:
            file["weights"] = [1.0]
            if kind == "half":
                file.attrs["format"] = "gradients"
            if kind == "segment":
                file.attrs.update(
                    {"format": np.bytes_(FORMAT), "format_version": VERSION, "encoding": 0}
                )
