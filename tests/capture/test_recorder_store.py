"""What is kept beside the Gram matrices, how large it gets, and what happens when it cannot be."""

import copy
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from geffect import Recorder, Rectifier, RunFileError, open_run
from geffect.analysis import drift
from geffect.capture import StoreOptions, at, every
from geffect.gradients import differentiate
from geffect.layers import describe
from geffect.objectives import nll
from geffect.sketch import Sketch
from geffect.store import growing_file, validate
from tests.utils import shallow as tiny

SOURCES = ("objective", "forget", "retain")


def losses_of(model: nn.Module, pair: Any) -> dict[str, Any]:
    forget, retain = nll(model, pair["forget"]), nll(model, pair["retain"])
    return {"objective": {"forget": -1.0, "retain": 0.5}, "forget": forget, "retain": retain}


def trained(
    model: nn.Module, path: Path, *, steps: int = 3, rectified: bool = False, **options: Any
) -> list[dict[str, list[Tensor]]]:
    """Record a few steps; the gradients of each, taken apart from the recorder."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rectifier = Rectifier(model) if rectified else None
    exact = []
    with Recorder(model, path, **options) as recorder:
        for pair in tiny.pairs(steps):
            step = differentiate(list(model.parameters()), losses_of(model, pair))
            exact.append({name: [g.clone() for g in step.of(name)] for name in step.sources})
            recorder.backward(rectifier=rectifier, **losses_of(model, pair))
            optimizer.step()
            optimizer.zero_grad()
    return exact


def by_layer(model: nn.Module, vector: list[Tensor]) -> list[Tensor]:
    rows = describe(model)
    layers = list(dict.fromkeys(row.layer for row in rows))
    return [
        torch.cat([g.flatten() for row, g in zip(rows, vector, strict=True) if row.layer == layer])
        for layer in layers
    ]


# Once inside of the last pass, once with everything resident, once behind a rectifier.
WAYS: dict[str, dict[str, Any]] = {
    "streamed": {}, "resident": {"update": True}, "rectified": {"rectified": True},
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_full_gradients_come_back_bit_for_bit(way: str, tmp_path: Path) -> None:
    model, path = tiny.llama(tied=True), tmp_path / "run.h5"
    exact = trained(model, path, store="full", **WAYS[way])
    run = open_run(path)
    assert run.stored_steps.tolist() == [0, 1, 2]
    for step, gradients in enumerate(exact):
        for name in SOURCES:
            stored = run.gradient(name, step)
            for found, vector in zip(stored, by_layer(model, gradients[name]), strict=True):
                assert np.array_equal(found, vector.numpy())


@pytest.mark.parametrize("way", WAYS)
def test_the_gram_of_stored_gradients_is_the_stored_gram(way: str, tmp_path: Path) -> None:
    model, path = tiny.llama(), tmp_path / "run.h5"
    trained(model, path, store="full", **WAYS[way])
    run = open_run(path)
    for step, K in enumerate(run.gram().sum(axis=1)):
        whole = [np.concatenate(run.gradient(name, step)).astype(float) for name in run.sources]
        for i, a in enumerate(whole):
            for j, b in enumerate(whole):
                value = np.dot(a, b)
                scale = (K[i, i] * K[j, j]) ** 0.5
                assert value == pytest.approx(K[i, j], abs=1e-6 * scale)


@pytest.mark.parametrize(("store", "error"), [("bf16", 5e-3), ("int8", 2e-2), ("int4", 0.3)])
def test_smaller_encodings_come_back_close(store: str, error: float, tmp_path: Path) -> None:
    model, path = tiny.llama(), tmp_path / "run.h5"
    exact = trained(model, path, store=store)
    run = open_run(path)
    for found, vector in zip(
        run.gradient("retain", 1), by_layer(model, exact[1]["retain"]), strict=True
    ):
        assert 0 < np.linalg.norm(found - vector.numpy()) < error * np.linalg.norm(vector)


@pytest.mark.parametrize("way", WAYS)
def test_sketches_are_those_of_the_gradients(way: str, tmp_path: Path) -> None:
    model, path = tiny.llama(tied=True), tmp_path / "run.h5"
    sketch = Sketch(seed=7, width=64)
    exact = trained(model, path, store=StoreOptions(sketch=sketch), **WAYS[way])
    run = open_run(path)
    assert run.contents.sketch == sketch
    for step, gradients in enumerate(exact):
        for name in SOURCES:
            expected = sketch.layers(gradients[name], describe(model)).numpy()
            assert run.sketch(name)[step] == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_only_what_is_asked_for_is_kept(tmp_path: Path) -> None:
    model, path = tiny.llama(layers=2), tmp_path / "run.h5"
    keep = StoreOptions(gradients="full", match=r"layers\.[01]\.mlp", when=every(2))
    exact = trained(model, path, store=keep, steps=4)
    run = open_run(path)
    assert run.steps.tolist() == [0, 1, 2, 3]
    assert run.stored_steps.tolist() == [0, 2]
    names = [name for name, _ in model.named_parameters()]
    stored = run.gradient("forget", 2)
    for layer, found in zip((0, 1), stored, strict=True):
        wanted = [
            g.flatten()
            for name, g in zip(names, exact[2]["forget"], strict=True)
            if f"layers.{layer}.mlp" in name
        ]
        assert np.array_equal(found, torch.cat(wanted).numpy())


@pytest.mark.parametrize("store", ["gram", "sketch", "full", "int4"])
def test_whatever_is_kept_training_ends_bitwise_the_same(store: str, tmp_path: Path) -> None:
    start = tiny.llama()
    ends = []
    for name in ("gram", store):
        model = copy.deepcopy(start)
        trained(model, tmp_path / f"{name}-{len(ends)}.h5", store=name)
        ends.append(model)
    for a, b in zip(ends[0].parameters(), ends[1].parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("store", "found"),
    [("bf8", "store = 'bf8'"), ("everything", "'everything'")],
)
def test_an_unknown_store_is_named(store: str, found: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"should be one of gram, sketch.*{found}.*Choose"):
        Recorder(tiny.llama(), tmp_path / "run.h5", store=store)


def test_a_filter_that_finds_nothing_is_named(tmp_path: Path) -> None:
    keep = StoreOptions(gradients="bf16", match="decoder")
    with pytest.raises(ValueError, match=r"`match` should find .*decoder.* Pass another"):
        Recorder(tiny.llama(), tmp_path / "run.h5", store=keep)


def test_the_size_is_told_at_the_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="geffect"):
        trained(tiny.llama(), tmp_path / "run.h5", store="bf16", steps=3)
    (told,) = [record for record in caplog.records if "will take" in record.message]
    assert told.levelno == logging.WARNING  # seen without any set-up
    assert "for a step" in told.message


def test_the_size_that_is_told_is_the_size_that_it_takes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny.llama()
    with caplog.at_level(logging.INFO, logger="geffect"):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with Recorder(model, tmp_path / "run.h5", store="sketch", steps=12) as recorder:
            for pair in tiny.pairs(12):
                recorder.backward(**losses_of(model, pair))
                optimizer.step()
                optimizer.zero_grad()
    (told,) = [record.message for record in caplog.records if "will take" in record.message]
    assert "for 12 steps" in told
    number, unit = told.split("will take ")[1].split()[:2]
    size = float(number) * {"kB": 1e3, "MB": 1e6}[unit]
    assert (tmp_path / "run.h5").stat().st_size == pytest.approx(size, rel=0.05)


def test_a_run_that_does_not_fit_the_disk_is_refused_before_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    model = tiny.llama()
    with (
        Recorder(model, tmp_path / "run.h5", store="full", steps=100) as recorder,
        pytest.raises(RunFileError, match=r"should have room .* Found 100 kB free. Record fewer"),
    ):
        recorder.backward(**losses_of(model, tiny.pairs(1)[0]))
        recorder.close()
    assert list(tmp_path.iterdir()) == []


def vanish(folder: Path) -> None:
    shutil.rmtree(folder)


@pytest.mark.parametrize("store", ["gram", "full"])
@pytest.mark.parametrize("break_it", [vanish])
def test_training_goes_on_or_stops_as_the_user_chose(
    break_it: Callable[[Path], None],
    store: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(growing_file, "FIRST_CAPACITY", 6)  # a larger file takes its place then

    def run(on_error: str) -> nn.Module:
        folder = tmp_path / on_error
        folder.mkdir()
        model = tiny.llama()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with Recorder(model, folder / "run.h5", store=store, on_error=on_error) as recorder:
            for step, pair in enumerate(tiny.pairs(8)):
                recorder.backward(**losses_of(model, pair))
                optimizer.step()
                optimizer.zero_grad()
                if step == 3:
                    break_it(folder)
        return model

    with pytest.raises(RunFileError, match=r"raise/run.*should be writable"):
        run("raise")
    with caplog.at_level(logging.WARNING):
        watched = run("warn")
    told = [r.message for r in caplog.records if "Training goes on" in r.message]
    assert len(told) == 1
    assert "run" in told[0]
    plain = tiny.llama()
    trained(plain, tmp_path / "whole.h5", steps=8)
    for a, b in zip(watched.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("store", ["gram", "full"])
def test_a_resumed_training_drops_what_comes_again(store: str, tmp_path: Path) -> None:
    start, pairs = tiny.llama(), tiny.pairs(6)

    def go(model: nn.Module, first: int, last: int, path: Path, **options: Any) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with Recorder(model, path, store=store, **options) as recorder:
            assert recorder.next_step == first
            for pair in pairs[first:last]:
                recorder.backward(**losses_of(model, pair))
                optimizer.step()
                optimizer.zero_grad()

    whole = copy.deepcopy(start)
    go(whole, 0, 6, tmp_path / "whole.h5")
    model = copy.deepcopy(start)
    go(model, 0, 3, tmp_path / "run.h5")
    checkpoint = copy.deepcopy(model)
    go(model, 3, 5, tmp_path / "run.h5", resume=True)
    go(checkpoint, 3, 6, tmp_path / "run.h5", resume=True, next_step=3)
    a, b = open_run(tmp_path / "whole.h5"), open_run(tmp_path / "run.h5")
    assert b.steps.tolist() == [0, 1, 2, 3, 4, 5]
    assert np.array_equal(a.gram(), b.gram())
    if store == "full":
        for step in range(6):
            for x, y in zip(a.gradient("retain", step), b.gradient("retain", step), strict=True):
                assert np.array_equal(x, y)


def test_a_table_is_kept_with_the_run(tmp_path: Path) -> None:
    model, path = tiny.llama(), tmp_path / "run.h5"
    with Recorder(model, path) as recorder:
        recorder.keep_table("early", {"sample": np.array([0, 1])})
        recorder.backward(**losses_of(model, tiny.pairs(1)[0]))
        recorder.keep_table("tokens", {"token": ["a", "b"], "value": np.array([0.5, -1.0])})
    run = open_run(path)
    assert set(run.tables) == {"early", "tokens"}
    assert list(run.table("tokens")["token"]) == ["a", "b"]
    assert run.table("tokens")["value"].tolist() == [0.5, -1.0]
    assert run.table("early")["sample"].tolist() == [0, 1]
    with pytest.raises(ValueError, match="samples"):
        run.table("samples")


@pytest.mark.parametrize("name", ["", "a/b", "..", "a\0", "a\ud800"])
def test_a_name_that_no_file_can_hold_is_refused(name: str, tmp_path: Path) -> None:
    """Of a table, a column, a loss or a parameter, in one sentence that names it."""
    model, path = nn.Linear(2, 1), tmp_path / "run.h5"
    with Recorder(model, path) as recorder:
        recorder.backward(objective=model(torch.ones(2)).sum())
        for table in ({name: {"a": ["x"]}}, {"t": {name: ["x"]}}):
            with pytest.raises(ValueError, match=r"name of a table .* Found .* Name it otherwise"):
                recorder.keep_table(*table.popitem())
        with pytest.raises(ValueError, match=r"no name with a slash, NUL .* Found objective, "):
            recorder.backward(objective=model(torch.ones(2)).sum(), **{name: model.weight.sum()})
    assert len(open_run(path).steps) == 1
    if name in ("a\0", "a\ud800"):
        odd = nn.ParameterDict({name: nn.Parameter(torch.ones(2))})
        with pytest.raises(ValueError, match=r"names that a file can hold.* Found `a\\"):
            Recorder(odd, tmp_path / "odd.h5")


@pytest.mark.parametrize("name", ["100%", "a%b", "%%", "%s%d"])
def test_gradients_of_a_run_are_found_whatever_its_name(name: str, tmp_path: Path) -> None:
    """Also by other readers of HDF5, for which a percent sign begins a pattern of names."""
    model, path = nn.Linear(2, 1), tmp_path / f"{name}.h5"
    with Recorder(model, path, store="full") as recorder:
        for scale in (1.0, 3.0):
            recorder.backward(objective=scale * model(torch.tensor([1.0, 2.0])).sum())
    with h5py.File(path) as file:
        stored = file["gradients/objective/layer 0/values"][:2]
    np.testing.assert_array_equal(np.sort(stored), [[1.0, 1.0, 2.0], [3.0, 3.0, 6.0]])
    assert drift(open_run(path), "objective")["value"].to_numpy() == pytest.approx(1.0)


def test_steps_without_a_row_are_not_stored_either(tmp_path: Path) -> None:
    model, path = tiny.llama(), tmp_path / "run.h5"
    trained(model, path, store="bf16", when=at(1), steps=3)
    run = open_run(path)
    assert run.steps.tolist() == [1]
    assert run.stored_steps.tolist() == [1]


def test_rounding_is_another_one_in_each_run(tmp_path: Path) -> None:
    """The same errors in two runs would look like a likeness of their gradients."""
    stored = []
    for name in ("one", "other"):
        trained(tiny.llama(), tmp_path / f"{name}.h5", store="int4", steps=1)
        stored.append(np.concatenate(open_run(tmp_path / f"{name}.h5").gradient("retain", 0)))
    assert not np.array_equal(*stored)


def test_a_choice_that_means_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`match` should choose .* Found `match = 'mlp'`"):
        StoreOptions(match="mlp")
    with pytest.raises(ValueError, match=r"`on_error` should be one of raise, warn. Found"):
        Recorder(tiny.llama(), tmp_path / "run.h5", on_error="ignore")


def test_another_store_is_refused_before_the_first_step_of_a_resumed_run(tmp_path: Path) -> None:
    trained(tiny.llama(), tmp_path / "run.h5", store="sketch", steps=1)
    with pytest.raises(ValueError, match="sketch"):
        Recorder(tiny.llama(), tmp_path / "run.h5", resume=True)


@pytest.mark.parametrize("encoding", ["full", "int4"])
def test_segments_of_another_run_are_told_from_those_of_this_one(
    tmp_path: Path, encoding: str
) -> None:
    for name in ("a", "b"):
        path, model = tmp_path / f"{name}.h5", nn.Linear(3, 2)
        with Recorder(model, path, store=encoding) as recorder:
            loss = model(torch.ones(1, 3)).square().sum()
            recorder.backward(objective={"forget": -1.0}, forget=loss, retain=2 * loss)
    run, segment = open_run(tmp_path / "a.h5"), "000.rank0.h5"
    assert validate(run.path).whole
    shutil.copy(tmp_path / "b.gradients" / segment, tmp_path / "a.gradients" / segment)
    with pytest.raises(RunFileError, match="of another step or run"):
        run.gradient("forget", 0)
    (problem,) = validate(run.path).problems  # the same of every source
    assert "of another step or run" in problem
