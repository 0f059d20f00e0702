"""DeepSpeed ZeRO: the part of every gradient and parameter that a process holds, and writing it.

An engine takes gradients into buffers of its own, and steps its own copies of the parameters: of
each tensor a process has one piece. A stand-in is that piece of a parameter as a leaf tensor: it
lies in the engine's memory, its `.grad` is the piece of the gradient, and an `EngineOptimizer`
steps it. So a model in an engine looks like any that is sharded. Nothing is gathered.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from .zero_buffers import Piece, buffers_of
from .zero_checks import check_engine


class Shards:
    """The stand-ins for the parameters of one engine, and what goes between the two."""

    def __init__(self, engine: nn.Module) -> None:
        check_engine(engine)
        self._engine = ref(engine)
        zero: Any = engine.optimizer
        stage = engine.zero_optimization_stage()  # type: ignore[operator]
        self._buffers = buffers_of(zero, stage)
        self._divides = True
        self._writes = False  # whether the next step takes what lies in the stand-ins' `.grad`
        self.stage = int(stage)
        self.waiting: dict[str, dict[Tensor, tuple[Tensor | None, Tensor | None]]] = {}
        self.stand_ins: dict[Tensor, Tensor] = {
            p: self._stand_in(p) for p in engine.parameters() if p.requires_grad
        }
        self.optimizer = _optimizer_of(zero.optimizer)(self)

    @property
    def engine(self) -> Any:
        """The engine itself, which is not kept alive from here."""
        return self._engine()

    def share(self, loss: Tensor) -> Tensor:
        """The loss as the engine's `backward` takes it: over its number of micro-batches."""
        return loss / self.engine.gradient_accumulation_steps() if self._divides else loss

    def backward(self, name: str | None, loss: Tensor, *, retain_graph: bool = False) -> None:
        """Leave in the stand-ins' `.grad` the gradient of this loss alone, of all processes.

        Stage 1 adds up the gradients of micro-batches in each process, and reduces the sum at the
        last of them: until then a loss of this `name` leaves nothing. One without a name is
        reduced at once.
        """
        engine, zero = self.engine, self.engine.optimizer
        if retain_graph and self.stage == 3:
            raise ValueError(
                "Each loss of a step should have a forward of its own at ZeRO stage 3, which lets "
                "go of parameters in the backward pass. Found losses that share one. Call the "
                "engine once for each loss, or train at stage 2."
            )
        self._check_in_place()
        self._check_alone()
        boundary = engine._is_gradient_accumulation_boundary
        reduces = self.stage > 1 or name is None or engine.is_gradient_accumulation_boundary()
        try:
            zero.clear_backward_seen_flag()  # as a forward right before would
            self._buffers.clear()
            for parameter, kept in self.waiting.pop(name or "", {}).items():
                parameter.grad, parameter.grad_accum = kept  # type: ignore[attr-defined]
            engine.set_gradient_accumulation_boundary(reduces)
            # Not its own one, which `passes_apart` replaces.
            type(engine).backward(engine, loss, retain_graph=retain_graph, scale_wrt_gas=False)
        finally:
            engine._is_gradient_accumulation_boundary = boundary
            zero.set_gradient_accumulation_boundary(engine.is_gradient_accumulation_boundary())
        if not reduces:
            self.waiting[name or ""] = {
                p: (p.grad, getattr(p, "grad_accum", None)) for p in self.stand_ins
            }
            zero.zero_grad(set_to_none=True)
            self._buffers.begin()
            return
        self._buffers.begin()
        self._read()

    def forget(self) -> None:
        """Leave nothing of a pass that was no part of a step, here and in the engine."""
        if not self._writes:  # for which the engine's buffers have to be there
            self._buffers.clear()
        for stand_in in self.stand_ins.values():
            stand_in.grad = None

    def take_over_step(self) -> None:
        """Have the engine's next step be one of `optimizer`, with what lies in `.grad` then."""
        self._writes = True
        self.engine.optimizer.step = self._step

    def show_step(self) -> None:
        """Have the engine's next step be one of `optimizer`, with the engine's gradients.

        They lie in `.grad` for as long as that step lasts, before they are clipped.
        """
        self.engine.optimizer.step = self._step

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Have the engine step, with the gradients in the stand-ins' `.grad`; none is zero."""
        if self._writes:
            self._check_alone()
            for parameter, stand_in in self.stand_ins.items():
                kept, grad = self._buffers.grad(parameter), stand_in.grad
                if grad is None:
                    kept.zero_()
                else:
                    kept.copy_(grad)
            self._buffers.settle(list(self.stand_ins))
        type(self.engine.optimizer).step(self.engine.optimizer, *args, **kwargs)

    @contextmanager
    def passes_apart(self) -> Iterator[None]:
        """Where the engine's `backward` adds to the stand-ins' `.grad`, and its `step` waits."""
        engine, stand_ins = self.engine, list(self.stand_ins.values())

        def backward(
            loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True
        ) -> Tensor:
            earlier = [stand_in.grad for stand_in in stand_ins]
            own = loss / engine.gradient_accumulation_steps() if scale_wrt_gas else loss
            self.backward(None, own, retain_graph=retain_graph)
            for stand_in, grad in zip(stand_ins, earlier, strict=True):
                if grad is not None and stand_in.grad is not None:
                    stand_in.grad = grad.add_(stand_in.grad)
            return own

        engine.backward, engine.step = backward, lambda *args, **kwargs: None
        try:
            yield
        finally:
            del engine.backward, engine.step

    @contextmanager
    def undivided(self) -> Iterator[None]:
        """Where losses are over the number of micro-batches already."""
        self._divides = False
        try:
            yield
        finally:
            self._divides = True

    def _step(self, *args: Any, **kwargs: Any) -> None:
        del self.engine.optimizer.step
        self.optimizer.refresh()
        if not self._writes:
            self._check_in_place()
            self._read()
        try:
            self.optimizer.step(*args, **kwargs)
        finally:
            self._writes = False
            for stand_in in self.stand_ins.values():
                stand_in.grad = None
        if self.optimizer.touched:
            self._buffers.publish()

    def _read(self) -> None:
        """Leave the engine's gradients in the stand-ins' `.grad`."""
        self._buffers.arrive()
        for parameter, stand_in in self.stand_ins.items():
            # A copy, in the type in which the engine would add up those of micro-batches.
            stand_in.grad = self._buffers.grad(parameter).to(
                self.engine.optimizer.gradient_accumulation_dtype, copy=True
            )

    def _stand_in(self, parameter: Tensor) -> Tensor:
        stand_in = self._buffers.master(parameter).detach().requires_grad_()
        stand_in.grad_dtype = None
        _pieces[stand_in] = self._buffers.piece(parameter)
        _shards_of[stand_in] = _shards_of[parameter] = ref(self)
        return stand_in

    def _check_alone(self) -> None:
        if self._buffers.passed:
            raise RuntimeError(
                "All losses of a step should be passed to the recorder or rectifier. Found a "
                "backward pass of the engine besides, whose gradient would be lost. Pass that "
                "loss too, as a part of the objective."
            )

    def _check_in_place(self) -> None:
        for parameter, stand_in in self.stand_ins.items():
            if self._buffers.master(parameter).data_ptr() != stand_in.data_ptr():
                raise RuntimeError(
                    "The engine should keep its parameters where they were at first. Found them "
                    "elsewhere, as after `offload_states` or where the engine was made anew. Make "
                    "recorder and rectifier after that."
                )


