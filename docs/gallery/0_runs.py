"""
The runs of this gallery
========================

A small model learns three facts about each of eight people by heart. Then it is made to forget
the first person, in four ways. The other pages read the files that are written here. On a CPU
this takes some seconds, and nothing is downloaded.
"""

import copy
import json
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from geffect import Recorder, Rectifier, Requests
from geffect.analysis import instances, tokens
from geffect.audit.depth import DepthProbe
from geffect.audit.quantisers import Int4, Int8
from geffect.audit.relearning import RelearningBudget, curve, nll_of_items, relearning
from geffect.audit.rounding import rounded
from geffect.audit.shares import recoverable_shares
from geffect.effects import direction
from geffect.evaluation import extraction_strength
from geffect.objectives import NPO, FrozenModel, nll
from geffect.plots import tradeoff

torch.set_num_threads(1)  # tensors this small gain nothing from more

# %%
# Facts and batches
# -----------------
# The model reads bytes. Labels are the answers; the questions are not scored.

NAMES = ("Mira", "Jon", "Ada", "Tomas", "Lena", "Omar", "Ines", "Paul")
FACTS = {
    "Born? ": ("Lisbon", "Oslo", "Cairo", "Quito", "Delhi", "Turin", "Perth", "Lagos"),
    "Work? ": ("baker", "pilot", "judge", "nurse", "miner", "actor", "tailor", "clerk"),
    "Pets? ": ("a cat", "two dogs", "none", "a crow", "bees", "a mule", "six hens", "an owl"),
}


def batch(people, *, whole=False):
    """The facts about some people; `whole` scores the questions too."""
    rows = [
        (f"{NAMES[person]}. {question}".encode(), f"{answers[person]}.\n".encode())
        for person in people
        for question, answers in FACTS.items()
    ]
    ids = torch.zeros(len(rows), max(len(q + a) for q, a in rows), dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for row, (question, answer) in enumerate(rows):
        text = torch.tensor(list(question + answer))
        scored = 1 if whole else len(question)
        ids[row, : len(text)] = text
        labels[row, scored : len(text)] = text[scored:]
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}


sets = {"forget": batch([0]), "retain": batch(range(1, 6)), "unseen": batch([6, 7])}

# %%
# A model that has something to lose
# ----------------------------------
# The retrained one never saw what is to be forgotten.


