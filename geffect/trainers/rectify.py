"""Rectification in a `transformers.Trainer` that was written without a thought of it.

transformers has one seam for it, which is to subclass a Trainer: `RectifyMixin`. The events of its
callbacks do not suffice. None comes between the last backward pass and clipping
(`on_pre_optimizer_step` comes after it), none tells which checkpoint a training goes on from, and
`on_log` comes to those that write the log in the order in which they were added. For a Trainer that
exists already, as a script of TRL makes it, there is no seam: `rectify` gives it the subclass
as its `__class__`, and `detach` gives back its own.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from geffect import distributed
from geffect.capture import Recorder
from geffect.gradients import Gradients
from geffect.interrupts import to_the_end
from geffect.layers import trainable
from geffect.projection import Rectifier
from geffect.relearning import Relearned, check_relearned
from geffect.risk import RiskGradient, RiskSet, noting_risk, risk_gradient
from geffect.sources import OBJECTIVE, RETAIN, check_risks

from . import at_copy, rectifier_state
from .leaf_cut import LeafCut, RetainTerm
from .loop import (
    begun_recorder,
    check_gradients_can_be_had,
    current_scale,
    model_of,
    stop_if_due,
)
from .rectification_log import RectificationLog
from .retain_batches import RetainBatches

UNWEIGHTED = "retain.unweighted"
"""The vector of retain losses that the objective gives no weight."""


class RectifyMixin(Trainer):
    """A Trainer whose steps are rectified: `class RectifiedNPO(RectifyMixin, NPO): ...`.

    What `rectify` makes of a Trainer, for those who write a class: `rectifier`, `retain`,
    `recorder`, `probes` and `relearned` are given by name, beside what the other class takes.
    """

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
        self._rectified = _Steps(self, rectifier, retain, recorder, probes, relearned)
        self.add_callback(self._rectified)

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


class _Steps(TrainerCallback):
    """The steps of a Trainer that are rectified, and the one that is under way.

    All that the Trainer has in addition, so that names of its own are left to it.
    """

    def __init__(
        self,
        trainer: RectifyMixin,
        rectifier: Rectifier,
        retain: RiskSet | None,
        recorder: Recorder | Callable[..., Recorder] | None,
        probes: Mapping[str, RiskSet] | None,
        relearned: Relearned | None,
    ) -> None:
        check_relearned(relearned)
        if relearned is not None and retain is None:
            raise ValueError(
                "`retain` batches should be given with `relearned`: their gradient is taken at "
                "theta, and that of the loss of the Trainer, its retain term too, at the copy. "
                "Found none. Pass retain=batches, with labels; or use UnlearningTrainer."
            )
        check_risks("probes", probes or {}, taken=[RETAIN])
        if probes and recorder is None:
            raise ValueError(
                "`recorder` should be given with `probes`, whose gradients it records. Found none. "
                "Pass recorder=Recorder(model, path), or leave `probes` out."
            )
        optimizer: Any = trainer.optimizer  # which there may not be yet
        check_gradients_can_be_had(trainer, optimizer)
        _check_retain_gradient(trainer, rectifier, given=retain is not None)
        self.trainer, self.rectifier, self.relearned = trainer, rectifier, relearned
        self.given_recorder = recorder
        self.recorder: Recorder | None = None
        self.until_trained = ExitStack()
        self.probes = probes or {}
        self.batches = None if retain is None else RetainBatches(retain)
        self.log = RectificationLog()
        self.cut: LeafCut | None = None  # while a loss is computed whose retain term is to be cut
        self.begin()

    def begin(self) -> None:
        """Begin a step."""
        self.term: RetainTerm | None = None
        self.loss: Tensor | float = 0.0
        self.micro = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse training in which no gradient can be had, and attach the optimizer."""
        check_gradients_can_be_had(self.trainer, kwargs["optimizer"])
        at_copy.check_trained(self.relearned, self._model)
        self.recorder = None
        if self.given_recorder is not None:
            self.recorder = begun_recorder(self.given_recorder, self.trainer, self.until_trained)
        self.begin()
        self.log = RectificationLog()
        self.rectifier.attach(kwargs["optimizer"])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take note of what was done, which in update space is known from now on."""
        self.log.take(self.rectifier.report)
        if self.recorder is not None:
            stop_if_due(self.recorder.stop, control)

    def at_copy(self, model: nn.Module, inputs: Mapping[str, Any]) -> AbstractContextManager[Any]:
        """A block in which the Trainer makes its own pass where the model has relearned."""
        if self.relearned is None:
            return nullcontext()
        trainer: Any = self.trainer
        batch = inputs if self.relearned.loss is not None else trainer._prepare_inputs(inputs)
        autocast = trainer.compute_loss_context_manager
        place = at_copy.of_batch(self.relearned, model, batch, autocast)
        assert place is not None
        return place.elsewhere(self._model, {}, trainer.accelerator.scaler).block()

    @contextmanager
    def cutting(self) -> Iterator[None]:
        """A block in which the Trainer makes its own pass, without the retain term that follows."""
        if self.batches is not None:
            yield
            return
        self.cut = cut = LeafCut()
        try:
            yield
        finally:
            self.cut = None
        if not cut.pairs:
            raise RuntimeError(
                f"The loss of {type(self.trainer).__name__} should call `compute_retain_loss` in "
                "each training step, for its retain term to be taken apart. Found no call. Pass "
                "retain= batches, from which the retain gradient is then taken."
            )
        if self.term is None:
            self.term = RetainTerm(list(trainable(self._model).values()))
        self.term.add(cut, seed=self._scale / self.trainer.args.gradient_accumulation_steps)

    def take(self, loss: Tensor) -> None:
        """Count a micro-batch, and rectify after the last one of a step: nothing is clipped yet."""
        self.loss, self.micro = self.loss + loss.mean(), self.micro + 1
        if not self.trainer.accelerator.sync_gradients:
            return
        distributed.take_over_step(list(trainable(self._model).values()))
        gradients, micro = self._gradients(), self.micro
        self.begin()
        if self.recorder is None:
            self.rectifier.observe(gradients)
            self.rectifier.rectify(gradients)
        else:
            self.recorder.record(
                gradients, rectifier=self.rectifier, n_micro=micro, relearned=self.relearned
            )
        distributed.take_step(self._model)

    def end(self) -> None:
        """Leave the step that is under way to the Trainer, and the optimizer alone."""
        if self.micro and self.trainer.is_deepspeed_enabled:
            raise RuntimeError(
                "`detach` should be called between two steps under DeepSpeed, whose engine knows "
                f"nothing of the gradients of a step under way. Found {self.micro} micro-batches "
                "of one. Call it in `on_step_end`, or after training."
            )
        if self.term is not None:
            self.term.put_back()
        self.rectifier.detach()

    @property
    def _model(self) -> Any:
        """The model without what averages its gradients."""
        return model_of(self.trainer)

    @property
    def _scale(self) -> float:
        return current_scale(self.trainer.accelerator.scaler)

    def _gradients(self) -> Gradients:
        """The gradients of the step, taken out of `.grad`, as means over the processes."""
        parameters, scale = list(trainable(self._model).values()), self._scale
        vectors = {OBJECTIVE: _taken(parameters)}
        weights = {OBJECTIVE: {OBJECTIVE: 1 / scale}}
        if self.term is not None:
            vectors |= {RETAIN: self.term.weighted, UNWEIGHTED: self.term.unweighted}
        if distributed.averages(self._model):
            vectors = distributed.average(parameters, vectors)
        if self.term is not None:
            # The vector named objective is its forget part. Named so, the objective counts in a
            # record as a loss of its own, not as a sum that is declared with weights.
            (factor,) = distributed.mean([self.term.factor])
            weights[OBJECTIVE][RETAIN] = 1 / scale
            # Weights that cancel out leave a retain gradient of zero, which the rectifier counts.
            mean = 1 / factor if factor else 0.0
            weights[RETAIN] = {RETAIN: mean, UNWEIGHTED: mean}
            loss = self.term.loss * mean
        else:
            risk = self._risk()
            vectors[RETAIN], loss = list(risk.vector), risk.loss
            weights[RETAIN] = {RETAIN: 1.0}
        losses = {OBJECTIVE: float(self.loss), RETAIN: loss}
        if self.recorder is not None and self.recorder.due:
            for name, data in self.probes.items():
                with noting_risk(name):
                    risk = self._risk_on(data)
                vectors[name], losses[name] = list(risk.vector), risk.loss
                weights[name] = {name: 1.0}
        return Gradients(parameters, [], vectors, weights, losses, scale)

    def _risk(self) -> RiskGradient:
        """The gradient of the risk on retain batches, as many as the step has of its own."""
        assert self.batches is not None
        trainer = self.trainer
        # As many at the end of an epoch, where a window is shorter: none is passed over for good.
        count = trainer.args.gradient_accumulation_steps * distributed.world_size()
        window = self.batches.window(trainer.state.global_step * count, count=count)
        return self._risk_on(window)

    def _risk_on(self, data: RiskSet) -> RiskGradient:
        autocast = self.trainer.compute_loss_context_manager
        return risk_gradient(self._model, data, autocast=autocast)


class Rectified:
    """A Trainer whose steps are rectified, until `detach` puts everything back."""

    def __init__(self, trainer: Trainer, kind: type[Trainer], steps: _Steps) -> None:
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
        steps = _Steps(rectified, rectifier, retain, recorder, probes, relearned)
    except BaseException:
        rectified.__class__ = kind
        raise
    rectified._rectified = steps
    rectified.add_callback(steps)
    return Rectified(trainer, kind, steps)


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


def _taken(parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients, which `.grad` has no longer."""
    grads = [parameter.grad for parameter in parameters]

    def take() -> None:
        for parameter in parameters:
            parameter.grad = None

    to_the_end(take)
    return grads
