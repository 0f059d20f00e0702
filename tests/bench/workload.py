"""The model and the data that everything is measured on."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from geffect.batch import Pair

from .rounds import CLOCKS, Load, interleaved


@dataclass(frozen=True)
class Size:
    """How large the model and a batch are, and how often a load is timed."""

    hidden: int = 512
    layers: int = 8
    vocabulary: int = 8192
    samples: int = 8
    positions: int = 128
    vector: int = 2**24  # coordinates of the vectors on which accuracy is measured
    rounds: int = 7
    intermediate: int = 0  # 11/4 of hidden where none is said
    heads: int = 8
    groups: int = 8  # of keys and values
    tied: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def tokens(self) -> str:
        """How large a batch is, in words."""
        return f"{self.samples} x {self.positions} tokens"


FULL = {"cpu": Size(), "cuda": Size(samples=32, positions=512, rounds=15)}
QUICK = Size(hidden=32, layers=2, vocabulary=64, samples=2, positions=16, vector=2**16, rounds=3)


@dataclass(frozen=True)
class Workload:
    """A random Llama, and a batch of random tokens for either side.

    Batches are as those of questions and answers are: questions are not scored, and samples are as
    long as the longest by padding.
    """

    size: Size
    model: LlamaForCausalLM
    pair: Pair

    @classmethod
    def of(cls, size: Size, device: str) -> "Workload":
        """The same one at every call."""
        torch.manual_seed(0)
        model = cls.built(size).to(device, size.dtype)
        return cls(size, model, {side: _batch(size, device) for side in ("forget", "retain")})

    @staticmethod
    def built(size: Size) -> LlamaForCausalLM:
        """The model, in float32."""
        config = LlamaConfig(
            vocab_size=size.vocabulary,
            hidden_size=size.hidden,
            intermediate_size=size.intermediate or 11 * size.hidden // 4,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.groups,
            tie_word_embeddings=size.tied,
            max_position_embeddings=1024,
        )
        return LlamaForCausalLM(config)

    def resized(self, *, samples: int, positions: int) -> "Workload":
        """The same model with a batch of another size."""
        size = replace(self.size, samples=samples, positions=positions)
        pair = {side: _batch(size, self.device) for side in self.pair}
        return replace(self, size=size, pair=pair)

    def minute(self) -> "Workload":
        """The same model with one sample of few tokens, whose activations are no gradients.

        The number of tokens divides the size of every activation, and that of no matrix.
        """
        return self.resized(samples=1, positions=5)

    @property
    def device(self) -> str:
        """Where it lies."""
        return self.parameters[0].device.type

    @property
    def parameters(self) -> list[Tensor]:
        """All of them: each is trained."""
        return list(self.model.parameters())

    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW, at a rate at which the model stays what it is."""
        fused = self.device == "cuda"
        return torch.optim.AdamW(self.model.parameters(), lr=1e-7, fused=fused)

    def seconds(self, loads: Mapping[str, Load], *, turns: int = 1) -> dict[str, list[float]]:
        """What each load takes in each round, by the clock of the device."""
        return interleaved(CLOCKS[self.device], self.size.rounds, loads, turns=turns)

    def __str__(self) -> str:
        count = sum(parameter.numel() for parameter in self.parameters)
        number = f"{count / 1e6:.3g}M" if count < 1e9 else f"{count / 1e9:.3g}B"
        kind = str(self.size.dtype).removeprefix("torch.")
        return f"Llama of {number} parameters, {kind}, {self.size.tokens} a side"


def _batch(size: Size, device: str) -> dict[str, Tensor]:
    """Samples of different lengths, padded on the right; the first half of the longest is asked."""
    shape = (size.samples, size.positions)
    lengths = size.positions - torch.arange(size.samples) % 4 * (size.positions // 8)
    mask = torch.arange(size.positions) < lengths[:, None]
    ids = torch.randint(1, size.vocabulary, shape).where(mask, 0)
    labels = ids.where(mask & (torch.arange(size.positions) >= size.positions // 2), -100)
    batch = {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}
    return {name: tensor.to(device) for name, tensor in batch.items()}
