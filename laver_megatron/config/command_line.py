"""From a YAML file and flags to a `Config`: defaults < the file's preset < file < --preset < other flags.

All type problems, unknown names and missing values are collected and reported together.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from laver_megatron.config.fields import (
    PRESETS,
    SECTIONS,
    Config,
    ConfigError,
    all_fields,
    field_types,
    fields_of,
)
from laver_megatron.config.options import FieldType, is_required
from laver_megatron.config.schema import json_schema
from laver_megatron.runtime.exit_status import WRONG_USE

_PATIENCE_SECONDS = 20.0
_NO_VALUE = object()  # what argparse makes of a flag without its value


@dataclass(frozen=True)
class Invocation:
    """What the command line asked for: a configuration, and what to do with it."""

    config: Config
    dry_run: bool = False
    dry_run_world_size: int | None = None
    print_config: bool = False

    def world_size(self, environ: Mapping[str, str] = os.environ) -> int:
        """Processes of the run: what --dry-run N says, else the launcher's WORLD_SIZE, else 1.

        A dry run without a launcher is judged for the smallest world its layout fits, TP x PP.
        """
        if self.dry_run_world_size is not None:
            return self.dry_run_world_size
        if "WORLD_SIZE" in environ:
            return int(environ["WORLD_SIZE"])
        if self.dry_run:
            return self.config.parallel.tensor_model_parallel_size * self.config.parallel.pipeline_model_parallel_size
        return 1


def load_config(argv: Sequence[str]) -> Config:
    """The configuration that the arguments describe. Raises ConfigError with every problem found."""
    return read_command_line(argv).config


def from_command_line(argv: Sequence[str] | None = None) -> Invocation:
    """For a program's main: as `read_command_line`, but a problem is printed and ends the process with 2,
    and --print-config prints (on rank 0) and ends it with 0."""
    with exit_on_config_error():
        invocation = read_command_line(sys.argv[1:] if argv is None else argv)
    if invocation.print_config:
        if is_rank_zero():
            print(invocation.config.to_yaml(), end="")
        raise SystemExit(0)
    return invocation


@contextlib.contextmanager
def exit_on_config_error() -> Iterator[None]:
    """Turns a ConfigError into its message on stderr and exit code 2, without a traceback. One process of each
    node prints: a file may be missing on one node alone. Nodes other than rank 0's say who they are."""
    try:
        yield
    except ConfigError as error:
        if not _is_first_of_its_node():
            # The launcher ends all processes when one ends: the one that prints must be the first to end.
            time.sleep(_PATIENCE_SECONDS)
        print(f"{_node()}{error}", file=sys.stderr, flush=True)
        raise SystemExit(WRONG_USE) from None


def read_command_line(argv: Sequence[str]) -> Invocation:
    """Reads flags, the file of --config and the preset. Raises ConfigError with every problem found."""
    problems: list[str] = []
    flags = _read_flags(argv, problems)
    given = {} if flags is None else {name: value for name, value in flags.items() if value is not _NO_VALUE}
    config_file, dry_run = given.pop("config", None), given.pop("dry_run", None)
    print_config = given.pop("print_config", False)
    in_file = _read_yaml(config_file, problems)
    from_file = coerce_all(in_file or {}, lambda name: f"{config_file}: {name}", problems)
    from_flags = coerce_all(given, _flag, problems)
    values = _by_precedence(from_file, from_flags)
    # Only what was read whole can be said to lack something.
    if flags is not None and flags.get("config") is not _NO_VALUE and in_file is not None:
        problems += [
            f"{item.name} is missing: give {_flag(item.name)}, or {item.name} in the file of --config"
            for item in all_fields().values()
            if is_required(item) and item.name not in {*in_file, *flags}
        ]
    dry_run_world_size = _dry_run_world_size(dry_run, problems)
    if problems:
        raise ConfigError(problems)
    return Invocation(Config.of(**values), dry_run is not None, dry_run_world_size, bool(print_config))


def _by_precedence(from_file: Mapping[str, Any], from_flags: Mapping[str, Any]) -> dict[str, Any]:
    """The file's preset < the file < the preset of the command line < its other flags. A preset of the command
    line takes the place of the file's, of which nothing remains."""
    if "preset" in from_flags:
        chosen = from_flags["preset"]
        return {**from_file, **(PRESETS[chosen] if chosen else {}), **from_flags}
    named = from_file.get("preset")
    return {**(PRESETS[named] if named else {}), **from_file, **from_flags}


# --- flags ------------------------------------------------------------------------------------------


