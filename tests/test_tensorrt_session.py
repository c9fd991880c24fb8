"""The TensorRT session on a recording fake of the thin CUDA layer, whose engines are computed by ONNX Runtime.

The fake keeps device memory apart from host memory, and refuses addresses that are not allocated. What TensorRT
itself does on a GPU is not tested here.
"""

from __future__ import annotations

import gc
import importlib.util
import re
import shutil
import sys
import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import onnxruntime as ort
import pytest
from PIL import Image

from promprune.errors import BackendError, MissingDependencyError, PackageError
from promprune.export.engine import build_engines, profiles_of
from promprune.package.engines import (
    EngineConfig,
    EngineRecord,
    current_target,
    engine_folder,
    identity_of,
    read_engines,
    write_engine_manifest,
    writing_engines,
)
from promprune.package.manifest import DECODER, TensorRecord, read_manifest, sha256_of_file
from promprune.package.package import read_package
from promprune.runtime import VisionLanguagePipeline
from promprune.runtime.engine import cache as cache_module
from promprune.runtime.engine.cache import KVCache
from promprune.runtime.engine.decoder import Decoder
from promprune.runtime.images.encoded import EncodedImage
from promprune.runtime.sessions import RowCopy, Session, open_file, open_session
from promprune.runtime.sessions.config import RuntimeConfig
from promprune.runtime.sessions.onnxruntime import tensor_record
from promprune.runtime.sessions.tensorrt import cuda as cuda_module
from promprune.runtime.sessions.tensorrt import lookup as lookup_module
from promprune.runtime.sessions.tensorrt import session as module
from promprune.runtime.sessions.tensorrt.cuda import CudaDevice
from promprune.runtime.sessions.tensorrt.device import Pitched
from promprune.runtime.sessions.tensorrt.lookup import choose_profile, find_engines
from promprune.runtime.sessions.tensorrt.session import TensorRtSession
from tests.support.fake_package import HIDDEN, FakeModel, write_fake_package

TARGET = "sm89"
CONFIG = EngineConfig(max_prompt_tokens=40, max_new_tokens=20, max_batch=2, decode_profile=True)
TOOL = SimpleNamespace(__name__="tensorrt_rtx", __version__="1.7")


class FakeEngine:
    """An ONNX graph that is run on the fake's memory."""

    def __init__(self, device: FakeDevice, path: str) -> None:
        self.device = device
        self.session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.inputs = tuple(tensor_record(node, Path(path)) for node in self.session.get_inputs())
        self.outputs = tuple(tensor_record(node, Path(path)) for node in self.session.get_outputs())

    def context(self, *, recorded: bool = False) -> FakeContext:
        self.device.calls["recorded context" if recorded else "context"] += 1
        return FakeContext(self)

    def close(self) -> None:
        self.device.calls["close"] += 1


class FakeContext:
    """Remembers the profile of every change of shapes."""

    def __init__(self, engine: FakeEngine) -> None:
        self.device, self.session = engine.device, engine.session
        self.dtypes = {tensor.name: tensor.dtype for tensor in (*engine.inputs, *engine.outputs)}
        self.shapes: dict[str, tuple[int, ...]] = {}

    def prepare(self, profile: int, inputs: Mapping[str, tuple[int, ...]]) -> Mapping[str, tuple[int, ...]]:
        self.device.profiles.append(profile)
        blank = {name: np.zeros(shape, self.dtypes[name]) for name, shape in inputs.items()}
        outputs = self.session.run(None, blank)
        found = {node.name: value.shape for node, value in zip(self.session.get_outputs(), outputs, strict=True)}
        self.shapes = {**inputs, **found}
        return found

    def enqueue(self, addresses: Mapping[str, int]) -> None:
        assert addresses.keys() == self.shapes.keys()
        inputs = {
            n.name: self.device.array(addresses[n.name], self.shapes[n.name], self.dtypes[n.name])
            for n in self.session.get_inputs()
        }
        for node, value in zip(self.session.get_outputs(), self.session.run(None, inputs), strict=True):
            self.device.array(addresses[node.name], value.shape, str(value.dtype))[...] = value
        self.device.calls["enqueue"] += 1

    def capture(self, addresses: Mapping[str, int]) -> FakeGraph | None:
        if self.device.refuses_capture:
            raise BackendError("cudaStreamEndCapture failed on the GPU (cudaErrorStreamCaptureUnsupported)")
        self.device.calls["capture"] += 1
        return FakeGraph(self, dict(addresses)) if self.device.captures else None

    def layer_times(self, addresses: Mapping[str, int]) -> list[tuple[str, float]]:
        self.enqueue(addresses)
        return [("first", 1.0 + self.device.calls["enqueue"]), ("second", 0.5)]


class FakeGraph:
    """Runs a context at the addresses it was recorded with; as with TensorRT, of no use once its shapes changed."""

    def __init__(self, context: FakeContext, addresses: dict[str, int]) -> None:
        self.context, self.shapes, self.addresses = context, context.shapes, addresses

    def launch(self) -> None:
        assert self.context.shapes is self.shapes
        self.context.enqueue(self.addresses)
        self.context.device.calls["launch"] += 1


