"""Tokens: what unlearning one token of an answer does to a risk."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import pandas as pd

from geffect.scores import said, stack

from .instances import SCORE

if TYPE_CHECKING:
    from torch import nn

    from geffect.batch import Batch
    from geffect.gradients import Vector


class Tokenizer(Protocol):
    """What gives tokens their text: a tokenizer of transformers, or of tokenizers."""

    def decode(self, ids: list[int], /, *, skip_special_tokens: bool) -> str:
        """The text of the tokens."""


def tokens(
    model: "nn.Module",
    batches: "Iterable[Batch]",
    direction: "Vector | Mapping[str, Vector]",
    tokenizer: Tokenizer | None = None,
) -> pd.DataFrame:
    """PG_D(s^i) = <grad R(D), grad log p(s^i | s^{<i})> of every answer token s^i.

    Definition, sign and `direction` are those of `instances`; the tokens of a sample add up to its
    value for the model. It is the effect of the loss of a token on all that it is predicted from,
    not of what the parameters do at its position (arXiv 2502.19301, eq. 5).

    Columns: sample, position, token, p, (risk,) value, score, unit. `token` is the text, spaces
    included, or the id where there is no tokenizer, and `p` the probability that the model gives
    the token. Tokens that are not scored are left out. The model runs in eval mode. The cost is one
    forward-mode pass for each batch and direction.

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
    >>> tokens(Bigram(), [batch], {"forget": forget}).drop(columns=["score", "unit"])
       sample  position  token    p    risk  value
    0       0         1      1  0.5  forget   -0.5
    """
    # Torch is loaded where a model is at hand, and not to read a run.
    from geffect.batch import IGNORED
    from geffect.effects import token_effects

    several = direction if isinstance(direction, Mapping) else {"": direction}
    parts: dict[str, list[pd.DataFrame]] = {name: [] for name in several}
    first = 0
    for batch in batches:
        # What is scored is the label, also where it is not the token that the model goes on from.
        labels, inputs = batch["labels"], batch["input_ids"]
        # Those of an encoder-decoder are no continuation of its inputs.
        before = inputs if inputs.shape == labels.shape else labels.new_zeros(labels.shape)
        ids = before.where(labels == IGNORED, labels).tolist()
        words = ids if tokenizer is None else [_texts(row, tokenizer) for row in ids]
        for name, along in several.items():
            effects = token_effects(model, batch, along)
            log_p, values = (x.cpu().numpy() for x in (effects.log_p, effects.values))
            rows, positions = np.nonzero(~np.isnan(log_p))
            columns = {
                "sample": first + rows,
                "position": positions,
                "token": [words[row][i] for row, i in zip(rows, positions, strict=True)],
                "p": np.exp(log_p[rows, positions]),
                "value": values[rows, positions],
            }
            parts[name].append(pd.DataFrame(columns))
        first += len(ids)
    if not first:
        raise ValueError("`batches` should hold a sample. Found none. Pass one batch at least.")
    tables = {
        name: said(pd.concat(found, ignore_index=True), SCORE) for name, found in parts.items()
    }
    return stack(tables, "risk") if isinstance(direction, Mapping) else tables[""]


def _texts(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """What each token adds to the text of those before it: alone it may lose its space."""
    text, texts = "", []
    for end in range(1, len(ids) + 1):
        longer = tokenizer.decode(list(ids[:end]), skip_special_tokens=False)
        alone = tokenizer.decode([ids[end - 1]], skip_special_tokens=False)
        texts.append(longer[len(text) :] if longer.startswith(text) else alone)
        text = longer
    return texts
