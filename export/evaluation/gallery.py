"""A page of pictures with their kept tokens, questions and answers; failures first."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from typing import Any, Final

from jinja2 import Environment
from PIL import Image

from promprune.export.evaluation.data import Picture, is_right
from promprune.export.evaluation.runs import Run
from promprune.runtime import draw_kept_tokens
from promprune.runtime.images.overlay import COVERAGE_COLOUR, SALIENCY_COLOUR

__all__ = ["gallery"]

_SIDE: Final = 300  # pixels
_TEMPLATE: Final = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
  :root { color-scheme: light dark; font: 15px/1.45 system-ui, sans-serif; }
  body { margin: 2rem auto; max-width: 1240px; padding: 0 1rem; overflow-wrap: break-word; }
  h1 { font-size: 1.6rem; }
  h2 { font-size: 1rem; margin: 0; }
  article { display: flex; flex-wrap: wrap; gap: 1rem 1.5rem; border-top: 1px solid #8886; padding: 1rem 0; }
  .pictures { display: flex; gap: .5rem; flex: 0 1 {{ 2 * side + 8 }}px; }
  .pictures img { width: calc(50% - .25rem); height: auto; align-self: start; border-radius: 4px; }
  .answers { flex: 1 1 400px; min-width: 0; }
  p { margin: .2rem 0 .6rem; }
  table { border-collapse: collapse; width: 100%; }
  th, td { text-align: left; padding: .2rem .6rem .2rem .3rem; vertical-align: top; }
  th { font-weight: 600; border-bottom: 1px solid #8886; }
  .lost { background: #d55e0024; }
  .wrong { font-weight: 600; }
  .wrong::before { content: "✗ "; }
  .muted { opacity: .7; font-weight: 400; }
  .frame { display: inline-block; width: .8em; height: .8em; border: 3px solid; vertical-align: -.1em; }
</style>
<h1>{{ title }}</h1>
<p>{{ summary }}</p>
<p>Left: what the model sees; right: what is kept of it.
{%- for colour, meaning in colours %}
<span class="frame" style="border-color: {{ colour }}"></span> {{ meaning }};
{%- endfor %} dark: dropped. ✗ is a wrong answer; rows with a tint were right with all tokens.</p>
{% for entry in entries %}
<article>
  <div class="pictures">
    <img alt="{{ entry.name }}" src="data:image/jpeg;base64,{{ entry.view }}">
    <img alt="kept tokens of {{ entry.name }}" src="data:image/jpeg;base64,{{ entry.image }}">
  </div>
  <div class="answers">
    <h2>{{ entry.name }} <span class="muted">{{ entry.groups }}</span></h2>
    <p>Entropy {{ entry.entropy }}: {{ entry.salient }} tokens for saliency, {{ entry.kept - entry.salient }} for
    coverage. Lost by pruning: {{ entry.lost }} of {{ entry.rows | length }} answers.</p>
    <table>
      <tr><th>question</th><th>right</th><th>all tokens</th><th>{{ entry.kept }} tokens</th></tr>
      {% for row in entry.rows %}
      <tr{{ ' class="lost"' | safe if row.lost }}><td>{{ row.question }}</td><td>{{ row.right }}</td>
        <td{{ ' class="wrong"' | safe if not row.full_right }}>{{ row.full }}</td>
        <td{{ ' class="wrong"' | safe if not row.pruned_right }}>{{ row.pruned }}</td></tr>
      {% endfor %}
    </table>
  </div>
</article>
{% endfor %}
</html>
"""


def gallery(
    full: Run, pruned: Run, pictures: Sequence[Picture], *, view: Callable[[Picture], Image.Image], limit: int
) -> str:
    """Return a self-contained HTML page.

    Args:
        full: the run with all tokens.
        pruned: a run with fewer tokens; must have selections.
        pictures: the data.
        view: returns the part of a picture that the model sees; called for the pictures on the page.
        limit: largest number of pictures; those that lost most right answers come first.
    """
    entries = [_entry(full, pruned, index, picture) for index, picture in enumerate(pictures)]
    entries.sort(key=lambda entry: (-entry["lost"], -entry["wrong"]))
    shown = entries[:limit]
    for entry in shown:
        index = entry["index"]
        seen = view(pictures[index])
        drawn = draw_kept_tokens(seen, pruned.selections[index])
        without_legend = (0, 0, drawn.width, drawn.width * seen.height // seen.width)
        entry["view"], entry["image"] = _encode_jpeg(seen), _encode_jpeg(drawn.crop(without_legend))
    condition = pruned.condition
    each = " of each crop" if any(len(selection.spectral_entropies) > 1 for selection in pruned.selections) else ""
    lost = sum(entry["lost"] for entry in entries)
    return (
        Environment(autoescape=True)
        .from_string(_TEMPLATE)
        .render(
            title=f"What {condition.policy} keeps: {condition.keep_tokens} of {condition.num_tokens} tokens{each}",
            summary=f"{len(shown)} of {len(entries)} pictures, failures first; pruning lost {lost} answers in all.",
            entries=shown,
            side=_SIDE,
            colours=[(_css(SALIENCY_COLOUR), "kept for saliency"), (_css(COVERAGE_COLOUR), "kept for coverage")],
        )
    )


def _entry(full: Run, pruned: Run, index: int, picture: Picture) -> dict[str, Any]:
    rows: list[dict[str, Any]] = [
        {
            "question": question.text,
            "right": " / ".join(question.answers),
            "full": full.answers[index][number],
            "pruned": pruned.answers[index][number],
            "full_right": is_right(full.answers[index][number], question),
            "pruned_right": is_right(pruned.answers[index][number], question),
        }
        for number, question in enumerate(picture.questions)
    ]
    for row in rows:
        row["lost"] = row["full_right"] and not row["pruned_right"]
    rows.sort(key=lambda row: (not row["lost"], row["pruned_right"]))
    selection = pruned.selections[index]
    return {
        "index": index,
        "name": picture.name,
        "groups": ", ".join(picture.groups[:1]),
        "entropy": f"{selection.spectral_entropy:.4f}",
        "salient": selection.saliency_count,
        "kept": selection.keep_tokens,
        "lost": sum(row["lost"] for row in rows),
        "wrong": sum(not row["pruned_right"] for row in rows),
        "rows": rows,
    }


def _css(colour: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


def _encode_jpeg(picture: Image.Image) -> str:
    width = min(_SIDE * 2, picture.width)  # twice, for sharp screens
    size = (width, round(width * picture.height / picture.width))
    stream = io.BytesIO()
    picture.resize(size, Image.Resampling.LANCZOS).save(stream, "JPEG", quality=82)
    return base64.b64encode(stream.getvalue()).decode()
