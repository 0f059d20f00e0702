"""What a study is done on, and the sizes of the embedded one.

Planning a study needs no torch, so that its workers can load it while nothing else waits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from .corpus import Corpus, Fact, Size

LEVELS = {"forget_nll": "at_level", "value_nll": "at_value", "forget_es": "at_es"}
"""Where runs are compared, at the gold model's value of it, and the name of what is measured there.

The loss says how likely the model still finds the answers, that of the values alone leaves out
names and templates, and the extraction strength says how much of the answers it completes.
"""

Counted = Callable[[int, int], None]
"""Told how many of how many steps are done."""


@dataclass(frozen=True)
class UnlearningConfig:
    """How unlearning steps are taken, and when a run is measured and ends."""

    forget_batch: int = 10
    retain_batch: int = 20
    world_batch: int = 20
    ema: float = 0.2
    """Weight of the new retain gradient; the paper's 0.8 measured worse on this small model."""
    most_steps: int = 200
    patience: int = 40
    """A run ends where its forget NLL has not risen by a hundredth of the level in these steps."""
    steps_beyond: int = 2
    """Past the last level, for the curves."""
    plain_steps: int = 24
    """A plain run goes on: what it does after the level belongs into the picture."""
    curve_every: int = 5
    """The retain set is large: its NLL is measured at every fifth step."""
    relearning_steps: int = 8
    relearning_rate: float = 3e-4
    teaching_steps: int = 20
    """So many steps one half of the facts is taught before the other is to be recognised."""
    teaching_rate: float = 1e-3
    attack_steps: tuple[int, ...] = (10, 20, 40)
    attack_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    """The budgets of the strongest attack, beside the steps and the rate of teaching."""
    savings_steps: int = 5
    savings_rate: float = 3e-4

    def sizes(self, retain_sets: Sequence[str]) -> dict[str, int]:
        """How many rows of each set a step draws."""
        batches = {"retain": self.retain_batch, "world": self.world_batch}
        further = {name: batches[name] for name in retain_sets}
        return {"forget": self.forget_batch, "retain": self.retain_batch, **further}


class SubjectConfig(Protocol):
    """A language model that learns the facts of a corpus and is then made to forget some."""

    @property
    def corpus(self) -> Size:
        """How large a corpus it learns."""

    @property
    def few_heldout(self) -> int:
        """How many authors are held out where few facts feed the retain gradient."""

    @property
    def unlearning(self) -> UnlearningConfig:
        """How it is made to forget."""

    @property
    def layers(self) -> int | None:
        """How many it has; None where that is known only when it is loaded."""

    @property
    def described(self) -> str:
        """What it is and how it learns, for a report."""

    def learn(
        self, folder: Path, corpus: Corpus, facts: Sequence[Fact], seed: int, report: Counted
    ) -> None:
        """Learn the facts, some or all of those of the corpus, and save into the folder."""

    def load(self, folder: Path) -> tuple[Any, Any]:
        """The saved model, a causal language model of transformers, and its tokenizer."""


@dataclass(frozen=True)
class EmbeddedConfig:
    """The embedded subject: the size of a Llama, how it is trained, and what it can memorise so."""

    corpus: Size = field(default_factory=Size)
    few_heldout: int = 15
    unlearning: UnlearningConfig = field(default_factory=UnlearningConfig)
    layers: int = 6
    hidden: int = 96
    heads: int = 4
    epochs: int = 25
    batch: int = 16
    learning_rate: float = 4e-3
    warmup: int = 20

    @property
    def described(self) -> str:
        """What it is and how it learns, for a report."""
        return (
            f"A Llama of {self.layers} layers and width {self.hidden}, trained from random weights "
            f"for {self.epochs} epochs, memorised {self.corpus.authors} fictitious authors and "
            f"{self.corpus.world} facts of the real world."
        )

    def learn(
        self, folder: Path, corpus: Corpus, facts: Sequence[Fact], seed: int, report: Counted
    ) -> None:
        """Train from random weights, with a tokenizer of the whole corpus."""
        from geffect.checkpoints.loading import save_model

        from . import language_model as lm

        tokenizer = lm.train_tokenizer(corpus)
        save_model(lm.train(self, tokenizer, facts, seed, report), folder)
        tokenizer.save_pretrained(folder)

    def load(self, folder: Path) -> tuple[Any, Any]:
        """What `learn` has saved."""
        from transformers import AutoTokenizer, LlamaForCausalLM

        return LlamaForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


FULL = EmbeddedConfig()
QUICK = EmbeddedConfig(
    corpus=Size(authors=6, forget=1, heldout=2, world=12),
    few_heldout=3,
    unlearning=UnlearningConfig(retain_batch=10, world_batch=10),
    layers=2,
    epochs=17,
    batch=8,
)
