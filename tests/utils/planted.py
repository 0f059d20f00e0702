"""Facts planted in one block of a small Llama, and whether a run of their unlearning finds it.

`python -m tests.utils.planted SEEDS...` trains a Llama of four blocks for each seed, teaches it 20
new facts by training one block alone, on these facts or on these and facts that it knows, unlearns
them for twelve steps by GradDiff, and prints where the run of that places them.
"""

import copy
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from geffect import Recorder, Run, open_run
from geffect.analysis import recommended_layers
from geffect.demo import language_model as lm
from geffect.demo.config import QUICK
from geffect.demo.corpus import Size, generate
from geffect.risk import nll

BLOCKS, STEPS, LEARNED = 4, 12, 0.3
SUBJECT = replace(QUICK, layers=BLOCKS, corpus=Size(authors=10, forget=2, heldout=2, world=12))


def runs(seed: int, folder: Path) -> Iterator[tuple[int, bool, Run]]:
    """For each block, and each way to teach, the run of unlearning what was planted there."""
    corpus = generate(seed, SUBJECT.corpus)
    tokenizer = lm.train_tokenizer(corpus)
    base = lm.train(SUBJECT, tokenizer, corpus.kept, seed).eval()
    sets = {
        name: lm.encode(tokenizer, facts)
        for name, facts in (("forget", corpus.forget), ("retain", corpus.retain))
    }
    for beside in (False, True):
        for block in range(BLOCKS):
            model = planted(base, block, sets, seed, beside=beside)
            path = folder / f"{seed}-{block}-{beside}.h5"
            unlearned(model, sets, seed, path)
            yield block, beside, open_run(path)


def planted(base: Any, block: int, sets: dict[str, Any], seed: int, *, beside: bool) -> Any:
    """The model that has learned the forget set in one block, `beside` what it knows."""
    model = copy.deepcopy(base)
    taught = [*model.model.layers[block].parameters()]
    optimizer = torch.optim.AdamW(taught, lr=3e-3, weight_decay=0.0)
    draw = torch.Generator().manual_seed(seed)
    for step in range(60):
        loss = nll(model, sets["forget"])
        if beside:
            loss = loss + nll(model, _some(sets["retain"], 10, draw))
        model.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 5 == 4 and lm.nll(model, [sets["forget"]]) < LEARNED:
            break
    model.zero_grad()
    return model


def unlearned(model: Any, sets: dict[str, Any], seed: int, path: Path) -> None:
    """Unlearn the forget set and record it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.0)
    draw = torch.Generator().manual_seed(seed + 1)
    with Recorder(model, path, update=True) as recorder:
        for _ in range(STEPS):
            forget, retain = (_some(sets[name], 20, draw) for name in ("forget", "retain"))
            recorder.backward(
                objective={"forget": -1.0, "retain": 1.0},
                forget=lambda batch=forget: nll(model, batch),
                retain=lambda batch=retain: nll(model, batch),
            )
            optimizer.step()
            optimizer.zero_grad()


def _some(batch: Any, count: int, draw: torch.Generator) -> Any:
    return lm.rows(batch, torch.randperm(len(batch["labels"]), generator=draw)[:count])


def main(*seeds: str) -> None:
    """Print, of each score, how often it puts the block first, among two, and above another."""
    found: dict[str, list[tuple[bool, bool, float]]] = {"gain": [], "ratio": [], "learned": []}
    with tempfile.TemporaryDirectory() as folder:
        for seed in map(int, seeds):
            for block, _, run in runs(seed, Path(folder)):
                table = recommended_layers(run, count=2).table.set_index("layer")
                for score, told in found.items():
                    values = table[score][[f"layer {i}" for i in range(BLOCKS)]].to_numpy()
                    above = float((values[block] > np.delete(values, block)).mean())
                    told.append((above == 1, above > 0.5, above))
            print(f"seed {seed}", flush=True)
            for score, told in found.items():
                first, two, auroc = np.mean(told, axis=0)
                print(f"{score}: first {first:.2f}, among two {two:.2f}, AUROC {auroc:.2f}, "
                      f"{len(told)} runs", flush=True)  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
