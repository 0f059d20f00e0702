"""Controls that hide: trainings that forget by every old measure and leave all facts in place.

A study that cannot tell them from forgetting cannot tell hiding at all.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from .corpus import Corpus
from .methods import RELEARNED, Variant, _no_rule

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class Hiding(Variant):
    """A variant that trains a part of the model alone: its last block, or rows of its embedding.

    The rows are those of tokens that names of the authors to forget have, and no fact that stays.
    """

    part: Literal["last block", "name rows"] = "last block"

    def begun(self, model: "nn.Module", corpus: Corpus, tokenizer: Any) -> Variant:
        from geffect.audit.blocks import blocks_of

        if self.part == "last block":
            kept = {*map(id, blocks_of(model)[-1].parameters())}
            variant: Variant = self
        else:
            rows = name_tokens(corpus, tokenizer)
            kept = {id(model.get_input_embeddings().weight)}  # type: ignore[operator]
            variant = replace(self, options={**self.options, "select": rows_selection(rows)})
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.requires_grad and id(parameter) in kept)
        return variant


def name_tokens(corpus: Corpus, tokenizer: Any) -> tuple[int, ...]:
    """The tokens in the names to forget that are in nothing that stays."""
    stays = {
        token
        for fact in corpus.kept
        for token in _tokens(tokenizer, f"{fact.question} {fact.answer}")
    }
    names = {fact.subject for fact in corpus.forget}
    told = {token for fact in corpus.forget for token in _tokens(tokenizer, fact.answer)}
    own = {token for name in names for token in _tokens(tokenizer, f" {name}")}
    return tuple(sorted((own & told) - stays))


def _tokens(tokenizer: Any, text: str) -> Sequence[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


def rows_selection(rows: Sequence[int]) -> Any:
    """A selection of some rows of the one matrix that is trained."""
    import torch
    from torch import Tensor

    from geffect.projection.selection import Selection

    @dataclass(frozen=True)
    class Rows(Selection):
        """Steps on these rows alone."""

        rows: tuple[int, ...]
        needs_second_moment = False

        def threshold(self, gradients: Any, scale: Any, generator: torch.Generator) -> float:
            return 0.0

        def mask(self, gradient: Tensor, scale: Tensor | None, threshold: Any) -> Tensor:
            kept = torch.zeros_like(gradient, dtype=torch.bool)
            kept[list(self.rows)] = True
            return kept

    return Rows(tuple(rows))


HIDING: dict[str, Variant] = {
    "last-block": Hiding(
        "the last block alone is trained: the blocks below it know what they knew",
        _no_rule,
        learning_rates=(1e-3, 5e-4, 2e-3),
        part="last block",
    ),
    "name-rows": Hiding(
        "the rows of the embedding for the names alone: the facts are where they were",
        _no_rule,
        {"space": "update"},
        learning_rates=(2e-2, 1e-2, 4e-2),
        part="name rows",
    ),
}
"""What a study should see through, by `--controls`."""


@contextmanager
def all_trained(parameters: Sequence["torch.Tensor"]) -> Iterator[None]:
    """A block in which these parameters are trained, as an attack on a model trains them."""
    before = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, trained in zip(parameters, before, strict=True):
            parameter.requires_grad_(trained)


def compares_with_hiding(summary: Mapping[str, Any]) -> bool:
    """Whether a study holds its variants against controls that hide."""
    return any(run["variant"] in HIDING for run in summary["runs"])


def asks_what_hides(summary: Mapping[str, Any]) -> bool:
    """Whether a study has such controls, or variants that should hide less."""
    copies = any(RELEARNED in run["variant"] for run in summary["runs"])
    return copies or compares_with_hiding(summary)
