"""The exported package: its files, its manifest, and how it is written and read.

Layout (that of transformers.js and onnx-community, so that other clients can load it)::

    OUT/
      promprune.json                  the manifest, described by :class:`Manifest`
      onnx/vision_encoder.onnx        pixel_values -> image_features [images, T, D], token_indices, ...
      onnx/embed_tokens.onnx          input_ids -> inputs_embeds
      onnx/decoder_model_merged.onnx  inputs_embeds, attention_mask, position_ids, past_key_values.*
                                      -> logits, present.*
      config.json  generation_config.json  preprocessor_config.json  processor_config.json
      tokenizer.json  tokenizer_config.json  chat_template.jinja

Weights are stored next to each graph as ``<graph>.onnx_data``, or in the checkpoint's files, which are linked into
``onnx/`` as ``*.safetensors``; a graph's record names its files. This module needs neither torch nor onnx.
"""

from __future__ import annotations

import errno
import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Final, Literal

import msgspec

from promprune.dtypes import Dtype, WeightFormat, is_quantized
from promprune.errors import PackageError
from promprune.files import check_output_folder, writing_folder
from promprune.inputs import open_file
from promprune.method.config import LoopForm, SelectionConfig
from promprune.package.contents import check_contents, is_inside, read_record
from promprune.package.image import VISION_ENCODER, ImageRecord
from promprune.package.record import Count, Digest, Fraction, Record, Size
from promprune.package.schema1 import export_command

__all__ = [
    "CHAT_TEMPLATE_FILE",
    "DECODER",
    "EMBED_TOKENS",
    "MANIFEST_FILE",
    "SCHEMA_VERSION",
    "TOKEN_SELECTOR",
    "VISION_ENCODER",
    "CheckRecord",
    "FileRecord",
    "GraphRecord",
    "Manifest",
    "SelectionRecord",
    "SourceRecord",
    "TensorRecord",
    "TokenCounts",
    "VerificationRecord",
    "WeightRecord",
    "WeightsRecord",
    "file_records",
    "read_manifest",
    "sha256_of_file",
    "write_manifest",
    "writing_package",
]

SCHEMA_VERSION: Final = 2
MANIFEST_FILE: Final = "promprune.json"
CHAT_TEMPLATE_FILE: Final = "chat_template.jinja"

# Names of the graphs in the manifest; the file of each is onnx/<name>.onnx.
EMBED_TOKENS: Final = "embed_tokens"
DECODER: Final = "decoder_model_merged"
TOKEN_SELECTOR: Final = "token_selector"
_LANGUAGE_GRAPHS: Final = (EMBED_TOKENS, DECODER)  # both, or neither in a package with only the vision encoder

_WEIGHTS: Final = (".onnx_data", ".safetensors")
# Most bytes of a file that is compared with its digest, or read entirely: graphs, which ONNX limits, and others.
_MAX_GRAPH_BYTES: Final = 2**31
_MAX_FILE_BYTES: Final = 64 * 1024 * 1024
_AGAIN: Final = "copy the package again, or export it again"
_OTHER_VERSION: Final = "export the package again, or install the promprune version that wrote it"


class SourceRecord(Record, frozen=True):
    """Where the weights came from."""

    model: str  # hub id, folder name, or "embedded"
    revision: str | None  # commit of a hub repository, if known
    weights_sha256: Digest  # over the names and digests of the weight files, in order


class SelectionRecord(Record, frozen=True):
    """How the kept tokens are chosen; the same in every vision graph."""

    config: SelectionConfig
    parameters_from: str  # source of mu and tau: "defaults", "model" or "command line"
    loop: LoopForm  # form of the greedy stage
    requested_ratio: Fraction | None  # the ratio given by --ratio; None if --keep-tokens was given
    rounding: str  # how T is computed from N and the ratio


class TensorRecord(Record, frozen=True):
    """One input or output of a graph; a dimension is a number, or the name of a dynamic dimension."""

    name: str
    dtype: str  # numpy's name
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


class TokenCounts(Record, frozen=True):
    """The visual tokens of one image, or of one crop of it, in one vision graph."""

    num_tokens: Count  # N, before selection
    keep_tokens: Count  # T, after selection; a constant of the graph

    def __post_init__(self) -> None:
        if self.keep_tokens > self.num_tokens:
            raise ValueError(f"keep_tokens = {self.keep_tokens} of num_tokens = {self.num_tokens}")

    @property
    def ratio(self) -> float:
        """The fraction of the tokens that is kept, T / N."""
        return self.keep_tokens / self.num_tokens

    @property
    def is_pruned(self) -> bool:
        """Whether any token is removed; if not, the graph contains no selection."""
        return self.keep_tokens < self.num_tokens