def learned(people):
    """A model that knows the facts about some people by heart."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128, hidden_size=48, intermediate_size=96, num_hidden_layers=4,
            num_attention_heads=4, max_position_embeddings=32, initializer_range=0.06,
            use_cache=False,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(80):
        nll(model, batch(people, whole=True)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


memorised, retrained = learned(range(8)), learned(range(1, 8))


@torch.no_grad()
def measured(model):
    """The risk on each set, in nats per token."""
    return {f"{name}_nll": nll(model, rows).item() for name, rows in sets.items()}


pd.Series(measured(memorised)).round(3).to_frame("before unlearning").T

# %%
# Four runs
# ---------
# Gradient ascent as it is, with GRU, and with GRU on the optimizer's own step; and NPO. A rectifier
# without a rule changes nothing: it keeps the average that the others protect. Every fourth step
# writes what an evaluation would, here how much of the answers can be brought out.

npo, before = NPO(beta=0.5), FrozenModel.copied(memorised)


def ascent(model):
    """Losses of gradient ascent: the objective is minus the forget risk."""
    return {"objective": {"forget": -1.0}, "forget": partial(nll, model, sets["forget"])}


def preference(model):
    """Losses of NPO, whose objective is a loss of its own."""
    objective = partial(npo, model, sets, before)
    return {"objective": objective, "forget": partial(nll, model, sets["forget"])}


def unlearn(name, losses, make_rectifier, steps=20):
    """Record a run in `name`.h5, and return the risks before it and after each of its steps."""
    model = ended[name] = copy.deepcopy(memorised)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, weight_decay=0.0)
    rectifier = make_rectifier(model, optimizer)
    curve = [measured(model)]
    with Recorder(model, f"{name}.h5", update=True, metadata={"method": name}) as recorder:
        for step in range(1, steps + 1):
            retain = partial(nll, model, sets["retain"])
            recorder.backward(**losses(model), retain=retain, rectifier=rectifier)
            optimizer.step()
            optimizer.zero_grad()
            curve.append(measured(model))
            if step % 4 == 0:
                strength = extraction_strength(model, sets["forget"]).mean()
                summary = json.dumps({"extraction_strength": strength})
                Path(f"{name}-{step}.json").write_text(summary, encoding="utf-8")
    return pd.DataFrame(curve).rename_axis("step").reset_index()


def watched(model, optimizer):
    return Rectifier(model, rule=None)


def gru(model, optimizer):
    return Rectifier(model)


def gru_update(model, optimizer):
    return Rectifier(model, space="update", optimizer=optimizer)


ended = {}
curves = [
    unlearn("ga", ascent, watched).assign(method="ga", variant="plain"),
    unlearn("ga-gru", ascent, gru).assign(method="ga", variant="gru"),
    unlearn("ga-gru-update", ascent, gru_update).assign(method="ga", variant="gru-update"),
    unlearn("npo", preference, watched).assign(method="npo", variant="plain"),
]
pd.concat(curves).to_csv("curves.csv", index=False)
tradeoff(pd.concat(curves, ignore_index=True))

# %%
# Samples and tokens
# ------------------
# What unlearning each fact, and each byte of an answer, does to either risk.


class Bytes:
    """A byte is a token."""

    def decode(self, ids, *, skip_special_tokens=False):
        return bytes(ids).decode()


towards = {side: direction(memorised, [sets[side]]) for side in ("forget", "retain")}
everyone = [batch([person]) for person in range(8)]
instances(memorised, everyone, towards, by="model").to_csv("samples.csv", index=False)
tokens(memorised, everyone[:1], towards, Bytes()).to_csv("tokens.csv", index=False)

# %%
# Attacks
# -------
# What brings back what a run has made the model forget, beside a model that never knew.


def items(rows):
    """The samples of a batch, each without its padding."""
    lengths = rows["attention_mask"].sum(dim=1).tolist()
    columns = [rows[name].tolist() for name in ("input_ids", "labels")]
    return [
        {"input_ids": ids[:n], "labels": labels[:n]}
        for ids, labels, n in zip(*columns, lengths, strict=True)
    ]


forget, retain = items(sets["forget"]), items(sets["retain"])
models = {"original": memorised, "retrained": retrained, "unlearned": ended["ga-gru"]}
budget = RelearningBudget(steps=(1, 2, 4, 8), rates=(1.0,), seeds=(0,), sources=("benign",))
probe = DepthProbe(memorised, forget, ends=())
relearned, depths, attacked = [], [], {}
for name, model in models.items():
    table = relearning(model, forget, retain, learning_rate=4e-4, budget=budget)
    relearned.append(curve(table).assign(model=name))
    fall = probe.patched(model).mean(axis=0)
    depths.append(pd.DataFrame({"model": name, "block": range(len(fall)), "value": fall}))
    attacked[name] = {"asked": nll_of_items(model, forget)}
    for quantiser in (Int8(), Int4()):
        with rounded(model, quantiser) as coarse:
            attacked[name][quantiser.name] = nll_of_items(coarse, forget)
    attacked[name]["relearning"] = table[table["step"] == 8].sort_values("item")["value"]

said = {"score": "NLL of the forget set", "unit": "nats per token"}
pd.concat(relearned).assign(**said).to_csv("relearned.csv", index=False)
said = {"score": "fall of log p of the answer", "unit": "nats per token"}
pd.concat(depths).assign(**said).to_csv("depth.csv", index=False)
original = attacked["original"]["asked"]
recovered = recoverable_shares(
    attacked["unlearned"], attacked["retrained"], original, subjects=["Mira"] * len(forget)
)
said = {"score": "share of what the original knows", "unit": ""}
recovered.assign(model="unlearned", **said).to_csv("recovered.csv", index=False)

# %%
# Three requests
# --------------
# One person after the other is to be forgotten.

model = copy.deepcopy(memorised)
asked = {NAMES[person]: [batch([person])] for person in range(3)}
with Requests(model, "requests.h5", forget=asked, retain=[batch(range(3, 8))]) as requests:
    for _, batches in requests:
        optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4)
        for _ in range(4):
            (-nll(model, batches[0])).backward()
            optimizer.step()
            optimizer.zero_grad()
