#!/usr/bin/env bash
# Fill scripts/gpu/wheels, which git ignores, with the packages that the GPU machine lacks, and print the size of all
# that travels there:
#     scripts/gpu/pack.sh
set -euo pipefail
cd "$(dirname "$0")/../.."

wheels=scripts/gpu/wheels
packages=(msgspec polygraphy)

rm -rf "$wheels"
mapfile -t pinned < <(printf '%s\n' "${packages[@]}" | xargs -I{} grep -E '^{}==' constraints.txt)
python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
    --python-version 3.12 --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 \
    --dest "$wheels" "${pinned[@]}"
python3 -m scripts.gpu.carried "$wheels"
