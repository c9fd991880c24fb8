#!/usr/bin/env bash
# On the GPU machine, once for each part that is carried there: keep the part; as soon as an archive is complete, install
# it and measure with it. Arguments are those of report.py:
#     bash scripts/gpu/run_parts.sh --out FOLDER
set -euo pipefail
cd "$(dirname "$0")/../.."

store=${PROMPRUNE_PARTS:-/tmp/promprune-parts}
mkdir -p "$store"
for folder in scripts/gpu/parts/*/; do cp "$folder"* "$store/"; done
ls "$store"

site=$store/site
pip_options=(--quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site")
for set in onnxruntime tensorrt_rtx; do
    if [ ! -e "$store/$set.measured" ] && python3 -m scripts.gpu.parts join "$set" "$store" "$store/$set"; then
        python3 -m pip install "${pip_options[@]}" scripts/gpu/wheels/*.whl "$store/$set"/*.whl
        touch "$store/$set.measured"
        PYTHONUNBUFFERED=1 PYTHONPATH=$site:$PWD python3 scripts/gpu/report.py --run onnxruntime --stages "$set" "$@"
    fi
done
