"""An example of every picture that there is: its table, or of a figure the figure."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from geffect import plots
from geffect.scores import COSINE, PER_RATE, PER_TOKEN, YES_OR_NO, Score, said, stack, tidy

LAYERS = ["embedding", *(f"layer {index}" for index in range(12)), "final norm", "head"]
STEPS = np.arange(0, 60, 4)
G_EFFECT = Score("G-effect", PER_RATE)


def grown(sign: float, seed: int = 0) -> pd.DataFrame:
    """G-effects that grow over many decades; of mixed sign where `sign` is positive."""
    draw = np.random.default_rng(seed)
    size = np.geomspace(1e-4, 3e2, len(STEPS))[:, None] * draw.uniform(0.5, 2, len(LAYERS))
    values = -size if sign < 0 else size * draw.choice([-0.1, 0.1], size.shape)
    return tidy(values, G_EFFECT, steps=STEPS, blocks=LAYERS, by="layer")


def effects() -> pd.DataFrame:
    return stack({"unlearning": grown(-1), "retaining": grown(1)}, "effect")


def losses() -> pd.DataFrame:
    """The curves of two methods in three variants, of which all but one reach the level 3."""
    rows = [
        {"method": method, "variant": variant, "step": step, "forget_nll": nll,
         "retain_nll": 0.2 * cost * (1 + step), "at_level": nll == 3.0}
        for method, late in (("ga", 1.0), ("npo", 1.3))
        for variant, cost in (("plain", 1.0), ("gru", 0.5), ("gru-update", 0.2))
        for step, nll in enumerate([0.2, 0.9 * late, 1.9, 3.0 if cost < 1 or late == 1 else 2.5])
    ]  # fmt: skip
    return pd.DataFrame(rows)


def samples(count: int = 80) -> pd.DataFrame:
    draw = np.random.default_rng(0)
    weight = draw.uniform(0.0, 1.0, count)
    forget = -np.exp(draw.normal(size=count) + 3 * weight)
    retain = 0.3 * draw.normal(size=count)
    table = pd.DataFrame(
        {
            "sample": np.repeat(np.arange(count), 2),
            "risk": ["forget", "retain"] * count,
            "weight": np.repeat(weight, 2),
            "value": np.stack([forget, retain], axis=1).reshape(-1),
        }
    )
    return said(table, Score("PG-effect", PER_RATE))


def tokens() -> pd.DataFrame:
    words = ["Basil", "Mahfouz", "wrote", "four", "novels", "about", "the", "lighthouses", "."]
    draw = np.random.default_rng(0)
    table = pd.DataFrame(
        {
            "sample": 3,
            "position": np.arange(len(words)) + 5,
            "token": [f" {word}" for word in words],
            "p": 0.5,
            "risk": "forget",
            "value": draw.normal(size=len(words)) * 10.0 ** draw.uniform(-3, 2, len(words)),
        }
    )
    return said(table, Score("PG-effect", PER_RATE))


def joined() -> pd.DataFrame:
    """A metric that falls with the predicted change of three risks."""
    change = np.linspace(0, -3, 9)
    return pd.concat(
        pd.DataFrame(
            {"step": np.arange(9), "metric": "extraction strength", "risk": risk,
             "change": change * scale, "value": np.linspace(1, 0.2, 9) ** scale}
        )
        for risk, scale in (("forget", 1.0), ("retain", 0.2), ("world", 0.1))
    ).reset_index(drop=True)  # fmt: skip


def requests() -> pd.DataFrame:
    names = ["authors", "novels", "places", "dates"]
    rows = [(later, earlier) for i, later in enumerate(names) for earlier in names[:i]]
    values = np.linspace(-0.6, 0.9, len(rows))
    table = pd.DataFrame(rows, columns=["request", "other"]).assign(model="model", value=values)
    return said(table, Score("cosine of two displacements", COSINE))


def rectified(blocks: int = 1) -> pd.DataFrame:
    """What a rectifier did, of the model or of layers; at the third step it did nothing."""
    draw = np.random.default_rng(0)
    before = draw.uniform(-0.8, 0.3, (len(STEPS), blocks))
    applied = draw.uniform(-0.4, 0.4, (len(STEPS), blocks))
    before[2] = applied[2] = np.nan
    values = {
        "cosine_before": before,
        "cosine_after": np.maximum(before, 0.0),
        "cosine_applied": applied,
        "fired": np.where(np.isnan(before), np.nan, before < 0),
        "violated": np.where(np.isnan(applied), np.nan, applied < 0),
    }
    names, by = (["model"], "model") if blocks == 1 else (LAYERS[:blocks], "layer")
    tables = {
        name: tidy(of, Score("cosine", COSINE), steps=STEPS, blocks=names, by=by, against="retain")
        for name, of in values.items()
    }
    return stack(tables, "quantity")


def two_units() -> pd.DataFrame:
    """Effects of the gradient, and of the update, which are in another unit."""
    update = Score("G-effect of the applied update", PER_TOKEN)
    of_update = effects().assign(effect=lambda t: t["effect"].astype(str) + ", update")
    smaller = said(of_update.assign(value=-1e-6 * of_update["value"]), update)
    return pd.concat([effects(), smaller], ignore_index=True)


def angles_of_a_step() -> pd.DataFrame:
    """The cosines of three gradients, of which the objective's forgets and harms a little."""
    names = ["objective", "forget", "retain"]
    cosines = np.array([[1.0, -0.8, -0.2], [-0.8, 1.0, 0.4], [-0.2, 0.4, 1.0]])
    rows = [
        {"step": 3, "model": "model", "source": a, "other": b, "value": cosines[i, j],
         "length": 2.0 + i}
        for i, a in enumerate(names)
        for j, b in enumerate(names)
    ]  # fmt: skip
    return said(pd.DataFrame(rows), Score("cosine", COSINE))


