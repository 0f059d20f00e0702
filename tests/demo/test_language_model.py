import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from geffect.checkpoints.estimators import full
from geffect.checkpoints.replay import replay
from geffect.data.collate import collate
from geffect.data.examples import read
from geffect.demo.config import FULL, QUICK, EmbeddedConfig
from geffect.demo.corpus import Corpus, Fact, Size, generate
from geffect.demo.language_model import (
    BOS,
    EOS,
    IGNORED,
    PAD,
    SEP,
    VOCABULARY,
    Batch,
    build,
    by_length,
    encode,
    evaluate,
    nll,
    relearn_nll,
    rows,
    train,
    train_tokenizer,
)
from tests.utils.chat import written
from tests.utils.trainers import same

TINY = EmbeddedConfig(
    corpus=Size(authors=3, forget=1, heldout=1, world=4),
    layers=2,
    hidden=48,
    heads=2,
    epochs=32,
    batch=8,
    learning_rate=8e-3,
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return generate(0, TINY.corpus)


@pytest.fixture(scope="module")
def tokenizer(corpus: Corpus) -> PreTrainedTokenizerBase:
    return train_tokenizer(corpus)


@pytest.fixture(scope="module")
def memorised(corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    return train(TINY, tokenizer, corpus.memorised, seed=0)


@pytest.fixture(scope="module")
def gold(corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    return train(TINY, tokenizer, corpus.kept, seed=0)


class Oracle(nn.Module):
    """Predicts `predicted[row, token]` at every token of one batch, whatever it is shown."""

    def __init__(self, predicted: Tensor) -> None:
        super().__init__()
        self.predicted = predicted
        self.head = nn.Identity()

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, **_: object) -> SimpleNamespace:
        logits = nn.functional.one_hot(self.predicted, VOCABULARY).float() * 50
        return SimpleNamespace(logits=self.head(logits[:, : input_ids.shape[1]]))


def oracle(batch: Batch, *, wrong: list[tuple[int, int]] = ()) -> LlamaForCausalLM:  # type: ignore[assignment]
    """Predicts all labels of `batch`, but not the n-th of a row for `(row, n)` in `wrong`."""
    following = batch["input_ids"].roll(-1, dims=1)
    for row, n in wrong:
        token = (batch["labels"][row] != IGNORED).nonzero()[n]
        following[row, token - 1] += 1
    return cast(LlamaForCausalLM, Oracle(following))


def ids_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text, and no special ones."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def naive(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, facts: tuple[Fact, ...]
) -> list[float]:
    """NLL and extraction strength token by token, each from its own unpadded prefix."""
    losses, strengths = [], []
    for fact in facts:
        prefix = [BOS, *ids_of(tokenizer, fact.question), SEP]
        right = []
        for token in [*ids_of(tokenizer, fact.answer), EOS]:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prefix])).logits[0, -1].double()
            losses.append(float(logits.logsumexp(0) - logits[token]))
            right.append(int(logits.argmax()) == token)
            prefix.append(token)
        answer = right[:-1]
        completed = 0
        while completed < len(answer) and answer[-1 - completed]:
            completed += 1
        strengths.append(completed / len(answer))
    return [sum(losses) / len(losses), sum(strengths) / len(strengths)]


def test_full_model_has_its_size() -> None:
    tokenizer = train_tokenizer(generate(0))
    assert len(tokenizer) == VOCABULARY == 1024
    assert build(FULL, tokenizer, 0).num_parameters() == 818_400
    lengths = encode(tokenizer, generate(0).memorised)["attention_mask"].sum(1)
    assert lengths.max() < 32


def test_tokenizer_gives_back_every_text(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase
) -> None:
    texts = [fact.question for fact in corpus.forget_paraphrases + corpus.retain]
    for text in [*texts, "Zoë wrote “Ærø” in 漢字."]:
        ids = ids_of(tokenizer, text)
        assert min(ids) > max(PAD, BOS, EOS, SEP)
        assert tokenizer.decode(ids).removeprefix(" ") == text


def test_tokenizer_is_the_same_each_time(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase
) -> None:
    assert train_tokenizer(corpus).get_vocab() == tokenizer.get_vocab()


