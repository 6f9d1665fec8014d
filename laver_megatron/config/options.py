"""What a field of the configuration has besides its value: help, choices, range, type, and how YAML writes it."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml


@dataclass(frozen=True)
class Range:
    """The values that a number may have. schema: the bounds, under JSON schema's names; rule: the same in words."""

    rule: str
    schema: Mapping[str, float]

    def holds(self, value: float) -> bool:
        """Whether a value lies within all bounds."""
        bounds = self.schema
        return (
            value >= bounds.get("minimum", value)
            and value <= bounds.get("maximum", value)
            and not value <= bounds.get("exclusiveMinimum", float("-inf"))
            and not value >= bounds.get("exclusiveMaximum", float("inf"))
        )


POSITIVE = Range("must be at least 1", {"minimum": 1})
NOT_NEGATIVE = Range("must not be negative", {"minimum": 0})
ABOVE_ZERO = Range("must be above 0", {"exclusiveMinimum": 0})
SHARE = Range("must be from 0 to 1", {"minimum": 0, "maximum": 1})
BELOW_ONE = Range("must be at least 0 and below 1", {"minimum": 0, "exclusiveMaximum": 1})
SEED = Range("must be at least 0 and below 2**63", {"minimum": 0, "exclusiveMaximum": 2**63})


def option(
    help_text: str, *, choices: tuple[str, ...] | None = None, valid: Range | None = None, **default: Any
) -> Any:
    """A dataclass field with what the help page and the checks need; `default=...` or required."""
    return field(metadata={"help": help_text, "choices": choices, "range": valid}, **default)


def is_required(item: dataclasses.Field[Any]) -> bool:
    """Whether the field has no default."""
    return item.default is dataclasses.MISSING


@dataclass(frozen=True)
class FieldType:
    """What a field may hold: `scalars`, several of them if `is_list`, None as well if `is_optional`."""

    scalars: tuple[type, ...]
    is_list: bool
    is_optional: bool

    def holds(self, value: Any) -> bool:
        """Whether a value, as JSON has it, is of this type."""
        if value is None:
            return self.is_optional
        if self.is_list != isinstance(value, (list, tuple)):
            return False
        return all(self._is_scalar(item) for item in (value if self.is_list else [value]))

    def _is_scalar(self, value: Any) -> bool:
        if isinstance(value, bool):
            return bool in self.scalars
        return isinstance(value, self.scalars) or (float in self.scalars and isinstance(value, int))


def field_type(hint: Any) -> FieldType:
    """The type of a field by its annotation."""
    members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    plain = tuple(member for member in members if member is not type(None))
    is_list = typing.get_origin(plain[0]) is tuple
    scalars = (typing.get_args(plain[0])[0],) if is_list else plain
    return FieldType(scalars, is_list, is_optional=type(None) in members)


def yaml_line(name: str, value: Any) -> str:
    """`name: value` as YAML, on one line."""
    if isinstance(value, tuple):
        return f"{name}: [{', '.join(_yaml_scalar(item) for item in value)}]"
    return f"{name}: {_yaml_scalar(value)}"


def _yaml_scalar(value: Any) -> str:
    # A flow list of one element gets the quotes that the element also needs inside longer lists.
    text = yaml.safe_dump([value], default_flow_style=True, width=1_000_000, allow_unicode=True)
    return text.rstrip("\n")[1:-1]