class _PrintSchema(argparse.Action):
    """Prints and ends, as --help does: the schema asks for no other settings."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(json_schema(), end="")
        parser.exit()


_EPILOG = """\
Every flag is also a key of the YAML file, with underscores for dashes. Later beats earlier: defaults, the file's
preset, file, --preset (in place of the file's), other flags. `none` clears a value that may be empty.

examples:
  laver train --config examples/demo.yaml --run-dir runs/mine --mask-ratio 0.2
  srun --ntasks-per-node 1 laver train --config my_run.yaml
"""


class _Help(argparse.RawDescriptionHelpFormatter):
    """The help page, with values that must be given shown so, although argparse lets them be left out."""

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        if action.nargs == "*":
            return f"{action.metavar} [{action.metavar} ...]"
        return str(action.metavar) if action.const is _NO_VALUE else super()._format_args(action, default_metavar)


class _Parser(argparse.ArgumentParser):
    """argparse that raises what it would print and exit with, so that it can be reported with the rest."""

    def error(self, message: str) -> Any:
        raise argparse.ArgumentError(None, message)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all flags; the values stay strings, `coerce` gives them their types."""
    parser = _Parser(
        prog="laver train",
        usage="laver train --config FILE [--name value ...]",
        description="Train a multimodal language model with LaVer on Megatron-Core, or go on with a run. Without "
        "--config: the demo.",
        epilog=_EPILOG,
        formatter_class=_Help,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    config_help = "YAML file with any of the settings below"
    parser.add_argument("--config", nargs="?", const=_NO_VALUE, metavar="FILE", help=config_help)
    parser.add_argument("--print-config", action="store_true", help="print the resolved settings and stop")
    schema_help = "print the JSON schema of the YAML file, with which editors complete its keys, and stop"
    parser.add_argument("--print-schema", nargs=0, action=_PrintSchema, help=schema_help)
    parser.add_argument(
        "--dry-run",
        nargs="?",
        const="",
        metavar="PROCESSES",
        help="check all that can be checked without weights and shards, for this many processes, build every rank "
        "without memory, print what each holds, and stop",
    )
    types = field_types()
    for section in SECTIONS:
        group = parser.add_argument_group(section)
        for item in fields_of(section):
            _add_flag(group, item, types[item.name])
    return parser


def _add_flag(group: Any, item: dataclasses.Field[Any], kind: FieldType) -> None:
    help_text = item.metadata["help"].replace("%", "%%")
    if is_required(item):
        help_text += " (required)"
    elif "(default:" not in help_text:  # some say it in words
        help_text += f" (default: {_shown(item.default)})"
    choices = item.metadata["choices"]
    if kind.scalars == (bool,):
        group.add_argument(_flag(item.name), action=argparse.BooleanOptionalAction, help=help_text)
    else:
        # argparse must judge neither choices nor missing values itself: it stops at the first problem.
        metavar = "{" + ",".join(choices) + "}" if choices else kind.scalars[-1].__name__.upper()
        lone: dict[str, Any] = {"nargs": "*"} if kind.is_list else {"nargs": "?", "const": _NO_VALUE}
        group.add_argument(_flag(item.name), **lone, metavar=metavar, help=help_text)


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, tuple):
        return " ".join(default) or "none"
    return str(default).lower()


def _read_flags(argv: Sequence[str], problems: list[str]) -> dict[str, Any] | None:
    """The flags' values as text, _NO_VALUE where one is missing; None if they could not be told apart."""
    try:
        namespace, unknown = build_parser().parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        problems.append(str(error))
        return None
    known = ["--config", "--dry-run", "--print-config", "--print-schema", "--help"] + [
        _flag(name) for name in all_fields()
    ]
    known += [f"--no-{_flag(name)[2:]}" for name, kind in field_types().items() if kind.scalars == (bool,)]
    for argument in unknown:
        if argument.startswith("-"):
            flag = argument.split("=", 1)[0]
            problems.append(f"unknown flag {flag}{_suggestion(flag.replace('_', '-'), known)}")
    stray = [argument for argument in unknown if not argument.startswith("-")]
    if stray and len(stray) == len(unknown):
        problems.append(f"not understood: {' '.join(stray)} (settings are written --name value)")
    flags = {name: _NO_VALUE if value == [] else value for name, value in vars(namespace).items()}
    problems += [f"{_flag(name)}: no value is given" for name, value in flags.items() if value is _NO_VALUE]
    return flags


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _dry_run_world_size(given: str | None, problems: list[str]) -> int | None:
    if not given:
        return None
    if not given.isdecimal() or int(given) < 1:
        problems.append(f"--dry-run: {given!r} is not a number of processes")
        return None
    return int(given)


# --- the YAML file ----------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice; YAML itself would quietly keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                mark = node.value[index][0].start_mark
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", mark)
        return super().construct_mapping(node, deep)


def _read_yaml(config_file: str | None, problems: list[str]) -> dict[str, Any] | None:
    """The known keys of the file with their values; None if it could not be read."""
    if config_file is None:
        return {}
    content = read_mapping(config_file, f"--config {config_file}", problems)
    return None if content is None else known_keys(content, config_file, problems)


def read_mapping(file: str, label: str, problems: list[str]) -> dict[Any, Any] | None:
    """The content of a YAML file; None, and a problem that begins with the label, if it could not be read."""
    try:
        with open(file, encoding="utf-8") as stream:
            text = stream.read()
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"{label}: cannot be read ({getattr(error, 'strerror', None) or error})")
        return None
    return parse_mapping(text, label, problems)


