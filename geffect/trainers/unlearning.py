"""A Trainer for unlearning: an objective on forget and retain batches, rectified and recorded."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainingArguments

from geffect import distributed
from geffect.capture import Recorder
from geffect.data.collate import collate
from geffect.data.pairs import Items, Pairs
from geffect.gradients import AtCopy
from geffect.losses import Loss, Scalar
from geffect.objectives import (
    Objective,
    Reference,
    SharedForward,
    as_objective,
    check_sides,
    step_losses,
)
from geffect.projection import Rectifier
from geffect.relearning import Relearned, check_relearned
from geffect.risk import (
    check_answers,
    inputs_of,
    nll,
    sequence_sum,
    token_log_probabilities,
)
from geffect.sources import FORGET, OBJECTIVE, is_risk

from . import at_copy, objective_state, rectifier_state
from .compared import Compared
from .loop import begun_recorder, check_gradients_can_be_had, model_of, stop_if_due
from .rectification_log import RectificationLog
from .training_sets import TrainingSets

Batches = dict[str, Any]
"""A batch of each set, by its name: {"forget": {"input_ids": ..., ...}, "retain": ...}."""


class UnlearningTrainer(Trainer):
    """A `transformers.Trainer` that minimises an unlearning objective on forget and retain data.

        trainer = UnlearningTrainer(
            model, args, objective=NPO(beta=0.1), forget=forget, retain=retain,
            rectifier=Rectifier(model, space="update"), recorder=partial(Recorder, path="run.h5"),
        )
        trainer.train()

    Each forget item is met once an epoch, with a retain item beside it (`Pairing`, by the seed of
    the arguments). Items have `input_ids` and `labels`; the model is called with these and every
    further column, as `geffect.data.collate` puts them into batches. An item may hold several
    answers, {"original": item, "alternate": item}: its risk is that of the original. Answers of
    other items, `random1` and so on, are drawn where an objective takes them and items have none
    (`geffect.data.others`, by the same seed).

    The loss of a step is the mean over its micro-batches, and over the processes, of the objective
    on each, which has a reduction of its own; so are the risks. Gradients are accumulated over the
    step, averaged, rectified, clipped and applied, in this order.

    - `objective`: an `Objective`, a name of the catalogue such as "npo", or weights of risks such
      as {"forget": -1.0}. It stands in the file of the recorder.
    - `reference`: the model before unlearning, for an objective that compares with it; a frozen
      copy of `model` if left out.
    - `forget`: a set of items.
    - `retain`: a set of items, or several by their names, one of them "retain". A rectifier
      protects those that its `protect` names.
    - `train_dataset`: ready pairs {"forget": item, "retain": item}, which the Trainer draws as it
      does its samples; `forget` and `retain` are only evaluated then.
    - `eval_dataset`: further sets by their names, or others in place of those. `evaluate` gives the
      risk on each, the NLL per answer token over all of its tokens: `eval_forget_nll`,
      `eval_retain_nll`, `eval_world_nll`.
    - `rectifier`: its state is saved with checkpoints, and restored. In either space it is attached
      to the optimizer for as long as training goes: what is not stepped takes no part in the
      constraint.
    - `recorder`: one that was made for `model`, which the caller closes; or what makes one,
      `partial(Recorder, path=...)`, called with the model when training begins and closed when it
      ends. Resumed from a checkpoint such a recorder continues its file at that step.
    - `relearned`: a `geffect.Relearned`, where the gradient of the objective is taken, but for its
      parts that are of data to keep. What is relearned is the forget batch of each micro-batch, or
      the `loss` that it has. The logged loss is that of the objective there.

    Recorded training ends with the parameters that it would have ended with, bit for bit. Without a
    rectifier a recorded step costs one backward pass for each risk, but for one that the objective
    is a multiple of, as GA is of the forget risk, and a forward pass over retain data that the
    objective does not use. A rectified step takes the objective's parts one by one: to record it
    costs one pass, for the forget risk, or none if that is among the parts.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments | None = None,
        *,
        objective: Objective | Mapping[str, float] | str,
        reference: Reference | None = None,
        forget: Items | None = None,
        retain: Items | Mapping[str, Items] | None = None,
        train_dataset: Dataset[Any] | None = None,
        eval_dataset: Mapping[str, Items] | None = None,
        rectifier: Rectifier | None = None,
        recorder: Recorder | Callable[..., Recorder] | None = None,
        relearned: Relearned | None = None,
        data_collator: Callable[..., dict[str, Any]] | None = None,
        **options: Any,
    ) -> None:
        minimised = as_objective(objective)
        check_relearned(relearned)
        args = args or TrainingArguments("tmp_trainer")  # as a Trainer has it
        seed = args.seed if args.data_seed is None else args.data_seed
        sets = TrainingSets.of(forget, retain, train_dataset)
        pairs = sets.for_training(minimised, seed)
        evaluated = sets.evaluated(eval_dataset)
        if rectifier is not None:
            sets.check_protected(rectifier.protect)
        super().__init__(
            model,
            args,
            data_collator=data_collator or collate,
            train_dataset=pairs,
            eval_dataset=evaluated,
            compute_metrics=_mean_nll,
            **options,
        )
        # Losses are means of their own, to be divided by the number of micro-batches.
        self.model_accepts_loss_kwargs = False
        self.rectifier, self.recorder, self.relearned = rectifier, recorder, relearned
        self.objective: Objective = minimised
        self._running: Objective = minimised
        self._compared = Compared(minimised, model, reference)
        self.reference = self._compared.reference
        self._pairing = sets.pairing(seed)
        self._recorder: Recorder | None = None
        self._until_trained = ExitStack()
        self._risks: dict[str, list[Tensor]] = {}  # of the micro-batches since the last log
        self._rectifications = RectificationLog()
        self.add_callback(_Events(self))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as a `Trainer` does. What the objective has of a run begins anew."""
        self._running = self.objective.begin(self.model)
        with ExitStack() as self._until_trained:
            return super().train(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batches,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The objective, and what the model returns for the forget batch where that is asked."""
        self._check(model, inputs)
        shared = SharedForward(model)
        loss = self._running(shared, inputs, self.reference)
        if not return_outputs:
            return loss
        return loss, shared(**inputs_of(model, inputs[FORGET]))

    def training_step(
        self,
        model: nn.Module,
        inputs: Batches,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Accumulate a micro-batch; at the last of a step leave the (rectified) gradient."""
        if self.rectifier is None and self._recorder is None and self.relearned is None:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        optimizer: Any = self.optimizer
        if hasattr(optimizer, "train"):  # as those have that need no schedule
            optimizer.train()
        inputs = self._prepare_inputs(inputs)
        with distributed.unsynchronised(model), self.compute_loss_context_manager():
            losses, place = self._losses(model, inputs)
        # Where the Trainer does not say how many a window has, it divides by what was asked for.
        micro_batches = getattr(
            self, "current_gradient_accumulation_steps", self.args.gradient_accumulation_steps
        )
        values: dict[str, Tensor] = {}

        def share_of(name: str, scalar: Scalar) -> Tensor:
            with distributed.unsynchronised(model), self.compute_loss_context_manager():
                loss = scalar if isinstance(scalar, Tensor) else scalar()
            if is_risk(name) and not at_copy.is_at_copy():
                self._risks.setdefault(name, []).append(loss.detach())
            share = loss / micro_batches
            values.setdefault(name, share.detach())  # that of the objective comes first
            return share

        shares: dict[str, Loss] = {}
        for name, loss in losses.items():
            if isinstance(loss, Tensor):
                shares[name] = share_of(name, loss)
            else:
                shares[name] = loss if isinstance(loss, Mapping) else partial(share_of, name, loss)
        self._backward(shares, place)
        return _value(losses[OBJECTIVE], values)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, Tensor, Tensor]:
        """The summed NLL of each sample, and how many of its tokens are scored."""
        batch = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            log_p, scored = token_log_probabilities(model, batch)
        return None, -sequence_sum(log_p, scored), scored.sum(dim=1)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log; with the loss go the means since the last time of what it was made of.

        They are the risks on the training batches that were computed, as `retain_nll`, and what the
        rectifier did, as `rectify/cosine_before` and so on (`RectificationLog`).
        """
        if "loss" in logs:
            risks, self._risks = self._risks, {}
            means = distributed.mean([torch.stack(v).mean().item() for v in risks.values()])
            nlls = {f"{name}_nll": mean for name, mean in zip(risks, means, strict=True)}
            logs = {**logs, **nlls, **self._rectifications.means()}
        super().log(logs, *args, **kwargs)

    def _losses(self, model: nn.Module, batch: Batches) -> tuple[dict[str, Loss], AtCopy | None]:
        """The losses of a micro-batch: the objective, what it is made of, and risks beside it.

        They are functions, called one after the other, except for parts of the objective that are
        tensors. With them where the gradient of the objective is taken.
        """
        self._check(model, batch)
        shared = SharedForward(model) if distributed.shares_forwards(model.parameters()) else model
        parts = self._running.components(shared, batch, self.reference)
        # A rectifier looks at every part of a sum, and at a single one where it is to find that.
        apart = len(parts) > 1 and not (self.rectifier is None and self.relearned is None)
        apart = apart or (self.rectifier is not None and self.rectifier.part == "forget")
        losses = step_losses(parts, apart=apart)
        of_step = at_copy.with_parts(self.relearned, self._running, parts)
        place = at_copy.of_batch(of_step, model, batch, self.compute_loss_context_manager)
        for name in self._wanted(batch):
            losses.setdefault(name, partial(nll, shared, batch[name]))
        return losses, place

    def _check(self, model: nn.Module, batch: Batches) -> None:
        """Refuse a micro-batch without a side that the objective takes, or without answers."""
        check_sides(self.objective, batch, add="Add {side} to the items of `train_dataset`.")
        check_answers(model, batch)

    def _wanted(self, sets: Iterable[str]) -> list[str]:
        """The sets whose risks have to be known of this micro-batch."""
        if self._recorder is not None and self._recorder.due:
            return [*sets]
        return [] if self.rectifier is None else [name for name in sets if name != FORGET]

    def _backward(self, losses: Mapping[str, Any], relearned: AtCopy | None) -> None:
        backward: Callable[..., None]
        accumulate, scaler = not self.accelerator.sync_gradients, self.accelerator.scaler
        if self._recorder is not None:
            backward = partial(
                self._recorder.backward, rectifier=self.rectifier, weights=self._running.of_step()
            )
        elif self.rectifier is not None:
            backward = self.rectifier.backward
        else:
            assert relearned is not None
            at_copy.backward_at_copy(model_of(self), relearned, losses, scaler)
            return
        with distributed.micro_batch(self.model_wrapped, last=not accumulate):
            backward(accumulate=accumulate, scaler=scaler, relearned=relearned, **losses)

    def _begin(self, optimizer: torch.optim.Optimizer) -> None:
        """Once model and optimizer are as they will be: bring what works on them to them."""
        self._compared.prepare(self.accelerator)
        if not (self.rectifier is None and self.recorder is None and self.relearned is None):
            check_gradients_can_be_had(self, optimizer)
        at_copy.check_trained(self.relearned, model_of(self))
        if self.rectifier is not None:
            self.rectifier.attach(optimizer)
            self._until_trained.callback(self.rectifier.detach)
        self._recorder = None
        if self.recorder is not None:
            self._recorder = begun_recorder(self.recorder, self, self._until_trained)
            self._recorder.note_objective(self._running, reference=self._compared.origin)

    def _get_train_sampler(self, *args: Any) -> Any:
        if isinstance(self.train_dataset, Pairs):
            return self._pairing
        return super()._get_train_sampler(*args)

    # Columns are those of a set, not of the model: what is not needed goes when items are collated.

    def _get_collator_with_removed_columns(
        self, data_collator: Any, description: Any = None
    ) -> Any:
        return data_collator

    def _remove_unused_columns(self, dataset: Any, description: Any = None) -> Any:
        return dataset

    # The state of a rectifier and of the objective goes where that of the optimizer does.

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        objective_state.save(self._running, output_dir, writes=self.args.should_save)
        if self.rectifier is not None:
            rectifier_state.save(self.rectifier, output_dir, writes=self.args.should_save)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            objective_state.restore(self._running, checkpoint)
        if self.rectifier is not None and checkpoint is not None:
            distributed.check_layout(self.model_wrapped)  # what the state is of
            rectifier_state.restore(self.rectifier, checkpoint)


class _Events(TrainerCallback):
    def __init__(self, trainer: UnlearningTrainer) -> None:
        self._trainer = trainer
        self._epochs = count()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Counted from here on: in the state an epoch that is cut short never comes to its end.
        self._epochs = count(int(state.epoch or 0))
        self._trainer._begin(kwargs["optimizer"])

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._pairing.epoch = next(self._epochs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._trainer.rectifier is not None:
            self._trainer._rectifications.take(self._trainer.rectifier.report)
        if not self._trainer.accelerator.optimizer_step_was_skipped:
            self._trainer._running.advance()
        if self._trainer._recorder is not None:
            stop_if_due(self._trainer._recorder.stop, control)


def _value(objective: Loss, values: Mapping[str, Tensor]) -> Tensor:
    """That of the objective, from the values of the losses."""
    terms = objective if isinstance(objective, Mapping) else {OBJECTIVE: 1.0}
    return torch.stack([weight * values[name] for name, weight in terms.items()]).sum()


def _mean_nll(prediction: EvalPrediction) -> dict[str, float]:
    summed, tokens = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
    if not tokens.sum():
        raise ValueError(
            "`eval_dataset` should have an answer token in each set: a label that is not -100. "
            f"Found none in one of {len(tokens)} items. Mark the answers in the labels."
        )
    return {"nll": float(summed.sum(dtype=np.float64) / tokens.sum())}
