"""The smallest subject of a study: a Llama that has memorised its corpus, trained once."""

import pytest
import torch
from transformers import PreTrainedModel

from geffect.demo.config import EmbeddedConfig, UnlearningConfig
from geffect.demo.corpus import Size, generate
from geffect.demo.data import Data

TINY = EmbeddedConfig(
    corpus=Size(authors=3, forget=1, heldout=1, world=8),
    unlearning=UnlearningConfig(
        forget_batch=5,
        retain_batch=5,
        world_batch=4,
        most_steps=40,
        relearning_steps=2,
        teaching_steps=2,
        attack_steps=(1, 2),
        savings_steps=2,
    ),
    layers=1,
    hidden=48,
    heads=2,
    epochs=32,
    batch=8,
    learning_rate=8e-3,
)


@pytest.fixture(scope="session")
def subject(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Data]:
    """A tiny model that has memorised its corpus; whoever changes it takes a copy."""
    folder = tmp_path_factory.mktemp("tiny")
    corpus = generate(0, TINY.corpus)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    TINY.learn(folder, corpus, corpus.memorised, 0, lambda done, total: None)
    torch.set_num_threads(threads)
    model, tokenizer = TINY.load(folder)
    return model, Data.of(corpus, tokenizer)
