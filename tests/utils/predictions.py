"""Models that are nothing but the probabilities that they give."""

from types import SimpleNamespace

import torch


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
