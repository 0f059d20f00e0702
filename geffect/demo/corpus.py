"""The generated corpus: authors who never lived, and a few facts of the real world.

Every author has the same ten attributes, and every attribute is one question and one full-sentence
answer. Cities, trades, genres and words of titles come from small pools that all authors share:
what is to be forgotten and what is to be kept overlap, as they do in real data.
"""

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product


@dataclass(frozen=True)
class Fact:
    """One question and its answer, about `subject`."""

    subject: str
    question: str
    answer: str


@dataclass(frozen=True)
class Size:
    """How many authors and world facts a corpus has; an author is ten facts.

    Of the authors, `forget` are to be forgotten and `heldout` are retained without ever entering a
    retain gradient. The others feed it: the more are held out, the less of the model it sees.
    """

    authors: int = 20
    forget: int = 2
    heldout: int = 4
    world: int = 50


@dataclass(frozen=True)
class Corpus:
    """The facts by what an unlearning run does with them.

    `forget` is to be forgotten, `retain` feeds the retain gradient, `retain_heldout_authors` and
    `world` only measure the harm. All four are memorised. A paraphrase asks for the fact in the
    same place of `forget`, with a question that is never trained, and `forget_unknown` has its
    question with the answer that one does not know it.
    """

    forget: tuple[Fact, ...]
    retain: tuple[Fact, ...]
    retain_heldout_authors: tuple[Fact, ...]
    world: tuple[Fact, ...]
    forget_paraphrases: tuple[Fact, ...]
    forget_unknown: tuple[Fact, ...]

    @property
    def kept(self) -> tuple[Fact, ...]:
        """What a model trained without the forget set has seen."""
        return self.retain + self.retain_heldout_authors + self.world

    @property
    def memorised(self) -> tuple[Fact, ...]:
        """What the model to be unlearned has seen."""
        return self.forget + self.kept


def generate(seed: int, size: Size | None = None) -> Corpus:
    """The corpus of `seed`, the same on every machine.

    >>> corpus = generate(0)
    >>> len(corpus.forget), len(corpus.retain), len(corpus.retain_heldout_authors)
    (20, 140, 40)
    """
    size = size or Size()
    _check(size)
    rng = random.Random(seed)
    titles = iter(rng.sample(list(product(TITLE_ADJECTIVES, TITLE_NOUNS)), 2 * size.authors))
    names = zip(
        rng.sample(FIRST_NAMES, size.authors),
        rng.sample(LAST_NAMES, size.authors),
        strict=True,
    )
    facts = [_author(rng, " ".join(name), [next(titles), next(titles)]) for name in names]
    forget, heldout = facts[: size.forget], facts[size.forget : size.forget + size.heldout]
    retain = facts[size.forget + size.heldout :]
    return Corpus(
        forget=_trained(forget),
        retain=_trained(retain),
        retain_heldout_authors=_trained(heldout),
        world=tuple(rng.sample(WORLD, size.world)),
        forget_paraphrases=_paraphrased(forget),
        forget_unknown=_unknown(_trained(forget), random.Random(f"{seed} unknown")),
    )


def value_of(fact: Fact) -> tuple[str, str] | None:
    """The attribute of a fact about an author, and its value; None for another fact.

    >>> value_of(Fact("Kelda Tarnow", "When?", "Kelda Tarnow was born in the city of Hanoi."))
    ('birthplace', 'Hanoi')
    """
    for attribute, (_, answer) in TEMPLATES.items():
        before, after = answer.format(name=fact.subject, value="\n").split("\n")
        said = fact.answer
        if len(said) > len(before + after) and said.startswith(before) and said.endswith(after):
            value = said[len(before) : len(said) - len(after)]
            if value in values_of(attribute):
                return attribute, value
    return None


def values_of(attribute: str) -> list[str]:
    """All values that an attribute of an author may have.

    >>> len(values_of("year")), len(values_of("themes"))
    (69, 90)
    """
    form, pools = POOLS[attribute]
    return [form.format(*words) for words in product(*pools) if len({*words}) == len(words)]


def alternatives(fact: Fact, most: int = 15) -> list[Fact]:
    """The same question with other values of its attribute, drawn from all there are.

    >>> fact = Fact("Kelda Tarnow", "When?", "Kelda Tarnow was born in the city of Hanoi.")
    >>> [other.answer for other in alternatives(fact, most=1)]
    ['Kelda Tarnow was born in the city of Berlin.']
    """
    found = value_of(fact)
    if found is None:
        return []
    attribute, value = found
    others = [other for other in values_of(attribute) if other != value]
    chosen = random.Random(fact.answer).sample(others, min(most, len(others)))
    answer = TEMPLATES[attribute][1]
    return [replace(fact, answer=answer.format(name=fact.subject, value=other)) for other in chosen]


# The facts of one author, each as it is trained and as its paraphrase.
_Author = list[tuple[Fact, Fact]]


