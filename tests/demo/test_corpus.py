import re
from collections import Counter
from dataclasses import replace

import pytest

from geffect.demo.corpus import (
    CITIES,
    TEMPLATES,
    UNKNOWN,
    WORLD,
    Corpus,
    Fact,
    Size,
    alternatives,
    generate,
    value_of,
    values_of,
)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return generate(0)


def authors(facts: tuple[Fact, ...]) -> set[str]:
    return {fact.subject for fact in facts}


def test_splits_have_their_sizes(corpus: Corpus) -> None:
    assert len(corpus.forget) == len(corpus.forget_paraphrases) == 20
    assert len(corpus.retain) == 140
    assert len(corpus.retain_heldout_authors) == 40
    assert len(corpus.world) == 50
    assert len(corpus.memorised) == 250
    assert len(corpus.kept) == 230


def test_every_author_is_ten_facts_of_one_split(corpus: Corpus) -> None:
    splits = [corpus.forget, corpus.retain, corpus.retain_heldout_authors]
    assert [len(authors(facts)) for facts in splits] == [2, 14, 4]
    counted = Counter(fact.subject for facts in splits for fact in facts)
    assert len(counted) == 20
    assert set(counted.values()) == {10}


def test_nothing_of_the_forget_authors_is_kept(corpus: Corpus) -> None:
    names = [word for author in authors(corpus.forget) for word in author.split()]
    assert len(names) == 4
    for fact in corpus.kept:
        assert not any(name in fact.question + fact.answer for name in names)


def test_forget_and_retain_share_their_words(corpus: Corpus) -> None:
    def words(facts: tuple[Fact, ...]) -> set[str]:
        text = " ".join(fact.answer.replace(fact.subject, "") for fact in facts)
        return set(re.findall("[A-Za-z]+", text))

    assert len(words(corpus.forget) & words(corpus.retain)) > 0.9 * len(words(corpus.forget))
    assert {fact.answer.split()[-1].rstrip(".") for fact in WORLD} >= {
        city.split()[-1] for city in CITIES
    }


@pytest.mark.parametrize("seed", range(5))
def test_paraphrases_ask_for_the_same_in_words_never_trained(seed: int) -> None:
    corpus = generate(seed)
    trained = {fact.question for fact in corpus.memorised}
    assert len(trained) == 250
    for fact, paraphrase in zip(corpus.forget, corpus.forget_paraphrases, strict=True):
        assert paraphrase == replace(fact, question=paraphrase.question)
        assert paraphrase.question not in trained


def test_questions_name_their_attribute_and_author(corpus: Corpus) -> None:
    for index, fact in enumerate(corpus.forget):
        questions, answer = list(TEMPLATES.values())[index % 10]
        assert fact.question in [question.format(name=fact.subject) for question in questions]
        pattern = re.escape(answer).replace(r"\{name\}", fact.subject).replace(r"\{value\}", ".+")
        assert re.fullmatch(pattern, fact.answer)


@pytest.mark.parametrize("seed", range(3))
def test_every_fact_of_an_author_has_a_value_and_others(seed: int) -> None:
    corpus = generate(seed)
    authors = corpus.forget + corpus.retain + corpus.retain_heldout_authors
    for index, fact in enumerate(authors):
        attribute, value = value_of(fact) or ("", "")
        assert attribute == list(TEMPLATES)[index % 10]
        others = alternatives(fact)
        assert len({other.answer for other in others}) == len(others)
        assert len(others) == min(15, len(values_of(attribute)) - 1) >= 7
        for other in others:
            assert other.question == fact.question and other.answer != fact.answer
            found = value_of(other)
            assert found is not None and found[0] == attribute
            assert other.answer == fact.answer.replace(value, found[1])
        assert others == alternatives(fact)
    assert [value_of(fact) for fact in corpus.world] == [None] * len(corpus.world)
    assert alternatives(corpus.world[0]) == []


def test_templates_are_all_different() -> None:
    questions = [question for asked, _ in TEMPLATES.values() for question in asked]
    assert len(set(questions)) == 3 * len(TEMPLATES) == 30


def test_one_seed_is_one_corpus() -> None:
    assert generate(7) == generate(7)
    assert generate(7).forget[0] == Fact(
        "Fenna Jaskel",
        "In what city did the life of Fenna Jaskel begin?",
        "Fenna Jaskel was born in the city of Vienna.",
    )


def test_another_seed_is_another_corpus(corpus: Corpus) -> None:
    other = generate(1)
    assert other.forget != corpus.forget
    assert len({fact.answer for fact in other.retain} & {f.answer for f in corpus.retain}) < 14
    assert sorted(other.world, key=str) == sorted(corpus.world, key=str)


def test_world_facts_are_true() -> None:
    answers = {fact.question: fact.answer for fact in WORLD}
    assert len(answers) == 50
    for question, answer in {
        "What is the capital of Australia?": "The capital of Australia is Canberra.",
        "What is the capital of Turkey?": "The capital of Turkey is Ankara.",
        "What is the chemical symbol of lead?": "The chemical symbol of lead is Pb.",
        "What is the chemical symbol of potassium?": "The chemical symbol of potassium is K.",
    }.items():
        assert answers[question] == answer
    assert sum("capital" in question for question in answers) == 30


def test_more_authors_can_be_held_out() -> None:
    corpus = generate(0, Size(heldout=15))
    assert len(corpus.retain) == 30
    assert len(corpus.retain_heldout_authors) == 150
    assert corpus.forget == generate(0).forget
    assert corpus.retain == generate(0).retain[-30:]
    assert set(corpus.memorised) == set(generate(0).memorised)


@pytest.mark.parametrize(
    ("size", "named"),
    [
        (Size(authors=25), "authors = 25"),
        (Size(authors=6), "heldout = 4"),
        (Size(forget=0), "forget = 0"),
        (Size(world=51), "world = 51"),
    ],
)
def test_an_impossible_size_is_refused(size: Size, named: str) -> None:
    with pytest.raises(ValueError, match=rf"should be .* Found .*`{named}`"):
        generate(0, size)


@pytest.mark.parametrize("seed", range(3))
def test_the_forget_questions_have_an_answer_of_one_who_does_not_know(seed: int) -> None:
    corpus = generate(seed)
    for fact, unknown in zip(corpus.forget, corpus.forget_unknown, strict=True):
        assert unknown == replace(fact, answer=unknown.answer) and unknown.answer in UNKNOWN
    assert len({fact.answer for fact in corpus.forget_unknown}) > 3
    assert generate(seed) == corpus != generate(seed + 1)
