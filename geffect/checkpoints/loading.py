"""The one model that holds the weights of each checkpoint in turn, and models by themselves."""

import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from geffect.codes import coded, holds_codes, keep_differentiable
from geffect.devices import out_of_memory
from geffect.gradients import Vector
from geffect.layers import trainable
from geffect.notes import line_of
from geffect.objectives.reference import base_changed_by
from geffect.risk import check_differentiable, check_loaded

from .folders import (
    CONFIG,
    Folder,
    adapter_config_of,
    check_folder,
    config_of,
    encodes_apart,
    files_of,
    has_tokenizer,
    is_adapter,
    legible,
    tensors_of,
    tokenizer_of,
)
from .hub import only_cached
from .merging import merging


class Loader:
    """One model, into which checkpoint after checkpoint is loaded, in eval mode.

    - `base`: the model that adapters are for; the one that they name if left out.
    - `device`: where the model is.

    A checkpoint is a folder as `save_pretrained` leaves it, of a model or of an adapter. The first
    one is instantiated. Of the others only the weights are read, and their names and shapes have to
    be the same. Nothing is written.
    """

    def __init__(self, *, base: Folder | None = None, device: str | torch.device = "cpu") -> None:
        self._base = base
        self._device = device
        self._model: Any = None
        self._adapter: Any = None
        self._beside: list[str] = []  # what an adapter's checkpoints hold of the base
        self._loaded: Path | None = None  # None too where a checkpoint was loaded in part
        self._like: Path | None = None  # the last one that was loaded

    def load(self, folder: Folder) -> nn.Module:
        """The model with the weights of a checkpoint."""
        path = Path(folder)
        check_folder(path)
        if self._model is None:
            self._adapter = adapter_config_of(path)
            model = self._whole(path) if self._adapter is None else self._adapted(path)
            model.config.use_cache = False
            self._model = model.eval().to(self._device)
            keep_differentiable(self._model)
        elif path != self._loaded:
            held = self._held()
            self._loaded = None
            with torch.no_grad():
                for name, tensor in self._stored(path, held):
                    held[name].copy_(tensor)
            _check_finite(self._model.named_parameters(), path)
        self._loaded = self._like = path
        loaded: nn.Module = self._model
        return loaded

    @property
    def adapted(self) -> nn.Module | None:
        """The loaded model where disabling its adapter gives the base back, as it was."""
        if self._adapter is None or base_changed_by(self._adapter) is not None:
            return None
        loaded: nn.Module = self._model
        return loaded

    def change(self, folder: Folder) -> Vector:
        """The weights of a checkpoint minus those that are loaded, in the order of `trainable`."""
        path = Path(folder)
        check_folder(path)
        held = self._held()
        there = {held[name].data_ptr(): tensor for name, tensor in self._stored(path, held)}
        changes = {}
        for name, parameter in trainable(self._model).items():
            here = parameter.detach()
            exact = torch.promote_types(here.dtype, torch.float32)
            changes[name] = there[here.data_ptr()].to(here.device, exact) - here
        _check_finite(changes.items(), path)
        return [*changes.values()]

    def _held(self) -> dict[str, Tensor]:
        """The tensors of the model, by their names in a checkpoint."""
        if self._adapter is None:
            return dict(self._model.state_dict())
        from peft.utils import get_peft_model_state_dict

        held = get_peft_model_state_dict(self._model, save_embedding_layers=False)
        whole = self._model.state_dict() if self._beside else {}
        return {**held, **{name: whole[name] for name in self._beside}}

    def _stored(self, path: Path, held: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The tensors of a checkpoint, one after the other; they have to be those of the model."""
        should = f"`{path}` should be a checkpoint of the same model as `{self._like}`."
        if adapter_config_of(path) != self._adapter:
            raise ValueError(
                f"{should} Found another kind, or an adapter that is set up in another way. Replay "
                "it by itself, into another file."
            )
        files = files_of(path)
        tensors = tensors_of(path, files)
        if not files.keys() <= held.keys() and self._adapter is None:
            # Saved under other names than the model has: transformers knows how to translate.
            whole = _once_each(_model_of(path).state_dict())
            files, tensors = whole, iter(whole.items())
        found = Counter(held[name].data_ptr() for name in files if name in held)
        other = [name for name in files if name not in held]
        other += [name for name, tensor in held.items() if tensor.data_ptr() not in found]
        if other:
            raise ValueError(
                f"{should} Found {len(other)} tensors that only one of them has, the first of them "
                f"{other[:3]}. Replay it by itself, into another file."
            )
        tied: dict[int, Tensor] = {}
        for name, tensor in tensors:
            if tensor.shape != held[name].shape:
                raise ValueError(
                    f"{should} Found `{name}` of shape {tuple(tensor.shape)}, not "
                    f"{tuple(held[name].shape)}. Replay it by itself, into another file."
                )
            # Tied tensors are one. Two that differ are those of another model, that unties them.
            own = held[name].data_ptr()
            if found[own] > 1 and not torch.equal(tied.setdefault(own, tensor), tensor):
                raise ValueError(
                    f"{should} Found `{name}` apart from what is one tensor with it there. Replay "
                    "it by itself, into another file."
                )
            yield name, tensor

    def _whole(self, path: Path) -> Any:
        model = _model_of(path)
        check_differentiable(model, path)
        return model

    def _adapted(self, path: Path) -> Any:
        from peft import PeftModel

        if self._adapter.is_prompt_learning:
            raise ValueError(
                f"`{path}` should be an adapter that changes weights, as LoRA does. Found one of "
                f"`{self._adapter.peft_type.value}`, whose tokens peft loads for inference alone. "
                "Record its training, by the callback or a Recorder."
            )
        base = self._base_of(path)
        model = _model_of(base)
        try:
            self._model = PeftModel.from_pretrained(model, path, is_trainable=True)
        except (RuntimeError, ValueError) as error:
            if out_of_memory(error):
                raise
            raise ValueError(
                f"`{path}` should be an adapter for the model in `{base}`. Found: "
                f"{line_of(error, -1):.300} Name the model that it was trained on as its base."
            ) from error
        held, stored = self._held(), files_of(path)
        check_loaded(self._model, held.keys() - stored.keys(), path)
        _check_finite(self._model.named_parameters(), path)
        # An adapter on the head or the embedding is saved with what it is for.
        self._beside = sorted(self._model.state_dict().keys() & (stored.keys() - held.keys()))
        return self._model

    def _base_of(self, path: Path) -> Folder:
        """The model that an adapter is for; warns of another one than it names, which is there."""
        named: Folder = self._adapter.base_model_name_or_path
        if self._base is None:
            return named
        there = bool(named) and Path(named).is_dir() and Path(self._base).is_dir()
        if there and not Path(named).samefile(self._base):
            warnings.warn(
                f"`base` should be the model that the adapter `{path}` was trained on. Found "
                f"`{self._base}`, where the adapter names `{named}`, which is there. Leave `base` "
                "out, unless it holds the same weights in another form.",
                stacklevel=2,
            )
        return self._base


def whole_of(folder: Folder, base: Folder | None, device: str | torch.device) -> nn.Module:
    """A checkpoint as a model without adapters, all of it trainable, in eval mode.

    An adapter is merged into the model that it is for: `base`, or the one that it names.
    """
    loaded: Any = Loader(base=base, device=device).load(folder)
    if is_adapter(folder):
        codes = next(coded(loaded), None)
        if codes is not None:
            raise ValueError(
                f"`{folder}` should be an adapter on a model in floating point, to be merged into "
                f"it. Found {codes}, which is quantised. Save that model dequantised "
                "(`model.dequantize()`), and name the folder as the base."
            )
        with merging(f"`{folder}` should be an adapter"):
            loaded = loaded.merge_and_unload()
    check_differentiable(loaded, folder)
    model: nn.Module = loaded.requires_grad_().eval()
    return model


def save(model: Any, folder: Folder, configured: Folder, tokenizers: Iterable[Folder]) -> None:
    """Save a loaded model, with the first tokenizer that one of some folders has.

    `configured` is the checkpoint whose configuration it has.
    """
    if hasattr(kept := config_of(configured), "use_cache"):
        model.config.use_cache = kept.use_cache  # which is turned off where a model is loaded
    save_model(model, folder)
    for named in tokenizers:
        if has_tokenizer(named):
            tokenizer_of([named]).save_pretrained(folder)
            return


def save_model(model: Any, folder: Folder) -> None:
    """Save a model in a folder, as transformers does.

    What it loads for that, such as DeepSpeed, logs to the standard output, where data go.
    """
    with redirect_stdout(sys.stderr):
        model.save_pretrained(folder)


def model_of(source: Folder) -> Any:
    """A model as it is saved, in eval mode, whose gradients are not to be taken."""
    return _model_of(source).eval().requires_grad_(False)


def _once_each(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The tensors under their first names."""
    first = {tensors[name].data_ptr(): name for name in reversed(tensors)}
    return {name: tensors[name] for name in first.values()}


def _model_of(source: Folder) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    kind: Any = AutoModelForSeq2SeqLM if encodes_apart(source) else AutoModelForCausalLM
    # In the precision in which it was saved.
    with legible(source):
        model, found = kind.from_pretrained(
            source,
            torch_dtype="auto",
            output_loading_info=True,
            local_files_only=only_cached(source, CONFIG),
        )
    check_loaded(model, found["missing_keys"], source)
    _check_finite(model.named_parameters(), source)
    return model


def _check_finite(weights: Iterable[tuple[str, Tensor]], source: Folder) -> None:
    """Refuse the weights of a training that has diverged."""
    for name, tensor in weights:
        # Torch does not ask codes of one byte.
        if tensor.itemsize > 1 and not holds_codes(tensor) and not tensor.isfinite().all():
            raise ValueError(
                f"`{source}` should hold finite weights. Found NaN or infinity in `{name}`, as "
                "where training diverged. Leave it out, or save it again."
            )
