"""A small model in the layouts of data parallelism."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    DTensor,
)
from torch.nn.parallel import DistributedDataParallel

from tests.utils import tiny


class Small(nn.Module):
    """A tied language model. No tensor is divisible by two, and one has a single row."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(tiny.VOCABULARY, 15)
        self.layers = nn.ModuleList(Adapted() for _ in range(2))
        self.gate = nn.Linear(15, 1)
        self.lm_head = nn.Linear(15, tiny.VOCABULARY, bias=False)
        self.lm_head.weight = self.embed_tokens.weight
        self.layers[0].bias.requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.lm_head(x * torch.sigmoid(self.gate(x)))


class Adapted(nn.Linear):
    """A linear map with an adapter of rank 2, as LoRA has them."""

    def __init__(self) -> None:
        super().__init__(15, 15)
        self.lora_A = nn.Parameter(torch.randn(2, 15) / 4)
        self.lora_B = nn.Parameter(torch.randn(15, 2) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.lora_A.T @ self.lora_B.T


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def fsdp(model: nn.Module, whole: frozenset[nn.Parameter] = frozenset()) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, ignored_params=set(whole))
    return fully_shard(model, mesh=mesh, ignored_params=set(whole))


def fsdp_around_adapters(model: nn.Module) -> nn.Module:
    """The adapters are whole on every process."""
    adapters = [p for name, p in model.named_parameters() if "lora" in name]
    return fsdp(model, frozenset(adapters))


LAYOUTS = {"ddp": ddp, "fsdp": fsdp, "fsdp around adapters": fsdp_around_adapters}


def labelled(own: dict[str, Tensor]) -> int:
    return int((own["labels"][:, 1:] != -100).sum())


def without_reduction(model: nn.Module) -> Any:
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


@contextmanager
def nothing_is_gathered() -> Iterator[None]:
    """A DTensor that is put together again needs the memory that sharding saves."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("A whole tensor was put together.")

    kept, DTensor.full_tensor = DTensor.full_tensor, refuse
    try:
        yield
    finally:
        DTensor.full_tensor = kept
