"""What every sample of a loss of one's own adds to a PG-effect, out of its one backward pass."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from geffect.codes import check_unpacked
from geffect.dots import dense
from geffect.gradients import Vector
from geffect.hooks import Hooks
from geffect.layers import canonical_name, describe, in_network_order, trainable

from .belonging import Aside, NotOfSamples, aside, strangers
from .differential import products
from .direction import check_direction
from .leaves import Call

_MET: WeakKeyDictionary[nn.Module, set[int]] = WeakKeyDictionary()
"""For which numbers of samples modules were found to have a row each, as is trusted then where
their shape says so."""


class InstanceEffects:
    """<grad R(D), g_b> for every sample b and parameter, with g_b the sample's part of a gradient.

    Forward and backward of a loss run inside of the context; gradients and random numbers come out
    bit for bit as without it. `direction` is grad R(D), as `geffect.effects.direction` takes it.
    Rows are samples, in the order of the forwards. Where sample s enters the loss with the weight
    w_s, as in GA or NPO, what is collected is w_s PG_D(s), reductions such as 1 / (number of
    tokens) and the sign included; `sample_effects` has PG_D(s) itself. In nats per unit learning
    rate. Definition: arXiv 2502.19301, eq. 5.

    Nothing is differentiated twice: with delta the gradient at the output of a module f(theta, x),
    <g_b, v> is <delta_b, d/de f(theta + e v, x_b)>, which for a matrix is one more product with its
    input. The modules have to treat the rows of a batch one by one; other models are refused, since
    nobody knows which part of a loss is whose. Whose the rows are is told by two backward passes
    more, through the activations alone: for modules that are met for the first time with so many
    samples, and where rows may be something else, as those of a position embedding. That no use of
    a parameter was missed is checked when the context ends: samples add up to the gradient of the
    batch. Two contexts around one backward measure two directions.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> with InstanceEffects(model, [torch.tensor([[1.0, 0.0]])]) as effects:
    ...     model(torch.tensor([[3.0, 4.0], [5.0, 6.0]])).sum().backward()
    >>> effects.by_parameter
    tensor([[3.],
            [5.]], dtype=torch.float64)
    """

    def __init__(self, model: nn.Module, direction: Vector) -> None:
        check_unpacked(model)
        self._model = model
        self._rows = describe(model)
        self._parameters = list(trainable(model).values())
        check_direction(self._parameters, direction)
        self._along = {
            index: v.detach().to(self._parameters[index].dtype)
            for index, v in enumerate(direction)
            if v is not None
        }
        self._forwards: list[_Forward] = []
        self._batches: dict[int, list[Tensor]] = {}  # <g, v> and <g, g>, of every backward
        self._hooks = Hooks()

    def __enter__(self) -> Self:
        try:
            self._watch_model()
        except BaseException:
            self._hooks.remove()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._hooks.remove()
        for forward in self._forwards:
            forward.is_watched = False
            forward.unproven.clear()
        if kind is None:
            self._check_sums()

    @property
    def layers(self) -> list[str]:
        """The names of the columns of `by_layer`, from input to output."""
        return in_network_order(self._rows, [row.layer for row in self._rows])

    @property
    def by_parameter(self) -> Tensor:
        """The effects `Float64[sample, parameter]`, on the CPU."""
        return torch.cat([forward.table(len(self._rows)) for forward in self._forwards])

    @property
    def by_layer(self) -> Tensor:
        """The effects `Float64[sample, layer]`, on the CPU: the parameters of each layer summed."""
        names = self.layers
        indices = torch.tensor([names.index(row.layer) for row in self._rows])
        effects = self.by_parameter
        return effects.new_zeros(len(effects), len(names)).index_add_(1, indices, effects)

    def _watch_model(self) -> None:
        indices = {self._parameters[index]: index for index in self._along}
        self._hooks.add(self._model.register_forward_pre_hook, self._begin, with_kwargs=True)
        for parameter, index in indices.items():
            self._hooks.add(parameter.register_hook, partial(self._take_batch, index))
        for path, module in self._model.named_modules():
            named = dict(module.named_parameters(recurse=False))
            own = {name: indices[p] for name, p in named.items() if p in indices}
            if own:
                called = f"`{canonical_name(path)}` ({type(module).__name__})"
                watch = partial(self._watch, called, own)
                self._hooks.add(module.register_forward_hook, watch, with_kwargs=True)
        self._hooks.add(self._model.register_forward_hook, self._end)

    def _begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled() and not Aside.running:
            inputs = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim]
            if not inputs:
                raise NotOfSamples(
                    "The model should be called with a tensor that has a row for each sample.",
                    f"none in a call of `{type(module).__name__}`",
                    reason=f"`{type(module).__name__}` is called without a tensor of rows",
                )
            self._forwards.append(_Forward(inputs[0].shape[:2]))

    def _watch(
        self,
        called: str,
        indices: dict[str, int],
        module: nn.Module,
        args: Any,
        kwargs: Any,
        output: Any,
    ) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        if not self._forwards:
            raise ValueError(
                "The model itself should be called while effects are collected. Found a call of "
                f"its module {called}. Call model(...)."
            )
        forward = self._forwards[-1]
        is_tensor = isinstance(output, Tensor) and output.is_floating_point()
        rows = output.shape[:1] if is_tensor else None
        if rows not in ((1,), (forward.samples,)):
            found = tuple(output.shape) if is_tensor else type(output).__name__
            raise NotOfSamples(
                "Modules with parameters should return one tensor with a row for each of the "
                f"{forward.samples} samples.",
                f"{found} from {called}",
                reason=f"{called} does not return a row for each",
            )
        watched: Tensor = output
        if not watched.requires_grad:
            # A model may go on to write into it, which it may not into a leaf.
            watched = watched.requires_grad_().clone()
        if rows != (forward.samples,):
            # One position embedding for all samples: its gradient would come summed over them.
            watched = watched.expand(forward.samples, *watched.shape[1:]).clone()
        elif watched.is_leaf:  # a parameter as it is, which would keep the hook
            watched = watched.view_as(watched)
        if Aside.running:  # a checkpointed layer that is run again for it
            return watched
        is_sure = forward.has_rows_of_samples(output)
        use = _Use(called, forward, indices, self._along, Call(module, args, kwargs), is_sure)
        watched.register_hook(use.take)  # of this graph, and gone with it
        if not forward.has_ended and not (is_sure and forward.samples in _MET.get(module, ())):
            forward.unproven.append((use, watched))
        return watched

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        """Refuse modules whose rows are not those of the samples, before a gradient is taken."""
        if not torch.is_grad_enabled() or Aside.running:
            return
        forward = self._forwards[-1]
        unproven, forward.unproven, forward.has_ended = forward.unproven, [], True
        if forward.samples == 1 or not unproven:
            return
        found = strangers([rows for _, rows in unproven], output, forward.samples)
        for index in found:
            use, rows = unproven[index]
            raise _not_of_samples(use, tuple(rows.shape))
        for use, _ in unproven:
            use.is_proven = True
            if use.call is not None:
                _MET.setdefault(use.call.module, set()).add(forward.samples)

    def _take_batch(self, index: int, gradient: Tensor) -> None:
        along, gradient = self._along[index], dense(gradient)
        pair = torch.stack([products(gradient, x).sum() for x in (along, gradient)])
        self._batches.setdefault(index, []).append(pair)

    def _check_sums(self) -> None:
        """Samples add up to the batch, but for rounding, which is that of the whole gradient.

        Some gradients, as that of the bias of keys, are nothing but rounding.
        """
        if not self._forwards:
            raise ValueError(
                "A forward and its backward should run while effects are collected. Found none. "
                "Call the model inside of the context."
            )
        if not self._along:  # nothing that effects could be of
            return
        for forward in self._forwards:
            forward.check_backward()
        if not self._batches:  # frozen, or no parameter was reached
            return
        indices = sorted(self._batches)
        pairs = torch.stack([torch.stack(self._batches[p]).sum(dim=0).cpu() for p in indices])
        inner, squared = pairs.unbind(dim=1)
        lengths = torch.stack(
            [products(self._along[p], self._along[p]).sum().cpu() for p in indices]
        )
        precision = max(torch.finfo(self._along[p].dtype).eps for p in indices)
        share = max(precision, 1e-6) ** 0.5
        rounding = (
            share * (squared * lengths).sqrt() + share**2 * (squared.sum() * lengths.sum()).sqrt()
        )
        off = (self.by_parameter.sum(dim=0)[indices] - inner).abs() > rounding
        if off.any():
            names = [self._rows[p].name for p, is_off in zip(indices, off, strict=True) if is_off]
            raise NotOfSamples(
                "The samples should add up to the gradient of the batch.",
                f"otherwise for {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}: it is "
                "used outside of its module, or the rows of the module are not samples, or forward "
                "and backward are not both inside of the context",
                reason=f"`{names[0]}` is used outside of its module",
            )


@dataclass
class _Forward:
    """One forward pass: how many samples, and their effects as the backward pass brings them."""

    shape: Sequence[int]  # of the first input: samples, and positions if it has them
    is_watched: bool = True
    effects: list[tuple[int, Tensor]] = field(default_factory=list)
    has_ended: bool = False
    unproven: "list[tuple[_Use, Tensor]]" = field(default_factory=list)

    @property
    def samples(self) -> int:
        return self.shape[0]

    def has_rows_of_samples(self, output: Tensor) -> bool:
        """Whether an output is sure to have a row a sample: it has a column a position as well."""
        is_square = len(self.shape) == 2 and self.shape[0] == self.shape[1]
        by_position = output.ndim > 2 and output.shape[:2] == torch.Size(self.shape)
        return self.samples == 1 or (by_position and not is_square)

    def table(self, parameters: int) -> Tensor:
        """`Float64[sample, parameter]`, the uses of a parameter summed, on the CPU."""
        table = torch.zeros(self.samples, parameters, dtype=torch.float64)
        for index, values in self.effects:
            table[:, index] += values.cpu()
        return table

    def check_backward(self) -> None:
        if not self.effects:
            raise NotOfSamples(
                "Every forward should be followed by a backward while effects are collected.",
                f"one of {self.samples} samples without. Run forwards that are not differentiated "
                "under torch.no_grad(), or outside of the context",
                reason="no module was seen that uses a parameter",
            )


@dataclass
class _Use:
    """One call of one module, until the gradient of its output arrives."""

    called: str
    forward: _Forward
    indices: Mapping[str, int]
    along: Mapping[int, Tensor]
    call: Call | None
    is_proven: bool

    def take(self, delta: Tensor) -> None:
        """Add the effects of the samples in this use."""
        if Aside.running or not self.forward.is_watched:
            return
        if self.call is None:
            raise RuntimeError(
                "A forward should be followed by one backward while effects are collected. Found a "
                "second one through the same graph. Run one of them outside of the context, on a "
                "forward of its own."
            )
        if not self.is_proven:
            raise _not_of_samples(self, tuple(delta.shape))
        call, self.call = self.call, None  # a backward pass frees what it has used
        with torch.no_grad(), aside():
            for name, index in self.indices.items():
                self.forward.effects.append((index, self._effects(call, name, index, delta)))

    def _effects(self, call: Call, name: str, index: int, delta: Tensor) -> Tensor:
        try:
            return call.effects(name, self.along[index], delta)
        except Exception as error:
            raise NotOfSamples(
                "Modules with parameters should run again by themselves, with what they were "
                "given.",
                f"that {self.called} raises `{type(error).__name__}`",
                reason=f"{self.called} does not run again by itself",
            ) from error


def _not_of_samples(use: _Use, shape: Sequence[int]) -> NotOfSamples:
    return NotOfSamples(
        "Modules with parameters should return a row for each sample.",
        f"otherwise for {use.called}, which returned {tuple(shape)} for {use.forward.samples} "
        "samples, and whose rows are not theirs, or not known to be where layers are checkpointed",
        reason=f"the rows that {use.called} returns are not theirs, or not known to be",
    )