class GraphRecord(Record, frozen=True):
    """One ONNX graph."""

    file: str
    inputs: tuple[TensorRecord, ...]
    outputs: tuple[TensorRecord, ...]
    weights: tuple[str, ...] = ()  # files of its weights; graphs may share files
    tokens: TokenCounts | None = None  # of a vision graph; None for other graphs


class WeightRecord(Record, frozen=True):
    """How the weights of matrix products are stored; embeddings, norms and convolutions have the package's dtype."""

    format: WeightFormat
    block_size: Count | None = None  # integers along K with one scale; None for an entire column, or if not quantized
    int8_activations: bool = False  # products are computed in int8: for CPUs, not for TensorRT

    @property
    def is_quantized(self) -> bool:
        """Whether the weights are integers with scales."""
        return is_quantized(self.format)


class WeightsRecord(Record, frozen=True):
    """How the weights of both parts are stored."""

    language: WeightRecord  # of the decoder and its head
    vision: WeightRecord  # of the vision encoder and its projector

    @property
    def is_quantized(self) -> bool:
        """Whether any weights are integers with scales."""
        return self.language.is_quantized or self.vision.is_quantized

    def of(self, graph: str) -> WeightRecord:
        """Return what holds for a graph, by its name."""
        return self.vision if graph.startswith(VISION_ENCODER) else self.language

    def expands_on_cpu(self, graph: str) -> bool:
        """Whether ONNX Runtime converts the weights of a graph to floating point when it loads the graph on a CPU.

        That is faster for vision graphs, which multiply by hundreds of rows: its kernel for quantized weights is made
        for the single row of a decode step. Products in int8 stay as they are.
        """
        record = self.of(graph)
        return graph.startswith(VISION_ENCODER) and record.is_quantized and not record.int8_activations


class FileRecord(Record, frozen=True):
    """One file of the package."""

    path: str  # relative, with forward slashes
    size_bytes: Size
    sha256: Digest


class CheckRecord(Record, frozen=True):
    """One verification check: passed if ``measured`` is within ``limit``, compared by ``comparison``."""

    name: str
    measured: float
    comparison: Literal["<=", ">=", "=="]
    limit: float
    passed: bool
    detail: str = ""
    advisory: bool = False  # a failure is a warning, and does not fail the verification


class VerificationRecord(Record, frozen=True):
    """The verification when the package was written; None in a manifest that was not verified."""

    passed: bool
    checks: tuple[CheckRecord, ...]
    not_verified: tuple[str, ...] = ()  # checks that could not run, for lack of memory or of a runtime
    warnings: tuple[str, ...] = ()


