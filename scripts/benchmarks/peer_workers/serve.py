"""How a worker of peers.py talks: JSON objects on lines that start with ``@``, and one request per line of stdin.

The first line tells the settings of the runtime. A request is ``{"prompt": [token ids], "new_tokens": count}``; its
answer is ``{"tokens": [...], "times_ms": [...]}``: the time of the first token, then that of every further token.
This module has to work in the environment of any runtime.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from itertools import pairwise

OnToken = Callable[[int], None]


def serve(settings: dict[str, object], answer: Callable[[list[int], int, OnToken], None]) -> None:
    """Answer requests until stdin ends; ``answer`` is called with the prompt, the count and what to call per token."""
    say(settings)
    for line in sys.stdin:
        request = json.loads(line)
        tokens: list[int] = []
        moments = [time.perf_counter()]

        def on_token(token: int, tokens: list[int] = tokens, moments: list[float] = moments) -> None:
            moments.append(time.perf_counter())
            tokens.append(token)

        answer(request["prompt"], request["new_tokens"], on_token)
        times = [(end - begin) * 1000 for begin, end in pairwise(moments)]
        say({"tokens": tokens, "times_ms": times})


def say(content: dict[str, object]) -> None:
    print("@" + json.dumps(content), flush=True)
