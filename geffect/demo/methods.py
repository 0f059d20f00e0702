"""What the study compares: unlearning methods, and variants of the step that is taken.

What needs torch is imported where it is used: planning a study is done without.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from .corpus import Corpus

if TYPE_CHECKING:
    import torch

    from geffect import Rectifier, Relearned

    from .repselect import SingleShot

METHODS = ("ga", "wga", "npo", "graddiff", "npo+gd")
"""The objectives of a study that names none, as `geffect.objectives.named` knows them."""


ADAMW = "AdamW, betas (0.9, 0.999), eps 1e-8, no weight decay"
"""How `Variant.stepping` steps, in words."""


def _no_rule() -> None:
    return None


def _gru() -> Any:
    from geffect.projection import gru

    return gru


def _nearest() -> Any:
    from geffect.projection.rules import nearest

    return nearest


def _sago() -> Any:
    from geffect.projection.elementwise import SAGO

    return SAGO(prefer_retain=True)


def _hamu(**numbers: float) -> Any:
    from geffect.projection.hamu import hamu

    return hamu(**numbers)


@dataclass(frozen=True)
class Variant:
    """How a step is rectified, with the learning rates it is run at: its own, then others.

    `rule` makes the rule where it is used. `adds_retain`: the rule adds the retain gradient, so
    that a retain term of the objective is left to it. `duration` is that of a run beside the plain
    one, both at their own learning rate. `whole`: a step draws all facts to forget, and all that
    feed the retain gradient. `relearned`: where the gradient of the objective is taken, on all
    facts to forget.
    """

    summary: str
    rule: Callable[[], Any] = field(default_factory=lambda: _gru, repr=False)
    options: Mapping[str, Any] = field(default_factory=dict)
    learning_rates: tuple[float, ...] = (3e-4, 1.5e-4, 6e-4)
    duration: float = 1.0
    adds_retain: bool = False
    optimizer: Literal["AdamW", "SGD"] = "AdamW"
    whole: bool = False
    relearned: Mapping[str, Any] = field(default_factory=dict)  # of `geffect.Relearned`
    retain_batch: int | None = None  # other than that of the study

    def described(self) -> dict[str, Any]:
        """What summary.json says of it."""
        return {
            "summary": self.summary,
            "learning_rate": self.learning_rates[0],
            "learning_rates": sorted(self.learning_rates),
            "options": {**self.options, **({"relearned": text} if (text := self._copy()) else {})},
            "optimizer": self.optimizer,
        }

    def _copy(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.relearned.items())

    def begun(self, model: "torch.nn.Module", corpus: Corpus, tokenizer: Any) -> "Variant":
        """The variant as it runs on this model and these data."""
        return self

    def place(
        self, model: "torch.nn.Module", forget: "Mapping[str, torch.Tensor]"
    ) -> "Relearned | None":
        """Where the gradient of the objective is taken, if not at theta."""
        if not self.relearned:
            return None
        from geffect import Relearned
        from geffect.risk import nll

        return Relearned(**self.relearned, loss=partial(nll, model, forget))

    @property
    def protect(self) -> tuple[str, ...]:
        """The retain sets that it protects."""
        return tuple(self.options.get("protect", ("retain",)))

    def stepping(
        self, parameters: "Sequence[torch.Tensor]", learning_rate: float
    ) -> "torch.optim.Optimizer":
        """The optimizer of a run."""
        import torch

        if self.optimizer == "SGD":
            return torch.optim.SGD(parameters, lr=learning_rate)
        return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0, fused=True)

    def rectifier(
        self, model: "torch.nn.Module", optimizer: "torch.optim.Optimizer", ema: float
    ) -> "Rectifier | SingleShot":
        """The rectifier of this variant; that of the plain one only watches."""
        from geffect import Rectifier

        of_update = self.options.get("space") == "update"
        options = {"ema": ema, **self.options}
        return Rectifier(model, self.rule(), optimizer=optimizer if of_update else None, **options)

    def objective(self, losses: Mapping[str, Any]) -> dict[str, Any]:
        """The losses of a step, without the retain term where the rule adds it."""
        if not self.adds_retain or not isinstance(losses["objective"], Mapping):
            return dict(losses)
        terms = {name: w for name, w in losses["objective"].items() if name != "retain"}
        return {**losses, "objective": terms}


class Collapsed(Variant):
    """One gradient, collapsed and taken again at every step; `options` are of the collapse."""

    @property
    def protect(self) -> tuple[str, ...]:
        return ("retain",)

    def rectifier(
        self, model: "torch.nn.Module", optimizer: "torch.optim.Optimizer", ema: float
    ) -> "SingleShot":
        from geffect.projection import Collapse

        from .repselect import SingleShot

        return SingleShot(model, Collapse(**self.options), ema)


COORDINATE = {"space": "update", "scope": "coordinate"}

VARIANTS: dict[str, Variant] = {
    "plain": Variant("the objective alone", _no_rule),
    "gru": Variant("GRU: the gradient is projected, then AdamW steps"),
    "gru-update": Variant("AdamW's own step is projected", options={"space": "update"}),
    "gru-coordinate": Variant(
        "AdamW's own step, each coordinate by itself",
        options=COORDINATE,
        learning_rates=(1e-3, 5e-4, 2e-3),
    ),
    "select": Variant(
        "AdamW's own step, on the most salient 0.5 % of coordinates",
        _no_rule,
        {"space": "update", "select": 0.005},
        learning_rates=(2e-3, 1e-3, 4e-3),
        duration=1.7,
    ),
    "select-coordinate": Variant(
        "AdamW's own step, on the most salient tenth of coordinates, each by itself",
        options={**COORDINATE, "select": 0.1},
        learning_rates=(1e-3, 5e-4, 2e-3),
        duration=1.7,
    ),
    "gru-retain-adam": Variant(
        "AdamW's own step is projected, along the retain gradient over the root of its second "
        "moment",
        options={"space": "update", "correction": "retain_adam"},
    ),
    "sago": Variant(
        "SAGO, prefer retain: the retain gradient of the step is added, and alone where it opposes "
        "the forget gradient",
        _sago,
        {"ema": 1.0},
        duration=1.7,
        adds_retain=True,
    ),
}


def _by_gain(gain: float, radius: float | None, duration: float = 1.0) -> Variant:
    within = "the length of the step down the retain gradient" if radius is None else f"{radius:g}"
    return Variant(
        f"HAMU: a step of gradient descent that forgets by {gain:g} nats, at the least retain cost "
        f"within {within}",
        partial(_hamu, gain=gain, **({} if radius is None else {"radius": radius})),
        {"ema": 1.0},
        learning_rates=(1.0, 0.5, 2.0),
        duration=duration,
        adds_retain=True,
        optimizer="SGD",
    )


def _one_shot(summary: str, **options: Any) -> Variant:
    return Collapsed(
        f"RepSelect, single shot: gradient descent along one gradient, collapsed: {summary}",
        _no_rule,
        options,
        learning_rates=(0.5, 0.25, 1.0),
        duration=5.0,
        optimizer="SGD",
        whole=True,
    )


RELEARNED = "-relearned"
"""How the names of variants go on whose objective is differentiated at a relearned copy."""


def _deeper(name: str) -> dict[str, Variant]:
    """A variant with more retain questions a step, at a relearned copy, and with both."""
    base = VARIANTS[name]
    fed = replace(
        base,
        summary=f"{base.summary}, with 70 retain questions a step",
        retain_batch=70,
        duration=1.5 * base.duration,
    )
    return {
        f"{name}-70": fed,
        f"{name}{RELEARNED}": _at_copy(fed),
        f"{name}{RELEARNED}-20": _at_copy(base),
    }


def _at_copy(variant: Variant) -> Variant:
    return replace(
        variant,
        summary=f"{variant.summary}; the gradient of the objective at a relearned copy",
        relearned={"radius": 0.006, "steps": 5},
        duration=2 * variant.duration,
    )


DEEPER: dict[str, dict[str, Variant]] = {
    name: _deeper(name) for name in ("select", "select-coordinate", "gru-coordinate", "gru-update")
}
"""Variants that should hide less, with those that they are held against, by what they are made of.
"""


def base_of(name: str) -> str:
    """What a variant is made of, if it is one of these; else itself.

    >>> base_of("select-relearned"), base_of("select")
    ('select', 'select')
    """
    return next((base for base, own in DEEPER.items() if name in own), name)


RIVALS: dict[str, Variant] = {
    **{name: variant for own in DEEPER.values() for name, variant in own.items()},
    "hamu": _by_gain(0.1, None),
    "hamu-fast": _by_gain(0.1, 0.3),
    "hamu-even": _by_gain(0.05, 0.5, duration=2.0),
    "hamu-slow": _by_gain(0.02, 0.1, duration=8.0),
    "gu": Variant(
        "GU: AdamW's own step, the nearest in its metric that harms none of the last retain "
        "gradients",
        _nearest,
        {"space": "update", "correction": "adam", "history": 8, "ema": 1.0},
        duration=3.0,
    ),
    "repselect": _one_shot("its own top directions made small", k=12, side="both", strength="soft"),
    "repselect-retain": _one_shot(
        "without the top directions of the retain gradient",
        k=32,
        side="both",
        source="retain",
        strength="hard",
    ),
}
"""Further methods, ours and others', and baselines: a study runs those that are named."""

