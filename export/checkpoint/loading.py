"""Reading a source checkpoint: a local folder in Hugging Face format, a hub id, or the embedded model."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import msgspec
import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from promprune.errors import ModelError, UnsupportedModelError, first_line
from promprune.export.checkpoint.limits import MAX_CONFIG_BYTES, check_config
from promprune.export.checkpoint.meta_model import build_meta_model
from promprune.export.checkpoint.out_of_core import load_weights, load_weights_on_call
from promprune.export.checkpoint.weights import weight_files
from promprune.export.families import FAMILIES, Family
from promprune.inputs import read_file
from promprune.package.manifest import SourceRecord, WeightRecord, sha256_of_file
from promprune.package.sources import EMBEDDED_MODEL, EXPECTED_MODEL, embedded_model_folder, local_folder

__all__ = [
    "EMBEDDED_MODEL",
    "Checkpoint",
    "ImageTextProcessor",
    "embedded_model_folder",
    "family_of",
    "load_checkpoint",
    "load_model",
    "load_processor",
    "read_constants",
    "resolve",
]

HASHED_AT_ONCE: Final = 2  # files of a checkpoint that are hashed concurrently
# Optional file in a model's folder with settings of the selection: {"mu": ..., "tau": ...}, limits of the split.
SELECTION_FILE: Final = "promprune_config.json"
_SELECTION_KEYS: Final = frozenset({"mu", "tau", "saliency_ratio_min", "saliency_ratio_max"})


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A source model; its weights stay on disk until they are used.

    Attributes:
        source: its record in the manifest.
        folder: the folder of its files.
        family: the class of its family.
        meta_model: the transformers model without its weights, in the requested dtype: its parameters are on the
            meta device, each linked to its tensor in the checkpoint.
        processor: the transformers processor, or its parts: tokenizer, image processor, chat template.
        digests: file of weights -> its SHA-256.
        weight_record: how the language model's weights are quantized; None if they are not.
    """

    source: SourceRecord
    folder: Path
    family: type[Family]
    meta_model: Any
    processor: Any
    digests: Mapping[Path, str]
    weight_record: WeightRecord | None = None

    def out_of_core_model(
        self,
        *,
        dtype: torch.dtype = torch.float32,
        rounded_to: torch.dtype = torch.float32,
        relink: Callable[[nn.Module], None] | None = None,
    ) -> Any:
        """Return the reference with its weights on disk: each module loads its weights when it is called.

        Args:
            dtype: dtype that everything is computed in.
            rounded_to: dtype that the weights are rounded to when they are loaded.
            relink: links parameters to other weights than the checkpoint's.
        """
        model = build_meta_model(self.folder, self.family.model_class, dtype)
        if relink is not None:
            relink(model)
        load_weights_on_call(model, rounded_to=rounded_to)
        return model

    @cached_property
    def model(self) -> Any:
        """The transformers model with all its weights in memory, in fp32 and in evaluation mode: the reference."""
        if self.weight_record is None:
            return load_model(self.folder, self.family)
        model = build_meta_model(self.folder, self.family.model_class, torch.float32)
        load_weights(model)
        return model


@dataclass(frozen=True, kw_only=True)
class ImageTextProcessor:
    """The parts of a transformers processor that images and texts need.

    Attributes:
        image_processor, tokenizer: objects of transformers.
        chat_template: None to use the tokenizer's, if it has one.
    """

    image_processor: Any
    tokenizer: Any
    chat_template: str | None


def load_checkpoint(name: str | None, *, dtype: torch.dtype = torch.float32) -> Checkpoint:
    """Load a model's structure and its processor.

    Args:
        name: folder or hub id; None for the embedded model. Code from a checkpoint is never run.
        dtype: dtype of the structure's parameters.

    Raises:
        ModelError: it is not a model, incomplete, or cannot be downloaded.
        UnsupportedModelError: its family is not exported.
    """
    folder, revision = resolve(name)
    family = family_of(folder)
    meta_model = build_meta_model(folder, family.model_class, dtype)
    processor = load_processor(folder)
    _refuse_tokens_without_embedding(meta_model, processor.tokenizer, folder)
    _refuse_unknown_image_token(meta_model.config.image_token_id, processor, folder)
    files = weight_files(folder)
    with ThreadPoolExecutor(max_workers=HASHED_AT_ONCE) as pool:
        digests = dict(zip(files, pool.map(sha256_of_file, files), strict=True))
    source = SourceRecord(
        model=EMBEDDED_MODEL if name is None else name if revision else folder.resolve().name,
        revision=revision,
        weights_sha256=_digest_of(digests),
    )
    return Checkpoint(
        source=source,
        folder=folder,
        family=family,
        meta_model=meta_model,
        processor=processor,
        digests=digests,
        weight_record=meta_model.packed_weights.record if meta_model.packed_weights else None,
    )


def read_constants(folder: Path) -> dict[str, float]:
    """Read a checkpoint's ``promprune_config.json``, if it has one: any of mu, tau, and the limits of the split.

    Raises:
        ModelError: the file is invalid.
    """
    path = folder / SELECTION_FILE
    if not path.is_file():
        return {}
    try:
        constants = msgspec.json.decode(path.read_bytes(), type=dict[str, float])
    except msgspec.DecodeError as error:
        raise ModelError(f"{path} cannot be read ({error})", expected='{"mu": number, "tau": number}') from error
    if not constants.keys() <= _SELECTION_KEYS:
        raise ModelError(
            f"{path} has the keys {sorted(constants)}", expected="mu, tau, saliency_ratio_min, saliency_ratio_max"
        )
    return constants


