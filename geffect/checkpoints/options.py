"""The options of a replay: its models, its data files, its run file."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from geffect.capture.store_options import StoreOptions

from .loading import Folder

OnBatch = Callable[[str, int, int], None]
"""Told after each batch: the name of the checkpoint, how many batches it has had, of how many."""

Shown = Callable[[str, str], None]
"""Told of each file: the name of the set, and its first row as the model reads it, with what is
scored between [[ and ]]."""


@dataclass(frozen=True)
class ReplayOptions:
    """The options of `geffect.replay`: its models, its data files, its run file.

    Models:

    - `reference`: the model before unlearning, for an objective that compares with it; by default
      the model that adapters are for, else the first checkpoint. Where likelihoods of the forget
      answers are all it asks for, nothing else is kept of that model.
    - `base`: the model that adapters are for, where it is not at the place that they name.
    - `device`: a device of torch; by default cuda where there is one.

    Data files; batches that are ready are taken as they are:

    - `tokenizer`: one, or the folder of one; by default that of the first checkpoint that has one.
    - `template`, `max_length`: as for `geffect.data.examples.read`.
    - `batch_size`: rows in a batch, at most; fewer for more batches, if the estimator needs these.
    - `seed`: shuffles the rows; None keeps their order.

    The run file:

    - `update`: also records the way to the next checkpoint, theta_{c+1} - theta_c, as the source
      `update`, so that `predicted_change` says what it does to each risk to first order. The last
      checkpoint has none.
    - `store`: what is kept beside the Gram matrices, as by a `Recorder`.
    - `metadata`: facts of yours, kept with the run.
    - `overwrite`: replaces an existing run file.

    To follow the replay:

    - `report(checkpoint, done, total)` is called after each batch.
    - `show(set, text)` is called with the first row of each file, its scored part between
      [[ and ]].

    >>> ReplayOptions(batch_size=8, update=True).store
    'gram'
    """

    reference: Folder | None = None
    base: Folder | None = None
    device: str | torch.device | None = None
    tokenizer: Any = None
    template: bool = True
    max_length: int | None = None
    batch_size: int = 4
    seed: int | None = 0
    update: bool = False
    store: str | StoreOptions = "gram"
    metadata: Mapping[str, Any] | None = None
    overwrite: bool = False
    report: OnBatch | None = None
    show: Shown | None = None


DEFAULTS = ReplayOptions()
