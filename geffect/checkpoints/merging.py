"""Adapters merged into the weights that they change, by the package that made them."""

from collections.abc import Iterator
from contextlib import contextmanager

from geffect.devices import out_of_memory
from geffect.notes import line_of


@contextmanager
def merging(should: str) -> Iterator[None]:
    """A block that merges an adapter; what its package cannot merge is refused in a sentence.

    `should` is how the sentence begins: what should be an adapter.

    >>> with merging("`folder` should be an adapter"):
    ...     raise NotImplementedError("Not for this kind.")
    Traceback (most recent call last):
    ValueError: `folder` should be an adapter that can be merged into its weights. Found: Not ...
    """
    try:
        yield
    except Exception as error:  # of whichever class its package has chosen
        if out_of_memory(error):
            raise
        raise ValueError(
            f"{should} that can be merged into its weights. Found: {line_of(error)} Save the model "
            "merged, as its library does."
        ) from error
