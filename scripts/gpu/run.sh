#!/usr/bin/env bash
# On the GPU machine, from the checkout that was carried there: install the carried wheels beside the machine's own
# packages, and measure. Arguments are those of report.py:
#     bash scripts/gpu/run.sh --out FOLDER
set -euo pipefail
cd "$(dirname "$0")/../.."

site=$(mktemp -d)
python3 -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$site" scripts/gpu/wheels/*.whl
PYTHONUNBUFFERED=1 PYTHONPATH=$PWD:$site exec python3 scripts/gpu/report.py "$@"