def test_row_is_question_then_answer(corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> None:
    batch = encode(tokenizer, corpus.forget)
    for fact, ids, mask in zip(
        corpus.forget,
        batch["input_ids"].tolist(),
        batch["attention_mask"].tolist(),
        strict=True,
    ):
        real, padding = ids[: sum(mask)], ids[sum(mask) :]
        assert mask == [1] * len(real) + [0] * len(padding)
        assert (real[0], real[-1], set(padding) - {PAD}) == (BOS, EOS, set())
        between = real.index(SEP)
        assert tokenizer.decode(real[1:between]).strip() == fact.question
        assert tokenizer.decode(real[between + 1 : -1]).strip() == fact.answer


def test_tokens_are_those_of_the_prompt_and_then_of_the_answer(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Rendered and tokenized at once they are what a model generates after its prompt, and eos."""
    everything = generate(0)
    facts = [*everything.memorised, *everything.forget_paraphrases]
    batch = encode(tokenizer, facts)
    for fact, ids, labels in zip(facts, batch["input_ids"], batch["labels"], strict=True):
        asked = [{"role": "user", "content": fact.question}]
        prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        assert prompt == f"<bos>{fact.question}<sep>"
        before = ids_of(tokenizer, prompt)
        after = [*ids_of(tokenizer, fact.answer), EOS]
        missing = len(ids) - len(before) - len(after)
        assert ids.tolist() == [*before, *after, *[PAD] * missing]
        assert labels.tolist() == [*[IGNORED] * len(before), *after, *[IGNORED] * missing]


def test_the_template_renders_a_talk(tokenizer: PreTrainedTokenizerBase) -> None:
    talk = [
        {"role": role, "content": content}
        for role, content in [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    ]
    assert tokenizer.apply_chat_template(talk, tokenize=False) == "<bos>a<sep>b<eos>c<sep>d<eos>"


def test_checkpoints_are_replayed_with_questions_and_answers_from_a_file(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = build(TINY, tokenizer, 0)
    model.save_pretrained(tmp_path / "checkpoint-1")
    tokenizer.save_pretrained(tmp_path / "checkpoint-1")
    files = {
        name: written(
            tmp_path / f"{name}.jsonl",
            *({"question": fact.question, "answer": fact.answer} for fact in facts),
        )
        for name, facts in {"forget": corpus.forget, "retain": corpus.retain}.items()
    }
    shown: dict[str, str] = {}
    run = replay(
        tmp_path / "checkpoint-1",
        tmp_path / "run.h5",
        objective={"forget": -1.0},
        **files,
        estimator=full,
        show=lambda name, text: shown.update({name: text}),
    )
    first = corpus.forget[0]
    assert shown["forget"] == f"<bos> {first.question}<sep>[[ {first.answer}<eos>]]"
    # What the study trains on, and nothing else.
    read_again = read(files["forget"], tokenizer)
    batch = encode(tokenizer, corpus.forget)
    assert same(collate(read_again, pad_token_id=PAD), batch)
    losses = run.losses()
    for name, facts in (("forget", corpus.forget), ("retain", corpus.retain)):
        expected, _ = naive(model, tokenizer, facts)
        assert losses[name][0] == pytest.approx(expected, rel=1e-5)


def test_labels_are_answer_and_eos(corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> None:
    batch = encode(tokenizer, corpus.retain)
    for fact, labels in zip(corpus.retain, batch["labels"], strict=True):
        scored = labels[labels != IGNORED].tolist()
        assert scored[-1] == EOS
        assert tokenizer.decode(scored[:-1]).strip() == fact.answer
    assert torch.equal(
        batch["labels"][batch["labels"] != IGNORED],
        batch["input_ids"][batch["labels"] != IGNORED],
    )


def test_whole_labels_are_all_but_bos_and_padding(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase
) -> None:
    batch = encode(tokenizer, corpus.retain, whole=True)
    expected = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
    expected[:, 0] = IGNORED
    assert torch.equal(batch["labels"], expected)


def test_no_facts_are_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match=r"`facts` should be .* Found none"):
        encode(tokenizer, [])


def test_rows_are_no_wider_than_needed(corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> None:
    batch = encode(tokenizer, corpus.memorised)
    chosen = rows(batch, [3, 1])
    alone = encode(tokenizer, [corpus.memorised[3], corpus.memorised[1]])
    assert all(torch.equal(chosen[name], alone[name]) for name in batch)
    parts = by_length(batch, 5)
    assert [len(part["labels"]) for part in parts] == [5] * 6 + [4]
    widths = [part["input_ids"].shape[1] for part in parts]
    assert widths == sorted(widths)
    assert sum(int(part["input_ids"].sum()) for part in parts) == batch["input_ids"].sum()


def test_measures_equal_a_loop_over_tokens(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    gold: LlamaForCausalLM,
) -> None:
    batches = by_length(encode(tokenizer, corpus.forget), 4)
    found = evaluate(gold, batches)
    expected = naive(gold, tokenizer, corpus.forget)
    assert [found.nll, found.extraction_strength] == pytest.approx(expected, rel=1e-5)
    assert 0 < found.extraction_strength < 1
    assert nll(gold, batches) == pytest.approx(found.nll, rel=1e-6)


def test_nll_is_that_of_the_masked_forward(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    gold: LlamaForCausalLM,
) -> None:
    batch = encode(tokenizer, corpus.forget)
    with torch.no_grad():
        logits = gold(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    loss = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1),
        batch["labels"][:, 1:].flatten(),
    )
    assert nll(gold, [batch]) == pytest.approx(float(loss), rel=1e-5)


def test_padding_changes_nothing(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    gold: LlamaForCausalLM,
) -> None:
    batch = encode(tokenizer, corpus.forget)
    fill = {"input_ids": PAD, "attention_mask": 0, "labels": IGNORED}
    wide = {
        name: nn.functional.pad(tensor, (0, 9), value=fill[name]) for name, tensor in batch.items()
    }
    assert nll(gold, [wide]) == pytest.approx(nll(gold, [batch]), rel=1e-6)
    assert strength(gold, wide) == strength(gold, batch)


def strength(model: LlamaForCausalLM, batch: Batch) -> float:
    return evaluate(model, [batch]).extraction_strength


def test_extraction_strength_counts_from_the_end(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase
) -> None:
    batch = encode(tokenizer, corpus.forget[:2])
    length = int((batch["labels"][0] != IGNORED).sum()) - 1
    assert strength(oracle(batch), batch) == 1
    assert nll(oracle(batch), [batch]) < 1e-6
    last, eos = length - 1, length
    for wrong, expected in (
        ([last], 0.0),
        ([last, 0], 0.0),
        ([eos], 1.0),
        ([0], (length - 1) / length),
        ([0, length - 3], 2 / length),
    ):
        model = oracle(batch, wrong=[(0, n) for n in wrong])
        assert strength(model, batch) == pytest.approx((expected + 1) / 2)


def test_the_model_memorises_and_gold_does_not_know(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    memorised: LlamaForCausalLM,
    gold: LlamaForCausalLM,
) -> None:
    forget, kept = encode(tokenizer, corpus.forget), encode(tokenizer, corpus.kept)
    assert nll(memorised, [forget]) < 0.1
    assert nll(memorised, [kept]) < 0.1
    assert nll(gold, [kept]) < 0.1
    assert nll(gold, [forget]) > 1.5
    assert strength(memorised, forget) > 0.9
    assert strength(gold, forget) < 0.5


def test_training_is_bitwise_the_same(corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> None:
    recipe = replace(TINY, epochs=2)

    def weights(seed: int, noise: int) -> Tensor:
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        model = train(recipe, tokenizer, corpus.memorised, seed)
        assert torch.equal(torch.get_rng_state(), before)
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    assert torch.equal(weights(3, noise=1), weights(3, noise=2))
    assert not torch.equal(weights(3, noise=1), weights(4, noise=1))


def test_training_reports_every_step(corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> None:
    steps: list[tuple[int, int]] = []
    recipe = replace(TINY, epochs=2)
    model = train(recipe, tokenizer, corpus.kept, 0, lambda *step: steps.append(step))
    total = 2 * math.ceil(len(corpus.kept) / recipe.batch)
    assert steps == [(step, total) for step in range(1, total + 1)]
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_relearning_is_a_plain_loop_on_a_copy(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    gold: LlamaForCausalLM,
) -> None:
    half_a = encode(tokenizer, corpus.forget[::2])
    half_b = encode(tokenizer, corpus.forget[1::2])
    weights = copy.deepcopy(gold.state_dict())
    on_a, on_b = relearn_nll(gold, half_a, half_b)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in gold.state_dict().items())

    student = copy.deepcopy(gold)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-4, weight_decay=0.0)
    for _ in range(8):
        optimizer.zero_grad()
        logits = student(half_b["input_ids"], attention_mask=half_b["attention_mask"]).logits
        nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1),
            half_b["labels"][:, 1:].flatten(),
        ).backward()
        optimizer.step()
    assert on_a == pytest.approx(nll(student, [half_a]), rel=1e-3)
    assert on_a < nll(gold, [half_a])
    assert on_b < nll(gold, [half_b])


def test_quick_is_smaller_than_full() -> None:
    def steps(recipe: EmbeddedConfig) -> int:
        facts = len(generate(0, recipe.corpus).memorised)
        return recipe.epochs * math.ceil(facts / recipe.batch)

    assert QUICK.corpus.authors < FULL.corpus.authors
    assert QUICK.layers < FULL.layers
    assert steps(QUICK) < steps(FULL)
