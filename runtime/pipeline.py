"""From images and a prompt to an answer, with an exported package and without PyTorch.

::

    with VisionLanguagePipeline.from_package("llava-0.12") as pipeline:
        print(pipeline.generate("photo.jpg", "What is on the table?").text)
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Self, TypeAlias, cast

from promprune.checks import config_from_options
from promprune.closing import Closing
from promprune.errors import PackageError
from promprune.package.manifest import DECODER, EMBED_TOKENS
from promprune.package.package import read_package
from promprune.runtime.chat import Chat
from promprune.runtime.engine.cache import CachedPrefix
from promprune.runtime.engine.chat_template import Message
from promprune.runtime.engine.config import GenerationConfig
from promprune.runtime.engine.engine import Engine
from promprune.runtime.engine.language_model import LanguageModel
from promprune.runtime.engine.loading import expect_same_width, open_language_model, same_language_model
from promprune.runtime.engine.prompt import PromptBuilder, as_messages, read_json
from promprune.runtime.engine.request import Request
from promprune.runtime.engine.result import Result, Stopwatch
from promprune.runtime.engine.sampling import eos_token_ids_of
from promprune.runtime.engine.stream import AnswerStream
from promprune.runtime.images.encoded import EncodedImage
from promprune.runtime.images.encoder import ImageEncoder, Images, ImageSource, PreparedImage, as_image_list
from promprune.runtime.sessions import Session
from promprune.runtime.sessions.config import RuntimeConfig
from promprune.runtime.untrusted import UntrustedPipeline

__all__ = ["Prompt", "VisionLanguagePipeline"]

# A text, which comes after the images, or messages with {"type": "image"} parts at the places of the images.
Prompt: TypeAlias = "str | Sequence[Message]"


class VisionLanguagePipeline(Closing):
    """An exported vision-language model, ready to answer. Make one with :meth:`from_package`.

    Thread-safe: every call uses its own engine, and the cache of encoded images is locked. A :class:`Chat` is not
    thread-safe.

    Options are keyword arguments for the fields of :class:`RuntimeConfig` or :class:`GenerationConfig`, where their
    defaults, types and ranges are defined. An unknown name is therefore refused at run time, with a list of the valid
    names, and not by a type checker.

    Attributes:
        manifest: the package's manifest.
        encoder: from images to kept visual tokens.
        prompts: from messages to token ids; holds the tokenizer.
        language_model: from token ids and visual tokens to logits.
        device: device of the graphs: ``"CPU"`` or ``"CUDA"``.
    """

    def __init__(
        self, encoder: ImageEncoder, prompts: PromptBuilder, language_model: LanguageModel, eos: Collection[int]
    ) -> None:
        self.manifest = encoder.manifest
        self.encoder = encoder
        self.prompts = prompts
        self.language_model = language_model
        self.device = language_model.decoder.session.device
        self._eos_token_ids = frozenset(eos)

    @classmethod
    def from_package(cls, path: str | Path, **options: Any) -> Self:
        """Load a package that ``promprune-export`` wrote.

        Args:
            path: its folder.
            options: fields of :class:`RuntimeConfig`. With ``untrusted=True``, an
                :class:`~promprune.runtime.untrusted.UntrustedPipeline` is returned, which has fewer methods.

        Raises:
            PackageError: it is not a package, it is damaged, its graphs differ from its manifest, or its tokenizer or
                chat template cannot be read.
            BackendError: a graph, or the requested provider, cannot be loaded.
            ConfigError: an option is unknown or out of range.
        """
        config = config_from_options(RuntimeConfig, options)
        if config.untrusted:
            return cast("Self", UntrustedPipeline(path, config))
        package = read_package(Path(path), check_weights=config.check_weights)
        folder, manifest = package.folder, package.manifest
        expect_same_width(manifest)
        prompts = PromptBuilder.from_package(folder, manifest)  # before the graphs, which take longer
        eos = eos_token_ids_of(read_json(folder / "generation_config.json"))
        language_model = open_language_model(package, config)
        return cls(ImageEncoder.open(package, config), prompts, language_model, eos)

    def with_vision_of(self, path: str | Path, **options: Any) -> Self:
        """Load another package with the same language model, such as one with another ratio, without a second copy of
        that model.

        Args:
            path: its folder.
            options: fields of :class:`RuntimeConfig`, for its vision encoder.

        Returns:
            A pipeline that shares this one's language model: close neither before both are done.

        Raises:
            PackageError: it has another language model, or is not a valid package.
            BackendError: its vision encoder cannot be loaded.
        """
        config = config_from_options(RuntimeConfig, options)
        package = read_package(Path(path), check_weights=config.check_weights)
        folder, manifest = package.folder, package.manifest
        if not same_language_model(manifest, self.manifest):
            raise PackageError(
                f"{folder} has another language model", expected="the same files as the package that is loaded"
            )
        expect_same_width(manifest)
        prompts = PromptBuilder.from_package(folder, manifest)
        encoder = ImageEncoder.open(package, config)
        return type(self)(encoder, prompts, self.language_model, self._eos_token_ids)

    def generate(self, images: Images = (), prompt: Prompt = "", **options: Any) -> Result:
        """Answer one prompt about any number of images.

        Args:
            images: one image, or a list; in a prompt of messages, one per ``{"type": "image"}`` part, in order.
            prompt: a text, or messages.
            options: fields of :class:`GenerationConfig`; greedy by default.

        Raises:
            ImageError: an image cannot be read.
            PromptError: the prompt is malformed, or does not fit the context; nothing was run.
            ConfigError: an option is unknown or out of range.
            DeadlineError: the answer took longer than ``timeout_s``.
            BackendError: a graph failed, or its outputs are not finite.
            PackageError: the package's tokenizer fails on the prompt, or on the answer.
        """
        return self.generate_batch([(images, prompt)], **options)[0]

    def generate_batch(self, requests: Sequence[tuple[Images, Prompt]], **options: Any) -> list[Result]:
        """Answer several prompts together; each answer is the one that :meth:`generate` would give.

        Args:
            requests: images and prompt of each.
            options: as in :meth:`generate`; they apply to all prompts. So do the errors.
        """
        watch, engine = Stopwatch(), self.engine()
        made = [self.request(images, prompt, watch=watch, **options) for images, prompt in requests]
        for request in made:
            request.watch = watch.copy()
            engine.add(request)
        while engine.has_requests:
            for request, _ in engine.step():
                if request.error is not None:
                    raise request.error
        return [request.result() for request in made]

    def stream(self, images: Images = (), prompt: Prompt = "", **options: Any) -> AnswerStream:
        """Answer one prompt, with the text while it is generated.

        Images and prompt are checked at once; the model runs while the stream is read.

        Args and errors: as in :meth:`generate`.
        """
        engine = self.engine()
        return AnswerStream(engine, engine.add(self.request(images, prompt, **options)))

    def chat(self, system: str | None = None) -> Chat:
        """Begin a conversation, in which every image is encoded and every text is prefilled only once."""
        return Chat(self, system)

    def encode_image(self, image: ImageSource, *, alone: bool = True) -> EncodedImage:
        """Return the kept visual tokens of one image, for later prompts or for a language model that runs elsewhere.

        Args:
            image: the image.
            alone: as in :meth:`ImageEncoder.encode_image`.

        Raises:
            ImageError: it cannot be read.
            BackendError: the vision graph failed, or its outputs are not finite.
        """
        return self.encoder.encode_image(image, alone=alone)

    def engine(
        self,
        *,
        max_batch: int | None = None,
        max_cache_tokens: int | None = None,
        max_prefill_tokens: int | None = None,
    ) -> Engine:
        """Return an engine that answers requests made by :meth:`request`; see :class:`Engine`.

        Raises:
            ConfigError: a limit is below 1.
        """
        return Engine(
            self.language_model,
            self.encoder.encode,
            max_batch=max_batch,
            max_cache_tokens=max_cache_tokens,
            max_prefill_tokens=max_prefill_tokens,
        )

    def request(
        self,
        images: Images = (),
        prompt: Prompt = "",
        *,
        prefix: CachedPrefix | None = None,
        keep_cache: bool = False,
        watch: Stopwatch | None = None,
        **options: Any,
    ) -> Request:
        """Preprocess images and tokenize a prompt, and refuse what cannot be answered, before anything runs.

        Args:
            images, prompt, options: as in :meth:`generate`.
            prefix, keep_cache: see :class:`Request`.
            watch: adds the times to these, if given.

        Raises:
            ImageError, PromptError, ConfigError, DeadlineError, PackageError: as in :meth:`generate`.
        """
        config = config_from_options(GenerationConfig, options)
        watch = watch or Stopwatch()
        with watch.stage("preprocess"):
            preprocessed = self._preprocess(as_image_list(images), watch, config)
        with watch.stage("prompt"):
            placeholders = [image.num_placeholders for image in preprocessed]
            prompt_ids = self.prompts.build(as_messages(prompt, len(preprocessed)), placeholders)
            limit = self.prompts.check_fits(len(prompt_ids), config.max_new_tokens, at_most=config.DEFAULT_NEW_TOKENS)
            watch.check(config.timeout_s)
            return Request(
                prompt_ids=prompt_ids,
                is_image=prompt_ids == self.prompts.image_token_id,
                images=preprocessed,
                config=config,
                tokenizer=self.prompts.tokenizer,
                eos_token_ids=() if config.ignore_eos else self._eos_token_ids,
                max_new_tokens=limit,
                prefix=prefix,
                keep_cache=keep_cache,
                watch=watch,
            )

    def _preprocess(
        self, images: Sequence[ImageSource], watch: Stopwatch, config: GenerationConfig
    ) -> list[PreparedImage]:
        prepared = []
        for image in images:
            watch.check(config.timeout_s)
            prepared.append(self.encoder.preprocess(image, alone=len(images) == 1))
        return prepared

    @property
    def sessions(self) -> dict[str, Session]:
        """The loaded graphs, by name."""
        model = self.language_model
        return {**self.encoder.sessions, EMBED_TOKENS: model.embed, DECODER: model.decoder.session}

    @property
    def notes(self) -> tuple[str, ...]:
        """Which backends, providers and modes were chosen for the graphs, and why no others, in words."""
        return tuple(dict.fromkeys((*self.encoder.notes, *self.language_model.decoder.session.notes)))

    @property
    def cache_bytes_per_token(self) -> int:
        """Memory of the keys and values of one token, in bytes.

        A sequence has at most ``context_length`` tokens. During a step its keys and values are in memory twice, in a
        :class:`Chat` three times.
        """
        return self.language_model.decoder.caches.bytes_per_token

    def close(self) -> None:
        """Free the graphs; using the pipeline afterwards raises a BackendError."""
        self.encoder.close()
        self.language_model.close()
