"""Baselines in PyTorch: Hugging Face ``generate`` as it is, and with the authors' selection in eager PyTorch inside.

Needs the ``[export]`` extra. Both share one copy of the model.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from PIL import Image
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from promprune.bench.authors_method import AuthorsSelection, authors_select
from promprune.bench.contenders import Facts, Measurable, Question, Sample
from promprune.errors import ConfigError, ModelError

__all__ = ["PytorchContender", "PytorchModel", "PytorchSettings", "first_token"]

_DTYPES: Final = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FAMILY: Final = "llava"  # the one whose parts are known here


@dataclass(frozen=True, kw_only=True)
class PytorchSettings:
    """How a model runs in PyTorch.

    Attributes:
        model: folder in Hugging Face format, or hub id.
        dtype: ``"fp32"``, ``"fp16"`` or ``"bf16"``.
        device: ``"cpu"`` or ``"cuda"``.
        threads: of the CPU.
        keep_tokens: T of the authors' method; ``None``: unpruned.
        mu, tau: of the authors' method.
    """

    model: str
    dtype: str
    device: str
    threads: int
    keep_tokens: int | None = None
    mu: float = 0.42
    tau: float = 0.02


class PytorchModel:
    """A model and its processor, shared by the contenders that run it.

    Raises:
        ModelError: it cannot be loaded.
        ConfigError: it is of a family whose parts are not known here.
    """

    def __init__(self, settings: PytorchSettings) -> None:
        self.settings = settings
        torch.set_num_threads(settings.threads)
        transformers.utils.logging.disable_progress_bar()
        try:
            self.processor = transformers.AutoProcessor.from_pretrained(settings.model)
            self.model: Any = transformers.AutoModelForImageTextToText.from_pretrained(
                settings.model, dtype=_DTYPES[settings.dtype], attn_implementation="sdpa"
            )
        except (OSError, ValueError, KeyError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ModelError(f"{settings.model} cannot be loaded in PyTorch ({first[:200]})") from error
        if self.model.config.model_type != FAMILY:
            raise ConfigError(
                f"{settings.model} is a {self.model.config.model_type!r} model", expected=f"{FAMILY!r} for --baseline"
            )
        self.model.eval().to(settings.device)
        self.model.generation_config.eos_token_id = None  # every answer has the length that was asked for
        grid = self.model.config.vision_config.image_size // self.model.config.vision_config.patch_size
        self.num_tokens = grid * grid


class PytorchContender(Measurable):
    """``generate`` of Hugging Face, with stages timed where its parts begin and end.

    With ``keep_tokens``, the prompt has T placeholders per image and the image features are pruned before they enter
    it; the attention that the selection reads makes the whole vision tower run in eager attention, as the authors'
    code does.
    """

    concurrent = False

    def __init__(self, name: str, shared: PytorchModel, settings: PytorchSettings) -> None:
        self.name = name
        self._shared = shared
        self._settings = settings
        self._model = shared.model
        self._selected: AuthorsSelection | None = None
        self._prompt_tokens = 0

    def run(self, question: Question, batch: int) -> Sample:
        """Answer; see :class:`Measurable`. One call at a time: the parts of the shared model are timed from outside."""
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
        return Sample(
            stages_ms=clock.stages(question.new_tokens), token_ids=tuple(answer[0, self._prompt_tokens :].tolist())
        )

    def facts(self, question: Question) -> Facts:
        """Say what it is; the work up to the first token is counted by PyTorch."""
        settings, text = self._settings, self._model.config.text_config
        keep, n = settings.keep_tokens, self._shared.num_tokens
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        per_token = 2 * text.num_hidden_layers * text.num_key_value_heads * head_dim
        return Facts(
            name=self.name,
            kind="hugging_face" if keep is None else "authors",
            path=settings.model,
            model=settings.model,
            dtype=settings.dtype,
            device="CUDA" if settings.device == "cuda" else "CPU",
            num_tokens=n,
            keep_tokens=n if keep is None else keep,
            policy="all" if keep is None else "promprune",
            saliency_count=self._selected.counts[0] if self._selected else None,
            prompt_tokens=self._prompt_tokens,
            kv_cache_bytes=per_token
            * _DTYPES[settings.dtype].itemsize
            * (self._prompt_tokens + question.new_tokens - 1),
            first_token_flops=self._count_flops(question),
        )

    def close(self) -> None:
        """Nothing to do: the model is freed with its last contender."""

    def _inputs(self, pictures: list[Image.Image], prompt: str) -> Any:
        processor, settings = self._shared.processor, self._settings
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}
        text = processor.apply_chat_template([message], add_generation_prompt=True)
        if settings.keep_tokens is None:
            inputs = processor(images=pictures, text=[text] * len(pictures), return_tensors="pt")
        else:
            text = text.replace(processor.image_token, processor.image_token * settings.keep_tokens)
            inputs = processor.tokenizer([text] * len(pictures), return_tensors="pt")
            inputs["pixel_values"] = processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
        inputs["pixel_values"] = inputs["pixel_values"].to(_DTYPES[settings.dtype])
        return {name: inputs[name].to(settings.device) for name in ("input_ids", "attention_mask", "pixel_values")}

    @contextlib.contextmanager
    def _timed(self, clock: _Clock) -> Iterator[None]:
        """Let the clock see the vision encoder and the language model, and put the selection between them."""
        inner, original = self._model.model, self._model.model.get_image_features
        tower = inner.vision_tower
        eager = self._settings.keep_tokens is not None
        inner.get_image_features = self._features(original, clock)
        hook = inner.language_model.register_forward_pre_hook(lambda *_: clock.mark("spliced", first=True))
        if eager:
            tower.set_attn_implementation("eager")
        try:
            yield
        finally:
            hook.remove()
            del inner.get_image_features
            tower.set_attn_implementation("sdpa")

    def _features(self, original: Callable[..., Any], clock: _Clock) -> Callable[..., Any]:
        keep = self._settings.keep_tokens

        def features(pixel_values: Tensor, **options: Any) -> Any:
            clock.mark("vision begins")
            if keep is None:
                outputs = original(pixel_values, **options)
                clock.mark("encoded")
                return outputs
            outputs = original(pixel_values, **{**options, "output_attentions": True})
            clock.mark("encoded")
            kept = self._select(torch.stack(list(outputs.pooler_output)), outputs.attentions, keep)
            outputs.pooler_output = list(kept)
            clock.mark("selected")
            return outputs

        return features

    def _select(self, features: Tensor, attentions: tuple[Tensor, ...], keep: int) -> Tensor:
        layer = self._model.config.vision_feature_layer  # hidden_states[k] is the output of layer k - 1
        saliency = attentions[layer if layer < 0 else layer - 1][:, :, 0, 1:].float().mean(dim=1)
        self._selected = authors_select(features, saliency, keep, mu=self._settings.mu, tau=self._settings.tau)
        return self._selected.features

    def _count_flops(self, question: Question) -> int:
        counter = FlopCounterMode(display=False)
        with counter, sdpa_kernel(SDPBackend.MATH):  # the CPU's fused attention is not counted
            self.run(replace(question, new_tokens=1), 1)
        return int(counter.get_total_flops())


class _Clock:
    """Points in time, each after the device has finished."""

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"
        self._marks: dict[str, float] = {}
        self.mark("begin")

    def mark(self, name: str, *, first: bool = False) -> None:
        """Remember the time; with ``first``, only the first time."""
        if first and name in self._marks:
            return
        if self._cuda:
            torch.cuda.synchronize()
        self._marks[name] = time.perf_counter()

    def stages(self, new_tokens: int) -> Mapping[str, float]:
        """Return the stages, in milliseconds."""

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
    """Marks when the first token is there: ``generate`` first gives out the prompt, then token by token."""

    def __init__(self, clock: _Clock) -> None:
        self._clock = clock
        self._calls = 0

    def put(self, value: Tensor) -> None:
        """Take the prompt, or the next token of every row."""
        self._calls += 1
        if self._calls == 2:
            self._clock.mark("first token")

    def end(self) -> None:
        """Take the end of the answer."""


def first_token(settings: PytorchSettings, image: str, prompt: str) -> None:
    """Load a model and answer with one token."""
    contender = PytorchContender("cold start", PytorchModel(settings), settings)
    contender.run(Question(image=Path(image), prompt=prompt, new_tokens=1), 1)
