"""Sessions: checked inputs, tensors that stay on the device, and providers that do not load."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import onnx
import onnxruntime
import pytest

from promprune.errors import BackendError, ConfigError, PackageError
from promprune.package.manifest import GraphRecord, TensorRecord
from promprune.package.package import Package
from promprune.runtime.sessions import open_file, open_session, providers
from promprune.runtime.sessions.config import Provider, RuntimeConfig
from promprune.runtime.sessions.providers import AUTO, PROVIDERS, why_not
from tests.support.fake_package import make_graph

CPU = RuntimeConfig(provider="cpu", num_threads=1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """a [n, 3] and b [n, 3] -> together [2n, 3] (on axis 0), and their sum."""
    graph = make_graph(
        {"a": ("float32", ["n", 3]), "b": ("float32", ["n", 3])},
        {"together": ("float32", ["m", 3]), "sum": ("float32", ["n", 3])},
        {},
        ("Concat", "a b", "together", {"axis": 0}),
        ("Add", "a b", "sum"),
    )
    onnx.save(graph, tmp_path / "graph.onnx")
    return tmp_path / "graph.onnx"


def ones(rows: int, columns: int = 3, dtype: Any = np.float32) -> np.ndarray:
    return np.ones((rows, columns), dtype)


def test_named_arrays_in_named_arrays_out(path: Path) -> None:
    with open_file(path, CPU) as session:
        assert session.device == "CPU"
        assert str(session.inputs["a"]) == "float32[n, 3]"
        outputs = session.run({"b": ones(2), "a": 2 * ones(2)})
    assert list(outputs) == ["together", "sum"]
    np.testing.assert_array_equal(outputs["sum"], 3 * ones(2))
    np.testing.assert_array_equal(outputs["together"], [[2] * 3] * 2 + [[1] * 3] * 2)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"a": ones(2)}, r"inputs \['a'\]; expected \['a', 'b'\]"),
        ({"a": ones(2), "b": ones(2), "c": ones(2)}, r"inputs \['a', 'b', 'c'\]"),
        ({"a": ones(2), "b": ones(2, dtype=np.float64)}, r"b: float64\[2, 3\]; expected float32\[n, 3\]"),
        ({"a": ones(2), "b": ones(2, 4)}, r"b: float32\[2, 4\]; expected float32\[n, 3\]"),
        ({"a": ones(2), "b": ones(2)[0]}, r"b: float32\[3\]"),
        ({"a": ones(2), "b": ones(3)}, r"b: float32\[3, 3\]; expected float32\[n, 3\] with {'n': 2}"),
    ],
)
def test_inputs_are_checked_before_anything_runs(path: Path, inputs: dict, message: str) -> None:
    with open_file(path, CPU) as session, pytest.raises(BackendError, match=message):
        session.run(inputs)


def test_what_is_kept_can_be_fed_again(path: Path) -> None:
    with open_file(path, CPU) as session:
        kept = session.run_keeping({"a": ones(1), "b": ones(1)}, keep=["together"])
        assert (kept["together"].shape, kept["together"].dtype, kept["together"].nbytes) == ((2, 3), "float32", 24)
        again = session.run_keeping({"a": kept["together"], "b": kept["together"]}, keep=["together"])
        np.testing.assert_array_equal(again["sum"].numpy(), 2 * ones(2))
        np.testing.assert_array_equal(kept["together"].numpy(), ones(2))


def test_empty_and_strided_arrays(path: Path) -> None:
    with open_file(path, CPU) as session:
        assert session.run({"a": ones(0), "b": ones(0)})["together"].shape == (0, 3)
        columns = np.arange(12, dtype=np.float32).reshape(3, 4).T[:2]
        np.testing.assert_array_equal(session.run({"a": columns, "b": columns})["sum"], 2 * columns)


def test_a_closed_session_says_so(path: Path) -> None:
    with open_file(path, CPU) as session:
        pass
    with pytest.raises(BackendError, match="was closed"):
        session.run({"a": ones(1), "b": ones(1)})


def test_files_that_are_no_graph(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"no graph")
    for name, message in (("x.onnx", "cannot be loaded"), ("y.onnx", "does not exist")):
        with pytest.raises(BackendError, match=message) as caught:
            open_file(tmp_path / name, CPU)
        assert "\n" not in str(caught.value)


def test_a_failing_graph_is_typed(tmp_path: Path) -> None:
    graph = make_graph(
        {"i": ("int64", ["n"])}, {"row": ("float32", ["n", 3])}, {"t": ones(2)}, ("Gather", "t i", "row")
    )
    onnx.save(graph, tmp_path / "gather.onnx")
    with open_file(tmp_path / "gather.onnx", CPU) as session:
        with pytest.raises(BackendError, match=r"gather\.onnx failed while running") as caught:
            session.run({"i": np.array([5])})
        assert "\n" not in str(caught.value)
        assert session.run({"i": np.array([1])})["row"].shape == (1, 3)


def records(**changes: TensorRecord) -> GraphRecord:
    tensors = {
        "a": TensorRecord(name="a", dtype="float32", shape=("rows", 3)),
        "b": TensorRecord(name="b", dtype="float32", shape=("n", 3)),
        "together": TensorRecord(name="together", dtype="float32", shape=("m", 3)),
        "sum": TensorRecord(name="sum", dtype="float32", shape=("n", 3)),
        **changes,
    }
    values = list(tensors.values())
    return GraphRecord(file="graph.onnx", inputs=tuple(values[:2]), outputs=tuple(values[2:]))


def manifest_of(record: GraphRecord) -> Any:
    return SimpleNamespace(graphs={"graph": record}, weights=None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a": TensorRecord(name="a", dtype="float16", shape=("n", 3))}, r"input a: float32\[n, 3\].*float16"),
        ({"a": TensorRecord(name="a", dtype="float32", shape=(2, 3))}, r"input a: float32\[n, 3\].*\[2, 3\]"),
        ({"b": TensorRecord(name="c", dtype="float32", shape=("n", 3))}, "expected none, as the manifest says"),
        ({"sum": TensorRecord(name="sum", dtype="float32", shape=("n", 4))}, "output sum"),
        ({"sum": TensorRecord(name="total", dtype="float32", shape=("n", 3))}, "output sum"),
    ],
)
def test_graphs_are_compared_with_their_records(path: Path, changes: dict, message: str) -> None:
    packages = [Package(path.parent, manifest_of(record)) for record in (records(), records(**changes))]
    open_session(packages[0], "graph", CPU).close()
    with pytest.raises(PackageError, match=message):
        open_session(packages[1], "graph", CPU)


# CUDA that does not load


def test_without_a_driver_auto_takes_the_cpu_and_cuda_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "_why_no_driver", lambda: "no NVIDIA driver")
    with open_file(path, RuntimeConfig(provider="auto")) as session:
        assert session.device == "CPU"
    with pytest.raises(BackendError, match=r"no NVIDIA driver.*--provider cpu"):
        open_file(path, RuntimeConfig(provider="cuda"))


def test_what_was_chosen_and_why_nothing_else(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "_why_no_driver", lambda: "no NVIDIA driver")
    with open_file(path, RuntimeConfig(provider="auto")) as session:
        notes = session.notes
    assert notes[0] == "provider cpu: the first that loads"
    assert notes[1].startswith("not tensorrt: ")
    assert "not tensorrt-rtx: this ONNX Runtime is built without it" in notes
    assert any(
        note in notes for note in ("not cuda: no NVIDIA driver", "not cuda: this ONNX Runtime is built without it")
    )
    with open_file(path, CPU) as session:
        assert session.notes[0] == "provider cpu: asked for"


def test_the_error_says_why_the_gpu_was_not_used(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For example for a package in bf16, for which the CPU lacks operators."""

    def fail(*arguments: Any, **options: Any) -> Any:
        on_gpu = options["providers"][0][0] == "CUDAExecutionProvider"
        raise RuntimeError("CUDA out of memory" if on_gpu else "NOT_IMPLEMENTED : MatMul(13)")

    monkeypatch.setattr(onnxruntime, "InferenceSession", fail)
    monkeypatch.setattr(providers, "_why_no_driver", lambda: None)
    monkeypatch.setattr(providers.ort, "get_available_providers", lambda: [p.ort_name for p in PROVIDERS.values()])
    with pytest.raises(BackendError, match=r"NOT_IMPLEMENTED : MatMul\(13\); not cuda: CUDA out of memory\)"):
        open_file(path, RuntimeConfig(provider=AUTO))