def parse_mapping(text: str, label: str, problems: list[str]) -> dict[Any, Any] | None:
    """A YAML mapping, empty for an empty text; None, and a problem that begins with the label, if it is none."""
    try:
        content = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        problems.append(f"{label}: not valid YAML ({' '.join(str(error).split())})")
        return None
    if content is not None and not isinstance(content, dict):
        problems.append(f"{label}: expected `key: value` lines, found a {type(content).__name__}")
        return None
    return content or {}


def known_keys(content: Mapping[Any, Any], label: str, problems: list[str]) -> dict[str, Any]:
    """What of a mapping are settings; a problem for each other key."""
    names = tuple(all_fields())
    for key in content:
        if key not in names:
            suggestion = _suggestion(str(key).replace("-", "_"), names)
            problems.append(f"{label}: unknown key {key}{suggestion}")
    return {name: value for name, value in content.items() if name in names}


def _suggestion(name: str, candidates: Sequence[str]) -> str:
    # Leading dashes are alike in all flags and say nothing of likeness, and case is a slip.
    bare = {candidate.lstrip("-").lower(): candidate for candidate in candidates}
    nearest = difflib.get_close_matches(name.lstrip("-").lower(), bare, n=1, cutoff=0.5)
    return f"; did you mean {bare[nearest[0]]}?" if nearest else ""


# --- types ------------------------------------------------------------------------------------------


def coerce_all(raw: Mapping[str, Any], label: Callable[[str], str], problems: list[str]) -> dict[str, Any]:
    """Values of settings as their types; a problem, labelled by the setting's name, for each that is not."""
    types = field_types()
    choices = {name: item.metadata["choices"] for name, item in all_fields().items()}
    values = {}
    for name, value in raw.items():
        try:
            values[name] = coerce(value, types[name], choices[name])
        except ValueError as error:
            problems.append(f"{label(name)}: {error}")
    return values


def coerce(value: Any, kind: FieldType, choices: tuple[str, ...] | None) -> Any:
    """A value from YAML or a flag as the field's type. Raises ValueError that says what was expected."""
    if _is_none(value) and choices and "none" in choices:
        return "none"
    if kind.is_list:
        return _coerce_list(value, kind, choices)
    if _is_none(value):
        if kind.is_optional:
            return None
        raise ValueError("cannot be none")
    scalar = _coerce_scalar(value, kind.scalars)
    if choices and scalar not in choices:
        raise ValueError(f"{scalar!r} is not one of {', '.join(choices)}{_suggestion(str(scalar), choices)}")
    return scalar


def _coerce_list(value: Any, kind: FieldType, choices: tuple[str, ...] | None) -> tuple[Any, ...] | None:
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    if not items or (len(items) == 1 and _is_none(items[0])):
        return None if kind.is_optional else ()
    one = FieldType(kind.scalars, is_list=False, is_optional=False)
    return tuple(coerce(item, one, choices) for item in items)


def _is_none(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value.strip().lower() in ("none", "null", "~"))


def _coerce_scalar(value: Any, scalars: tuple[type, ...]) -> Any:
    if scalars == (bool,):
        if isinstance(value, bool):
            return value
        raise ValueError(f"expected true or false, not {value!r}")
    if scalars == (str,):
        if value == "":
            raise ValueError("is empty")
        if isinstance(value, str):
            return value
        raise ValueError(f"expected text, not {value!r} (quote it if it is meant as text)")
    number = _number(value)
    if int in scalars and number.is_integer():
        # A YAML int keeps all its digits; a float such as 1e3 is exact here because it is an integer.
        return int(value) if isinstance(value, int) or _is_int_text(value) else int(number)
    if float in scalars:
        return number
    raise ValueError(f"expected an integer, not {value!r}")


def _number(value: Any) -> float:
    # PyYAML reads 2e-5 (without a point) as text, and flags are text: both are numbers here.
    if not isinstance(value, bool) and isinstance(value, (int, float, str)):
        with contextlib.suppress(ValueError, OverflowError):
            number = float(value)
            if math.isfinite(number):
                return number
    raise ValueError(f"expected a number, not {value!r}")


def _is_int_text(value: Any) -> bool:
    return isinstance(value, str) and value.strip().lstrip("+-").isdecimal()


def is_rank_zero() -> bool:
    """Whether this process speaks for all: the launcher's rank 0, or no launcher at all."""
    return os.environ.get("RANK", "0") == "0"


def _is_first_of_its_node() -> bool:
    return os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0"


def _node() -> str:
    """Which node speaks, as the beginning of a message; nothing on the first one."""
    node = next((os.environ[name] for name in ("GROUP_RANK", "NODE_RANK", "SLURM_NODEID") if name in os.environ), None)
    if is_rank_zero() and node in (None, "0"):
        return ""
    return f"node {node or '?'} ({socket.gethostname()}): "
