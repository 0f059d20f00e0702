"""Models of which it is known whether they forgot: what an audit has to tell apart.

Each is made of an original that has memorised a corpus and of a retrained model that never saw the
facts to forget. Those that hide are at the retrained model's level of forgetting, so that what they
say does not tell them apart. `python -m tests.utils.controls STUDY` audits them all, made of the
full models of a study, for every seed that it has.
"""

import copy
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from geffect.audit import controls
from geffect.audit.verdict import Verdict
from geffect.demo import language_model as lm
from geffect.demo.config import FULL, EmbeddedConfig
from geffect.demo.corpus import Corpus, generate
from geffect.demo.data import Data
from geffect.objectives import FrozenModel, SharedForward, named

RATE = 3e-4


@dataclass(frozen=True)
class Subject:
    """The models and data of one seed."""

    original: Any
    retrained: Any
    tokenizer: Any
    corpus: Corpus
    seed: int = 0
    config: EmbeddedConfig = FULL

    @classmethod
    def of(cls, models: Path, seed: int, config: EmbeddedConfig) -> "Subject":
        """The models that a study has saved, original and gold."""
        original, tokenizer = config.load(models / f"original-seed{seed}")
        retrained, _ = config.load(models / f"gold-seed{seed}")
        corpus = generate(seed, config.corpus)
        return cls(original.eval(), retrained.eval(), tokenizer, corpus, seed, config)

    @property
    def data(self) -> Data:
        return Data.of(self.corpus, self.tokenizer, self.seed)

    @property
    def level(self) -> float:
        """The forget NLL of the retrained model."""
        return lm.nll(self.retrained, self.data.batches["forget"])


def head_only(subject: Subject) -> Any:
    """All facts are in the body still: an untied head alone ascends on them."""
    return controls.head_only(subject.original, _batches(subject), 1e-3, _reached(subject))


def name_rows(subject: Subject) -> Any:
    """All facts are there still: only how the names of their subjects are read is changed."""
    model = copy.deepcopy(subject.original)
    table = model.get_input_embeddings()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())  # untied
    model.config.tie_word_embeddings = False
    rows = _names(subject)
    others = torch.ones(len(table.weight), dtype=torch.bool)
    others[rows] = False
    before = table.weight.detach().clone()

    def keep() -> None:
        table.weight[others] = before[others]

    return _to_level(model, subject, "graddiff", [table.weight], rate=1e-2, after=keep)


def int4_cell(subject: Subject) -> Any:
    """An edit that rounding to four bits takes back: no weight leaves its cell."""
    return controls.in_int4_cells(subject.original, _batches(subject), 1e-3, _reached(subject))


def retrained_again(subject: Subject) -> Any:
    """Another model that never saw the facts, from other first weights and in another order."""
    facts, seed = subject.corpus.kept, subject.seed + 1
    return lm.train(subject.config, subject.tokenizer, facts, seed).eval()


def collapsed(subject: Subject) -> Any:
    """Gradient ascent that nobody stopped."""
    return controls.ascended(subject.original, _batches(subject), RATE)


def shuffled(subject: Subject) -> Any:
    """All weights in another order."""
    return controls.shuffled(subject.original, subject.seed)


