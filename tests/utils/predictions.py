"""Models that are nothing but the probabilities that they give."""

from types import SimpleNamespace

import torch
from torch import nn


def predicting(p: list[list[float]], vocabulary: int = 6) -> tuple[object, dict[str, torch.Tensor]]:
    """A model that gives the answer tokens of each sample these probabilities, and its batch."""
    width = max(map(len, p)) + 1
    ids = torch.zeros(len(p), width, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    likely = torch.full((len(p), width), 0.5, dtype=torch.float64)
    for row, answer in enumerate(p):
        labels[row, 1 : len(answer) + 1] = 0
        likely[row, : len(answer)] = torch.tensor(answer)
    logits = ((1 - likely) / (vocabulary - 1)).log()[..., None].repeat(1, 1, vocabulary)
    logits[..., 0] = likely.log()
    logits.requires_grad_()
    return lambda input_ids: SimpleNamespace(logits=logits), {"input_ids": ids, "labels": labels}


class Fixed(nn.Module):
    """Says the same at each position whatever it is given, `Float[position, token]` of logits."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> SimpleNamespace:
        rows, length = input_ids.shape
        return SimpleNamespace(logits=self.logits[:length].expand(rows, -1, -1))


END = 5
"""The token that ends an answer of `five`."""


def five() -> tuple[Fixed, dict[str, list[int]]]:
    """Six tokens; an answer with p = .9, .5, .2, .8 behind a question of two, and .95 at its end.

    What is left is spread evenly, but at the third, where another token has .6: there alone the
    answer is not the most likely.
    """
    answer, likely = [1, 2, 3, 4, END], [0.9, 0.5, 0.2, 0.8, 0.95]
    p = torch.full((7, 6), 1 / 6, dtype=torch.float64)
    for place, (token, own) in enumerate(zip(answer, likely, strict=True), start=1):
        p[place] = (1 - own) / 5
        p[place, token] = own
    p[3] = torch.tensor([0.6, 0.05, 0.05, 0.2, 0.05, 0.05], dtype=torch.float64)
    item = {"input_ids": [0, 1, *answer], "labels": [-100, -100, *answer]}
    return Fixed(p.log()), item
