"""Chat templates of strangers: a sandbox in which rendering has a budget of time, characters and values.

Jinja's sandbox keeps a template from running other code, but not from looping, multiplying texts or nesting lists
without end. Here, only the filters and methods that chat templates use exist. Every round of a loop and every call of a
macro checks the time; every operation that makes a text or a list is checked before, or charged to the budget.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from functools import wraps
from time import thread_time
from typing import Any, Final, NoReturn

from jinja2 import Template, TemplateError, Undefined, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.filters import FILTERS
from jinja2.runtime import LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

__all__ = ["MAX_TEMPLATE_BYTES", "OverBudgetError", "compile_template", "rendering"]

MAX_TEMPLATE_BYTES: Final = 128 * 1024  # the longest published chat templates have some 20 kB
_MAX_SECONDS: Final = 1.0  # of CPU time
_MAX_CHARACTERS: Final = 32_000_000  # of all texts that are made while rendering; entries of lists count like 8
_MAX_VALUES: Final = 100_000  # in one nested list or mapping
_MAX_INTEGER_BITS: Final = 4096
_MAX_WIDTH: Final = 1000  # of a format or an indentation
_CHARACTERS_PER_ENTRY: Final = 8


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# The filters that exist; those of Jinja that are left out multiply texts, or have no use in a chat template.
_FILTERS: Final = _words(
    """abs capitalize count d default dictsort e escape first float groupby int items last length list lower map max min
    reject rejectattr reverse safe select selectattr sort string title trim unique upper"""
)
_METHODS: Final[Mapping[type, frozenset[str]]] = {
    str: _words(
        """capitalize casefold count endswith find format index isalnum isalpha isascii isdecimal isdigit islower
        isnumeric isspace istitle isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex
        rpartition rsplit rstrip split splitlines startswith strip swapcase title upper"""
    ),
    dict: _words("copy get items keys values"),
    list: _words("copy count index"),
    tuple: _words("count index"),
}
_LONG_NUMBER: Final = re.compile(r"\d{4}")
_NESTED_FIELD: Final = re.compile(r"\{[^{}]*\{")


class OverBudgetError(TemplateError):
    """A template needs more than its budget; rendering it again would, too."""


class _Budget:
    """What is left for one rendering."""

    def __init__(self) -> None:
        self._end = thread_time() + _MAX_SECONDS
        self._characters = _MAX_CHARACTERS

    def check_time(self) -> None:
        if thread_time() > self._end:
            raise OverBudgetError(f"it takes more than {_MAX_SECONDS:g} s")

    def charge(self, characters: int) -> None:
        self._characters -= characters
        if self._characters < 0:
            raise OverBudgetError(f"it makes texts of more than {_MAX_CHARACTERS} characters")


_BUDGET: Final[ContextVar[_Budget | None]] = ContextVar("budget", default=None)


@contextmanager
def rendering() -> Iterator[None]:
    """Give the templates that are rendered in the block, on this thread, one budget."""
    token = _BUDGET.set(_Budget())
    try:
        yield
    finally:
        _BUDGET.reset(token)


def compile_template(source: str) -> Template:
    """Compile a template, with the functions and extensions of Hugging Face chat templates.

    Raises:
        Exception: it is not valid; Jinja and Python raise errors of several types.
    """
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        optimized=False,  # constants would be computed while compiling, which has no budget
        finalize=_printable,
        extensions=["jinja2.ext.loopcontrols", _Generation],
    )
    with rendering():
        return environment.from_string(source)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox; operations that Jinja would do by itself are calls of its methods."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.filters = {name: _charged(FILTERS[name]) for name in _FILTERS}
        self.filters |= {"tojson": _to_json, "join": _join, "indent": _indent, "format": _format}
        self.filters["replace"] = _replace
        self.globals = {
            "range": self.globals["range"],  # the sandbox's, of at most 100,000 numbers
            "dict": lambda *args, **values: _checked(dict(*args, **values)),
            "namespace": self.globals["namespace"],
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }
        self._functions = frozenset(map(id, self.globals.values()))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _with_checks(super()._parse(source, name, filename))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 - Jinja's names
        _check_time()
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps the method ``format`` of texts
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        known = isinstance(__obj, (Macro, LoopContext, Undefined)) or isinstance(owner, LoopContext)
        if not known and id(__obj) not in __self._functions and owner is not __self:
            if name not in _METHODS.get(type(owner), ()):
                raise SecurityError(f"{name or type(__obj).__name__} is not a function of chat templates")
            _check_method(owner, name, args, kwargs)
        return _charge(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _check_operator(operator, left, right)
        return _charge(super().call_binop(context, operator, left, right))

    def tick(self, characters: int) -> None:
        """Called in every round of a loop and every call of a macro, with the length of the text in it."""
        _check_time()
        _charge_characters(characters)

    def concatenated(self, *values: Any) -> str:
        return _join(values)

    def made(self, value: Any) -> Any:
        return _checked(value)

    def part(self, value: Any, start: Any, stop: Any, step: Any) -> Any:
        return _charge(value[start:stop:step])


class _Generation(Extension):
    """Ignores the tags ``{% generation %}`` and ``{% endgeneration %}``."""

    tags: set[str] = {"generation"}  # noqa: RUF012 - jinja's own declaration

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _with_checks(tree: nodes.Template) -> nodes.Template:
    """Insert calls of the environment's checks into a parsed template."""
    blocks: Iterable[Any] = list(tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock, nodes.Block)))
    for block in blocks:
        size = sum(len(data.data) for data in block.find_all(nodes.TemplateData))
        block.body.insert(0, nodes.ExprStmt(_call("tick", nodes.Const(size))))
    _replace_expressions(tree)
    return tree


