"""The whole way from images and a prompt to an answer, from an exported package and without PyTorch.

::

    with VisionLanguagePipeline.from_package("llava-0.12") as pipeline:
        print(pipeline.generate("photo.jpg", "What is on the table?").text)
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self, TypeAlias, Unpack

import numpy as np
import numpy.typing as npt

from promprune.errors import BackendError, ConfigError, PackageError
from promprune.package.manifest import DECODER, EMBED_TOKENS, read_manifest
from promprune.runtime.engine.config import DEFAULT_NEW_TOKENS, GenerationConfig, GenerationOptions
from promprune.runtime.engine.decoder import Cache, Decoder
from promprune.runtime.engine.loading import expect_same_width, open_language_model, same_language_model, steps_in_place
from promprune.runtime.engine.prompt import Message, PromptBuilder, TokenIds, as_messages, read_json
from promprune.runtime.engine.result import Result, Stopwatch, Timings
from promprune.runtime.engine.sampling import Row, eos_token_ids_of
from promprune.runtime.images import PreparedImage
from promprune.runtime.images.encoded import EncodedImage
from promprune.runtime.images.encoder import ImageEncoder, ImageSource
from promprune.runtime.images.positions import ImagePositions, PromptPositions, prompt_positions
from promprune.runtime.sessions import Rows, Session, Value
from promprune.runtime.sessions.config import RuntimeConfig, RuntimeOptions

__all__ = ["AnswerStream", "Chat", "Images", "Prompt", "VisionLanguagePipeline"]

# One image, or a list of images.
Images: TypeAlias = "ImageSource | Sequence[ImageSource]"
# A text, which comes after the images, or messages with {"type": "image"} parts where the images are.
Prompt: TypeAlias = "str | Sequence[Message]"


class VisionLanguagePipeline:
    """An exported vision-language model, ready to answer. Make one with :meth:`from_package`.

    Several threads may use one pipeline at once: every call has its own state, and the cache of encoded images
    is locked. A :class:`Chat` belongs to one thread at a time.

    Attributes:
        manifest: what the package says of itself.
        encoder: from pictures to kept visual tokens.
        prompts: from messages to token ids; holds the tokenizer.
        device: where the graphs run: ``"CPU"`` or ``"CUDA"``.
    """

    def __init__(
        self, encoder: ImageEncoder, prompts: PromptBuilder, embed: Session, decoder: Decoder, eos: Collection[int]
    ) -> None:
        self.manifest = encoder.manifest
        self.encoder = encoder
        self.prompts = prompts
        self.device = decoder.device
        self._embed = embed
        self._decoder = decoder
        self._eos_token_ids = frozenset(eos)

    @classmethod
    def from_package(
        cls,
        path: str | Path,
        **options: Unpack[RuntimeOptions],
    ) -> Self:
        """Load a package that ``promprune-export`` wrote.

        Args:
            path: its folder.
            options: see :class:`RuntimeConfig`.

        Raises:
            PackageError: it is no package, damaged, its graphs are not what its manifest says, or its tokenizer or
                chat template cannot be read.
            BackendError: a graph, or the provider that was asked for, cannot be loaded.
            ConfigError: an argument is out of range.
        """
        config = RuntimeConfig(**options)
        folder = Path(path)
        manifest = read_manifest(folder, check_weights=config.check_weights)
        expect_same_width(manifest)
        prompts = PromptBuilder.from_package(folder, manifest)  # before the graphs, which take longer
        eos = eos_token_ids_of(read_json(folder / "generation_config.json"))
        embed, decoder = open_language_model(folder, manifest, config)
        encoder = ImageEncoder.open(folder, manifest, config)
        language_model = Decoder(decoder, config.prefill_chunk, in_place=steps_in_place(folder, decoder))
        return cls(encoder, prompts, embed, language_model, eos)

    def with_vision_of(self, path: str | Path, **options: Unpack[RuntimeOptions]) -> Self:
        """Load another package of the same language model, another ratio of it say, without a second copy of that.

        Args:
            path: its folder.
            options: of its vision encoder; see :class:`RuntimeConfig`.

        Returns:
            A pipeline that holds this one's language model: close one of them only when both are done.

        Raises:
            PackageError: it has another language model, or is no valid package.
            BackendError: its vision encoder cannot be loaded.
        """
        config = RuntimeConfig(**options)
        folder = Path(path)
        manifest = read_manifest(folder, check_weights=config.check_weights)
        if not same_language_model(manifest, self.manifest):
            raise PackageError(
                f"{folder} has another language model", expected="the same files as the package that is loaded"
            )
        expect_same_width(manifest)
        prompts = PromptBuilder.from_package(folder, manifest)
        encoder = ImageEncoder.open(folder, manifest, config)
        return type(self)(encoder, prompts, self._embed, self._decoder, self._eos_token_ids)

    def generate(self, images: Images = (), prompt: Prompt = "", **options: Unpack[GenerationOptions]) -> Result:
        """Answer one prompt about any number of images.

        Args:
            images: one image, or a list; in a prompt of messages, one per ``{"type": "image"}`` part, in order.
            prompt: a text, or messages.
            options: see :class:`GenerationConfig`; greedy unless told otherwise.

        Raises:
            ImageError: an image cannot be read.
            PromptError: the prompt is malformed, or does not fit the context; nothing was run.
            ConfigError: an option is out of range.
            BackendError: a graph failed, or returned something that is not a number.
            PackageError: the package's tokenizer fails on the prompt, or on the answer.
        """
        return self.generate_batch([(images, prompt)], **options)[0]

    def generate_batch(
        self, requests: Sequence[tuple[Images, Prompt]], **options: Unpack[GenerationOptions]
    ) -> list[Result]:
        """Answer several prompts together; each answer is the one that :meth:`generate` would give.

        Args:
            requests: images and prompt of each.
            options, and errors: as in :meth:`generate`; they hold for all prompts.
        """
        if not requests:
            return []
        return _finished(self._answer(self._prepare(requests, GenerationConfig(**options))))

    def stream(self, images: Images = (), prompt: Prompt = "", **options: Unpack[GenerationOptions]) -> AnswerStream:
        """Answer one prompt, giving out the text as it comes.

        Images and prompt are checked at once; the model runs as the stream is read.

        Args and errors: as in :meth:`generate`.
        """
        return AnswerStream(self._answer(self._prepare([(images, prompt)], GenerationConfig(**options))))

    def chat(self, system: str | None = None) -> Chat:
        """Begin a conversation, in which every image and every text is read only once."""
        return Chat(self, system)

    def encode_image(self, image: ImageSource) -> EncodedImage:
        """Return the kept visual tokens of one image, for a language model elsewhere or for later prompts.

        Raises:
            ImageError: it cannot be read.
            BackendError: the vision graph failed, or returned something that is not a number.
        """
        return self.encoder.encode_image(image)

    @property
    def sessions(self) -> dict[str, Session]:
        """The loaded graphs, by name."""
        return {**self.encoder.sessions, EMBED_TOKENS: self._embed, DECODER: self._decoder.session}

    @property
    def notes(self) -> tuple[str, ...]:
        """Why the graphs run where and as they do, in words: what was chosen, and why nothing else was."""
        return tuple(dict.fromkeys((*self.encoder.notes, *self._decoder.notes)))

    @property
    def cache_bytes_per_token(self) -> int:
        """Memory of the keys and values of one token, in bytes.

        ``context_length`` tokens at most are held per row: twice while a step runs, three times in a :class:`Chat`.
        """
        return self._decoder.cache_bytes_per_token

    def close(self) -> None:
        """Free the graphs; using the pipeline afterwards is a BackendError."""
        self.encoder.close()
        self._embed.close()
        self._decoder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _prepare(
        self, requests: Sequence[tuple[Images, Prompt]], config: GenerationConfig, memory: _Memory | None = None
    ) -> _Job:
        """Read images and prompts, and refuse what cannot be answered, before anything runs."""
        watch = Stopwatch()
        with watch.stage("preprocess"):
            images = [[self.encoder.prepare(image) for image in _listed(given)] for given, _ in requests]
        with watch.stage("prompt"):
            prompts = [
                self.prompts.build(as_messages(prompt, len(found)), [self._placeholders(image) for image in found])
                for found, (_, prompt) in zip(images, requests, strict=True)
            ]
            rows = [self._row(prompt, config) for prompt in prompts]
        return _Job(images=images, prompts=prompts, rows=rows, watch=watch, memory=memory or _Memory())

    def _answer(self, job: _Job) -> Generator[list[str], None, list[Result]]:
        """Yield the new text of every row, step by step; return the results."""
        watch, memory = job.watch, job.memory
        with watch.stage("vision"):
            job.encode(self.encoder)
        with watch.stage("splice"):
            reused = memory.reusable(job.prompts)
            embeds, mask = self._spliced(job.prompts, job.encoded, reused)
        with watch.stage("prefill"):
            cache = memory.cache.truncated(reused) if memory.cache else self._decoder.empty_cache(len(job.rows))
            logits, cache = self._decoder.read(embeds, cache, mask, self._positions(job, reused))
            memory.store(job.prompts[0], cache)
        texts = [row.step(logits[i]) for i, row in enumerate(job.rows)]
        watch.mark("first_token")
        yield texts

        running = list(range(len(job.rows)))
        while unfinished := [i for i in running if job.rows[i].finish_reason is None]:
            with watch.stage("decode"):
                cache = cache.of_rows([running.index(i) for i in unfinished])
                running = unfinished
                texts, cache = self._next_token(job, running, cache)
            yield texts
        watch.mark("total")
        return [_result(job, i, reused, cache) for i in range(len(job.rows))]

    def _next_token(self, job: _Job, running: Sequence[int], cache: Cache) -> tuple[list[str], Cache]:
        """Read the last token of every running row and choose the next; return the new text of all rows."""
        tokens = np.array([job.rows[i].token_ids[-1:] for i in running], np.int64)
        logits, cache = self._decoder.read(self._embedded(tokens), cache)
        job.memory.store(np.append(job.memory.ids, tokens[0]), cache)
        texts = [""] * len(job.rows)
        for i, row_logits in zip(running, logits, strict=True):
            texts[i] = job.rows[i].step(row_logits)
        return texts, cache

    def _spliced(
        self, prompts: Sequence[TokenIds], images: Sequence[Sequence[EncodedImage]], reused: int
    ) -> tuple[Value, npt.NDArray[np.int64]]:
        """Return the embeddings of the prompts from position ``reused`` on, with the image features in place.

        Returns:
            ``[batch, longest, hidden]``, shorter prompts padded on the left, and the mask [batch, longest].
        """
        longest = max(len(prompt) for prompt in prompts) - reused
        mask = np.zeros((len(prompts), longest), np.int64)
        parts: list[Rows] = []
        for row, (prompt, encoded) in enumerate(zip(prompts, images, strict=True)):
            new = prompt[reused:]
            begin = (row + 1) * longest - len(new)
            parts.append(Rows(self._embedded(new[None]), 0, len(new), begin))
            places = np.flatnonzero(prompt == self.prompts.image_token_id) - reused
            parts += _feature_rows(encoded, places, begin)
            mask[row, longest - len(new) :] = 1
        shape = (len(prompts), longest, self._decoder.hidden_size)
        return self._decoder.session.joined(shape, self._decoder.embeds_dtype.name, parts), mask

    def _positions(self, job: _Job, reused: int) -> PromptPositions | None:
        """Return the rotary positions of the prompts from position ``reused`` on, where the model has several each."""
        if self._decoder.position_axes == 1:
            return None
        is_image = [prompt == self.prompts.image_token_id for prompt in job.prompts]
        images = [[_placed(image) for image in encoded] for encoded in job.encoded]
        return prompt_positions(is_image, images, begin=reused)

    def _embedded(self, ids: TokenIds) -> Value:
        """Return the embeddings of [batch, sequence] token ids: [batch, sequence, hidden], where they were computed."""
        return self._embed.run_keeping({"input_ids": ids}, keep=["inputs_embeds"])["inputs_embeds"]

    def _placeholders(self, image: EncodedImage | PreparedImage) -> int:
        return len(image.image_features) if isinstance(image, EncodedImage) else image.num_placeholders

    def _row(self, prompt: TokenIds, config: GenerationConfig) -> Row:
        limit = self.prompts.check_fits(len(prompt), config.max_new_tokens, at_most=DEFAULT_NEW_TOKENS)
        return Row(
            self.prompts.tokenizer,
            config,
            prompt_ids=prompt.tolist(),
            eos_token_ids=() if config.ignore_eos else self._eos_token_ids,
            max_new_tokens=limit,
        )


class AnswerStream:
    """The text of one answer as it comes: iterate over it, then ask for the ``result``.

    The pieces, joined, are ``result.text``. Leaving early is fine: the model runs only while it is read.
    """

    def __init__(self, steps: Generator[list[str], None, list[Result]]) -> None:
        self._steps = steps
        self._result: Result | None = None

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        while True:
            try:
                text = next(self._steps)[0]
            except StopIteration as end:
                if end.value is not None:
                    self._result = end.value[0]
                raise
            if text:
                return text

    @property
    def result(self) -> Result:
        """The whole answer; reads the rest of the stream first.

        Raises:
            BackendError: the stream failed, or was closed, before its end.
        """
        for _ in self:
            pass
        if self._result is None:
            raise BackendError("the answer was not finished", fix="ask again")
        return self._result

    def close(self) -> None:
        """Stop generating."""
        self._steps.close()


class Chat:
    """A conversation: what was said and seen before is not read again.

    Keys and values of all turns stay in memory: at most ``context_length`` times
    ``pipeline.cache_bytes_per_token`` bytes. For one thread at a time.

    Args:
        pipeline: that answers.
        system: text of a system message, if the chat template knows such.

    Attributes:
        messages: the finished turns, as messages.
    """

    def __init__(self, pipeline: VisionLanguagePipeline, system: str | None = None) -> None:
        self.messages: list[Message] = [] if system is None else [_message("system", system)]
        self._pipeline = pipeline
        self._images: list[EncodedImage] = []
        self._memory = _Memory()

    def ask(self, prompt: str, images: Images = (), **options: Unpack[GenerationOptions]) -> Result:
        """Say something, with or without further images; return the answer.

        A turn that fails, or is interrupted, leaves the conversation as it was before.

        Args and errors: as in :meth:`VisionLanguagePipeline.generate`.
        """
        return self.stream(prompt, images, **options).result

    def stream(self, prompt: str, images: Images = (), **options: Unpack[GenerationOptions]) -> AnswerStream:
        """Like :meth:`ask`, giving out the text as it comes; the turn counts once the stream was read to its end."""
        added = _listed(images)
        messages = [*self.messages, *as_messages(prompt, len(added))]
        request: tuple[Images, Prompt] = ([*self._images, *added], messages)
        job = self._pipeline._prepare([request], GenerationConfig(**options), copy(self._memory))
        return AnswerStream(self._turn(job, messages))

    def _turn(self, job: _Job, messages: list[Message]) -> Generator[list[str], None, list[Result]]:
        results = yield from self._pipeline._answer(job)
        self.messages = [*messages, _message("assistant", results[0].text.strip())]  # templates space it themselves
        self._images, self._memory = job.encoded[0], job.memory
        return results


@dataclass(eq=False)
class _Memory:
    """What a conversation's keys and values hold."""

    ids: TokenIds = field(default_factory=lambda: np.zeros(0, np.int64))
    cache: Cache | None = None

    def reusable(self, prompts: Sequence[TokenIds]) -> int:
        """Return how many tokens at the beginning of a prompt need not be read again; at least one is left to read.

        Images are only ever appended to the finished turns, so equal placeholders stand for equal images.
        """
        if self.cache is None:
            return 0
        both = min(len(self.ids), len(prompts[0]) - 1)
        different = np.flatnonzero(self.ids[:both] != prompts[0][:both])
        return int(different[0]) if len(different) else both

    def store(self, ids: TokenIds, cache: Cache) -> None:
        """Remember what was read; ``ids`` is that of the first row, the only one of a conversation."""
        self.ids, self.cache = ids, cache


