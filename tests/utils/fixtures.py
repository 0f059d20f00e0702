"""What several tests share: runs to read, and one quick study for the whole session."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import torch
from filelock import FileLock
from torch import nn

from geffect import Recorder, Rectifier, Run, open_run
from geffect.layers import Parameter
from geffect.objectives import SharedForward, nll
from geffect.sketch import Sketch
from geffect.store.schema import VERSION, Contents, Row
from geffect.store.writer import RunWriter
from tests.utils import forks, notebooks, tiny
from tests.utils.browser import Browser, browser
from tests.utils.command_line import Ask, alone, answering

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


@pytest.fixture(scope="session", autouse=True)
def _server() -> None:
    """Before all else, so that what is forked from it begins where no test has run."""
    forks.start_server()


@dataclass(frozen=True)
class Study:
    """A study that the command line has run, and what it said meanwhile."""

    out: Path
    said: str
    complained: str

    @property
    def summary(self) -> dict[str, Any]:
        """What summary.json holds."""
        summary: dict[str, Any] = json.loads((self.out / "summary.json").read_text())
        return summary


@pytest.fixture(params=[torch.bfloat16, torch.float64], ids=str)
def default_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """The type that a process has set for tensors of which none is told."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder that all processes of the suite share."""
    folder = tmp_path_factory.getbasetemp()
    return folder if worker_id == "master" else folder.parent


@pytest.fixture(scope="session")
def quick_study(shared_folder: Path) -> Study:
    """The quick study of GA, run once: the first process to need it runs it for all."""
    out, said = shared_folder / "quick study", shared_folder / "quick study.json"
    with FileLock(f"{said}.lock"):
        if not said.exists():
            # One worker: other tests keep the other cores busy.
            told = ["demo", "--quick", "--methods", "ga", "--workers", 1, "--out", out]
            code, *written = alone(*told)
            assert code == 0, written
            said.write_text(json.dumps(written), encoding="utf-8")
    return Study(out, *json.loads(said.read_text(encoding="utf-8")))


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    """A browser, which is started once by a process that needs it."""
    with browser() as opened:
        yield opened


@pytest.fixture(scope="session")
def executed(shared_folder: Path, quick_study: Study) -> Callable[[str], Path]:
    """Runs a notebook, once for all processes, and tells where it is with its outputs."""
    folder = shared_folder / "notebooks"
    folder.mkdir(exist_ok=True)

    def executed(name: str) -> Path:
        place, lock = folder / f"{name}.ipynb", shared_folder / f"{name}.lock"
        with FileLock(lock):
            if not place.exists():
                notebook = nbformat.read(NOTEBOOKS / place.name, as_version=4)
                with tempfile.TemporaryDirectory() as empty:
                    notebooks.run(notebook, Path(empty), {"GEFFECT_STUDY": str(quick_study.out)})
                    assert os.listdir(empty) == [], "A notebook leaves nothing where it runs."
                nbformat.write(notebook, place)
        return place

    return executed


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run file with every source: GA with GRU and AdamW on a tiny Llama."""
    path = tmp_path_factory.mktemp("recorded") / "tiny.h5"
    model = tiny.llama(tied=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rectifier = Rectifier(model)
    with Recorder(model, path, metadata={"method": "ga"}, update=True) as recorder:
        for batch in tiny.pairs(4):
            shared = SharedForward(model)
            recorder.backward(
                objective={"forget": -1.0},
                forget=nll(shared, batch["forget"]),
                retain=nll(shared, batch["retain"]),
                rectifier=rectifier,
            )
            optimizer.step()
            optimizer.zero_grad()
    return path


@pytest.fixture(scope="session")
def unwatched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run file without the update and without a rectifier, of a model without layers."""
    path = tmp_path_factory.mktemp("unwatched") / "plain.h5"
    model = nn.Linear(3, 1)
    with Recorder(model, path) as recorder:
        for step in range(2):
            forget, retain = model(torch.eye(3)[step]).sum() ** 2, model(torch.ones(3)).sum() ** 2
            recorder.backward(objective={"forget": -1.0}, forget=forget, retain=retain)
    return path


@pytest.fixture(scope="session")
def example_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """The run of the examples in the docstrings: a step of GA with rate 0.1, one tensor."""

    def example_run(
        *,
        update: bool = False,
        sketch: bool = False,
        weights: bool = False,
        rectified: bool = False,
        tables: Mapping[str, Mapping[str, Any]] | None = None,
        steps: int = 1,
    ) -> Run:
        path = tmp_path_factory.mktemp("example") / "example.h5"
        weighted = ("npo",) if weights else ()
        kept = tables or {}
        sketched = Sketch() if sketch else None
        _write_example(path, update, sketched, weighted, rectified, kept, steps)
        return open_run(path)

    return example_run


def _write_example(
    path: Path,
    update: bool,
    sketch: Sketch | None,
    weights: tuple[str, ...],
    rectified: bool,
    tables: Mapping[str, Mapping[str, Any]],
    steps: int,
) -> None:
    forget, retain = np.array([1.0, 1.0, 1.0, -1.0]), np.full(4, 0.5)
    vectors = {"objective": -forget, "forget": forget, "retain": retain}
    if update or rectified:
        left = retain - forget if rectified else -forget  # GRU takes out what is along `retain`
        vectors |= {"retain_ema": retain, "update": -0.1 * left}
    stacked = np.stack([*vectors.values()])
    losses = {"objective": -1.0, "forget": 1.0, "retain": 0.5}
    parameter = Parameter(
        name="model.layers.0.mlp.up_proj.weight", layer="layer 0", group="shallow", index=0,
        module="mlp.up_proj", shape=(2, 2), dtype="float32", tied_to=(),
    )  # fmt: skip
    writer = RunWriter(path, [parameter])
    manifest = {"format_version": VERSION, "rectifier": None, "metadata": {}}
    contents = Contents(
        sources=tuple(vectors), manifest=manifest, sketch=sketch, weights=weights,
        blocks=("model",) if rectified else (),
    )  # fmt: skip
    untold = [np.nan] * 4  # of masks
    writer.begin(contents)
    folds = [sketch.fold(torch.tensor(v), parameter.name) for v in stacked] if sketch else []
    for step in range(steps):
        writer.append(
            Row(
                step=step,
                lr=0.1,
                losses=np.array([losses.get(name, np.nan) for name in vectors]),
                gram=(stacked @ stacked.T)[None],
                sketches=torch.stack(folds)[:, None].numpy() if sketch else None,
                weights=np.array([[1.0, 1.5, 1.9, 2.0]]) if weights else None,
                rectification=(
                    np.array(
                        [[1.0, 1.0, -1.0, 0.0, 2.0, 3.0**0.5, 1.0, np.nan, np.nan, 0.0, *untold]]
                    )
                    if rectified
                    else None
                ),
            )
        )
    for name, columns in tables.items():
        writer.keep(name, columns)
    writer.close(complete=True)


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ask:
    """The command line, run here."""
    return answering(monkeypatch, capsys)


@pytest.fixture
def untouched() -> Iterator[None]:
    """A test of plots leaves the reader's settings as they were, and draws on Agg."""
    import matplotlib as mpl
    from matplotlib import pyplot

    mpl.use("Agg")
    before = dict(mpl.rcParams)
    yield
    assert dict(mpl.rcParams) == before
    pyplot.close("all")
