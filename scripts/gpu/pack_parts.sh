#!/usr/bin/env bash
# Download ONNX Runtime for CUDA and TensorRT for RTX for the GPU machine, and cut them into parts of 49 MiB in
# scripts/gpu/parts, which git ignores. One part travels with each run:
#     scripts/gpu/pack_parts.sh
set -euo pipefail
cd "$(dirname "$0")/../.."

parts=scripts/gpu/parts
pip_options=(--quiet --disable-pip-version-check --no-deps)
# tensorrt_rtx and tensorrt_rtx_cu13 are source archives of a few files, which any Python builds.
declare -A binaries=([onnxruntime]="onnxruntime-gpu" [tensorrt_rtx]="tensorrt_rtx_cu13_bindings tensorrt_rtx_cu13_libs")
declare -A sources=([onnxruntime]="" [tensorrt_rtx]="tensorrt-rtx tensorrt_rtx_cu13")

pinned() { # NAME...
    for name; do grep -E "^$name==" constraints.txt; done
}

rm -rf "$parts"
for set in onnxruntime tensorrt_rtx; do
    wheels=$(mktemp -d)
    for package in $(pinned ${binaries[$set]}); do
        python3 -m pip download "${pip_options[@]}" --only-binary=:all: --python-version 3.12 --implementation cp \
            --platform manylinux_2_28_x86_64 --dest "$wheels" "$package"
    done
    for package in $(pinned ${sources[$set]}); do
        python3 -m pip wheel "${pip_options[@]}" --wheel-dir "$wheels" "$package"
    done
    python3 -m scripts.gpu.parts split "$set" "$wheels" "$parts"
    rm -rf "$wheels"
done
python3 -m scripts.gpu.carried scripts/gpu/wheels "$parts/onnxruntime.00"
