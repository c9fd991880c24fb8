"""The embedded model's architecture, tokenizer and files: a small LLaVA 1.5, saved like LLaVA models on the hub.

Old key names and `rope_theta` in the configuration are intentional: transformers 4.x and 5.x both read them,
while neither reads everything that the other one writes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from promprune.embedded.scenes import TRAIN_SEEDS, questions, render_scene

PATCH_SIZE = 14
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<image>")
PAD_ID, BOS_ID, EOS_ID, IMAGE_ID = range(len(SPECIAL_TOKENS))

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] | upper }}: "
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{{ '</s>' if message['role'] == 'assistant' else ' ' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def model_config(image_size: int, vocab_size: int) -> LlavaConfig:
    """CLIP 192 x 6, patches of 14, features of the last layer but one; Llama 192 x 4."""
    vision = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=6,
        image_size=image_size,
        patch_size=PATCH_SIZE,
        hidden_act="gelu",
        projection_dim=192,
    )
    text = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        tie_word_embeddings=True,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_ID,
        image_seq_length=(image_size // PATCH_SIZE) ** 2,
        projector_hidden_act="gelu",
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )


def new_model(image_size: int, vocab_size: int, seed: int = 0) -> LlavaForConditionalGeneration:
    """Return a model with random weights: matrices scaled by 1/sqrt(fan in), output matrices of blocks zero, embeddings
    of length 1.
    """
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(model_config(image_size, vocab_size))
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight", "fc2.weight")):
            torch.nn.init.zeros_(parameter)
        elif "patch_embedding" in name:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        elif parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    torch.nn.init.normal_(model.model.multi_modal_projector.linear_2.weight, std=0.01)
    init_positions(model)
    return model


# Offsets (rows, columns) that the heads of each vision layer attend to at first; other heads have none.
_AXES = ((0, -1), (0, 1), (-1, 0), (1, 0))
_DIAGONALS = ((-1, -1), (-1, 1), (1, -1), (1, 1))
_HEAD_OFFSETS = (_AXES, _DIAGONALS, _AXES, _DIAGONALS)


def init_positions(model: LlavaForConditionalGeneration) -> None:
    """Initialise heads of the first layers to attend to one neighbour, like a convolution.

    Recognising shapes needs the surrounding patches, and a small tower would spend most of a short training on finding
    its neighbours. So the first 64 dimensions of a patch's embedding encode its row and column as sines and cosines,
    in which a step to a neighbour is a rotation; the query and key matrices are initialised to that rotation.
    """
    tower = model.model.vision_tower
    frequencies = 2 * math.pi / torch.logspace(math.log10(2.5), math.log10(40), 16)
    grid = model.config.vision_config.image_size // PATCH_SIZE
    angles = torch.arange(grid)[:, None] * frequencies
    line = 0.7 * torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)  # [grid, 32]
    rows = line[:, None].expand(-1, grid, -1)
    with torch.no_grad():
        tower.embeddings.patch_embedding.weight[:64] *= 0.1
        position = tower.embeddings.position_embedding.weight.normal_(std=0.02)
        position[1:, :64] = torch.cat([rows, rows.transpose(0, 1)], dim=-1).flatten(0, 1)
        for layer, offsets in zip(tower.encoder.layers, _HEAD_OFFSETS, strict=False):
            for head, (down, right) in enumerate(offsets):
                key = torch.zeros(32, position.shape[1])
                query = torch.zeros_like(key)
                for axis, step in enumerate((down, right)):
                    for i in range(8):
                        turn = float(frequencies[i]) * step
                        at, dim = 16 * axis + 2 * i, 32 * axis + 2 * i
                        key[at, dim] = key[at + 1, dim + 1] = query[at, dim] = query[at + 1, dim + 1] = 2.2
                        query[at : at + 2, dim : dim + 2] *= math.cos(turn)
                        query[at, dim + 1], query[at + 1, dim] = 2.2 * math.sin(turn), -2.2 * math.sin(turn)
                span = slice(32 * head, 32 * head + 32)
                layer.self_attn.k_proj.weight[span] = key
                layer.self_attn.q_proj.weight[span] = query


# ------------------------------------------------------------------------------------------------------ tokenizer


def new_tokenizer() -> Tokenizer:
    """Train a byte-level BPE on all words of the questions, so that each word is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        min_frequency=2,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_tokenizer_corpus(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS_ID)]
    )
    return tokenizer


