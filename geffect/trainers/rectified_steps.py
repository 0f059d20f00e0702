"""The rectified steps of a Trainer: the gradients of its own passes, and those of what stays."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

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

from . import at_copy
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


class RectifiedSteps(TrainerCallback):
    """The steps of a Trainer that are rectified, and the one that is under way.

    All that the Trainer has in addition, so that names of its own are left to it.
    """

    def __init__(
        self,
        trainer: Trainer,
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


def _taken(parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients, which `.grad` has no longer."""
    grads = [parameter.grad for parameter in parameters]

    def take() -> None:
        for parameter in parameters:
            parameter.grad = None

    to_the_end(take)
    return grads
