"""The work of a study: train a model, run one method in one variant, draw a figure.

A job is described where the study is planned and run in a worker, which imports what it needs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .corpus import generate
from .methods import VARIANTS
from .recipe import Recipe
from .workers import Say

KINDS = ("original", "gold")
"""The model that has memorised all facts, and the one that never saw the forget set."""


@dataclass(frozen=True)
class Training:
    """Train the model of one kind, save it and measure it."""

    out: Path
    seed: int
    kind: str
    recipe: Recipe
    stage: str = "train"
    weight: float = 4.0

    @property
    def name(self) -> str:
        return f"{self.kind}-seed{self.seed}"

    def run(self, say: Say) -> dict[str, Any]:
        from transformers.utils.logging import disable_progress_bar

        from . import language_model as lm
        from .unlearning import Data, measure, relearn

        disable_progress_bar()  # that of saving a checkpoint; the study has its own
        corpus = generate(self.seed, self.recipe.corpus)
        tokenizer = lm.train_tokenizer(corpus)
        model = lm.train(
            self.recipe,
            tokenizer,
            corpus.memorised if self.kind == "original" else corpus.kept,
            self.seed,
            lambda done, total: say(done / total, f"step {done} of {total}"),
        )
        folder = self.out / "models" / self.name
        model.save_pretrained(folder)
        tokenizer.save(str(folder / "tokenizer.json"))
        data = Data.of(corpus, tokenizer)
        return {**measure(model, data), "relearn_nll": relearn(model, data)}


@dataclass(frozen=True)
class Unlearning:
    """One unlearning run, from the original to the level of the gold model."""

    out: Path
    seed: int
    method: str
    variant: str
    level: float
    recipe: Recipe
    stage: str = "unlearn"

    @property
    def weight(self) -> float:
        return VARIANTS[self.variant].duration

    @property
    def name(self) -> str:
        return f"{self.method}-{self.variant}-seed{self.seed}"

    def run(self, say: Say) -> dict[str, Any]:
        from tokenizers import Tokenizer
        from transformers import LlamaForCausalLM
        from transformers.utils.logging import disable_progress_bar

        from .findings import shares
        from .unlearning import Data, unlearn

        disable_progress_bar()
        folder = self.out / "models" / f"original-seed{self.seed}"
        file = f"runs/{self.name}.h5"
        result = unlearn(
            LlamaForCausalLM.from_pretrained(folder),
            Data.of(
                generate(self.seed, self.recipe.corpus),
                Tokenizer.from_file(str(folder / "tokenizer.json")),
            ),
            self.method,
            self.variant,
            self.seed,
            self.level,
            self.out / file,
            lambda step, nll: say(min(1.0, nll / self.level), f"step {step}, forget NLL {nll:.2f}"),
        )
        return {**result, "file": file, **shares(self.out / file)}


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