class Manifest(Record, frozen=True):
    """The content of ``promprune.json``.

    ``graphs`` contains the vision graphs and, unless the package has only the vision encoder, both language graphs.
    """

    schema_version: int
    family: str  # Hugging Face model_type
    dtype: Dtype
    opset: Count
    context_length: Count  # positions the language model was made for
    source: SourceRecord
    selection: SelectionRecord
    image: ImageRecord
    graphs: dict[str, GraphRecord]
    files: tuple[FileRecord, ...]
    tools: dict[str, str]
    verification: VerificationRecord | None = None
    weights: WeightsRecord | None = None  # None: all weights have the package's dtype

    @property
    def has_language_model(self) -> bool:
        """Whether the package can answer, rather than only encode images."""
        return DECODER in self.graphs

    @property
    def max_image_tokens(self) -> int:
        """Most tokens that one image takes in a prompt."""
        layout = self.image.layout
        return layout.max_placeholders(max(self.tokens_of(name).keep_tokens for name in layout.vision_graphs))

    def tokens_of(self, graph: str = VISION_ENCODER) -> TokenCounts:
        """Return N and T of a vision graph.

        Raises:
            PackageError: there is no such vision graph.
        """
        record = self.graphs.get(graph)
        if record is None or record.tokens is None:
            raise PackageError(f"the manifest has no vision graph {graph!r} with its N and T", fix=_AGAIN)
        return record.tokens


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    with open_file(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def file_records(folder: Path, *, digests: Mapping[Path, str] = MappingProxyType({})) -> tuple[FileRecord, ...]:
    """Describe every file in ``folder`` except the manifest, sorted by path.

    Args:
        folder: the package.
        digests: file -> its SHA-256, for files that need not be read again.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST_FILE)
    return tuple(
        FileRecord(
            path=path.relative_to(folder).as_posix(),
            size_bytes=path.stat().st_size,
            sha256=digests.get(path) or sha256_of_file(path),
        )
        for path in files
    )


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of a package before the folder is moved into place."""
    content = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
    (folder / MANIFEST_FILE).write_bytes(content + b"\n")


def read_manifest(folder: Path, *, check_weights: bool = False) -> Manifest:
    """Read and validate a package.

    Every file must exist with its recorded size. The SHA-256 of every file is compared too, except that of the
    weights (which can be many gigabytes), which is compared on request.

    Args:
        folder: the package.
        check_weights: also compare the SHA-256 of the weights, which reads all their bytes.

    Raises:
        PackageError: it is not a package, has another schema version, or a file is missing, changed, or outside the
            folder.
    """
    manifest = _parse_manifest(folder)
    check_contents(folder)
    listed = {record.path for record in manifest.files}
    present = [name for name in _LANGUAGE_GRAPHS if name in manifest.graphs]
    vision = manifest.image.layout.vision_graphs
    for name in (*vision, *_LANGUAGE_GRAPHS) if present else vision:
        if name not in manifest.graphs:
            raise PackageError(f"{MANIFEST_FILE} in {folder} has no graph {name!r}", fix=_AGAIN)
    for name in vision:
        manifest.tokens_of(name)
    for name, graph in manifest.graphs.items():
        if graph.file not in listed:
            raise PackageError(
                f"{MANIFEST_FILE} in {folder} names {graph.file!r} for the graph {name!r}, but does not list it",
                fix=_AGAIN,
            )
    for record in manifest.files:
        _check_file(folder, record, check_digest=check_weights or not record.path.endswith(_WEIGHTS))
    return manifest


def _parse_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST_FILE
    try:
        return read_record(
            path, Manifest, version=SCHEMA_VERSION, fix=_AGAIN, what="manifest", upgrade=_how_to_export_again
        )
    except OSError as error:
        reason = "no readable promprune.json in it" if error.errno == errno.ENOENT else f"{path}: {error.strerror}"
        found = "no such folder" if not folder.exists() else reason
        raise PackageError(
            f"{folder} is not an exported package ({found})",
            expected="a folder written by promprune-export",
            fix="run promprune-export first",
        ) from error


def _how_to_export_again(version: int, content: bytes) -> str:
    return f"export the package again: {export_command(content)}" if version == 1 else _OTHER_VERSION


def _check_file(folder: Path, record: FileRecord, *, check_digest: bool) -> None:
    path = _path_inside(folder, record.path)
    try:
        size_bytes = path.stat().st_size if path.is_file() else None
        if size_bytes is None:
            raise PackageError(f"{record.path} is missing from {folder}", fix=_AGAIN)
        if size_bytes != record.size_bytes:
            raise PackageError(
                f"{record.path} in {folder} has {size_bytes} bytes",
                expected=f"{record.size_bytes}",
                fix=_AGAIN,
            )
        most_bytes = _MAX_GRAPH_BYTES if record.path.endswith(".onnx") else _MAX_FILE_BYTES
        if check_digest and size_bytes > most_bytes and not record.path.endswith(_WEIGHTS):
            raise PackageError(
                f"{record.path} in {folder} has {size_bytes} bytes", expected=f"at most {most_bytes}", fix=_AGAIN
            )
        if check_digest and sha256_of_file(path) != record.sha256:
            raise PackageError(f"{record.path} in {folder} was changed (SHA-256 differs)", fix=_AGAIN)
    except OSError as error:
        raise PackageError(f"{record.path} in {folder} cannot be read ({error.strerror})", fix=_AGAIN) from error


def _path_inside(folder: Path, relative: str) -> Path:
    """Return ``folder / relative``; refuse a path that leaves the folder, by its name or through a link."""
    parts = PurePosixPath(relative)
    clean = (
        relative not in ("", ".")
        and not parts.is_absolute()
        and ".." not in parts.parts
        and re.search(r"[\\:\x00]", relative) is None
    )
    path = folder / relative
    if not clean or not is_inside(folder, path):
        raise PackageError(
            f"{MANIFEST_FILE} in {folder} lists {relative!r}",
            expected="a path inside the package",
            fix="do not use this package; export it again",
        )
    return path


def check_package_output(output: Path, *, force: bool) -> None:
    """Refuse a folder that a package cannot be written to; see :func:`promprune.files.check_output_folder`."""
    check_output_folder(output, "-o", marker=MANIFEST_FILE, contents="an exported package", force=force, whole=True)


@contextmanager
def writing_package(output: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield an empty folder that becomes ``output`` if the block succeeds; see :mod:`promprune.files`.

    Raises:
        OutputError: ``output`` exists and ``force`` is false, or it exists and is not a package, or it cannot be
            written.
    """
    check_package_output(output, force=force)
    with writing_folder(output, replace=force, fix="choose another output folder, or add --force") as partial:
        yield partial
