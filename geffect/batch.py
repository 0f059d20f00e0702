"""What a batch is, what a pair of batches is, and which of its tokens are scored."""

from collections.abc import Mapping

from torch import Tensor

Batch = Mapping[str, Tensor]
"""`input_ids`, `attention_mask`, `labels`, each (sample, position); label -100 is not scored."""

Pair = Mapping[str, Batch]
"""A batch of each side: {"forget": Batch, "retain": Batch}."""

IGNORED = -100


def scored_tokens(batch: Batch) -> Tensor:
    """Which tokens a causal model is scored on, `Bool[sample, position - 1]`.

    The token at position i is predicted from the positions before it, hence one position less.
    """
    return labels_of(batch)[:, 1:] != IGNORED


def labels_of(batch: Batch) -> Tensor:
    """The labels `Int[sample, position]`; an error if there are none."""
    if "labels" not in batch:
        raise ValueError(
            "`batch` should have the key `labels`, with -100 where a token is not scored. "
            f"Found the keys {', '.join(batch)}. Add labels that mark the answer tokens."
        )
    return batch["labels"]
