"""A page of pictures: what was kept of each, what was asked, and what was answered; failures first."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any, Final

from jinja2 import Environment
from PIL import Image

from promprune.evaluation.data import Picture, is_right
from promprune.evaluation.runs import Run
from promprune.runtime import draw_kept_tokens

__all__ = ["gallery"]

_SIDE: Final = 360  # pixels
_TEMPLATE: Final = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
  :root { color-scheme: light dark; font: 15px/1.45 system-ui, sans-serif; }
  body { margin: 2rem auto; max-width: 1100px; padding: 0 1rem; }
  article { display: flex; flex-wrap: wrap; gap: 1rem; border-top: 1px solid #8886; padding: 1rem 0; }
  article > div { flex: 1 1 420px; }
  img { width: {{ side }}px; max-width: 100%; height: auto; border-radius: 4px; }
  table { border-collapse: collapse; width: 100%; }
  th, td { text-align: left; padding: .2rem .6rem .2rem 0; vertical-align: top; }
  th { font-weight: 600; border-bottom: 1px solid #8886; }
  .wrong { color: #d55e00; font-weight: 600; }
  .wrong::before { content: "✗ "; }
  .muted { color: #888; }
</style>
<h1>{{ title }}</h1>
<p>{{ summary }} Orange frames: kept for their saliency; blue frames: kept for coverage; dark: dropped.</p>
{% for entry in entries %}
<article>
  <img alt="kept tokens of {{ entry.name }}" src="data:image/jpeg;base64,{{ entry.image }}">
  <div>
    <p><b>{{ entry.name }}</b> <span class="muted">{{ entry.groups }}</span><br>
    entropy {{ entry.entropy }}, saliency {{ entry.salient }} of {{ entry.kept }} tokens,
    lost by pruning {{ entry.lost }} of {{ entry.rows | length }} answers</p>
    <table>
      <tr><th>question</th><th>right</th><th>all tokens</th><th>{{ entry.kept }} tokens</th></tr>
      {% for row in entry.rows %}
      <tr><td>{{ row.question }}</td><td>{{ row.right }}</td>
        <td{{ ' class="wrong"' | safe if not row.full_right }}>{{ row.full }}</td>
        <td{{ ' class="wrong"' | safe if not row.pruned_right }}>{{ row.pruned }}</td></tr>
      {% endfor %}
    </table>
  </div>
</article>
{% endfor %}
</html>
"""


def gallery(full: Run, pruned: Run, pictures: Sequence[Picture], *, limit: int) -> str:
    """Return a page that needs nothing else, in HTML.

    Args:
        full: the run with all tokens, which knows what the model sees.
        pruned: a run with fewer; must have selections.
        pictures: the data.
        limit: most pictures to show; those come first whose answers suffered most.
    """
    entries = [_entry(full, pruned, index, picture) for index, picture in enumerate(pictures)]
    entries.sort(key=lambda entry: (-entry["lost"], -entry["wrong"]))
    shown = entries[:limit]
    for entry in shown:
        index = entry["index"]
        drawn = draw_kept_tokens(full.views[index], pruned.selections[index])
        entry["image"] = _encoded(drawn)
    condition = pruned.condition
    lost = sum(entry["lost"] for entry in entries)
    return (
        Environment(autoescape=True)
        .from_string(_TEMPLATE)
        .render(
            title=f"What {condition.policy} keeps: {condition.keep_tokens} of {condition.num_tokens} tokens",
            summary=f"{len(shown)} of {len(entries)} pictures, failures first; pruning lost {lost} answers in all.",
            entries=shown,
            side=_SIDE,
        )
    )


def _entry(full: Run, pruned: Run, index: int, picture: Picture) -> dict[str, Any]:
    rows = [
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
    selection = pruned.selections[index]
    return {
        "index": index,
        "name": picture.name,
        "groups": ", ".join(picture.groups[:1]),
        "entropy": f"{selection.spectral_entropy:.4f}",
        "salient": selection.saliency_count,
        "kept": selection.keep_tokens,
        "lost": sum(row["full_right"] and not row["pruned_right"] for row in rows),
        "wrong": sum(not row["pruned_right"] for row in rows),
        "rows": rows,
    }


def _encoded(picture: Image.Image) -> str:
    size = (_SIDE * 2, round(_SIDE * 2 * picture.height / picture.width))  # twice, for sharp screens
    stream = io.BytesIO()
    picture.resize(size, Image.Resampling.LANCZOS).save(stream, "JPEG", quality=82)
    return base64.b64encode(stream.getvalue()).decode()
