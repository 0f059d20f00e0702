"""Rows of a run file: several a step, dropped and continued; what is kept beside them."""

import json
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from geffect.sketch import Sketch
from geffect.store import (
    Contents,
    Row,
    Run,
    RunFileError,
    StoredGradients,
    growing_file,
    open_run,
    validate,
)
from geffect.store.background import BackgroundWriter
from geffect.store.schema import RECTIFICATION_COLUMNS
from geffect.store.writer import RunWriter
from tests.utils.runs import (
    BLOCKS,
    MANIFEST,
    PARAMETERS,
    PLAIN,
    SOURCES,
    append,
    assert_same_bits,
    full,
    odd_row,
    plain_rows,
    recorded,
    row_of,
)
from tests.utils.seals import put_json, seal

# Several rows of a step.


def test_numbers_of_a_step_are_means_over_its_rows(tmp_path: Path) -> None:
    run = open_run(recorded(tmp_path / "a.h5", batches([3, 1, 2])))
    assert run.steps.tolist() == [0, 1, 2]
    assert run.rows.tolist() == [3, 1, 2]
    assert run.gram()[:, 0, 0, 0].tolist() == [1.0, 10.0, 20.5]
    assert run.losses()["forget"].tolist() == [1.0, 10.0, 20.5]
    assert run.column("lr").tolist() == [1.0, 10.0, 20.5]
    assert run.column("step").tolist() == [0, 1, 2]
    assert validate(run.path).whole


def test_a_source_that_is_absent_in_one_row_is_absent(tmp_path: Path) -> None:
    rows = batches([2, 2])
    rows[1].gram[:, 2] = rows[1].gram[:, :, 2] = np.nan
    run = open_run(recorded(tmp_path / "a.h5", rows))
    assert np.isnan(run.gram()[0, :, 2]).all()
    assert np.isfinite(run.gram()[0, :, :2, :2]).all()
    assert np.isfinite(run.gram()[1]).all()


def test_resampling_draws_rows_of_the_same_step(tmp_path: Path) -> None:
    run = open_run(recorded(tmp_path / "a.h5", batches([3, 1, 2])))
    rng = np.random.default_rng(0)
    draws = np.stack([run.resampled(rng).gram()[:, 0, 0, 0] for _ in range(400)])
    thirds = set(np.round(np.array(sorted(set(draws[:, 0]))) * 3).tolist())
    assert thirds == {0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0}
    assert set(draws[:, 1]) == {10.0}
    assert set(draws[:, 2]) == {20.0, 20.5, 21.0}
    assert np.abs(draws.mean(axis=0) - [1.0, 10.0, 20.5]).max() < 0.15


def test_resampling_one_row_a_step_changes_nothing(tmp_path: Path) -> None:
    run = open_run(recorded(tmp_path / "a.h5", plain_rows(5)))
    again = run.resampled(np.random.default_rng(0))
    assert np.array_equal(again.gram(), run.gram())
    assert again.steps.tolist() == run.steps.tolist()


def test_the_latest_steps_are_those_of_the_whole_run(tmp_path: Path) -> None:
    run = open_run(recorded(tmp_path / "a.h5", batches([3, 1, 2, 4])))
    for count in (0, 1, 2, 3, 4, 9):
        part, last = run.latest(count), slice(max(0, 4 - count), None)
        assert part.steps.tolist() == run.steps[last].tolist()
        assert part.rows.tolist() == run.rows[last].tolist()
        assert_same_bits(part.gram(), run.gram()[last])
        assert_same_bits(part.column("lr"), run.column("lr")[last])
        assert_same_bits(part.stepped(), run.stepped()[last])
        kept = run.checksums()[len(run.checksums()) - part.rows.sum() :]
        assert_same_bits(part.checksums(), kept)


def test_checksums_tell_which_row_was_amended(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "a.h5", PARAMETERS)
    for row in plain_rows(3):
        append(writer, row)
    before = open_run(writer.path).checksums()
    writer.amend(row_of(2, value=7.0))
    changed = (open_run(writer.path).checksums() != before).any(axis=1)
    assert changed.tolist() == [False, False, True]


def test_a_row_of_the_last_key_takes_its_place(tmp_path: Path) -> None:
    path = recorded(tmp_path / "a.h5", [keyed(0, 0, 1), keyed(0, 0, 1)])
    assert open_run(path).keys().tolist() == [[0, 0, 1]]
    assert validate(path).whole