def _tokenizer_corpus() -> Iterator[str]:
    for seed in TRAIN_SEEDS[:600]:
        for question in questions(render_scene(seed, image_size=32), per_type=6):
            yield prompt_tail(question.text) + f" {question.answer}"
            yield "USER: "
    for number in range(17):
        yield from (f"ASSISTANT: {number}",) * 4


def prompt_tail(question: str) -> str:
    """Return the part of a question's prompt after the image, in the format of the chat template."""
    return f"\n{question} ASSISTANT:"


# ---------------------------------------------------------------------------------------------------------- files


def save_model(model: LlavaForConditionalGeneration, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the checkpoint folder: weights in fp16, configuration, tokenizer, processor, chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {_hub_name(name): tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    tensors["language_model.lm_head.weight"] = tensors["language_model.model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    _write_json(folder / "config.json", _hub_config(model.config))
    generation = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID, "max_new_tokens": 8}
    _write_json(folder / "generation_config.json", {"_from_model_config": False, **generation})
    _save_processor(tokenizer, model.config.vision_config.image_size, folder)


def load_weights(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Read the weights that `save_model` wrote back into a model of the same shape, in fp32."""
    source = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    model.load_state_dict(source.state_dict())


def _hub_name(name: str) -> str:
    renames = (
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
    )
    for new, old in renames:
        if name.startswith(new):
            return old + name.removeprefix(new)
    raise KeyError(name)


def _hub_config(config: LlavaConfig) -> dict[str, object]:
    """Return the content of `config.json` with the keys of LLaVA checkpoints on the hub."""
    vision, text = config.vision_config, config.text_config
    vision_keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size")
    vision_keys += ("patch_size", "hidden_act", "projection_dim", "layer_norm_eps")
    text_keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    text_keys += ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "hidden_act")
    text_keys += ("pad_token_id", "bos_token_id", "eos_token_id")
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "ignore_index": -100,
        "image_token_index": config.image_token_id,
        "image_seq_length": config.image_seq_length,
        "projector_hidden_act": config.projector_hidden_act,
        "vision_feature_layer": config.vision_feature_layer,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "pad_token_id": PAD_ID,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "vision_config": {"model_type": "clip_vision_model", **{k: getattr(vision, k) for k in vision_keys}},
        "text_config": {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            **{key: getattr(text, key) for key in text_keys},
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
        },
    }


def _save_processor(tokenizer: Tokenizer, image_size: int, folder: Path) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    special = dict(zip(("pad_token", "bos_token", "eos_token"), SPECIAL_TOKENS, strict=False))
    _write_json(
        folder / "tokenizer_config.json",
        {
            **special,
            "added_tokens_decoder": {
                str(index): {"content": token, "special": True, "normalized": False}
                | dict.fromkeys(("lstrip", "rstrip", "single_word"), False)
                for index, token in enumerate(SPECIAL_TOKENS)
            },
            "clean_up_tokenization_spaces": False,
            "extra_special_tokens": {"image_token": "<image>"},
            "image_token": "<image>",
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": 2048,
            "padding_side": "left",
            "processor_class": "LlavaProcessor",
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
    _write_json(folder / "special_tokens_map.json", {**special, "image_token": "<image>"})
    _write_json(
        folder / "processor_config.json",
        {
            "image_token": "<image>",
            "num_additional_image_tokens": 1,
            "patch_size": PATCH_SIZE,
            "processor_class": "LlavaProcessor",
            "vision_feature_select_strategy": "default",
        },
    )
    images = CLIPImageProcessor(
        size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size}
    )
    described = {
        "crop_size": {"height": image_size, "width": image_size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(images.image_mean),
        "image_processor_type": "CLIPImageProcessor",
        "image_std": list(images.image_std),
        "processor_class": "LlavaProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": image_size},
    }
    _write_json(folder / "preprocessor_config.json", described)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
