"""Cosines between steps and between runs, against those of the gradients themselves."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor

from geffect.analysis import drift
from geffect.encodings import ENCODINGS
from geffect.layers import Parameter
from geffect.plots import heatmap
from geffect.sketch import Sketch
from geffect.store import Contents, Row, Run, StoredGradients, open_run
from geffect.store.writer import RunWriter

Gradient = list[Tensor | None]
Step = dict[str, Gradient]

PARAMETERS = tuple(
    Parameter(name, layer, group, index, name, shape, "float32", ())
    for name, layer, group, index, shape in [
        ("embed.weight", "embedding", "embedding", -1, (30, 40)),
        ("layers.0.up.weight", "layer 0", "shallow", 0, (50, 30)),
        ("layers.0.norm.weight", "layer 0", "shallow", 0, (30,)),
        ("layers.1.up.weight", "layer 1", "shallow", 1, (50, 30)),
        ("lm_head.weight", "head", "head", -1, (40, 30)),
    ]
)
EVERY = tuple(range(len(PARAMETERS)))
LAYERS = ("embedding", "layer 0", "layer 1", "head")
SOURCES = ("forget", "retain")
STEPS = (0, 1, 5, 6)


def wandering(seed: int, steps: int = len(STEPS), memory: float = 1.5) -> list[Step]:
    """Gradients that turn slowly, layers of different length, the later the longer."""
    draw = torch.Generator().manual_seed(seed)

    def gradient() -> list[Tensor]:
        return [10.0**i * torch.randn(p.shape, generator=draw) for i, p in enumerate(PARAMETERS)]

    now = {"forget": gradient(), "retain": gradient()}
    now["retain"] = [a + b for a, b in zip(*now.values(), strict=True)]
    run: list[Step] = []
    for _ in range(steps):
        now = {
            source: [memory * a + b for a, b in zip(tensors, gradient(), strict=True)]
            for source, tensors in now.items()
        }
        run.append({source: list(tensors) for source, tensors in now.items()})
    return run


def written(
    path: Path,
    steps: Sequence[Sequence[Step] | Step],
    *,
    sketch: Sketch | None = None,
    encoding: str | None = None,
    kept: tuple[int, ...] = EVERY,
    parameters: tuple[Parameter, ...] = PARAMETERS,
    at: Sequence[int] = STEPS,
) -> Run:
    """A run file of these gradients; a step may be a list of batches, and lack a source."""
    stored = None
    if encoding:
        stored = StoredGradients(encoding, kept, (tuple((0, parameters[i].numel) for i in kept),))
    writer = RunWriter(path, parameters)
    writer.begin(Contents(SOURCES, {"metadata": {}}, sketch=sketch, gradients=stored))
    for number, step in zip(at, steps, strict=True):
        for batch, gradients in enumerate([step] if isinstance(step, dict) else step):
            writer.append(row(number, batch, gradients, parameters, sketch, stored))
    writer.close(complete=True)
    return open_run(path)


def row(
    step: int,
    batch: int,
    gradients: Step,
    parameters: Sequence[Parameter],
    sketch: Sketch | None,
    stored: StoredGradients | None,
) -> Row:
    layers = list(dict.fromkeys(p.layer for p in parameters))
    gram = np.full((len(parameters), 2, 2), np.nan)
    sketches = np.full((2, len(layers), sketch.width if sketch else 0), np.nan, np.float32)
    encoded: dict[str, dict[str, object]] = {}
    there = [i for i, source in enumerate(SOURCES) if source in gradients]
    for p, parameter in enumerate(parameters):
        own = {i: flattened(gradients[SOURCES[i]][p], parameter).double() for i in there}
        for i, j in product(there, there):
            gram[p, i, j] = (own[i] * own[j]).sum()
    for i in there:
        tensors = gradients[SOURCES[i]]
        if sketch:
            sketches[i] = sketch.layers(tensors, parameters).numpy()
        for layer in layers if stored else ():
            own = [k for k in stored.parameters if parameters[k].layer == layer]
            if own:
                flat = [flattened(tensors[k], parameters[k]) for k in own]
                seed = 1000 * step + 10 * layers.index(layer) + i
                vector = ENCODINGS[stored.encoding].encode(torch.cat(flat), seed)
                encoded.setdefault(SOURCES[i], {})[layer] = vector
    return Row(
        step=step,
        batch=batch,
        losses=np.ones(2),
        gram=gram,
        sketches=sketches if sketch else None,
        gradients=encoded if stored else None,
    )


def flattened(tensor: Tensor | None, parameter: Parameter) -> Tensor:
    return torch.zeros(parameter.numel) if tensor is None else tensor.reshape(-1)


def direction(gradient: Gradient, own: Sequence[int]) -> Tensor:
    """The unit vector of a gradient of the model, over some of its tensors."""
    whole = torch.cat([flattened(gradient[i], PARAMETERS[i]) for i in own]).double()
    return whole / whole.norm()


def members(by: str) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for i, p in enumerate(PARAMETERS):
        found.setdefault("model" if by == "model" else getattr(p, by), []).append(i)
    return found


def grid(table: pd.DataFrame, column: str = "value", **where: str) -> np.ndarray:
    for name, value in where.items():
        table = table[table[name] == value]
    square: np.ndarray = table.pivot(index="step", columns="other_step", values=column).to_numpy()
    return square


def expected(ours: list[Step], theirs: list[Step], a: str, b: str, own: list[int]) -> np.ndarray:
    rows, columns = (
        torch.stack([direction(step[source], own) for step in steps])
        for steps, source in ((ours, a), (theirs, b))
    )
    return (rows @ columns.T).numpy()


@pytest.mark.parametrize("by", ["layer", "group", "model"])
@pytest.mark.parametrize(("a", "b"), [("retain", None), ("forget", "retain")])
def test_stored_gradients_are_exact(tmp_path: Path, by: str, a: str, b: str | None) -> None:
    steps = wandering(0)
    table = drift(written(tmp_path / "run.h5", steps, encoding="full"), a, other_source=b, by=by)
    assert list(table.columns) == ["step", "other_step", by, "value", "error", "score", "unit"]
    assert len(table) == len(STEPS) ** 2 * len(members(by))
    for block, own in members(by).items():
        found = grid(table, **{by: block})
        assert found == pytest.approx(expected(steps, steps, a, b or a, own), abs=1e-7)
        assert (grid(table, "error", **{by: block}) == 0).all()


def test_a_function_names_blocks_of_layers(tmp_path: Path) -> None:
    steps = wandering(0)
    run = written(tmp_path / "run.h5", steps, encoding="full")
    table = drift(run, by=lambda p: "stack" if p.index >= 0 else "outside")
    found = grid(table, group="stack")
    assert found == pytest.approx(expected(steps, steps, "retain", "retain", [1, 2, 3]), abs=1e-7)


@pytest.mark.parametrize("by", ["layer", "model"])
def test_sketches_are_as_exact_as_they_say(tmp_path: Path, by: str) -> None:
    ours, off = wandering(1, steps=12, memory=0.5), []
    theirs = ours[::-1]
    for seed in (0, 1):
        sketch = Sketch(seed=seed, width=128)
        run = written(tmp_path / f"ours{seed}.h5", ours, sketch=sketch, at=range(12))
        other = written(tmp_path / f"theirs{seed}.h5", theirs, sketch=sketch, at=range(12))
        table = drift(run, "forget", other, "retain", by=by)
        for block, own in members(by).items():
            exact = expected(ours, theirs, "forget", "retain", own)
            found, error = (grid(table, c, **{by: block}) for c in ("value", "error"))
            off.append((found - exact) / error)
            # A layer alone, and a model that is almost all one layer, come to this.
            assert error == pytest.approx((1 - found**2) / 128**0.5, rel=0.1)
    assert 0.75 < np.sqrt(np.mean(np.square(off))) < 1.25


def test_layers_that_share_a_model_have_smaller_errors_together(tmp_path: Path) -> None:
    level = [[1.0, 0.1, 0.01, 0.001, 0.0001][i] for i in EVERY]
    steps = [
        {s: [c * t for c, t in zip(level, g, strict=True)] for s, g in step.items()}
        for step in wandering(2, steps=12, memory=0.5)
    ]
    exact, off = expected(steps, steps, "forget", "retain", list(EVERY)), []
    for seed in (0, 1):
        sketch = Sketch(seed=seed, width=64)
        run = written(tmp_path / f"{seed}.h5", steps, sketch=sketch, at=range(12))
        table = drift(run, "forget", other_source="retain", by="model")
        found, error = grid(table), grid(table, "error")
        off.append((found - exact) / error)
        # Four independent sketches of 64: together about as exact as one of 256.
        assert error.mean() == pytest.approx((1 - exact**2).mean() / 256**0.5, rel=0.3)
    assert 0.75 < np.sqrt(np.mean(np.square(off))) < 1.25


def test_a_gradient_has_no_angle_with_itself(tmp_path: Path) -> None:
    for name, keep in {
        "sketch": {"sketch": Sketch(width=64)},
        "int4": {"encoding": "int4"},
    }.items():
        table = drift(written(tmp_path / f"{name}.h5", wandering(3), **keep))
        same = table[table["step"] == table["other_step"]]
        assert same["value"].to_numpy() == pytest.approx(1.0)
        if name == "sketch":
            assert (same["error"] < 1e-6).all()


@pytest.mark.parametrize("encoding", ["bf16", "int8", "int4"])
def test_encoded_gradients_are_as_exact_as_they_say(tmp_path: Path, encoding: str) -> None:
    steps = wandering(4)
    table = drift(written(tmp_path / "run.h5", steps, encoding=encoding))
    for layer, own in members("layer").items():
        exact = expected(steps, steps, "retain", "retain", own)
        numel = sum(PARAMETERS[i].numel for i in own)
        error = grid(table, "error", layer=layer)
        assert error == pytest.approx(ENCODINGS[encoding].error / numel**0.5)
        assert (abs(grid(table, layer=layer) - exact) < 2 * error).all()


def test_norms_are_those_of_the_true_gradients(tmp_path: Path) -> None:
    # With its own norms, int4 finds two almost equal gradients too far apart, always.
    steps = [{s: [t + 1e-3 * k for t in g] for s, g in wandering(5, 1)[0].items()} for k in STEPS]
    table = drift(written(tmp_path / "run.h5", steps, encoding="int4"), by="model")
    assert grid(table).min() > 0.99


def test_gradients_of_some_steps_and_parameters(tmp_path: Path) -> None:
    steps = wandering(6)
    run = written(tmp_path / "run.h5", steps, encoding="full", kept=(2, 3))
    table = drift(run, "forget", by="model")
    exact = expected(steps, steps, "forget", "forget", [2, 3])
    assert grid(table) == pytest.approx(exact, abs=1e-7)
    assert sorted(set(drift(run, "forget")["layer"])) == ["layer 0", "layer 1"]


@pytest.mark.parametrize("keep", [{"sketch": Sketch(width=4096)}, {"encoding": "full"}])
def test_several_batches_of_a_step_are_their_mean(tmp_path: Path, keep: dict) -> None:
    one, other = wandering(7), wandering(8)
    run = written(tmp_path / "run.h5", list(zip(one, other, strict=True)), **keep)
    means = [
        {s: [(a + b) / 2 for a, b in zip(x[s], y[s], strict=True)] for s in SOURCES}
        for x, y in zip(one, other, strict=True)
    ]
    table = drift(run, by="model")
    exact = expected(means, means, "retain", "retain", list(EVERY))
    assert grid(table) == pytest.approx(exact, abs=1e-6 if "encoding" in keep else 0.06)


@pytest.mark.parametrize("keep", [{"sketch": Sketch(width=64)}, {"encoding": "full"}])
def test_what_is_zero_or_absent_has_no_direction(tmp_path: Path, keep: dict) -> None:
    steps = wandering(9)
    steps[1]["retain"] = [None] * len(PARAMETERS)
    steps[2].pop("retain")
    table = drift(written(tmp_path / "run.h5", steps, **keep))
    undefined = table["step"].isin([1, 5]) | table["other_step"].isin([1, 5])
    for column in ("value", "error"):
        assert table[column].isna().tolist() == undefined.tolist()


def test_one_other_step_is_a_picture(tmp_path: Path) -> None:
    run = written(tmp_path / "run.h5", wandering(10), sketch=Sketch(width=64))
    ax = heatmap(drift(run).query("other_step == 0"), ax=Figure().subplots())
    assert [label.get_text() for label in ax.get_yticklabels()] == list(LAYERS)


def test_a_run_of_gram_matrices_is_refused(tmp_path: Path) -> None:
    run = written(tmp_path / "run.h5", wandering(0))
    with pytest.raises(ValueError, match=r'Recorder\(\.\.\., store="sketch"\)'):
        drift(run)
    sketched = written(tmp_path / "sketched.h5", wandering(0), sketch=Sketch(width=64))
    with pytest.raises(ValueError, match=r'run\.h5.*Recorder\(\.\.\., store="sketch"\)'):
        drift(sketched, other=run)


@pytest.mark.parametrize("other", [Sketch(seed=1, width=64), Sketch(width=32)])
def test_other_sketches_are_refused(tmp_path: Path, other: Sketch) -> None:
    runs = [
        written(tmp_path / f"{i}.h5", wandering(0), sketch=sketch)
        for i, sketch in enumerate((Sketch(width=64), other))
    ]
    with pytest.raises(ValueError, match=r"`other` should be sketched as .* Found Sketch.* Record"):
        drift(runs[0], other=runs[1])


@pytest.mark.parametrize("keep", [{"sketch": Sketch(width=64)}, {"encoding": "full"}])
def test_another_model_is_refused(tmp_path: Path, keep: dict) -> None:
    renamed = (*PARAMETERS[:-1], replace(PARAMETERS[-1], name="score.weight"))
    run = written(tmp_path / "a.h5", wandering(0), **keep)
    other = written(tmp_path / "b.h5", wandering(0), parameters=renamed, **keep)
    with pytest.raises(ValueError, match=r"gradients of the same parameters\. Found 2 that differ"):
        drift(run, other=other)


def test_what_cannot_be_chosen_is_refused(tmp_path: Path) -> None:
    run = written(tmp_path / "run.h5", wandering(0), sketch=Sketch(width=64))
    with pytest.raises(ValueError, match=r"keep the tensors of a layer together.*`layer 0`"):
        drift(run, by="parameter")
    with pytest.raises(ValueError, match=r"`source` should be one of forget, retain"):
        drift(run, "npo")