def test_equal_keys_are_named(tmp_path: Path) -> None:
    path = recorded(tmp_path / "a.h5", [keyed(0, 0, 1), keyed(0, 0, 2)])
    with h5py.File(path, "r+") as file:
        file["steps/batch"][1] = 1
    seal(path)
    assert validate(path).problems == ("the steps are not in increasing order",)


@pytest.mark.parametrize("keys", [[(0, 0, 1), (0, 0, 0)], [(1, 0, 0), (0, 1, 0)]])
def test_keys_that_do_not_grow_are_named(tmp_path: Path, keys: list[tuple[int, int, int]]) -> None:
    rows = [keyed(*key) for key in keys]
    problems = validate(recorded(tmp_path / "a.h5", rows)).problems
    assert problems == ("the steps are not in increasing order",)


def test_a_step_may_come_again_in_another_request(tmp_path: Path) -> None:
    keys = [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 0, 1)]
    run = open_run(recorded(tmp_path / "a.h5", [keyed(*key) for key in keys]))
    assert run.steps.tolist() == [0, 1, 0]
    assert run.column("request").tolist() == [0, 0, 1]
    assert run.rows.tolist() == [1, 1, 2]
    assert validate(run.path).whole


# Rows that are dropped.


@pytest.mark.parametrize("capacity", [4, 64])
@pytest.mark.parametrize("after", [0, 3, 6, 99])
def test_a_run_goes_on_after_a_checkpoint_without_gap_or_double(
    tmp_path: Path, after: int, capacity: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growing_file, "FIRST_CAPACITY", capacity)
    path = recorded(tmp_path / "a.h5", plain_rows(7), complete=None)
    resumed = RunWriter(path, PARAMETERS, resume=True, drop_after=after)
    kept = min(after + 1, 7)
    assert (resumed.count, resumed.last_step) == (kept, kept - 1)
    for step in range(kept, 9):
        append(resumed, row_of(step, value=-1.0))
    resumed.close(complete=True)
    run = open_run(path)
    assert run.steps.tolist() == list(range(9))
    expected = [float((step + 1) ** 2) if step < kept else -1.0 for step in range(9)]
    assert run.gram()[:, 0, 0, 0].tolist() == expected


def test_all_rows_of_later_steps_are_dropped_of_the_last_request(tmp_path: Path) -> None:
    keys = [(0, 0, 0), (0, 5, 0), (1, 0, 0), (1, 1, 0), (1, 2, 0), (1, 2, 1), (1, 3, 0)]
    path = recorded(tmp_path / "a.h5", [keyed(*key) for key in keys])
    RunWriter(path, PARAMETERS, resume=True, drop_after=1).close(complete=True)
    run = open_run(path)
    assert run.steps.tolist() == [0, 5, 0, 1]
    assert run.column("request").tolist() == [0, 0, 1, 1]


def test_nothing_is_dropped_before_there_is_a_new_row(tmp_path: Path) -> None:
    path = recorded(tmp_path / "a.h5", plain_rows(7))
    before = path.read_bytes()
    idle = RunWriter(path, PARAMETERS, resume=True, drop_after=2)
    idle.keep("scores", {"value": [1.0, 2.0]} | {"value": np.ones(2)})
    with pytest.raises(ValueError, match="sources"):
        idle.begin(Contents(("objective",), MANIFEST))
    idle.close(complete=False)
    assert path.read_bytes() == before


@pytest.mark.parametrize("how", ["row", "close", "row and close"])
def test_a_run_of_which_all_rows_are_dropped_keeps_the_rest(tmp_path: Path, how: str) -> None:
    path = tmp_path / "a.h5"
    recording = RunWriter(path, PARAMETERS)
    recording.keep("samples", {"value": np.arange(3)})
    for row in plain_rows(7):
        append(recording, row)
    recording.close(complete=True)
    resumed = RunWriter(path, PARAMETERS, resume=True, drop_after=-1)
    assert resumed.resumed is not None
    assert (resumed.resumed.steps.tolist(), resumed.resumed.metadata) == ([], MANIFEST["metadata"])
    assert (resumed.count, resumed.last_step) == (0, -1)
    resumed.begin(PLAIN)
    assert len(open_run(path).steps) == 7
    if "row" in how:
        resumed.append(row_of(0, value=100.0))
    resumed.close(complete="close" in how)
    run = open_run(path)
    assert run.gram()[:, 0, 0, 0].tolist() == ([100.0] if "row" in how else [])
    assert run.state == ("complete" if "close" in how else "open")
    assert run.table("samples")["value"].tolist() == [0, 1, 2]
    assert validate(path).whole
    count = len(run.steps)
    recorded(path, plain_rows(2, first=count), resume=True)
    assert open_run(path).steps.tolist() == list(range(count + 2))


