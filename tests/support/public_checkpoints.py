"""Small random checkpoints with the structure of public ones: what is unusual about them, not their size.

The facts are those of the published ``config.json``, preprocessing and chat template: the kind of tower and language
model, the layers of the features, tied weights, grouped heads, biases, rotary scaling, and the form in which the
template takes messages. Widths, depths and image sizes are reduced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import transformers
from transformers import (
    CLIPImageProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextImageProcessorPil,
    MistralConfig,
    Qwen2Config,
    SiglipImageProcessorPil,
)

from tests.support.tiny_models import (
    CHAT_TEMPLATE,
    IMAGE_SIZE,
    PINPOINTS,
    byte_tokenizer,
    clip_config,
    randomised,
    save_tiny_granite_vision,
    save_tiny_llava_onevision,
    save_tiny_qwen,
    siglip_config,
    text_config,
    tiny_qwen2_5_vl,
    tiny_qwen2_vl,
)

__all__ = ["PUBLIC", "PublicCheckpoint"]

GROUPED: Final = {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 64}
EACH_HEAD: Final = {"num_attention_heads": 6, "num_key_value_heads": 6}
LLAMA_3: Final = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}

# Templates that take a list of parts.
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INSTRUCTIONS = (
    "{% for message in messages %}{% if message['role'] == 'user' %}[INST] "
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %} [/INST]{% else %}{{ ' ' + message['content'][0]['text'] + '</s> ' }}{% endif %}{% endfor %}"
)
# Templates that take one text.
CONCATENATING = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
PLACING = (  # writes the placeholder itself, and removes that of the text
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ 'user: <image>' + message['content'].replace('<image>', '').lstrip() + '\n' }}"
    "{% else %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class PublicCheckpoint:
    """The structure of a public LLaVA or LLaVA-NeXT.

    Attributes:
        text: class of the language model's configuration.
        heads: its attention heads, and its width.
        language: what else is set in it.
        siglip: whether the tower is SigLIP, not CLIP.
        crops: whether it is a LLaVA-NeXT.
        model: what else is set in the configuration of the whole.
        template: its chat template.
    """

    text: Any = LlamaConfig
    heads: Mapping[str, int] = field(default_factory=lambda: EACH_HEAD)
    language: Mapping[str, Any] = field(default_factory=dict)
    siglip: bool = False
    crops: bool = False
    model: Mapping[str, Any] = field(default_factory=dict)
    template: str = CHAT_TEMPLATE

    def __call__(self, folder: Path) -> Path:
        """Write the checkpoint."""
        language = text_config(self.text, max_position_embeddings=1024, **{**self.heads, **self.language})
        features = (
            {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
            if self.siglip
            else {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"}
        )
        pinpoints = {"image_grid_pinpoints": PINPOINTS} if self.crops else {}
        config = (LlavaNextConfig if self.crops else LlavaConfig)(
            vision_config=(siglip_config if self.siglip else clip_config)(),
            text_config=language,
            image_token_index=3,
            tie_word_embeddings=language.tie_word_embeddings,
            **{**features, **pinpoints, **self.model},
        )
        kind = "LlavaNextForConditionalGeneration" if self.crops else "LlavaForConditionalGeneration"
        randomised(getattr(transformers, kind), config, 0).save_pretrained(folder)
        self._image_processor().save_pretrained(folder)
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = self.template
        tokenizer.save_pretrained(folder)
        return folder

    def _image_processor(self) -> Any:
        size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
        if self.crops:
            return LlavaNextImageProcessorPil(
                size={"shortest_edge": IMAGE_SIZE}, crop_size=size, image_grid_pinpoints=PINPOINTS
            )
        if self.siglip:
            return SiglipImageProcessorPil(size=size)
        return CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=size)


def _qwen(model: Any) -> Callable[[Path], Path]:
    return lambda folder: save_tiny_qwen(folder, model())


def _yarn() -> Any:
    model = tiny_qwen2_5_vl()
    rope = {**model.config.text_config.rope_parameters, "rope_type": "yarn", "factor": 2.0}
    model.config.text_config.rope_parameters = {**rope, "original_max_position_embeddings": 256}
    return type(model)(model.config).eval()


# Public name -> what writes a small checkpoint of its structure.
PUBLIC: Final[Mapping[str, Callable[[Path], Path]]] = {
    "llava-hf/llava-1.5-7b-hf": PublicCheckpoint(),
    "llava-hf/llava-1.5-13b-hf": PublicCheckpoint(
        heads={"num_attention_heads": 10, "num_key_value_heads": 10, "hidden_size": 80}
    ),
    "llava-hf/bakLlava-v1-hf": PublicCheckpoint(text=MistralConfig, heads=GROUPED, language={"sliding_window": 4096}),
    "llava-hf/llava-interleave-qwen-0.5b-hf": PublicCheckpoint(
        text=Qwen2Config, heads=GROUPED, language={"tie_word_embeddings": True}, siglip=True, template=CHATML
    ),
    "xtuner/llava-llama-3-8b-v1_1-transformers": PublicCheckpoint(
        heads=GROUPED,
        language={"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        template=CONCATENATING,
    ),
    "xtuner/llava-phi-3-mini-hf": PublicCheckpoint(template=CONCATENATING),
    "fancyfeast/llama-joycaption-beta-one-hf-llava": PublicCheckpoint(
        heads=GROUPED,
        language={"rope_parameters": LLAMA_3},
        siglip=True,
        model={"vision_feature_layer": -2},
        template=PLACING,
    ),
    "llava-hf/llava-v1.6-vicuna-7b-hf": PublicCheckpoint(crops=True),
    "llava-hf/llava-v1.6-mistral-7b-hf": PublicCheckpoint(
        text=MistralConfig, heads=GROUPED, language={"sliding_window": None}, crops=True, template=INSTRUCTIONS
    ),
    "llava-hf/llava-v1.6-34b-hf": PublicCheckpoint(heads=GROUPED, crops=True, template=CHATML),
    "llava-hf/llama3-llava-next-8b-hf": PublicCheckpoint(
        heads=GROUPED, language={"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}, crops=True
    ),
    "llava-hf/llava-next-72b-hf": PublicCheckpoint(text=Qwen2Config, heads=GROUPED, crops=True, template=CHATML),
    "llava-hf/llava-onevision-qwen2-0.5b-ov-hf": save_tiny_llava_onevision,
    "ibm-granite/granite-vision-3.3-2b": save_tiny_granite_vision,
    "Qwen/Qwen2-VL-2B-Instruct": _qwen(tiny_qwen2_vl),
    "Qwen/Qwen2.5-VL-7B-Instruct": _qwen(tiny_qwen2_5_vl),
    "Qwen/Qwen2.5-VL-7B-Instruct, yarn": _qwen(_yarn),
}
