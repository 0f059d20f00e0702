"""The runs behind the figures of the paper: which they are, and what they keep of samples."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from geffect import open_run
from geffect.analysis import METRICS, SAMPLES, kept, setting
from geffect.cli.figures import made_of
from geffect.demo import language_model as lm
from geffect.demo.config import QUICK
from geffect.demo.corpus import Fact, alternatives, generate
from geffect.demo.data import Data
from geffect.demo.jobs import learn
from geffect.demo.paper import CHECKPOINTS, RUNS, PaperRun, jobs, weighed
from geffect.demo.paper_metrics import metrics
from geffect.demo.plan import Plan
from geffect.demo.recognised import among_alternatives
from geffect.evaluation import forget_quality, generated
from geffect.evaluation.rouge import rouge_l
from geffect.objectives import NPO, FrozenModel, names
from geffect.plots.paper import IN_TABLE_1
from tests.utils import reference, tiny

SHORT = replace(
    QUICK, epochs=1, unlearning=replace(QUICK.unlearning, plain_steps=CHECKPOINTS[0] + 1)
)


def test_every_figure_has_its_runs() -> None:
    assert {method for method, _ in RUNS} <= {*names()}
    found = list(jobs(Path(), Plan(quick=True)))
    assert len({job.name for job in found}) == len(found) == len(RUNS)
    layers = {dict(job.options)["layer"] for job in found if job.method == "rmu"}
    assert layers == {1.0, 2.0}  # of a model of two
    several = [method for method, _ in RUNS]
    assert min(several.count(method) for method in ("wga", "npo", "tnpo", "rmu")) > 1


def test_weights_of_samples_are_those_of_the_formula() -> None:
    model, before = tiny.llama(0).eval(), tiny.llama(1).eval()
    pairs = tiny.pairs(2)
    data: Any = SimpleNamespace(
        batches={side: [pair[side] for pair in pairs] for side in ("forget", "retain")}
    )
    table = weighed(model, data, NPO(beta=0.5), FrozenModel(before))
    expected = []
    for pair in pairs:
        now, was = (reference.token_log_p(of, pair["forget"]) for of in (model, before))
        for log_p, log_p_before in zip(now, was, strict=True):
            p, p_before = (
                float(torch.stack(of).sum().detach().exp()) ** 0.5 for of in (log_p, log_p_before)
            )
            expected.append(2 * p / (p + p_before))
    own = table.query("risk == 'retain'").sort_values("sample")
    np.testing.assert_allclose(own["weight"], expected, rtol=1e-4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study whose models have hardly learned anything."""
    out = tmp_path_factory.mktemp("paper")
    (out / "paper").mkdir()
    corpus = generate(0, SHORT.corpus)
    kept = (*corpus.retain, *corpus.retain_heldout_authors, *corpus.world)
    for name, facts in (("original", corpus.memorised), ("gold", kept)):
        learn(SHORT, out / "models" / f"{name}-seed0", corpus, facts, 0, lambda *_: None)
    return out


@pytest.mark.parametrize(
    ("method", "figure"), [("npo", "figure-5b"), ("po", "figure-6"), ("ga+kl", "regularisers")]
)
def test_a_run_has_what_its_figure_needs(folder: Path, method: str, figure: str) -> None:
    plan = Plan(quick=True, subject=SHORT)
    job = next(job for job in jobs(folder, plan) if job.method == method)
    said: list[float] = []
    run = open_run(folder / job.run(lambda done, _: said.append(done)))
    assert said[-1] == 1.0 and len(run.steps) == SHORT.unlearning.plain_steps
    assert setting(run).seed == 0 and not setting(run).rectified
    made = {one.figure.name: one for one in made_of([run])}
    assert made[figure].table is not None, made[figure].said
    assert [*run.table(METRICS)["metric"]] == [*IN_TABLE_1]
    if method == "npo":
        assert set(kept(run, SAMPLES)["step"]) == {CHECKPOINTS[0]}


def test_metrics_are_those_of_loops_over_facts(folder: Path) -> None:
    model, tokenizer = SHORT.load(folder / "models" / "original-seed0")
    retrained, _ = SHORT.load(folder / "models" / "gold-seed0")
    corpus = generate(0, SHORT.corpus)
    found = metrics(model, Data.of(corpus, tokenizer, 0), retrained)

    def nll(of: Any, fact: Fact) -> float:
        (log_p,) = reference.token_log_p(of, lm.encode(tokenizer, [fact]))
        return -float(torch.stack(log_p)[:-1].detach().mean())  # without the token that ends it

    def ratio(of: Any, fact: Fact, most: int = 15) -> float:
        wrong = [nll(of, other) for other in alternatives(fact, most)]
        return float(np.exp(nll(of, fact) - np.mean(wrong)))

    parts = []
    for name, facts in (("retain", corpus.retain), ("neighbours", corpus.retain_heldout_authors)):
        items = among_alternatives(name, facts, tokenizer, 5).items
        said = generated(model, tokenizer, items)  # tested where it is; many tokens tie here
        parts += [
            np.mean([np.exp(-nll(model, fact)) for fact in facts]),
            np.mean([rouge_l(x.answer, y).recall for x, y in zip(facts, said, strict=True)]),
            np.mean([max(0.0, 1 - ratio(model, fact, 5)) for fact in facts]),
        ]
    quality = forget_quality(
        *([ratio(of, fact) for fact in corpus.forget] for of in (model, retrained))
    )
    values = dict(zip(found["metric"], found["value"], strict=True))
    assert values["forget quality"] == pytest.approx(quality.p)
    assert values["model utility"] == pytest.approx(
        len(parts) / sum(1 / x for x in parts), rel=1e-3
    )


def test_names_tell_the_options() -> None:
    job = PaperRun(Path(), 3, "wga", (("alpha", 0.5),), None, SHORT)  # type: ignore[arg-type]
    assert job.name == "wga-alpha0.5-seed3" and job.file == "paper/wga-alpha0.5-seed3.h5"
