"""Causal language models that learn facts: rows of tokens, training, and what is measured.

A question and its answer are one row, as the tokenizer's chat template renders them: the prompt,
the answer, and the eos; padded on the right. Under causal attention nothing real can see such
padding, so everything here leaves the attention mask out, which is exact, and computes logits only
where a token is scored. Losses are means over the scored tokens of all rows, in nats; the
answer's tokens and the eos are scored unless said.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from geffect.batch import IGNORED, on_device
from geffect.data.collate import collate, pad_token_of
from geffect.data.examples import example
from geffect.evaluation.extraction import strengths
from geffect.hooks import Hooks
from geffect.interrupts import put_back_after
from geffect.layers import trainable
from geffect.risk import log_likelihood, mean_nll

from .corpus import Corpus, Fact

PAD, BOS, EOS, SEP = range(4)
SPECIALS = ["<pad>", "<bos>", "<eos>", "<sep>"]
TEMPLATE = (
    "<bos>{% for message in messages %}{{ message['content'] }}"
    "{{ '<eos>' if message['role'] == 'assistant' else '<sep>' }}{% endfor %}"
)
"""A question is followed by its <sep> in any case: it is what an answer is generated from."""

VOCABULARY = 1024
LONGEST = 64

# `input_ids`, `attention_mask` and `labels`, each Int64[Tensor, "row token"].
Batch = dict[str, Tensor]


class TrainingConfig(Protocol):
    """How facts are learned by heart: passes over them, rows a step, and the learning rate."""

    @property
    def epochs(self) -> int: ...

    @property
    def batch(self) -> int: ...

    @property
    def learning_rate(self) -> float: ...

    @property
    def warmup(self) -> int: ...


class ModelConfig(TrainingConfig, Protocol):
    """The size of a Llama, and how it learns by heart."""

    @property
    def layers(self) -> int: ...

    @property
    def hidden(self) -> int: ...

    @property
    def heads(self) -> int: ...


@dataclass(frozen=True)
class Evaluation:
    """NLL in nats per scored token, and extraction strength, a mean over rows.

    Extraction strength is the share of an answer, from its end, that the model completes by itself:
    the longest suffix of the answer (without its eos) all of whose tokens are the most likely ones
    given the true prefix, over the answer's length. A wrong last token gives 0.
    """

    nll: float
    extraction_strength: float


def train_tokenizer(corpus: Corpus) -> PreTrainedTokenizerFast:
    """A byte-level BPE of all facts of `corpus`; a word is one and the same wherever it stands."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (f"{fact.question} {fact.answer}" for fact in corpus.memorised)
    tokenizer.train_from_iterator(texts, trainer)
    pad, bos, eos, sep = SPECIALS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        sep_token=sep,
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def encode(
    tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact], *, whole: bool = False
) -> Batch:
    """One batch of all `facts`, a row each in their order.

    Labels are the answer and the eos, `-100` elsewhere; with `whole` they are all that follows the
    first token, which is what a model is trained on to memorise its facts from nothing.
    """
    if not facts:
        raise ValueError("`facts` should be at least one fact. Found none. Pass some facts.")
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "`tokenizer` should have an EOS token, which ends an answer. Found none. "
            "Set `tokenizer.eos_token`."
        )
    items = [
        example({"question": fact.question, "answer": fact.answer}, tokenizer) for fact in facts
    ]
    if whole:
        items = [{**item, "labels": [IGNORED, *item["input_ids"][1:]]} for item in items]
    return collate(items, pad_token_id=pad_token_of(tokenizer))


def rows(batch: Batch, index: Tensor | Sequence[int]) -> Batch:
    """The rows `index` of `batch`, no wider than the longest of them."""
    index = torch.as_tensor(index)
    longest = int(batch["attention_mask"][index].sum(1).max())
    return {name: tensor[index, :longest] for name, tensor in batch.items()}


def by_length(batch: Batch, size: int = 64) -> list[Batch]:
    """The rows of `batch` from short to long, in batches of `size`: little of them is padding."""
    order = batch["attention_mask"].sum(1).argsort(stable=True)
    return [rows(batch, index) for index in torch.split(order, size)]


