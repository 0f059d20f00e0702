"""What one forward and one backward pass of a model take in memory, without the model.

Two of its layers are run on tensors that have sizes and no numbers. Every storage is counted from
when an operation makes it until it is freed. The other layers are as the second.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from geffect.risk import log_likelihood

from .live_bytes import LiveBytes, key_of

TRACED = 2
"""Layers: the first, and one that others are like."""


@dataclass(frozen=True)
class Shape:
    """A batch of one process, and whether layers compute their activations anew in a backward."""

    samples: int = 1
    positions: int = 2048
    checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.samples < 1 or self.positions < 2:
            raise ValueError(
                "A batch should have a sample, and a sample two positions. Found "
                f"{self.samples} x {self.positions}. Pass, say, Shape(1, 2048)."
            )


@dataclass(frozen=True)
class Moment:
    """Bytes at one time of a pass: of gradients of parameters, and of all else that it made."""

    activations: int
    gradients: int


@dataclass(frozen=True)
class Traced:
    """A pass through a model of many layers, by the moments at which memory may be at its peak.

    - `moments`: while all layers' activations are there, and while all their gradients are.
    - `layer`, `rest`: bytes of the parameters of a layer, and of those outside of layers.
    - `largest`: bytes of the largest parameter.
    """

    moments: Sequence[Moment]
    layer: int
    rest: int
    largest: int
    layers: int

    @property
    def parameters(self) -> int:
        """Bytes of all parameters."""
        return self.rest + self.layer * self.layers

    def peak(self, gradients: Callable[[int], float] = float) -> int:
        """The most of activations and gradients, where so many bytes of these take what is told."""
        return int(max(m.activations + gradients(m.gradients) for m in self.moments))


def traced(config: Any, dtype: torch.dtype, batch: Shape) -> Traced:
    """The passes of a batch through a model of that configuration, all of it trained."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    small = _of_layers(config, TRACED)
    with FakeTensorMode(), _quiet():
        model = _built(small, dtype)
        blocks = blocks_of(model, TRACED)
        parameters = [*model.parameters()]
        moments: list[Moment] = []
        turned = [0, 0]  # moments before the second layer's backward ends, bytes of its input
        live = _Live(moments)
        ends: list[int] = []
        for block in blocks:
            block.register_forward_hook(lambda *_: ends.append(live.activations))

        def mark(_: object, __: object, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            turned[1] = hidden.untyped_storage().nbytes()
            hidden.register_hook(lambda _: turned.__setitem__(0, len(moments)))

        blocks[0].register_forward_hook(mark)
        # Gradients of parameters are told from activations by where they arrive.
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(live.arrived)
        ids = torch.zeros(batch.samples, batch.positions, dtype=torch.long)
        with live, _traceable(config):
            _loss(model, ids).backward()
        layer = sum(p.nbytes for p in blocks[1].parameters())
        further = config.num_hidden_layers - TRACED
        kept = ends[1] - ends[0]
        rest = sum(p.nbytes for p in parameters) - sum(
            p.nbytes for block in blocks for p in block.parameters()
        )
        largest = max(p.nbytes for p in parameters)
    top, bottom = moments[: turned[0]], moments[turned[0] :]
    above = further * kept
    if batch.checkpointing:  # inputs of all layers, and the activations of one
        above = (further + 1) * turned[1] - kept
    whole = [Moment(m.activations + above, m.gradients) for m in top]
    whole += [Moment(m.activations, m.gradients + further * layer) for m in bottom]
    return Traced(whole, layer, rest, largest, config.num_hidden_layers)


def on_meta(config: Any, dtype: torch.dtype) -> nn.Module:
    """The model without its numbers."""
    with torch.device("meta"), _quiet():
        model: nn.Module = _built(config, dtype)
        return model


def blocks_of(model: nn.Module, count: int) -> Sequence[nn.Module]:
    """The layers of a model."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return [*module]
    raise ValueError(
        "`model` should have its layers in one list, as the causal models of transformers do. "
        f"Found none of {count} modules in `{type(model).__name__}`. Measure a step of it instead."
    )


def _loss(model: nn.Module, ids: Tensor) -> Tensor:
    """As `nll`, but for looks at the labels, which have no values here."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return -log_likelihood(logits, ids[:, 1:]).sum() / ids.numel()


def _built(config: Any, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    kind: Any = AutoModelForCausalLM
    return kind.from_config(config, dtype=dtype).train()


def _of_layers(config: Any, count: int) -> Any:
    small = copy.deepcopy(config)
    if getattr(config, "is_encoder_decoder", False) or not hasattr(config, "num_hidden_layers"):
        raise ValueError(
            "The configuration should be of a causal language model with `num_hidden_layers`. "
            f"Found `{type(config).__name__}`. Measure a step of it instead."
        )
    if config.num_hidden_layers < count:
        raise ValueError(
            f"`num_hidden_layers` should be at least {count}. Found {config.num_hidden_layers}. "
            "Measure a step of so small a model instead."
        )
    small.num_hidden_layers = count
    if getattr(small, "layer_types", None):
        with suppress(AttributeError):  # where they follow from the number of layers
            small.layer_types = small.layer_types[:count]
    return small


@contextmanager
def _traceable(config: Any) -> Iterator[None]:
    """Names a model whose pass depends on numbers, or that its configuration does not allow."""
    try:
        yield
    except (RuntimeError, TypeError, AttributeError, IndexError) as error:
        said = str(error).partition("\n")[0]
        raise ValueError(
            f"A pass of `{type(config).__name__}` should be one that can be traced without "
            f"numbers. Found: {said}. Check the configuration, or measure a step instead."
        ) from error


class _Live(LiveBytes):
    """Tells gradients of parameters from all else that is alive, and notes both as they change."""

    def __init__(self, moments: list[Moment]) -> None:
        super().__init__()
        self.gradients = 0
        self._moments = moments
        self._arrived: set[int] = set()

    @property
    def activations(self) -> int:
        """Bytes of all that is alive and no gradient of a parameter."""
        return self.now - self.gradients

    def operated(self) -> None:
        now = Moment(self.activations, self.gradients)
        if not self._moments or self._moments[-1] != now:
            self._moments.append(now)

    def arrived(self, parameter: Tensor) -> None:
        """The gradient of a parameter is there: it is no activation."""
        assert parameter.grad is not None
        key, size = key_of(parameter.grad), self.counted(parameter.grad)
        if size and key not in self._arrived:
            self._arrived.add(key)
            self.gradients += size

    def freed(self, storage: int, size: int) -> None:
        super().freed(storage, size)
        if storage in self._arrived:
            self._arrived.remove(storage)
            self.gradients -= size


@contextmanager
def _quiet() -> Iterator[None]:
    """Random numbers of nobody are drawn for weights that have none."""
    with torch.random.fork_rng(devices=[]):
        yield
