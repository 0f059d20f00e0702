"""The backward passes that the losses of a step need, and what each loss is in terms of these."""

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

from .given import (
    Loss,
    Scalar,
    Values,
    check_derivatives,
    check_loss,
    resolved,
    seeds_of,
    tensors_among,
)
from .graph import Graph, other_leaves


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
    """The backward passes of a step: one for each different scalar among its losses, in order.

    `given` are the scalars in the order of their passes. What is a function is asked right before
    its pass, so that its graph is gone before the next one's begins. First comes what training
    takes: the tensors that are there, then the functions of the objective. Then, `aside`, what is
    only looked at, for which `model` and random numbers are put back. Those of `moved`, which are
    of the objective, come first where there are any, inside of the block of `elsewhere`.

    `weights` gives every source as a combination of what the passes leave in `.grad`, so that a
    declared combination costs no pass. `leaves` are what the graphs start from: the parameters, and
    after them anything else, such as a soft prompt, which must not collect every pass either.

    With `told_later` several processes do not ask each other what has gone wrong of each loss: who
    runs the passes tells it when they are over.
    """

    parameters: Sequence[Tensor]
    given: Mapping[str, Scalar]
    terms: Mapping[str, Mapping[str, float]]  # of the sources, in the scalars
    seeds: Mapping[str, float]
    aside: Collection[str]
    graphs: Mapping[str, Graph]  # of the tensors that are there already
    needed_later: Mapping[str, bool]  # by the graph of a tensor behind it, of tensors
    leaves: list[Tensor]
    scale: float = 1.0  # of a GradScaler, by which all gradients come out multiplied
    model: nn.Module | None = None
    elsewhere: Elsewhere | None = None
    moved: Collection[str] = ()
    values: Values = field(default_factory=Values)  # of the scalars that are known
    told_later: bool = False
    sharing: Sharing = field(default_factory=Sharing)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The scalars that are there already."""
        return tensors_among(self.given)

    @property
    def last(self) -> str:
        """The name of the pass that runs last."""
        return list(self.given)[-1]

    @property
    def names(self) -> list[str]:
        """The scalars in the order of the sources, whenever their passes come."""
        return list(dict.fromkeys(name for terms in self.terms.values() for name in terms))

    @property
    def weights(self) -> Mapping[str, Mapping[str, float]]:
        """Every source in terms of what the passes leave."""
        return {
            source: {name: weight / self.seeds.get(name, 1.0) for name, weight in terms.items()}
            for source, terms in self.terms.items()
        }

    @property
    def losses(self) -> dict[str, float]:
        """The values of the sources; to be read once every loss has been asked.

        Raises NotFinite, of losses on a device whose values were not read before.
        """
        return {
            source: sum(weight * self.values[name] for name, weight in terms.items())
            for source, terms in self.terms.items()
        }

    def ask(self, name: str) -> Graph:
        """The scalar of a pass, from its function where it is one. Nothing lies in `.grad` then."""
        scalar = self.given[name]
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
        seed = torch.full_like(loss, self.seeds[name]) if name in self.seeds else None
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
        self.sharing.pass_made(freed=not keeps, is_aside=name in self.aside)

    def _value(self, name: str, loss: Tensor) -> None:
        self.values.add(name, loss)
        if not self.told_later and _asks_others(self.parameters):
            self.values.read()

    def of(self, sources: Collection[str]) -> "Passes":
        """The passes that some of the sources need, in the same order."""
        terms = {name: terms for name, terms in self.terms.items() if name in sources}
        needed = {name for own in terms.values() for name in own}
        given = {name: loss for name, loss in self.given.items() if name in needed}
        aside = [name for name in self.aside if name in needed]
        moved = [name for name in self.moved if name in needed]
        return replace(self, given=given, terms=terms, aside=aside, moved=moved)

    def not_reaching(self, parameters: Sequence[Tensor]) -> list[str]:
        """The tensors among the losses in whose graph none of the parameters is."""
        return [name for name in self.tensors if not self.graphs[name].reaches(parameters)]

    def _asked(self, name: str, function: Callable[[], Any]) -> Tensor:
        """What the function returns, if that is a loss and it has left all else alone."""
        versions = [parameter._version for parameter in self.parameters]
        behind = self._behind(name)
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

    def _behind(self, name: str) -> dict[str, Scalar]:
        """The scalars whose passes come after this one, at the same parameters."""
        place = list(self.given).index(name)
        behind = islice(self.given.items(), place + 1, None)
        return {n: s for n, s in behind if (n in self.moved) == (name in self.moved)}

    def _keeps_graph(self, name: str, graph: Graph) -> bool:
        """Whether a loss that is still to come may need the graph of this one."""
        behind = self._behind(name)
        tensors = tensors_among(behind)
        functions = len(tensors) < len(behind)
        if isinstance(self.given[name], Tensor):
            exact, perhaps = self.needed_later[name], functions
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
    found, terms = resolved(losses)
    _warn_of_hooks(parameters, terms)
    moved: Collection[str] = ()
    if elsewhere is not None:
        found, terms, moved = _moved(found, terms, [*elsewhere.stays, *protected])
    given = {
        name: distributed.share_of(parameters, loss) if isinstance(loss, Tensor) else loss
        for name, loss in found.items()
    }
    tensors = tensors_among(given)
    graphs = {name: Graph.of(loss) for name, loss in tensors.items()}
    for name, graph in graphs.items():
        check_derivatives(name, graph)
    told_later = told_later and distributed.world_size() > 1
    values = Values(later=told_later)
    for name, loss in tensors.items():
        values.add(name, loss)
    if not told_later and _asks_others(parameters):
        values.read()
    single = seeds_of(terms)
    seeds = {n: scale * single.get(n, 1.0) for n in given} if scale != 1.0 else single
    turns = _turns(given, terms, protected, moved)
    order = sorted(given, key=turns.__getitem__)
    among = {name: graphs[name] for name in order if name in graphs}
    return Passes(
        parameters=parameters,
        given={name: given[name] for name in order},
        terms=terms,
        seeds=seeds,
        aside=[name for name in order if turns[name][0] == 2],
        graphs=among,
        needed_later={
            name: graph.shares_with(islice(among.values(), place, None))
            for place, (name, graph) in enumerate(among.items(), 1)
        },
        leaves=[*parameters, *other_leaves(among.values(), parameters)],
        scale=scale,
        model=model,
        elsewhere=elsewhere,
        moved=moved,
        values=values,
        told_later=told_later,
    )


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


def _turns(
    given: Mapping[str, Scalar],
    terms: Mapping[str, Collection[str]],
    protected: Collection[str],
    moved: Collection[str],
) -> dict[str, tuple[int, bool, bool]]:
    """What the passes are ordered by; those that are aside begin with 2.

    What training takes does not depend on what is watched beside it.
    """
    of_objective = {*terms.get(OBJECTIVE, given)}
    of_protected = {part for name in protected for part in terms.get(name, ())}

    def turn(name: str) -> tuple[int, bool, bool]:
        is_there, is_other = isinstance(given[name], Tensor), name not in of_protected
        if is_there and (name in of_objective or not is_other):
            return 0, is_other, False
        of_turn = (1, name not in moved, False)
        return of_turn if name in of_objective else (2, is_other, not is_there)

    return {name: turn(name) for name in given}


def _moved(
    found: Mapping[str, Scalar],
    terms: Mapping[str, dict[str, float]],
    stays: Collection[str],
) -> tuple[dict[str, Scalar], dict[str, dict[str, float]], list[str]]:
    """The scalars and terms where the objective's gradient is taken elsewhere, and which move.

    A scalar that a source needs beside the objective and its parts is asked twice, once at each
    place.
    """
    tensors = tensors_among(found)
    if tensors:
        raise ValueError(
            "Every loss should be a function where the gradient of the objective is taken at a "
            f"relearned copy. Found a tensor for {', '.join(f'`{name}`' for name in tensors)}, "
            "computed before the parameters move. Pass lambda: ... with the forward inside."
        )
    staying = {scalar for name in stays for scalar in terms.get(name, ())}
    of_objective = [source for source in terms if source.partition(".")[0] == OBJECTIVE]
    others = {n for source, own in terms.items() if source not in of_objective for n in own}
    # No source has a slash in its name.
    places = {
        name: f"{name}/copy" if name in others else name
        for source in of_objective
        for name in terms[source]
        if name not in staying
    }
    if not places and OBJECTIVE in terms:
        raise ValueError(
            "The objective should have a part that is taken at the relearned copy. Found "
            f"{', '.join(f'`{name}`' for name in terms[OBJECTIVE])} alone, which stays where the "
            "parameters are. Name what is to be forgotten otherwise, or leave `relearned` out."
        )
    given = {name: s for name, s in found.items() if name not in places or name in others}
    given |= {place: found[name] for name, place in places.items()}
    moved = {
        source: {places.get(name, name): weight for name, weight in terms[source].items()}
        for source in of_objective
    }
    return given, {**terms, **moved}, [*places.values()]


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