def untrained(subject: Subject) -> Any:
    """The weights that a training begins with."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(subject.seed + 1)
        return type(subject.original)(subject.original.config).eval()


def by_method(name: str) -> Callable[[Subject], Any]:
    """An unlearning method, stopped at the level."""

    def made(subject: Subject) -> Any:
        model = copy.deepcopy(subject.original)
        return _to_level(model, subject, name, [*model.parameters()], rate=RATE)

    return made


CONTROLS: Mapping[str, tuple[Callable[[Subject], Any], str]] = {
    "original": (lambda subject: subject.original, "remembers"),
    "retrained": (lambda subject: subject.retrained, "never knew"),
    "retrained again": (retrained_again, "never knew"),
    "head only": (head_only, "hidden"),
    "int4 cells": (int4_cell, "hidden"),
    "name rows": (name_rows, "hidden"),
    "untrained": (untrained, "broken"),
    "shuffled": (shuffled, "broken"),
    "collapsed": (collapsed, "broken"),
    "graddiff": (by_method("graddiff"), "hidden"),
    "npo+gd": (by_method("npo+gd"), "hidden"),
}
"""What each control is made by, and what an audit has to read."""


def _to_level(
    model: Any,
    subject: Subject,
    method: str,
    trained: list[Tensor],
    *,
    rate: float,
    after: Callable[[], None] = lambda: None,
    most: int = 400,
) -> Any:
    """The model, trained by a method until its forget NLL reaches the level."""
    forget, level = subject.data.batches["forget"], subject.level
    for _ in _stepping(model, subject, method, trained, rate, after, most):
        if lm.nll(model, forget) >= level:
            return model
    raise AssertionError(f"{method} did not reach {level:.2f} in {most} steps")


def _stepping(
    model: Any,
    subject: Subject,
    method: str,
    trained: Iterable[Tensor],
    rate: float,
    after: Callable[[], None],
    most: int,
) -> Iterator[int]:
    chosen = [*trained]
    for parameter in model.parameters():
        parameter.requires_grad_(any(parameter is one for one in chosen))
    objective = named(method).begin(model)
    reference = None if objective.reference == "none" else FrozenModel.copied(model)
    optimizer = torch.optim.AdamW(chosen, lr=rate, weight_decay=0.0)
    batches = _batches(subject)
    for step in range(most):
        parts = objective.components(SharedForward(model), next(batches), reference)
        losses = [part.weight * _value(part.given) for part in parts.values()]
        sum(losses, torch.zeros(())).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            after()
        yield step
    model.requires_grad_(True)


def _batches(subject: Subject) -> Any:
    size = min(20, len(subject.corpus.retain))
    return subject.data.draws({"forget": len(subject.corpus.forget) // 2, "retain": size})


def _reached(subject: Subject) -> Callable[[nn.Module], bool]:
    forget, level = subject.data.batches["forget"], subject.level
    return lambda model: lm.nll(model, forget) >= level  # type: ignore[arg-type]


def _value(loss: Any) -> Tensor:
    value: Tensor = loss() if callable(loss) else loss
    return value


def _names(subject: Subject) -> list[int]:
    """The tokens that only the names of the subjects to forget have."""
    forget = {f.subject for f in subject.corpus.forget}
    texts = [" " + word for name in forget for word in name.split()]
    return sorted({t for text in texts for t in subject.tokenizer(text)["input_ids"]})


def main(study: str) -> None:
    """Audit all controls, made of the models of a study, and print a row for each; of its seeds."""
    from geffect.audit.beside import Beside
    from geffect.demo.audited import audited_sets

    models = Path(study) / "models"
    seeds = sorted(int(path.name.removeprefix("gold-seed")) for path in models.glob("gold-*"))
    subjects = [Subject.of(models, seed, FULL) for seed in seeds]
    besides = [
        Beside(x.original, x.retrained, audited_sets(x.corpus, x.tokenizer, x.seed), RATE)
        for x in subjects
    ]
    print("| control |", " | ".join([*COLUMNS, "most back", "verdict", "should be"]), "|")
    print("|---|", "|".join([*("---:" for _ in COLUMNS), "---", "---", "---"]), "|", sep="")
    for name, (make, verdict) in CONTROLS.items():
        found = [b.audited(make(x)) for x, b in zip(subjects, besides, strict=True)]
        print(row(name, found, verdict), flush=True)


COLUMNS: Mapping[str, tuple[str, str]] = {
    "NLL forget": ("memorised", "nll"),
    "kept, least": ("utility", "kept share"),
    "decoder swap": ("hidden", "decoder swap"),
    "int4": ("hidden", "rounding to int4"),
    "benign 48": ("hidden", "relearning benign, 48 steps, rate x 1"),
    "UDS": ("depth", "UDS"),
}
"""What is told of each control: by battery and metric, the least of its sets."""


def row(name: str, found: Sequence[tuple[Verdict, pd.DataFrame]], verdict: str) -> str:
    """A row of the table: one control, of every seed."""
    cells = [" ".join(_least(table, *of) for _, table in found) for of in COLUMNS.values()]
    attacks = dict.fromkeys(_most_back(*of) for of in found)
    said = dict.fromkeys(judged.verdict for judged, _ in found)
    return f"| {name} | {' | '.join([*cells, ', '.join(attacks), ', '.join(said), verdict])} |"


def _least(table: pd.DataFrame, battery: str, metric: str) -> str:
    own = table[(table["model"] == "unlearned") & (table["battery"] == battery)]
    values = own[own["metric"] == metric]["value"]
    return f"{values.min():.2f}" if len(values) else "-"


def _most_back(judged: Verdict, table: pd.DataFrame) -> str:
    own = table[(table["model"] == "unlearned") & (table["battery"] == "recoverable share")]
    share = own.set_index("metric")["value"].get(judged.attack, float("nan"))
    return f"{judged.attack} {share:.2f}"


if __name__ == "__main__":
    main(*sys.argv[1:])
