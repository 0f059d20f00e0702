"""Experts of a tensor that two processes hold in parts."""

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from geffect import Recorder, open_run
from tests.utils import two_ranks


class Mixture(nn.Module):
    """Three experts in tensors of three and of six rows, and a bias for each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(4, 3, bias=False)
        self.experts = nn.ParameterDict(
            {"up": torch.randn(3, 4, 6), "down": torch.randn(6, 6), "bias": torch.randn(3, 2)}
        )

    def forward(self, x: Tensor) -> Tensor:
        inside = torch.einsum("ni,eij->nej", x, self.experts["up"]).tanh()
        down = self.experts["down"].view(3, 2, 6)
        out = torch.einsum("nej,ekj->nek", inside, down) + self.experts["bias"]
        return (self.router(x).softmax(-1).unsqueeze(-1) * out).sum(1)


def record(model: nn.Module, path: Path) -> None:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(8, 4, generator=draw).double()
    with Recorder(model, path) as recorder:
        forget, retain = model(x[:4]).square().mean(), model(x[4:]).square().mean()
        recorder.backward(objective={"forget": -1.0}, forget=forget, retain=retain)


def record_on_a_rank(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for along in (0, 1):
        model = Mixture().double()
        fully_shard(model, mesh=mesh, shard_placement_fn=lambda _, along=along: Shard(along))
        record(model, folder / f"{along}.h5")


def test_experts_of_shards_are_those_of_one_process(tmp_path: Path) -> None:
    two_ranks.run(record_on_a_rank, tmp_path)
    record(Mixture().double(), tmp_path / "alone.h5")
    alone = open_run(tmp_path / "alone.h5")
    assert [p.experts for p in alone.layers] == [0, 3, 3, 3]
    for along in (0, 1):
        run = open_run(tmp_path / f"{along}.h5")
        np.testing.assert_allclose(run.expert_gram(), alone.expert_gram(), rtol=1e-12, atol=1e-18)
        np.testing.assert_allclose(run.gram(), alone.gram(), rtol=1e-12, atol=1e-18)
