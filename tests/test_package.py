"""The package on disk: it is written atomically, and checked when it is read."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from promprune.errors import OutputError, PackageError
from promprune.export import ExportResult
from promprune.package.manifest import MANIFEST_FILE, read_manifest, writing_package


@pytest.fixture
def package(tiny_export: ExportResult, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_export.output, tmp_path / "package"))


def change_manifest(package: Path, **changes: Any) -> None:
    path = package / MANIFEST_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_package_reads_back_as_written(tiny_export: ExportResult) -> None:
    assert read_manifest(tiny_export.output, check_weights=True) == tiny_export.manifest


def test_the_manifest_lists_every_file(tiny_export: ExportResult) -> None:
    on_disk = {
        path.relative_to(tiny_export.output).as_posix() for path in tiny_export.output.rglob("*") if path.is_file()
    }
    later = {name for name in on_disk if name.startswith("engines/")}  # written for a device, and can be deleted
    assert {file.path for file in tiny_export.manifest.files} == on_disk - later - {MANIFEST_FILE}


@pytest.mark.parametrize("file", ["tokenizer.json", "onnx/vision_encoder.onnx", "onnx/decoder_model_merged.onnx_data"])
def test_a_missing_file_is_named(package: Path, file: str) -> None:
    (package / file).unlink()
    with pytest.raises(PackageError, match=f"{file} is missing"):
        read_manifest(package)


@pytest.mark.parametrize("file", ["tokenizer.json", "onnx/embed_tokens.onnx"])
def test_a_changed_byte_is_noticed(package: Path, file: str) -> None:
    content = bytearray((package / file).read_bytes())
    content[len(content) // 2] ^= 1
    (package / file).write_bytes(content)
    with pytest.raises(PackageError, match=f"{file} .*was changed"):
        read_manifest(package)


def test_changed_weights_are_noticed_by_size_and_on_request_by_digest(package: Path) -> None:
    weights = package / "onnx/embed_tokens.onnx_data"
    content = bytearray(weights.read_bytes())
    content[0] ^= 1
    weights.write_bytes(content)
    read_manifest(package)
    with pytest.raises(PackageError, match="was changed"):
        read_manifest(package, check_weights=True)
    weights.write_bytes(content[:-1])
    with pytest.raises(PackageError, match="bytes; expected"):
        read_manifest(package)


@pytest.mark.parametrize("path", ["../secret", "/etc/hostname", "onnx/../../secret", "", ".", "a\\b", "C:x", "a\x00b"])
def test_a_path_out_of_the_package_is_refused(package: Path, path: str) -> None:
    (package.parent / "secret").write_text("x")
    files = json.loads((package / MANIFEST_FILE).read_text())["files"]
    change_manifest(package, files=[*files, {"path": path, "size_bytes": 1, "sha256": "0" * 64}])
    with pytest.raises(PackageError, match="inside the package"):
        read_manifest(package)


def test_a_link_out_of_the_package_is_refused(package: Path) -> None:
    shutil.copy(package / "tokenizer.json", package.parent / "outside.json")
    (package / "tokenizer.json").unlink()
    (package / "tokenizer.json").symlink_to(package.parent / "outside.json")
    with pytest.raises(PackageError, match="inside the package"):
        read_manifest(package)


@pytest.mark.parametrize("file", ["config.json", "onnx/embed_tokens.onnx"])
def test_a_link_to_itself_is_refused(package: Path, file: str) -> None:
    (package / file).unlink()
    (package / file).symlink_to((package / file).name)
    with pytest.raises(PackageError, match=f"{file}.*; "):
        read_manifest(package)


def test_another_schema_version_is_refused(package: Path) -> None:
    change_manifest(package, schema_version=99)
    with pytest.raises(PackageError, match="schema version 99; expected version 2; export"):
        read_manifest(package)


FIRST_SCHEMA = {
    "schema_version": 1,
    "dtype": "fp16",
    "source": {"model": "my llava", "revision": None},
    "selection": {
        "num_tokens": 576,
        "keep_tokens": 69,
        "requested_ratio": 0.12,
        "mu": 0.3,
        "tau": 0.02,
        "parameters_from": "model",
        "order": "spatial",
    },
    "image": {"layout": {"kind": "crop"}},
}


@pytest.mark.parametrize(
    ("changes", "command"),
    [
        ({}, "promprune-export 'my llava' --ratio 0.12 --dtype fp16"),
        ({"dtype": "fp32", "source": {"model": "embedded"}}, "promprune-export --ratio 0.12"),
        (
            {"selection": {**FIRST_SCHEMA["selection"], "requested_ratio": None, "policy": "half"}},  # type: ignore[dict-item]
            "promprune-export 'my llava' --keep-tokens 69 --dtype fp16 --policy half",
        ),
        (
            {"selection": {**FIRST_SCHEMA["selection"], "parameters_from": "command line"}},  # type: ignore[dict-item]
            "promprune-export 'my llava' --ratio 0.12 --dtype fp16 --mu 0.3 --tau 0.02",
        ),
        (
            {"image": {"layout": {"kind": "grid", "grids": [{"rows": 24, "columns": 18}, {"rows": 8, "columns": 8}]}}},
            "promprune-export 'my llava' --ratio 0.12 --dtype fp16 --image-grid 24x18,8x8",
        ),
        ({"selection": None}, "promprune-export"),
    ],
)
def test_the_first_schema_is_refused_with_the_command_that_exports_again(
    changes: dict[str, Any], command: str, tmp_path: Path
) -> None:
    (tmp_path / MANIFEST_FILE).write_text(json.dumps({**FIRST_SCHEMA, **changes}))
    with pytest.raises(PackageError) as caught:
        read_manifest(tmp_path)
    assert str(caught.value).endswith(f"has schema version 1; expected version 2; export the package again: {command}")


def test_a_manifest_that_keeps_more_tokens_than_there_are_is_refused(package: Path) -> None:
    graphs = json.loads((package / MANIFEST_FILE).read_text())["graphs"]
    graphs["vision_encoder"]["tokens"] = {"num_tokens": 4, "keep_tokens": 5}
    change_manifest(package, graphs=graphs)
    with pytest.raises(PackageError, match="keep_tokens = 5 of num_tokens = 4"):
        read_manifest(package)
    graphs["vision_encoder"]["tokens"] = None
    change_manifest(package, graphs=graphs)
    with pytest.raises(PackageError, match="no vision graph 'vision_encoder' with its N and T"):
        read_manifest(package)


def test_an_unknown_key_is_refused(package: Path) -> None:
    change_manifest(package, surprise=1)
    with pytest.raises(PackageError, match="surprise"):
        read_manifest(package)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"schema_version": 2}', b"\xff\xfe", b"[" * 100_000])
def test_a_broken_manifest_is_refused(package: Path, content: bytes) -> None:
    (package / MANIFEST_FILE).write_bytes(content)
    with pytest.raises(PackageError, match="not a valid manifest"):
        read_manifest(package)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_mutated_manifest_is_read_or_refused_never_worse(
    tiny_export: ExportResult, tmp_path: Path, data: Any
) -> None:
    content = msgspec.to_builtins(tiny_export.manifest)
    where: Any = content
    while True:
        keys = sorted(where) if isinstance(where, dict) else list(range(len(where)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(where[key], (dict, list)) or not where[key] or data.draw(st.booleans()):
            break
        where = where[key]
    where[key] = data.draw(JSON)
    folder = tmp_path / "mutated"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(tiny_export.output, folder)
    (folder / MANIFEST_FILE).unlink()
    (folder / MANIFEST_FILE).write_text(json.dumps(content))
    try:
        manifest = read_manifest(folder)
    except PackageError:
        pass
    else:
        assert {file.path for file in manifest.files} <= {file.path for file in tiny_export.manifest.files}


def test_a_package_appears_only_when_the_block_succeeds(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "out"

    def fail_half_way() -> None:
        with writing_package(output) as folder:
            (folder / MANIFEST_FILE).write_text("{}")
            assert not output.exists()
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail_half_way()
    assert list(output.parent.iterdir()) == []
    with writing_package(output) as folder:
        (folder / MANIFEST_FILE).write_text("{}")
    assert [path.name for path in output.parent.iterdir()] == ["out"]


def test_an_existing_output_is_kept_without_force_and_replaced_with_it(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with writing_package(output) as folder:
        (folder / MANIFEST_FILE).write_text("old")
    with pytest.raises(OutputError, match=r"already exists.*--force"), writing_package(output):
        pass
    with writing_package(output, force=True) as folder:
        (folder / MANIFEST_FILE).write_text("new")
    assert (output / MANIFEST_FILE).read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_force_never_replaces_what_is_no_package(tmp_path: Path) -> None:
    precious = tmp_path / "photos"
    precious.mkdir()
    (precious / "holiday.jpg").write_text("x")
    with pytest.raises(OutputError, match="not an exported package"), writing_package(precious, force=True):
        pass
    assert (precious / "holiday.jpg").read_text() == "x"


def test_a_full_disk_is_one_clear_error_and_leaves_nothing(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with (
        pytest.raises(OutputError, match=r"No space left on device\); free space there"),
        writing_package(tmp_path / "out"),
    ):
        raise full
    assert list(tmp_path.iterdir()) == []


KILLED = """
import sys, time
from pathlib import Path
from promprune.package.manifest import writing_package
with writing_package(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("x")
    print("writing", flush=True)
    time.sleep(60)
"""


def test_what_a_killed_writer_leaves_is_removed_by_the_next(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with subprocess.Popen([sys.executable, "-c", KILLED, str(output)], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "writing\n"
        writer.send_signal(signal.SIGKILL)
    assert not output.exists()
    assert len(list(tmp_path.iterdir())) == 1
    with writing_package(output) as folder:
        (folder / MANIFEST_FILE).write_text("{}")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


REPLACING = """
import sys
from pathlib import Path
from promprune.package.manifest import MANIFEST_FILE, writing_package
for number in range(150):
    with writing_package(Path(sys.argv[1]), force=True) as folder:
        (folder / MANIFEST_FILE).write_text("{}")
        for name in "abc":
            (folder / name).write_text(sys.argv[2])
"""


def test_two_writers_that_replace_one_package_leave_one_of_them_whole(tmp_path: Path) -> None:
    output = tmp_path / "out"
    writers = [
        subprocess.Popen([sys.executable, "-c", REPLACING, str(output), name], stderr=subprocess.PIPE, text=True)
        for name in ("first", "second")
    ]
    outcomes = [writer.communicate(timeout=60)[1] for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0], outcomes
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert len({(output / name).read_text() for name in "abc"}) == 1


def test_a_package_that_another_process_wrote_meanwhile_is_kept(tmp_path: Path) -> None:
    output = tmp_path / "out"

    def write_twice() -> None:
        with writing_package(output) as folder:
            (folder / MANIFEST_FILE).write_text("late")
            with writing_package(output) as other:
                (other / MANIFEST_FILE).write_text("early")

    with pytest.raises(OutputError, match="was written by another process meanwhile"):
        write_twice()
    assert (output / MANIFEST_FILE).read_text() == "early"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
