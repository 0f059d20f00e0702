"""Every entry of the questions quotes what geffect says in that case, word for word."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

import geffect
from geffect import Recorder, Rectifier, Run, open_run
from geffect.analysis import g_effect, predicted_change, rectification
from geffect.objectives import NPO, named, nll
from geffect.plots import heatmap
from geffect.trainers import rectify
from tests.utils import tiny, trainers

PAGE = Path(__file__).parents[2] / "docs" / "faq.md"
BATCH = tiny.pairs(1)[0]
IDS = BATCH["forget"]["input_ids"]


def record(path: str, model: torch.nn.Module | None = None, **options: bool) -> Run:
    """A run of one step of GA."""
    model = model or tiny.llama()
    with Recorder(model, path, **options) as recorder:
        recorder.backward(objective={"forget": -1.0}, **losses(model, "forget", "retain"))
    return open_run(path)


def losses(model: torch.nn.Module, *names: str) -> dict[str, Callable[[], torch.Tensor]]:
    return {name: partial(nll, model, BATCH[name]) for name in names}


def step(path: str = "step.h5", **told: object) -> None:
    """A step that a recorder takes, of losses of which one may be wrong."""
    with Recorder(tiny.llama(), path) as recorder:
        recorder.backward(**told)


def exists() -> None:
    record("run.h5")
    record("run.h5")


def no_graph() -> None:
    step(objective=nll(tiny.llama(), BATCH["forget"]).detach())


def later() -> None:
    model = tiny.llama()
    with Recorder(model, "run.h5") as recorder:
        recorder.backward(objective={"forget": -1.0}, **losses(model, "forget"))
        recorder.backward(objective={"forget": -1.0}, **losses(model, "forget", "retain"))


def closed() -> None:
    model = tiny.llama()
    with Recorder(model, "run.h5") as recorder:
        recorder.backward(objective={"forget": -1.0}, **losses(model, "forget"))
    recorder.backward(objective={"forget": -1.0}, **losses(model, "forget"))


def no_run() -> None:
    Path("notes.txt").write_text("hello")
    open_run("notes.txt")


def another_model() -> None:
    record("run.h5")
    record("run.h5", tiny.llama(layers=1), resume=True)


def no_retain() -> None:
    model = tiny.llama()
    with Recorder(model, "run.h5") as recorder:
        recorder.backward(objective={"forget": -1.0}, **losses(model, "forget"))
    g_effect(open_run("run.h5"))


def shifted() -> None:
    labels = torch.cat([IDS[:, 1:], torch.full((len(IDS), 1), -100)], dim=1)
    nll(tiny.llama(), {"input_ids": IDS, "labels": labels})


def no_causal() -> None:
    config = BertConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16,
    )  # fmt: skip
    nll(BertForMaskedLM(config), BATCH["forget"])


def looks_ahead() -> None:
    everywhere = torch.zeros(len(IDS), 1, IDS.shape[1], IDS.shape[1])
    nll(tiny.llama(), {**BATCH["forget"], "attention_mask": everywhere})


def rectified(model: torch.nn.Module, rectifier: Rectifier, *names: str) -> None:
    rectifier.backward(objective={"forget": -1.0}, **losses(model, *names))


def left() -> None:
    model = tiny.llama()
    nll(model, BATCH["forget"]).backward()
    rectified(model, Rectifier(model), "forget", "retain")


def forgotten() -> None:
    model = tiny.llama()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Recorder(model, "run.h5") as recorder:
        for _ in range(2):
            recorder.backward(objective={"forget": -1.0}, **losses(model, "forget"))
            optimizer.step()


def stepped(parts: Callable[[torch.nn.Module], list[list[torch.nn.Parameter]]]) -> None:
    """Steps of an optimizer for each list of parameters, the first that of the rectifier."""
    model = tiny.llama()
    optimizers = [torch.optim.SGD(part, 0.1) for part in parts(model)]
    rectifier = Rectifier(model, space="update", optimizer=optimizers[0])
    rectified(model, rectifier, "forget", "retain")
    for optimizer in optimizers[1:]:
        optimizer.step()


def twice() -> None:
    model = tiny.llama()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    rectifier = Rectifier(model, space="update", optimizer=optimizer)
    rectified(model, rectifier, "forget", "retain")
    optimizer.step()
    optimizer.step()


def frozen() -> None:
    model = tiny.llama()
    rectifier = Rectifier(model)
    model.get_input_embeddings().requires_grad_(False)
    rectified(model, rectifier, "forget", "retain")


def of_another() -> None:
    optimizer = torch.optim.SGD(tiny.llama().parameters(), 0.1)
    Rectifier(tiny.llama(), space="update", optimizer=optimizer)


def with_closure() -> None:
    model = tiny.llama()
    Rectifier(model, optimizer=torch.optim.LBFGS(model.parameters()))


def no_term() -> None:
    trainer = trainers.trainer(Path("trainer"), tiny.llama())
    rectify(trainer, Rectifier(trainer.model))


def no_floor() -> None:
    items = [{"input_ids": [1, 2], "labels": [-100, 2]}]
    geffect.audit(tiny.llama(), tiny.llama(), sets={"forget": items, "retain": items})


ASKED: dict[str, Callable[[], object]] = {
    "Why does my run file refuse to be written?": exists,
    "The loss has no graph": no_graph,
    "May a loss come later?": later,
    "What is the objective?": lambda: step(**losses(tiny.llama(), "forget", "retain")),
    "A loss that the objective weighs is not there": lambda: step(
        objective={"forgt": -1.0}, **losses(tiny.llama(), "forget")
    ),
    "The recorder is closed": closed,
    "The file is none of ours": no_run,
    "There is no file yet": lambda: open_run("absent.h5"),
    "My model is not the one of the run": another_model,
    "I passed the path of a run": lambda: g_effect("run.h5"),  # type: ignore[arg-type]
    "A gradient is missing": no_retain,
    "What the optimizer did is missing": lambda: predicted_change(record("run.h5")),
    "There was no rectifier": lambda: rectification(record("run.h5")),
    "Which layers are there?": lambda: g_effect(record("run.h5"), by="layers"),  # type: ignore[arg-type]
    "One panel is not enough for my table": lambda: heatmap(g_effect(record("run.h5"))),
    "There are no labels": lambda: nll(tiny.llama(), {"input_ids": IDS}),
    "No token is scored": lambda: nll(
        tiny.llama(), {"input_ids": IDS, "labels": torch.full_like(IDS, -100)}
    ),
    "My labels are shifted": shifted,
    "My model is no causal one": no_causal,
    "My model sees the token that it predicts": looks_ahead,
    "There is no retain loss": lambda: rectified(model := tiny.llama(), Rectifier(model), "forget"),
    "My Trainer has no retain term": no_term,
    "Gradients are left from before": left,
    "A step is by more than was recorded": forgotten,
    "Another optimizer takes the step": lambda: stepped(lambda m: [[*m.parameters()]] * 2),
    "A gradient is stepped twice": twice,
    "There is an optimizer for each part": lambda: stepped(
        lambda m: [[*m.parameters()][:2], [*m.parameters()][2:]]
    ),
    "Parameters were frozen since": frozen,
    "The optimizer steps another model": of_another,
    "Which optimizers can be rectified?": with_closure,
    "A name is not known": lambda: named("npoo"),
    "What is the reference?": lambda: NPO()(tiny.llama(), BATCH),
    "What does an audit compare with?": no_floor,
}


def quoted() -> dict[str, str]:
    """What each entry of the page quotes, by its heading."""
    entries = re.split(r"^### ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return {
        entry.partition("\n")[0]: " ".join(re.findall(r"^> (.*)$", entry, re.MULTILINE))
        for entry in entries
    }


def test_every_entry_quotes_a_message_that_is_provoked_here() -> None:
    assert [*quoted()] == [*ASKED]
    assert all(len(message) > 40 for message in quoted().values())
    assert len({*quoted().values()}) == len(ASKED)


@pytest.mark.parametrize("heading", ASKED)
def test_a_message(heading: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, TypeError, OSError)) as raised:
        ASKED[heading]()
    parts = [re.escape(part) for part in quoted()[heading].split("…")]
    assert re.fullmatch(".+?".join(parts), str(raised.value)), str(raised.value)
