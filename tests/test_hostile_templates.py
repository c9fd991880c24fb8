"""Chat templates of strangers: each is refused in one line, within a bounded time and memory."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

from promprune.errors import PackageError, PromptError
from promprune.runtime.engine.prompt import PromptBuilder
from tests.support.fake_package import IMAGE_TOKEN, IMAGE_TOKEN_ID, make_tokenizer
from tests.support.meter import report, run_limited

MESSAGES: Final = [{"role": "user", "content": [{"type": "text", "text": "What is it? " * 20}]}]

HOSTILE: Final = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% if false %}{% endif %}{% endfor %}{% endfor %}x",
    "{% for a in range(9999) %}{% set n = range(99999)|list %}{% endfor %}",
    "{% for a in range(9999) %}{% set n = range(99999)|map('string')|join %}{% endfor %}",
    "{% for a in range(99999) %}{{ 'x' * 9999 }}{% endfor %}",
    "{{ 'x' * 10**10 }}",
    "{{ [0] * 10**10 }}",
    "{{ 10**10 * 'x' }}",
    "{{ 9**9**9 }}",
    "{% set ns = namespace(x=9) %}{% for a in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x='ab') %}{% for a in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for a in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for a in range(99) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x='ab') %}{% for a in range(99) %}{% set ns.x = (ns.x, ns.x) %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x='ab') %}{% for a in range(99) %}{% set ns.x = {1: ns.x, 2: ns.x} %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for a in range(99) %}{% set ns.x = dict(a=ns.x, b=ns.x) %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for a in range(99) %}"  # noqa: ISC004 - one template
    "{% set x %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = x %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for a in range(99) %}{% set ns.x = [ns.x, ns.x]|join %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for a in range(99) %}{% set ns.x = ''.join([ns.x, ns.x]) %}{% endfor %}",
    "{% set ns = namespace(x='aa') %}{% for a in range(99) %}{% set ns.x = ns.x.replace('a', 'aa') %}{% endfor %}",
    "{% set ns = namespace(x='aa') %}{% for a in range(99) %}{% set ns.x = ns.x|replace('a', 'aa') %}{% endfor %}",
    "{% set ns = namespace(x='aa') %}{% for a in range(99) %}{% set ns.x = '%s%s' % (ns.x, ns.x) %}{% endfor %}",
    "{% set ns = namespace(x='aa') %}{% for a in range(99) %}{% set ns.x = '%s%s'|format(ns.x, ns.x) %}{% endfor %}",
    "{% set ns = namespace(x='aa') %}{% for a in range(99) %}{% set ns.x = '{0}{0}'.format(ns.x) %}{% endfor %}",
    "{% set ns = namespace(x=namespace()) %}{% for a in range(99) %}"  # noqa: ISC004 - one template
    "{% set ns.x = namespace(a=ns.x, b=ns.x) %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=[]) %}{% set s = 'abcdefgh' * 100000 %}"  # noqa: ISC004 - one template
    "{% for a in range(9999) %}{% set ns.x = [ns.x, s[1:]] %}{% endfor %}",
    "{% set ns = namespace(x=[]) %}{% set s = 'abcdefgh' * 100000 %}"  # noqa: ISC004 - one template
    "{% for a in range(9999) %}{% set ns.x = [ns.x, s|upper] %}{% endfor %}",
    "{{ messages|tojson(indent=10**9) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (10**9, 1) }}",
    "{{ '%1000000000d'|format(1) }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 10**9) }}",
    "{{ 'a\\nb'|indent(10**9) }}",
    "{{ 'x'.center(10**9) }}",
    "{{ 'x'|center(10**9) }}",
    "{{ '\\t'.expandtabs(10**9) }}",
    "{{ 'x'.zfill(10**9) }}",
    "{{ 'a b'|wordwrap(1, wrapstring='x' * 1000000) }}",
    "{{ range(9)|slice(10**9)|list }}",
    "{{ range(9)|batch(10**9, 0)|list }}",
    "{{ lipsum(n=10**6) }}",
    "{{ 1.5|round(10**9) }}",
    "{{ (5).to_bytes(10**9, 'big') }}",
    "{{ strftime_now('%1000000000d') }}",
    "{{ range(10**9) }}",
    "{{ ([0] * 99999)|sum(start=[]) }}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(90) }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% block b %}{{ self.b() }}{{ self.b() }}{% endblock %}",
    "{% for x in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
    "{% set x %}{% for a in range(99999) %}" + "y" * 50000 + "{% endfor %}{% endset %}",
    "{{ 'x' }}" * 14000,
    "(" * 5000 + "{{" + "(" * 50000 + "1",
    "{% if 1 %}" * 2000,
    "{% for a in range(9) %}" * 25 + "{% endfor %}" * 25,
)  # fmt: skip

PARTS: Final = (
    "{% for {v} in {e} %}", "{% endfor %}", "{% if {e} %}", "{% endif %}", "{% set {v} = {e} %}", "{{ {e} }}",
    "{% set ns.{v} = {e} %}", "{% macro {v}() %}", "{% endmacro %}", "{% set {v} %}", "{% endset %}", "text",
)  # fmt: skip
EXPRESSIONS: Final = (
    "{v}", "ns.{v}", "range(99999)", "[{e}, {e}]", "{e} + {e}", "{e} ~ {e}", "{e} * {e}", "{e} ** {e}", "{e} % {e}",
    "({e}, {e})", "{e}|tojson", "{e}|join({e})", "{e}|list", "{e}|string", "{e}.replace({e}, {e})", "{e}|map('list')",
    "{e}[{e}]", "{e}[{e}:]", "'abc'", "'x' * 99999", "9999", "messages", "{v}()", "{'a': {e}}", "{e}|indent({e})",
    "{e}.format({e})", "'%s%s' % ({e}, {e})", "{e}|length", "{e} == {e}", "{e}|sort", "loop.index", "{e}.split({e})",
)  # fmt: skip


def builder_of(folder: Path) -> PromptBuilder:
    return PromptBuilder(folder=folder, image_token=IMAGE_TOKEN, image_token_id=IMAGE_TOKEN_ID, context_length=256)


def render(folder: Path, template: str) -> str:
    (folder / "chat_template.jinja").write_text(template)
    try:
        return f"{len(builder_of(folder).render(MESSAGES))} characters"
    except (PackageError, PromptError) as error:
        return f"refused: {str(error)[:200]}" if "\n" not in str(error) else "several lines"


def made_up(chance: random.Random) -> str:
    """A template of random parts; most are refused, the others render something."""

    def expression(depth: int) -> str:
        form = chance.choice(EXPRESSIONS if depth < 4 else EXPRESSIONS[:3])
        return fill(form, depth + 1)

    def fill(form: str, depth: int) -> str:
        while "{e}" in form:
            form = form.replace("{e}", expression(depth), 1)
        return form.replace("{v}", chance.choice("abc"))

    loops = "".join(f"{{% for {name} in range(999) %}}" for name in "abc"[: chance.randrange(4)])
    body = "".join(fill(chance.choice(PARTS[4:7]), 0) for _ in range(chance.randint(1, 6)))
    return "{% set ns = namespace(a='ab', b=[1], c=2) %}" + loops + body + "{% endfor %}" * loops.count("{%")


def main(folder: str, what: str, *numbers: str) -> None:
    """Render templates, and report what each costs; called in a process with limits."""
    path = Path(folder)
    make_tokenizer().save(str(path / "tokenizer.json"))
    builder_of(path).render(MESSAGES)  # imports
    if what == "hostile":
        templates = list(HOSTILE)
    else:
        chance = random.Random(int(numbers[1]))
        templates = [made_up(chance) for _ in range(int(numbers[0]))]
    jobs: list[tuple[str, Callable[[], Any]]] = [
        (template[:300], lambda template=template: render(path, template))  # type: ignore[misc]
        for template in templates
    ]
    report(jobs)


linux_only = pytest.mark.skipif(sys.platform != "linux", reason="limits and peak memory are read from Linux")


@linux_only
def test_hostile_templates_are_refused(tmp_path: Path) -> None:
    costs, stderr = run_limited(
        "tests.test_hostile_templates", str(tmp_path), "hostile", cpu_seconds=120, memory_mb=3000
    )
    assert stderr == ""
    assert len(costs) == len(HOSTILE)
    for cost in costs:
        assert cost["outcome"].startswith("done: "), cost
        assert cost["seconds"] < 2, cost
        assert cost["megabytes"] < 600, cost
    answered = [cost["name"] for cost in costs if "refused" not in cost["outcome"]]
    assert len(answered) <= 2, answered  # (9**9)**9, and a long template of short outputs


@linux_only
@pytest.mark.slow
def test_random_templates_cost_little(tmp_path: Path) -> None:
    arguments = ("tests.test_hostile_templates", str(tmp_path), "fuzz", "1500", "0")
    costs, stderr = run_limited(*arguments, cpu_seconds=1200, memory_mb=3000)
    assert stderr == ""
    assert len(costs) == 1500
    for cost in costs:
        assert cost["outcome"].startswith("done: "), cost
        assert cost["seconds"] < 2, cost
        assert cost["megabytes"] < 600, cost
    assert sum("refused" not in cost["outcome"] for cost in costs) > 15


if __name__ == "__main__":
    main(*sys.argv[1:])
