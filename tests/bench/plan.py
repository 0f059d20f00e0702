"""How well `geffect plan` ranks sets by the damage that an unlearning then does.

    python -m tests.bench.plan FOLDER [--configurations N] [--steps K]

FOLDER holds the models of `make study`, `original-seed0` and so on; those that are missing are
trained into it. A configuration is a model, a method and two authors to forget. Its damage is the
rise of the NLL of each of 18 other authors and 5 sets of world facts when the forget NLL is 3, as
the mean over two orders of the data; the probes have two orders of their own. An interrupt ends it
with what there is.
"""

import argparse
import copy
import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata, spearmanr
from torch import Tensor, nn

from geffect.checkpoints.plan import Probe, _damage, _draws, _probed, _ranked
from geffect.data.collate import batched, collate, pad_token_of
from geffect.data.examples import example
from geffect.demo.config import FULL
from geffect.demo.corpus import Corpus, Fact, generate
from geffect.objectives import FrozenModel, SharedForward, named
from geffect.risk import risk_gradient, token_log_probabilities

METHODS = ("ga", "graddiff", "npo+gd", "wga")
LEVEL, RATE, ORDERS, MOST = 3.0, 3e-4, 2, 60
SEEDS = (100, 101)
OWN = "plan"


def subjects(corpus: Corpus) -> tuple[dict[str, list[Fact]], dict[str, list[Fact]]]:
    """The facts of each author, and those of the world in fives."""
    authors: dict[str, list[Fact]] = {}
    for fact in (*corpus.forget, *corpus.retain, *corpus.retain_heldout_authors):
        authors.setdefault(fact.subject, []).append(fact)
    world = {f"world {i}": list(corpus.world[i::5]) for i in range(5)}
    return authors, world


def embedding(model: Any, items: Sequence[Any], pad: int) -> Tensor:
    """The mean last hidden state of a set."""
    with torch.no_grad():
        batch = collate(items, pad_token_id=pad)
        states = model.model(batch["input_ids"], attention_mask=batch["attention_mask"])[0]
        mask = batch["attention_mask"][..., None]
        mean: Tensor = (states * mask).sum(dim=(0, 1)) / mask.sum()
    return mean


def nlls(model: Any, sets: Mapping[str, Sequence[Any]], pad: int) -> np.ndarray:
    """The NLL of each set, from batches of all of them."""
    items = [item for own in sets.values() for item in own]
    of = np.repeat(np.arange(len(sets)), [len(own) for own in sets.values()])
    sums, counts = np.zeros(len(sets)), np.zeros(len(sets))
    with torch.no_grad():
        for start in range(0, len(items), 64):
            batch = collate(items[start : start + 64], pad_token_id=pad)
            log_p, scored = token_log_probabilities(model, batch)
            np.add.at(sums, of[start : start + 64], -(log_p * scored).sum(dim=1).double().numpy())
            np.add.at(counts, of[start : start + 64], scored.sum(dim=1).numpy())
    return sums / counts


