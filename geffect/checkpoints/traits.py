"""What is known of an estimator before it runs."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import update_wrapper

from geffect.capture.collector import Measurement

from .batch_gradients import Sources

Estimator = Callable[[Sources], Iterator[Measurement]]
"""From the sources at a checkpoint to the rows of its step."""

Counts = Mapping[str, int]


@dataclass(frozen=True)
class Traits:
    """What is known of an estimator before it runs.

    - `rows`: how many there are, from the number of batches of each set; None if that is not known.
    - `used`: how many batches of each set are.
    - `biased`: whether the mean of its rows is off, for the population and for the data.
    - `matrices`: whether each row is a Gram matrix.
    - `vectors`: whether its Gram matrices are those of gradients that could be kept.
    - `shared`: whether these are the same for all rows of a step.
    - `batches`: how many each set should have at least, where files are cut into them; `even`: an
      even number.
    """

    rows: Callable[[Counts], int] | None = None
    used: Callable[[Counts], Counts] = dict
    biased: bool = False
    matrices: bool = False
    vectors: bool = True
    shared: bool = False
    batches: int = 1
    even: bool = False


def traits_of(estimator: Estimator) -> Traits:
    """What an estimator says of itself; nothing is known of a function that says nothing."""
    if not callable(estimator):
        raise TypeError(
            "`estimator` should be a function of geffect.checkpoints.estimators, such as "
            f"split_batch. Found {estimator!r}. Import the function and pass it."
        )
    traits: Traits = getattr(estimator, "traits", Traits())
    return traits


class Declared:
    """An estimator with what is known of it; it is called like its function and has its name.

    >>> from geffect.checkpoints.estimators import split_batch
    >>> split_batch, split_batch.traits.biased
    (split_batch, False)
    """

    __name__: str

    def __init__(self, estimator: Estimator, *, traits: Traits) -> None:
        self.estimator, self.traits = estimator, traits
        update_wrapper(self, estimator)

    def __call__(self, sources: Sources) -> Iterator[Measurement]:
        return self.estimator(sources)

    def __repr__(self) -> str:
        return self.__name__
