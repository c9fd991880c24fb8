"""Settings of ``promprune-eval``. Does not import PyTorch, so that a wrong setting is refused at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from promprune.checks import check_integer, require
from promprune.dtypes import DTYPES, Dtype
from promprune.errors import ConfigError
from promprune.files import check_output_file, check_output_folder
from promprune.method.config import POLICIES
from promprune.package.sources import EMBEDDED_MODEL

__all__ = [
    "ALL",
    "CHOICES",
    "DEFAULT_POLICIES",
    "DEFAULT_RATIOS",
    "EMBEDDED_DATA",
    "NONE",
    "ORACLE",
    "EvalConfig",
    "check_conditions",
]

ALL: Final = "all"
NONE: Final = "none"
ORACLE: Final = "oracle"
CHOICES: Final = (*POLICIES, ORACLE, NONE)
EMBEDDED_DATA: Final = "embedded"
DEFAULT_RATIOS: Final = (0.5, 0.25, 0.12)
DEFAULT_POLICIES: Final = ("promprune", "half", "coverage", "saliency", "random")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Settings of ``promprune-eval``.

    Attributes:
        model: folder or hub id of the model that answers in PyTorch; None for packages only.
        packages: folders of packages that answer in the runtime.
        data: ``"embedded"``, or the user's folder (see :mod:`promprune.export.evaluation.data`).
        ratios: ratios for the model; None for ``DEFAULT_RATIOS``.
        policies: policies for the model; None for ``DEFAULT_POLICIES``, and with the embedded data also ``"oracle"``
            and ``"none"``.
        runtime: dtypes of packages to export from the model and to evaluate, with all tokens and at the smallest ratio.
        limit: largest number of images; None for all.
        max_new_tokens: longest answer, in tokens.
        threads: CPU threads of PyTorch; None for all.
        output: folder for tables, figures, answers and numbers; None to write none.
        gallery: file for a page of pictures; None to write none.
        gallery_limit: largest number of pictures on that page.

    Raises:
        ConfigError: a value is out of its range, or contradicts another.
        OutputError: an output cannot be written to the requested place.
    """

    model: str | None = EMBEDDED_MODEL
    packages: tuple[Path, ...] = ()
    data: str = EMBEDDED_DATA
    ratios: tuple[float, ...] | None = None
    policies: tuple[str, ...] | None = None
    runtime: tuple[Dtype, ...] = ()
    limit: int | None = None
    max_new_tokens: int = 16
    threads: int | None = None
    output: Path | None = None
    gallery: Path | None = None
    gallery_limit: int = 40

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "gallery_limit"):
            check_integer(self, name, least=1)
        for name in ("limit", "threads"):
            check_integer(self, name, least=1, optional=True)
        for dtype in self.runtime:
            require(dtype in DTYPES, "runtime", dtype, "one of " + ", ".join(DTYPES))
        if self.model is None:
            self._check_packages_only()
        else:
            check_conditions(self.kept_ratios, self.chosen_policies)
            self._check_oracle()
        self._check_outputs()

    @property
    def kept_ratios(self) -> tuple[float, ...]:
        """The given ratios, or the default ones."""
        return DEFAULT_RATIOS if self.ratios is None else self.ratios

    @property
    def chosen_policies(self) -> tuple[str, ...]:
        """The given policies, or the default ones."""
        if self.policies is not None:
            return self.policies
        return (*DEFAULT_POLICIES, ORACLE, NONE) if self.data == EMBEDDED_DATA else DEFAULT_POLICIES

    @property
    def compares_promprune(self) -> bool:
        """Whether the evaluation includes PromPrune, which the gallery and the figure of the split show."""
        return self.model is not None and "promprune" in self.chosen_policies and min(self.kept_ratios) < 1

    def _check_packages_only(self) -> None:
        if not self.packages:
            raise ConfigError("received neither a model nor a package", expected="at least one of them")
        for name in ("ratios", "policies", "runtime", "threads", "gallery"):
            if getattr(self, name):
                raise ConfigError(
                    f"received {name} without a model",
                    expected="a model: packages have their own settings",
                    fix="give a model too, or omit the option",
                )

    def _check_oracle(self) -> None:
        if ORACLE in self.chosen_policies and self.data != EMBEDDED_DATA:
            raise ConfigError(
                f"received policy = {ORACLE!r} with the data {self.data}",
                expected="--data embedded: this policy needs to know the objects of a scene",
            )

    def _check_outputs(self) -> None:
        if self.output is not None:
            check_output_folder(self.output, "-o")
        if self.gallery is None:
            return
        if not self.compares_promprune:
            raise ConfigError("received --gallery", expected="promprune among the policies, and a ratio below 1")
        check_output_file(self.gallery, "--gallery", new_folder=self.output)


def check_conditions(ratios: tuple[float, ...], policies: tuple[str, ...]) -> None:
    """Refuse invalid lists of ratios or policies.

    Raises:
        ConfigError: a list is empty, or an entry is not a ratio or policy.
    """
    for name, values in (("ratios", ratios), ("policies", policies)):
        if not values:
            raise ConfigError(f"received no {name}", expected="at least one")
    for policy in policies:
        require(policy in CHOICES, "policy", policy, "one of " + ", ".join(CHOICES))
    for ratio in ratios:
        if not 0 < ratio <= 1:
            raise ConfigError(
                f"received ratio = {ratio:g}",
                expected="fractions above 0 and at most 1: the share of the tokens that is KEPT",
            )
