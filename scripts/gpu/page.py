"""A report as a section of docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from promprune.markdown import markdown_table
from scripts.gpu.goals import goal_lines, median_ms, rows_of
from scripts.gpu.shares import bound_ms, ceilings_of

__all__ = ["section"]

Row = Mapping[str, Any]
MODES = ("eager", "graph", "compiled", "compiled, graph")
LABELS = ("time", "check", "ceiling", "package", "what", "contender", "mode", "batch", "prompt_tokens")
FAMILIES = {"llava": "LLaVA-1.5-7B", "llava_next": "LLaVA-NeXT-7B"}


def section(report: dict[str, Any]) -> str:
    """Return the Markdown between the markers of the page."""
    parts = [
        _heading(report),
        "\n".join(f"- {line}" for line in goal_lines(report)),
        _agreement(rows_of(report, "selection")),
        _times(rows_of(report, "selection"), "The selection", ("time", "batch")),
        _times(rows_of(report, "neighbours"), "What it stands between", ("time", "batch", "prompt_tokens")),
        *(_first_token(rows_of(report, stage), name) for stage, name in FAMILIES.items()),
        _roofline(report),
        _packages(rows_of(report, "onnxruntime")),
        _tests(rows_of(report, "gpu_tests")),
        _unfinished(report),
    ]
    return "\n\n".join(part for part in parts if part)


def _heading(report: dict[str, Any]) -> str:
    machine = report["machine"]
    versions = machine.get("versions", {})
    software = ", ".join(f"{name} {versions[name]}" for name in ("python", "torch", "transformers") if name in versions)
    gpu = (machine.get("gpus") or ["no GPU"])[0].split(",")[0]
    return (
        f"{report['created'][:10]}, {gpu}; {software}. Random weights, bf16; medians of CUDA events, in milliseconds. "
        "`scripts/gpu/README.md` says how it was measured."
    )


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _distinct(rows: Sequence[Row], keys: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the combinations of these labels, in the order of the rows; a row may lack some."""
    seen = []
    for row in rows:
        labels = {key: row[key] for key in keys if key in row}
        if keys[0] in labels and labels not in seen:
            seen.append(labels)
            yield labels


def _agreement(rows: Sequence[Row]) -> str:
    found = [row for row in rows if "check" in row and "images" in row]
    lines = [
        [
            f"{row['check']}, {row['mode']}",
            f"{row['identical_sets']} of {row['images']}",
            f"{row['identical_saliency_counts']} of {row['images']}",
            f"{row['largest_entropy_error']:.1e}",
        ]
        for row in found
    ]
    header = ("kept sets against the float64 method", "identical", "equal T_sal", "largest entropy error")
    return markdown_table(header, lines) if lines else ""


def _times(rows: Sequence[Row], title: str, keys: Sequence[str]) -> str:
    lines = [
        [_label(labels), *(_figure(median_ms(rows, mode=mode, **labels)) for mode in MODES)]
        for labels in _distinct(rows, keys)
    ]
    return markdown_table((title, "eager", "CUDA graph", "compiled", "compiled, CUDA graph"), lines) if lines else ""


def _label(labels: Row) -> str:
    words = [str(labels["time"])]
    words += [f"B = {labels['batch']}"] if "batch" in labels else []
    words += [f"{labels['prompt_tokens']} tokens"] if "prompt_tokens" in labels else []
    return ", ".join(words)


def _first_token(rows: Sequence[Row], name: str) -> str:
    lines = []
    whole = {mode: median_ms(rows, time="first token", contender="all tokens", mode=mode) for mode in MODES[:2]}
    for labels in _distinct([row for row in rows if row.get("time") == "first token"], ("contender", "prompt_tokens")):
        cells = []
        for mode, full in whole.items():
            found = median_ms(rows, time="first token", mode=mode, **labels)
            cells += [_figure(found), f"{100 * (found / full - 1):+.0f} %" if found and full else ""]
        lines.append([labels["contender"], str(labels["prompt_tokens"]), *cells])
    header = (f"First token of {name}", "prompt tokens", "eager", "change", "CUDA graph", "change")
    return markdown_table(header, lines) if lines else ""


def _roofline(report: dict[str, Any]) -> str:
    ceilings = ceilings_of(rows_of(report, "roofline"))
    if "copy" not in ceilings:
        return ""
    products = ", ".join(f"{name} {value / 1e12:.3g}" for name, value in ceilings.items() if name != "copy")
    text = f"Ceilings: a copy of {ceilings['copy'] / 1e12:.3g} TB/s, read and written; products in TFLOP/s: {products}."
    lines = []
    for stage in ("selection", "neighbours"):
        rows = rows_of(report, stage)
        for labels in _distinct([row for row in rows if "flops" in row], ("time", "batch", "prompt_tokens")):
            work = next(row for row in rows if "flops" in row and labels.items() <= row.items())
            bound, best = bound_ms(work, ceilings), median_ms(rows, **labels)
            if bound and best:
                lines.append([_label(labels), _figure(bound), _figure(best), f"{100 * bound / best:.0f} %"])
    return "\n\n".join([text, markdown_table(("at best", "bound", "measured", "share"), lines)]) if lines else text


def _packages(rows: Sequence[Row]) -> str:
    lines = [
        [row["package"], row["what"], str(row.get("result", row.get("error", "")))] for row in rows if "package" in row
    ]
    return markdown_table(("Exported packages on CUDA", "what", "result"), lines) if lines else ""


def _tests(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    outcomes = [row["outcome"] for row in rows]
    counts = ", ".join(f"{outcomes.count(name)} {name}" for name in dict.fromkeys(outcomes))
    failed = [f"`{row['test']}`: {row['message']}" for row in rows if row["outcome"] in ("failure", "error")]
    return "\n".join([f"Tests marked `gpu`: {counts}.", *[""][: len(failed)], *(f"- {line}" for line in failed)])


def _unfinished(report: dict[str, Any]) -> str:
    """Name what failed, so that an empty cell of a table is explained; rows with the same error share a line."""
    lines = [
        f"- {name}: {record['status']}, {record['error']}"
        for name, record in report["stages"].items()
        if record["error"] is not None
    ]
    rows: dict[tuple[str, str], list[str]] = {}
    for name, record in report["stages"].items():
        for row in record["rows"]:
            if "error" in row:
                labels = ", ".join(str(row[key]) for key in LABELS if key in row)
                rows.setdefault((name, row["error"]), []).append(labels)
    lines += [f"- {name}: {error} ({'; '.join(labels)})" for (name, error), labels in rows.items()]
    return "\n".join(["Not measured:", "", *lines]) if lines else ""
