#!/usr/bin/env bash
# Make an environment of the GPU machine's versions (Python 3.12, torch 2.11.0 for CUDA 13.0, transformers 5.17.0, ...) on
# a machine without CUDA, to rehearse in; downloads 0.8 GB:
#     scripts/gpu/rehearsal_env.sh FOLDER
#     PYTHONPATH=$PWD FOLDER/bin/python scripts/gpu/report.py --rehearse --out rehearsal
# PyPI has no CPU build of torch 2.11.0. Its CUDA build runs on the CPU once the CUDA libraries that it links to exist, so
# scripts/gpu/cuda_stand_ins.py compiles libraries of their names whose functions only report that there is no device.
set -euo pipefail
cd "$(dirname "$0")/../.."

folder=$1
"${PROMPRUNE_PYTHON:-python3.12}" -m venv "$folder"
install=("$folder/bin/python" -m pip install --quiet --disable-pip-version-check)
"${install[@]}" -r scripts/gpu/machine_packages.txt $(grep -E '^(msgspec|polygraphy)==' constraints.txt)
"${install[@]}" --no-deps torch==2.11.0 triton==3.6.0
"$folder/bin/python" scripts/gpu/cuda_stand_ins.py "$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch/lib"
"$folder/bin/python" -c 'import torch, transformers; print("torch", torch.__version__, "transformers", transformers.__version__)'