class EngineOptimizer(torch.optim.Optimizer):
    """The optimizer of an engine, as seen from the stand-ins: its step is that of the engine.

    What is hung on the steps of optimizers is called around that, clipping and all; what changes
    parameters there is brought to the model. Options and rates are those of the engine's.
    """

    def __init__(self, shards: Shards) -> None:
        self._shards = ref(shards)
        groups: dict[int, list[Tensor]] = {}
        for parameter, stand_in in shards.stand_ins.items():
            groups.setdefault(shards._buffers.group_of(parameter), []).append(stand_in)
        self._places = list(groups)
        self._versions: list[int] = []
        super().__init__([{"params": own} for own in groups.values()], {})
        self.refresh()

    @property
    def skipped(self) -> bool:
        """Whether the engine found no number in a gradient, and did not take its last step."""
        shards = self._shards()
        return shards is not None and bool(shards.engine.optimizer.overflow)

    @property
    def touched(self) -> bool:
        """Whether parameters were changed since the engine's own step."""
        return self._versions != self._now()

    def refresh(self) -> None:
        """Take over the options of the engine's optimizer, as they are now."""
        shards = self._shards()
        assert shards is not None
        known = shards.engine.optimizer.optimizer.param_groups
        for place, group in zip(self._places, self.param_groups, strict=True):
            group.update({key: v for key, v in known[place].items() if key != "params"})

    def step(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Have the engine step, with the gradients in `.grad`."""
        shards = self._shards()
        assert shards is not None
        shards.step(*args, **kwargs)
        self._versions = self._now()

    def _now(self) -> list[int]:
        return [tensor._version for group in self.param_groups for tensor in group["params"]]


_known: "WeakKeyDictionary[nn.Module, Shards]" = WeakKeyDictionary()
_pieces: "WeakIdKeyDictionary" = WeakIdKeyDictionary()
"""Of stand-ins."""
_shards_of: "WeakIdKeyDictionary" = WeakIdKeyDictionary()
"""Of stand-ins and of what they stand for."""


def is_engine(module: nn.Module) -> bool:
    """Whether it is an engine of DeepSpeed."""
    # Not imported here: who has an engine has imported it.
    kind = getattr(sys.modules.get("deepspeed"), "DeepSpeedEngine", None)
    return kind is not None and isinstance(module, kind)


def shards_in(model: nn.Module) -> Shards | None:
    """The stand-ins of a model in an engine; None where there is no engine."""
    if "deepspeed" not in sys.modules:
        return None
    engine = next(filter(is_engine, model.modules()), None)
    if engine is None:
        known = next((known for p in model.parameters() if (known := shards_of(p))), None)
        if known is None and any(
            hasattr(p, "_hp_mapping") or hasattr(p, "_z3_optimizer") for p in model.parameters()
        ):
            raise ValueError(
                "`model` should be the engine, where DeepSpeed trains it. Found the module inside "
                "of one, whose gradients the engine keeps. Pass what `deepspeed.initialize` gave."
            )
        return known
    if engine not in _known:
        _known[engine] = Shards(engine)
    return _known[engine]


def shards_of(tensor: Tensor) -> Shards | None:
    """Those that a stand-in belongs to, or what it stands for."""
    known = _shards_of.get(tensor)
    return None if known is None else known()


def piece_of(tensor: Tensor) -> Piece | None:
    """What a stand-in is a piece of; None of any other tensor."""
    found: Piece | None = _pieces.get(tensor)
    return found


def note_piece(tensor: Tensor, piece: Piece) -> None:
    """Take note of which piece a tensor is."""
    _pieces[tensor] = piece


def optimizer_behind(optimizer: Any) -> "EngineOptimizer | None":
    """The stand-ins' optimizer, given that of an engine or what accelerate put around it."""
    for shards in _known.values():
        zero = shards.engine.optimizer
        if optimizer is zero or optimizer is zero.optimizer:
            return shards.optimizer
    return None


def _optimizer_of(base: torch.optim.Optimizer) -> Callable[[Shards], EngineOptimizer]:
    """The class of a stand-ins' optimizer, with the name of the engine's own."""
    return type(type(base).__name__, (EngineOptimizer,), {})
