"""The study on a pretrained language model, which learns the authors by fine-tuning.

Its numbers were tried on SmolLM2-135M-Instruct: six epochs memorise 70 facts, and the learning
rates take a run past the level within some twenty steps.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import Counted, UnlearningConfig
from .corpus import Corpus, Fact, Size
from .methods import Variant, base_of

if TYPE_CHECKING:
    from torch import nn

GGUF = ".gguf"

GENTLE = (3e-5, 1.5e-5, 6e-5)
PACES = {
    "gru-coordinate": (6e-5, 3e-5, 1.2e-4),
    "sago": (6e-5, 3e-5, 1.2e-4),
    "select": (8e-4, 4e-4, 1.6e-3),
    "select-coordinate": (3e-4, 1.5e-4, 6e-4),
}
"""Learning rates by variant, and of what is made of it; the others take gentle ones."""


@dataclass(frozen=True)
class Trained:
    """Which of a model's parameters are trained: all, those of some layers, or adapters.

    `layers` are the first and the last one, counted from 0; `lora` is the rank of an adapter on
    every linear layer. Not both. With `in_4bit` the matrices under the adapters are codes of 4 bits
    (NF4).
    """

    layers: tuple[int, int] | None = None
    lora: int | None = None
    in_4bit: bool = False

    def __post_init__(self) -> None:
        if self.layers is not None and self.lora is not None:
            raise ValueError(
                "`layers` or `lora` should be chosen, not both. Found "
                f"`layers = {self.layers}` and `lora = {self.lora}`. Leave one of them out."
            )
        if self.lora is not None and self.lora < 1:
            raise ValueError(
                f"`lora` should be a rank of at least 1. Found `lora = {self.lora}`. "
                "Pass, say, lora=8."
            )
        if self.in_4bit and self.lora is None:
            raise ValueError(
                "`in_4bit` should go with `lora`: weights of 4 bits have no gradient. Found no "
                "`lora`. Pass, say, lora=8 too."
            )

    def of(self, model: Any) -> Any:
        """The model with nothing but these requiring a gradient; adapters are put into it."""
        if self.layers is not None:
            _only(model, *self.layers)
        return model if self.lora is None else _adapted(model, self.lora)

    def beside(self, model: Any) -> Any:
        """A model that has an adapter already, with a further one."""
        import torch

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model.add_adapter("default", _lora(self.lora or 1))
        return model


@dataclass(frozen=True)
class Pretrained:
    """A pretrained subject: a folder as `save_pretrained` leaves it, or a GGUF file.

    It is trained with the chat template of its tokenizer, where there is one. World facts are not
    taught: it brings them along. `device` is where it lies, `dtype` what its weights are kept in,
    float32 or bfloat16 (in float16 a step needs a GradScaler); adapters are trained in float32 all
    the same.
    """

    source: str
    trained: Trained = Trained()
    corpus: Size = field(default_factory=lambda: Size(authors=7, forget=1, heldout=3, world=50))
    few_heldout: int = 5
    unlearning: UnlearningConfig = field(
        default_factory=lambda: UnlearningConfig(
            forget_batch=5,
            retain_batch=10,
            world_batch=10,
            most_steps=40,
            plain_steps=12,
            relearning_rate=3e-5,
            teaching_steps=10,
            teaching_rate=1e-4,
            attack_rates=(3e-5, 1e-4, 3e-4),
            savings_rate=3e-5,
        )
    )
    epochs: int = 6
    batch: int = 5
    learning_rate: float = 1e-4
    warmup: int = 5
    device: str = "cpu"
    dtype: str = "float32"

    @property
    def layers(self) -> None:
        """Its folder may hold any model."""

    @property
    def described(self) -> str:
        """What it is and how it learns, for a report."""
        return (
            f"{Path(self.source).name}, pretrained and then fine-tuned for {self.epochs} epochs, "
            f"memorised {self.corpus.authors} fictitious authors; the facts of the real world it "
            "brought along."
        )

    def learn(
        self, folder: Path, corpus: Corpus, facts: Sequence[Fact], seed: int, report: Counted
    ) -> None:
        """Fine-tune on the facts about authors, and save the model.

        Adapters are merged into what is saved, but for those on 4 bits, which would round them
        away: there they are what is saved.
        """
        from geffect.checkpoints.loading import save_model

        from . import language_model as lm

        taught = [fact for fact in facts if fact not in corpus.world]
        model, tokenizer = self._opened(Path(self.source))
        model = self.trained.of(model)
        lm.memorise(model, lm.encode(tokenizer, taught), self, seed, report)
        if self.trained.lora is not None and not self.trained.in_4bit:
            model = model.merge_and_unload()
        save_model(model, folder)
        tokenizer.save_pretrained(folder)

    def load(self, folder: Path) -> tuple[Any, Any]:
        """What `learn` has saved, with fresh adapters if it is trained so."""
        if not self.trained.in_4bit:
            model, tokenizer = self._opened(folder)
            return self.trained.of(model), tokenizer
        base, tokenizer = self._opened(Path(self.source))
        return _learned(base, folder, self.trained), tokenizer

    def _opened(self, folder: Path) -> tuple[Any, Any]:
        return opened(folder, device=self.device, dtype=self.dtype, in_4bit=self.trained.in_4bit)

    def paced(self, variants: Mapping[str, Variant]) -> dict[str, Variant]:
        """The variants at the learning rates of a pretrained model.

        Those of plain gradient descent are lengths of steps, or units of a gain: they stay.
        """
        return {
            name: replace(variant, learning_rates=PACES.get(base_of(name), GENTLE))
            if variant.optimizer == "AdamW"
            else variant
            for name, variant in variants.items()
        }


def opened(
    source: Path, *, device: str = "cpu", dtype: str = "float32", in_4bit: bool = False
) -> "tuple[Any, Any]":
    """Model, in eval mode, and tokenizer of a folder or a GGUF file."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from geffect.codes import keep_differentiable
    from geffect.risk import check_differentiable, check_loaded

    where, options = place(source)
    if getattr(config_of(source), "is_encoder_decoder", False):
        raise ValueError(
            "The model of a study should be a causal language model. Found an encoder-decoder in "
            f"`{source}`. Name the folder of a causal one."
        )
    further = _quantising(source, device, dtype) if in_4bit else {}
    kind: Any = AutoModelForCausalLM
    model, found = kind.from_pretrained(where, output_loading_info=True, **options, **further)
    check_loaded(model, found["missing_keys"], source)
    if in_4bit:
        keep_differentiable(model)
        _check_rows(model, source)
    else:
        check_differentiable(model, source)
        if options:
            model = _unmarked(model)
        model = model.to(getattr(torch, dtype)).to(device)
    model.config.use_cache = False
    return model.eval(), AutoTokenizer.from_pretrained(where, **options)


