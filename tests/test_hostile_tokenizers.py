"""Tokenizers that cost much more than they contain are refused in one line before they are built."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

from promprune.errors import PackageError
from promprune.runtime.engine.tokenizer import read_tokenizer
from tests.support.fake_package import make_tokenizer
from tests.support.meter import report, run_limited

Content = dict[str, Any]


def replace(times: int, pattern: str = "a", content: str = "aa") -> Content:
    part = {"type": "Replace", "pattern": {"String": pattern}, "content": content}
    return {"type": "Sequence", "normalizers": [part] * times}


def nested(depth: int) -> Content:
    part: Content = {"type": "NFC"}
    for _ in range(depth):
        part = {"type": "Sequence", "normalizers": [part]}
    return part


def charsmap(content: bytes) -> Content:
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(content).decode()}


def with_token(**changes: Any) -> Callable[[Content], None]:
    def change(content: Content) -> None:
        content["added_tokens"].append({**content["added_tokens"][0], "id": 300, "content": "<x>", **changes})

    return change


def with_part(name: str, value: Any) -> Callable[[Content], None]:
    return lambda content: content.__setitem__(name, value)


HOSTILE: Final[dict[str, Callable[[Content], None]]] = {
    "normalizers that double the text": with_part("normalizer", replace(60)),
    "a normalizer of a long text": with_part("normalizer", replace(1, content="x" * 5_000_000)),
    "two normalizers that multiply": with_part("normalizer", replace(2, content="x" * 15)),
    "many normalizers": with_part("normalizer", {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 100_000}),
    "nested normalizers": with_part("normalizer", nested(300)),
    "a token of 5 MB": with_token(content="x" * 5_000_000),
    "an id of 2^31": with_token(id=2**31),
    "a negative id": with_token(id=-1),
    "a charsmap of junk": with_part("normalizer", charsmap(b"\xff\xff\xff\x7f" + bytes(100))),
    "a charsmap of long texts": with_part("normalizer", charsmap(bytes(8) + b"x" * 100_000)),
    "no charsmap": with_part("normalizer", {"type": "Precompiled", "precompiled_charsmap": "?"}),
    "a large vocabulary id": lambda content: content["model"]["vocab"].__setitem__("zz", 2**31),
    "a long vocabulary entry": lambda content: content["model"]["vocab"].__setitem__("z" * 10**6, 300),
    "an unknown model": lambda content: content["model"].__setitem__("type", "Other"),
    "an unknown pre-tokenizer": with_part("pre_tokenizer", {"type": "Other"}),
    "a template of many tokens": with_part(
        "post_processor",
        {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}] * 10_000,
            "pair": [],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1] * 10_000, "tokens": ["<s>"] * 10_000}},
        },
    ),
    "no model": lambda content: content.pop("model"),
}


def changed(change: Callable[[Content], None]) -> str:
    content = json.loads(make_tokenizer().to_str())
    change(content)
    return json.dumps(content)


def read(path: Path, text: str) -> str:
    path.write_text(text)
    try:
        tokenizer = read_tokenizer(path)
    except PackageError as error:
        return f"refused: {error}"
    return f"{len(tokenizer.encode('aaaa').ids)} tokens"


def main(folder: str) -> None:
    """Read every tokenizer, and report what it costs; called in a process with limits."""
    path = Path(folder, "tokenizer.json")
    read(path, changed(lambda content: None))  # imports
    jobs = [(name, changed(change)) for name, change in HOSTILE.items()]
    jobs += [("deep", "[" * 100_000), ("not JSON", "\xff"), ("a number", "1")]
    report((name, lambda text=text: read(path, text)) for name, text in jobs)  # type: ignore[misc]


@pytest.mark.skipif(sys.platform != "linux", reason="limits and peak memory are read from Linux")
def test_hostile_tokenizers_are_refused(tmp_path: Path) -> None:
    costs, stderr = run_limited("tests.test_hostile_tokenizers", str(tmp_path), cpu_seconds=60, memory_mb=3000)
    assert stderr == ""
    assert len(costs) == len(HOSTILE) + 3
    for cost in costs:
        assert cost["outcome"].startswith("done: refused: "), cost
        assert "\n" not in cost["outcome"], cost
        assert cost["seconds"] < 2, cost
        assert cost["megabytes"] < 200, cost


@pytest.mark.parametrize("normalizer", [None, replace(2, " ", "\u2581"), {"type": "Prepend", "prepend": "\u2581"}])
def test_normalizers_of_published_models_are_read(tmp_path: Path, normalizer: Content | None) -> None:
    assert "tokens" in read(tmp_path / "tokenizer.json", changed(with_part("normalizer", normalizer)))


def test_a_large_file_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "tokenizer.json").open("wb") as stream:
        stream.truncate(10**11)
    with pytest.raises(PackageError, match="100000000000 bytes, more than"):
        read_tokenizer(tmp_path / "tokenizer.json")


if __name__ == "__main__":
    main(*sys.argv[1:])