def test_a_run_of_which_all_rows_are_dropped_is_still_that_run(tmp_path: Path) -> None:
    path = recorded(tmp_path / "a.h5", plain_rows(7))
    resumed = RunWriter(path, PARAMETERS, resume=True, drop_after=-1)
    with pytest.raises(ValueError, match=r"should be what the run in .* Found sources"):
        resumed.begin(Contents(("objective",), MANIFEST))


def test_a_first_row_that_fails_leaves_a_run_of_which_all_are_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recorded(tmp_path / "a.h5", plain_rows(7))
    before = path.read_bytes()
    resumed = RunWriter(path, PARAMETERS, resume=True, drop_after=-1)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(RunFileError, match=r"at step 0.*No space.*resume=True"):
            append(resumed, row_of(0))
    assert path.read_bytes() == before


def test_dropping_that_fails_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recorded(tmp_path / "a.h5", plain_rows(7))
    before = path.read_bytes()
    resumed = RunWriter(path, PARAMETERS, resume=True, drop_after=2)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(RunFileError, match=r"a\.h5` should be writable at step 3.*No space"):
            append(resumed, row_of(3))
    assert path.read_bytes() == before


# What the rows hold.


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"sources": ("objective", "forget")}, "sources"),
        ({"blocks": ("layer 0",)}, "blocks"),
        ({"weights": ("npo",)}, "weights"),
        ({"sketch": Sketch(seed=1)}, r"sketch Sketch\(seed=1"),
        ({"gradients": StoredGradients("full", (0,), (((0, 6),),))}, "gradients"),
    ],
)
def test_a_run_is_continued_with_what_it_holds(
    tmp_path: Path, changed: dict[str, object], named: str
) -> None:
    path = recorded(tmp_path / "a.h5", plain_rows(2))
    resumed = RunWriter(path, PARAMETERS, resume=True)
    arguments = {"sources": SOURCES, "manifest": MANIFEST} | changed
    with pytest.raises(ValueError, match=rf"should be what the run in .* Found {named}.* instead"):
        resumed.begin(Contents(**arguments))  # type: ignore[arg-type]
    resumed.begin(Contents(SOURCES, manifest={"another": "manifest"}))
    resumed.append(row_of(2))
    resumed.close(complete=True)
    assert open_run(path).manifest == MANIFEST


def test_a_row_before_the_beginning_is_refused(tmp_path: Path) -> None:
    early = RunWriter(tmp_path / "a.h5", PARAMETERS)
    with pytest.raises(RuntimeError, match=r"`begin` should be called before"):
        early.append(row_of(0))
    early.close(complete=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("read", "advice"),
    [
        (lambda run: run.sketch("forget"), r'Recorder\(\.\.\., store="sketch"\)'),
        (lambda run: run.gradient("forget", 0), r'Recorder\(\.\.\., store="bf16"\)'),
        (lambda run: run.weights(), "Record an objective that has some"),
        (
            lambda run: run.table("samples"),
            r"none\. Keep it with recorder\.keep_table\('samples'",
        ),
    ],
)
def test_what_was_not_recorded_is_named_with_what_records_it(
    tmp_path: Path, read: Callable[[Run], object], advice: str
) -> None:
    run = open_run(recorded(tmp_path / "a.h5", plain_rows(1)))
    assert (run.contents.sketch, run.stored_steps.tolist(), run.tables) == (None, [], ())
    with pytest.raises(ValueError, match=rf"a\.h5` should hold .* Found .*{advice}"):
        read(run)


