"""What an objective has of its run, in a checkpoint: a file beside that of the optimizer."""

import os
from pathlib import Path

import torch

from geffect import distributed
from geffect.objectives import Objective

FILE = "objective.pt"


def save(objective: Objective, folder: str | os.PathLike[str], *, writes: bool) -> None:
    """Write it into the folder of a checkpoint, from a process that `writes`; if there is any."""
    state = objective.state_dict()
    if state and writes:
        Path(folder).mkdir(parents=True, exist_ok=True)
        torch.save(state, Path(folder, FILE))


def restore(objective: Objective, folder: str | os.PathLike[str]) -> None:
    """Go on with what the folder of a checkpoint has of it. All processes call it."""
    if not objective.of_run:
        return
    path = Path(folder, FILE)
    with distributed.raise_on_all_ranks():
        if not path.exists():
            raise ValueError(
                f"`{path.parent}` should have `{FILE}`, what {type(objective).__name__} had of its "
                "run. Found none. Resume from a checkpoint that was saved with this objective; "
                "with a disk for each node, save by save_on_each_node=True."
            )
        objective.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