@dataclass(eq=False, kw_only=True)
class _Job:
    """One call: what was asked, and how far it is."""

    images: list[list[EncodedImage | PreparedImage]]
    prompts: list[TokenIds]
    rows: list[Row]
    watch: Stopwatch
    memory: _Memory
    encoded: list[list[EncodedImage]] = field(default_factory=list)
    encoded_now: int = 0  # images that the vision encoder had to run for

    def encode(self, encoder: ImageEncoder) -> None:
        """Fill ``encoded``, image by image: a batch could round differently, and keep other tokens."""
        pairs = [[encoder.encode(image) for image in images] for images in self.images]
        self.encoded = [[image for image, _ in row] for row in pairs]
        self.encoded_now = sum(ran for row in pairs for _, ran in row)


def _listed(images: Images) -> list[ImageSource]:
    return list(images) if isinstance(images, (list, tuple)) else [images]  # type: ignore[list-item]


def _feature_rows(images: Sequence[EncodedImage], places: npt.NDArray[np.int64], begin: int) -> Iterator[Rows]:
    """Yield the features of some images, stretch by stretch, at the places of their placeholders.

    Args:
        images: of one prompt.
        places: of all their placeholders; below 0 what was read before.
        begin: the row of place 0.
    """
    done = 0
    for image in images:
        own = places[done : done + len(image.image_features)]
        done += len(own)
        source = image.image_features if image.on_device is None else image.on_device
        for stretch in np.split(np.arange(len(own)), np.flatnonzero(np.diff(own) != 1) + 1):
            new = stretch[own[stretch] >= 0]
            if len(new):
                yield Rows(source, int(new[0]), len(new), begin + int(own[new[0]]))


