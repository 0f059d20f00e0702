"""The thresholds of a verdict, in one place, as a report prints them."""

from dataclasses import dataclass, fields

from geffect.numbers import is_number


@dataclass(frozen=True)
class Thresholds:
    """Where a verdict turns. None of them is derived: see how the controls lie, in docs/audit.md.

    - `kept`: a model that keeps a smaller share of a retained set is broken.
    - `damaged`: one that keeps a smaller share than this is flagged.
    - `degenerate`: so is one with a larger share of degenerate answers to retained questions.
    - `remembers`: a direct share from here on is memory.
    - `hidden`, `hidden_low`: a recoverable share from here on is hiding, where its 95 % limit is
      above the second.
    - `close`: shares and differences of AUC within it, with their intervals, are those of a model
      that never knew.
    - `over_forgotten`: a PrivLeak above it is flagged.
    - `fewest_items`: of fewer forget items the verdict is flagged.
    - `fewest_auc`: of fewer items in either set an AUC says nothing.

    >>> Thresholds(hidden=0.2).hidden
    0.2
    """

    kept: float = 0.25
    damaged: float = 0.5
    degenerate: float = 0.5
    remembers: float = 0.5
    hidden: float = 0.15
    hidden_low: float = 0.05
    close: float = 0.1
    over_forgotten: float = 25.0
    fewest_items: int = 20
    fewest_auc: int = 50

    def __post_init__(self) -> None:
        for of in fields(self):
            value = getattr(self, of.name)
            if not is_number(value) or value < 0:
                raise ValueError(
                    f"`{of.name}` of the thresholds should be a number of at least 0. Found "
                    f"{value!r}. Leave it out for {of.default}."
                )
        if self.hidden_low > self.hidden or self.hidden > self.remembers:
            raise ValueError(
                "`hidden_low`, `hidden` and `remembers` should not fall. Found "
                f"{self.hidden_low}, {self.hidden} and {self.remembers}. Bring them in order."
            )
