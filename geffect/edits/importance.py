"""How important each number of a model is for data: means over batches of what a gradient is."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from geffect.batch import IGNORED, Batch, check_one_answer, labels_of, on_device, original_of
from geffect.data.collate import collate
from geffect.dots import dense
from geffect.layers import trainable
from geffect.risk import RiskSet, as_batches, check_answers, label_logits, undisturbed

Loss = Callable[[nn.Module, Batch], Tensor]


def mean_importance(
    model: nn.Module,
    batches: Sequence[Batch],
    loss: Loss,
    of: Callable[[Tensor], Tensor],
    names: Iterable[str],
) -> dict[str, Tensor]:
    """The mean over batches of `of(gradient)`, in float64, by the names of parameters.

    Without dropout; the model is left as it was found. Zero where no loss reaches a parameter.

    >>> from types import SimpleNamespace
    >>> class Table(nn.Embedding):
    ...     def forward(self, input_ids):
    ...         return SimpleNamespace(logits=super().forward(input_ids))
    >>> model, ids = Table(2, 2), torch.tensor([[0, 1]])
    >>> _ = nn.init.zeros_(model.weight)
    >>> from geffect.risk import nll
    >>> mean_importance(model, [{"input_ids": ids, "labels": ids}], nll, torch.square, ["weight"])
    {'weight': tensor([[0.2500, 0.2500],
            [0.0000, 0.0000]], dtype=torch.float64)}
    """
    parameters = trainable(model)
    chosen = {name: parameters[name] for name in names}
    sums = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in chosen.items()}
    device = next(iter(parameters.values())).device
    with undisturbed(model):
        for batch in batches:
            loss(model, on_device(batch, device)).backward()
            for name, parameter in chosen.items():
                if parameter.grad is not None:
                    sums[name] += of(dense(parameter.grad).double())
            for parameter in parameters.values():
                parameter.grad = None
    for name, total in sums.items():
        if not total.isfinite().all():
            raise ValueError(
                f"Gradients of an importance should be finite. Found NaN or infinity for `{name}`. "
                "See whether the model is finite, and whether its losses are, in its precision."
            )
    return {name: total / len(batches) for name, total in sums.items()}


def check_answered(model: nn.Module, sets: Mapping[str, Sequence[Batch]]) -> None:
    """Refuse a batch in which nothing is scored, by the name of its set: it has no gradient.

    >>> ids = torch.tensor([[5, 6]])
    >>> check_answered(nn.Identity(), {"forget": [{"labels": torch.full_like(ids, -100)}]})
    Traceback (most recent call last):
    ValueError: `forget` should have an answer token: a label that is not -100, beyond the first ...
    """
    for name, batches in sets.items():
        for batch in batches:
            check_answers(model, {name: batch})


def output_energy(model: Any, batch: Batch) -> Tensor:
    """The mean over the scored positions of |logits|^2: which token is right is not asked."""
    logits, labels = label_logits(model, batch)
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return exact.square().sum(dim=-1)[labels != IGNORED].mean()


def of_size(name: str, batches: RiskSet, size: int) -> list[Batch]:
    """The rows of a set in batches of just `size` rows, in their order.

    Rows that are left over are left out, and told of: the square of the gradient of a batch has a
    part that falls with its size, so that batches of other sizes do not compare.

    >>> ids = torch.tensor([[5, 6], [7, 8], [9, 4]])
    >>> [b["input_ids"].tolist() for b in of_size("forget", {"input_ids": ids, "labels": ids}, 1)]
    [[[5, 6]], [[7, 8]], [[9, 4]]]
    """
    rows = [row for batch in as_batches(batches) for row in _rows(name, batch)]
    whole = len(rows) // size * size
    if not whole:
        raise ValueError(
            f"`{name}` should have a batch of {size} rows or more. Found {len(rows)} rows. Give "
            "more data, or a smaller `fisher_batch`."
        )
    if whole < len(rows):
        warnings.warn(
            f"`{name}` should have a multiple of {size} rows. Found {len(rows)}: the last "
            f"{len(rows) - whole} are left out, since batches of another size do not compare.",
            stacklevel=2,
        )
    return [collate(rows[start : start + size]) for start in range(0, whole, size)]


def _rows(name: str, batch: Batch) -> Iterator[Mapping[str, Tensor]]:
    batch = original_of(batch)
    check_one_answer(batch, "an importance, which counts rows")
    count = len(labels_of(batch))
    odd = [
        column
        for column, value in batch.items()
        if not (isinstance(value, Tensor) and value.ndim and len(value) == count)
    ]
    if odd:
        raise ValueError(
            f"A batch of `{name}` should have a row of each column for each sample, so that its "
            f"rows can be taken apart. Found otherwise for `{odd[0]}`. Leave that out."
        )
    for index in range(count):
        yield {column: value[index] for column, value in batch.items()}
