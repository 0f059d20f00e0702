"""The work of a study: train a model, run one method in one variant, draw a figure.

A job is described where the study is planned and run in a worker, which imports what it needs.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from geffect.drafts import write_whole

from .config import SubjectConfig
from .corpus import Corpus, Fact, generate
from .edits import EDIT, StudiedEdit
from .methods import EQUAL, RunSpec, Variant
from .workers import Job, Say

if TYPE_CHECKING:
    from .audited import Judge
    from .data import Data

KINDS = ("original", "gold")
"""The model that has memorised all facts, and the one that never saw the forget set."""


def learn(
    subject: SubjectConfig, folder: Path, corpus: Corpus, facts: Sequence[Fact], seed: int, say: Say
) -> None:
    """Make the model of a subject learn facts, and save it in a folder, which is made."""
    _quiet()
    folder.mkdir(parents=True, exist_ok=True)

    def told(done: int, total: int) -> None:
        say(done / total, f"step {done} of {total}")

    subject.learn(folder, corpus, facts, seed, told)


def _quiet() -> None:
    """No progress bars of loading and saving: a study has its own."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


@dataclass(frozen=True)
class Training:
    """Make the model of one kind learn its facts, save it and measure it."""

    out: Path = field(repr=False)  # a folder that was moved holds the same study
    seed: int
    kind: str
    subject: SubjectConfig
    stage: str = "train"
    weight: float = 4.0

    @property
    def name(self) -> str:
        return f"{self.kind}-seed{self.seed}"

    def run(self, say: Say) -> dict[str, Any]:
        from .data import Data
        from .measures import measure, probe, relearn

        subject, folder = self.subject, self.out / "models" / self.name
        corpus = generate(self.seed, subject.corpus)
        facts = corpus.memorised if self.kind == "original" else corpus.kept
        learn(subject, folder, corpus, facts, self.seed, say)
        model, tokenizer = subject.load(folder)
        data = Data.of(corpus, tokenizer, device=model.device)
        few = generate(self.seed, replace(subject.corpus, heldout=subject.few_heldout))
        measured = measure(model, data)
        return {
            **measured,
            "relearn_nll": relearn(model, data, subject.unlearning),
            **probe(model, data, subject.unlearning, attacked=False),
            "by_feed": {
                str(len(corpus.retain)): measured,
                str(len(few.retain)): measure(model, Data.of(few, tokenizer, device=model.device)),
            },
        }


@dataclass(frozen=True)
class Probing:
    """Attack the model of one kind in every way, for a study that compares models so."""

    out: Path = field(repr=False)
    seed: int
    kind: str
    subject: SubjectConfig
    stage: str = "train"
    weight: float = 1.0

    @property
    def name(self) -> str:
        return f"probe-{self.kind}-seed{self.seed}"

    def run(self, say: Say) -> dict[str, Any]:
        from .data import Data
        from .measures import probe

        model, tokenizer = model_of(self, self.kind)
        corpus = generate(self.seed, self.subject.corpus)
        data = Data.of(corpus, tokenizer, device=model.device)
        return probe(model, data, self.subject.unlearning, attacked=True)


@dataclass(frozen=True)
class Reading:
    """Read the original and the gold model as an audit does, which holds others against them."""

    out: Path = field(repr=False)
    seed: int
    subject: SubjectConfig
    stage: str = "train"
    weight: float = 2.0

    @property
    def name(self) -> str:
        return f"audit-seed{self.seed}"

    def run(self, say: Say) -> dict[str, Any]:
        from .audited import audited_sets, beside

        original, retrained = (model_of(self, kind) for kind in KINDS)
        corpus = generate(self.seed, self.subject.corpus)
        sets = audited_sets(corpus, original[1], self.seed)
        rate = self.subject.unlearning.relearning_rate
        read = beside(original[0], [retrained[0]], sets, rate).read()
        return {str(column): values for column, values in read.to_dict("list").items()}


class OfSeed(Protocol):
    """A job that begins with the models of a seed."""

    @property
    def out(self) -> Path: ...

    @property
    def seed(self) -> int: ...

    @property
    def subject(self) -> SubjectConfig: ...


def model_of(job: OfSeed, kind: str) -> tuple[Any, Any]:
    """A model of the seed and its tokenizer."""
    _quiet()
    return job.subject.load(job.out / "models" / f"{kind}-seed{job.seed}")


def original_of(job: OfSeed, corpus: Corpus) -> "tuple[Any, Data]":
    """The original of the seed, and a corpus as data for it."""
    from .data import Data

    model, tokenizer = model_of(job, "original")
    return model, Data.of(corpus, tokenizer, job.seed, model.device)