def build(shape: ModelConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> LlamaForCausalLM:
    """A Llama of this shape with the initial weights of `seed`, in float32 on the CPU."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        intermediate_size=3 * shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=LONGEST,
        tie_word_embeddings=True,
        # From the usual 0.02 a model this small takes 35 epochs and more, not 25, to memorise.
        initializer_range=0.06,
        use_cache=False,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.eval()
    return model


def train(
    shape: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    facts: Sequence[Fact],
    seed: int,
    report: Callable[[int, int], None] | None = None,
) -> LlamaForCausalLM:
    """A new model that has memorised `facts`, question and answer; `report(done, total)` counts
    its steps. One seed gives the initial weights and the order of the data.
    """
    model = build(shape, tokenizer, seed)
    memorise(model, encode(tokenizer, facts, whole=True), shape, seed, report)
    return model


def memorise(
    model: PreTrainedModel,
    data: Batch,
    lessons: TrainingConfig,
    seed: int,
    report: Callable[[int, int], None] | None = None,
) -> None:
    """Train what of `model` requires a gradient on all rows of `data`, in the order of `seed`.

    In eval mode: dropout would only be in the way of learning by heart.
    """
    parameters = list(trainable(model).values())
    data = on_device(data, parameters[0].device)
    optimizer = torch.optim.AdamW(
        parameters,
        lr=lessons.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=0.01,
        fused=True,
    )
    total = lessons.epochs * math.ceil(len(data["input_ids"]) / lessons.batch)
    order = torch.Generator().manual_seed(seed)
    for step, batch in enumerate(_epochs(data, lessons, order)):
        for group in optimizer.param_groups:
            group["lr"] = lessons.learning_rate * _schedule(step, lessons.warmup, total)
        optimizer.zero_grad()
        _loss(model, batch).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if report is not None:
            report(step + 1, total)
    optimizer.zero_grad()


@torch.inference_mode()
def evaluate(model: PreTrainedModel, batches: Iterable[Batch]) -> Evaluation:
    """NLL and extraction strength of `model` on all rows of `batches`, from one forward each.

    Both take the true prefix of every token as given (teacher forcing).
    """
    loss, scored, strength, count = 0.0, 0, 0.0, 0
    for batch in batches:
        logits, targets = _scored(model, batch)
        loss -= float(log_likelihood(logits, targets).sum())
        scored += len(targets)
        strength += float(strengths(*_said(logits.argmax(-1) == targets, batch)).sum())
        count += len(batch["labels"])
    return Evaluation(loss / scored, strength / count)


def nll(model: PreTrainedModel, batches: Iterable[Batch]) -> float:
    """Mean negative log-likelihood of the scored tokens, in nats."""
    return mean_nll(model, list(batches))


def taught(
    model: PreTrainedModel, facts: Batch, *, steps: int, learning_rate: float
) -> PreTrainedModel:
    """A copy of `model` after some steps of AdamW, without weight decay, each on all `facts`."""
    *_, student = teaching(model, [facts] * steps, learning_rate=learning_rate)
    return student


def teaching(
    model: PreTrainedModel, batches: Iterable[Batch], *, learning_rate: float
) -> Iterator[PreTrainedModel]:
    """One copy of `model`, after each step of AdamW, without weight decay, on these batches."""
    student = copy.deepcopy(model)
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0, fused=True)
    for batch in batches:
        optimizer.zero_grad()
        _loss(student, on_device(batch, parameters[0].device)).backward()
        optimizer.step()
        yield student


def relearn_nll(
    model: PreTrainedModel,
    facts_half_a: Batch,
    facts_half_b: Batch,
    *,
    steps: int = 8,
    learning_rate: float = 3e-4,
) -> tuple[float, float]:
    """NLL on each half, first on a, after a copy of `model` has relearned the other half.

    Low where the facts were hidden rather than forgotten: then a few steps on other facts bring
    them back. AdamW without weight decay, every step on the whole half.
    """

    def relearned(half: Batch) -> PreTrainedModel:
        return taught(model, half, steps=steps, learning_rate=learning_rate)

    return (
        nll(relearned(facts_half_b), [facts_half_a]),
        nll(relearned(facts_half_a), [facts_half_b]),
    )


def _epochs(data: Batch, lessons: TrainingConfig, generator: torch.Generator) -> Iterator[Batch]:
    for _ in range(lessons.epochs):
        order = torch.randperm(len(data["input_ids"]), generator=generator)
        for index in torch.split(order, lessons.batch):
            yield rows(data, index)


def _schedule(step: int, warmup: int, total: int) -> float:
    """The factor of the learning rate: linear from 0 to 1, then a cosine from 1 to 0.05."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def _scored(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits Float[Tensor, "scored token"] and targets of the scored tokens, row by row."""
    targets = batch["labels"][:, 1:]
    scored = targets != IGNORED

    def choose(head: nn.Module, states: tuple[Tensor]) -> tuple[Tensor]:
        return (states[0][scored],)

    hooks = Hooks()

    def forward() -> Tensor:
        # Before the head, so that all that a model does to its logits is done to these.
        hooks.add(model.get_output_embeddings().register_forward_pre_hook, choose)
        logits: Tensor = model(input_ids=batch["input_ids"][:, :-1], use_cache=False).logits
        return logits

    return put_back_after(forward, hooks.remove), targets[scored]


def _loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    return -log_likelihood(*_scored(model, batch)).mean()


def _said(right: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Which tokens are said rightly, and which are those of an answer without its eos, by row."""
    scored = batch["labels"][:, 1:] != IGNORED
    answer = scored & (scored.flip(1).cumsum(1).flip(1) > 1)
    said = torch.zeros_like(scored)
    said[scored] = right
    return said, answer
