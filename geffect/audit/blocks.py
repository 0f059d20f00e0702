"""The blocks of a model: the modules that are its layers, in whatever list they stand."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from geffect.layers import canonical_name
from geffect.places import LAYER, places, tower_order
from geffect.risk import predicts_next
from geffect.risk.alignment import unwrapped


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The modules that are the layers of a causal language model, from its input to its output.

    They are told by the names of the tensors that they hold, as `geffect.places` reads them. Of a
    model with several towers, such as vision and text, they are those of the last. Raises
    ValueError for a model that is not causal, and where no list of modules is its layers.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> config = GPT2Config(vocab_size=9, n_positions=8, n_embd=4, n_layer=3, n_head=1)
    >>> [type(block).__name__ for block in blocks_of(GPT2LMHeadModel(config))]
    ['GPT2Block', 'GPT2Block', 'GPT2Block']
    """
    if not predicts_next(model):
        raise ValueError(
            "`model` should be a causal language model, whose blocks lead from the question to the "
            f"answer. Found the encoder-decoder `{type(unwrapped(model)).__name__}`. Leave depth "
            "out for it."
        )
    layers = _layers(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    paths = [_path(layers, index) for index in range(1 + max(layers.values(), default=-1))]
    if not paths or any(not path or path not in modules for path in paths):
        raise ValueError(
            "`model` should hold its layers in a list of modules. Found none in "
            f"`{type(unwrapped(model)).__name__}`, as far as the names of its tensors tell. Leave "
            "depth out for it."
        )
    return [modules[path] for path in paths]


def outline(model: nn.Module) -> dict[str, object]:
    """What two models should have in common for the states of one to make sense in the other.

    >>> outline(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))["blocks"]
    'Linear x 2'
    """
    inner = unwrapped(model)
    kinds = [type(unwrapped(block)).__name__ for block in blocks_of(model)]
    config: Any = getattr(inner, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    told = {name: getattr(text, name, None) for name in _TOLD}
    return {
        "kind": told.pop("model_type") or type(inner).__name__,
        "blocks": ", ".join(f"{kind} x {kinds.count(kind)}" for kind in dict.fromkeys(kinds)),
        **{name: value for name, value in told.items() if value is not None},
    }


def check_tokenizers(source: Any, original: Any) -> None:
    """Refuse a source whose tokenizer numbers its tokens otherwise than that of the original.

    >>> class Words:
    ...     def __init__(self, *words): self.words = words
    ...     def get_vocab(self): return {word: i for i, word in enumerate(self.words)}
    >>> check_tokenizers(Words("a", "b"), Words("a", "c"))
    Traceback (most recent call last):
    ValueError: `source` should have the tokenizer of the original. ... Found 2 tokens ...
    """
    known, other = original.get_vocab(), source.get_vocab()
    if known != other:
        apart = {word for word in known.keys() | other.keys() if known.get(word) != other.get(word)}
        raise ValueError(
            "`source` should have the tokenizer of the original. Their states can be exchanged "
            f"where both read the same numbers. Found {len(apart)} tokens that only one has, or "
            "with another number. Leave depth out for this model."
        )


_TOLD = ("model_type", "hidden_size", "vocab_size", "num_attention_heads", "num_key_value_heads")


def _layers(model: nn.Module) -> dict[str, int]:
    """The tensors of the model's last tower with layers, by their own names; -1 if of no layer."""
    named: Mapping[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    found = places({canonical_name(name): tuple(p.shape) for name, p in named.items()})
    own = {name: found[canonical_name(name)] for name in named}
    towers = tower_order(place.tower for place in own.values() if place.part == LAYER)
    last = max(towers, key=towers.__getitem__, default=None)
    return {
        name: place.index if place.part == LAYER and place.tower == last else -1
        for name, place in own.items()
    }


def _path(layers: Mapping[str, int], index: int) -> str:
    """The outermost module with a number for a name that holds tensors of one layer alone."""
    name = next((name for name, own in layers.items() if own == index), "")
    parts = name.split(".")
    for stop in range(1, len(parts)):
        inside = ".".join(parts[:stop])
        held = {own for other, own in layers.items() if other.startswith(f"{inside}.")}
        if parts[stop - 1].isdigit() and held == {index}:
            return inside
    return ""
