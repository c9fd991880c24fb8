"""A package small enough to work out by hand: graphs of a dozen nodes, and the same model in numpy.

The vision graph averages 8 x 8 patches and keeps the T brightest; the decoder is one attention layer whose logits
depend on every position, on its place, and on the mask.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from promprune.method.config import DEFAULT_LOOP, SelectionConfig
from promprune.package.image import CropLayout, ImageRecord
from promprune.package.manifest import (
    SCHEMA_VERSION,
    VISION_ENCODER,
    GraphRecord,
    Manifest,
    SelectionRecord,
    SourceRecord,
    TensorRecord,
    TokenCounts,
    file_records,
    write_manifest,
)

SIDE, PATCH, GRID, HIDDEN = 32, 8, 4, 16
NUM_TOKENS = GRID * GRID
SPECIAL = ("<pad>", "<s>", "</s>", "<image>")
IMAGE_TOKEN, IMAGE_TOKEN_ID, EOS = "<image>", 3, 2
TEMPLATE = (
    "{% for m in messages %}{{ m.role.upper() }}: {% for p in m.content %}"
    "{% if p.type == 'image' %}<image>\n{% else %}{{ p.text }}{% endif %}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
_TYPES = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64, "bool": TensorProto.BOOL}


@dataclass
class FakeModel:
    """The weights, and what the graphs compute of them, in numpy."""

    seed: int = 0
    keep_tokens: int = 4
    context_length: int = 256

    def __post_init__(self) -> None:
        random = np.random.default_rng(self.seed)
        self.vocabulary = len(make_tokenizer().get_vocab())
        shapes = {
            "vision": (3, HIDDEN),
            "embed": (self.vocabulary, HIDDEN),
            "position": (self.context_length, HIDDEN),
            "value": (HIDDEN, HIDDEN),
            "head": (HIDDEN, self.vocabulary),
        }
        self.weights = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}

    def encode(self, pixel_values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return features [T, D] and indices [T] of one image [3, SIDE, SIDE]."""
        patches = pixel_values.reshape(3, GRID, PATCH, GRID, PATCH).mean(axis=(2, 4)).reshape(3, NUM_TOKENS).T
        indices = np.sort(np.argsort(-patches.sum(axis=1), kind="stable")[: self.keep_tokens])
        return (patches @ self.weights["vision"])[indices], indices

    def logits(self, embeds: np.ndarray) -> np.ndarray:
        """Return the logits [V] after a complete sequence of embeddings [length, D]."""
        hidden = embeds + self.weights["position"][: len(embeds)]
        scores = hidden @ hidden[-1] / np.sqrt(HIDDEN)
        attention = np.exp(scores - scores.max())
        attention /= attention.sum()
        return (attention @ (hidden @ self.weights["value"]) + hidden[-1]) @ self.weights["head"]

    def greedy(self, ids: list[int], features: np.ndarray, count: int) -> list[int]:
        """Return ``count`` greedily chosen tokens after a prompt whose placeholders are replaced by ``features``."""
        embeds = self.weights["embed"][np.array(ids)]
        embeds[np.array(ids) == IMAGE_TOKEN_ID] = features
        answer: list[int] = []
        while len(answer) < count and answer[-1:] != [EOS]:
            answer.append(int(self.logits(embeds).argmax()))
            embeds = np.concatenate([embeds, self.weights["embed"][answer[-1:]]])
        return answer


