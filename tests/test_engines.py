"""The identity of engines, and how they are written and read; TensorRT is not needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import pytest

from promprune.errors import BackendError, ConfigError, OutputError, PackageError
from promprune.package import engines
from promprune.package.engines import (
    ENGINE_FILE,
    EngineConfig,
    EngineIdentity,
    EngineRecord,
    ProfileRecord,
    ShapeRange,
    difference,
    engine_folder,
    graph_digests,
    identity_of,
    parse_target,
    read_engines,
    read_plan,
    write_engine_manifest,
    writing_engines,
)
from promprune.package.manifest import FileRecord, Manifest, TensorRecord, read_manifest
from tests.support.fake_package import write_fake_package

RANGE = ShapeRange(min=(1, 1), opt=(1, 8), max=(1, 16))
OTHER_GRAPHS = dict.fromkeys(("vision_encoder", "embed_tokens", "decoder_model_merged"), "0" * 64)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines") / "package"
    write_fake_package(folder)
    return folder


@pytest.fixture(scope="module")
def manifest(package: Path) -> Manifest:
    return read_manifest(package)


@pytest.fixture
def identity(manifest: Manifest) -> EngineIdentity:
    return identity_of(manifest, EngineConfig(), tool_version="1.7", target="sm89")


def write_folder(folder: Path, identity: EngineIdentity, content: bytes = b"plan") -> None:
    """Write engines as the builder does, with any bytes as the engine."""
    with writing_engines(folder) as partial:
        (partial / "embed_tokens.engine").write_bytes(content)
        record = EngineRecord(
            file="embed_tokens.engine",
            size_bytes=len(content),
            sha256=engines.sha256_of_file(partial / "embed_tokens.engine"),
            inputs=(TensorRecord(name="input_ids", dtype="int64", shape=("batch_size", "sequence_length")),),
            outputs=(),
            profiles=(ProfileRecord(name="any", shapes={"input_ids": RANGE}),),
            build_seconds=0.5,
        )
        write_engine_manifest(partial, identity, {"embed_tokens": record})


@pytest.mark.parametrize("text", ["sm89", "SM89", "sm_89", "8.9", "89", " sm89 "])
def test_a_target_has_one_spelling(text: str) -> None:
    assert parse_target(text) == "sm89"


def test_a_target_of_three_digits_and_the_current_one() -> None:
    assert parse_target("12.0") == "sm120"
    assert parse_target("Current") == "current"


@pytest.mark.parametrize("text", ["", "rtx4090", "sm", "sm8", "8..9", "-89", "sm8900"])
def test_what_is_no_target_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected a compute capability such as sm89"):
        parse_target(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "triton"}, "expected one of tensorrt, tensorrt-rtx"),
        ({"targets": ()}, "received no target"),
        ({"max_batch": 0}, "received max_batch = 0; expected at least 1"),
        ({"max_prompt_tokens": -1}, "received max_prompt_tokens = -1"),
        ({"max_new_tokens": 0}, "received max_new_tokens = 0"),
        ({"workspace_mib": 0}, "received workspace_mib = 0"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**changes)  # type: ignore[arg-type]


def test_the_digest_of_a_graph_covers_its_weights_and_nothing_else(manifest: Manifest) -> None:
    embed = msgspec.structs.replace(manifest.graphs["embed_tokens"], weights=("onnx/embed_tokens.onnx_data",))
    manifest = msgspec.structs.replace(manifest, graphs={**manifest.graphs, "embed_tokens": embed})

    def with_file(path: str, sha256: str) -> dict[str, str]:
        record = FileRecord(path=path, size_bytes=1, sha256=sha256 * 64)
        return graph_digests(msgspec.structs.replace(manifest, files=(*manifest.files, record)))

    plain = graph_digests(manifest)
    assert list(plain) == ["vision_encoder", "embed_tokens", "decoder_model_merged"]
    one, other = with_file("onnx/embed_tokens.onnx_data", "a"), with_file("onnx/embed_tokens.onnx_data", "b")
    assert len({plain["embed_tokens"], one["embed_tokens"], other["embed_tokens"]}) == 3
    assert one["vision_encoder"] == plain["vision_encoder"]
    assert with_file("tokenizer2.json", "a") == plain


def test_equal_identities_do_not_differ(identity: EngineIdentity) -> None:
    assert difference(identity, msgspec.structs.replace(identity)) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"backend": "tensorrt"}, "built by tensorrt, not by tensorrt-rtx"),
        ({"tool_version": "1.6"}, "built by tensorrt-rtx 1.6; this is 1.7"),
        ({"platform": "win32-x86_64"}, "built for win32-x86_64; this is "),
        ({"target": "sm120"}, "built for sm120, not for sm89"),
        ({"graphs": {}}, "built without decoder_model_merged.onnx, which the package has"),
        (
            {"graphs": OTHER_GRAPHS},
            "built from another decoder_model_merged.onnx or other weights than the package has",
        ),
    ],
)
def test_a_difference_is_said_in_words(identity: EngineIdentity, change: dict[str, object], reason: str) -> None:
    found = msgspec.structs.replace(identity, **change)
    assert (difference(found, identity) or "").startswith(reason)
    assert (difference(found, identity, options=False) or "").startswith(reason)


def test_settings_matter_to_a_build_and_not_to_a_run(identity: EngineIdentity) -> None:
    options = msgspec.structs.replace(identity.options, workspace_mib=64)
    found = msgspec.structs.replace(identity, options=options)
    assert difference(found, identity) == "built with workspace_mib = 64, not unlimited"
    assert difference(found, identity, options=False) is None


def test_what_is_written_is_read_back(tmp_path: Path, identity: EngineIdentity) -> None:
    folder = engine_folder(tmp_path, "tensorrt-rtx", "sm89")
    write_folder(folder, identity)
    found = read_engines(folder, check_digests=True)
    assert found.identity == identity
    assert found.engines["embed_tokens"].size_bytes == 4
    assert [path.name for path in folder.parent.iterdir()] == ["tensorrt-rtx-sm89"]


def test_engines_inside_a_package_do_not_disturb_it(tmp_path: Path, identity: EngineIdentity) -> None:
    write_fake_package(tmp_path / "package")
    before = read_manifest(tmp_path / "package")
    write_folder(engine_folder(tmp_path / "package", "tensorrt-rtx", "sm89"), identity)
    assert read_manifest(tmp_path / "package", check_weights=True) == before


def test_no_engines(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match=r"contains no engines .* expected a folder that promprune-build wrote"):
        read_engines(tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "embed_tokens.engine").unlink(), "embed_tokens.engine is missing"),
        (lambda folder: (folder / "embed_tokens.engine").write_bytes(b"p"), "was changed since it was built"),
        (lambda folder: (folder / "embed_tokens.engine").write_bytes(b"pla!"), "was changed since it was built"),
        (lambda folder: (folder / ENGINE_FILE).write_text("{"), "is not a valid engine manifest"),
        (lambda folder: (folder / ENGINE_FILE).write_bytes(b"\xff\xfe"), "is not a valid engine manifest"),
        (lambda folder: (folder / ENGINE_FILE).write_text("[" * 100_000), "is not a valid engine manifest"),
        (lambda folder: edit(folder, schema_version=99), "has schema version 99; expected version 2"),
        (lambda folder: edit(folder, extra=1), "is not a valid engine manifest"),
    ],
)
def test_damage_is_refused(tmp_path: Path, identity: EngineIdentity, damage: object, message: str) -> None:
    write_folder(tmp_path / "engines", identity)
    damage(tmp_path / "engines")  # type: ignore[operator]
    with pytest.raises(PackageError, match=message) as caught:
        read_engines(tmp_path / "engines", check_digests=True)
    assert "promprune-build with --rebuild" in str(caught.value)


@pytest.mark.parametrize("file", ["../embed_tokens.engine", "/etc/passwd", "a/b.engine", "b.engine\x00"])
def test_an_engine_outside_the_folder_is_refused(tmp_path: Path, identity: EngineIdentity, file: str) -> None:
    write_folder(tmp_path / "engines", identity)
    content = json.loads((tmp_path / "engines" / ENGINE_FILE).read_text())
    content["engines"]["embed_tokens"]["file"] = file
    (tmp_path / "engines" / ENGINE_FILE).write_text(json.dumps(content))
    with pytest.raises(PackageError, match="not a valid engine manifest"):
        read_engines(tmp_path / "engines")


@pytest.mark.parametrize(
    ("profiles", "message"),
    [
        ([], "has no profile of embed_tokens.engine; expected at least one"),
        ([{}], r"does not fit its inputs; expected shapes of input_ids\['batch_size', 'sequence_length'\]"),
        ([{"input_ids": RANGE}, {"ids": RANGE}], "a profile 'p1' of embed_tokens.engine that does not fit"),
        ([{"input_ids": RANGE, "ids": RANGE}], "does not fit its inputs"),
        ([{"input_ids": ShapeRange(min=(1, 1), opt=(1, 1), max=(1,))}], "does not fit its inputs"),
        ([{"input_ids": ShapeRange(min=(1,), opt=(1, 1), max=(1, 1))}], "does not fit its inputs"),
        ([{"input_ids": ShapeRange(min=(1, 1), opt=(1, 1, 1), max=(1, 1))}], "does not fit its inputs"),
    ],
)
def test_profiles_are_of_the_inputs(
    tmp_path: Path, identity: EngineIdentity, profiles: list[dict[str, ShapeRange]], message: str
) -> None:
    write_folder(tmp_path, identity)
    record = json.loads((tmp_path / ENGINE_FILE).read_text())["engines"]["embed_tokens"]
    record["profiles"] = [
        {"name": f"p{index}", "shapes": msgspec.to_builtins(shapes)} for index, shapes in enumerate(profiles)
    ]
    edit(tmp_path, engines={"embed_tokens": record})
    with pytest.raises(PackageError, match=message) as caught:
        read_engines(tmp_path)
    assert "promprune-build with --rebuild" in str(caught.value)


def test_an_engine_is_read_as_it_was_built(tmp_path: Path, identity: EngineIdentity) -> None:
    write_folder(tmp_path, identity)
    record = read_engines(tmp_path).engines["embed_tokens"]
    assert read_plan(tmp_path, record) == b"plan"
    (tmp_path / record.file).write_bytes(b"pla!")
    with pytest.raises(PackageError, match=r"was changed since it was built; run promprune-build with --rebuild"):
        read_plan(tmp_path, record)
    (tmp_path / record.file).unlink()
    with pytest.raises(PackageError, match=r"cannot be read \(No such file or directory\)"):
        read_plan(tmp_path, record)


def edit(folder: Path, **changes: object) -> None:
    content = json.loads((folder / ENGINE_FILE).read_text())
    (folder / ENGINE_FILE).write_text(json.dumps(content | changes))


def test_a_failed_build_leaves_the_old_engines(tmp_path: Path, identity: EngineIdentity) -> None:
    folder = tmp_path / "engines" / "tensorrt-rtx-sm89"
    write_folder(folder, identity, b"old")

    def fail() -> None:
        with writing_engines(folder) as partial:
            (partial / "embed_tokens.engine").write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert (folder / "embed_tokens.engine").read_bytes() == b"old"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_what_a_killed_builder_left_is_removed_by_the_next(tmp_path: Path, identity: EngineIdentity) -> None:
    folder = tmp_path / "engines" / "tensorrt-rtx-sm89"
    code = (
        "import os; from pathlib import Path; from promprune.package.engines import writing_engines\n"
        f"with writing_engines(Path({str(folder)!r})): os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    assert len(list(folder.parent.iterdir())) == 1
    write_folder(folder, identity)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_many_writers_of_the_same_engines_leave_one_whole(tmp_path: Path, identity: EngineIdentity) -> None:
    folder = tmp_path / "engines" / "tensorrt-rtx-sm89"
    failures: list[Exception] = []

    def write(number: int) -> None:
        try:
            for _ in range(20):
                write_folder(folder, identity, str(number).encode() * 1000)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    read_engines(folder, check_digests=True)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "engines").write_text("a file")
    with pytest.raises(OutputError, match="cannot be written"), writing_engines(tmp_path / "engines" / "x"):
        pass


@pytest.mark.skipif(os.name != "posix", reason="the name of the driver's library is patched")
def test_no_driver_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(engines.ctypes, "CDLL", missing)
    with pytest.raises(BackendError, match=r"no usable GPU .no NVIDIA driver is installed here"):
        engines.current_target()


class Driver:
    """The three calls of the CUDA driver that tell the compute capability."""

    def __init__(self, error: int = 0) -> None:
        self.error = error

    def cuInit(self, flags: int) -> int:  # noqa: N802  # CUDA's name
        return self.error

    def cuDeviceGet(self, device: object, ordinal: int) -> int:  # noqa: N802
        return 0

    def cuDeviceGetAttribute(self, value: object, attribute: int, device: object) -> int:  # noqa: N802
        value._obj.value = {75: 8, 76: 9}[attribute]  # type: ignore[attr-defined]
        return 0


def test_the_current_target_is_the_drivers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines.ctypes, "CDLL", lambda name: Driver())
    assert engines.current_target() == "sm89"


def test_a_driver_without_a_device_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines.ctypes, "CDLL", lambda name: Driver(error=100))
    with pytest.raises(BackendError, match="the driver finds none, CUDA error 100"):
        engines.current_target()
