"""Compare the error of half precision in PyTorch with the error that the verification of a package measures.

    python scripts/benchmarks/measure_precision.py    # tiny random models of every family, some of them deep
    python scripts/benchmarks/measure_precision.py CHECKPOINT...

For each model and dtype: the errors of transformers' own model in that dtype and of the exported package, both compared
with transformers in fp32 (for bf16 with weights rounded to bf16, as in the verification). An error is the largest
difference divided by the standard deviation of the reference. The last line on stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from promprune.export import export_package
from promprune.export.checkpoint.loading import Checkpoint, load_checkpoint
from promprune.export.checkpoint.weights import torch_dtype
from promprune.export.config import ExportConfig
from promprune.export.verify.samples import check_samples
from promprune.export.verify.tensors import relative_error
from promprune.export.verify.verification import verify_package
from tests.support.tiny_models import (
    randomised,
    save_tiny_granite_vision,
    save_tiny_llava,
    save_tiny_llava_next,
    save_tiny_llava_onevision,
    save_tiny_qwen,
    save_tiny_siglip_llava,
    tiny_qwen2_5_vl,
    tiny_qwen2_vl,
)

IMAGES: Final = 2
MEASURED: Final = ("features", "logits", "saliency")
DTYPES: Final = ("fp16", "bf16")
# As many layers and head dimensions as real models; the scale of the attention is not a power of two.
DEEP: Final = {"vision": {"num_hidden_layers": 24}, "text": {"num_hidden_layers": 32, "head_dim": 128}}
DEEP_SIGLIP: Final = {"num_hidden_layers": 27, "num_attention_heads": 2, "hidden_size": 2 * 72}


def save_deep_siglip(folder: Path, seed: int) -> Path:
    """Write a random LLaVA with SigLIP whose tower is as deep as that of 400 million parameters."""
    config = LlavaConfig.from_pretrained(save_tiny_siglip_llava(folder))
    config.vision_config.update(DEEP_SIGLIP)
    randomised(LlavaForConditionalGeneration, config, seed).save_pretrained(folder)
    return folder


TINY: Final[Mapping[str, Callable[[Path, int], Any]]] = {
    "LLaVA": lambda folder, seed: save_tiny_llava(folder, seed=seed),
    "LLaVA, deep": lambda folder, seed: save_tiny_llava(folder, seed=seed, **DEEP),
    "LLaVA, SigLIP": lambda folder, seed: save_tiny_siglip_llava(folder, seed=seed),
    "LLaVA, SigLIP, deep": save_deep_siglip,
    "LLaVA-OneVision": lambda folder, seed: save_tiny_llava_onevision(folder, seed=seed),
    "Granite Vision": lambda folder, seed: save_tiny_granite_vision(folder, seed=seed),
    "LLaVA-NeXT": lambda folder, seed: save_tiny_llava_next(folder, seed=seed),
    "Qwen2.5-VL": lambda folder, seed: save_tiny_qwen(folder, tiny_qwen2_5_vl(seed=seed)),
    "Qwen2-VL": lambda folder, seed: save_tiny_qwen(folder, tiny_qwen2_vl(seed=seed)),
}


@torch.inference_mode()
def values(checkpoint: Checkpoint, model: Any, texts: Sequence[str]) -> dict[str, list[Tensor]]:
    """Return features and saliency of some images, and logits after some texts, in the model's dtype."""
    family, tokenizer = checkpoint.family(model, checkpoint.processor), checkpoint.processor.tokenizer
    samples = check_samples(IMAGES, sizes=family.sample_sizes)
    references = [family.reference(sample.image) for sample in samples]
    logits = []
    for text in texts:
        embeds = family.embed_tokens(torch.tensor([tokenizer(text).input_ids]))
        hidden = family.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        logits.append(family.lm_head(hidden[:, -1]))
    return {
        "features": [reference.features for reference in references],
        "logits": logits,
        "saliency": [reference.saliency for reference in references if reference.saliency is not None],
    }


def torch_errors(checkpoint: Checkpoint, dtype: str) -> dict[str, float]:
    """Measure the error of transformers' own model in a dtype."""
    model_class = getattr(transformers, checkpoint.family.model_class)
    texts = [sample.question for sample in check_samples(IMAGES, sizes=((64, 64),))]
    model = model_class.from_pretrained(checkpoint.folder, dtype=torch_dtype(dtype)).eval()
    got = values(checkpoint, model, texts)
    if dtype == "fp16":
        model = model_class.from_pretrained(checkpoint.folder, dtype=torch.float32).eval()
    want = values(checkpoint, model.float(), texts)
    return {
        name: max(relative_error(g.float().numpy(), w.numpy()) for g, w in zip(got[name], want[name], strict=True))
        for name in got
        if got[name]
    }


def package_errors(checkpoint: Checkpoint, dtype: Any, folder: Path) -> dict[str, float]:
    """Return the errors that the verification of a package measures."""
    config = ExportConfig(
        model=str(checkpoint.folder), dtype=dtype, ratio=0.25, verify=False, output=folder / "package", force=True
    )
    result = export_package(config)
    record = verify_package(result.package, checkpoint, num_images=IMAGES)
    found = {check.name.split(",")[0]: check.measured for check in record.checks if "relative error" in check.name}
    return {
        "features": found["image features"],
        "logits": max(found["prefill logits"], found["decode logits"]),
        "saliency": found["saliency"],
    }


def measure(folder: Path, work: Path) -> dict[str, dict[str, dict[str, float]]]:
    checkpoint = load_checkpoint(str(folder))
    return {
        dtype: {"torch": torch_errors(checkpoint, dtype), "package": package_errors(checkpoint, dtype, work)}
        for dtype in DTYPES
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "checkpoints", type=Path, nargs="*", help="checkpoints to measure (default: tiny random models)"
    )
    parser.add_argument("--seeds", type=int, default=2, help="number of tiny models per family (%(default)s)")
    given = parser.parse_args()
    report = {}
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        folders = {path.name: path for path in given.checkpoints}
        if not folders:
            for name, save in TINY.items():
                for seed in range(given.seeds):
                    folders[f"{name} {seed}"] = save(work / f"{name} {seed}", seed)
        print("| model | dtype | features: torch | package | logits: torch | package | saliency: torch | package |")
        print("|---|---|---|---|---|---|---|---|")
        for name, folder in folders.items():
            report[name] = measure(folder, work)
            for dtype, errors in report[name].items():
                measured = [errors[side].get(what) for what in MEASURED for side in ("torch", "package")]
                cells = ["-" if error is None else f"{error:.1e}" for error in measured]
                print(f"| {name} | {dtype} | {' | '.join(cells)} |", flush=True)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
