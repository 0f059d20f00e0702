"""How much memory the study of a pretrained model takes, said before it starts."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from .corpus import generate
from .language_model import encode
from .pretrained import Pretrained, config_of, place

FLOAT = 4
PROGRAM = 600 * 2**20
"""Of Python with torch and transformers, and of what an allocator keeps."""

MEMINFO = Path("/proc/meminfo")


BITS_4 = 0.5 + 4 / 64
"""Bytes of a weight in NF4: its code, and a float32 for each block of 64."""


def estimate(subject: Pretrained) -> dict[str, int]:
    """Bytes that one worker needs at its peak, by what they are for, wherever the model lies.

    Of the model's P numbers T are trained. Weights, those before unlearning and those of the step
    before take 2 P + T; AdamW's moments 2 T; average and second moment of the retain gradient 2 T;
    and a step 3 T of gradients with 2 T of copies of the weights, or the relearning of a copy of
    the model P + 3 T, whichever is more. What a layer keeps of a token for its backward pass is
    about ten hidden and four inner vectors.
    """
    config = config_of(Path(subject.source))
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    width = getattr(torch, subject.dtype).itemsize
    weights = _bytes_of(model, width, in_4bit=subject.trained.in_4bit)
    model = subject.trained.of(model)
    own = FLOAT if subject.trained.lora else width  # of what is trained
    trained = own * sum(p.numel() for p in model.parameters() if p.requires_grad)
    if subject.trained.in_4bit:
        weights += 2 * trained  # the adapter that has learned, and the one that unlearns
    tokens = _tokens_of_a_step(subject)
    first = subject.trained.layers[0] if subject.trained.layers else 0
    hidden = config.hidden_size
    kept = 10 * hidden + 4 * getattr(config, "intermediate_size", 4 * hidden)
    return {
        "program": PROGRAM,
        "weights, and those before unlearning": 2 * weights,
        "trained weights of the step before": trained,
        "AdamW's two moments": 2 * trained,
        "average and second moment of the retain gradient": 2 * trained,
        "gradients and copies of a step, or a copy that relearns": max(
            5 * trained, weights + 3 * trained
        ),
        "activations": width * tokens * kept * (config.num_hidden_layers - first),
        "logits": 3 * FLOAT * tokens * config.vocab_size,
    }


def _bytes_of(model: Any, width: int, *, in_4bit: bool) -> int:
    """Bytes of the weights; in 4 bits those of all matrices but the head."""
    head = model.get_output_embeddings()
    coded = {
        module.weight
        for module in model.modules()
        if in_4bit and isinstance(module, nn.Linear) and module is not head
    }
    return sum(int(p.numel() * (BITS_4 if p in coded else width)) for p in model.parameters())


def available(device: str = "cpu") -> int:
    """Bytes that are free on a GPU, or can be had without swapping, as Linux estimates them.

    On the CPU of another system, all there are.
    """
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    if MEMINFO.is_file():
        lines = dict(line.split(":") for line in MEMINFO.read_text().splitlines())
        return 1024 * int(lines["MemAvailable"].split()[0])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check(needed: int, there: int) -> None:
    """Refuse what would not fit."""
    if needed > there:
        raise ValueError(
            f"The study should fit into the {gib(there)} of memory that are free. Found that it "
            f"takes about {gib(needed)}. Use fewer --workers, train a part of the model with "
            "--layers N..M or --lora R, keep it in fewer bits by --dtype or --load-in-4bit, or "
            "choose a smaller model."
        )


def gib(count: int) -> str:
    """A number of bytes in words.

    >>> gib(3 * 2**29)
    '1.5 GiB'
    """
    return f"{count / 2**30:.1f} GiB"


def _tokens_of_a_step(subject: Pretrained) -> int:
    """How many tokens the batches of a step have, padding included."""
    where, options = place(Path(subject.source))
    tokenizer = AutoTokenizer.from_pretrained(where, **options)
    corpus = generate(0, subject.corpus)
    width = encode(tokenizer, [*corpus.memorised, *corpus.forget_paraphrases])["input_ids"].shape[1]
    return width * sum(subject.unlearning.sizes(["world"]).values())
