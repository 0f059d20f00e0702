"""What of a captured step goes to the log of a Trainer, and to the trackers it reports to."""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    TensorBoardCallback,
    WandbCallback,
)

from geffect import gram
from geffect.capture.collector import Measurement
from geffect.groups import LABELS, label_of
from geffect.layers import Parameter
from geffect.near import meant
from geffect.numbers import is_whole
from geffect.places import is_adapter
from geffect.sources import FORGET, OBJECTIVE, RECTIFIED, RETAIN, is_risk

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

log = logging.getLogger(__name__)

EFFECTS = {FORGET: "unlearning", RETAIN: "retaining"}
"""What the effects on these two risks are called; another one's has the name of the risk."""

BLOCKS = tuple(name for name in LABELS if name != "expert")
"""What scores can be summed over: a measured step has no numbers of single experts at hand."""

SHEET = "geffect/sheet"
"""The name of the image."""


@dataclass(frozen=True)
class Trackers:
    """What the trackers that a Trainer reports to get beside the scores of the model.

    - `by`: each captured step, the G-effects and cosines of each of these blocks: "layer", "group",
      "parameter", "tower" and so on, as `geffect/layer_3/retaining_g_effect`.
    - `sheet_every`: after each so many captured steps, the sheet of the G-effects of the run so far
      as the image `geffect/sheet`, in TensorBoard and Weights & Biases; None for no image.

    Raises a ValueError for other blocks, and for a number below 1.

    >>> Trackers(by="layers")
    Traceback (most recent call last):
    ValueError: `by` should be one of parameter, layer, group, paper, code, tower, model. Found \
`layers`. Did you mean `layer`? Choose one of those.
    """

    by: str = "layer"
    sheet_every: int | None = 50

    def __post_init__(self) -> None:
        if self.by not in BLOCKS:
            raise ValueError(
                f"`by` should be one of {', '.join(BLOCKS)}. Found `{self.by}`."
                f"{meant(self.by, BLOCKS)} Choose one of those."
            )
        every = self.sheet_every
        if not (every is None or is_whole(every, 1)):
            raise ValueError(
                "`sheet_every` should be a whole number of at least 1, or None. Found "
                f"`{every!r}`. Pass 50, or None for no image."
            )


class Reports:
    """The trackers of one training, and what they have been given."""

    def __init__(self, asked: Trackers, trainer: Trainer, path: Path, risks: Iterable[str]) -> None:
        self._asked, self._path = asked, path
        self._captured, self._failed = 0, False
        found = trackers_of(trainer)
        if not found:
            raise ValueError(
                "`trackers` should find a tracker that the Trainer reports to. Found `report_to = "
                f'{trainer.args.report_to}`. Pass, say, report_to=["tensorboard"] in the '
                "TrainingArguments, or leave `trackers` out."
            )
        if asked.sheet_every is None:
            return
        if missing := sorted({FORGET, RETAIN} - {*risks}):
            raise ValueError(
                "`sheet_every` should go with the probes `forget` and `retain`, of which a sheet "
                f"is drawn. Found no {' and no '.join(missing)}. Add these, or pass "
                "Trackers(sheet_every=None)."
            )
        without = [type(one).__name__ for one in found if _image_of(one) is None]
        if without:
            log.warning(
                "Images go to TensorBoard and to Weights & Biases. Found %s, with scores alone.",
                ", ".join(without),
            )

    def take(
        self,
        trainer: Trainer,
        measured: Measurement,
        stepped: Sequence[bool] | None,
        table: Sequence[Parameter],
    ) -> None:
        """Hand on the scores of a step, and the sheet where it is due."""
        labels = [*map(label_of(self._asked.by), table)]
        scores = by_block(measured, stepped, labels, prefix_of(table))
        given = trainer.args, trainer.state, trainer.control
        self._captured += 1
        for tracker in trackers_of(trainer):
            # Not `trainer.log`: the terminal and the history of the Trainer are not for hundreds.
            tracker.on_log(*given, logs=dict(scores), model=trainer.model)
        every = self._asked.sheet_every
        if every is None or self._captured % every or not trainer.state.is_world_process_zero:
            return
        showing = [show for one in trackers_of(trainer) if (show := _image_of(one)) is not None]
        if showing and (drawn := self._drawn()) is not None:
            for show in showing:
                show(drawn, trainer.state.global_step)

    def _drawn(self) -> "NDArray[np.uint8] | None":
        """The sheet of the run so far; None where it cannot be drawn, which is warned of once."""
        from geffect.analysis import g_effect
        from geffect.plots import pixels, sheet, style
        from geffect.store import open_run

        try:
            # Trackers show a picture in a card, or on a phone: text is large beside its width.
            with style("page"):
                return pixels(sheet(g_effect(open_run(self._path), by=self._asked.by)), dpi=200)
        except Exception as error:  # training goes on without a picture
            if not self._failed:
                log.warning("No sheet goes to the trackers, since it cannot be drawn: %s", error)
            self._failed = True
            return None


