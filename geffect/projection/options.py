"""What a rectifier is asked to do, and what cannot be asked together."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Literal, get_args

from geffect.layers import Parameter
from geffect.numbers import is_number, is_whole
from geffect.sources import RETAIN, is_risk

from .elementwise import Elementwise, Halt
from .rules import MOST_CONSTRAINTS, Rule, Weights, check_one_retain, gru
from .selection import SaliencyMask, Salient, Selection

Scope = Literal["model", "group", "layer", "parameter", "coordinate"]
SpaceName = Literal["gradient", "update"]
Part = Literal["total", "forget"]
Correction = Literal["retain", "retain_adam", "adam"]
Start = Literal["first", "zero"]

LABELS: Mapping[str, Callable[[Parameter], str]] = {
    "model": lambda parameter: "model",
    "group": lambda parameter: parameter.group,
    "layer": lambda parameter: parameter.layer,
    "parameter": lambda parameter: parameter.name,
    "coordinate": lambda parameter: "model",
}
"""The block that a parameter belongs to, in each scope."""

MOST_HISTORY = MOST_CONSTRAINTS - 1

ALWAYS_TOLD = frozenset({"rule", "protect", "scope", "space", "ema"})
"""The options that a rectifier shows; others where they are not the default."""


@dataclass(frozen=True)
class Options:
    """The arguments of a `Rectifier`, which says what they mean."""

    rule: Rule | Elementwise | None = gru
    protect: tuple[str, ...] = (RETAIN,)
    scope: Scope = "model"
    space: SpaceName = "gradient"
    part: Part = "total"
    ema: float = 0.8
    ema_start: Start = "first"
    select: float | Selection | None = None
    correction: Correction = "retain"
    history: int = 0
    measure_update: bool = False

    def __post_init__(self) -> None:
        _one_of("scope", self.scope, get_args(Scope))
        _one_of("space", self.space, get_args(SpaceName))
        _one_of("part", self.part, get_args(Part))
        _one_of("correction", self.correction, get_args(Correction))
        _one_of("ema_start", self.ema_start, get_args(Start))
        _fraction("ema", self.ema)
        if self.select is not None and not isinstance(self.select, Selection):
            _fraction("select", self.select)
        self._check_scope()
        self._check_space()
        self._check_history()

    @property
    def constraints(self) -> int:
        """How many retain gradients a rule is given."""
        return len(self.protect) + self.history

    @property
    def needs_optimizer(self) -> bool:
        """Whether the optimizer's own steps are changed or looked at."""
        return self.space == "update" or self.measure_update

    @property
    def changes_gradient(self) -> bool:
        """Whether `.grad` is changed."""
        return self.space == "gradient" and self._changes

    @property
    def changes_step(self) -> bool:
        """Whether the optimizer's step is changed."""
        return self.space == "update" and self._changes

    @property
    def _changes(self) -> bool:
        return not (self.rule is None and self.select is None)

    @property
    def selection(self) -> Selection | None:
        """What chooses the coordinates to step on."""
        if self.select is None or isinstance(self.select, Selection):
            return self.select
        return Salient(float(self.select))

    @property
    def elementwise(self) -> Elementwise | None:
        """The rule for every coordinate by itself, where there is one."""
        if self.scope == "coordinate":
            return Halt()
        return self.rule if isinstance(self.rule, Elementwise) else None

    @property
    def by_coordinate(self) -> bool:
        """Whether nothing about a coordinate depends on another one, but for the selection."""
        return self.rule is None or self.elementwise is not None

    @property
    def is_ours(self) -> bool:
        """Whether rule and selection are of this package, and known not to raise."""
        selects = self.selection is None or type(self.selection) in (Salient, SaliencyMask)
        return selects and not isinstance(self.rule, Elementwise)

    @property
    def adds_retain(self) -> bool:
        """Whether the rule has a retain term of its own, which trains on the retain data."""
        asked = self._asked
        return asked is not None and asked.adds_retain

    @property
    def needs_second_moment(self) -> bool:
        """Whether the mean square of the retain gradients is asked for."""
        selection = self.selection
        selects = selection is not None and selection.needs_second_moment
        return selects or self.correction == "retain_adam"

    @property
    def record(self) -> dict[str, object]:
        """The same for JSON."""
        return {
            "rule": _name(self.rule),
            "protect": list(self.protect),
            # A rule for every coordinate by itself constrains each, whatever it is called for.
            "scope": "coordinate" if self.elementwise is not None else self.scope,
            "space": self.space,
            "part": self.part,
            "ema": self.ema,
            "ema_start": self.ema_start,
            "select": self.select if isinstance(self.select, int | float) else _name(self.select),
            "correction": self.correction,
            "history": self.history,
        }

    def __repr__(self) -> str:
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        plain = {field.name for field in fields(self) if given[field.name] == field.default}
        memory = {"history": f"{self.history}: {self.constraints} vectors of the model's size"}
        told = given.keys() - (plain - ALWAYS_TOLD)
        said = {name: _unaddressed(value) for name, value in given.items() if name in told}
        return ", ".join(f"{name}={memory.get(name, value)}" for name, value in said.items())

    @property
    def _asked(self) -> Rule | Elementwise | None:
        """Who is asked about a step: in coordinate scope the closed form of the rule."""
        return self.elementwise or self.rule

    def _check_scope(self) -> None:
        names = self.protect
        if not names or len(set(names)) < len(names) or not all(map(is_risk, names)):
            raise ValueError(
                "`protect` should be a sequence of names of retain losses, at least one and each "
                f"once. Found {list(names)}. Pass protect=('retain',)."
            )
        if self.scope == "coordinate" and self.rule is not gru:
            raise ValueError(
                'Scope "coordinate" should go with the rule gru, whose closed form it is. '
                f"Found `rule = {self.rule}`. Choose another scope, or leave the rule out."
            )
        if isinstance(self.rule, Elementwise) and self.scope != "model":
            raise ValueError(
                f'A rule for every coordinate should go with scope="model". Found {self.rule!r} '
                f"with scope={self.scope!r}. Leave the scope out."
            )
        asked = self._asked
        if asked is not None and asked.one_retain:
            check_one_retain(_unaddressed(asked), self.constraints)

    def _check_history(self) -> None:
        count = self.history
        if not (is_whole(count, 0) and count <= MOST_HISTORY):
            raise ValueError(
                "`history` of Rectifier should be how many earlier retain gradients constrain a "
                f"step, a whole number from 0 to {MOST_HISTORY}. Found `history = {count!r}`. Pass "
                "one such as history=8."
            )
        if count and (len(self.protect) > 1 or self.ema != 1.0 or self.rule is None):
            raise ValueError(
                "`history` should go with a rule, one retain loss and ema=1.0: each constraint is "
                f"the gradient of one step. Found rule={_name(self.rule)}, protect={self.protect} "
                f"and ema={self.ema}. Add the losses up, leave `ema` out, or leave `history` out."
            )

    def _check_space(self) -> None:
        if self.space == "gradient" and self.correction != "retain":
            raise ValueError(
                '`correction` should be "retain" in gradient space, where the optimizer rescales '
                f'what is added. Found {self.correction!r}. Pass space="update".'
            )
        if self.correction != "retain" and self.by_coordinate:
            raise ValueError(
                '`correction` should be "retain" where no multiple of r is added: with '
                f'rule=None or scope="coordinate". Found {self.correction!r}. Leave it out.'
            )
        if self.space == "update" and self.part == "forget":
            raise ValueError(
                '`part` should be "total" in update space: a step of an optimizer has no parts. '
                'Found "forget". Pass space="gradient", or part="total".'
            )
        if self.adds_retain and self.space == "update":
            raise ValueError(
                "A rule in update space should not depend on the length of the retain gradient, "
                f"which has no scale in common with a step. Found {self.rule!r}, which adds the "
                'retain gradient as it is. Pass space="gradient", or a rule such as gru or nearest.'
            )


def as_rule(rule: Rule | Elementwise | Weights | None) -> Rule | Elementwise | None:
    """The rule; of a function one that declares nothing of itself."""
    if rule is None or isinstance(rule, Rule | Elementwise):
        return rule
    if not callable(rule):
        raise ValueError(
            "`rule` should be a function from a Gram matrix to weights, an Elementwise, or None. "
            f"Found {rule!r}. Pass one of geffect.projection, such as gru."
        )
    return Rule(rule)


def _name(thing: object) -> str | None:
    """What a rule or selection is called, in this process and another."""
    return None if thing is None else _unaddressed(thing)


def _unaddressed(thing: object) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", repr(thing))


def _one_of(name: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise ValueError(
            f"`{name}` should be one of {', '.join(valid)}. Found `{name} = {value!r}`. "
            "Choose one of those."
        )


def _fraction(name: str, value: float) -> None:
    if not (is_number(value) and 0 < value <= 1):
        raise ValueError(
            f"`{name}` of Rectifier should be above 0 and at most 1. Found `{name} = {value!r}`. "
            f"Pass a fraction such as {name}=0.5."
        )