class FakeDevice:
    """Memory by address, and counts of its operations.

    It is host memory at its real addresses, so that other libraries can look at it.
    """

    captures = True
    refuses_capture = False

    def __init__(self) -> None:
        self.runtime_caches: list[Path] = []
        self.memory: dict[int, np.ndarray] = {}
        self.calls: Counter[str] = Counter()
        self.profiles: list[int] = []
        self.downloaded = 0
        self.uploaded = 0
        self.pending: list[tuple[np.ndarray, np.ndarray]] = []
        self.lock = threading.Lock()

    def load(self, plan: bytes, trt: Any, runtime_cache: Path) -> FakeEngine:
        assert trt is TOOL
        self.runtime_caches.append(runtime_cache)
        return FakeEngine(self, plan.decode())

    def allocate(self, nbytes: int) -> int:
        assert nbytes > 0
        with self.lock:
            memory = np.full(nbytes, 0xFF, np.uint8)  # NaN, as floating-point numbers
            address = memory.ctypes.data
            assert address not in self.memory
            self.memory[address] = memory
            self.calls["allocate"] += 1
            return address

    def free(self, address: int) -> None:
        del self.memory[address]

    def upload(self, array: np.ndarray, address: int) -> None:
        assert array.flags.c_contiguous
        self.memory[address][: array.nbytes] = np.frombuffer(array.tobytes(), np.uint8)
        self.uploaded += array.nbytes
        self.calls["upload"] += 1

    def download(self, address: int, array: np.ndarray) -> None:
        content = self.memory[address][: array.nbytes].copy()
        self.pending.append((content, array))
        self.downloaded += array.nbytes
        self.calls["download"] += 1

    def clear(self, address: int, nbytes: int) -> None:
        self.bytes_at(address, nbytes)[:] = 0

    def copy(self, source: Pitched, target: Pitched, width: int, height: int) -> None:
        assert 0 < width <= min(source.pitch, target.pitch)
        assert height > 0
        for row in range(height):
            content = self.bytes_at(source.address + row * source.pitch, width)
            self.bytes_at(target.address + row * target.pitch, width)[:] = content
        self.calls["copy"] += 1

    def bytes_at(self, address: int, nbytes: int) -> np.ndarray:
        """Memory that begins anywhere, but lies inside one allocation."""
        for base, memory in self.memory.items():
            if base <= address and address + nbytes <= base + memory.nbytes:
                return memory[address - base : address - base + nbytes]
        raise AssertionError(f"{nbytes} bytes at {address} are not allocated")

    def synchronize(self) -> None:
        with self.lock:
            pending, self.pending = self.pending, []
        for content, array in pending:  # only now: a host array is not complete before
            array[...] = content.view(array.dtype).reshape(array.shape)

    def array(self, address: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        count = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return self.memory[address][:count].view(dtype).reshape(shape)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package with engines whose "plan" is the path of the graph that the fake computes; not to be changed."""
    package = tmp_path_factory.mktemp("packages") / "package"
    write_fake_package(package)
    add_engines(package)
    return package


def add_engines(package: Path, *, backend: str = "tensorrt-rtx", **changes: Any) -> None:
    manifest = read_manifest(package)
    config = EngineConfig(**{**vars(CONFIG), "backend": backend})
    settings = {"tool_version": TOOL.__version__, "target": TARGET, **changes}
    with writing_engines(engine_folder(package, backend, TARGET)) as folder:
        records = {}
        for name, graph in manifest.graphs.items():
            file = folder / f"{name}.engine"
            file.write_text(str(package / graph.file))
            records[name] = EngineRecord(
                file=file.name,
                size_bytes=file.stat().st_size,
                sha256=sha256_of_file(file),
                inputs=graph.inputs,
                outputs=graph.outputs,
                profiles=profiles_of(name, manifest, config),
                build_seconds=0,
            )
        write_engine_manifest(folder, identity_of(manifest, config, **settings), records)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    """The fake in the place of the CUDA device, and a stub in the place of the TensorRT module's version."""
    fake = FakeDevice()
    monkeypatch.setattr(module, "_shared_device", lambda: fake)
    monkeypatch.setattr(module, "current_target", lambda: TARGET)
    for user in (module, lookup_module):
        monkeypatch.setattr(user, "load_tensorrt", lambda backend: TOOL)
    return fake


def opened(package: Path, name: str) -> TensorRtSession:
    return open_engine(package, name)


def open_engine(package: Path, name: str, **options: Any) -> TensorRtSession:
    session = open_session(read_package(package), name, RuntimeConfig(backend="tensorrt", **options))
    assert isinstance(session, TensorRtSession)
    return session


def in_onnx_runtime(package: Path, name: str) -> Session:
    return open_file(package / "onnx" / f"{name}.onnx", RuntimeConfig(provider="cpu"))


def test_a_session_answers_as_onnx_runtime_does(built: Path, device: FakeDevice) -> None:
    pixels = np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32)
    with opened(built, "vision_encoder") as session, in_onnx_runtime(built, "vision_encoder") as reference:
        found, expected = session.run({"pixel_values": pixels}), reference.run({"pixel_values": pixels})
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value)
    assert device.memory == {}


def test_a_decoder_generates_as_with_onnx_runtime_and_its_cache_stays_on_the_device(
    built: Path, device: FakeDevice
) -> None:
    random = np.random.default_rng(1)
    parts = [random.normal(size=(2, length, HIDDEN)).astype(np.float32) for length in (7, 1, 1, 3, 1)]
    with opened(built, DECODER) as session, in_onnx_runtime(built, DECODER) as reference:
        decoder, wanted = Decoder(session), Decoder(reference)
        cache, expected_cache = decoder.caches.empty(2), wanted.caches.empty(2)
        for part in parts:
            logits, cache = decoder.forward(part, cache)
            expected, expected_cache = wanted.forward(part, expected_cache)
            np.testing.assert_array_equal(logits, expected)
        assert device.profiles == [0, 1, 1, 0, 1]  # prefill, decode; a prompt that goes on is a prefill
        logits_bytes = len(parts) * logits.nbytes
        assert device.downloaded == logits_bytes
        for name, tensor in cache.tensors.items():
            np.testing.assert_array_equal(tensor.numpy(), expected_cache.tensors[name].numpy())  # type: ignore[union-attr]
        assert len(device.memory) == 2 * len(cache.tensors)  # a double buffer for each
    del cache, tensor
    gc.collect()
    assert device.memory == {}


def test_a_whole_pipeline_runs_on_engines(built: Path, device: FakeDevice) -> None:
    image = Image.fromarray(np.random.default_rng(2).integers(0, 255, (32, 32, 3), np.uint8))
    with VisionLanguagePipeline.from_package(built, provider="cpu") as pipeline:
        expected = pipeline.generate([image], "what is it?", max_new_tokens=6)
    with VisionLanguagePipeline.from_package(built, backend="tensorrt") as pipeline:
        result = pipeline.generate([image], "what is it?", max_new_tokens=6)
    assert result.text == expected.text
    np.testing.assert_array_equal(result.selection[0].token_indices, expected.selection[0].token_indices)
    assert device.calls["enqueue"] > 3
    assert set(device.profiles) == {0, 1}


def test_a_kept_output_feeds_the_next_engine_without_the_host(built: Path, device: FakeDevice) -> None:
    ids = np.array([[1, 5, 9]])
    with opened(built, "embed_tokens") as embed, opened(built, DECODER) as decoder:
        embeds = embed.run_keeping({"input_ids": ids}, keep=["inputs_embeds"])["inputs_embeds"]
        assert device.downloaded == 0
        uploads = device.calls["upload"]
        cache = Decoder(decoder).caches.empty(1)
        decoder.run_keeping(
            {"inputs_embeds": embeds, "attention_mask": np.ones((1, 3), np.int64), "position_ids": np.arange(3)[None]}
            | dict(cache.tensors),
            keep=["present.0.key", "present.0.value"],
        )
    assert device.calls["upload"] == uploads + 2  # mask and positions; an empty cache has nothing to copy


def test_a_tensor_is_fetched_once(built: Path, device: FakeDevice) -> None:
    with opened(built, "embed_tokens") as session:
        tensor = session.run_keeping({"input_ids": np.array([[3, 4]])}, keep=["inputs_embeds"])["inputs_embeds"]
        first = tensor.numpy()
        assert tensor.numpy() is first
    assert device.calls["download"] == 1
    np.testing.assert_array_equal(first[0], FakeModel().weights["embed"][[3, 4]])


def test_an_array_that_is_not_contiguous(built: Path, device: FakeDevice) -> None:
    del device
    ids = np.array([[1, 7, 2, 9], [3, 8, 4, 6]])[:, ::2]
    with opened(built, "embed_tokens") as session:
        np.testing.assert_array_equal(
            session.run({"input_ids": ids})["inputs_embeds"], FakeModel().weights["embed"][ids]
        )


