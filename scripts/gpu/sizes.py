"""The sizes that are measured: the real ones on a GPU, and tiny ones to rehearse the script with on a CPU."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CROPS", "FULL", "REHEARSAL", "Sizes", "prompt_lengths", "sizes_for"]

CROPS = {"llava": 1, "llava_next": 5}  # images of the vision tower per picture


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Shapes, counts and devices of one report.

    Attributes:
        device: ``"cuda"`` or ``"cpu"``, as PyTorch names it.
        dtype: of features and models, as PyTorch names it.
        num_tokens, hidden_size, keep_tokens: N, D and T of the selection by itself.
        batches: B, images per call.
        feature_sets: on how many images the kept sets are compared with the float64 reference.
        runs: timed runs of a call; a quarter of them if a run takes more than 20 ms.
        warm_up: untimed runs before them.
        text_tokens: of the prompt, besides those of the image.
        compile_backend: of ``torch.compile``; ``"eager"`` traces only, which takes seconds without a GPU.
        copy_bytes: of the copied buffer of the roofline.
        product_side: rows and columns of the matrix product of the roofline.
        language_model: ``"7b"``, or ``"tiny"`` for models of some thousand parameters.
        tests: what pytest collects its tests marked ``gpu`` from.
    """

    device: str
    dtype: str
    num_tokens: int
    hidden_size: int
    keep_tokens: int
    batches: tuple[int, ...]
    feature_sets: int
    runs: int
    warm_up: int
    text_tokens: int
    compile_backend: str
    copy_bytes: int
    product_side: int
    language_model: str
    tests: tuple[str, ...]


FULL = Sizes(
    device="cuda",
    dtype="bfloat16",
    num_tokens=576,
    hidden_size=4096,
    keep_tokens=69,
    batches=(1, 5),
    feature_sets=20,
    runs=200,
    warm_up=10,
    text_tokens=60,
    compile_backend="inductor",
    copy_bytes=4 * 2**30,
    product_side=8192,
    language_model="7b",
    tests=("tests/test_pruning.py", "tests/test_runtime_sessions.py", "tests/test_engine_build.py"),
)

REHEARSAL = Sizes(
    device="cpu",
    dtype="bfloat16",
    num_tokens=64,
    hidden_size=96,
    keep_tokens=8,
    batches=(1, 2),
    feature_sets=4,
    runs=4,
    warm_up=1,
    text_tokens=5,
    compile_backend="eager",
    copy_bytes=2**22,
    product_side=128,
    language_model="tiny",
    tests=("tests/test_pruning.py",),
)


def sizes_for(*, rehearse: bool) -> Sizes:
    """Return the sizes of a rehearsal, or the real ones."""
    return REHEARSAL if rehearse else FULL


def prompt_lengths(sizes: Sizes) -> list[int]:
    """Return the tokens of prompts with one image of one and of five crops, pruned and not, in rising order."""
    per_crop = (sizes.keep_tokens, sizes.num_tokens)
    return sorted(sizes.text_tokens + crops * tokens for crops in CROPS.values() for tokens in per_crop)
