"""What a study runs: seeds, methods and variants, edits, the model, and how."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from geffect.near import meant

from .config import FULL, LEVELS, QUICK, SubjectConfig
from .edits import EDITS
from .hiding import HIDING
from .jobs import KINDS, Editing, Probing, Reading, Training
from .methods import (
    EQUAL,
    FEW,
    HIDES,
    MANY,
    METHODS,
    RATES,
    RETAIN_SETS,
    RIVALS,
    SETS,
    VARIANTS,
    RunSpec,
    Variant,
)

QUICK_METHODS = ("ga",)

EVERYWHERE = ("plain", "gru", "gru-update")
IN_A_LOOK = (*EVERYWHERE, "gru-coordinate", "select")
"""The variants of a study that is not `all_variants`: the first of every method, these of some."""
LOOKED_AT = ("ga", "npo")

ANSWERS = ("original", "alternate")
"""The answers to forget questions that a corpus has; those of other rows are drawn."""


@dataclass(frozen=True)
class Plan:
    """What a study runs, on what.

    With `named` every method in the variants, or rivals, of these names, and in no others. With
    `all_variants` every method in every variant, run on to equal extraction strength. With
    `controls` the same with few facts that feed the retain gradient and, of the first method, at
    three learning rates of every variant, with several retain sets, and controls that hide.
    `edits` are names of `geffect.demo.edits.EDITS`, which are made in every seed. With `audit` a
    quick audit says of each unlearned model whether it forgot. `so_far`: nothing is run, and what
    has a result is reported.
    """

    seeds: Sequence[int] = (0,)
    methods: Sequence[str] = ()  # none named: METHODS, or QUICK_METHODS of a quick study
    options: Mapping[str, Any] = field(default_factory=dict)  # of the objectives, all of them
    all_variants: bool = False
    controls: bool = False
    quick: bool = False
    workers: int = 2
    threads: int = 1  # of each worker
    resume: bool = False  # from the results of a study with the same output that was cut short
    overwrite: bool = False  # a study with the same output, whose results are then gone
    subject: SubjectConfig | None = None  # none given: the embedded Llama, smaller if quick
    variants: Mapping[str, Variant] = field(default_factory=lambda: VARIANTS)
    rivals: Mapping[str, Variant] = field(default_factory=lambda: RIVALS)
    named: Sequence[str] = ()
    retain_sets: Mapping[str, Variant] = field(default_factory=lambda: RETAIN_SETS)
    hiding: Mapping[str, Variant] = field(default_factory=lambda: HIDING)
    edits: Sequence[str] = ()
    audit: bool = False
    so_far: bool = False

    def __post_init__(self) -> None:
        if not self.methods:
            object.__setattr__(self, "methods", QUICK_METHODS if self.quick else METHODS)
        if self.so_far:
            object.__setattr__(self, "resume", True)
        if self.resume and self.overwrite:
            raise ValueError(
                "`resume` and `overwrite` should not both be True. Found both. Choose `resume` to "
                "go on with a study, `overwrite` to begin it anew."
            )
        if self.options or not {*self.methods} <= {*METHODS}:
            _check_methods(self.methods, self.options)
        _check_names("variants", self.named, self.known)
        _check_names("edits", self.edits, EDITS)
        repeated = len(set(self.seeds)) < len(self.seeds) or len(set(self.methods)) < len(
            self.methods
        )
        if repeated or not self.seeds or self.workers < 1:
            raise ValueError(
                "A study should have seeds and methods that are all different, and a worker. Found "
                f"seeds {tuple(self.seeds)}, methods {tuple(self.methods)}, {self.workers} "
                "workers. Pass, say, seeds=(0, 1) and workers=2."
            )

    @property
    def studied(self) -> SubjectConfig:
        """What learns and forgets."""
        return self.subject or (QUICK if self.quick else FULL)

    @property
    def weight(self) -> float:
        """How much work the plan is, in plain unlearning runs."""
        runs = sum(spec.weight(self.variant(spec)) for spec in self.specs())
        work = len(KINDS) * Training.weight + runs + len(self.edits) * Editing.weight
        probing = self.probed * len(KINDS) * Probing.weight
        return len(self.seeds) * (work + probing + self.audit * Reading.weight)

    @property
    def jobs(self) -> int:
        """How many runs and edits a seed has, and whether its models are read by an audit."""
        return len(self.specs()) + len(self.edits) + self.audit

    def variant(self, spec: RunSpec) -> Variant:
        """The variant of a run."""
        return (self.retain_sets if spec.part == SETS else self.known)[spec.variant]

    @property
    def known(self) -> dict[str, Variant]:
        """The variants that may be named."""
        return {**self.variants, **self.rivals, **self.hiding}

    def levels(self, spec: RunSpec) -> tuple[str, ...]:
        """What a run goes on to; a look and most controls end at equal forgetting."""
        both = self.all_variants and spec.part in (EQUAL, FEW)
        valued = self.probed and spec.part in (EQUAL, HIDES)
        further = {"value_nll": valued, "forget_es": both}
        return tuple(name for name in LEVELS if further.get(name, True))

    @property
    def probed(self) -> bool:
        """Whether models are attacked in every way, and compared at equal loss of the values."""
        return self.all_variants or self.controls or bool(self.named)

    def specs(self) -> list[RunSpec]:
        """The runs of every seed, the comparison first."""
        many, few = self.studied.corpus.heldout, self.studied.few_heldout
        first = self.methods[:1]

        def of(part: str, methods: Sequence[str], heldout: int) -> list[RunSpec]:
            chosen = {name: self.known[name] for name in self.named} or self.variants
            variants = {SETS: self.retain_sets, HIDES: self.hiding}.get(part, chosen)
            return [
                RunSpec(
                    part,
                    method,
                    name,
                    rate,
                    heldout,
                    tuple(self.options.items()),
                    compared=part == EQUAL and (bool(self.edits) or len(self.methods) > MANY),
                )
                for method in methods
                for name, variant in variants.items()
                for rate in (
                    variant.learning_rates[1:] if part == RATES else variant.learning_rates[:1]
                )
            ]

        planned = of(EQUAL, self.methods, many)
        if self.controls:
            planned += of(FEW, self.methods, few) + of(RATES, first, many)
        if not (self.all_variants or self.named):
            planned = [
                spec
                for spec in planned
                if spec.variant in (IN_A_LOOK if spec.method in LOOKED_AT else EVERYWHERE)
            ]
        return planned + (
            [*of(SETS, first, many), *of(HIDES, first, many)] if self.controls else []
        )


def _check_names(option: str, names: Sequence[str], known: Mapping[str, object]) -> None:
    strange = [name for name in names if name not in known]
    if strange or len(set(names)) < len(names):
        said = ", ".join(f"`{name}`" for name in strange or names)
        raise ValueError(
            f"`{option}` should be some of {', '.join(known)}, each once. Found {said}."
            f"{meant(strange[0], known) if strange else ''} Choose from those."
        )


def _check_methods(methods: Sequence[str], options: Mapping[str, Any]) -> None:
    from geffect.data.others import among_others
    from geffect.objectives import answers_of, check_sides, named, names, probable, spelt

    unknown = [method for method in methods if method not in names()]
    if unknown:
        raise ValueError(
            f"`methods` should be some of {spelt()}. "
            f"Found {', '.join(f'`{method}`' for method in unknown)}."
            f"{probable(unknown[0])} Choose from those."
        )
    for method in methods:
        objective = named(method, options)
        drawn = among_others(answers_of(objective, "forget"))
        sides: dict[str, dict[str, Any]] = {
            "forget": {answer: {} for answer in (*ANSWERS, *drawn)},
            "retain": {},
        }
        check_sides(objective, sides, add="A study has no {side}: leave this method out.")