def test_a_sketch_of_another_version_hides_nothing_else(tmp_path: Path) -> None:
    path = recorded(tmp_path / "a.h5", [odd_row(step) for step in range(3)])
    with h5py.File(path) as file:
        described = json.loads(file["sketch"].asstr()[()])
    put_json(path, "sketch", described | {"version": 2})
    seal(path)
    run = open_run(path)
    assert run.gram().shape[0] == 3
    with pytest.raises(ValueError, match=r"sketches in .* version 1\. Found .*version=2.*geffect"):
        run.sketch("forget")
    resumed = RunWriter(path, PARAMETERS, resume=True)
    with pytest.raises(ValueError, match=r"Found sketch Sketch\(.* instead of OtherSketch\("):
        append(resumed, odd_row(3))
    resumed.keep("samples", {"value": np.zeros(1)})  # makes the file anew
    resumed.close(complete=True)
    assert open_run(path).contents == run.contents
    with h5py.File(path) as file:
        assert_same_bits(file["sketches"][:], [odd_row(step).sketches for step in range(3)])


# Tables.


def test_tables_are_kept_whenever_they_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growing_file, "FIRST_CAPACITY", 2)
    path = tmp_path / "a.h5"
    recording = RunWriter(path, PARAMETERS)
    recording.keep("before", {"text": ["naïve", "", "zwei\nZeilen"], "value": np.arange(3) / 3})
    assert not path.exists()
    append(recording, row_of(0))
    assert open_run(path).tables == ("before",)
    recording.keep("empty", {"text": [], "flag": np.zeros(0, dtype=bool)})
    recording.keep("matrix", {"of rows": np.eye(2, dtype="f4")})
    for step in range(1, 5):
        append(recording, row_of(step))
    recording.keep("matrix", {"other": np.array([1, 2])})
    recording.close(complete=True)
    resumed = RunWriter(path, PARAMETERS, resume=True)
    resumed.keep("after", {"token": ["a"]})
    resumed.close(complete=True)
    run = open_run(path)
    assert run.steps.tolist() == list(range(5))
    assert sorted(run.tables) == ["after", "before", "empty", "matrix"]
    assert run.table("before")["text"].tolist() == ["naïve", "", "zwei\nZeilen"]
    assert np.array_equal(run.table("before")["value"], np.arange(3) / 3)
    assert run.table("empty")["text"].tolist() == []
    assert run.table("empty")["flag"].dtype == bool
    assert {name: column.tolist() for name, column in run.table("matrix").items()} == {
        "other": [1, 2]
    }
    assert run.table("after")["token"].tolist() == ["a"]
    assert validate(path).whole


@pytest.mark.parametrize(
    ("name", "columns", "found"),
    [
        ("a/b", {"x": [""]}, "Found `a/b`"),
        ("a", {"..": [""]}, r"Found `\.\.`"),
        ("a", {"": [""]}, "Found ``"),
        ("a", {"x": ["", ""], "y": np.zeros(1)}, "Found {'x': 2, 'y': 1}"),
        ("a", {"x": np.array([object()])}, "array of numbers, or a list of texts"),
        ("a", {"x": ["nul \0"]}, "without NUL"),
        ("a", {"x": [1.0]}, "array of numbers, or a list of texts"),
    ],
)
def test_a_table_of_another_kind_is_refused_and_the_run_goes_on(
    tmp_path: Path, name: str, columns: dict[str, object], found: str
) -> None:
    recording = RunWriter(tmp_path / "a.h5", PARAMETERS)
    append(recording, row_of(0))
    with pytest.raises(ValueError, match=found):
        recording.keep(name, columns)  # type: ignore[arg-type]
    append(recording, row_of(1))
    recording.close(complete=True)
    assert open_run(recording.path).tables == ()


# No object is ever made of what a file holds.


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("place", ["gram", "steps/step", "manifest", "sources", "parameters/name"])
@pytest.mark.parametrize("kind", ["opaque", "bytes"])
def test_a_pickle_in_a_run_file_is_refused(tmp_path: Path, place: str, kind: str) -> None:
    path = recorded(tmp_path / "a.h5", plain_rows(1))
    put_pickle(path, place, kind)
    is_no_run = r"should be a run file of geffect.*another in its place"
    with pytest.raises(RunFileError, match=rf"{is_no_run}|labels or .*with another checksum"):
        open_run(path).gram()
    assert not path.with_name("sprung").exists()


def test_a_pickle_in_a_table_is_refused_and_the_rest_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    recording = RunWriter(path, PARAMETERS)
    recording.keep("samples", {"text": ["a"]})
    append(recording, row_of(0))
    recording.close(complete=True)
    put_pickle(path, "tables/samples/text", "opaque")
    run = open_run(path)
    assert len(run.gram()) == 1
    with pytest.raises(RunFileError, match="another in its place"):
        run.table("samples")
    assert not path.with_name("sprung").exists()


