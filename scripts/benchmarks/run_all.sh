#!/bin/sh
# Every measurement in docs/benchmarks.md but that of the peer, which needs an environment of its own, in a folder:
#     scripts/run scripts/benchmarks/run_all.sh FOLDER
# Needs 10 GB of memory and 30 GB of disk; leave the machine alone meanwhile.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
mkdir -p "$1" && cd "$1"

# Measure a model at both ratios, beside PyTorch, in two runs of so many rounds, and compare the runs.
measure_twice() { # MODEL ROUNDS
    promprune-export "$1" --ratio 1.0 --no-verify -o "$1-1.0"
    promprune-export "$1" --ratio 0.12 --no-verify -o "$1-0.12"
    for run in 1 2; do
        promprune-bench "$1-1.0" "$1-0.12" --model "$1" --baseline hf,authors --provider cpu \
            --rounds "$2" --new-tokens 4 -o "$1-run-$run"
    done
    promprune-bench compare "$1-run-1/report.json" "$1-run-2/report.json" --relative-to "$1-1.0" || true
}

# LLaVA-1.5's vision tower and a language model of 1.1 billion parameters
python "$root/scripts/benchmarks/make_random_llava.py" llava-1b --size 1b
measure_twice llava-1b 6
python "$root/scripts/figures/plot_report.py" llava-1b-run-1/report.json stages llava-1b-stages.png

# The same proportions at a sixtieth of the size
PYTHONPATH=$root python -c 'from pathlib import Path
from tests.support.random_llava import save_scaled_llava
save_scaled_llava(Path("llava-60th"))'
measure_twice llava-60th 10

# The selection at the width of LLaVA-1.5-7B: its vision half, and one layer of its language model
python "$root/scripts/benchmarks/make_random_llava.py" llava-7b-1layer --size 7b --layers 1
promprune-export llava-7b-1layer --ratio 0.12 --no-verify -o d4096-0.12
promprune-bench d4096-0.12 --model llava-7b-1layer --baseline authors --provider cpu \
    --rounds 12 --warmup 2 --new-tokens 1 --cold-starts 0 -o d4096

# The embedded model
promprune-bench --cache cache --ratios 1.0,0.5,0.25,0.12 --baseline hf,authors,random,saliency,coverage \
    --provider cpu --rounds 20 --warmup 2 --batch 1,4 --concurrency 1,2 -o embedded

python "$root/scripts/benchmarks/count_flops.py"