def test_a_cache_that_grows_lives_in_two_buffers_in_turn(built: Path, device: FakeDevice) -> None:
    with opened(built, DECODER) as session:
        decoder = Decoder(session)
        _, cache = decoder.forward(np.ones((1, 5, HIDDEN), np.float32), decoder.caches.empty(1))
        places, sizes = [], set()
        for _ in range(8):
            _, cache = decoder.forward(np.ones((1, 1, HIDDEN), np.float32), cache)
            tensor = cache.tensors["past_key_values.0.key"]
            places.append(tensor.address)  # type: ignore[union-attr]
            sizes.add(device.memory[places[-1]].nbytes)
    assert len(set(places)) == 2
    assert places[::2] == [places[0]] * 4
    assert sizes == {2 * 64 * HIDDEN * 4}  # the largest batch and length that the engine was built for


def test_an_older_cache_is_never_overwritten(built: Path, device: FakeDevice) -> None:
    """A conversation may go on from an older cache when a turn fails."""
    step = np.random.default_rng(3).normal(size=(5, 1, 1, HIDDEN)).astype(np.float32)
    with opened(built, DECODER) as session:
        decoder = Decoder(session)
        _, kept = decoder.forward(np.ones((1, 5, HIDDEN), np.float32), decoder.caches.empty(1))
        tensor: Any = kept.tensors["past_key_values.0.key"]
        before = device.array(tensor.address, tensor.shape, tensor.dtype).copy()
        first = [decoder.forward(step[0], kept)[0]]
        cache = kept
        for part in step:
            _, cache = decoder.forward(part, cache)
        np.testing.assert_array_equal(device.array(tensor.address, tensor.shape, tensor.dtype), before)
        first.append(decoder.forward(step[0], kept)[0])
        np.testing.assert_array_equal(*first)


def images_of(seed: int, batch: int = 1) -> dict[str, np.ndarray]:
    return {"pixel_values": np.random.default_rng(seed).normal(size=(batch, 3, 32, 32)).astype(np.float32)}


@pytest.mark.parametrize("captures", [True, False], ids=["recorded here", "recorded by the engine"])
def test_a_graph_of_static_shapes_is_replayed(built: Path, device: FakeDevice, captures: bool) -> None:
    device.captures = captures
    with (
        open_engine(built, "vision_encoder", cuda_graphs=True) as session,
        in_onnx_runtime(built, "vision_encoder") as reference,
    ):
        allocated = []
        for seed, batch in enumerate((1, 1, 2, 1, 2, 1)):
            found, expected = session.run(images_of(seed, batch)), reference.run(images_of(seed, batch))
            for name, value in expected.items():
                np.testing.assert_array_equal(found[name], value)
            allocated.append(device.calls["allocate"])
        assert session.repeats
        assert allocated[2:] == [allocated[2]] * 4  # the buffers of both batch sizes are there
    assert device.calls["capture"] == 2
    assert device.calls["launch"] == (4 if captures else 0)
    gc.collect()
    assert device.memory == {}


def test_results_of_a_replay_are_not_overwritten_by_the_next(built: Path, device: FakeDevice) -> None:
    del device
    with open_engine(built, "vision_encoder", cuda_graphs=True) as session:
        first = session.run(images_of(0))["image_features"]
        copy = first.copy()
        session.run(images_of(1))
        np.testing.assert_array_equal(first, copy)


def test_what_cannot_be_recorded_runs_without_and_says_so(built: Path, device: FakeDevice) -> None:
    device.refuses_capture = True
    with open_engine(built, "vision_encoder", cuda_graphs=True) as session:
        outputs = [session.run(images_of(0))["image_features"] for _ in range(3)]
        assert "vision_encoder.engine runs without a CUDA graph: cudaStreamEndCapture failed" in session.notes[-1]
    np.testing.assert_array_equal(outputs[0], outputs[2])


@pytest.fixture
def small_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "_CAPACITY_STEP", 8)


def open_stepping(package: Path) -> TensorRtSession:
    return open_engine(package, DECODER, cuda_graphs=True)


def check_steps(decoder: Decoder, seed: int, *, steps: int, batch: int = 1) -> KVCache:
    """Prefill a prompt of five tokens, then run decode steps; compare with the model in numpy."""
    random, model = np.random.default_rng(seed), FakeModel()
    told = random.normal(size=(batch, 5 + steps, HIDDEN)).astype(np.float32)
    _, cache = decoder.forward(told[:, :5], decoder.caches.empty(batch))
    for end in range(6, 6 + steps):
        logits, cache = decoder.forward(told[:, end - 1 : end], cache)
        expected = [model.logits(row[:end]) for row in told]
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    return cache


@pytest.mark.usefixtures("small_room")
@pytest.mark.parametrize("captures", [True, False], ids=["recorded here", "recorded by the engine"])
def test_decoding_steps_are_replayed(built: Path, device: FakeDevice, captures: bool) -> None:
    device.captures = captures
    with open_stepping(built) as session:
        decoder = Decoder(session, in_place=True)
        check_steps(decoder, 0, steps=6)  # lengths 5 to 10, in room for 8 and for 16
        assert device.calls["capture"] == 2
        assert device.calls["launch"] == (4 if captures else 0)
        check_steps(decoder, 1, steps=6)
        recorded, allocated = device.calls["capture"], device.calls["allocate"]
        for seed in range(2, 6):
            check_steps(decoder, seed, steps=6)
        assert device.calls["capture"] == recorded <= 4  # buffers come again, and with them their graphs
        assert session.notes == session.notes[:1]
    assert device.calls["allocate"] - allocated == 4 * 6  # of the prompts: three inputs, two empty ones, logits
    gc.collect()
    assert device.memory == {}


@pytest.mark.usefixtures("small_room")
def test_a_step_moves_what_is_new_and_nothing_else(built: Path, device: FakeDevice) -> None:
    with open_stepping(built) as session:
        decoder = Decoder(session, in_place=True)
        cache = check_steps(decoder, 0, steps=1)
        device.calls.clear()
        device.downloaded = 0
        logits, cache = decoder.forward(np.ones((1, 1, HIDDEN), np.float32), cache)
        counts = {name: count for name, count in device.calls.items() if count}
        # Embeddings, mask and positions up; one row of each of the keys and values to its place; logits down.
        assert counts == {"upload": 3, "copy": 2, "launch": 1, "enqueue": 1, "download": 1}
        assert device.downloaded == logits.nbytes
        assert cache.nbytes == 2 * 8 * HIDDEN * 4
        largest = 2 * 64 * HIDDEN * 4  # of keys, for the longest text and the most rows of the engine
        large = [memory for memory in device.memory.values() if memory.nbytes == largest]
        assert len(large) == 2 * 3  # of keys and of values: the prompt's, what steps write, and the cache


