"""What ``promprune-eval`` is asked to do. Nothing here needs PyTorch: a mistake is answered before that is started."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

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
    """Who is asked what, and what is written.

    Attributes:
        model: folder or hub id of the model that answers in PyTorch; ``None``: packages only.
        packages: folders of those that answer in the runtime.
        data: ``"embedded"``, or a folder of the user's (see :mod:`promprune.export.evaluation.data`).
        ratios: of the model, fractions of the visual tokens that are KEPT; ``None``: ``DEFAULT_RATIOS``.
        policies: of the model, what chooses them; ``None``: ``DEFAULT_POLICIES``, and with the embedded data also
            ``"oracle"`` and ``"none"``.
        runtime: dtypes in which the model is also exported, with all tokens and at the smallest ratio, and asked.
        limit: most images; ``None``: all.
        max_new_tokens: longest answer, in tokens.
        threads: CPU threads of PyTorch; ``None``: all.
        output: folder for tables, figures, answers and numbers; ``None``: none.
        gallery: file for a page of pictures; ``None``: none.
        gallery_limit: most pictures on it.

    Raises:
        ConfigError: a value is out of its range, or contradicts another.
        OutputError: an output cannot be written where it was asked for.
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
        for name in ("limit", "max_new_tokens", "threads", "gallery_limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"received {name} = {value}", expected="at least 1")
        for dtype in self.runtime:
            if dtype not in DTYPES:
                raise ConfigError(f"received runtime = {dtype!r}", expected="one of " + ", ".join(DTYPES))
        if self.model is None:
            self._check_packages_only()
        else:
            check_conditions(self.kept_ratios, self.chosen_policies)
            self._check_oracle()
        self._check_outputs()

    @property
    def kept_ratios(self) -> tuple[float, ...]:
        """The fractions that are kept, as asked for or by default."""
        return DEFAULT_RATIOS if self.ratios is None else self.ratios

    @property
    def chosen_policies(self) -> tuple[str, ...]:
        """The policies, as asked for or by default."""
        if self.policies is not None:
            return self.policies
        return (*DEFAULT_POLICIES, ORACLE, NONE) if self.data == EMBEDDED_DATA else DEFAULT_POLICIES

    @property
    def compares_promprune(self) -> bool:
        """Whether PromPrune is to choose among the model's tokens, which the gallery and the split's figure show."""
        return self.model is not None and "promprune" in self.chosen_policies and min(self.kept_ratios) < 1

    def _check_packages_only(self) -> None:
        if not self.packages:
            raise ConfigError("received neither a model nor a package", expected="at least one of them")
        for name in ("ratios", "policies", "runtime", "threads", "gallery"):
            if getattr(self, name):
                raise ConfigError(
                    f"received {name} with packages only",
                    expected="it with a model: a package is asked as it is",
                    fix="name the model too, or leave it out",
                )

    def _check_oracle(self) -> None:
        if ORACLE in self.chosen_policies and self.data != EMBEDDED_DATA:
            raise ConfigError(
                f"received policy = {ORACLE!r} with the data {self.data}",
                expected="it with --data embedded only: it must know the scene",
            )

    def _check_outputs(self) -> None:
        if self.output is not None:
            check_output_folder(self.output, "-o")
        if self.gallery is None:
            return
        if not self.compares_promprune:
            raise ConfigError(
                "received --gallery", expected="it with promprune among the policies, and a ratio below 1"
            )
        check_output_file(self.gallery, "--gallery", new_folder=self.output)


def check_conditions(ratios: tuple[float, ...], policies: tuple[str, ...]) -> None:
    """Refuse what is no list of ratios or of policies.

    Raises:
        ConfigError: one is empty, or an entry is not one.
    """
    for name, values in (("ratios", ratios), ("policies", policies)):
        if not values:
            raise ConfigError(f"received no {name}", expected="at least one")
    for policy in policies:
        if policy not in CHOICES:
            raise ConfigError(f"received policy = {policy!r}", expected="one of " + ", ".join(CHOICES))
    for ratio in ratios:
        if not 0 < ratio <= 1:
            raise ConfigError(
                f"received ratio = {ratio:g}", expected="fractions above 0 and at most 1: the share that is KEPT"
            )