def _quantising(source: Path, device: str, dtype: str) -> dict[str, Any]:
    """What loads a model in 4 bits, which has to be one of numbers."""
    import torch
    from transformers import BitsAndBytesConfig

    _, options = place(source)
    if options or getattr(config_of(source), "quantization_config", None) is not None:
        raise ValueError(
            f"`{source}` should hold weights in floating point, to be loaded in 4 bits. Found "
            f"{'a GGUF file' if options else 'a model that is quantised already'}. Name a folder "
            "as `save_pretrained` leaves it, or leave --load-in-4bit out."
        )
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "`bitsandbytes` should be installed to load a model in 4 bits. Found no such package. "
            "Run `pip install bitsandbytes`."
        ) from error
    kept = getattr(torch, dtype)
    config: Any = BitsAndBytesConfig
    return {
        "quantization_config": config(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=kept
        ),
        "device_map": {"": device},
        "dtype": kept,
    }


def _check_rows(model: Any, source: Path) -> None:
    """Refuses rows that bitsandbytes 0.50 puts back with the scale of another block.

    Its kernel for CPUs with AVX-512 does so where blocks go on from row to row.
    """
    for name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None and module.weight.device.type == "cpu":
            length = state.shape[-1]
            if length % state.blocksize:
                raise ValueError(
                    f"On a CPU, rows of a matrix in 4 bits should be a multiple of "
                    f"{state.blocksize} long, or bitsandbytes puts back other numbers. Found rows "
                    f"of {length} in `{name}` of `{source}`. Leave --load-in-4bit out, or choose a "
                    "GPU by --device."
                )


def _learned(base: Any, folder: Path, trained: Trained) -> Any:
    """A model with the adapter that has learned, frozen, and a fresh one beside it, trained."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(base, str(folder), adapter_name="learned")
    model = trained.beside(model)
    model.base_model.set_adapter(["learned", "default"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".default." in name)
    return model.eval()


def config_of(source: Path) -> Any:
    """The configuration of a folder or a GGUF file."""
    from transformers import AutoConfig

    where, options = place(source)
    return AutoConfig.from_pretrained(where, **options)


def layers_from(text: str) -> tuple[int, int]:
    """The layers that a command line names as N..M.

    >>> layers_from("10..19")
    (10, 19)
    """
    found = re.fullmatch(r"(\d+)\.\.(\d+)", text)
    if found is None or int(found[1]) > int(found[2]):
        raise ValueError(
            "`--layers` should be the first and the last layer to train, counted from 0. Found "
            f"`{text}`. Pass, say, --layers 10..19."
        )
    return int(found[1]), int(found[2])


def place(source: Path) -> tuple[Path, dict[str, str]]:
    """What transformers is to be told of a source."""
    if source.is_file() and source.suffix == GGUF:
        return source.parent, {"gguf_file": source.name}
    if (source / "config.json").is_file():
        return source, {}
    held = sorted(path.name for path in source.glob(f"*{GGUF}"))
    if len(held) == 1:
        return source, {"gguf_file": held[0]}
    raise FileNotFoundError(
        f"`{source}` should be a folder with a `config.json`, as `save_pretrained` leaves it, or a "
        f"{GGUF} file. Found {', '.join(held) or 'neither'}. Name the folder or the file."
    )


def _unmarked(model: Any) -> Any:
    """The same weights in a model that does not say it is quantised: such a one is not saved."""
    from transformers import AutoModelForCausalLM

    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(model.state_dict())
    return plain


def _only(model: "nn.Module", first: int, last: int) -> None:
    """Freeze all but the layers from first to last."""
    from geffect.layers import describe, trainable

    layers = [parameter.index for parameter in describe(model)]
    depth = 1 + max(layers)
    if last >= depth:
        raise ValueError(
            f"`layers` should be between 0 and {depth - 1}, the layers of the model. Found "
            f"{first}..{last}. Pass, say, --layers {depth // 3}..{2 * depth // 3}."
        )
    for layer, parameter in zip(layers, trainable(model).values(), strict=True):
        parameter.requires_grad_(first <= layer <= last)


def _adapted(model: "nn.Module", rank: int) -> "nn.Module":
    """The model with an adapter on every linear layer, the same each time, and all else frozen."""
    import torch

    try:
        from peft import get_peft_model
    except ImportError as error:
        raise ImportError(
            f"`peft` should be installed to train adapters of `lora = {rank}`. Found no such "
            "package. Run `pip install peft`."
        ) from error

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        adapted: nn.Module = get_peft_model(model, _lora(rank))
    return adapted.eval()


def _lora(rank: int) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