def log_scores(
    trainer: Trainer,
    measured: Measurement,
    stepped: Sequence[bool] | None,
    table: Sequence[Parameter],
) -> None:
    """Hand the scores of the model to the log of the Trainer, and to what that reports to."""
    asked = trainer.control.should_log
    # Not `trainer.log`: those of TRL would take their own averages for logged, and begin anew.
    Trainer.log(trainer, of_model(measured, stepped, prefix_of(table)))
    trainer.control.should_log = asked  # which every log answers with "done"


def trackers_of(trainer: Trainer) -> list[TrainerCallback]:
    """The callbacks by which a Trainer reports to trackers that take scores."""
    kinds: tuple[type[TrainerCallback], ...] = tuple(INTEGRATION_TO_CALLBACK.values())
    return [
        callback
        for callback in trainer.callback_handler.callbacks
        if isinstance(callback, kinds) and type(callback).on_log is not TrainerCallback.on_log
    ]


def _image_of(tracker: TrainerCallback) -> Any:
    """What shows an image there; None where nothing does."""
    if isinstance(tracker, TensorBoardCallback):
        return lambda drawn, step: tracker.tb_writer.add_image(
            SHEET, drawn, step, dataformats="HWC"
        )
    if isinstance(tracker, WandbCallback):
        wandb = tracker._wandb
        return lambda drawn, step: wandb.log({SHEET: wandb.Image(drawn), "train/global_step": step})
    return None


def prefix_of(table: Iterable[Parameter]) -> str:
    """What the names of scores begin with: those of adapters compare with no others."""
    return "geffect/adapter" if any(is_adapter(p.name) for p in table) else "geffect"


def of_model(
    measured: Measurement, stepped: Sequence[bool] | None, prefix: str
) -> dict[str, float]:
    """G-effects and cosines of all that is stepped, by the names under which they are logged."""
    moved = measured.gram if stepped is None else measured.gram[torch.tensor(stepped)]
    return _scores(measured.names, moved.sum(dim=0), prefix)


def by_block(
    measured: Measurement, stepped: Sequence[bool] | None, labels: Sequence[str], prefix: str
) -> dict[str, float]:
    """The same of each block; NaN of one that the step does not move."""
    scores: dict[str, float] = {}
    for label, name in names_of(labels).items():
        own = torch.tensor([other == label for other in labels])
        moved = own if stepped is None else own & torch.tensor(stepped)
        K = measured.gram[moved].sum(dim=0)
        if not moved.any():
            K = torch.full_like(K, torch.nan)
        scores |= _scores(measured.names, K, f"{prefix}/{name}")
    return scores


def names_of(labels: Iterable[str]) -> Mapping[str, str]:
    """Blocks by names that every tracker takes, each of its own.

    >>> names_of(["layer 0", "layer 0", "a/b", "a b"])
    {'layer 0': 'layer_0', 'a/b': 'a_b', 'a b': 'a_b_2'}
    """
    names: dict[str, str] = {}
    taken: Counter[str] = Counter()
    for label in dict.fromkeys(labels):
        name = re.sub(r"[^\w.-]+", "_", label)
        taken[name] += 1
        names[label] = name if taken[name] == 1 else f"{name}_{taken[name]}"
    return names


def _scores(names: Sequence[str], K: Tensor, prefix: str) -> dict[str, float]:
    scores = {}
    for source, named in ((OBJECTIVE, ""), (RECTIFIED, "rectified_")):
        if source not in names:
            continue
        own = names.index(source)
        for index, risk in enumerate(names):
            if is_risk(risk):
                effect = named + EFFECTS.get(risk, risk)
                scores[f"{prefix}/{effect}_g_effect"] = float(gram.inner(K, index, own))
                scores[f"{prefix}/cosine_{source}_{risk}"] = float(gram.cosine(K, own, index))
    return scores
