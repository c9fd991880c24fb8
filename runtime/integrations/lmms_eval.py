"""A package as a model of lmms-eval, for the tasks of the harness::

    lmms_eval --model promprune --model_args package=llava-0.12 --tasks gqa,pope

lmms-eval finds it through the entry point ``lmms_eval.models``. It needs ``pip install lmms-eval``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, Final, NoReturn, TypeAlias

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from loguru import logger
from tqdm import tqdm

from promprune.errors import ConfigError
from promprune.runtime.engine.result import Result
from promprune.runtime.images.encoder import Images
from promprune.runtime.integrations.harness import UNDERSTOOD, generation_options, images_and_messages
from promprune.runtime.pipeline import Prompt, VisionLanguagePipeline

__all__ = ["MANIFEST", "PromPrune"]

MANIFEST: Final = ModelManifest(model_id="promprune", chat_class_path=f"{__name__}.PromPrune")

_Request: TypeAlias = "tuple[Images, Prompt]"
_Options: TypeAlias = Mapping[str, Any]


class PromPrune(lmms):  # type: ignore[misc]  # untyped
    """A package with lmms-eval's interface.

    Args:
        package: its folder.
        batch_size: number of requests per batch.
        device: ``"cpu"`` or ``"cuda"``; None for the provider in ``options``.
        options: see :class:`promprune.runtime.RuntimeConfig`.

    Raises:
        ConfigError: an argument is out of range.
        PackageError: it is not a package.
    """

    is_simple = False  # requests are messages, not a text and images

    def __init__(self, package: str, batch_size: int | str = 1, device: str | None = None, **options: Any) -> None:
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ConfigError(f"received batch_size = {batch_size!r}", expected="1 or more")
        if device is not None:
            options["provider"] = "cpu" if device == "cpu" else "cuda"
        self.batch_size = int(batch_size)
        self.pipeline = VisionLanguagePipeline.from_package(package, **options)

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answer every request; requests with equal options are answered ``batch_size`` at a time."""
        _warn_of_ignored_options([request.args[2] for request in requests])
        results: list[Result] = []
        with tqdm(total=len(requests), desc="Model Responding") as progress:
            for given, alike in groupby(requests, key=lambda request: request.args[2]):
                asked = [(request.args[1], self._document(request)) for request in alike]
                for start in range(0, len(asked), self.batch_size):
                    part = asked[start : start + self.batch_size]
                    chats = [images_and_messages(doc_to_messages(document)) for doc_to_messages, document in part]
                    results += self._answers(chats, given)
                    progress.update(len(part))
        return [
            GenerationResult(result.text.strip(), TokenCounts(output_tokens=result.timings.new_tokens))
            for result in results
        ]

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[list[str]]:
        """Answer requests whose next question depends on the last answer; each round is a new chat."""
        _warn_of_ignored_options([request.args[2] for request in requests])
        return [self._rounds(request) for request in tqdm(requests, desc="Model Responding")]

    def loglikelihood(self, requests: Sequence[Instance]) -> NoReturn:
        """Refuse: the runtime generates answers, but does not compute the likelihood of given texts.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            f"task {requests[0].task_name!r} compares the likelihoods of given answers",
            expected="a task that lets the model answer (output_type: generate_until)",
        )

    def clean(self) -> None:
        """Free the graphs after lmms-eval has all answers."""
        self.pipeline.close()
        super().clean()

    def _rounds(self, request: Instance) -> list[str]:
        document, doc_to_messages, given = self._document(request), request.args[1], request.args[2]
        chat, over, about = doc_to_messages(document), False, None
        answers: list[str] = []
        while not over:
            answers.append(self._answers([images_and_messages(chat)], given)[0].text.strip())
            chat, over, _, about = doc_to_messages(
                document, round_idx=len(answers), previous_output=list(answers), previous_round_info=about
            )
        return answers

    def _answers(self, chats: Sequence[_Request], given: _Options) -> list[Result]:
        return self.pipeline.generate_batch(chats, **generation_options(given))

    def _document(self, request: Instance) -> Any:
        _, _, _, number, task, split = request.args
        return self.task_dict[task][split][number]


def _warn_of_ignored_options(given: Sequence[_Options]) -> None:
    ignored = {name for options in given for name in options} - UNDERSTOOD
    if ignored:
        logger.warning(f"promprune ignores these options of the task: {', '.join(sorted(ignored))}")
