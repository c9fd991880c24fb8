"""Measure the language models of packages against other runtimes: first token and decode steps, in turns, in one run.

    python scripts/benchmarks/peers.py \\
      --run fp32 promprune=llava-1b-fp32 onnxruntime-genai=peers-1b/onnxruntime-genai-fp32 \\
        openvino=peers-1b/openvino-fp32 \\
      --run int4 promprune=llava-1b-int4 onnxruntime-genai=peers-1b/onnxruntime-genai-int4 \\
        openvino=peers-1b/openvino-int4 llama.cpp=peers-1b/llama.cpp-int4.gguf \\
      --python onnxruntime-genai=genai/bin/python --python openvino=ov/bin/python --node-modules node

Every ``--run`` compares runtimes with one dtype of the weights; they are in memory at the same time, each in its own
process and, if it needs one, its own environment; so versions cannot clash. convert_for_peers.py writes the peers'
models. In every round, each runtime answers a prompt of each length once, in random order, while the others wait; the
prompts are token ids, and all runtimes choose greedily. It is not a part of promprune-bench because that asks about
images, which the language models of these runtimes do not see. The last line on stdout is JSON; ``-o`` also writes it
to a file after every run.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from promprune.runtime.bench.statistics import ratio_of_medians

WORKERS = Path(__file__).resolve().parent / "peer_workers"
OURS = "promprune"
SCRIPTS = {
    OURS: "run_promprune.py",
    "onnxruntime-genai": "run_genai.py",
    "openvino": "run_openvino.py",
    "openvino-stateful": "run_openvino.py",
    "llama.cpp": "run_llama_cpp.mjs",
}
LENGTHS = (110, 617)
FIRST_ID, LAST_ID = 5, 200  # ids that the byte tokenizers of the random checkpoints have
PAUSE_S = 0.2  # until the threads of a runtime that has just answered sleep


class Worker:
    """One runtime with one model, in its own process.

    Attributes:
        settings: what the runtime says about its version, threads and KV cache.
    """

    def __init__(self, process: subprocess.Popen[str], name: str) -> None:
        self._process = process
        self._name = name
        self.settings = self._read()

    def answer(self, prompt: Sequence[int], new_tokens: int) -> dict[str, Any]:
        """Return the tokens and the time of each, in milliseconds."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompt": list(prompt), "new_tokens": new_tokens}) + "\n")
        self._process.stdin.flush()
        found = self._read()
        if len(found["tokens"]) != new_tokens:
            sys.exit(f"error: {self._name}: received {len(found['tokens'])} tokens; expected {new_tokens}")
        return found

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("@"):
                content: dict[str, Any] = json.loads(line[1:])
                return content
        sys.exit(f"error: {self._name} ended; its error is above")


@contextmanager
def open_worker(command: Sequence[str]) -> Iterator[Worker]:
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield Worker(process, shlex.join(command))
    finally:
        process.terminate()
        process.wait()


def command_of(runtime: str, model: str, dtype: str, given: argparse.Namespace) -> list[str]:
    script, threads = str(WORKERS / SCRIPTS[runtime]), str(given.threads)
    if runtime == "llama.cpp":
        return ["node", script, model, threads, str(given.node_modules)]
    python = dict(given.python).get(runtime.partition("-stateful")[0], sys.executable)
    return [python, script, model, threads, dtype, runtime]


def measure_run(dtype: str, models: Sequence[tuple[str, str]], given: argparse.Namespace) -> dict[str, Any]:
    """Measure the runtimes of one ``--run``; return their settings, times and ratios."""
    commands = {name: command_of(name, model, dtype, given) for name, model in models}
    with ExitStack() as stack:
        workers = {name: stack.enter_context(open_worker(command)) for name, command in commands.items()}
        found: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for number in range(given.rounds + 1):
            for length in given.lengths:
                prompt = np.random.default_rng(number).integers(FIRST_ID, LAST_ID, length).tolist()
                for name in random.sample(sorted(workers), len(workers)):
                    time.sleep(PAUSE_S)
                    answer = workers[name].answer(prompt, given.new_tokens)
                    if number:  # the first round warms up
                        found.setdefault((name, length), []).append(answer)
    result: dict[str, Any] = {name: {"model": model, "settings": workers[name].settings} for name, model in models}
    for length in given.lengths:
        for name in workers:
            result[name][f"tokens_{length}"] = summarize(found[name, length], found.get((OURS, length), []))
    return result


def summarize(answers: Sequence[dict[str, Any]], ours: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return medians over the rounds, and the ratios ours / theirs with their 95 % intervals."""
    found: dict[str, Any] = {}
    for name, times_of in {"prefill": prefill_ms, "decode": decode_ms}.items():
        theirs = [times_of(answer) for answer in answers]
        ratio = ratio_of_medians([times_of(answer) for answer in ours], theirs) if ours else None
        found[f"{name}_ms"] = round(median(theirs), 2)
        found[f"{name}_all_ms"] = [round(value, 2) for value in theirs]
        found[f"{name}_ratio"] = ratio and [None if value is None else round(value, 3) for value in ratio]
    found["equal_answers"] = sum(a["tokens"] == b["tokens"] for a, b in zip(answers, ours, strict=False))
    return found


def prefill_ms(answer: dict[str, Any]) -> float:
    return float(answer["times_ms"][0])


def decode_ms(answer: dict[str, Any]) -> float:
    return float(median(answer["times_ms"][1:]))


def show(dtype: str, run: dict[str, Any]) -> None:
    print(f"{dtype:<19}prompt  first token ms (ours / theirs)  step ms (ours / theirs)  equal answers")
    for name, facts in run.items():
        for key, found in facts.items():
            if key.startswith("tokens_"):
                shares = ["" if (r := found[f"{s}_ratio"]) is None else f"({r[0]:.2f})" for s in ("prefill", "decode")]
                cells = f"{found['prefill_ms']:>14.1f} {shares[0]:<18}{found['decode_ms']:>11.2f} {shares[1]:<14}"
                print(f"{name:<19}{key.removeprefix('tokens_'):>6} {cells}{found['equal_answers']:>8}", flush=True)


def pair(text: str) -> tuple[str, str]:
    name, found, value = text.partition("=")
    if not found or name not in SCRIPTS:
        sys.exit(f"error: received {text}; expected RUNTIME=PATH with one of {', '.join(SCRIPTS)}")
    return name, value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", nargs="+", action="append", required=True, metavar="DTYPE RUNTIME=MODEL")
    parser.add_argument("--python", type=pair, action="append", default=[], metavar="RUNTIME=PYTHON")
    parser.add_argument("--node-modules", type=Path, default=Path(), help="folder in which node-llama-cpp is installed")
    parser.add_argument("--threads", type=int, default=2, help="threads of every runtime (%(default)s)")
    parser.add_argument("--rounds", type=int, default=6, help="answers to each prompt length (%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=17, help="tokens of each answer (%(default)s)")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens of the prompts (%(default)s)")
    parser.add_argument("-o", "--output", type=Path, help="JSON file to write")
    given = parser.parse_args()
    runs = {}
    for dtype, *models in given.run:
        runs[dtype] = measure_run(dtype, [pair(model) for model in models], given)
        show(dtype, runs[dtype])
        if given.output is not None:
            given.output.write_text(json.dumps(runs, indent=2))
    print(json.dumps(runs))


if __name__ == "__main__":
    main()
