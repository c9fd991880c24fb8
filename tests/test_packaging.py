"""The built and installed project is complete, and its parts depend on each other in one direction only."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import promprune
from promprune import errors
from promprune.export import ExportResult

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TOP_LEVEL = {"promprune": "promprune", "promprune.export": "export", "promprune.runtime": "runtime"}


def packages_on_disk() -> set[str]:
    found = set()
    for package, folder in TOP_LEVEL.items():
        for file in (ROOT / folder).rglob("__init__.py"):
            parts = file.parent.relative_to(ROOT / folder).parts
            if package != "promprune" or parts[:1] not in (("export",), ("runtime",)):  # those two are links
                found.add(".".join((package, *parts)))
    return found


def test_every_package_on_disk_is_listed() -> None:
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == packages_on_disk()


def test_the_two_links_are_there() -> None:
    for name in ("export", "runtime"):
        assert (ROOT / "promprune" / name).is_symlink()
        assert (ROOT / "promprune" / name).resolve() == ROOT / name


def python(code: str, *, cwd: Path | None = None, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={**os.environ, **environment},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("promprune", ("torch", "transformers", "onnx", "onnxruntime", "numpy")),
        ("promprune.runtime", ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "promprune.export")),
        (
            "promprune.runtime.commands.run",
            ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "promprune.export"),
        ),
        ("promprune.runtime.commands.bench", ("torch", "transformers", "onnx", "matplotlib")),
        ("promprune.runtime.bench.cold_start", ("torch", "transformers", "onnx", "promprune.export")),
        ("promprune.export.commands.export", ("torch", "transformers", "onnx", "onnxruntime")),
    ],
)
def test_importing_stays_light(module: str, forbidden: tuple[str, ...]) -> None:
    loaded = python(f"import sys, {module}; print(*sys.modules)").split()
    assert not set(loaded) & set(forbidden)


def test_the_runtime_never_loads_what_only_exporting_needs(tiny_export: ExportResult) -> None:
    code = (
        "import sys; from PIL import Image; from promprune.runtime import VisionLanguagePipeline\n"
        f"with VisionLanguagePipeline.from_package({str(tiny_export.output)!r}) as pipeline:\n"
        "    pipeline.generate([Image.new('RGB', (60, 50))], 'hello', max_new_tokens=2)\n"
        "print(*sys.modules)"
    )
    loaded = set(python(code).split("\n")[-1].split())
    assert not loaded & {"torch", "transformers", "onnx", "onnx_ir", "onnxscript", "promprune.export"}
    assert "onnxruntime" in loaded


def test_every_error_derives_from_one_and_is_drawn_in_the_docstring() -> None:
    drawn = errors.__doc__ or ""
    for name in errors.__all__:
        assert issubclass(getattr(errors, name), promprune.errors.PrompruneError)
        assert name in drawn


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel and the source distribution, built from the tree."""
    output = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(output), str(ROOT)],
        check=True,
        capture_output=True,
    )
    return output


def test_wheel_and_sdist_hold_everything(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for package, folder in TOP_LEVEL.items():
        for file in (ROOT / folder).rglob("*.py"):
            parts = file.relative_to(ROOT / folder).parts
            if package != "promprune" or parts[0] not in ("export", "runtime"):
                assert "/".join((*package.split("."), *parts)) in names
    embedded = {path.name for path in (ROOT / "promprune/embedded/model").iterdir()}
    assert "model.safetensors" in embedded
    assert {f"promprune/embedded/model/{name}" for name in embedded} <= names
    page = {path.name for path in (ROOT / "runtime/server/page").iterdir() if path.is_file()}
    assert "index.html" in page
    assert {f"promprune/runtime/server/page/{name}" for name in page} <= names
    assert not any(name.startswith(("export/", "runtime/", "tests/")) for name in names)
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {"export/pipeline.py", "runtime/pipeline.py", "promprune/embedded/model/model.safetensors"} <= inside
    assert {"LICENSE", "README.md", "pyproject.toml"} <= inside


def test_an_installed_wheel_exports_and_runs(built: Path, tiny_llava: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*pip, str(wheel)], check=True)
    environment = {"PYTHONPATH": str(site)}
    home = python("import promprune.export; print(promprune.export.__file__)", cwd=tmp_path, **environment)
    assert Path(home) == site / "promprune/export/__init__.py"
    export = f"""
import sys
from promprune.export.commands.export import main
sys.argv = ["promprune-export", {str(tiny_llava)!r}, "--ratio", "0.25", "--no-verify", "-o", "package"]
main()
"""
    assert "keeps 4 of 16 visual tokens" in python(export, cwd=tmp_path, **environment)
    run = """
import sys
from PIL import Image
from promprune.runtime.commands.run import main
Image.new("RGB", (64, 48), "red").save("image.png")
sys.argv = ["promprune-run", "package", "--image", "image.png", "--prompt", "what", "--max-new-tokens", "4", "--json"]
main()
"""
    assert '"text"' in python(run, cwd=tmp_path, **environment)


PUBLIC = {
    "promprune": [
        "PrompruneError",
        "PrunedTokens",
        "Selection",
        "SelectionConfig",
        "__version__",
        "prune_tokens",
        "select_tokens",
    ],
    "promprune.export": ["ExportConfig", "ExportResult", "build_selector", "export_package", "verify_package"],
    "promprune.runtime": [
        "AnswerStream",
        "Chat",
        "EncodedImage",
        "Engine",
        "GenerationConfig",
        "ImageEncoder",
        "Request",
        "Result",
        "RuntimeConfig",
        "Timings",
        "TokenSelection",
        "VisionLanguagePipeline",
        "draw_kept_tokens",
        "image_embeds_part",
        "load_image",
    ],
}


@pytest.mark.parametrize("package", PUBLIC)
def test_the_public_names_are_these(package: str) -> None:
    module = importlib.import_module(package)
    assert module.__all__ == PUBLIC[package]
    assert all(getattr(module, name) is not None for name in module.__all__)
    with pytest.raises(AttributeError, match="surprise"):
        _ = module.surprise


def test_the_public_names_are_few() -> None:
    assert sum(map(len, PUBLIC.values())) <= 30


def test_promprune_run_uses_the_public_names_of_the_runtime_only() -> None:
    tree = ast.parse((ROOT / "runtime/commands/run.py").read_text(encoding="utf-8"))
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    assert {module for module in modules if module.startswith("promprune.runtime.")} == {
        "promprune.runtime.commands.options"  # which is a part of the command
    }
