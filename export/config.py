"""Settings of the commands that export and calibrate; does not import PyTorch.

The command line takes its defaults from these classes, and every step receives one of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from promprune.checks import check_integer, check_name
from promprune.dtypes import DTYPES, WEIGHT_FORMATS, Dtype, WeightFormat, is_quantized
from promprune.errors import ConfigError
from promprune.export.graphs.opset import DEFAULT_OPSET, QUANTIZED_OPSET, check_opset
from promprune.files import check_output_file
from promprune.method.config import DEFAULT_LOOP, LoopForm, SelectionConfig, SelectionPolicy, TokenOrder, check_loop
from promprune.package.manifest import TokenCounts, WeightRecord, WeightsRecord
from promprune.package.sources import EMBEDDED_MODEL

__all__ = [
    "BLOCK_SIZES",
    "DEFAULT_INT4_BLOCK",
    "CalibrateConfig",
    "ExportConfig",
    "check_calibration_images",
    "default_output",
]

_MIN_CALIBRATION_IMAGES: Final = 8
BLOCK_SIZES: Final = (16, 32, 64, 128)
DEFAULT_INT4_BLOCK: Final = 32  # int8 has one scale per column
_PLOT_SUFFIXES: Final = (".png", ".svg")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Settings of ``promprune-export``.

    Attributes:
        model: folder in Hugging Face format, or hub id; None for the embedded model.
        output: folder to write; None to derive a name from the model and the ratio.
        ratio: fraction of the visual tokens that is KEPT, in (0, 1]; 1 is the unpruned baseline.
        keep_tokens: visual tokens kept per image; overrides ``ratio``.
        dtype: dtype of activations, and of weights with no other format; the selection always computes in fp32.
        weight_format: format of the weights of the language model's matrix products, including the head; None for the
            checkpoint's own if it is quantized, else ``dtype``.
        vision_weight_format: format of the weights of the vision encoder and the projector; None for ``"int8"`` if the
            language model is quantized, else ``dtype``.
        block_size: number of quantized weights that share one scale; None for 32 in int4, and one column in int8.
        vision_int8_activations: compute the vision encoder's products in int8, which is faster on CPUs but not
            supported by TensorRT.
        image_grids: sizes of images, as (rows, columns) of visual tokens, for families with a choice of sizes; each
            gets a vision graph. Empty for the family's default.
        opset: ONNX operator set of the default domain.
        split_selector: also write the selection as a separate graph.
        copy_weights: True to copy the weights into the package; False to link the checkpoint's files, or fail; None
            to link large files if the file system allows it.
        vision_only: write no language model, for language models that run elsewhere.
        verify: compare the package with the source model before it is moved into place.
        force: replace ``output`` if it is a package.
        mu, tau: override the entropy constants of the model (see :class:`SelectionConfig`).
        order: order of the kept tokens.
        policy: policy that chooses them (see :class:`SelectionConfig`).
        loop: form of the greedy stage: ``"loop"`` with as many iterations as the images need, ``"fixed"`` with always
            T, so that nothing depends on the data, ``"unrolled"`` without a loop, about twenty nodes per kept token.

    Raises:
        ConfigError: a value is out of its range.
    """

    model: str | None = None
    output: Path | None = None
    ratio: float = 0.12
    keep_tokens: int | None = None
    dtype: Dtype = "fp32"
    weight_format: WeightFormat | None = None
    vision_weight_format: WeightFormat | None = None
    block_size: int | None = None
    vision_int8_activations: bool = False
    image_grids: tuple[tuple[int, int], ...] = ()
    opset: int = DEFAULT_OPSET
    split_selector: bool = False
    copy_weights: bool | None = None
    vision_only: bool = False
    verify: bool = True
    force: bool = False
    mu: float | None = None
    tau: float | None = None
    order: TokenOrder = SelectionConfig.order
    policy: SelectionPolicy = SelectionConfig.policy
    loop: LoopForm = DEFAULT_LOOP

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ConfigError(
                f"received ratio = {self.ratio:g}",
                expected="a fraction above 0 and at most 1: the share of the visual tokens that is KEPT",
                fix="--ratio 0.12 keeps 12 %",
            )
        check_integer(self, "keep_tokens", least=1, optional=True)
        check_name(self, "dtype", DTYPES)
        self._check_weights()
        grids = self.image_grids
        if any(side < 1 for grid in grids for side in grid) or len(set(grids)) < len(grids):
            raise ConfigError(
                f"received the image grids {', '.join(f'{rows}x{columns}' for rows, columns in grids)}",
                expected="rows and columns of at least 1, and each grid once",
            )
        check_loop(self.loop)
        check_opset(self.opset)
        self.selection({})  # raises if a value is out of range

    def _check_weights(self) -> None:
        for name in ("weight_format", "vision_weight_format"):
            if getattr(self, name) is not None:
                check_name(self, name, WEIGHT_FORMATS)
        if self.block_size is not None and self.block_size not in BLOCK_SIZES:
            sizes = ", ".join(map(str, BLOCK_SIZES))
            raise ConfigError(f"received block_size = {self.block_size}", expected=f"one of {sizes}")
        weights = self.weights()
        if self.vision_int8_activations and weights.vision.format != "int8":
            raise ConfigError(
                f"received vision_int8_activations with vision weights in {weights.vision.format}",
                expected="vision weights in int8",
                fix="add --vision-weight-format int8",
            )
        if self.copy_weights is False and weights.is_quantized:
            raise ConfigError(
                "received --link-weights for quantized weights",
                expected="weights copied into the package: the checkpoint does not contain them",
                fix="omit --link-weights",
            )

    def weights(self, own: WeightRecord | None = None) -> WeightsRecord:
        """Return the format of the weights of each part.

        Args:
            own: format of the checkpoint's language model if it is quantized.
        """
        language = self._weight_record(self.weight_format or (own.format if own else self.dtype))
        if own is not None and self.block_size is None and language.is_quantized:  # keeps its integers, if it can
            language = WeightRecord(format=language.format, block_size=own.block_size)
        vision = self.vision_weight_format or ("int8" if language.is_quantized else self.dtype)
        return WeightsRecord(
            language=language, vision=self._weight_record(vision, int8_activations=self.vision_int8_activations)
        )

    def for_weights(self, weights: WeightsRecord) -> ExportConfig:
        """Return these settings with an opset that has the operators for such weights.

        If weights are quantized, the checkpoint is not linked, because it does not contain them.
        """
        if not weights.is_quantized:
            return self
        return replace(self, opset=max(self.opset, QUANTIZED_OPSET), copy_weights=True)

    def _weight_record(self, weight_format: WeightFormat, *, int8_activations: bool = False) -> WeightRecord:
        block = self.block_size or (DEFAULT_INT4_BLOCK if weight_format == "int4" else None)
        return WeightRecord(
            format=weight_format,
            block_size=None if int8_activations or not is_quantized(weight_format) else block,
            int8_activations=int8_activations,
        )

    def selection(self, own: Mapping[str, float]) -> SelectionConfig:
        """Return the settings of the selection: those given here, else the model's, else the paper's.

        Args:
            own: mu, tau and the limits of the split in the model's folder.

        Raises:
            ConfigError: a value is out of its range.
        """
        return SelectionConfig(order=self.order, policy=self.policy, **{**own, **self._given_constants})

    def parameters_from(self, own: Mapping[str, float]) -> str:
        """Return the source of mu and tau: ``"command line"``, ``"model"`` or ``"defaults"``."""
        return "command line" if self._given_constants else "model" if own else "defaults"

    @property
    def _given_constants(self) -> dict[str, float]:
        given = {"mu": self.mu, "tau": self.tau}
        return {name: value for name, value in given.items() if value is not None}

    def token_counts(self, num_tokens: int) -> TokenCounts:
        """Return N and T of a vision graph, given N: T is ``keep_tokens``, or N ratio rounded half to even, at least 1.

        Raises:
            ConfigError: ``keep_tokens`` is larger than N.
        """
        if self.keep_tokens is None:
            return TokenCounts(num_tokens=num_tokens, keep_tokens=max(1, round(self.ratio * num_tokens)))
        if self.keep_tokens > num_tokens:
            raise ConfigError(
                f"received keep_tokens = {self.keep_tokens}",
                expected=f"1 to {num_tokens}, the visual tokens of one image of this model",
            )
        return TokenCounts(num_tokens=num_tokens, keep_tokens=self.keep_tokens)


