"""Checks of settings. Every error names the field, the value that was received, and what was expected."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Final, TypeVar

from promprune.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = ["check_integer", "check_name", "check_number", "config_from_options", "require"]

_MOST: Final = 2**31 - 1  # the largest integer that all backends can represent
_MAX_CHARACTERS: Final = 100

Config = TypeVar("Config", bound="DataclassInstance")


def config_from_options(kind: type[Config], options: Mapping[str, Any]) -> Config:
    """Make a dataclass of settings from keyword arguments.

    Raises:
        ConfigError: an option is not one of the dataclass's fields, or a value is refused.
    """
    names = [field.name for field in fields(kind)]
    for name, value in options.items():
        require(name in names, name, value, f"an option named one of {', '.join(names)}")
    return kind(**options)


def check_integer(config: object, name: str, *, least: int, most: int | None = _MOST, optional: bool = False) -> None:
    """Require a field to be an integer (Python's or numpy's) in a range, and convert it to ``int``."""
    value = getattr(config, name)
    if optional and value is None:
        return
    require(_is(Integral, value), name, value, "an integer")
    require(value >= least, name, value, f"at least {least}")
    require(most is None or value <= most, name, value, f"at most {most}")
    object.__setattr__(config, name, int(value))


def check_number(config: object, name: str, valid: Callable[[float], bool], expected: str) -> None:
    """Require a field to be a finite real number (Python's or numpy's) that is ``valid``; convert it to ``float``."""
    value = getattr(config, name)
    try:
        number = float(value) if _is(Real, value) else math.nan
    except OverflowError:  # an integer too large for a float
        number = math.inf
    require(math.isfinite(number) and valid(number), name, value, expected)
    object.__setattr__(config, name, number)


def _is(kind: type, value: object) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def check_name(config: object, name: str, names: Sequence[str]) -> None:
    """Require a field to be one of some names."""
    value = getattr(config, name)
    require(isinstance(value, str) and value in names, name, value, f"one of {', '.join(names)}")


def require(valid: bool, name: str, value: object, expected: str) -> None:
    """Raise a :class:`ConfigError` unless ``valid``."""
    if not valid:
        raise ConfigError(f"received {name} = {_format_value(value)}", expected=expected)


def _format_value(value: object) -> str:
    """Return the ``repr`` of a value, truncated if it is long."""
    try:
        text = repr(value)
    except Exception:  # integers with more digits than Python prints; classes with a broken __repr__
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= _MAX_CHARACTERS else f"{text[:_MAX_CHARACTERS]}..."