def _replace_expressions(node: nodes.Node) -> None:
    for name, value in list(node.iter_fields()):
        if isinstance(value, list):
            setattr(node, name, [_replaced(item) if isinstance(item, nodes.Node) else item for item in value])
        elif isinstance(value, nodes.Node):
            setattr(node, name, _replaced(value))


def _replaced(node: nodes.Node) -> nodes.Node:
    _replace_expressions(node)
    if isinstance(node, nodes.Concat):
        return _call("concatenated", *node.nodes)
    if isinstance(node, (nodes.List, nodes.Dict)) or (isinstance(node, nodes.Tuple) and node.ctx == "load"):
        return _call("made", node)
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        ends = (node.arg.start, node.arg.stop, node.arg.step)
        return _call("part", node.node, *(nodes.Const(None) if end is None else end for end in ends))
    return node


def _call(name: str, *args: nodes.Expr) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), list(args), [], None, None)


def _check_time() -> None:
    if budget := _BUDGET.get():
        budget.check_time()


def _charge_characters(characters: int) -> None:
    if budget := _BUDGET.get():
        budget.charge(characters)


def _charge(value: Any) -> Any:
    """Charge a new text or list to the budget, and return it."""
    if isinstance(value, str):
        _charge_characters(len(value))
    elif isinstance(value, (list, tuple, dict)):
        _charge_characters(_CHARACTERS_PER_ENTRY * len(value))
        _checked(value)
    return value


def _charged(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)  # keeps the marks by which Jinja passes its context
    def filtered(*args: Any, **kwargs: Any) -> Any:
        _check_time()
        if function is FILTERS["string"]:
            _printable(args[0])
        return _charge(function(*args, **kwargs))

    return filtered


def _checked(value: Any) -> Any:
    """Refuse a list or mapping with too many values in it, counting those that occur several times each time."""
    pending, count = [value], 0
    while pending:
        one = pending.pop()
        count += 1
        if isinstance(one, dict):
            pending += one.values()
        elif isinstance(one, (list, tuple)):
            pending += one
        if count + len(pending) > _MAX_VALUES:
            raise TemplateError(f"it makes lists of more than {_MAX_VALUES} values")
    return value


def _printable(value: Any) -> Any:
    """Check a value before it becomes text, and charge that text to the budget."""
    if isinstance(value, str):
        _charge_characters(len(value))
    elif isinstance(value, (list, tuple, dict)):
        pending = [_checked(value)]
        while pending:
            one = pending.pop()
            if isinstance(one, (list, tuple)):
                pending += one
            elif isinstance(one, dict):
                pending += [*one, *one.values()]
            else:
                _printable(one)
    elif not (value is None or isinstance(value, (bool, int, float, Undefined))):
        raise TemplateError(f"it prints a {type(value).__name__}")
    return value


