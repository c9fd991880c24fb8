"""Verification of a package against the model it was exported from.

The checks are, in this order: names, dtypes and shapes (structure.py); features and saliency against torch
(vision.py); the selection against the method in float64 (selection.py) and, in half precision, against fp32
(precision.py); embeddings, logits and answers (language.py).
Errors are relative to the standard deviation of the reference, because that of real features is several units.
A package with quantized weights is compared with torch on the same weights; the cost of quantization itself is measured
separately (cost.py).

If the source or the package does not fit into memory, both run out of core, one part at a time, with all layers and
all weights, but on fewer inputs; the record lists what was not verified.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import torch

from promprune.export.checkpoint.loading import Checkpoint
from promprune.export.checkpoint.out_of_core import available_memory
from promprune.export.families import VisionReference
from promprune.export.verify.checks import LIMITS
from promprune.export.verify.config import DEFAULT_CHECK_IMAGES
from promprune.export.verify.cost import cases_of, cost_of_quantization, run_model
from promprune.export.verify.language import check_answers, check_language, package_answers
from promprune.export.verify.precision import check_precision
from promprune.export.verify.samples import check_samples
from promprune.export.verify.selection import check_selection
from promprune.export.verify.structure import check_structure
from promprune.export.verify.subject import Subject
from promprune.export.verify.vision import check_vision, run_vision
from promprune.package.manifest import Manifest, VerificationRecord
from promprune.package.package import Package

__all__ = ["verify_package"]

# Memory of a verification that is not out of core, in bytes per parameter of the model: the reference in fp32, the
# weights of the package, and the copy that ONNX Runtime makes of them.
BYTES_PER_PARAMETER: Final = 12
OUT_OF_CORE_IMAGES: Final = 2
FP16_MAX: Final = 65504.0
FP16_WARNING: Final = 0.25  # share of FP16_MAX above which features cause a warning


def verify_package(
    package: Package, checkpoint: Checkpoint, *, num_images: int = DEFAULT_CHECK_IMAGES
) -> VerificationRecord:
    """Compare a package with its source on ``num_images`` rendered images.

    Args:
        package: the package, finished or before it is moved into place; its digests were checked or just computed.
        checkpoint: the model it was made from, in fp32.
        num_images: number of images; at least one of each of the model's sample sizes or, out of core, one for each
            of its vision graphs.

    Returns:
        All checks with their measured values; ``passed`` if all checks passed that are not advisory.
    """
    manifest = package.manifest
    out_of_core = manifest.dtype == "bf16" or _bytes_needed(checkpoint) > available_memory()
    subject = Subject.of(package, checkpoint, out_of_core=out_of_core)
    family, limits = subject.family, LIMITS[manifest.dtype]
    count = min(num_images, OUT_OF_CORE_IMAGES) if out_of_core else num_images
    least = len(family.vision_modules if out_of_core else family.sample_sizes)
    samples = check_samples(max(count, least), sizes=family.sample_sizes)
    answers = package_answers(subject, samples) if manifest.has_language_model and not out_of_core else []
    quantized = manifest.weights is not None and manifest.weights.is_quantized
    with torch.inference_mode():
        cases = cases_of(samples, answers) if quantized and answers else []
        source = run_model(family, manifest, cases)
        with subject.package_weights():
            references = [family.reference(sample.image) for sample in samples]
            runs = run_vision(subject, references)
            checks = [
                *check_structure(subject),
                *check_vision(
                    runs,
                    limits,
                    judge_saliency=subject.judges_saliency,
                    int8_activations=subject.has_int8_activations,
                ),
                *check_selection(manifest, runs, limits),
                *check_precision(subject, checkpoint, samples, references, runs),
            ]
            if manifest.has_language_model:
                checks += check_language(subject, samples, limits)
            if answers:
                checks += check_answers(subject, samples, references, answers, limits)
            if cases:
                checks += cost_of_quantization(source, run_model(family, manifest, cases, source.answers))
    return VerificationRecord(
        passed=all(check.passed or check.advisory for check in checks),
        checks=tuple(checks),
        not_verified=tuple(_not_verified(manifest, len(samples))) if out_of_core else (),
        warnings=tuple(_warnings(manifest, references)),
    )


def _bytes_needed(checkpoint: Checkpoint) -> int:
    return BYTES_PER_PARAMETER * sum(int(parameter.numel()) for parameter in checkpoint.meta_model.parameters())


def _not_verified(manifest: Manifest, num_images: int) -> Iterator[str]:
    yield f"more than {num_images} images"
    if manifest.has_language_model:
        yield "answers, token for token"
    if manifest.weights is not None and manifest.weights.is_quantized:
        yield "what quantization costs"
    if manifest.dtype == "bf16":
        yield "rounding to bf16 between operators: ONNX Runtime computed in fp32, with the same weights"


def _warnings(manifest: Manifest, references: Sequence[VisionReference]) -> Iterator[str]:
    largest = max(float(reference.features.abs().max()) for reference in references)
    if manifest.dtype == "fp16" and largest > FP16_WARNING * FP16_MAX:
        yield f"image features reach {largest:.0f}; fp16 ends at {FP16_MAX:.0f}, bf16 does not"