def default_output(config: ExportConfig) -> Path:
    """Return the default output folder: ``promprune-<model>-<ratio or T>``, plus settings that are not defaults."""
    name = EMBEDDED_MODEL if config.model is None else Path(config.model).resolve().name
    kept = f"{config.ratio:g}" if config.keep_tokens is None else f"{config.keep_tokens}-tokens"
    defaults = ExportConfig
    named = ("policy", "loop", "dtype", "weight_format")
    other = [value for value in named if getattr(config, value) != getattr(defaults, value)]
    return Path("-".join(["promprune", name, kept, *(getattr(config, value) for value in other)]))


def check_calibration_images(count: int, received: str) -> None:
    """Refuse too few images for a calibration; ``received`` says where the number comes from."""
    if count < _MIN_CALIBRATION_IMAGES:
        raise ConfigError(
            f"received {received}", expected=f"at least {_MIN_CALIBRATION_IMAGES} images; some hundred are better"
        )


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig:
    """Settings of ``promprune-calibrate``.

    Attributes:
        model: folder in Hugging Face format, or hub id; None for the embedded model.
        images: folder of images like those expected in use; None for the embedded model's calibration scenes.
        limit: largest number of images to use.
        image_grids: see :class:`ExportConfig`.
        write: write mu and tau to the model's folder.
        plot: file for the histogram, ``.png`` or ``.svg``; None to write none.

    Raises:
        ConfigError: a value is out of its range, or contradicts another.
        OutputError: the histogram cannot be written to ``plot``.
    """

    model: str | None = None
    images: Path | None = None
    limit: int = 512
    image_grids: tuple[tuple[int, int], ...] = ()
    write: bool = False
    plot: Path | None = None

    def __post_init__(self) -> None:
        check_calibration_images(self.limit, f"limit = {self.limit}")
        if self.images is None and self.model is not None:
            raise ConfigError(
                "received no images", expected="a folder of images like those expected in use", fix="--images DIR"
            )
        if self.images is not None and not self.images.is_dir():
            raise ConfigError(f"received --images {self.images}, which is not a folder", expected="a folder of images")
        if self.write and (self.model is None or not Path(self.model).is_dir()):
            raise ConfigError(
                f"received --write for {self.model or 'the embedded model'}",
                expected="a model in a local folder",
                fix="give --mu and --tau to promprune-export instead",
            )
        if self.plot is not None:
            check_output_file(self.plot, "--plot", suffixes=_PLOT_SUFFIXES)