def make_tokenizer() -> Tokenizer:
    """Return a tokenizer of single bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer


def write_fake_package(folder: Path, model: FakeModel | None = None, **changes: Any) -> FakeModel:
    """Write a package; ``changes`` replaces fields of its manifest."""
    model = model or FakeModel()
    (folder / "onnx").mkdir(parents=True)
    graphs = {
        "vision_encoder": _vision(model),
        "embed_tokens": _embed(model),
        "decoder_model_merged": _decoder(model),
    }
    for name, graph in graphs.items():
        onnx.save(graph, folder / "onnx" / f"{name}.onnx")
    make_tokenizer().save(str(folder / "tokenizer.json"))
    side = {"height": SIDE, "width": SIDE}
    texts = {
        "tokenizer_config.json": {"bos_token": "<s>", "eos_token": "</s>"},
        "generation_config.json": {"eos_token_id": EOS, "bos_token_id": 1, "pad_token_id": 0},
        "preprocessor_config.json": {"size": {"shortest_edge": SIDE}, "crop_size": side},
        "config.json": {"model_type": "llava"},
    }
    for name, content in texts.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    rewrite_manifest(folder, manifest_of(model, graphs), **changes)
    return model


def rewrite_manifest(folder: Path, manifest: Manifest, **changes: Any) -> None:
    """Write a manifest that lists the files as they are now."""
    import msgspec

    write_manifest(folder, msgspec.structs.replace(manifest, files=file_records(folder), **changes))


def manifest_of(model: FakeModel, graphs: dict[str, onnx.ModelProto]) -> Manifest:
    counts = TokenCounts(num_tokens=NUM_TOKENS, keep_tokens=model.keep_tokens)
    return Manifest(
        schema_version=SCHEMA_VERSION,
        family="fake",
        dtype="fp32",
        opset=20,
        context_length=model.context_length,
        source=SourceRecord(model="fake", revision=None, weights_sha256="0" * 64),
        selection=SelectionRecord(
            config=SelectionConfig(),
            parameters_from="defaults",
            loop=DEFAULT_LOOP,
            requested_ratio=None,
            rounding="none",
        ),
        image=ImageRecord(
            token=IMAGE_TOKEN,
            token_id=IMAGE_TOKEN_ID,
            layout=CropLayout(height=SIDE, width=SIDE, patch_rows=GRID, patch_columns=GRID),
        ),
        graphs={
            name: graph_record(name, graph, counts if name == VISION_ENCODER else None)
            for name, graph in graphs.items()
        },
        files=(),
        tools={},
    )


def replaced_graph(manifest: Manifest, name: str, model: onnx.ModelProto) -> dict[str, GraphRecord]:
    """Return the graphs of a manifest with another one, or one more; N and T stay."""
    known = manifest.graphs.get(name)
    return {**manifest.graphs, name: graph_record(name, model, known.tokens if known else None)}


def graph_record(name: str, model: onnx.ModelProto, tokens: TokenCounts | None = None) -> GraphRecord:
    """Describe a graph as a manifest does."""
    dtypes = {number: dtype for dtype, number in _TYPES.items()}

    def tensors(values: Any) -> tuple[TensorRecord, ...]:
        return tuple(
            TensorRecord(
                name=value.name,
                dtype=dtypes[value.type.tensor_type.elem_type],
                shape=tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim),
            )
            for value in values
        )

    return GraphRecord(
        file=f"onnx/{name}.onnx",
        inputs=tensors(model.graph.input),
        outputs=tensors(model.graph.output),
        tokens=tokens,
    )


def make_graph(
    inputs: dict[str, tuple[str, list[Any]]],
    outputs: dict[str, tuple[str, list[Any]]],
    constants: dict[str, np.ndarray],
    *nodes: tuple[str, str, str] | tuple[str, str, str, dict[str, Any]],
) -> onnx.ModelProto:
    """Build a model of nodes (operator, inputs, outputs, attributes), names separated by spaces."""
    made = [helper.make_node(n[0], n[1].split(), n[2].split(), **(n[3] if len(n) > 3 else {})) for n in nodes]
    graph = helper.make_graph(
        made,
        "fake",
        [helper.make_tensor_value_info(k, _TYPES[d], s) for k, (d, s) in inputs.items()],
        [helper.make_tensor_value_info(k, _TYPES[d], s) for k, (d, s) in outputs.items()],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return model


def _vision(model: FakeModel) -> onnx.ModelProto:
    T = model.keep_tokens
    pooled = [
        ("AveragePool", "pixel_values", "pooled", {"kernel_shape": [PATCH, PATCH], "strides": [PATCH, PATCH]}),
        ("Reshape", "pooled flat", "rows"),
        ("Transpose", "rows", "patches", {"perm": [0, 2, 1]}),
    ]
    inputs = {"pixel_values": ("float32", ["batch_size", 3, SIDE, SIDE])}
    outputs: dict[str, tuple[str, list[Any]]] = {"image_features": ("float32", ["batch_size", T, HIDDEN])}
    constants = {"flat": np.array([0, 3, NUM_TOKENS]), "W": model.weights["vision"]}
    if T == NUM_TOKENS:
        return make_graph(inputs, outputs, constants, *pooled, ("MatMul", "patches W", "image_features"))
    outputs |= {
        "token_indices": ("int64", ["batch_size", T]),
        "saliency_mask": ("bool", ["batch_size", T]),
        "saliency_count": ("int64", ["batch_size", 1]),
        "spectral_entropy": ("float32", ["batch_size", 1]),
    }
    constants |= {"k": np.array([T]), "last": np.array([-1]), "one": np.array([1]), "two": np.array(2)}
    constants |= {"zero": np.array(0)}
    return make_graph(
        inputs,
        outputs,
        constants,
        *pooled,
        ("ReduceSum", "patches last", "brightness", {"keepdims": 0}),
        ("TopK", "brightness k", "_v picked"),
        ("Cast", "picked", "picked_f", {"to": TensorProto.FLOAT}),
        ("TopK", "picked_f k", "sorted _i", {"largest": 0}),
        ("Cast", "sorted", "token_indices", {"to": TensorProto.INT64}),
        ("Unsqueeze", "token_indices last", "where"),
        ("GatherND", "patches where", "kept", {"batch_dims": 1}),
        ("MatMul", "kept W", "image_features"),
        ("Mod", "token_indices two", "odd"),
        ("Equal", "odd zero", "saliency_mask"),
        ("Cast", "saliency_mask", "mask_i", {"to": TensorProto.INT64}),
        ("ReduceSum", "mask_i one", "saliency_count"),
        ("Sigmoid", "brightness", "bounded"),
        ("ReduceMean", "bounded one", "spectral_entropy"),
    )


def _embed(model: FakeModel) -> onnx.ModelProto:
    return make_graph(
        {"input_ids": ("int64", ["batch_size", "sequence_length"])},
        {"inputs_embeds": ("float32", ["batch_size", "sequence_length", HIDDEN])},
        {"table": model.weights["embed"]},
        ("Gather", "table input_ids", "inputs_embeds"),
    )


def _decoder(model: FakeModel) -> onnx.ModelProto:
    past, total = ["batch_size", 1, "past_sequence_length", HIDDEN], ["batch_size", 1, "total_sequence_length", HIDDEN]
    names = ("0.key", "0.value")
    return make_graph(
        {
            "inputs_embeds": ("float32", ["batch_size", "sequence_length", HIDDEN]),
            "attention_mask": ("int64", ["batch_size", "total_sequence_length"]),
            "position_ids": ("int64", ["batch_size", "sequence_length"]),
            **{f"past_key_values.{name}": ("float32", past) for name in names},
        },
        {
            "logits": ("float32", ["batch_size", 1, model.vocabulary]),
            **{f"present.{name}": ("float32", total) for name in names},
        },
        {
            "P": model.weights["position"],
            "Wv": model.weights["value"],
            "Wo": model.weights["head"],
            "one": np.array([1]),
            "last": np.array([-1]),
            "end": np.array([np.iinfo(np.int64).max]),
            "scale": np.float32(1 / np.sqrt(HIDDEN)),
            "far": np.float32(1e9),
            "axes": np.array([1, 2]),
            "one_f": np.float32(1),
        },
        ("Gather", "P position_ids", "places"),
        ("Add", "inputs_embeds places", "hidden"),
        ("Unsqueeze", "hidden one", "key"),
        ("MatMul", "key Wv", "value"),
        ("Concat", "past_key_values.0.key key", "present.0.key", {"axis": 2}),
        ("Concat", "past_key_values.0.value value", "present.0.value", {"axis": 2}),
        ("Slice", "hidden last end one", "query"),
        ("Unsqueeze", "query one", "query4"),
        ("Transpose", "present.0.key", "keys_t", {"perm": [0, 1, 3, 2]}),
        ("MatMul", "query4 keys_t", "products"),
        ("Mul", "products scale", "scores"),
        ("Cast", "attention_mask", "seen", {"to": TensorProto.FLOAT}),
        ("Unsqueeze", "seen axes", "seen4"),
        ("Sub", "seen4 one_f", "hidden_places"),
        ("Mul", "hidden_places far", "penalty"),
        ("Add", "scores penalty", "masked"),
        ("Softmax", "masked", "attention"),
        ("MatMul", "attention present.0.value", "context4"),
        ("Squeeze", "context4 one", "context"),
        ("Add", "context query", "out"),
        ("MatMul", "out Wo", "logits"),
    )