def _placed(image: EncodedImage) -> ImagePositions:
    if image.positions is None:
        raise ConfigError(
            "received an encoded image without the positions of its tokens",
            expected="one with positions: this model gives every token three",
            fix="encode it with this package",
        )
    return image.positions


def _message(role: str, text: str) -> Message:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def _finished(steps: Generator[list[str], None, list[Result]]) -> list[Result]:
    while True:
        try:
            next(steps)
        except StopIteration as end:
            results: list[Result] = end.value
            return results


def _result(job: _Job, row: int, reused: int, cache: Cache) -> Result:
    watch, answer = job.watch, job.rows[row]
    timings = Timings(
        preprocess_ms=watch["preprocess"],
        prompt_ms=watch["prompt"],
        vision_ms=watch["vision"],
        splice_ms=watch["splice"],
        prefill_ms=watch["prefill"],
        decode_ms=watch["decode"],
        first_token_ms=watch["first_token"],
        total_ms=watch["total"],
        prompt_tokens=max(len(prompt) for prompt in job.prompts),
        reused_tokens=reused,
        new_tokens=len(answer.token_ids),
        encoded_images=job.encoded_now,
        kv_cache_bytes=cache.nbytes,
    )
    return Result(
        text=answer.text,
        token_ids=tuple(answer.token_ids),
        finish_reason=answer.finish_reason or "length",
        timings=timings,
        selection=tuple(image.selection for image in job.encoded[row]),
    )
