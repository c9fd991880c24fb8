"""Checks of settings: each names the field, says what was received, and what was expected."""

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

_MOST: Final = 2**31 - 1  # that all backends can count to
_SHOWN_CHARACTERS: Final = 100

Config = TypeVar("Config", bound="DataclassInstance")


def config_from_options(kind: type[Config], options: Mapping[str, Any]) -> Config:
    """Make a dataclass of settings from keyword arguments.

    Raises:
        ConfigError: an option is not one of its fields, or a value is refused.
    """
    names = [field.name for field in fields(kind)]
    for name, value in options.items():
        require(name in names, name, value, f"an option named one of {', '.join(names)}")
    return kind(**options)


def check_integer(config: object, name: str, *, least: int, most: int | None = _MOST, optional: bool = False) -> None:
    """Require a field to be an integer, of Python or numpy, in a range; it is kept as Python's."""
    value = getattr(config, name)
    if optional and value is None:
        return
    require(_is(Integral, value), name, value, "an integer")
    require(value >= least, name, value, f"{least} or more")
    require(most is None or value <= most, name, value, f"{most} or less")
    object.__setattr__(config, name, int(value))


def check_number(config: object, name: str, valid: Callable[[float], bool], expected: str) -> None:
    """Require a field to be a finite real number, of Python or numpy, that is valid; it is kept as a float."""
    value = getattr(config, name)
    try:
        number = float(value) if _is(Real, value) else math.nan
    except OverflowError:  # an integer beyond all floats
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
        raise ConfigError(f"received {name} = {_shown(value)}", expected=expected)


def _shown(value: object) -> str:
    """Return how Python writes a value, cut where that is long."""
    try:
        text = repr(value)
    except Exception:  # of integers with more digits than Python writes, and of strangers' classes
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