@pytest.mark.usefixtures("small_room")
def test_a_step_takes_embeddings_that_are_on_the_device(built: Path, device: FakeDevice) -> None:
    with opened(built, "embed_tokens") as embed, open_stepping(built) as session:
        decoder, model = Decoder(session, in_place=True), FakeModel()
        told: list[int] = []
        cache = decoder.caches.empty(1)
        for token in (5, 9, 4, 7):
            told.append(token)
            ids = np.array([[token]])
            embeds = embed.run_keeping({"input_ids": ids}, keep=["inputs_embeds"])["inputs_embeds"]
            logits, cache = decoder.forward(embeds, cache)
            np.testing.assert_allclose(logits[0], model.logits(model.weights["embed"][told]), rtol=1e-4, atol=1e-4)
    assert device.downloaded == 4 * logits.nbytes


@pytest.mark.usefixtures("small_room")
def test_threads_that_share_a_decoder_do_not_disturb_each_other(built: Path, device: FakeDevice) -> None:
    failures: list[BaseException] = []

    def answer(seed: int) -> None:
        try:
            check_steps(decoder, seed, steps=12, batch=1 + seed % 2)
        except BaseException as error:  # for the main thread to see
            failures.append(error)

    with open_stepping(built) as session:
        decoder = Decoder(session, in_place=True)
        threads = [threading.Thread(target=answer, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []
    gc.collect()
    assert device.memory == {}


@pytest.mark.usefixtures("small_room")
def test_a_step_that_cannot_be_recorded_is_made_all_the_same(built: Path, device: FakeDevice) -> None:
    device.refuses_capture = True
    with open_stepping(built) as session:
        check_steps(Decoder(session, in_place=True), 0, steps=12)
        assert len(session.notes) == 2
        assert f"{DECODER}.engine runs without a CUDA graph: cudaStreamEndCapture failed" in session.notes[-1]


def test_a_whole_pipeline_runs_on_graphs(built: Path, device: FakeDevice) -> None:
    image = Image.fromarray(np.random.default_rng(2).integers(0, 255, (32, 32, 3), np.uint8))
    requests = [([image], "what is it?"), ((), "and this?")]
    with VisionLanguagePipeline.from_package(built, provider="cpu") as pipeline:
        expected = pipeline.generate_batch(requests, max_new_tokens=6)
    with VisionLanguagePipeline.from_package(built, backend="tensorrt", cuda_graphs=True) as pipeline:
        results = pipeline.generate_batch(requests, max_new_tokens=6)
        first = device.calls["launch"]
        assert [r.text for r in pipeline.generate_batch(requests, max_new_tokens=6)] == [r.text for r in results]
        assert device.calls["launch"] >= first + 4
        uploads, downloaded = device.calls["upload"], device.downloaded
        pipeline.generate((), "abc", max_new_tokens=1)
        uploads, downloaded = device.calls["upload"] - uploads, device.downloaded - downloaded
        before = device.calls["upload"], device.downloaded
        pipeline.generate((), "abc", max_new_tokens=4, ignore_eos=True)
        # Of every step: a token's number, its mask and position go up, its logits come down; its embedding stays.
        assert device.calls["upload"] - before[0] == uploads + 3 * 3
        assert device.downloaded - before[1] == downloaded + 3 * FakeModel().vocabulary * 4
    assert [result.token_ids for result in results] == [result.token_ids for result in expected]
    repeats = {name: session.repeats for name, session in pipeline.sessions.items()}
    assert repeats == {"embed_tokens": False, DECODER: True, "vision_encoder": True}


@pytest.mark.usefixtures("small_room")
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_rows_join_and_leave_a_batch_on_the_device(built: Path, device: FakeDevice, cuda_graphs: bool) -> None:
    """Only logits are copied to the host; every answer is the one that the request gets alone."""
    asked = {"a": 3, "and a longer one": 6, "bc": 2}
    with VisionLanguagePipeline.from_package(built, provider="cpu") as pipeline:
        expected = [
            pipeline.generate((), text, max_new_tokens=n, ignore_eos=True).token_ids for text, n in asked.items()
        ]
    with VisionLanguagePipeline.from_package(built, backend="tensorrt", cuda_graphs=cuda_graphs) as pipeline:
        engine = pipeline.engine(max_batch=2)
        requests = [pipeline.request((), text, max_new_tokens=n, ignore_eos=True) for text, n in asked.items()]
        device.downloaded = 0
        for request in requests:
            engine.add(request)
            engine.step()
        while engine.has_requests:
            engine.step()
    assert [request.result().token_ids for request in requests] == expected
    assert device.downloaded == sum(asked.values()) * FakeModel().vocabulary * 4
    del pipeline, engine
    gc.collect()
    assert device.memory == {}


@pytest.mark.usefixtures("device")
def test_more_requests_than_the_engines_take_are_answered_in_turn(built: Path) -> None:
    """The engines take two sequences in one run."""
    requests = [((), text) for text in ("a", "and a longer one", "bc")]
    with VisionLanguagePipeline.from_package(built, provider="cpu") as pipeline:
        expected = [result.token_ids for result in pipeline.generate_batch(requests, max_new_tokens=5)]
    with VisionLanguagePipeline.from_package(built, backend="tensorrt") as pipeline:
        assert [result.token_ids for result in pipeline.generate_batch(requests, max_new_tokens=5)] == expected
        engine = pipeline.engine(max_batch=3)
        added = [engine.add(pipeline.request((), text)) for _, text in requests]
        engine.step()
        assert [len(request.token_ids) for request in added] == [1, 1, 0]


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_features_and_embeddings_stay_on_the_device(built: Path, device: FakeDevice, cuda_graphs: bool) -> None:
    """Uploaded: pixels, token ids, masks and positions. Downloaded: the features, once, on request."""
    image = Image.fromarray(np.random.default_rng(2).integers(0, 255, (32, 32, 3), np.uint8))
    model, options = FakeModel(), {"max_new_tokens": 1}
    with VisionLanguagePipeline.from_package(built, provider="cpu") as pipeline:
        expected = pipeline.generate([image, image], "what is it?", **options)
    with VisionLanguagePipeline.from_package(built, backend="tensorrt", cuda_graphs=cuda_graphs) as pipeline:
        result = pipeline.generate([image, image], "what is it?", **options)
        numbers = 3 * 8 * result.timings.prompt_tokens
        assert device.uploaded == 3 * 32 * 32 * 4 + numbers
        selection = sum(value.nbytes for name, value in encoded_outputs(built, image).items())
        assert device.downloaded == selection + model.vocabulary * 4
        again = pipeline.generate([image], "and now?", **options)  # an image that was encoded before
        assert device.uploaded == 3 * 32 * 32 * 4 + numbers + 3 * 8 * again.timings.prompt_tokens
        encoded = pipeline.encode_image(image)
        pipeline.generate(EncodedImage(encoded.image_features, encoded.selection), "and now?", **options)
        assert device.uploaded == 3 * 32 * 32 * 4 + numbers + 6 * 8 * again.timings.prompt_tokens + 4 * HIDDEN * 4
    assert result.token_ids == expected.token_ids


def encoded_outputs(package: Path, image: Image.Image) -> dict[str, np.ndarray]:
    with VisionLanguagePipeline.from_package(package, provider="cpu") as pipeline:
        preprocessed: Any = pipeline.encoder.preprocess(image)
        return pipeline.sessions["vision_encoder"].run(preprocessed.feeds)


def test_rows_are_copied_as_on_the_host(built: Path, device: FakeDevice) -> None:
    random = np.random.default_rng(5)
    table = FakeModel().weights["embed"]
    reference = in_onnx_runtime(built, "embed_tokens")
    with opened(built, "embed_tokens") as session, reference:
        ids = random.integers(0, len(table), (1, 7))
        kept = session.run_keeping({"input_ids": ids}, keep=["inputs_embeds"])["inputs_embeds"]
        half = random.normal(size=(3, HIDDEN)).astype(np.float16)
        parts = [RowCopy(kept, 1, 5, 2), RowCopy(half, 1, 2, 4), RowCopy(table, 9, 1, 11), RowCopy(kept, 6, 1, 0)]
        device.downloaded = 0
        copied = session.copy_rows((2, 6, HIDDEN), "float32", parts)
        assert device.downloaded == 0
        expected = np.zeros((12, HIDDEN), np.float32)
        expected[2:7], expected[4:6], expected[11], expected[0] = (
            table[ids[0, 1:6]],
            half[1:],
            table[9],
            table[ids[0, 6]],
        )
        np.testing.assert_array_equal(copied.numpy(), expected.reshape(2, 6, HIDDEN))  # type: ignore[union-attr]
        np.testing.assert_array_equal(
            reference.copy_rows((2, 6, HIDDEN), "float32", parts), expected.reshape(2, 6, HIDDEN)
        )
        for either in (session, reference):
            with pytest.raises(BackendError, match=f"rows of {HIDDEN} numbers; expected {HIDDEN // 2}"):
                either.copy_rows((2, 6, HIDDEN // 2), "float32", parts)


def test_the_time_of_every_layer(built: Path, device: FakeDevice) -> None:
    with opened(built, "vision_encoder") as session:
        assert session.layer_times(images_of(0), runs=3) == {"first": 3.0, "second": 0.5}  # medians
        with pytest.raises(BackendError, match="received inputs"):
            session.layer_times({})
    assert device.calls["enqueue"] == 3


def test_compiled_kernels_are_looked_for_beside_the_engine(built: Path, device: FakeDevice) -> None:
    opened(built, DECODER).close()
    folder = engine_folder(built, "tensorrt-rtx", TARGET)
    assert device.runtime_caches[-1] == folder / f"{DECODER}.runtime-cache"
    assert device.calls["close"] == 1


def test_many_threads_share_a_session(built: Path, device: FakeDevice) -> None:
    table, failures = FakeModel().weights["embed"], []

    def look_up(seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(20):
            ids = random.integers(0, len(table), size=(1, int(random.integers(1, 9))))
            if not np.array_equal(session.run({"input_ids": ids})["inputs_embeds"], table[ids]):
                failures.append(seed)

    with opened(built, "embed_tokens") as session:
        threads = [threading.Thread(target=look_up, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures
    assert device.memory == {}


def test_the_narrowest_profile_is_chosen(built: Path) -> None:
    record = find_record(built, DECODER)
    shapes = decoder_shapes(sequence=1, past=5)
    assert record.profiles[choose_profile(record, shapes)].name == "decode"
    assert record.profiles[choose_profile(record, decoder_shapes(sequence=1, past=0))].name == "prefill"
    assert record.profiles[choose_profile(record, decoder_shapes(sequence=44, past=0))].name == "prefill"


def find_record(package: Path, name: str) -> EngineRecord:
    return read_engines(engine_folder(package, "tensorrt-rtx", TARGET)).engines[name]


def decoder_shapes(sequence: int, past: int, batch: int = 1) -> dict[str, tuple[int, ...]]:
    cache = (batch, 1, past, HIDDEN)
    return {
        "inputs_embeds": (batch, sequence, HIDDEN),
        "attention_mask": (batch, past + sequence),
        "position_ids": (batch, sequence),
        "past_key_values.0.key": cache,
        "past_key_values.0.value": cache,
    }


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"sequence": 45, "past": 0}, r"received inputs_embeds: \[1, 45, 16\]; expected \[1, 1, 16\] to \[2, 44, 16\]"),
        ({"sequence": 1, "past": 64}, r"received attention_mask: \[1, 65\]; expected \[1, 1\] to \[2, 64\]"),
        ({"sequence": 1, "past": 1, "batch": 3}, r"received inputs_embeds: \[3, 1, 16\]; expected .* \[2, 44, 16\]"),
    ],
)
def test_shapes_that_no_profile_serves_are_refused(built: Path, sizes: dict[str, int], message: str) -> None:
    with pytest.raises(BackendError, match=message) as caught:
        choose_profile(find_record(built, DECODER), decoder_shapes(**sizes))
    assert "--max-prompt-tokens, --max-new-tokens or --max-batch" in str(caught.value)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": np.zeros((1, 2), np.int32)}, "received input_ids: int32"),
        ({"input_ids": np.zeros(2, np.int64)}, "received input_ids: int64"),
        ({"ids": np.zeros((1, 2), np.int64)}, "received inputs"),
        ({"input_ids": np.zeros((1, 45), np.int64)}, "received input_ids: .1, 45.; expected .1, 1. to .2, 44. .any."),
    ],
)
def test_wrong_inputs_are_refused_before_anything_runs(
    built: Path, device: FakeDevice, inputs: dict[str, np.ndarray], message: str
) -> None:
    with opened(built, "embed_tokens") as session, pytest.raises(BackendError, match=message):
        session.run(inputs)
    assert device.calls["enqueue"] == device.calls["allocate"] == 0


def test_a_closed_session_is_refused(built: Path, device: FakeDevice) -> None:
    del device
    session = opened(built, "embed_tokens")
    session.close()
    with pytest.raises(BackendError, match="was closed"):
        session.run({"input_ids": np.zeros((1, 2), np.int64)})


def test_the_cpu_is_refused(built: Path, device: FakeDevice) -> None:
    del device
    with pytest.raises(BackendError, match="received provider 'cpu' for the backend tensorrt"):
        open_engine(built, DECODER, provider="cpu")


def test_a_machine_without_a_driver_is_one_clear_line(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr("promprune.package.engines.ctypes.CDLL", missing)
    with pytest.raises(BackendError, match=r"this machine has no usable GPU \(no NVIDIA driver is installed here\)"):
        VisionLanguagePipeline.from_package(built, backend="tensorrt")


def test_no_engines_is_answered_with_the_command(tmp_path: Path, device: FakeDevice) -> None:
    del device
    write_fake_package(tmp_path / "package")
    with pytest.raises(PackageError, match=r"has no engines for this GPU, sm89; .*promprune-build .*--target sm89"):
        opened(tmp_path / "package", DECODER)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tool_version": "1.6"}, "built by tensorrt-rtx 1.6; this is 1.7"),
        ({"target": "sm120"}, "built for sm120, not for sm89"),
    ],
)
def test_foreign_engines_are_refused(tmp_path: Path, device: FakeDevice, changes: dict[str, str], reason: str) -> None:
    del device
    write_fake_package(tmp_path / "package")
    add_engines(tmp_path / "package", **changes)
    with pytest.raises(PackageError, match=rf"cannot be used \({reason}\).*--backend tensorrt-rtx .*--rebuild"):
        opened(tmp_path / "package", DECODER)


