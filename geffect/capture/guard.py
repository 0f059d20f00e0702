"""What becomes of a recording whose file cannot be written, on one process and on several."""

import logging
from collections.abc import Callable
from typing import Literal, get_args

from geffect import distributed

log = logging.getLogger(__name__)

OnError = Literal["raise", "warn"]


class Guard:
    """What is done to the file of a recording, whose failure is the user's choice.

    - `on_error`: "raise" ends training with the error. With "warn" the recording gives up: it says
      so once, and training goes on.
    - `consequence`: what training lacks then, for that warning.

    Once the recording is `closed` every error is raised.

    >>> def full() -> None: raise OSError("The disk should have room. Found none.")
    >>> guard = Guard("warn")
    >>> guard.do(full)
    >>> guard.has_given_up
    True
    """

    def __init__(self, on_error: OnError) -> None:
        if on_error not in get_args(OnError):
            raise ValueError(
                f"`on_error` should be one of {', '.join(get_args(OnError))}. "
                f"Found `on_error = {on_error!r}`. Choose one of those."
            )
        self.may_give_up = on_error == "warn"
        self.has_given_up = False
        self.closed = False
        self.consequence = ""
        self.failure: OSError | None = None  # which not all processes know of yet

    @property
    def raises(self) -> bool:
        """Whether an error of the file is one of training."""
        return self.closed or not self.may_give_up

    def do(self, action: Callable[[], None]) -> None:
        """Do something to the file."""
        try:
            action()
        except OSError as error:
            if not self.raises:
                self.give_up(error)
            elif distributed.world_size() == 1:
                raise
            else:
                # The others would wait for this process: all of them raise it at the next step.
                self.failure = error

    def give_up(self, error: OSError) -> None:
        """Record nothing more."""
        self.has_given_up = True
        log.warning("%s Training goes on, and nothing more is recorded%s.", error, self.consequence)

    def agree(self) -> None:
        """Leave off where another process has: captured steps have passes that others have not."""
        if self.may_give_up:
            self.has_given_up = distributed.any_rank(self.has_given_up)

    def check(self) -> None:
        """Raise a failure that not all processes know of yet, where all of them can."""
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure
