"""A transformers model without its weights: the structure, and for every parameter the place of its value on disk.

A model of any size takes a few megabytes of memory. Buffers that no checkpoint contains, such as rotary frequencies,
are real.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from promprune.errors import ModelError, PrompruneError, UnsupportedModelError, first_line
from promprune.export.checkpoint.packed import PackedWeights, packed_weights
from promprune.export.checkpoint.weights import LinkedWeight, StoredTensor, link, linked, stored_tensors

__all__ = ["build_meta_model", "fake_mode_of", "make_fake"]

PACKED: Final = (".qweight", ".weight_packed")  # how the keys of packed weights end


def build_meta_model(folder: Path, model_class: str, dtype: torch.dtype) -> Any:
    """Build a model whose parameters are on the meta device, each linked to its tensor in the checkpoint.

    The attribute ``packed_weights`` of the model tells how the checkpoint quantizes them; None if it does not.

    Args:
        folder: the checkpoint.
        model_class: name of the class in ``transformers``; code from the checkpoint is never run.
        dtype: dtype of the parameters.

    Raises:
        ModelError: the configuration or the weights are not those of a complete checkpoint of this class.
        UnsupportedModelError: the weights are quantized in a form that is not read, or not stored parameter by
            parameter.
    """
    kind = getattr(transformers, model_class)
    try:
        config = kind.config_class.from_pretrained(folder, local_files_only=True)
        packed = _take_packing(folder, config)
        with torch.device("meta"):
            model = kind._from_config(config, dtype=dtype, attn_implementation="sdpa")
        if (folder / "generation_config.json").is_file():
            model.generation_config = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
    except PrompruneError:
        raise
    except Exception as error:  # transformers and torch raise almost every type of error for damaged configurations
        raise ModelError(
            f"{folder} cannot be loaded as {model_class} ({first_line(error)})",
            expected="a complete checkpoint in Hugging Face format",
        ) from error
    model.eval().requires_grad_(False)
    _make_buffers_real(model)
    tensors = stored_tensors(folder)
    _link_all(model, _by_parameter(model, packed.combine(tensors) if packed else tensors), folder)
    model.packed_weights = packed
    return model


def make_fake(model: nn.Module) -> None:
    """Replace parameters on the meta device by fake ones on the CPU, so that a trace sees a model on one device."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            if parameter not in fakes:
                with mode:
                    fake = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                fakes[parameter] = nn.Parameter(fake, requires_grad=False)
                weight = linked(parameter)
                if weight is not None:
                    link(fakes[parameter], weight)
            module._parameters[name] = fakes[parameter]


def fake_mode_of(module: nn.Module) -> FakeTensorMode | None:
    """Return the mode of a module's fake parameters; None if it has none."""
    return next((tensor.fake_mode for tensor in module.parameters() if isinstance(tensor, FakeTensor)), None)


def _take_packing(folder: Path, config: Any) -> PackedWeights | None:
    """Return how the checkpoint packs its weights, and remove it from a configuration: the model has plain weights."""
    packed = packed_weights(folder, config)
    for part in (config, getattr(config, "text_config", config)):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return packed


def _make_buffers_real(model: Any) -> None:
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype, device="cpu")
    model.initialize_weights()  # of transformers: computes the values of buffers, and does nothing on the meta device


def _by_parameter(model: Any, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Map the model's name of every tensor to the tensor: other versions of transformers wrote other names.

    Follows ``transformers.core_model_loading.convert_and_load_state_dict_in_model``.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix, state = model.base_model_prefix, model.state_dict()
    found = {}
    for key in sorted(tensors):
        name, converted = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, converted = rename_source_key(key, [], [], base_model_prefix=prefix, meta_state_dict=state)
        if name in state and converted is not None:
            raise UnsupportedModelError(
                f"{key} is stored in a different layout from that of {type(model).__name__}",
                expected="one tensor for every parameter",
                fix="load the checkpoint with transformers and save it again",
            )
        found[name] = tensors[key]
    return found


def _link_all(model: nn.Module, found: Mapping[str, StoredTensor], folder: Path) -> None:
    """Link every parameter and load every persistent buffer; for a tied parameter one of its names is enough.

    Like transformers, untie parameters that a checkpoint stores with different values, such as a head that was
    fine-tuned on its own.
    """
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    missing = []
    for parameter, aliases in names.items():
        held = [alias for alias in aliases if alias in found]
        if not held:
            missing.append(aliases[0])
            continue
        for name in held:
            _check_shape(found[name], tuple(parameter.shape), name)
        link(parameter, LinkedWeight(aliases[0], found[held[0]]))
        for name in held[1:]:
            if not _has_equal_values(found[held[0]], found[name]):
                link(_untie(model, name), LinkedWeight(name, found[name]))
    buffers = dict(model.named_buffers())
    for name in model.state_dict().keys() & buffers.keys():
        if name not in found:
            missing.append(name)
            continue
        _check_shape(found[name], tuple(buffers[name].shape), name)
        buffers[name].copy_(found[name].read(buffers[name].dtype))
    if missing:
        _refuse_missing(sorted(missing), found, folder)


def _refuse_missing(missing: list[str], found: Mapping[str, StoredTensor], folder: Path) -> None:
    """Refuse a checkpoint without the weights of some parameters."""
    adapted = next((stored.key for stored in found.values() if ".lora_" in stored.key), None)
    if adapted is not None:
        raise ModelError(
            f"{folder} has weights of a LoRA adapter that is not merged, such as {adapted}",
            expected="a merged checkpoint",
            fix="merge the adapter with merge_and_unload of peft, and save the model",
        )
    packed = next((stored.key for stored in found.values() if stored.key.endswith(PACKED)), None)
    if packed is not None:
        raise ModelError(
            f"{folder} has packed weights, such as {packed}, and config.json does not say how",
            expected="quantization_config in config.json, or in its text_config",
            fix="copy it from quantize_config.json, or export the original checkpoint",
        )
    raise ModelError(
        f"{folder} has no weights for {len(missing)} tensors, such as {missing[0]}",
        expected="a complete checkpoint: missing weights would be random",
    )


def _untie(model: nn.Module, name: str) -> nn.Parameter:
    """Give one name of a shared parameter a parameter of its own, without data."""
    owner, _, own = name.rpartition(".")
    module = model.get_submodule(owner)
    parameter = nn.Parameter(torch.empty_like(module.get_parameter(own)), requires_grad=False)
    module.register_parameter(own, parameter)
    return parameter


def _has_equal_values(first: StoredTensor, second: StoredTensor) -> bool:
    pairs = zip(first.chunks(), second.chunks(), strict=True)
    return all(torch.equal(a.double(), b.double()) for a, b in pairs)


def _check_shape(stored: StoredTensor, shape: tuple[int, ...], name: str) -> None:
    stored.torch_dtype  # noqa: B018  # raises for a quantized tensor
    if stored.shape != shape:
        raise ModelError(
            f"{stored.key} in {stored.file.name} has the shape {list(stored.shape)}",
            expected=f"{list(shape)}, the shape of {name} according to config.json",
        )