def test_a_gpu_that_does_not_start_is_passed_over(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's libraries load and a driver exists, but creating a session fails."""
    real = onnxruntime.InferenceSession

    def make(*arguments: Any, **options: Any) -> Any:
        if options["providers"][0][0] == "CUDAExecutionProvider":
            raise RuntimeError("CUDA failure 100: no CUDA-capable device is detected\n  at line 123")
        return real(*arguments, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", make)
    monkeypatch.setattr(providers, "_why_no_driver", lambda: None)
    monkeypatch.setattr(providers.ort, "get_available_providers", lambda: [p.ort_name for p in PROVIDERS.values()])
    with open_file(path, RuntimeConfig(provider=AUTO)) as session:
        assert session.device == "CPU"
        assert "not cuda: CUDA failure 100: no CUDA-capable device is detected" in session.notes
    with pytest.raises(BackendError, match=r"cannot be loaded by ONNX Runtime .*no CUDA-capable device"):
        open_file(path, RuntimeConfig(provider="cuda"))


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx", "cuda"])
def test_a_provider_that_was_asked_for_is_had_or_refused(
    path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(providers, "_why_no_driver", lambda: "no NVIDIA driver")
    with pytest.raises(
        BackendError, match=rf"received provider '{name}', which cannot be used here \(.+\); expected an"
    ):
        open_file(path, RuntimeConfig(provider=name))
    assert list(path.parent.iterdir()) == [path]


def test_the_table_of_providers_is_what_the_settings_allow() -> None:
    assert {AUTO, *PROVIDERS} == set(get_args(Provider))


def test_tf32_is_off_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only CUDA has an option for it; the others take it from the environment."""
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    assert PROVIDERS["cuda"].options(tmp_path / "engines") == {"use_tf32": "0"}
    assert "NVIDIA_TF32_OVERRIDE" not in os.environ
    assert PROVIDERS["tensorrt"].options(None) == {}
    options = PROVIDERS["tensorrt"].options(tmp_path / "engines")
    assert os.environ["NVIDIA_TF32_OVERRIDE"] == "0"
    folder = tmp_path / "engines" / "onnxruntime-tensorrt"
    assert options["trt_engine_cache_path"] == str(folder)
    assert folder.is_dir()


@pytest.mark.skipif(
    "CUDAExecutionProvider" not in onnxruntime.get_available_providers() or why_not("cuda") is None,
    reason="needs an ONNX Runtime built for CUDA on a machine that cannot load it",
)
def test_cuda_libraries_that_do_not_load_are_quiet(path: Path) -> None:
    """As on a machine with a driver but without CUDA or cuDNN."""
    code = (
        "import sys; from pathlib import Path\n"
        "from promprune.errors import BackendError\n"
        "from promprune.runtime.sessions import open_file, providers\n"
        "from promprune.runtime.sessions.config import RuntimeConfig\n"
        "providers._why_no_driver = lambda: None\n"
        "print(open_file(Path(sys.argv[1]), RuntimeConfig(provider='auto')).device)\n"
        "try: open_file(Path(sys.argv[1]), RuntimeConfig(provider='cuda'))\n"
        "except BackendError as error: print('do not load' in str(error))\n"
        "try: open_file(Path(sys.argv[1]), RuntimeConfig(provider='tensorrt'))\n"
        "except BackendError as error: print('do not load' in str(error))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert (done.stdout.split(), done.stderr) == (["CPU", "True", "True"], "")


@pytest.mark.gpu
@pytest.mark.skipif(why_not("cuda") is not None, reason=f"no CUDA here: {why_not('cuda')}")
def test_cuda_keeps_tensors_on_the_device(path: Path) -> None:
    with open_file(path, RuntimeConfig(provider="cuda")) as session:
        assert session.device == "CUDA"
        kept = session.run_keeping({"a": ones(1), "b": ones(1)}, keep=["together"])
        again = session.run_keeping({"a": kept["together"], "b": kept["together"]}, keep=[])
        np.testing.assert_array_equal(again["sum"].numpy(), 2 * ones(2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cuda_graphs": True}, "received cuda_graphs = True; expected the backend 'tensorrt' with it"),
    ],
)
def test_settings_of_engines_need_engines(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RuntimeConfig(**options)


def test_whoever_watches_a_session_sees_the_inputs_of_every_run(path: Path) -> None:
    seen: list[list[str]] = []
    with open_file(path, CPU) as session:
        session.on_run = lambda inputs: seen.append(sorted(inputs))
        session.run({"a": ones(1), "b": ones(1)})
        session.run_keeping({"a": ones(1), "b": ones(1)}, keep=[])
        with pytest.raises(BackendError):
            session.run({"a": ones(1)})
    assert seen == [["a", "b"]] * 2
