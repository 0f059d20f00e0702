"""Configurations of models by their size, and of any other by its file."""

from pathlib import Path
from typing import Any

LLAMAS: dict[str, dict[str, Any]] = {
    "1b": {
        "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "tie_word_embeddings": True, "max_position_embeddings": 131_072,
    },
    "7b": {
        "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 11_008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
    },
    "70b": {
        "vocab_size": 128_256, "hidden_size": 8192, "intermediate_size": 28_672,
        "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
    },
    "405b": {
        "vocab_size": 128_256, "hidden_size": 16_384, "intermediate_size": 53_248,
        "num_hidden_layers": 126, "num_attention_heads": 128, "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
    },
}  # fmt: skip
"""The shapes of Llama 3.2 1B, Llama 2 7B, and Llama 3 and 3.1 of 70B and 405B."""


def config_of(model: Any) -> Any:
    """A configuration of transformers: one that is given, that of a folder, or one by its size.

    >>> config_of("7b").hidden_size
    4096
    """
    from transformers import AutoConfig, LlamaConfig, PretrainedConfig

    if isinstance(model, PretrainedConfig):
        return model
    if str(model) in LLAMAS:
        return LlamaConfig(**LLAMAS[str(model)])
    path = Path(model)
    if (path / "config.json").is_file() or (path.is_file() and path.suffix == ".json"):
        try:
            return AutoConfig.from_pretrained(path)
        except Exception as error:  # of any class: each configuration checks itself
            says = str(error.__cause__ or error).strip().partition("\n")[0].rstrip(".")
            raise ValueError(
                f"`{path}` should hold a configuration that transformers reads. Found: {says}. "
                "Correct the file, or name one of another model."
            ) from error
    raise ValueError(
        f"`model` should be one of {', '.join(LLAMAS)}, a folder with a config.json, that file, or "
        f"a configuration of transformers. Found `{model}`. Choose one of those."
    )
