"""The state of a rectifier in a checkpoint: a file beside those of model and optimizer."""

import logging
import os
from pathlib import Path

import torch

from geffect import distributed
from geffect.nested import tensors_in
from geffect.projection import Rectifier

log = logging.getLogger(__name__)

WHOLE = "rectifier.pt"
PART = "rectifier_{rank}_of_{processes}.pt"


def save(rectifier: Rectifier, folder: str | os.PathLike[str], *, writes: bool) -> None:
    """Write the state of a rectifier into the folder of a checkpoint. All processes call it.

    One file, from a process that `writes`, as one of each node may; of a sharded model one a
    process, with the parts of the averages that it holds.
    """
    state = rectifier.state_dict()
    in_parts = state["pieces"] or any(map(distributed.is_sharded, tensors_in(state["memory"])))
    name = _own_part() if in_parts else WHOLE
    with distributed.raise_on_all_ranks():
        if name != WHOLE or writes:
            Path(folder).mkdir(parents=True, exist_ok=True)
            torch.save(state, Path(folder, name))


def restore(rectifier: Rectifier, folder: str | os.PathLike[str]) -> None:
    """Go on from the state in the folder of a checkpoint. All processes call it.

    Where the checkpoint was saved without a rectifier the averages begin anew, and that is said.
    """
    with distributed.raise_on_all_ranks():
        found = _found(Path(folder))
    on_some = distributed.any_rank(found is not None)
    with distributed.raise_on_all_ranks():
        if on_some and found is None:
            # Its averages would be others than theirs, and so would its steps.
            raise ValueError(
                "A checkpoint should have the state of the rectifier on every process, or on none. "
                f"Found none in `{folder}` on process {distributed.rank()}, and one on others. "
                "Copy the file to where it is missing; with a disk for each node, save by "
                "save_on_each_node=True."
            )
        if found is not None:
            # A part knows the device of its mesh.
            where = "cpu" if found.name == WHOLE else None
            rectifier.load_state_dict(torch.load(found, map_location=where, weights_only=True))
        elif distributed.is_main_process():
            log.warning(
                "`%s` has no state of a rectifier: the average of the retain gradient begins anew.",
                folder,
            )


def _found(folder: Path) -> Path | None:
    for path in (folder / WHOLE, folder / _own_part()):
        if path.exists():
            return path
    parts = sorted(path.name for path in folder.glob(PART.format(rank="*", processes="*")))
    if parts:
        raise ValueError(
            "A sharded rectifier should be resumed on as many processes as it was saved on. Found "
            f"{', '.join(parts)} in `{folder}`, and process {distributed.rank()} of "
            f"{distributed.world_size()}. Resume on as many."
        )
    return None


def _own_part() -> str:
    return PART.format(rank=distributed.rank(), processes=distributed.world_size())