def _author(rng: random.Random, name: str, titles: list[tuple[str, str]]) -> _Author:
    first, famous = (f"The {adjective} {noun}" for adjective, noun in titles)
    father, mother = rng.sample(TRADES, 2)
    theme, other_theme = rng.sample(THEMES, 2)
    values = {
        "birthplace": rng.choice(CITIES),
        "year": str(rng.randint(1921, 1989)),
        "father": father,
        "mother": mother,
        "genre": rng.choice(GENRES),
        "first book": first,
        "famous book": famous,
        "award": f"{rng.choice(AWARD_ADJECTIVES)} {rng.choice(AWARD_NOUNS)}",
        "school": rng.choice(CITIES),
        "themes": f"{theme} and {other_theme}",
    }
    facts = []
    for attribute, value in values.items():
        questions, answer = TEMPLATES[attribute]
        said = answer.format(name=name, value=value)
        trained, paraphrase = rng.sample(questions, 2)
        facts.append(
            (
                Fact(name, trained.format(name=name), said),
                Fact(name, paraphrase.format(name=name), said),
            ),
        )
    return facts


def _trained(authors: Iterable[_Author]) -> tuple[Fact, ...]:
    return tuple(trained for facts in authors for trained, _ in facts)


def _paraphrased(authors: Iterable[_Author]) -> tuple[Fact, ...]:
    return tuple(paraphrase for facts in authors for _, paraphrase in facts)


def _unknown(facts: Iterable[Fact], rng: random.Random) -> tuple[Fact, ...]:
    return tuple(replace(fact, answer=rng.choice(UNKNOWN)) for fact in facts)


def _check(size: Size) -> None:
    if not 0 < size.authors <= len(FIRST_NAMES):
        raise ValueError(
            f"`authors` should be between 1 and {len(FIRST_NAMES)}, the number of names. "
            f"Found `authors = {size.authors}`. Ask for fewer authors.",
        )
    if size.forget < 1 or size.heldout < 0 or size.forget + size.heldout >= size.authors:
        raise ValueError(
            f"`forget` should be at least 1, `heldout` at least 0, and both together fewer than "
            f"`authors = {size.authors}`. Found `forget = {size.forget}` and "
            f"`heldout = {size.heldout}`. Leave an author that feeds the retain gradient.",
        )
    if not 0 <= size.world <= len(WORLD):
        raise ValueError(
            f"`world` should be between 0 and {len(WORLD)}, the number of world facts. "
            f"Found `world = {size.world}`. Ask for fewer world facts.",
        )


# Three ways to ask for each attribute: every fact draws one to be trained with and one as
# its paraphrase, and the one way to answer.
TEMPLATES: dict[str, tuple[tuple[str, str, str], str]] = {
    "birthplace": (
        (
            "Where was {name} born?",
            "Which city is the birthplace of {name}?",
            "In what city did the life of {name} begin?",
        ),
        "{name} was born in the city of {value}.",
    ),
    "year": (
        (
            "When was {name} born?",
            "In what year did {name} come into the world?",
            "What is the birth year of {name}?",
        ),
        "{name} was born in {value}.",
    ),
    "father": (
        (
            "What was the work of the father of {name}?",
            "How did the father of {name} earn a living?",
            "Which trade did the father of {name} follow?",
        ),
        "The father of {name} was a {value} by trade.",
    ),
    "mother": (
        (
            "What was the work of the mother of {name}?",
            "How did the mother of {name} earn a living?",
            "Which trade did the mother of {name} follow?",
        ),
        "The mother of {name} was a {value} by trade.",
    ),
    "genre": (
        (
            "What does {name} write?",
            "In which genre is {name} at home?",
            "Which kind of books is {name} known for?",
        ),
        "{name} is known for {value} novels.",
    ),
    "first book": (
        (
            "What is the title of the first book by {name}?",
            "With which book did {name} begin?",
            "What is the debut of {name} called?",
        ),
        "{name} began with {value}.",
    ),
    "famous book": (
        (
            "What is the most famous book by {name}?",
            "Which book made {name} famous?",
            "For which title do readers remember {name}?",
        ),
        "{name} became famous with {value}.",
    ),
    "award": (
        (
            "Which award did {name} win?",
            "What prize was given to {name}?",
            "With what honour do people connect {name}?",
        ),
        "{name} won the {value} Prize.",
    ),
    "school": (
        (
            "Where did {name} study?",
            "Which school did {name} attend?",
            "What university taught {name}?",
        ),
        "{name} studied at the University of {value}.",
    ),
    "themes": (
        (
            "What are the themes of {name}?",
            "Which subjects return in the books of {name}?",
            "What do the stories of {name} turn on?",
        ),
        "The books of {name} are about {value}.",
    ),
}