def test_engines_of_other_weights_are_refused(built: Path, tmp_path: Path, device: FakeDevice) -> None:
    del device
    write_fake_package(tmp_path / "package", FakeModel(seed=3))
    shutil.copytree(built / "engines", tmp_path / "package" / "engines")
    with pytest.raises(PackageError, match=r"built from another decoder_model_merged.onnx or other weights"):
        opened(tmp_path / "package", DECODER)


def test_engines_tuned_on_the_gpu_itself_come_first(tmp_path: Path, device: FakeDevice) -> None:
    del device
    write_fake_package(tmp_path / "package")
    add_engines(tmp_path / "package")
    assert find_engines(read_package(tmp_path / "package"), TARGET)[0] == "tensorrt-rtx"
    add_engines(tmp_path / "package", backend="tensorrt")
    assert find_engines(read_package(tmp_path / "package"), TARGET)[0] == "tensorrt"


@pytest.fixture
def both_built(tmp_path: Path) -> Path:
    """A package with engines of both backends."""
    write_fake_package(tmp_path / "package")
    for backend in ("tensorrt", "tensorrt-rtx"):
        add_engines(tmp_path / "package", backend=backend)
    return tmp_path / "package"


def spoil(package: Path, backend: str) -> None:
    (engine_folder(package, backend, TARGET) / f"{DECODER}.engine").unlink()