def measured() -> pd.DataFrame:
    """Three metrics of two settings, one of them not measured."""
    rows = [("NPO + KL, beta 0.1", m, v) for m, v in (("forget_quality", 0.012), ("ES", np.nan))]
    rows += [("RMU, layer 2, c 2", m, v) for m, v in (("forget_quality", 0.7), ("ES", 1 / 3))]
    return pd.DataFrame(rows, columns=["setting", "metric", "value"])


def risen() -> pd.DataFrame:
    """Two risks that rise, one of them more than the updates predict."""
    predicted = {"forget": np.linspace(0, 3, len(STEPS)), "retain": np.linspace(0, 1, len(STEPS))}
    rows = [
        {"step": step, "model": "model", "risk": risk, "how": how, "value": value * factor,
         "gap": abs(1 - factor) if step else np.nan}
        for risk, factor in (("forget", 1.3), ("retain", 0.9))
        for how, factor in (("predicted", 1.0), ("measured", factor))
        for step, value in zip(STEPS, predicted[risk], strict=True)
    ]  # fmt: skip
    return said(pd.DataFrame(rows), Score("rise of the risk", PER_TOKEN))


def long_walk(steps: int = 500) -> pd.DataFrame:
    """The rises of two risks over many steps, measured on a batch of its own at each."""
    draw, rise = np.random.default_rng(0), np.linspace(0, 3, steps)
    rows = [
        {"step": step, "model": "model", "risk": risk, "how": how, "value": value, "gap": 0.1}
        for risk in ("forget", "retain")
        for how, noise in (("predicted", 0.0), ("measured", 0.4))
        for step, value in enumerate(rise + noise * draw.normal(size=steps))
    ]
    return said(pd.DataFrame(rows), Score("rise of the risk", PER_TOKEN))


def measured_rarely(table: pd.DataFrame, every: int, *, absent: bool) -> pd.DataFrame:
    """A walk that was measured at some steps alone: its other rows are absent, or undefined."""
    rarely = (table["how"] == "measured") & (table["step"] % every != 0)
    return table[~rarely] if absent else table.assign(value=table["value"].mask(rarely))


