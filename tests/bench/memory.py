"""How much memory the tensors of a load take at most, and how much of that are gradients."""

from torch import Tensor

from geffect.costs.live_bytes import LiveBytes

from .rounds import Load
from .workload import Workload


def peak_bytes(load: Load) -> int:
    """The most that tensors take while a load runs, beside those that were there before."""
    with LiveBytes() as live:
        load()
    return live.peak


def peak_gradients(workload: Workload, load: Load) -> int:
    """The same of gradients alone: of what has as many numbers as a matrix of the model.

    For a workload whose activations all have another number of them.
    """
    with live_gradients(workload) as live:
        load()
    return live.peak


def live_gradients(workload: Workload) -> LiveBytes:
    """Counts what has as many numbers as a matrix of the model, and nothing else."""
    sizes = {matrix.numel() for matrix in _matrices(workload)}
    return LiveBytes(lambda tensor: tensor.numel() in sizes)


def gradient_bytes(workload: Workload) -> int:
    """One whole gradient, by the same measure."""
    return sum(matrix.numel() * matrix.element_size() for matrix in _matrices(workload))


def _matrices(workload: Workload) -> list[Tensor]:
    return [parameter for parameter in workload.parameters if parameter.dim() > 1]
