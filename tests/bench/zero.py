"""How far bfloat16 is from float32 under ZeRO and DDP: `python -m tests.bench.zero`.

One recorded and rectified step of SGD on two processes. Of the Gram matrices the largest error is
told, in terms of |a| |b|; of the step its distance from that of float32, in terms of its length.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from geffect import Recorder, Rectifier, open_run
from tests.utils import forks, two_ranks
from tests.utils.engines import OPTIMIZERS, engine, groups, risks, whole_parameters
from tests.utils.layouts import Small, ddp

SETTINGS = ["stage 2", "stage 2, offload", "stage 3"]


def step(model: Any, optimizer: Any, path: Path) -> Tensor:
    """What one step moves, of which a run file tells."""
    before = whole_parameters(model)
    rectifier = Rectifier(model, optimizer=optimizer)
    with Recorder(model, path) as recorder:
        recorder.backward(objective={"forget": -1.0}, rectifier=rectifier, **risks(model, 0))
        (model if hasattr(model, "zero_optimization_stage") else optimizer).step()
    after = whole_parameters(model)
    return torch.cat([(b - a).double().flatten() for a, b in zip(before, after, strict=True)])


def steps(folder: Path) -> dict[str, Tensor]:
    """The steps of DDP in both types, and those of engines in bfloat16."""
    moved = {}
    for name, dtype in (("float32", torch.float32), ("DDP", torch.bfloat16)):
        model = ddp(Small().to(dtype))
        moved[name] = step(model, OPTIMIZERS["sgd"](groups(model)), folder / f"{name}.h5")
    for setting in SETTINGS:
        made = engine(setting, half=True)
        moved[setting] = step(made, made.optimizer, folder / f"{setting}.h5")
    return moved


def main() -> None:
    """Print the errors."""
    forks.start_server()
    with tempfile.TemporaryDirectory() as folder:
        moved = two_ranks.run(steps, Path(folder))[0]
        truth = open_run(Path(folder, "float32.h5")).gram().sum(axis=1)[0]
        norms = np.sqrt(np.diagonal(truth))
        for name in ("DDP", *SETTINGS):
            K = open_run(Path(folder, f"{name}.h5")).gram().sum(axis=1)[0]
            of_gram = np.nanmax(abs(K - truth) / np.outer(norms, norms))
            far = (moved[name] - moved["float32"]).norm() / moved["float32"].norm()
            print(f"bfloat16, {name}: Gram matrix {of_gram:.1e}, step {far:.1e}")


if __name__ == "__main__":
    main()