def _check_operator(operator: str, left: Any, right: Any) -> None:
    if operator == "%" and isinstance(left, str):
        _check_format(left, right if isinstance(right, tuple) else (right,))
    elif operator in ("*", "**"):
        numbers = [value for value in (left, right) if isinstance(value, int)]
        if len(numbers) == 2:
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > _MAX_INTEGER_BITS:
                raise TemplateError("it computes with very large numbers")
        elif numbers and operator == "*" and hasattr(other := right if left is numbers[0] else left, "__len__"):
            _charge_characters(max(0, len(other) * numbers[0]) * _weight(other))
    elif operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
        _charge_characters((len(left) + len(right)) * _weight(left))


def _weight(value: Any) -> int:
    return 1 if isinstance(value, str) else _CHARACTERS_PER_ENTRY


def _check_method(owner: Any, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Check what a method is going to make."""
    if not isinstance(owner, str):
        return
    if name == "format":
        _check_format(owner, (*args, *kwargs.values()))
        if _NESTED_FIELD.search(owner):
            raise TemplateError("it formats with a width that is computed")
    elif name == "replace" and len(args) >= 2:
        _check_replace(owner, str(args[0]), str(args[1]))
    elif name == "join" and args:
        _charge_characters(_length_of(args[0], len(owner)))
    elif name in ("split", "rsplit", "splitlines"):
        _charge_characters(_CHARACTERS_PER_ENTRY * len(owner) // 4)


def _length_of(values: Iterable[Any], separator: int) -> int:
    if not isinstance(values, (str, list, tuple, dict)):
        raise TemplateError(f"it concatenates a {type(values).__name__}")
    return sum(separator + (len(value) if isinstance(value, str) else 0) for value in values)


def _check_replace(text: str, old: str, new: str) -> None:
    _charge_characters(len(text) + (text.count(old) if old else len(text) + 1) * len(new))


def _check_format(form: str, values: Iterable[Any]) -> None:
    if _LONG_NUMBER.search(form) or ("%" in form and "*" in form):
        raise TemplateError(f"it formats with a width above {_MAX_WIDTH}")
    uses = form.count("%") + form.count("{")
    for value in values:
        _printable(value)
        if isinstance(value, str):
            _charge_characters(len(value) * uses)


def _format(value: Any, *args: Any, **kwargs: Any) -> str:
    form = str(_printable(value))
    _check_format(form, (*args, *kwargs.values()))
    formatted = form % (kwargs or args)
    _charge(formatted)
    return formatted


def _replace(value: Any, old: str, new: str, count: int | None = None) -> str:
    text = str(_printable(value))
    _check_replace(text, str(old), str(new))
    return text.replace(str(old), str(new), -1 if count is None else count)


def _join(values: Iterable[Any], separator: str = "", attribute: str | int | None = None) -> str:
    parts: list[str] = []
    for value in values:
        _check_time()
        if attribute is not None:
            value = value.get(attribute, "") if isinstance(value, Mapping) else ""
        part = str(_printable(value))
        _charge_characters(len(separator))
        parts.append(part)
    return str(separator).join(parts)


def _indent(value: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    size = width if isinstance(width, int) else len(width)
    if size > _MAX_WIDTH:
        raise TemplateError(f"it indents by more than {_MAX_WIDTH}")
    text = str(_printable(value))
    _charge_characters(len(text) + size * (text.count("\n") + 1))
    indented: str = FILTERS["indent"](text, width, first, blank)
    return indented


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    size = indent if isinstance(indent, int) else len(indent or "")
    if size > 16 or any(len(separator) > 16 for separator in separators or ()):
        raise TemplateError("it indents JSON by more than 16")
    _printable(value)
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    _charge(text)
    return text


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    if len(form) > 100 or re.search(r"%[^A-Za-z%]*\d", form):
        raise TemplateError("it formats the time in an unusual way")
    return datetime.now().strftime(form)
