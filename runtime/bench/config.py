"""Settings of a benchmark; the command line takes its defaults from here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, get_args

from promprune.checks import check_integer, require
from promprune.errors import ConfigError
from promprune.runtime.sessions.config import RuntimeConfig

__all__ = ["BASELINES", "Baseline", "BenchConfig"]

Baseline = Literal["hf", "authors"]
BASELINES: Final = get_args(Baseline)  # baselines in PyTorch; other selection policies are measured as packages


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Settings of ``promprune-bench``.

    Attributes:
        packages: name in the report -> folder.
        image: image file; None for a rendered scene.
        prompt: text after the image.
        new_tokens: length of every answer, in tokens.
        rounds: measured rounds; every contender runs once per round, under every load.
        warmup: rounds before the measured ones.
        batches: batch sizes; one load each. With ``openvino``, one of them must be 1.
        concurrencies: numbers of concurrent calls; one load each, except for baselines in PyTorch.
        cold_starts: processes started per contender, after one that is not counted; 0 for none, and no peak memory.
        baselines: ``"hf"`` (Hugging Face in PyTorch, unpruned) and ``"authors"`` (with their selection, for every T).
        model: folder or hub id of the model for the baselines.
        openvino: folder of the model converted for OpenVINO GenAI, to measure at the ratios of the packages; None to
            skip it.
        runtime: backend, provider and threads.
        command: the command line, for the report.

    Raises:
        ConfigError: a value is out of its range.
    """

    packages: Mapping[str, Path]
    image: Path | None = None
    prompt: str = "What is in the picture?"
    new_tokens: int = 16
    rounds: int = 10
    warmup: int = 1
    batches: tuple[int, ...] = (1,)
    concurrencies: tuple[int, ...] = (1,)
    cold_starts: int = 3
    baselines: tuple[Baseline, ...] = ()
    model: str | None = None
    openvino: Path | None = None
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    command: str = ""

    def __post_init__(self) -> None:
        if not self.packages:
            raise ConfigError("received no package", expected="at least one", fix="give packages, or --model")
        for name, least in (("new_tokens", 1), ("rounds", 1), ("warmup", 1), ("cold_starts", 0)):
            check_integer(self, name, least=least)
        for name in ("batches", "concurrencies"):
            counts = getattr(self, name)
            require(min(counts, default=0) >= 1, name, counts, "numbers of at least 1")
        if self.image is not None and not self.image.is_file():
            raise ConfigError(f"received image {self.image}, which is not a file", expected="an image file")
        if self.openvino is not None and not self.openvino.is_dir():
            raise ConfigError(f"received peer {self.openvino}, which is not a folder", expected="a converted model")
        if self.openvino is not None and 1 not in self.batches:
            raise ConfigError(
                f"received batches = {self.batches} and a peer, which answers one prompt at a time",
                expected="1 among the batches",
                fix="omit --peer, or add 1 to --batch",
            )
