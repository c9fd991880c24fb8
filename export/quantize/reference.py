"""The source model with the weights of a quantized package: the reference for the package's graphs.

The weights are quantized again from the checkpoint, not read from the package, so that wrong integers, scales, axes or
block sizes in the package's files are detected.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from promprune.dtypes import BY_NAME
from promprune.export.checkpoint.weights import LinkedWeight, StoredTensor, link, linked, torch_dtype
from promprune.export.quantize.graph import LARGEST, LEAST_STEP, QUANTIZED_SUFFIX
from promprune.export.quantize.weights import QuantizedWeight, WeightQuantization
from promprune.package.package import Package

__all__ = ["PackageWeights", "PackagedTensor", "fake_quantize", "package_weights"]


@dataclass(frozen=True, kw_only=True)
class PackagedTensor(StoredTensor):
    """A tensor of a checkpoint whose values are those of a package: quantized or rounded, then converted to fp32."""

    stored: StoredTensor
    format: WeightQuantization | torch.dtype

    @classmethod
    def of(cls, stored: StoredTensor, format: WeightQuantization | torch.dtype) -> PackagedTensor:  # noqa: A002
        """Return a tensor of a checkpoint in a package's format."""
        own = {field.name: getattr(stored, field.name) for field in fields(StoredTensor)}
        return cls(**own, stored=stored, format=format)

    def read(self, dtype: torch.dtype) -> Tensor:
        """Read the entire tensor."""
        if isinstance(self.format, torch.dtype):
            return self.stored.read(self.format).to(dtype)
        return QuantizedWeight(stored=self.stored, quantization=self.format).read(dtype)


@dataclass(frozen=True, kw_only=True)
class PackageWeights:
    """The weights of a package that are stored in another format than its dtype.

    Attributes:
        formats: name of the parameter in the transformers model -> its quantization, or its dtype.
        int8_activations: names of the weights that are multiplied by activations in int8.
    """

    formats: Mapping[str, WeightQuantization | torch.dtype]
    int8_activations: frozenset[str]

    def link_to(self, meta_model: nn.Module) -> None:
        """Let the linear modules of a model on the meta device load their weights with the package's values."""
        for module, stored, name in self._linears(meta_model):
            module.weight = nn.Parameter(torch.empty_like(module.weight), requires_grad=False)
            link(module.weight, LinkedWeight(name, stored))
            self._quantize_activations(module, name)

    @contextlib.contextmanager
    def applied_to(self, model: nn.Module, meta_model: nn.Module) -> Iterator[None]:
        """Replace the weights of a model by the package's, and restore them afterwards.

        Args:
            model: the model with its weights, fp32.
            meta_model: the same model on the meta device, linked to the checkpoint.
        """
        own, hooks = [], []
        paths = {module: path for path, module in meta_model.named_modules()}
        for meta, stored, name in self._linears(meta_model):
            module = model.get_submodule(paths[meta])
            own.append((module, module.weight))
            module.weight = nn.Parameter(stored.read(torch.float32), requires_grad=False)
            hooks.append(self._quantize_activations(module, name))
        try:
            yield
        finally:
            for module, parameter in own:
                module.weight = parameter
            for hook in hooks:
                hook()

    def _linears(self, meta_model: nn.Module) -> Iterator[tuple[nn.Linear, StoredTensor, str]]:
        """Yield every linear module whose weight the package stores in another format, with the package's weight.

        An embedding tied to a linear module is not changed.
        """
        for module in meta_model.modules():
            if not isinstance(module, nn.Linear):
                continue
            found = linked(module.weight)
            if found is not None and found.name in self.formats:
                yield module, PackagedTensor.of(found.stored, self.formats[found.name]), found.name

    def _quantize_activations(self, module: nn.Module, name: str) -> Callable[[], None]:
        if name not in self.int8_activations:
            return lambda: None
        return module.register_forward_pre_hook(lambda module, args: (fake_quantize(args[0]), *args[1:])).remove


def package_weights(package: Package) -> PackageWeights | None:
    """Return the weights of a package that are stored in another format than its dtype; None if there are none.

    The names are those of the graphs' initializers; the manifest tells how they are quantized.
    """
    manifest = package.manifest
    if manifest.weights is None:
        return None
    formats: dict[str, WeightQuantization | torch.dtype] = {}
    int8_activations: set[str] = set()
    for graph in manifest.graphs:
        record = manifest.weights.of(graph)
        if record.format == manifest.dtype:
            continue
        initializers = onnx.load(package.graph_file(graph), load_external_data=False).graph.initializer
        if not record.is_quantized:
            element = BY_NAME[record.format]
            names = [tensor.name for tensor in initializers if tensor.data_type == element.onnx]
            formats.update(dict.fromkeys(names, torch_dtype(record.format)))
            continue
        names = [t.name.removesuffix(QUANTIZED_SUFFIX) for t in initializers if t.name.endswith(QUANTIZED_SUFFIX)]
        formats.update(dict.fromkeys(names, WeightQuantization.of(record, manifest.dtype)))
        if record.int8_activations:
            int8_activations.update(names)
    return PackageWeights(formats=formats, int8_activations=frozenset(int8_activations)) if formats else None


def fake_quantize(values: Tensor) -> Tensor:
    """Round each row of activations ``[..., K]`` to multiples of 1/127 of its largest magnitude."""
    largest = values.abs().amax(-1, keepdim=True)
    step = (largest * float(np.float32(1 / LARGEST))).clamp(min=float(LEAST_STEP))
    return (values / step).round() * step
