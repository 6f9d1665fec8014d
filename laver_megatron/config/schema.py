"""The JSON schema of a run's YAML file, by which editors complete and check its keys."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from laver_megatron.config.fields import all_fields, field_types
from laver_megatron.config.options import FieldType, is_required

_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string"}


def json_schema() -> str:
    """The schema as JSON text (draft 2020-12). No key is required: each may also be given as a flag."""
    types = field_types()
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Configuration of a laver_megatron run",
        "type": "object",
        "additionalProperties": False,
        "properties": {name: _property(item, types[name]) for name, item in all_fields().items()},
    }
    return json.dumps(schema, indent=1) + "\n"


def _property(item: dataclasses.Field[Any], kind: FieldType) -> dict[str, Any]:
    names = [_TYPES[scalar] for scalar in kind.scalars]
    scalar: dict[str, Any] = {"type": names[0] if len(names) == 1 else names}
    if choices := item.metadata["choices"]:
        scalar["enum"] = list(choices)
    if valid := item.metadata["range"]:
        scalar.update(valid.schema)
    # A list of one may be written without brackets.
    forms = [scalar, {"type": "array", "items": scalar}] if kind.is_list else [scalar]
    if kind.is_optional or (choices and "none" in choices):
        forms.append({"type": "null"})
    found = {"description": item.metadata["help"], **(forms[0] if len(forms) == 1 else {"anyOf": forms})}
    if not is_required(item):
        found["default"] = item.default
    return found
