"""Files that nobody would write: each is refused by one error that names it, or read as it was."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import h5py
import numpy as np
import pytest

from geffect.store import RunFileError, open_run, opening, validate
from tests.fuzz.oracle import REFUSED, Answers, answers, verdict
from tests.fuzz.originals import Original, originals
from tests.utils.seals import put_json, seal


@pytest.fixture(autouse=True)
def nobody_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nothing to wait for before what differs is read again."""
    monkeypatch.setattr(opening, "PAUSE", 0.0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Original]:
    """A whole run of today, one that is open, and one of format 2, by these names."""
    folder = tmp_path_factory.mktemp("originals")
    return {run.name: run for run in originals(folder)}


@pytest.fixture(scope="module")
def right(
    runs: dict[str, Original], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Answers]:
    """What the run of a name answers as it was written, asked once."""
    return cache(lambda name: answers(runs[name].put(tmp_path_factory.mktemp("right"))))


def put(name: str, values: object) -> Callable[[h5py.File], None]:
    """Put something else in the place of a dataset."""

    def edit(file: h5py.File) -> None:
        del file[name]
        file[name] = values

    return edit


def declared(name: str, shape: tuple[int, ...], chunks: tuple[int, ...]) -> Callable[..., None]:
    """Put numbers that are nowhere in the place of a dataset."""

    def edit(file: h5py.File) -> None:
        dtype = file[name].dtype
        del file[name]
        file.create_dataset(name, shape, dtype, chunks=chunks)

    return edit


def ravelled(file: h5py.File) -> None:
    values = file["gram"][:].ravel()
    put("gram", values)(file)


def turned(file: h5py.File) -> None:
    values = file["losses"][:].T
    put("losses", values)(file)


PARTS = 20
COMPOUND = np.zeros(5, dtype=[("x", "<f8"), ("y", "<i8")])
EDITS: dict[str, Callable[[h5py.File], None]] = {
    "a scalar": put("gram", 1.0),
    "integers": put("losses", np.zeros((5, 3), "<i8")),
    "big-endian": put("losses", np.zeros((5, 3), ">f8")),
    "a compound": put("steps/step", COMPOUND),
    "texts": put("steps/step", ["a", "b", "c", "d", "e"]),
    "nothing": put("steps/lr", h5py.Empty("f8")),
    "fewer rows": put("steps/step", np.arange(2)),
    "no rows": put("steps/step", np.arange(0)),
    "flat": ravelled,
    "turned": turned,
    "a group": lambda file: put("gram", np.zeros(1))(file) or file.move("gram", "x/gram"),  # type: ignore[func-returns-value]
    "a soft link to itself": put("gram", h5py.SoftLink("/gram")),
    "soft links around": lambda file: (
        put("gram", h5py.SoftLink("/losses"))(file),  # type: ignore[func-returns-value]
        put("losses", h5py.SoftLink("/gram"))(file),  # type: ignore[func-returns-value]
    ),
    "another file": put("gram", h5py.ExternalLink("/etc/passwd", "/gram")),
    "2^40 rows": declared("gram", (2**40, 2, 3, 3), (1, 2, 3, 3)),
    "2^40 counts": declared("committed", (2**40,), (2**20,)),
    "2^60 steps": declared("steps/step", (2**60,), (2**28,)),
    "a long chunk": declared("losses", (5, 3), (5, 3)),
    "no steps": lambda file: file.__delitem__("steps"),
    "no parameters": lambda file: file.__delitem__("parameters"),
    "no sources": lambda file: file.__delitem__("sources"),
    "no count": lambda file: file.__delitem__("committed"),
    "negative count": put("committed", np.int64(-3)),
    "a huge count": put("committed", np.int64(2**62)),
    "a manifest that is none": put("manifest", "not JSON {"),
    "a list for a manifest": put("manifest", "[1, 2]"),
    "deep nesting": put("manifest", "[" * 100_000),
    "a long number": put("manifest", '{"metadata": ' + "9" * 10_000 + "}"),
    "no UTF-8": put("sources", np.array([b"\xff", b"a", b"b"])),
    "twice the same source": put("sources", np.array(["a", "a", "b"], dtype="S1").astype(object)),
    "an encoding of nothing": put("encoding", "{}"),
    "an endless gradient": put(
        "encoding", '{"encoding": "full", "parameters": [0], "ranges": [[[0, 1e300]]]}'
    ),
    "a gradient of a far parameter": put(
        "encoding", '{"encoding": "full", "parameters": [9], "ranges": [[[0, 6]]]}'
    ),
    "a far row of gradients": put("stored", np.full((5, 3), 2**40)),
    "a sketch of no width": put("sketch", '{"seed": 1, "width": -1, "version": 1}'),
    "a sketch of words": put("sketch", '{"seed": "a"}'),
    "shapes of words": put("parameters/shape", ['["a"]', "{}"]),
    "negative shapes": put("parameters/shape", ["[-2, 3]", "[]"]),
    "endless shapes": put("parameters/shape", ["[1099511627776, 1099511627776]", "[]"]),
    "a state of its own": lambda file: file.attrs.__setitem__("state", "half"),
    "no state": lambda file: file.attrs.__delitem__("state"),
    "a version of words": lambda file: file.attrs.__setitem__("format_version", "three"),
    "many versions": lambda file: file.attrs.__setitem__("format_version", [3, 3]),
    "a long version": lambda file: file.attrs.__setitem__("format_version", 2**62),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["whole", "killed", "format 2"])