def rewrite_engines(package: Path, backend: str, names: set[str]) -> None:
    """Leave the engines of some graphs only."""
    folder = engine_folder(package, backend, TARGET)
    found = read_engines(folder)
    write_engine_manifest(folder, found.identity, {name: found.engines[name] for name in names})


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda package: spoil(package, "tensorrt"), f"not tensorrt: {DECODER}.engine is missing from"),
        (
            lambda package: add_engines(package, backend="tensorrt", tool_version="1.6"),
            "built by tensorrt 1.6; this is",
        ),
        (lambda package: rewrite_engines(package, "tensorrt", {DECODER}), "(without one of embed_tokens)"),
        (lambda package: (engine_folder(package, "tensorrt", TARGET) / "engine.json").unlink(), "contains no engines"),
    ],
)
def test_the_other_engines_are_taken_where_the_first_cannot_be_used(
    both_built: Path, device: FakeDevice, damage: Any, reason: str
) -> None:
    damage(both_built)
    found = find_engines(read_package(both_built), TARGET)
    assert (found.backend, found.folder) == ("tensorrt-rtx", engine_folder(both_built, "tensorrt-rtx", TARGET))
    with opened(both_built, DECODER) as session:
        assert reason in session.notes[1]
    assert device.calls["close"] == 1


def test_the_other_engines_are_taken_where_a_module_is_not_installed(
    both_built: Path, device: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    del device

    def missing(backend: str) -> Any:
        if backend == "tensorrt":
            raise MissingDependencyError("engines need tensorrt, which is not installed")
        return TOOL

    monkeypatch.setattr(lookup_module, "load_tensorrt", missing)
    found = find_engines(read_package(both_built), TARGET)
    assert found.backend == "tensorrt-rtx"
    assert found.notes == ("not tensorrt: engines need tensorrt, which is not installed",)
    shutil.rmtree(engine_folder(both_built, "tensorrt-rtx", TARGET))
    with pytest.raises(MissingDependencyError):
        find_engines(read_package(both_built), TARGET)


def test_every_reason_is_named_where_no_engines_can_be_used(both_built: Path, device: FakeDevice) -> None:
    del device
    spoil(both_built, "tensorrt")
    add_engines(both_built, tool_version="1.6")
    with pytest.raises(PackageError) as caught:
        find_engines(read_package(both_built), TARGET)
    for part in (
        "tensorrt: decoder_model_merged.engine is missing",
        "tensorrt-rtx: the engines in",
        "rtx 1.6; this is",
    ):
        assert part in str(caught.value)


def test_a_damaged_package_is_no_reason_to_build_engines(both_built: Path, device: FakeDevice) -> None:
    del device
    (both_built / "tokenizer.json").unlink()
    with pytest.raises(PackageError, match=r"^tokenizer.json is missing from"):
        opened(both_built, DECODER)


def test_looking_for_engines_reads_nothing_else_of_the_package(both_built: Path, device: FakeDevice) -> None:
    del device
    package = read_package(both_built)
    for path in both_built.rglob("*"):
        if path.is_file() and not path.is_relative_to(both_built / "engines"):
            path.unlink()
    assert find_engines(package, TARGET).backend == "tensorrt"


def test_an_engine_that_was_changed_is_refused(both_built: Path, device: FakeDevice) -> None:
    file = engine_folder(both_built, "tensorrt", TARGET) / f"{DECODER}.engine"
    file.write_bytes(file.read_bytes()[::-1])
    with pytest.raises(PackageError, match=f"{DECODER}.engine in .* was changed since it was built"):
        opened(both_built, DECODER)
    assert device.runtime_caches == []


@pytest.mark.parametrize("outputs", [(), (TensorRecord(name="logits", dtype="abacus", shape=("batch_size", "n")),)])
def test_an_engine_with_other_tensors_than_its_record_is_refused(
    built: Path, device: FakeDevice, outputs: tuple[TensorRecord, ...]
) -> None:
    folder = engine_folder(built, "tensorrt-rtx", TARGET)
    wrong = msgspec.structs.replace(find_record(built, DECODER), outputs=outputs)
    with pytest.raises(BackendError, match=r".engine has output .* as its record says; run promprune-build"):
        TensorRtSession(folder, wrong, device, TOOL)


def test_missing_bindings_are_answered_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda", None)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises((MissingDependencyError, BackendError), match=r"pip install .*'promprune\[tensorrt\]'"):
        CudaDevice()


class Runtime:
    """The calls of the CUDA runtime, one of which fails."""

    cudaStreamNonBlocking = 1  # noqa: N815  # CUDA's names
    cudaMemPoolAttr = SimpleNamespace(cudaMemPoolAttrReleaseThreshold=4)  # noqa: N815
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)  # noqa: N815
    cudaMemcpyKind = SimpleNamespace(  # noqa: N815
        cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3
    )

    def __init__(self, failing: str, name: str) -> None:
        self.failing, self.error = failing, name
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __getattr__(self, function: str) -> Any:
        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((function, arguments))
            return (CudaError(2, self.error),) if function == self.failing else (CudaError(0, "cudaSuccess"), 77)

        return call


class CudaError(int):
    """An error code with a name."""

    def __new__(cls, number: int, name: str) -> CudaError:
        error = super().__new__(cls, number)
        error.name = name  # type: ignore[attr-defined]
        return error


