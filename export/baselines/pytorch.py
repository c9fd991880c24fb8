"""Baselines in PyTorch: Hugging Face ``generate``, unchanged or with the authors' selection in eager PyTorch.

Needs the ``[export]`` extra. Both share one copy of the model.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from PIL import Image
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from promprune.errors import BackendError, ConfigError
from promprune.export.baselines.authors_method import AuthorsSelection, authors_select
from promprune.export.checkpoint.loading import (
    ImageTextProcessor,
    family_of,
    load_checkpoint,
    load_model,
    load_processor,
    resolve,
)
from promprune.export.checkpoint.prompts import prompt_text
from promprune.export.checkpoint.weights import torch_dtype
from promprune.method.config import SelectionConfig
from promprune.package.manifest import Manifest
from promprune.runtime.bench.contenders import Facts, Measurable, Question, Sample

__all__ = ["PytorchContender", "PytorchModel", "PytorchSettings", "check_weights", "first_token", "torch_device"]

AUTHORS_FAMILY: Final = "llava"  # the only family that the authors' method is implemented for


@dataclass(frozen=True, kw_only=True)
class PytorchSettings:
    """How a model runs in PyTorch.

    Attributes:
        model: folder in Hugging Face format, or hub id.
        dtype: ``"fp32"``, ``"fp16"`` or ``"bf16"``.
        device: ``"cpu"`` or ``"cuda"``.
        threads: number of CPU threads.
        source: name of the model in the report; None for ``model``.
        keep_tokens: T of the authors' method; None for the unpruned model.
        selection: of the authors' method; only its mu and tau count.
    """

    model: str
    dtype: str
    device: str
    threads: int
    source: str | None = None
    keep_tokens: int | None = None
    selection: SelectionConfig = field(default_factory=SelectionConfig)


class PytorchModel:
    """A model and its processor, shared by the contenders that run it.

    Raises:
        ModelError: the model cannot be loaded.
        UnsupportedModelError: its family is not supported.
    """

    def __init__(self, settings: PytorchSettings) -> None:
        self.settings = settings
        torch.set_num_threads(settings.threads)
        folder, _ = resolve(settings.model)
        self.processor = load_processor(folder)
        self.model: Any = load_model(folder, family_of(folder), dtype=torch_dtype(settings.dtype))
        self.model.to(settings.device)
        # Greedy decoding without an end of sequence: every answer has the requested length.
        pad = self.model.generation_config.pad_token_id
        self.model.generation_config = transformers.GenerationConfig(
            do_sample=False, pad_token_id=0 if pad is None else pad
        )

    @property
    def image_token_id(self) -> int:
        """The placeholder of a visual token."""
        token: int = self.model.config.image_token_id
        return token

    def unpruned_inputs(self, pictures: list[Image.Image], prompt: str) -> dict[str, Tensor]:
        """Return the inputs of ``generate``: one prompt per picture, with a placeholder for each visual token."""
        text = self.render(prompt)
        if not isinstance(self.processor, ImageTextProcessor):
            return dict(self.processor(images=pictures, text=[text] * len(pictures), return_tensors="pt"))
        images = self.processor.image_processor(images=pictures, return_tensors="pt")
        merged = self.processor.image_processor.merge_size**2
        token = self.processor.tokenizer.convert_ids_to_tokens(self.image_token_id)
        counts = (images["image_grid_thw"].prod(dim=1) // merged).tolist()
        words = self.processor.tokenizer([text.replace(token, token * n) for n in counts], return_tensors="pt")
        types = (words["input_ids"] == self.image_token_id).int()
        return {**words, **images, "mm_token_type_ids": types}

    def render(self, prompt: str) -> str:
        """Return the text of a prompt with one image, before its placeholder is repeated."""
        return prompt_text(self.processor, self.image_token_id, prompt)


class PytorchContender(Measurable):
    """``generate`` of Hugging Face, with a clock at the start and end of its stages.

    With ``keep_tokens``, the prompt has T placeholders per image, and the image features are pruned before the splice.
    The selection needs attention weights, so the entire vision tower runs with eager attention, as in the authors'
    code.
    """

    concurrent = False

    def __init__(self, name: str, shared: PytorchModel, settings: PytorchSettings) -> None:
        kind = shared.model.config.model_type
        if settings.keep_tokens is not None and kind != AUTHORS_FAMILY:
            raise ConfigError(
                f"received --baseline authors for {settings.model}, a {kind!r} model",
                expected=f"a {AUTHORS_FAMILY!r} model",
                fix="use --baseline hf",
            )
        self.name = name
        self._shared = shared
        self._settings = settings
        self._model = shared.model
        self._selected: AuthorsSelection | None = None
        self._prompt_tokens = self._num_tokens = 0

    def run(self, question: Question, batch: int) -> Sample:
        """Answer; see :class:`Measurable`. Not thread-safe: it temporarily replaces methods of the shared model."""
        clock = _Clock(self._settings.device)
        with Image.open(question.image) as picture:
            inputs = self._inputs([picture.convert("RGB")] * batch, question.prompt)
        clock.mark("prepared")
        with torch.no_grad(), self._timed(clock):
            answer = self._model.generate(
                **inputs, max_new_tokens=question.new_tokens, do_sample=False, streamer=_FirstToken(clock)
            )
        clock.mark("end")
        self._prompt_tokens = inputs["input_ids"].shape[1]
        self._num_tokens = int((inputs["input_ids"][0] == self._shared.image_token_id).sum())
        return Sample(
            stages_ms=clock.stages(question.new_tokens), token_ids=tuple(answer[0, self._prompt_tokens :].tolist())
        )

    def facts(self, question: Question) -> Facts:
        """Return its facts; PyTorch counts the FLOPs up to the first token."""
        settings, text = self._settings, self._model.config.text_config
        keep = settings.keep_tokens
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        per_token = 2 * text.num_hidden_layers * text.num_key_value_heads * head_dim
        return Facts(
            name=self.name,
            kind="hugging_face" if keep is None else "authors",
            path=settings.model,
            model=settings.source or settings.model,
            dtype=settings.dtype,
            device="CUDA" if settings.device == "cuda" else "CPU",
            num_tokens=self._num_tokens if self._selected is None else self._selected.num_tokens,
            keep_tokens=self._num_tokens,
            policy="all" if keep is None else "promprune",
            saliency_count=self._selected.counts[0] if self._selected else None,
            prompt_tokens=self._prompt_tokens,
            kv_cache_bytes=per_token
            * torch_dtype(settings.dtype).itemsize
            * (self._prompt_tokens + question.new_tokens - 1),
            first_token_flops=self._count_flops(question),
        )

    def close(self) -> None:
        """Do nothing: the model is freed with its last contender."""

    def _inputs(self, pictures: list[Image.Image], prompt: str) -> dict[str, Tensor]:
        shared, keep = self._shared, self._settings.keep_tokens
        if keep is None:
            inputs = shared.unpruned_inputs(pictures, prompt)
        else:
            token = shared.processor.tokenizer.convert_ids_to_tokens(shared.image_token_id)
            text = shared.render(prompt).replace(token, token * keep)
            inputs = dict(shared.processor.tokenizer([text] * len(pictures), return_tensors="pt"))
            inputs["pixel_values"] = shared.processor.image_processor(images=pictures, return_tensors="pt").pixel_values
        inputs["pixel_values"] = inputs["pixel_values"].to(torch_dtype(self._settings.dtype))
        return {name: value.to(self._settings.device) for name, value in inputs.items()}

    @contextlib.contextmanager
    def _timed(self, clock: _Clock) -> Iterator[None]:
        """Run with the clock around the vision encoder and the language model, and the selection between them."""
        inner, original = self._model.model, self._model.model.get_image_features
        eager = inner.vision_tower if self._settings.keep_tokens is not None else None
        inner.get_image_features = self._features(original, clock)
        hook = inner.language_model.register_forward_pre_hook(lambda *_: clock.mark("spliced", first=True))
        if eager is not None:
            eager.set_attn_implementation("eager")
        try:
            yield
        finally:
            hook.remove()
            del inner.get_image_features
            if eager is not None:
                eager.set_attn_implementation("sdpa")

    def _features(self, original: Callable[..., Any], clock: _Clock) -> Callable[..., Any]:
        keep = self._settings.keep_tokens

        @functools.wraps(original)  # transformers inspects the parameter names
        def features(*args: Any, **options: Any) -> Any:
            clock.mark("vision begins")
            if keep is None:
                outputs = original(*args, **options)
                clock.mark("encoded")
                return outputs
            outputs = original(*args, **{**options, "output_attentions": True})
            clock.mark("encoded")
            kept = self._select(torch.stack(list(outputs.pooler_output)), outputs.attentions, keep)
            outputs.pooler_output = list(kept)
            clock.mark("selected")
            return outputs

        return features

    def _select(self, features: Tensor, attentions: tuple[Tensor, ...], keep: int) -> Tensor:
        layer = self._model.config.vision_feature_layer  # hidden_states[k] is the output of layer k - 1
        saliency = attentions[layer if layer < 0 else layer - 1][:, :, 0, 1:].float().mean(dim=1)
        selection = self._settings.selection
        self._selected = authors_select(features, saliency, keep, mu=selection.mu, tau=selection.tau)
        return self._selected.features

    def _count_flops(self, question: Question) -> int:
        counter = FlopCounterMode(display=False)
        with counter, sdpa_kernel(SDPBackend.MATH):  # the CPU's fused attention is not counted
            self.run(replace(question, new_tokens=1), 1)
        return int(counter.get_total_flops())


class _Clock:
    """Records points in time, each after the device has finished."""

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"
        self._marks: dict[str, float] = {}
        self.mark("begin")

    def mark(self, name: str, *, first: bool = False) -> None:
        """Record the time; with ``first``, keep an earlier record of the same name."""
        if first and name in self._marks:
            return
        if self._cuda:
            torch.cuda.synchronize()
        self._marks[name] = time.perf_counter()

    def stages(self, new_tokens: int) -> Mapping[str, float]:
        """Return the duration of each stage, in milliseconds."""

        def between(start: str, end: str) -> float:
            return (self._marks[end] - self._marks[start]) * 1000

        features = "selected" if "selected" in self._marks else "encoded"
        stages = {
            "preprocess": between("begin", "prepared"),
            "vision": between("vision begins", "encoded"),
            "splice": between("prepared", "vision begins") + between(features, "spliced"),
            "prefill": between("spliced", "first token"),
            "first_token": between("begin", "first token"),
            "total": between("begin", "end"),
        }
        if features == "selected":
            stages["selection"] = between("encoded", "selected")
        if new_tokens > 1:
            stages["decode"] = between("first token", "end") / (new_tokens - 1)
        return stages


class _FirstToken(transformers.generation.streamers.BaseStreamer):
    """Records the time of the first token: ``generate`` passes the prompt to a streamer, then token by token."""

    def __init__(self, clock: _Clock) -> None:
        self._clock = clock
        self._calls = 0

    def put(self, value: Tensor) -> None:
        """Receive the prompt, or the next token of every batch row."""
        self._calls += 1
        if self._calls == 2:
            self._clock.mark("first token")

    def end(self) -> None:
        """Receive the end of the answer."""


def check_weights(model: str, manifests: Mapping[str, Manifest]) -> None:
    """Refuse a model if a package was exported from other weights.

    Raises:
        ConfigError: the digest of its weights differs from that in a manifest.
        ModelError: the model cannot be loaded.
    """
    digest = load_checkpoint(model).source.weights_sha256
    for name, manifest in manifests.items():
        made_from = manifest.source
        if made_from.weights_sha256 != digest:
            raise ConfigError(
                f"received a baseline of {model}, whose weights have the digest {digest[:12]}, and the package {name}, "
                f"made from {made_from.model} with the digest {made_from.weights_sha256[:12]}",
                expected="packages and baselines of the same model",
                fix="pass the model of the packages with --model, or export the packages again",
            )


def torch_device(device: str) -> str:
    """Return PyTorch's name for the device that the packages run on, ``"CPU"`` or ``"CUDA"``.

    Raises:
        BackendError: this PyTorch cannot use the device.
    """
    if device == "CUDA" and not torch.cuda.is_available():
        raise BackendError(
            f"the packages run on CUDA, which PyTorch {torch.__version__} cannot use for the baselines",
            expected="a PyTorch built for this machine's CUDA",
            fix="use --provider cpu, or omit --baseline",
        )
    return device.lower()


def first_token(settings: PytorchSettings, image: str, prompt: str) -> None:
    """Load a model and answer with one token."""
    contender = PytorchContender("cold start", PytorchModel(settings), settings)
    contender.run(Question(image=Path(image), prompt=prompt, new_tokens=1), 1)
