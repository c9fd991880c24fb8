"""Convert the language model of a LLaVA checkpoint for other runtimes, to be measured by peers.py.

    python scripts/benchmarks/convert_for_peers.py onnxruntime-genai llava-1b peers-1b
    python scripts/benchmarks/convert_for_peers.py openvino llava-1b peers-1b
    python scripts/benchmarks/convert_for_peers.py llama.cpp llava-1b peers-1b

Each runtime brings its own converter; docs/benchmarks.md tells what to install, in which environment. Weights in int4
are symmetric with one scale for 32 weights, as in packages of promprune, and include the head; the converters round
them in their own ways. The language model has to be a Llama. Existing results are kept.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

BLOCK_SIZE = 32
SHARD_BYTES = 1_000_000_000
GENAI_OPTIONS = {"fp32": [], "int4": [f"block_size={BLOCK_SIZE}", "accuracy_level=4", "is_symmetric=true"]}
OPENVINO_OPTIONS = {"fp32": [], "int4": ["--sym", "--group-size", str(BLOCK_SIZE), "--ratio", "1.0", "--all-layers"]}
GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def read_config(source: Path) -> dict[str, Any]:
    """Return the configuration of the language model, also readable by transformers 4."""
    text: dict[str, Any] = json.loads((source / "config.json").read_text())["text_config"]
    if text["model_type"] != "llama":
        sys.exit(f"{source} has a language model of type {text['model_type']}; expected llama")
    theta = text["rope_parameters"]["rope_theta"]
    return {**text, "architectures": ["LlamaForCausalLM"], "rope_theta": theta, "torch_dtype": "float32"}


def read_weights(source: Path) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """Yield the weights of the language model in fp32, by their names in a Llama checkpoint."""
    for file in sorted(source.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - it is no dictionary
                name = key.removeprefix("language_model.")
                if name != key:
                    yield name, tensors.get_tensor(key).astype(np.float32)


def write_checkpoint(source: Path, folder: Path) -> None:
    """Write the language model alone, as a checkpoint of transformers."""
    shard: dict[str, np.ndarray[Any, Any]] = {}
    places: dict[str, str] = {}
    for name, weight in read_weights(source):
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD_BYTES:
            save_file(shard, folder / places[next(iter(shard))], {"format": "pt"})
            shard = {}
        shard[name] = weight
        places[name] = places[next(iter(shard))] if len(shard) > 1 else f"model-{len(places)}.safetensors"
    save_file(shard, folder / places[next(iter(shard))], {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / "config.json").write_text(json.dumps(read_config(source)))
    for file in source.glob("*token*"):
        shutil.copy(file, folder)


def convert_for_genai(checkpoint: Path, folder: Path, dtype: str) -> None:
    options = ["prune_lm_head=true", "fuse_mlp_gate_up=true", *GENAI_OPTIONS[dtype]]
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", checkpoint, "-o", folder]
    cache = folder.with_name("builder-cache")
    subprocess.run([*builder, "-p", dtype, "-e", "cpu", "-c", cache, "--extra_options", *options], check=True)
    shutil.rmtree(cache, ignore_errors=True)


def convert_for_openvino(checkpoint: Path, folder: Path, dtype: str) -> None:
    optimum = [Path(sys.executable).with_name("optimum-cli"), "export", "openvino", "--model", checkpoint]
    options = ["--task", "text-generation-with-past", "--weight-format", dtype, *OPENVINO_OPTIONS[dtype]]
    subprocess.run([*optimum, *options, folder], check=True)


def convert_for_llama_cpp(source: Path, file: Path) -> None:
    """Write a GGUF file whose matrices are all Q4_0."""
    import gguf

    config = read_config(source)
    writer = gguf.GGUFWriter(file, "llama", use_temp_file=True)
    describe_llama(writer, config)
    for name, weight in read_weights(source):
        parts = name.removesuffix(".weight").split(".", 3)
        layer = f"blk.{parts[2]}." if parts[1:2] == ["layers"] else ""
        known = GGUF_NAMES[parts[3] if layer else ".".join(parts)]
        heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}.get(known)
        weight = weight if heads is None else interleave(weight, heads)
        kind = gguf.GGMLQuantizationType.Q4_0 if weight.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(f"{layer}{known}.weight", gguf.quants.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def describe_llama(writer: Any, config: dict[str, Any]) -> None:
    """Write the shape of the model, and a vocabulary of meaningless texts: the peers get token ids."""
    import gguf

    size = config["vocab_size"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<0x{number:02X}>" for number in range(size)])
    writer.add_token_scores([0.0] * size)
    writer.add_token_types([gguf.TokenType.BYTE if number < 256 else gguf.TokenType.NORMAL for number in range(size)])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])


def interleave(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Order the rows of each head as llama.cpp rotates them: pairs are adjacent, not half a head apart."""
    pairs = weight.reshape(heads, 2, len(weight) // heads // 2, -1)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(weight.shape))


def once(path: Path, write: Callable[[Path], None]) -> Path:
    """Write a file or folder unless it exists; it appears when it is complete."""
    if not path.exists():
        partial = path.with_name(f"{path.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        if not path.suffix:
            partial.mkdir(parents=True)
        write(partial)
        partial.rename(path)
    print(path, flush=True)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runtime", choices=("onnxruntime-genai", "openvino", "llama.cpp"))
    parser.add_argument("source", type=Path, help="checkpoint of a LLaVA")
    parser.add_argument("out", type=Path, help="folder to write; it also gets the language model as a checkpoint")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    if given.runtime == "llama.cpp":
        once(given.out / "llama.cpp-int4.gguf", lambda file: convert_for_llama_cpp(given.source, file))
        return
    convert = {"onnxruntime-genai": convert_for_genai, "openvino": convert_for_openvino}[given.runtime]
    checkpoint = once(given.out / "checkpoint", lambda folder: write_checkpoint(given.source, folder))
    for dtype in ("fp32", "int4"):
        once(given.out / f"{given.runtime}-{dtype}", lambda folder, dtype=dtype: convert(checkpoint, folder, dtype))


if __name__ == "__main__":
    main()
