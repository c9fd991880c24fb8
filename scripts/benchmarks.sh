#!/bin/sh
# Every measurement in docs/benchmarks.md, in a folder of its own: scripts/run scripts/benchmarks.sh FOLDER
# Needs 10 GB of memory and 30 GB of disk; leave the machine alone meanwhile.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$1" && cd "$1"

# LLaVA-1.5's vision tower and a language model of 1.1 billion parameters, twice
python "$root/scripts/make_random_llava.py" llava-1b --size 1b
promprune-export llava-1b --ratio 1.0 --no-verify -o pkg-1.0
promprune-export llava-1b --ratio 0.12 --no-verify -o pkg-0.12
for run in 1 2; do
    promprune-bench pkg-1.0 pkg-0.12 --model llava-1b --baseline hf,authors --provider cpu \
        --rounds 6 --new-tokens 4 -o "1b-$run"
done
promprune-bench compare 1b-1/report.json 1b-2/report.json --relative-to pkg-1.0 || true
python "$root/scripts/plot_report.py" 1b-1/report.json stages llava-1b-stages.png

# The selection at the width of LLaVA-1.5-7B: its vision half, and one layer of its language model
python "$root/scripts/make_random_llava.py" llava-7b-1layer --size 7b --layers 1
promprune-export llava-7b-1layer --ratio 0.12 --no-verify -o d4096-0.12
promprune-bench d4096-0.12 --model llava-7b-1layer --baseline authors --provider cpu \
    --rounds 12 --warmup 2 --new-tokens 1 --cold-starts 0 -o d4096

# The embedded model
promprune-bench --cache cache --ratios 1.0,0.5,0.25,0.12 --baseline hf,authors,random,saliency,coverage \
    --provider cpu --rounds 20 --warmup 2 --batch 1,4 --concurrency 1,2 -o embedded

python "$root/scripts/count_flops.py"