@pytest.mark.parametrize(
    ("function", "name", "fix"),
    [
        ("cudaMallocAsync", "cudaErrorMemoryAllocation", "use fewer images or tokens at a time"),
        ("cudaMallocAsync", "cudaErrorUnknown", "check the driver"),
        ("cudaStreamCreateWithFlags", "cudaErrorInsufficientDriver", "install or update the NVIDIA driver"),
        ("cudaStreamCreateWithFlags", "cudaErrorNoDevice", "use a machine with an NVIDIA GPU"),
        ("cudaMemPoolSetAttribute", "cudaErrorNotSupported", "check the driver"),
    ],
)
def test_cuda_errors_are_one_clear_line(monkeypatch: pytest.MonkeyPatch, function: str, name: str, fix: str) -> None:
    runtime = Runtime(function, name)
    monkeypatch.setattr(cuda_module, "import_module", lambda extra, wanted: runtime)
    with pytest.raises(BackendError, match=rf"{function} failed on the GPU \({name}\); {fix}"):
        CudaDevice().allocate(16)


def test_copies_are_made_on_the_stream_with_addresses_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime("", "")
    monkeypatch.setattr(cuda_module, "import_module", lambda extra, wanted: runtime)
    device, array = CudaDevice(), np.arange(6, dtype=np.float32)
    device.upload(array, 1024)
    device.download(1024, array)
    device.clear(1024, 24)
    device.copy(Pitched(2048, 40), Pitched(1024, 12), 8, 3)
    device.free(1024)
    host = array.ctypes.data
    assert runtime.calls[-5:] == [
        ("cudaMemcpyAsync", (1024, host, 24, 1, 77)),
        ("cudaMemcpyAsync", (host, 1024, 24, 2, 77)),
        ("cudaMemsetAsync", (1024, 0, 24, 77)),
        ("cudaMemcpy2DAsync", (1024, 12, 2048, 40, 8, 3, 3, 77)),  # target first, each with its pitch
        ("cudaFreeAsync", (1024, 77)),
    ]


def test_the_calls_are_those_of_the_real_bindings() -> None:
    """Without a driver every one of them answers with an error code; a wrong name or type would raise."""
    cuda = pytest.importorskip("cuda.bindings.runtime", reason="the CUDA bindings are not installed")
    driver = pytest.importorskip("cuda.bindings.driver", reason="the CUDA bindings are not installed")
    if int(cuda.cudaGetDeviceCount()[0]) == 0:
        pytest.skip("there is a GPU here, where these calls would really be made")
    kind, attribute = cuda.cudaMemcpyKind.cudaMemcpyHostToDevice, cuda.cudaMemPoolAttr.cudaMemPoolAttrReleaseThreshold
    stream, pool = cuda.cudaStream_t(0), cuda.cudaMemPool_t(0)
    array = np.zeros(4, np.float32)
    for name, arguments in {
        "cudaStreamCreateWithFlags": (cuda.cudaStreamNonBlocking,),
        "cudaDeviceGetDefaultMemPool": (0,),
        "cudaMemPoolSetAttribute": (pool, attribute, driver.cuuint64_t((1 << 64) - 1)),
        "cudaMallocAsync": (16, stream),
        "cudaFreeAsync": (4096, stream),
        "cudaMemcpyAsync": (4096, array.ctypes.data, array.nbytes, kind, stream),
        "cudaMemsetAsync": (4096, 0, 16, stream),
        "cudaMemcpy2DAsync": (4096, 8, 8192, 8, 8, 2, cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice, stream),
        "cudaStreamSynchronize": (stream,),
        "cudaStreamBeginCapture": (stream, cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal),
        "cudaStreamEndCapture": (stream,),
        "cudaStreamDestroy": (stream,),
        "cudaGraphInstantiate": (cuda.cudaGraph_t(0), 0),
        "cudaGraphDestroy": (cuda.cudaGraph_t(0),),
        "cudaGraphLaunch": (cuda.cudaGraphExec_t(0), stream),
        "cudaGraphExecDestroy": (cuda.cudaGraphExec_t(0),),
    }.items():
        error, *_ = getattr(cuda, name)(*arguments)
        assert int(error) != 0, name
        assert re.search(rf"\b{name}\b", Path(cuda_module.__file__).read_text()), name