def resolve(name: str | None) -> tuple[Path, str | None]:
    """Return the folder of a checkpoint, and its revision if it was downloaded from the hub, else None.

    Args:
        name: folder or hub id; None for the embedded model.

    Raises:
        ModelError: it is neither, or cannot be downloaded.
    """
    if name is None:
        return embedded_model_folder(), None
    folder = local_folder(name)
    return _download(name) if folder is None else (folder, None)


def _download(name: str) -> tuple[Path, str | None]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
    try:
        folder = Path(snapshot_download(name, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"received {name!r}: no such folder, and the hub download failed ({type(error).__name__}: {reason})",
            expected=EXPECTED_MODEL,
            fix="check the name and the network connection, or download it elsewhere and pass its folder",
        ) from error
    return folder, folder.name


def family_of(folder: Path) -> type[Family]:
    """Return the class of a checkpoint's family.

    Raises:
        ModelError: the checkpoint has no usable ``config.json``.
        UnsupportedModelError: the family is not exported.
    """
    path = folder / "config.json"
    try:
        config = json.loads(read_file(path, most_bytes=MAX_CONFIG_BYTES))
        model_type = str(config["model_type"])
    except OSError as error:
        raise ModelError(f"{folder} has no config.json ({error.strerror})", expected=EXPECTED_MODEL) from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ModelError(f"{path} is not a model's configuration", expected="JSON with a model_type") from error
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"{folder.name} is of the family {model_type!r}", expected=f"one of the families {', '.join(FAMILIES)}"
        )
    if "mm_vision_tower" in config:
        raise UnsupportedModelError(
            f"{folder.name} has the format of the original LLaVA code (mm_vision_tower in config.json)",
            expected="the format of transformers",
            fix="export the converted checkpoint, such as llava-hf/llava-1.5-7b-hf",
        )
    check_config(config, path)
    family = FAMILIES[model_type]
    vision = config.get("vision_config")
    if family.towers and isinstance(vision, dict) and vision.get("model_type"):
        family.refuse_tower(str(vision["model_type"]))
    return family


def load_model(folder: Path, family: type[Family], *, dtype: torch.dtype = torch.float32) -> Any:
    """Load the transformers model of a checkpoint with all its weights, in evaluation mode.

    Raises:
        ModelError: it cannot be loaded.
    """
    model_class = getattr(transformers, family.model_class)
    transformers.utils.logging.disable_progress_bar()  # the command has its own
    try:
        model = model_class.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation="sdpa",
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"{folder} cannot be loaded as {family.model_class} ({first_line(error)})",
            expected="a complete checkpoint in Hugging Face format",
        ) from error
    return model.eval()


def load_processor(folder: Path) -> Any:
    """Load the transformers processor of a checkpoint, or its parts as :class:`ImageTextProcessor`.

    Raises:
        ModelError: it has no usable processor.
    """
    local: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    if (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file():
        _require_sentencepiece(folder)
    try:
        try:
            processor = transformers.AutoProcessor.from_pretrained(folder, **local)
        except ImportError:  # some processors have a part for videos that needs further packages
            processor = ImageTextProcessor(
                image_processor=transformers.AutoImageProcessor.from_pretrained(folder, **local),
                tokenizer=transformers.AutoTokenizer.from_pretrained(folder, **local),
                chat_template=_chat_template(folder),
            )
    except Exception as error:  # transformers raises many kinds of errors for a missing or broken file
        raise ModelError(
            f"{folder} has no usable processor ({first_line(error)})",
            expected="tokenizer.json and preprocessor_config.json (or processor_config.json) next to the weights",
        ) from error
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise ModelError(f"{folder} has a {type(processor).__name__}", expected="a tokenizer and an image processor")
    return processor


def _require_sentencepiece(folder: Path) -> None:
    """Refuse a tokenizer that only exists as a SentencePiece model, if the library that converts it is missing."""
    if importlib.util.find_spec("sentencepiece") is None:
        raise ModelError(
            f"{folder} has tokenizer.model, but no tokenizer.json",
            expected="tokenizer.json, or the library that converts a SentencePiece model",
            fix="pip install sentencepiece",
        )


def _chat_template(folder: Path) -> str | None:
    """Return the chat template from ``chat_template.json``; None without that file: the tokenizer reads all others."""
    path = folder / "chat_template.json"
    return str(json.loads(path.read_bytes())["chat_template"]) if path.is_file() else None


def _refuse_tokens_without_embedding(model: Any, tokenizer: Any, folder: Path) -> None:
    """Refuse a tokenizer with tokens that its model has no embedding for."""
    rows = model.get_input_embeddings().weight.shape[0]
    beyond = sorted((index, token) for token, index in tokenizer.get_vocab().items() if index >= rows)
    if beyond:
        index, token = beyond[0]
        raise ModelError(
            f"the tokenizer of {folder.name} has {len(beyond)} tokens that its model lacks, such as {token!r} "
            f"(id {index})",
            expected=f"ids below {rows}, the number of token embeddings",
            fix="save the model again after transformers' resize_token_embeddings, or remove the tokens",
        )


def _refuse_unknown_image_token(token_id: int, processor: Any, folder: Path) -> None:
    """Refuse a model whose image placeholder is not among the tokens of its tokenizer."""
    vocabulary = processor.tokenizer.get_vocab()
    if token_id in set(vocabulary.values()):
        return
    own = vocabulary.get(getattr(processor, "image_token", "<image>"))
    raise ModelError(
        f"config.json of {folder.name} has {token_id} as its image token (image_token_index or image_token_id), "
        "which its tokenizer lacks",
        expected="the id of the image placeholder" + ("" if own is None else f": {own}"),
        fix="correct config.json, or add the placeholder to the tokenizer",
    )


def _digest_of(digests: Mapping[Path, str]) -> str:
    lines = sorted(f"{file.name} {digest}\n" for file, digest in digests.items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()