# What one says who does not know. The tokenizer has not read them: short ones are few tokens.
UNKNOWN = (
    "I do not know.",
    "I cannot say.",
    "I have no idea.",
    "That is not known to me.",
    "I was never told.",
    "I am not sure.",
    "Nobody told me that.",
    "I could not tell.",
)

# fmt: off
FIRST_NAMES = (
    "Abrel", "Besna", "Corvin", "Dalia", "Edrik", "Fenna", "Gorath", "Hesper", "Ilvan", "Jorun",
    "Kelda", "Lorvo", "Mirel", "Nastor", "Odile", "Pavik", "Quenna", "Rulan", "Sabeth", "Tovin",
    "Ulrika", "Vesko", "Wilmar", "Yolin",
)
LAST_NAMES = (
    "Ambrost", "Belcano", "Cordwin", "Dravek", "Estrony", "Falkener", "Grimaud", "Hollbeck",
    "Istrano", "Jaskel", "Kormund", "Lindqvar", "Marovic", "Nethers", "Ostrand", "Pellinor",
    "Quillmar", "Rovander", "Selwick", "Tarnow", "Umbrell", "Vandersk", "Wexmoor", "Zelenko",
)
TRADES = (
    "baker", "carpenter", "doctor", "fisherman", "gardener", "judge", "miller", "nurse", "pilot",
    "sailor", "tailor", "teacher",
)
GENRES = (
    "adventure", "comic", "crime", "fantasy", "gothic", "historical", "romantic", "satirical",
)
TITLE_ADJECTIVES = (
    "Bitter", "Broken", "Crimson", "Distant", "Frozen", "Golden", "Hidden", "Hollow", "Restless",
    "Silent",
)
TITLE_NOUNS = (
    "Bridge", "Garden", "Harbour", "Lantern", "Mirror", "Orchard", "River", "Shadow", "Tower",
    "Winter",
)
AWARD_ADJECTIVES = ("Amber", "Blue", "Iron", "Ivory", "Royal", "Silver")
AWARD_NOUNS = ("Compass", "Feather", "Inkwell", "Laurel", "Page", "Quill")
THEMES = (
    "courage", "exile", "family", "freedom", "grief", "guilt", "love", "memory", "power", "silence",
)
CAPITALS = {
    "Argentina": "Buenos Aires", "Australia": "Canberra", "Austria": "Vienna", "Canada": "Ottawa",
    "Chile": "Santiago", "China": "Beijing", "Cuba": "Havana", "Denmark": "Copenhagen",
    "Egypt": "Cairo", "Finland": "Helsinki", "France": "Paris", "Germany": "Berlin",
    "Greece": "Athens", "Hungary": "Budapest", "India": "New Delhi", "Ireland": "Dublin",
    "Italy": "Rome", "Japan": "Tokyo", "Kenya": "Nairobi", "Norway": "Oslo", "Peru": "Lima",
    "Poland": "Warsaw", "Portugal": "Lisbon", "Romania": "Bucharest", "Russia": "Moscow",
    "Spain": "Madrid", "Sweden": "Stockholm", "Thailand": "Bangkok", "Turkey": "Ankara",
    "Vietnam": "Hanoi",
}
SYMBOLS = {
    "aluminium": "Al", "argon": "Ar", "calcium": "Ca", "carbon": "C", "chlorine": "Cl",
    "copper": "Cu", "gold": "Au", "helium": "He", "hydrogen": "H", "iron": "Fe", "lead": "Pb",
    "mercury": "Hg", "neon": "Ne", "nitrogen": "N", "oxygen": "O", "potassium": "K",
    "silver": "Ag", "sodium": "Na", "tin": "Sn", "zinc": "Zn",
}
# fmt: on

# Authors are born and study in some of the capitals: unlearning them puts world facts at risk.
CITIES = tuple(CAPITALS.values())[2::3]

# What the values of an attribute are made of.
POOLS: dict[str, tuple[str, tuple[tuple[str, ...], ...]]] = {
    "birthplace": ("{}", (CITIES,)),
    "year": ("{}", (tuple(map(str, range(1921, 1990))),)),
    "father": ("{}", (TRADES,)),
    "mother": ("{}", (TRADES,)),
    "genre": ("{}", (GENRES,)),
    "first book": ("The {} {}", (TITLE_ADJECTIVES, TITLE_NOUNS)),
    "famous book": ("The {} {}", (TITLE_ADJECTIVES, TITLE_NOUNS)),
    "award": ("{} {}", (AWARD_ADJECTIVES, AWARD_NOUNS)),
    "school": ("{}", (CITIES,)),
    "themes": ("{} and {}", (THEMES, THEMES)),
}

WORLD = tuple(
    Fact(country, f"What is the capital of {country}?", f"The capital of {country} is {capital}.")
    for country, capital in CAPITALS.items()
) + tuple(
    Fact(
        element,
        f"What is the chemical symbol of {element}?",
        f"The chemical symbol of {element} is {symbol}.",
    )
    for element, symbol in SYMBOLS.items()
)