RETAIN_SETS: dict[str, Variant] = {
    "gru-world": Variant("GRU against the world facts alone", options={"protect": ("world",)}),
    "nearest": Variant(
        "the nearest gradient that harms neither authors nor world facts",
        _nearest,
        {"protect": ("retain", "world")},
    ),
    "gru-world-update": Variant(
        "AdamW's own step, projected against the world facts alone",
        options={"protect": ("world",), "space": "update"},
    ),
    "nearest-update": Variant(
        "AdamW's own step, the nearest that harms neither authors nor world facts",
        _nearest,
        {"protect": ("retain", "world"), "space": "update"},
    ),
}
"""Beside the variants above, which protect the authors alone: several retain sets."""


THIN = ("gru-coordinate", "select", "select-coordinate")
"""The variants that leave most coordinates where they are."""

OF_ALL = ("plain", "gru-update", "gru-coordinate", "select")
"""The variants of a study of all objectives that names none."""


def every_objective() -> tuple[str, ...]:
    """The names of all objectives; of two with one loss, which differ by their data, the first."""
    from geffect.objectives import CATALOGUE

    first: dict[object, str] = {}
    for name, objective in CATALOGUE.items():
        first.setdefault(objective, name)
    return tuple(first.values())


MANY = 6
"""The methods that have a panel each in a picture; more of them are compared in one."""