def damage_of(
    load: Any, method: str, sides: Mapping[str, Any], sets: Mapping[str, Any], pad: int, order: int
) -> np.ndarray:
    """The rise of the NLL of each set where the forget NLL crosses the level."""
    model, original = load(), load()
    objective = named(method).begin(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    draws = _draws(sides, Probe(RATE, batch_size=10), order, pad, torch.device("cpu"))
    first, before = nlls(model, sets, pad), 0.0
    for batch in islice(draws, MOST):
        kept = [p.detach().clone() for p in model.parameters()]
        objective(SharedForward(model), batch, FrozenModel(original)).backward()
        optimizer.step()
        optimizer.zero_grad()
        (now,) = nlls(model, {"forget": sides["forget"]}, pad)
        if now >= LEVEL:
            after = nlls(model, sets, pad)
            with torch.no_grad():
                for p, old in zip(model.parameters(), kept, strict=True):
                    p.copy_(old)
            share = (LEVEL - before) / (now - before)
            found: np.ndarray = (1 - share) * nlls(model, sets, pad) + share * after - first
            return found
        before = now
    raise RuntimeError(f"{method} did not reach {LEVEL} in {MOST} steps")


def predictors(
    load: Any, method: str, sides: Mapping[str, Any], sets: Mapping[str, Any], pad: int, steps: int
) -> Iterator[tuple[str, np.ndarray]]:
    """What each says of the sets; larger for more damage."""
    model = load()
    held = {name: batched(items, 64, pad_token_id=pad) for name, items in sets.items()}
    risks = {name: risk_gradient(model, batches) for name, batches in held.items()}
    static = np.array([risk.loss for risk in risks.values()])
    yield "static NLL", static
    about = embedding(model, sides["forget"], pad)
    likeness = [
        torch.cosine_similarity(about, embedding(model, items, pad), dim=0).item()
        for items in sets.values()
    ]
    yield "embedding", np.array(likeness)
    probe = Probe(RATE, steps=steps, seeds=SEEDS, batch_size=10)
    draws = _draws(sides, probe, SEEDS[0], pad, torch.device("cpu"))
    named(method).begin(model)(SharedForward(model), next(draws), FrozenModel(load())).backward()
    step = [p.grad for p in model.parameters()]
    steepest = [
        -sum(float((g * u).sum()) for g, u in zip(risk.vector, step, strict=True) if g is not None)
        for risk in risks.values()
    ]
    yield "gradients at step 0", np.array(steepest)
    found, rises = [], []
    for seed in SEEDS:
        orders = _draws(sides, probe, seed, pad, torch.device("cpu"))
        probed = _probed(load(), named(method), orders, probe)
        found.append(_damage(model, probed, held))
        rises.append(nlls(probed, sets, pad) - static)
    ranks = {prediction.name: -float(prediction.rank) for prediction in _ranked([*sets], found)}
    yield OWN, np.array([ranks[name] for name in sets])
    yield "measured rise of the probe", rankdata(rises, axis=1).mean(axis=0)
    both = [rankdata(values) for values in ([ranks[name] for name in sets], likeness)]
    yield "plan and embedding", np.mean(both, axis=0)


def main() -> None:
    """Measure, and print a line a predictor."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--configurations", type=int, default=20)
    parser.add_argument("--steps", type=int, default=3)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    correlations: dict[str, list[float]] = {}
    ceiling: list[float] = []
    try:
        for number in range(asked.configurations):
            measure(number, asked, correlations, ceiling)
    except KeyboardInterrupt:
        pass
    count = min(map(len, correlations.values()))
    print(f"{count} configurations, {asked.steps} steps; two runs agree by {np.mean(ceiling):.2f}")
    draw = np.random.default_rng(0)
    picked = draw.integers(count, size=(2000, count))
    for name, values in correlations.items():
        beyond = (np.array(correlations[OWN][:count]) - np.array(values[:count]))[picked]
        low, high = np.quantile(beyond.mean(axis=1), [0.025, 0.975])
        print(
            f"{name:28} {np.mean(values[:count]):6.2f}   {OWN} is {low:+.2f} to {high:+.2f} better"
        )


def measure(
    number: int,
    asked: argparse.Namespace,
    correlations: dict[str, list[float]],
    ceiling: list[float],
) -> None:
    """One configuration."""
    seed, method = number // len(METHODS) % 2, METHODS[number % len(METHODS)]
    folder, corpus = asked.folder / f"original-seed{seed}", generate(seed)
    if not folder.exists():
        FULL.learn(folder, corpus, corpus.memorised, seed, lambda done, total: None)
    original, tokenizer = FULL.load(folder)
    pad = pad_token_of(tokenizer)

    def load() -> nn.Module:
        return copy.deepcopy(original).eval()

    def encoded(facts: Sequence[Fact]) -> list[Any]:
        return [example({"question": f.question, "answer": f.answer}, tokenizer) for f in facts]

    authors, world = subjects(corpus)
    chosen = random.Random(number // len(METHODS)).sample([*authors], 2)
    kept = {name: encoded(facts) for name, facts in authors.items() if name not in chosen}
    sets = kept | {name: encoded(facts) for name, facts in world.items()}
    sides = {
        "forget": [item for name in chosen for item in encoded(authors[name])],
        "retain": [item for items in kept.values() for item in items],
    }
    runs = [damage_of(load, method, sides, sets, pad, order) for order in range(ORDERS)]
    ceiling += [spearmanr(a, b).statistic for a, b in combinations(runs, 2)]
    damage = np.mean(runs, axis=0)
    for name, values in predictors(load, method, sides, sets, pad, asked.steps):
        correlations.setdefault(name, []).append(spearmanr(values, damage).statistic)
    told = {name: round(own[-1], 2) for name, own in correlations.items()}
    print(number, seed, method, told, round(ceiling[-1], 2), flush=True)


if __name__ == "__main__":
    main()