def _judged(job: OfSeed) -> "Judge":
    """What an audit says of a model of the seed, beside what was read of the others."""
    from .audited import audited_sets, beside, judge

    original, tokenizer = model_of(job, "original")
    read = Kept(Reading(job.out, job.seed, job.subject), job.out / "results", resume=True).found()
    corpus = generate(job.seed, job.subject.corpus)
    sets = audited_sets(corpus, tokenizer, job.seed)
    return judge(beside(original, (), sets, job.subject.unlearning.relearning_rate, read))


@dataclass(frozen=True)
class Unlearning:
    """One unlearning run, from the original to the levels of the gold model.

    - `audit`: whether its model at the forget NLL of the gold model is audited.
    """

    out: Path = field(repr=False)
    seed: int
    spec: RunSpec
    variant: Variant
    levels: Mapping[str, float]
    subject: SubjectConfig
    audit: bool = False
    stage: str = "unlearn"

    @property
    def weight(self) -> float:
        return self.spec.weight(self.variant)

    @property
    def name(self) -> str:
        return f"{self.spec.name}-seed{self.seed}"

    def run(self, say: Say) -> dict[str, Any]:
        from .findings import shares
        from .scales import on_common_scales
        from .unlearning import unlearn

        spec, subject, level = self.spec, self.subject, self.levels["forget_nll"]
        corpus = generate(self.seed, replace(subject.corpus, heldout=spec.heldout))
        model, data = original_of(self, corpus)
        file = f"runs/{self.name}.h5"
        result = unlearn(
            model,
            replace(data, judged=_judged(self)) if self.audit else data,
            spec,
            self.variant,
            subject.unlearning,
            self.levels,
            self.out / file,
            lambda step, nll: say(min(1.0, nll / level), f"step {step}, forget NLL {nll:.2f}"),
        )
        return {
            "part": spec.part,
            "method": spec.method,
            "variant": spec.variant,
            "seed": self.seed,
            "file": file,
            "learning_rate": spec.learning_rate,
            "retain_feed": len(corpus.retain),
            **result,
            **shares(self.out / file),
            "g_effects": on_common_scales(self.out / file, (result["at_level"] or {}).get("step")),
        }


@dataclass(frozen=True)
class Editing:
    """One edit of the original, as strong as equal forgetting takes, and as equal disruption."""

    out: Path = field(repr=False)
    seed: int
    edit: str
    studied: StudiedEdit
    level: float  # the gold model's forget NLL
    subject: SubjectConfig
    audit: bool = False
    stage: str = "edit"
    weight: float = 2.0

    @property
    def name(self) -> str:
        return f"edit-{self.edit}-seed{self.seed}"

    def run(self, say: Say) -> dict[str, Any]:
        from .editing import Subject, edited

        corpus = generate(self.seed, self.subject.corpus)
        model, data = original_of(self, corpus)
        if self.audit:
            data = replace(data, judged=_judged(self))
        file = f"runs/{self.name}.h5"
        return {
            "part": EQUAL,
            "method": self.edit,
            "variant": EDIT,
            "seed": self.seed,
            "file": file,
            "learning_rate": None,
            "steps": None,
            "retain_feed": len(corpus.retain),
            "share_retaining_negative": None,
            "share_update_violating": None,
            **edited(
                Subject(model, data, self.subject.unlearning),
                self.studied,
                self.level,
                self.out / file,
            ),
        }


@dataclass(frozen=True)
class Kept:
    """A job whose result is kept as JSON and, to `resume` a study, taken from there.

    What tells whether it is the same job is all that the job says of itself; the code that ran it
    is not looked at.
    """

    job: Job
    folder: Path
    resume: bool

    @property
    def name(self) -> str:
        return self.job.name

    @property
    def stage(self) -> str:
        return self.job.stage

    @property
    def weight(self) -> float:
        return self.job.weight

    @property
    def path(self) -> Path:
        """The file with the result."""
        return self.folder / f"{self.name}.json"

    @property
    def other(self) -> bool:
        """Whether a result is kept of another job with this name."""
        return self.path.exists() and self.found() is None

    def found(self) -> Any:
        """The result that is kept of the same job; None if there is none."""
        if not self.path.exists():
            return None
        kept = json.loads(self.path.read_text(encoding="utf-8"))
        return kept["result"] if kept["job"] == repr(self.job) else None

    def run(self, say: Say) -> Any:
        found = self.found() if self.resume else None
        if found is not None:
            return found
        result = self.job.run(say)
        write_whole(self.path, json.dumps({"job": repr(self.job), "result": result}))
        return result


@dataclass(frozen=True)
class Drawing:
    """One figure of the study."""

    out: Path
    name: str
    summary: Mapping[str, Any] = field(repr=False)
    stage: str = "draw"
    weight: float = 0.2

    def run(self, say: Say) -> None:
        from . import figures

        figures.draw(self.name, self.summary, self.out)
