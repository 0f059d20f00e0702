"""The backward passes that the losses of a step need, and what is found as they run."""

import inspect
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from geffect import distributed
from geffect.forwards import Sharing, check_no_loss_asked
from geffect.hooks import BEFORE_STEPS, Hooks
from geffect.interrupts import put_back_after
from geffect.sources import OBJECTIVE

from .given import Loss, Values, check_derivatives, check_loss, resolved, tensors_among
from .graph import Graph, other_leaves
from .order import Order, ordered, taken_elsewhere


@dataclass(frozen=True)
class Elsewhere:
    """Where the objective's gradient is taken, if that is not where the parameters are.

    - `block`: makes a block inside of which they are there.
    - `stays`: the names of losses that are taken where the parameters are, though the objective is
      a sum with them among its terms.
    """

    block: Callable[[], AbstractContextManager[object]]
    stays: Collection[str] = ()


@dataclass(frozen=True)
class Passes:
    """The backward passes of a step, in their order.

    What is a function is asked right before its pass, so that its graph is gone before the next
    one's begins. For what is `aside` in the order, `model` and random numbers are put back. What is
    `moved` is taken inside of the block of `elsewhere`.

    `leaves` are what the graphs start from: the parameters, and after them anything else, such as a
    soft prompt, which must not collect every pass either.

    With `told_later` several processes do not ask each other what has gone wrong of each loss: who
    runs the passes tells it when they are over.
    """

    parameters: Sequence[Tensor]
    order: Order
    graphs: Mapping[str, Graph]  # of the tensors that are there already, also of other sources
    leaves: list[Tensor]
    values: Values  # of the scalars that are known
    model: nn.Module | None
    elsewhere: Elsewhere | None
    told_later: bool
    sharing: Sharing = field(default_factory=Sharing)

    @property
    def losses(self) -> dict[str, float]:
        """The values of the sources; to be read once every loss has been asked.

        Raises NotFinite, of losses on a device whose values were not read before.
        """
        return {
            source: sum(weight * self.values[name] for name, weight in terms.items())
            for source, terms in self.order.terms.items()
        }

    def of(self, sources: Collection[str]) -> "Passes":
        """The passes that some of the sources need, in the same order."""
        return replace(self, order=self.order.of(sources))

    def ask(self, name: str) -> Graph:
        """The scalar of a pass, from its function where it is one. Nothing lies in `.grad` then."""
        scalar = self.order.given[name]
        if isinstance(scalar, Tensor):
            return self.graphs[name]
        with nullcontext() if self.told_later else distributed.raise_on_all_ranks():
            graph = Graph.of(distributed.share_of(self.parameters, self._asked(name, scalar)))
            check_derivatives(name, graph)
            self._value(name, graph.loss)
            if not graph.reaches(self.parameters):
                raise _of_another_model(name, self.parameters)
        self.leaves.extend(other_leaves([graph], self.leaves))
        return graph

    def run(self, name: str, graph: Graph) -> None:
        """Add the gradient of one pass to `.grad`."""
        loss = graph.loss
        seeds = self.order.seeds
        seed = torch.full_like(loss, seeds[name]) if name in seeds else None
        keeps = self._keeps_graph(name, graph)
        try:
            distributed.backward(self.parameters, loss, seed=seed, retain_graph=keeps, name=name)
        except RuntimeError as error:
            if "backward through the graph a second time" not in str(error):
                raise
            raise RuntimeError(
                f"Loss `{name}` should have a graph that no backward pass has freed. Found one "
                "that was, by another loss of the step or before it. Compute it anew; let losses "
                "that are functions share a forward pass by `geffect.objectives.SharedForward`."
            ) from error
        self.sharing.pass_made(freed=not keeps, is_aside=name in self.order.aside)

    def _value(self, name: str, loss: Tensor) -> None:
        self.values.add(name, loss)
        if not self.told_later and _asks_others(self.parameters):
            self.values.read()

    def not_reaching(self, parameters: Sequence[Tensor]) -> list[str]:
        """The tensors among the losses in whose graph none of the parameters is."""
        return [name for name in self.order.tensors if not self.graphs[name].reaches(parameters)]

    def _asked(self, name: str, function: Callable[[], Any]) -> Tensor:
        """What the function returns, if that is a loss and it has left all else alone."""
        versions = [parameter._version for parameter in self.parameters]
        behind = self.order.behind(name)
        here = nullcontext() if self.model is None else distributed.unsynchronised(self.model)
        hooks = Hooks()

        def ask() -> Any:
            hooks.add(BEFORE_STEPS.register, self._refuse)
            return self.sharing.ask(function, is_last=len(tensors_among(behind)) == len(behind))

        with here:
            loss = put_back_after(ask, hooks.remove)
        if inspect.iscoroutine(loss):
            loss.close()
        if any(leaf.grad is not None for leaf in self.leaves):
            raise RuntimeError(
                f"Loss `{name}` should leave `.grad` alone: its backward pass is made here. Found "
                "gradients after it was asked. Let the function return the loss, without a "
                "backward pass of its own."
            )
        if versions != [parameter._version for parameter in self.parameters]:
            raise RuntimeError(
                f"Loss `{name}` should leave the parameters as they are: all losses of a step are "
                "taken at the same ones. Found some that were changed while it was asked. Step "
                "after the backward pass, outside of the function."
            )
        return check_loss(name, loss, asked=True)

    def _refuse(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        """Refuse a step that an optimizer of the parameters takes inside of a loss."""
        stepped = {id(tensor) for group in optimizer.param_groups for tensor in group["params"]}
        if not stepped.isdisjoint(map(id, self.parameters)):
            check_no_loss_asked()

    def _keeps_graph(self, name: str, graph: Graph) -> bool:
        """Whether a loss that is still to come may need the graph of this one."""
        behind = self.order.behind(name)
        tensors = tensors_among(behind)
        functions = len(tensors) < len(behind)
        if name in self.graphs:
            after = list(self.graphs).index(name) + 1  # also by a source whose passes run later
            exact = graph.shares_with(islice(self.graphs.values(), after, None))
            perhaps = functions
        else:
            exact = graph.shares_with(self.graphs[later] for later in tensors)
            perhaps = functions and self.sharing.holds
        # A compiled pass frees its graph in any case, and what shares it is run anew.
        shares = perhaps and not graph.is_compiled
        return exact or (shares and distributed.shares_forwards(self.parameters))


def plan(
    parameters: Sequence[Tensor],
    losses: Mapping[str, Loss],
    *,
    scale: float = 1.0,
    model: nn.Module | None = None,
    protected: Collection[str] = (),
    elsewhere: Elsewhere | None = None,
    told_later: bool = False,
) -> Passes:
    """The passes that the gradients of the losses need. Losses may share a forward.

    - `scale`: multiplies what a pass leaves, and not what the sources are: half precision keeps
      small gradients only where they are scaled up on their way.
    - `model`: where functions run, and what the passes that are `aside` leave as it was.
    - `protected`: losses that training takes beside its objective, before those it only watches.
    - `elsewhere`: where the objective's gradient is taken. All losses are functions then.
    - `told_later`: on several processes, that the caller tells what goes wrong, after the passes.
    """
    given, terms = resolved(losses)
    _warn_of_hooks(parameters, terms)
    moved: Collection[str] = ()
    if elsewhere is not None:
        given, terms, moved = taken_elsewhere(given, terms, [*elsewhere.stays, *protected])
    given = {
        name: distributed.share_of(parameters, loss) if isinstance(loss, Tensor) else loss
        for name, loss in given.items()
    }
    order = ordered(given, terms, scale=scale, protected=protected, moved=moved)
    graphs = {name: Graph.of(loss) for name, loss in order.tensors.items()}
    for name, graph in graphs.items():
        check_derivatives(name, graph)
    told_later = told_later and distributed.world_size() > 1
    values = Values(later=told_later)
    for name, loss in order.tensors.items():
        values.add(name, loss)
    if not told_later and _asks_others(parameters):
        values.read()
    leaves = [*parameters, *other_leaves(graphs.values(), parameters)]
    return Passes(parameters, order, graphs, leaves, values, model, elsewhere, told_later)


def check_reached(passes: Passes, parameters: Sequence[Tensor]) -> None:
    """Refuse the losses of another model: each has to reach one of the parameters.

    >>> ours, other = (torch.ones((), requires_grad=True) for _ in range(2))
    >>> check_reached(plan([ours], {"forget": other**2}), [ours])
    Traceback (most recent call last):
    ValueError: Loss `forget` should be computed with the model that is watched. Found none of ...
    """
    others = passes.not_reaching(parameters)
    if others:
        raise _of_another_model(others[0], parameters)


def _warn_of_hooks(parameters: Sequence[Tensor], terms: Mapping[str, Mapping[str, float]]) -> None:
    """Say that a hook may make another gradient of a sum than the sum of gradients."""
    if len(terms.get(OBJECTIVE, ())) < 2:
        return
    hooked = [p for p in parameters if getattr(p, "_backward_hooks", None)]
    if hooked:
        warnings.warn(
            "No hook on the gradients of parameters should do other than multiply them where an "
            "objective is a sum of losses: each has a backward pass of its own, and hooks see "
            f"these. Found hooks on {len(hooked)} parameters. If they clip, round or add noise, "
            "pass the sum as one loss, `objective=lambda: ...`.",
            stacklevel=5,
        )


def check_no_step_inside(parameters: Iterable[Tensor]) -> None:
    """Refuse optimizers that step inside of a backward pass: each loss of a step has one."""
    hooked = [p for p in parameters if getattr(p, "_post_accumulate_grad_hooks", None)]
    if hooked:
        raise RuntimeError(
            "No hook should run after a gradient is accumulated: several backward passes make a "
            f"step here. Found such hooks on {len(hooked)} parameters, as of an optimizer that "
            "steps inside of the backward pass and frees the gradient there. Step after the "
            "backward pass; or save checkpoints and record what `geffect.replay` finds in them."
        )


def loss_scale(scaler: GradScaler | None, device: torch.device) -> float:
    """What a GradScaler multiplies losses on the device by; 1 where there is none.

    >>> loss_scale(None, torch.device("cpu"))
    1.0
    """
    if scaler is None or not scaler.is_enabled():
        return 1.0
    # Not `get_scale()`: until it has scaled something a scaler refuses to unscale.
    return float(scaler.scale(torch.ones((), device=device)))


def _asks_others(parameters: Sequence[Tensor]) -> bool:
    """Whether a loss that is not finite has to be known before its pass, for all to leave it."""
    return distributed.world_size() > 1 or distributed.is_in_engine(parameters[0])


def _of_another_model(name: str, parameters: Sequence[Tensor]) -> ValueError:
    return ValueError(
        f"Loss `{name}` should be computed with the model that is watched. Found none of "
        f"its {len(parameters)} parameters in the graph of the loss, as where the model was "
        "copied, wrapped or loaded again since. Make recorder and rectifier from the model "
        "that computes the losses."
    )
