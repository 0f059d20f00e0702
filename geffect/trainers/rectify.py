"""Rectification in a `transformers.Trainer` that was written without a thought of it.

transformers has one seam for it, which is to subclass a Trainer: `RectifyMixin`. The events of its
callbacks do not suffice. None comes between the last backward pass and clipping
(`on_pre_optimizer_step` comes after it), none tells which checkpoint a training goes on from, and
`on_log` comes to those that write the log in the order in which they were added. For a Trainer that
exists already, as a script of TRL makes it, there is no seam: `rectify` gives it the subclass
as its `__class__`, and `detach` gives back its own.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from geffect import distributed
from geffect.capture import Recorder
from geffect.projection import Rectifier
from geffect.relearning import Relearned
from geffect.risk import RiskSet
from geffect.sources import RETAIN

from . import rectifier_state
from .loop import model_of
from .rectified_steps import RectifiedSteps


class RectifyMixin(Trainer):
    """A Trainer whose steps are rectified: `class RectifiedNPO(RectifyMixin, NPO): ...`.

    What `rectify` makes of a Trainer, for those who write a class: `rectifier`, `retain`,
    `recorder`, `probes` and `relearned` are given by name, beside what the other class takes.
    """

    _rectified: RectifiedSteps

    def __init__(
        self,
        *args: Any,
        rectifier: Rectifier,
        retain: RiskSet | None = None,
        recorder: Recorder | Callable[..., Recorder] | None = None,
        probes: Mapping[str, RiskSet] | None = None,
        relearned: Relearned | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        _begin(self, RectifiedSteps(self, rectifier, retain, recorder, probes, relearned))

    def compute_retain_loss(self, *args: Any, **kwargs: Any) -> Any:
        """The retain loss; in a training step what stands in for it, see `leaf_cut`."""
        parent: Any = super()
        loss = parent.compute_retain_loss(*args, **kwargs)
        cut = self._rectified.cut
        return loss if cut is None or not torch.is_grad_enabled() else cut.stand_in(loss)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """The loss, looked at for whether its retain term can be taken apart."""
        returned = super().compute_loss(*args, **kwargs)
        if self._rectified.cut is not None:
            loss = returned[0] if isinstance(returned, tuple) else returned
            self._rectified.cut.check_apart(loss)
        return returned

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, with a recorder that is closed when training ends if it was made for it."""
        with ExitStack() as self._rectified.until_trained:
            return super().train(*args, **kwargs)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """A micro-batch; the last one of a step leaves the rectified gradient in `.grad`."""
        steps = self._rectified
        with _reduced_here(model), steps.at_copy(model, inputs), steps.cutting():
            loss = super().training_step(model, inputs, *args, **kwargs)
        self._rectified.take(loss)
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, and with the loss of the training also what the rectifier did since the last."""
        if "loss" in logs:
            logs = {**logs, **self._rectified.log.means()}
        super().log(logs, *args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        rectifier_state.save(self._rectified.rectifier, output_dir, writes=self.args.should_save)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            distributed.check_layout(model_of(self))  # what the state is of
            rectifier_state.restore(self._rectified.rectifier, checkpoint)


class Rectified:
    """A Trainer whose steps are rectified, until `detach` puts everything back."""

    def __init__(self, trainer: Trainer, kind: type[Trainer], steps: RectifiedSteps) -> None:
        self._trainer, self._kind, self._steps = trainer, kind, steps

    def detach(self) -> None:
        """Make the Trainer again what it was."""
        trainer: Any = self._trainer
        if vars(trainer).get("_rectified") is not self._steps:
            return
        self._steps.end()
        trainer.remove_callback(self._steps)
        del trainer._rectified
        trainer.__class__ = self._kind


def rectify(
    trainer: Trainer,
    rectifier: Rectifier,
    *,
    retain: RiskSet | None = None,
    recorder: Recorder | Callable[..., Recorder] | None = None,
    probes: Mapping[str, RiskSet] | None = None,
    relearned: Relearned | None = None,
) -> Rectified:
    """Rectify the steps of any `transformers.Trainer`, those of TRL and open-unlearning among them.

        rectify(trainer, Rectifier(trainer.model))
        trainer.train()

    - `trainer`, `rectifier`: the rectifier was made for the model of the Trainer.
    - `retain`: batches with `labels`, for a Trainer without a retain loss, as in TRL, or against
      other data than those of its loss, which stays as it is. The gradient is that of the NLL per
      answer token, without dropout, over as many batches as a full step has micro-batches on all
      processes. A resumed training meets the batches that it would have met; all processes need
      the same ones, in one order.
    - `recorder`: also writes every step into its run file; the caller closes it. Or what makes one,
      `partial(Recorder, path=...)`, as DeepSpeed needs it: that is called with the model when
      training begins, and closed when it ends.
    - `probes`: with a recorder, further data by name, such as {"forget": batches}: the gradient of
      the risk on each is recorded too. G-effects need that on the forget data. `retain` is the
      retain loss of the Trainer, or the risk on `retain` batches: where the former is a distance to
      another model, give the data as a probe of another name for their risk.
    - `relearned`: a `geffect.Relearned`, where the loss of the Trainer is differentiated, a retain
      term of it too; the gradients of `retain` and `probes` are those at theta. What is relearned
      is the forget side of each batch, or the `loss` that it has.

    Returns an object whose `detach()` puts everything back. Raises an error for a Trainer that has
    a rectifier already, or no retain gradient; in training, for a loss that shares a forward pass
    with its retain loss or does not ask for one.

    At the last micro-batch of a step the accumulated gradient is averaged over the processes and
    rectified; then the Trainer clips and steps. It may use DDP, FSDP2 or DeepSpeed ZeRO, half
    precision with or without a GradScaler, checkpointed activations and torch.compile.

    The retain gradient comes from the retain loss that the Trainer has behind a method
    `compute_retain_loss(model, retain_inputs, ...)`, on batches {"forget": ..., "retain": ...}: the
    mean over the micro-batches, each by its weight in the loss. `leaf_cut` takes it apart without a
    further forward pass, for the memory of one gradient. `part` of the rectifier says whether the
    loss is rectified as a whole, which costs the memory of another at the end of a step, or without
    its retain term. A retain loss of weight 0 is no part of the objective and still says what
    should stay.

    What was done is logged with the loss, as means since the last log: see `RectificationLog`. The
    state of the rectifier is saved and restored with the Trainer's checkpoints.
    """
    if isinstance(trainer, RectifyMixin) or getattr(trainer, "rectifier", None) is not None:
        raise ValueError(
            "`trainer` should have one rectifier. Found one that has a rectifier already. Call "
            "detach() on what `rectify` returned for it before, or leave this one out."
        )
    kind = type(trainer)
    told = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    rectified: Any = trainer
    rectified.__class__ = type(kind.__name__, (RectifyMixin, kind), told)
    try:
        steps = RectifiedSteps(rectified, rectifier, retain, recorder, probes, relearned)
        _begin(rectified, steps)
    except BaseException:
        rectified.__class__ = kind
        raise
    return Rectified(trainer, kind, steps)


def _begin(trainer: RectifyMixin, steps: RectifiedSteps) -> None:
    """Have the steps of a Trainer rectified from now on."""
    _check_retain_gradient(trainer, steps.rectifier, given=steps.batches is not None)
    trainer._rectified = steps
    trainer.add_callback(steps)


def _check_retain_gradient(trainer: RectifyMixin, rectifier: Rectifier, *, given: bool) -> None:
    """Refuse a Trainer that has a retain gradient from nowhere, or cannot part with it."""
    kind = type(trainer).__name__
    if rectifier.protect != (RETAIN,):
        raise ValueError(
            "`protect` of the rectifier should be the one retain loss that a Trainer has, "
            f"`{RETAIN}`. Found {', '.join(rectifier.protect)}. For several retain sets use "
            "UnlearningTrainer(retain={...}), or a loop of your own."
        )
    has_term = hasattr(super(RectifyMixin, trainer), "compute_retain_loss")
    if given and has_term and rectifier.part == "forget":
        raise ValueError(
            f'`retain` should be left out with part="forget": {kind} has a retain term, which is '
            'then taken apart. Found `retain` batches. Leave them out, or use part="total".'
        )
    if not given and not has_term:
        raise ValueError(
            "`retain` should be given to a Trainer whose loss has no retain term, behind a method "
            f"`compute_retain_loss`. Found none in {kind}. Pass retain=batches, with input_ids, "
            "attention_mask and labels."
        )
    if not given and trainer.args.remove_unused_columns:
        raise ValueError(
            "`remove_unused_columns` should be False where a batch has a forget and a retain side, "
            f"which are no arguments of the model. Found True for {kind}. Set "
            "remove_unused_columns=False in its arguments."
        )


@contextmanager
def _reduced_here(model: nn.Module) -> Iterator[None]:
    """Passes whose gradients DDP leaves to be averaged later, and FSDP2 and engines do at once."""
    with (
        distributed.unsynchronised(model),
        distributed.gradient_sync(model),
        distributed.passes_apart(model),
    ):
        yield
