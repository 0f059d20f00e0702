"""Instances: what unlearning one sample does to a risk, layer by layer."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from geffect.groups import By, label_of
from geffect.layers import describe, in_network_order
from geffect.scores import PER_RATE, Score, said, stack

from .base import Floats, column_of

if TYPE_CHECKING:
    from torch import nn

    from geffect.batch import Batch
    from geffect.gradients import Vector

SCORE = Score("PG-effect", PER_RATE)


def instances(
    model: "nn.Module",
    batches: "Iterable[Batch]",
    direction: "Vector | Mapping[str, Vector]",
    by: By = "layer",
) -> pd.DataFrame:
    """PG_D(s) = <grad R(D), grad log p(s)>, log p summed over the answer (arXiv 2502.19301, eq. 5).

    `direction` is grad R(D), as `geffect.effects.direction` takes it at the same parameters; a
    mapping from names of risks to directions gives a column `risk`. Unlearning s by a small step of
    gradient ascent changes R(D) by -(learning rate) PG_D(s). A sample that is worth unlearning has
    a very negative value for the forget risk and one near zero for the retain risk. A negative one
    for the retain risk is collateral damage. Values are not normalised: long answers weigh more.

    Columns: sample, `by`, (risk,) value, score, unit. Samples are counted through all batches,
    blocks add up to the model. The model runs in eval mode. The cost is one forward and backward
    pass a batch, one more of the first batch, to hold a sample against its own gradient, and one
    product with the input of every matrix for each direction. Where modules do not return a row
    for each sample, as in a mixture of experts, it is a backward pass a sample, which is said once.

    >>> import torch
    >>> from types import SimpleNamespace
    >>> class Bigram(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.wte = torch.nn.Embedding.from_pretrained(torch.zeros(2, 2), freeze=False)
    ...     def forward(self, input_ids):
    ...         return SimpleNamespace(logits=self.wte(input_ids))
    >>> batch = {"input_ids": torch.tensor([[0, 1]]), "labels": torch.tensor([[-100, 1]])}
    >>> forget = [torch.tensor([[1.0, 0.0], [0.0, 0.0]])]
    >>> table = instances(Bigram(), [batch], {"forget": forget}, by="layer")
    >>> table.drop(columns=["score", "unit"])
       sample      layer    risk  value
    0       0  embedding  forget   -0.5
    """
    # Torch is loaded where a model is at hand, and not to read a run.
    from geffect.effects import sample_effects

    several = direction if isinstance(direction, Mapping) else {"": direction}
    effects = sample_effects(model, batches, several)
    parameters = describe(model)
    labels = list(map(label_of(by), parameters))
    blocks = in_network_order(parameters, labels)
    belongs = np.array([[label == block for block in blocks] for label in labels], dtype=float)
    tables = {
        name: _table(values.numpy() @ belongs, blocks, column_of(by))
        for name, values in effects.items()
    }
    return stack(tables, "risk") if isinstance(direction, Mapping) else tables[""]


def _table(values: Floats, blocks: list[str], by: str) -> pd.DataFrame:
    samples = len(values)
    table = pd.DataFrame(
        {
            "sample": np.repeat(np.arange(samples), len(blocks)),
            by: pd.Categorical(blocks * samples, categories=blocks, ordered=True),
            "value": values.reshape(-1),
        }
    )
    return said(table, SCORE)