def test_an_engine_that_does_not_load_is_one_clear_line() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed (Linux x86-64 only)")
    with pytest.raises(BackendError, match=r"the engine does not load on this GPU \(.+\)") as caught:
        cuda_module._CudaEngine(b"not an engine" * 100, trt, SimpleNamespace(stream=0), Path())  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_a_real_engine_without_a_driver_is_one_clear_line(tmp_path: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed (Linux x86-64 only)")
    try:
        current_target()
    except BackendError:
        pass
    else:
        pytest.skip("there is a driver here")
    write_fake_package(tmp_path / "package")
    (built,) = build_engines(tmp_path / "package", EngineConfig(targets=("sm89",)))
    plan = (built.folder / built.manifest.engines["embed_tokens"].file).read_bytes()
    with pytest.raises(BackendError, match=r"install or update the NVIDIA driver: it is missing, or older") as caught:
        cuda_module._CudaEngine(plan, trt, SimpleNamespace(stream=0), Path())  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_the_thin_layer_calls_what_the_real_module_has() -> None:
    """Nothing here can run without a driver; that the names are right can be seen without one."""
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed (Linux x86-64 only)")
    used = {
        trt.Runtime: ["deserialize_cuda_engine"],
        trt.ICudaEngine: [
            "create_execution_context",
            "create_runtime_config",
            "device_memory_size_v2",
            "get_tensor_dtype",
            "get_tensor_mode",
            "get_tensor_name",
            "get_tensor_shape",
            "num_io_tensors",
        ],
        trt.IExecutionContext: [
            "enqueue_emits_profile",
            "execute_async_v3",
            "profiler",
            "get_tensor_shape",
            "infer_shapes",
            "set_device_memory",
            "set_input_shape",
            "set_optimization_profile_async",
            "set_tensor_address",
        ],
        trt.TensorIOMode: ["INPUT", "OUTPUT"],
        trt.ExecutionContextAllocationStrategy: ["USER_MANAGED"],
        trt.IRuntimeConfig: [
            "create_runtime_cache",
            "cuda_graph_strategy",
            "set_execution_context_allocation_strategy",
            "set_runtime_cache",
        ],
        trt.IRuntimeCache: ["serialize", "deserialize"],
        trt.CudaGraphStrategy: ["WHOLE_GRAPH_CAPTURE"],
        trt: ["IProfiler", "IRuntimeCache"],
    }
    source = Path(cuda_module.__file__).read_text()
    for owner, names in used.items():
        for name in names:
            assert hasattr(owner, name)
            assert f".{name}" in source or f'"{name}"' in source


class StandIn:
    """The objects of TensorRT that exist only after an engine was loaded; they record all calls in order."""

    num_io_tensors = 0
    device_memory_size_v2 = 640

    def __init__(self, done: list[Any], cached: bytes = b"new kernels") -> None:
        object.__setattr__(self, "done", done)
        object.__setattr__(self, "cached", cached)

    def __setattr__(self, name: str, value: Any) -> None:
        self.done.append((name, value))

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            self.done.append((name, *(a for a in arguments if isinstance(a, (bytes, str, int)))))
            return self.cached if name == "serialize" else self

        return call


MEMBERS = ("CudaGraphStrategy", "ExecutionContextAllocationStrategy", "ILogger", "IRuntimeCache", "TensorIOMode")


@pytest.fixture
def stand_in() -> tuple[Any, list[Any]]:
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed (Linux x86-64 only)")
    done: list[Any] = []
    members = {name: getattr(trt, name) for name in MEMBERS}
    return SimpleNamespace(**members, Runtime=lambda *arguments: StandIn(done)), done


def load_with(trt: Any, runtime_cache: Path = Path("none.runtime-cache")) -> Any:
    memory = SimpleNamespace(stream=7, allocate=lambda nbytes: 4096 + nbytes, free=lambda address: None)
    return cuda_module._CudaEngine(b"plan", trt, memory, runtime_cache)  # type: ignore[arg-type]


def test_compiled_kernels_are_kept_beside_the_engine(stand_in: tuple[Any, list[Any]], tmp_path: Path) -> None:
    trt, done = stand_in
    file = tmp_path / "decoder.runtime-cache"
    load_with(trt, file).close()
    assert file.read_bytes() == b"new kernels"
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    file.write_bytes(b"kernels of last time")
    done.clear()
    load_with(trt, file).context()
    names = [name for name, *_ in done]
    assert ("deserialize", b"kernels of last time") in done
    assert names.index("deserialize") < names.index("set_runtime_cache") < names.index("create_execution_context")


def test_a_package_that_cannot_be_written_runs_all_the_same(stand_in: tuple[Any, list[Any]], tmp_path: Path) -> None:
    load_with(stand_in[0], tmp_path / "gone" / "decoder.runtime-cache").close()
    assert list(tmp_path.iterdir()) == []


def test_recording_is_chosen_before_the_context_is_made(stand_in: tuple[Any, list[Any]]) -> None:
    trt, done = stand_in
    load_with(trt).context(recorded=True)
    assert ("cuda_graph_strategy", trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE) in done
    names = [name for name, *_ in done]
    assert names.index("cuda_graph_strategy") < names.index("create_execution_context")


def test_contexts_share_scratch_memory_and_record_where_asked(stand_in: tuple[Any, list[Any]]) -> None:
    trt, done = stand_in
    engine = load_with(trt)
    done.clear()
    made = [engine.context(), engine.context(recorded=True)]
    names = [name for name, *_ in done]
    assert len(made) == names.count("create_execution_context") == 2
    assert names.count("set_execution_context_allocation_strategy") == 2
    assert names.count("cuda_graph_strategy") == 1
    assert [entry for entry in done if entry[0] == "set_device_memory"] == [("set_device_memory", 4096 + 640, 640)] * 2


def test_tensorrt_has_no_settings_of_tensorrt_for_rtx(stand_in: tuple[Any, list[Any]], tmp_path: Path) -> None:
    trt, done = stand_in
    del trt.IRuntimeCache
    engine = load_with(trt, tmp_path / "decoder.runtime-cache")
    engine.context(recorded=True)
    engine.close()
    assert "create_runtime_config" not in [name for name, *_ in done]
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_recorded_on_a_stream_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime("", "")
    monkeypatch.setattr(cuda_module, "import_module", lambda extra, wanted: runtime)
    device = CudaDevice()
    runtime.calls.clear()
    graph = device.graph_of(lambda stream: runtime.calls.append(("run", (stream,))))
    graph.launch()
    names = [name for name, _ in runtime.calls]
    assert names == [
        "cudaStreamCreateWithFlags",
        "cudaStreamBeginCapture",
        "run",
        "cudaStreamEndCapture",
        "cudaGraphInstantiate",
        "cudaGraphDestroy",
        "cudaStreamDestroy",
        "cudaGraphLaunch",
    ]


@pytest.mark.parametrize("failing", ["", "cudaStreamEndCapture"])
def test_the_reason_why_a_run_is_not_recorded_is_the_first(monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    """Ending the capture of a run that failed may fail as well."""
    runtime = Runtime(failing, "cudaErrorStreamCaptureInvalidated")
    monkeypatch.setattr(cuda_module, "import_module", lambda extra, wanted: runtime)
    device = CudaDevice()
    runtime.calls.clear()

    def run(stream: int) -> None:
        raise BackendError("the engine failed while running")

    with pytest.raises(BackendError, match="the engine failed while running"):
        device.graph_of(run)
    destroyed = [] if failing else [("cudaGraphDestroy", (77,))]
    assert runtime.calls[2:] == [("cudaStreamEndCapture", (77,)), *destroyed, ("cudaStreamDestroy", (77,))]


@pytest.mark.parametrize("failing", ["cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate"])
def test_what_was_made_for_a_recording_that_fails_is_destroyed(monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    runtime = Runtime(failing, "cudaErrorUnknown")
    monkeypatch.setattr(cuda_module, "import_module", lambda extra, wanted: runtime)
    device = CudaDevice()
    with pytest.raises(BackendError, match=f"{failing} failed on the GPU"):
        device.graph_of(lambda stream: None)
    after = [name for name, _ in runtime.calls[[name for name, _ in runtime.calls].index(failing) + 1 :]]
    made = ["cudaGraphDestroy"] if failing == "cudaGraphInstantiate" else []
    assert after == [*made, "cudaStreamDestroy"]


@pytest.mark.gpu
def test_engines_of_this_gpu_answer_as_onnx_runtime_does(tmp_path: Path) -> None:
    pytest.importorskip("cuda.bindings.runtime", reason="the CUDA bindings are not installed")
    backends = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
    backend = next((name for name, of in backends.items() if importlib.util.find_spec(of)), None)
    if backend is None:
        pytest.skip("neither TensorRT is installed")
    try:
        current_target()
    except BackendError as error:
        pytest.skip(str(error))
    model = write_fake_package(tmp_path / "package")
    build_engines(tmp_path / "package", EngineConfig(backend=backend))  # type: ignore[arg-type]  # one of the two
    pixels = np.random.default_rng(0).normal(size=(1, 3, 32, 32)).astype(np.float32)
    with opened(tmp_path / "package", "vision_encoder") as session:
        found = session.run({"pixel_values": pixels})
    features, indices = model.encode(pixels[0])
    np.testing.assert_array_equal(found["token_indices"][0], indices)
    np.testing.assert_allclose(found["image_features"][0], features, atol=1e-4)
    embeds = np.random.default_rng(1).normal(size=(1, 9, HIDDEN)).astype(np.float32)
    with open_stepping(tmp_path / "package") as session:
        for in_place in (False, True):
            decoder = Decoder(session, in_place=in_place)
            cache = decoder.caches.empty(1)
            for start, end in ((0, 7), (7, 8), (8, 9)):
                logits, cache = decoder.forward(embeds[:, start:end], cache)
                np.testing.assert_allclose(logits[0], model.logits(embeds[0, :end]), rtol=1e-3, atol=1e-3)
