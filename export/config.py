"""Settings of the commands that make, verify and calibrate packages; needs no PyTorch.

The command line takes its defaults from these classes, and every step receives one of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from promprune.checks import check_integer, check_name
from promprune.dtypes import DTYPES, Dtype
from promprune.errors import ConfigError
from promprune.export.graphs.opset import DEFAULT_OPSET, check_opset
from promprune.files import check_output_file
from promprune.method.config import DEFAULT_LOOP, LoopForm, SelectionConfig, SelectionPolicy, TokenOrder, check_loop
from promprune.package.manifest import TokenCounts
from promprune.package.sources import EMBEDDED_MODEL

__all__ = [
    "CalibrateConfig",
    "ExportConfig",
    "check_calibration_images",
    "default_output",
]

_MIN_CALIBRATION_IMAGES: Final = 8
_PLOT_SUFFIXES: Final = (".png", ".svg")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What ``promprune-export`` is asked to do.

    Attributes:
        model: folder in Hugging Face format, or hub id; ``None`` is the embedded model.
        output: folder to write; ``None`` derives a name from the model and the ratio.
        ratio: fraction of the visual tokens that is KEPT, in (0, 1]; 1 is the unpruned baseline.
        keep_tokens: visual tokens kept per image; overrides ``ratio``.
        dtype: of the weights and activations in the graphs; the selection computes in fp32 whatever it is.
        image_grids: sizes of images, as (rows, columns) of visual tokens, for families whose images have any size;
            each gets a vision graph. Empty: the family's own choice.
        opset: ONNX operator set of the default domain.
        split_selector: also write the selection as a graph of its own.
        copy_weights: put the weights into files of the package's own; ``False``: link the checkpoint's files, or
            fail; ``None``: link large ones where the file system allows it.
        vision_only: write no language model, for one that runs elsewhere on the kept tokens.
        verify: compare the package with the source model before it appears.
        force: replace ``output`` if it is a package already.
        mu, tau: override the entropy constants of the model (see :class:`SelectionConfig`).
        order: order of the kept tokens.
        policy: what chooses them (see :class:`SelectionConfig`).
        loop: form of the greedy stage: ``"loop"`` with as many trips as the images need, ``"fixed"`` with always T, so
            that nothing depends on the data, ``"unrolled"`` without a loop, some twenty nodes per kept token.

    Raises:
        ConfigError: a value is out of its range.
    """

    model: str | None = None
    output: Path | None = None
    ratio: float = 0.12
    keep_tokens: int | None = None
    dtype: Dtype = "fp32"
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
        grids = self.image_grids
        if any(side < 1 for grid in grids for side in grid) or len(set(grids)) < len(grids):
            raise ConfigError(
                f"received the image grids {', '.join(f'{rows}x{columns}' for rows, columns in grids)}",
                expected="rows and columns of at least 1, and each grid once",
            )
        check_loop(self.loop)
        check_opset(self.opset)
        self.selection({})  # refuses what is out of range

    def selection(self, own: Mapping[str, float]) -> SelectionConfig:
        """Return the settings of the selection: those given here, else the model's, else the paper's.

        Args:
            own: what the model's own folder says of mu, tau and the limits of the split.

        Raises:
            ConfigError: a value is out of its range.
        """
        return SelectionConfig(order=self.order, policy=self.policy, **{**own, **self._given_constants})

    def parameters_from(self, own: Mapping[str, float]) -> str:
        """Say who chose mu and tau: ``"command line"``, ``"model"`` or ``"defaults"``."""
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
    """Return the folder that is written when none is named: ``promprune-<model>-<ratio or T>``, and what is unusual."""
    name = EMBEDDED_MODEL if config.model is None else Path(config.model).resolve().name
    kept = f"{config.ratio:g}" if config.keep_tokens is None else f"{config.keep_tokens}-tokens"
    defaults = ExportConfig
    other = [value for value in ("policy", "loop", "dtype") if getattr(config, value) != getattr(defaults, value)]
    return Path("-".join(["promprune", name, kept, *(getattr(config, value) for value in other)]))


def check_calibration_images(count: int, received: str) -> None:
    """Refuse too few images for a calibration; ``received`` says where the number comes from."""
    if count < _MIN_CALIBRATION_IMAGES:
        raise ConfigError(
            f"received {received}", expected=f"at least {_MIN_CALIBRATION_IMAGES} images; some hundred are better"
        )


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig:
    """What ``promprune-calibrate`` is asked to do.

    Attributes:
        model: folder in Hugging Face format, or hub id; ``None`` is the embedded model.
        images: folder of images such as those to come; ``None``: the embedded model's own calibration scenes.
        limit: most images to look at.
        image_grids: see :class:`ExportConfig`.
        write: write mu and tau into the model's folder.
        plot: file for the histogram, ``.png`` or ``.svg``; ``None``: none.

    Raises:
        ConfigError: a value is out of its range, or contradicts another.
        OutputError: the histogram cannot be written there.
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
                "received no images", expected="a folder of images such as those to come", fix="--images DIR"
            )
        if self.images is not None and not self.images.is_dir():
            raise ConfigError(f"received --images {self.images}, which is no folder", expected="a folder of images")
        if self.write and (self.model is None or not Path(self.model).is_dir()):
            raise ConfigError(
                f"received --write for {self.model or 'the embedded model'}",
                expected="a model in a folder of its own",
                fix="give --mu and --tau to promprune-export instead",
            )
        if self.plot is not None:
            check_output_file(self.plot, "--plot", suffixes=_PLOT_SUFFIXES)