def in_one_picture(summary: Mapping[str, Any]) -> bool:
    """Whether a study has edits to compare with, or too many methods for a panel each."""
    return bool(summary.get("edits")) or len({run["method"] for run in summary["runs"]}) > MANY


EQUAL, FEW, RATES, SETS = "equal forgetting", "few retain facts", "learning rates", "retain sets"
HIDES = "controls that hide"
"""What a run is there for: the comparison itself, or one of its controls."""


@dataclass(frozen=True)
class RunSpec:
    """One run of a study in every seed: a method in a variant, at a learning rate, with a feed.

    `method` is a name of an objective, and `options` are those that are set apart
    from its defaults. `heldout` is how many retain authors never feed the retain gradient.
    """

    part: str
    method: str
    variant: str
    learning_rate: float
    heldout: int
    options: tuple[tuple[str, float], ...] = ()
    compared: bool = False  # in one picture with all others: then its curve has what that needs

    @property
    def name(self) -> str:
        """A name for files."""
        setting = [f"lr{self.learning_rate:g}", f"heldout{self.heldout}"]
        return "-".join([self.method, self.variant, *([] if self.part == EQUAL else setting)])

    @property
    def shown(self) -> bool:
        """Whether figures show it: its run then goes on past the level and keeps what they need."""
        return self.part == EQUAL and self.variant == "plain"

    def weight(self, variant: Variant) -> float:
        """How long the run takes, beside a plain one; a smaller learning rate takes longer."""
        return variant.duration * variant.learning_rates[0] / self.learning_rate