def put_pickle(path: Path, place: str, kind: str) -> None:
    payload = pickle.dumps(Trap(path.with_name("sprung")))
    with h5py.File(path, "r+") as file:
        if place in file:
            del file[place]
        opaque = np.array([payload], dtype=h5py.opaque_dtype(np.dtype(f"V{len(payload)}")))
        file[place] = opaque if kind == "opaque" else np.frombuffer(payload, dtype="u1")


def batches(counts: list[int]) -> list[Row]:
    """For each step some rows, whose numbers are all 10 times the step plus the batch."""
    return [
        keyed(0, step, batch, value=10.0 * step + batch)
        for step, count in enumerate(counts)
        for batch in range(count)
    ]


def keyed(request: int, step: int, batch: int, value: float = 1.0) -> Row:
    k = len(SOURCES)
    return Row(
        request=request,
        step=step,
        batch=batch,
        lr=value,
        losses=np.full(k, value),
        gram=np.full((len(PARAMETERS), k, k), value),
    )


# What a step moves.


def moving(step: int, *moved: bool) -> Row:
    return replace(row_of(step), stepped=np.array(moved))


def test_what_is_stepped_is_read_as_it_was_written(tmp_path: Path) -> None:
    marks = [[step % (i + 1) == 0 for i in range(len(PARAMETERS))] for step in range(70)]
    run = open_run(recorded(tmp_path / "a.h5", [moving(s, *m) for s, m in enumerate(marks)]))
    assert run.stepped().tolist() == marks
    assert run.stepped().dtype == np.bool_


def test_where_it_is_not_known_everything_is_stepped(tmp_path: Path) -> None:
    run = open_run(recorded(tmp_path / "a.h5", plain_rows(3)))
    assert run.stepped().shape == (3, len(PARAMETERS))
    assert run.stepped().all()


def test_a_file_that_does_not_tell_is_read_and_continued(tmp_path: Path) -> None:
    path = recorded(tmp_path / "a.h5", plain_rows(3))
    with h5py.File(path, "r+") as file:
        del file["stepped"]
    with pytest.raises(RunFileError, match="no `stepped`"):
        open_run(path).stepped()
    seal(path, without="stepped")
    assert open_run(path).stepped().all()
    assert validate(path).whole
    none = [False] * len(PARAMETERS)
    resumed = RunWriter(path, PARAMETERS, resume=True)
    append(resumed, moving(3, *none))
    resumed.close(complete=True)
    assert open_run(path).stepped().tolist() == [[True] * len(PARAMETERS)] * 3 + [none]


def test_lengths_are_read_as_they_were_written_and_unknown_where_nobody_wrote_any(
    tmp_path: Path,
) -> None:
    numbers = np.zeros((len(BLOCKS), len(RECTIFICATION_COLUMNS)))
    known, unknown = (row_of(step, rectification=numbers) for step in (0, 1))
    lengths = np.array([1.5, np.nan])
    path = recorded(tmp_path / "a.h5", [replace(known, lengths=lengths), unknown])
    assert_same_bits(open_run(path).lengths(), [lengths, [np.nan, np.nan]])
    with h5py.File(path, "r+") as file:
        del file["lengths"]
    seal(path, without="lengths")
    assert np.isnan(open_run(path).lengths()).all()
    assert open_run(path).lengths().shape == (2, len(PARAMETERS))
    assert np.isnan(open_run(recorded(tmp_path / "b.h5", plain_rows(3))).lengths()).all()


@pytest.mark.parametrize("background", [False, True])
def test_a_row_that_is_amended_takes_the_place_of_the_last(
    tmp_path: Path, background: bool
) -> None:
    own = RunWriter(tmp_path / "a.h5", PARAMETERS)
    writer = BackgroundWriter(own, 1 << 20) if background else own
    writer.begin(PLAIN)
    for step in range(3):
        writer.append(row_of(step))
        writer.amend(row_of(step, value=-2.0 - step))
        if not background:
            assert len(open_run(tmp_path / "a.h5").steps) == step + 1
    writer.close(complete=True)
    run = open_run(tmp_path / "a.h5")
    assert run.steps.tolist() == [0, 1, 2]
    assert run.gram()[:, 0, 0, 0].tolist() == [-2.0, -3.0, -4.0]
    assert validate(run.path).steps == 3
