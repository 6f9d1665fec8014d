"""Which checkpoint a run goes on from: the newest whole one, found before anything is read from any.

Two checks find a damaged one. The quick check, of every process that asks: all files are there and have their sizes,
and the small ones, of which configuration and tokenizer are read, have their checksums. The whole check, of the ranks
of a run together when they start: the checksums of all files, which they divide among themselves.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from laver_megatron.checkpoint.directory import checkpoints_in, is_checkpoint, iteration_of, said_latest
from laver_megatron.checkpoint.manifest import check_files, is_small, read_manifest
from laver_megatron.config.fields import ConfigError
from laver_megatron.runtime.terminal import printable

_NOTHING: Mapping[Path, str] = MappingProxyType({})


@dataclass(frozen=True)
class Choice:
    """The checkpoint to go on from, None if there is none, and what is wrong with the newer ones."""

    checkpoint: Path | None
    passed_over: tuple[str, ...] = ()


def quick_problem(checkpoint: Path) -> str:
    """What the quick check finds; empty if nothing."""
    try:
        check_files(checkpoint, read_manifest(checkpoint).items(), whole=is_small)
    except (ValueError, OSError) as error:
        return printable(str(error))
    return ""


def choose(directory: Path, *, strict: bool = False, damaged: Mapping[Path, str] = _NOTHING) -> Choice:
    """The newest whole checkpoint of a checkpoints/ folder, or `directory` itself if it is one.

    Args:
        strict: refuse where the newest is damaged, instead of passing it over.
        damaged: checkpoints that the whole check found damaged, and why.

    Raises:
        ConfigError: no checkpoint that is there is whole, or with `strict` the newest is not.
    """
    named = is_checkpoint(directory)
    problems: list[str] = []
    for path in [directory] if named else checkpoints_in(directory):
        problem = damaged.get(path) or quick_problem(path)
        if not problem:
            return Choice(path, (*_lost(directory, path, problems), *problems))
        problems.append(problem)
        if strict and not named:
            raise ConfigError([f"{problem}; --strict-load goes on from the newest checkpoint or not at all"])
    if problems:
        remedy = "copy it again" if named else "no checkpoint there is whole: copy one again, or move the folder away"
        raise ConfigError([*problems[:-1], f"{problems[-1]}; {remedy}"])
    return Choice(None)


def next_choice(run_dir: Path, *, strict: bool = False) -> Choice:
    """What the next start of a run would choose by the quick check, for those who only tell: where the start would be
    refused, there is no checkpoint, and why."""
    try:
        return choose(run_dir / "checkpoints", strict=strict)
    except ConfigError as error:
        return Choice(None, tuple(error.problems))
    except OSError as error:
        return Choice(None, (printable(str(error)),))


def _lost(directory: Path, chosen: Path, problems: list[str]) -> list[str]:
    """A line where a checkpoint that `latest` names is not there at all."""
    said = said_latest(directory)
    if said is None or problems or said <= iteration_of(chosen):
        return []
    return [f"{directory / 'latest'} says {said}, but there is no such checkpoint"]