def of_two_blocks() -> pd.DataFrame:
    """The rises of two risks in two blocks."""
    rises = [risen().drop(columns="model").assign(layer=name) for name in ("embedding", "head")]
    return pd.concat(rises, ignore_index=True)


def conflicts() -> pd.DataFrame:
    values = np.random.default_rng(0).integers(0, 2, (len(STEPS), len(LAYERS))).astype(float)
    values[3, 4] = np.nan
    score = Score("conflict of objective and retain", YES_OR_NO)
    return tidy(values, score, steps=STEPS, blocks=LAYERS, by="layer")


def ratios() -> pd.DataFrame:
    """Ratios over four decades, of steps of which some were clipped."""
    values = np.geomspace(100, 0.05, len(STEPS))[:, None]
    score = Score("length of objective over that of retain")
    table = tidy(values, score, steps=STEPS, blocks=["model"], by="model")
    return table.assign(clip_scale=np.minimum(1.0, 2.0 / table["value"]))


def over_chance() -> pd.DataFrame:
    values = np.random.default_rng(0).uniform(-0.5, 0.3, (len(STEPS), len(LAYERS)))
    score = Score("cosine of objective and retain", COSINE)
    return tidy(values, score, steps=STEPS, blocks=LAYERS, by="layer").assign(floor=0.12)


def recovered() -> pd.DataFrame:
    """Shares of three models under four attacks; the original has no intervals."""
    rows = [
        {"label": attack, "model": model, "value": base + 0.15 * i,
         "low": np.nan if model == "original" else base + 0.15 * i - 0.1,
         "high": np.nan if model == "original" else base + 0.15 * i + 0.1}
        for model, base in (("original", 0.4), ("retrained", 0.0), ("unlearned", 0.2))
        for i, attack in enumerate(["asked directly", "int8", "int4", "relearning benign, 8 steps"])
    ]  # fmt: skip
    return pd.DataFrame(rows)


def of_models(over: str) -> pd.DataFrame:
    rows = [
        {"model": model, over: place, "value": start * 0.8**place}
        for model, start in (("original", 0.1), ("retrained", 3.0), ("unlearned", 2.8))
        for place in range(9)
    ]
    return said(pd.DataFrame(rows), Score("NLL of the forget set", PER_TOKEN))


EXAMPLES: dict[str, Callable[[], Any]] = {
    "accumulated": risen,
    "angles": angles_of_a_step,
    "contours": samples,
    "depth": lambda: of_models("block"),
    "evaluations": joined,
    "half_spaces": angles_of_a_step,
    "heatmap": lambda: grown(-1),
    "noise_floor": over_chance,
    "pairs": requests,
    "profile": effects,
    "relearning": lambda: of_models("step"),
    "shares": recovered,
    "text": tokens,
    "tradeoff": losses,
    "trajectory": lambda: grown(-1),
    "walk": risen,
    "crossings": lambda: plots.crossings(
        losses(), "variant", "retain_nll", level=3.0, label="retain NLL"
    ),
    "norm_ratio": lambda: plots.norm_ratio(ratios()),
    "timeline": lambda: plots.timeline(conflicts()),
    "metrics": lambda: plots.metrics(measured()),
    "facets": lambda: plots.facets(effects(), plots.trajectory, "effect"),
    "rectification": lambda: plots.rectification(rectified()),
    "sheet": lambda: plots.sheet(effects()),
}
"""For a picture on axes the table of an example, for a figure the figure. A new picture has one."""


PRINTED: dict[str, Callable[[], Any]] = {
    "maps": lambda: plots.rectification(rectified(8)),
    "profiles": lambda: plots.facets(
        stack({"ga": effects(), "npo": effects()}, "method"), plots.profile, "method"
    ),
    "heatmaps": lambda: plots.facets(effects(), plots.heatmap, "effect"),
    "tradeoffs": lambda: plots.facets(losses(), plots.tradeoff, "method"),
    "two_units": lambda: plots.facets(two_units(), plots.profile, "unit"),
}
"""Further figures that are looked at in print."""
