"""Reading the tokenizer of a package; files that cost much more than they contain are refused before it is built.

The library builds a tokenizer in compiled code, which cannot be interrupted and which ends the process when it runs out
of memory. So the file is parsed here first: only known parts, of limited sizes.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from promprune.errors import PackageError
from promprune.package.contents import read_content

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["read_tokenizer"]

_FIX: Final = "copy the package again, or export it again"
_MAX_BYTES: Final = 64 * 1024 * 1024  # the largest published ones have some 35 MB
_MAX_ID: Final = 4_000_000  # the library makes tables of this size; the largest published vocabularies have 260,000
_MAX_TOKEN: Final = 2048  # characters; published tokens of many spaces have some 500
_MAX_ADDED_TOKENS: Final = 20_000
_MAX_PARTS: Final = 32  # steps in all sequences of normalizers, pre-tokenizers, decoders and postprocessors
_MAX_PATTERN: Final = 2048  # characters of a pattern, or of a text that replaces one
_MAX_GROWTH: Final = 16  # how many times longer all replacements of a part together may make the text
_MAX_TEMPLATE: Final = 64  # tokens that a postprocessor adds

_MODELS: Final = ("BPE", "Unigram", "WordPiece", "WordLevel")
_PARTS: Final[Mapping[str, frozenset[str]]] = {
    "normalizer": frozenset(
        ("BertNormalizer", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Precompiled", "Prepend", "Replace",
         "Sequence", "Strip", "StripAccents")
    ),
    "pre_tokenizer": frozenset(
        ("BertPreTokenizer", "ByteLevel", "CharDelimiterSplit", "Digits", "FixedLength", "Metaspace", "Punctuation",
         "Sequence", "Split", "UnicodeScripts", "Whitespace", "WhitespaceSplit")
    ),
    "post_processor": frozenset(
        ("BertProcessing", "ByteLevel", "RobertaProcessing", "Sequence", "TemplateProcessing")
    ),
    "decoder": frozenset(
        ("BPEDecoder", "ByteFallback", "ByteLevel", "Fuse", "Metaspace", "Replace", "Sequence", "Strip", "WordPiece")
    ),
}  # fmt: skip
_MAX_MAPPED_BYTES: Final = 64  # that a charsmap replaces a character by; the longest of NFKC has 54


def read_tokenizer(path: Path) -> Tokenizer:
    """Read a ``tokenizer.json``.

    Raises:
        PackageError: it cannot be read, or has parts or sizes that no published tokenizer has.
        BaseException: the library refuses it.
    """
    from tokenizers import Tokenizer

    content = read_content(path, most_bytes=_MAX_BYTES, fix=_FIX)
    try:
        parsed = msgspec.json.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise PackageError(f"{path} is not a usable tokenizer ({error})", fix=_FIX) from error
    if (obstacle := _obstacle(parsed)) is not None:
        raise PackageError(
            f"{path} is not a usable tokenizer (it has {obstacle})",
            expected="one like those of published models",
            fix=_FIX,
        )
    del parsed
    return Tokenizer.from_buffer(content)


def _obstacle(parsed: Any) -> str | None:
    """Return what makes a tokenizer expensive or unknown; None if nothing does."""
    if not isinstance(parsed, dict) or not isinstance(parsed.get("model"), dict):
        return "no model"
    return next((found for check in (_in_model, _in_added_tokens, _in_parts) for found in check(parsed)), None)


def _in_model(parsed: Mapping[str, Any]) -> Iterator[str]:
    model = parsed["model"]
    kind, vocabulary = model.get("type"), model.get("vocab")
    if kind is not None and kind not in _MODELS:
        yield f"a model of type {str(kind)[:50]!r}"
    if isinstance(vocabulary, dict):
        if any(not isinstance(token, int) or not 0 <= token <= _MAX_ID for token in vocabulary.values()):
            yield f"a token id that is not in 0 ... {_MAX_ID}"
        texts: Any = vocabulary
    else:
        texts = (entry[0] for entry in vocabulary if isinstance(entry, list) and entry) if vocabulary else ()
    if any(isinstance(text, str) and len(text) > _MAX_TOKEN for text in texts):
        yield f"a token of more than {_MAX_TOKEN} characters"


def _in_added_tokens(parsed: Mapping[str, Any]) -> Iterator[str]:
    added = parsed.get("added_tokens") or []
    if not isinstance(added, list) or len(added) > _MAX_ADDED_TOKENS:
        yield f"more than {_MAX_ADDED_TOKENS} added tokens"
        return
    for token in added:
        if not isinstance(token, dict) or not isinstance(token.get("content"), str):
            yield "an added token without content"
        elif len(token["content"]) > _MAX_TOKEN:
            yield f"an added token of {len(token['content'])} characters"
        elif not isinstance(token.get("id"), int) or not 0 <= token["id"] <= _MAX_ID:
            yield f"an added token whose id is not in 0 ... {_MAX_ID}"


def _in_parts(parsed: Mapping[str, Any]) -> Iterator[str]:
    for name, known in _PARTS.items():
        parts = list(_flat(parsed.get(name), _MAX_PARTS + 1))
        if len(parts) > _MAX_PARTS:
            yield f"a {name} of more than {_MAX_PARTS} parts"
        for part in parts:
            if part.get("type") not in known:
                yield f"a {name} of type {str(part.get('type'))[:50]!r}"
            yield from _in_part(name, part)
        growth = math.prod(_growth(part) for part in parts)
        if growth > _MAX_GROWTH:
            yield f"a {name} that makes the text {growth} times as long"


def _flat(part: Any, most: int) -> Iterator[dict[str, Any]]:
    """Yield the parts of nested sequences, at most ``most``."""
    pending, count = [part], 0
    while pending and count < most:
        one = pending.pop()
        if isinstance(one, dict):
            count += 1
            yield one
            for key in ("normalizers", "pretokenizers", "processors", "decoders"):
                inner = one.get(key)
                pending += inner if isinstance(inner, list) else []


def _in_part(name: str, part: Mapping[str, Any]) -> Iterator[str]:
    for key in ("pattern", "content", "prepend", "replacement", "prefix", "suffix"):
        text = _text(part.get(key))
        if len(text) > _MAX_PATTERN:
            yield f"a {name} with a {key} of {len(text)} characters"
    if part.get("type") == "Precompiled" and not _is_charsmap(part.get("precompiled_charsmap")):
        yield f"a {name} whose charsmap is damaged"
    for key in ("single", "pair", "special_tokens"):
        entries = part.get(key) or ()
        listed = entries.values() if isinstance(entries, dict) else entries
        ids = [entry["ids"] for entry in listed if isinstance(entry, dict) and isinstance(entry.get("ids"), list)]
        if len(entries) > _MAX_TEMPLATE or any(len(some) > _MAX_TEMPLATE for some in ids):
            yield f"a {name} that adds more than {_MAX_TEMPLATE} tokens"


def _is_charsmap(charsmap: object) -> bool:
    """Return whether a charsmap of SentencePiece is whole: the size of its trie, the trie, and the replacements."""
    try:
        content = base64.b64decode(charsmap, validate=True) if isinstance(charsmap, str) else b""
    except ValueError:
        return False
    size = int.from_bytes(content[:4], "little")
    replacements = content[4 + size :].split(b"\0")
    return len(content) > 4 + size and size % 4 == 0 and max(map(len, replacements)) <= _MAX_MAPPED_BYTES


def _text(value: Any) -> str:
    """Return a text, or the one in ``{"String": TEXT}`` and ``{"Regex": TEXT}``."""
    if isinstance(value, dict):
        value = next((text for text in value.values() if isinstance(text, str)), "")
    return value if isinstance(value, str) else ""


def _growth(part: Mapping[str, Any]) -> int:
    """Return how many times longer a part can make the text; a pattern may match as little as one character."""
    if part.get("type") != "Replace":
        return 1
    pattern = part.get("pattern")
    matched = max(1, len(_text(pattern))) if isinstance(pattern, dict) and "String" in pattern else 1
    return max(1, math.ceil(len(_text(part.get("content"))) / matched))
