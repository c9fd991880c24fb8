"""Settings of a benchmark; the command line takes its defaults from here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, get_args

from promprune.errors import ConfigError
from promprune.runtime.sessions.config import RuntimeConfig

__all__ = ["BASELINES", "Baseline", "BenchConfig"]

Baseline = Literal["hf", "authors"]
BASELINES: Final = get_args(Baseline)  # of PyTorch; selection policies are packages like any other


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What ``promprune-bench`` is asked to do.

    Attributes:
        packages: folders by the names they have in the report.
        image: file; ``None``: a rendered scene.
        prompt: text after the image.
        new_tokens: length of every answer.
        rounds: measured ones; every contender is run once in each, under every load.
        warmup: rounds before, not counted.
        batches: prompts answered together; one load each. With ``openvino``, 1 is one of them.
        concurrencies: calls at the same time; one load each, PyTorch excepted.
        cold_starts: processes started per contender, after one that is not counted; 0: none, and no peak memory.
        baselines: ``"hf"``: Hugging Face in PyTorch, unpruned; ``"authors"``: with their selection, at every T.
        model: folder or hub id of the baselines' model.
        openvino: folder of the model as OpenVINO GenAI runs it, at the ratios of the packages; ``None``: not measured.
        runtime: backend, provider and threads.
        command: as it was typed, for the record.

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
            raise ConfigError("received no package", expected="at least one", fix="name packages, or --model")
        for name, least in (("new_tokens", 1), ("rounds", 1), ("warmup", 1), ("cold_starts", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"received {name} = {getattr(self, name)}", expected=f"at least {least}")
        for name in ("batches", "concurrencies"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise ConfigError(f"received {name} = {getattr(self, name)}", expected="numbers of at least 1")
        for baseline in self.baselines:
            if baseline not in BASELINES:
                raise ConfigError(f"received baseline {baseline!r}", expected=f"one of {', '.join(BASELINES)}")
        if self.image is not None and not self.image.is_file():
            raise ConfigError(f"received image {self.image}, which is no file", expected="an image file")
        if self.openvino is not None and not self.openvino.is_dir():
            raise ConfigError(f"received peer {self.openvino}, which is no folder", expected="a converted model")
        if self.openvino is not None and 1 not in self.batches:
            raise ConfigError(
                f"received batches = {self.batches} and a peer, which answers one prompt at a time",
                expected="1 among the batches",
                fix="leave out the peer, or add 1 to --batch",
            )