@pytest.mark.parametrize("edit", EDITS)
def test_what_is_edited_by_hand_is_refused_or_right(
    runs: dict[str, Original],
    right: Callable[[str], Answers],
    tmp_path: Path,
    kind: str,
    edit: str,
) -> None:
    path = runs[kind].put(tmp_path)
    with h5py.File(path, "r+") as file:
        EDITS[edit](file)
    wrong = verdict(answers(path), right(kind))
    assert not wrong or (kind == "format 2" and wrong.startswith("silent"))
    try:
        validate(path)
    except RunFileError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize("name", ["a.h5", "a.gradients/000.rank0.h5"])
def test_what_is_cut_off_anywhere_is_refused_or_right(
    runs: dict[str, Original], right: Callable[[str], Answers], tmp_path: Path, name: str
) -> None:
    path = runs["whole"].put(tmp_path)
    stored = (tmp_path / name).read_bytes()
    for part in range(PARTS):
        (tmp_path / name).write_bytes(stored[: len(stored) * part // PARTS])
        found = answers(path)
        assert verdict(found, right("whole")) == ""
        assert REFUSED in found.values()


def test_a_heap_of_zeros_hangs_nobody(runs: dict[str, Original], tmp_path: Path) -> None:
    path = runs["format 2"].put(tmp_path)
    stored = path.read_bytes()
    for place in (i for i in range(len(stored)) if stored.startswith(b"GCOL", i)):
        for kept in (0, 4, 8, 16):  # of the mark, the version and the size
            path.write_bytes(stored[: place + kept] + bytes(4096 - kept) + stored[place + 4096 :])
            assert answers(path)["open"] == REFUSED
            with pytest.raises(RunFileError, match=r"a\.h5` should be a run file"):
                validate(path)


def test_what_was_written_wrongly_is_refused_although_its_checksums_are_right(
    runs: dict[str, Original], tmp_path: Path
) -> None:
    described = {"encoding": "full", "parameters": [0], "ranges": [[[0, 5]]]}
    for name, other in (("manifest", [1]), ("encoding", described), ("sketch", {"width": []})):
        path = runs["whole"].put(tmp_path)
        put_json(path, name, other)
        seal(path)
        with pytest.raises(RunFileError, match=r"a\.h5` should be a run file of geffect, format 3"):
            open_run(path)


@pytest.mark.parametrize("name", ["forget", "retain"])
def test_a_block_that_changed_is_one_problem_and_the_others_are_read(
    runs: dict[str, Original], tmp_path: Path, name: str
) -> None:
    path = runs["whole"].put(tmp_path)
    with h5py.File(tmp_path / "a.gradients" / "000.rank0.h5", "r+") as file:
        file[f"{name}/layer 0/values"][1, 2] = 3.5
    run = open_run(path)
    with pytest.raises(
        RunFileError, match=rf"step 2 .*gradient of `{name}` in layer 0 with another"
    ):
        run.gradient(name, 2)
    assert len(run.gradient(name, 4)) == len(run.gradient("objective", 2)) == 1
    assert len(validate(path).problems) == 1


def test_two_blocks_that_changed_places_are_seen(runs: dict[str, Original], tmp_path: Path) -> None:
    path = runs["whole"].put(tmp_path)
    with h5py.File(tmp_path / "a.gradients" / "000.rank0.h5", "r+") as file:
        for name in ("forget/layer 0/values", "checksums"):
            stored = file[name][:]
            stored[[0, 1]] = stored[[1, 0]]
            file[name][:] = stored
    with pytest.raises(RunFileError, match="with another checksum"):
        open_run(path).gradient("forget", 0)


def test_two_rows_that_changed_places_with_their_checksums_are_seen(
    runs: dict[str, Original], tmp_path: Path
) -> None:
    path = runs["whole"].put(tmp_path)
    with h5py.File(path, "r+") as file:
        for name in ("gram", "checksums"):
            stored = file[name][:]
            stored[[0, 1]] = stored[[1, 0]]
            file[name][:] = stored
    with pytest.raises(RunFileError, match=r"row 0 and 1 more of .*with another checksum"):
        open_run(path).gram()
