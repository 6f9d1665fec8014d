"""The arms of a sweep: named overrides of the configuration. Data, their order and seeds are the same for all arms."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from laver_megatron.config.command_line import coerce_all, known_keys, parse_mapping, read_mapping
from laver_megatron.config.fields import PRESETS, Config, ConfigError, fields_of
from laver_megatron.run_log.run_summary import config_hash
from laver_megatron.studies.sweep_options import LAVER_AND_BASELINE, NAME, SweepOptions, is_yaml

# What the sweep sets for each run, or what must be the same for runs to be compared.
_NOT_AN_ARMS = {
    **{item.name: "the size's, by --models" for item in fields_of("start")},
    **{item.name: "the size's, by --models" for item in fields_of("parallel")},
    **{item.name: "the same for all arms" for item in fields_of("data")},
    **dict.fromkeys(("eval_interval", "eval_iters"), "the same for all arms"),
    **dict.fromkeys(("train_iters", "exit_interval"), "the sweep's, by the amounts"),
    **dict.fromkeys(("lr", "min_lr", "decoupled_lr", "lr_warmup_iters"), "the same for all arms of a size"),
    "seed": "the sweep's, by --seeds",
    "run_dir": "the sweep's, by --output",
    "arm": "the arm's own name",
}
_COLON = re.compile(r":(?=\S)")


@dataclass(frozen=True)
class Arm:
    """A name and the settings by which its runs differ from the configuration."""

    name: str
    overrides: Mapping[str, Any]

    def configured(self, config: Config) -> Config:
        """The configuration with this arm's settings; those of a preset among them, which the others beat."""
        preset = self.overrides.get("preset")
        return config.replace(**{**(PRESETS[preset] if preset else {}), **self.overrides, "arm": self.name})


def read_arms(options: SweepOptions) -> list[Arm]:
    """The arms in the order in which they were named.

    Raises:
        ConfigError: files that cannot be read, unknown settings, values of another kind, settings that are not an
            arm's, names that cannot be part of a file's name or that are given twice.
    """
    problems: list[str] = []
    arms = [Arm(name, values) for name, values, label in _raw(options, problems) if _is_fit(name, label, problems)]
    names = [arm.name for arm in arms]
    twice = sorted({name for name in names if names.count(name) > 1})
    if not arms and not problems:
        problems.append(
            f"--arms {' '.join(options.arms)} names no arm; write `name: {{field: value}}` lines, or `name:`"
        )
    if twice:
        problems.append(f"the arms name {', '.join(twice)} twice; runs are told apart by these names")
    if problems:
        raise ConfigError(problems)
    return arms


def _raw(options: SweepOptions, problems: list[str]) -> Iterator[tuple[str, dict[str, Any], str]]:
    """(name, settings, where it was given) of every arm."""
    for name in options.arms or ([] if options.arm else LAVER_AND_BASELINE):
        if is_yaml(name):
            for key, values in (read_mapping(name, f"--arms {name}", problems) or {}).items():
                label = f"{name}: arm {key}"
                if values is None or isinstance(values, dict):
                    yield str(key), _settings(values or {}, label, problems), label
                else:
                    problems.append(f"{label}: expected a mapping of settings, found {values!r}")
        elif name in LAVER_AND_BASELINE:
            yield name, dict(LAVER_AND_BASELINE[name]), "--arms"
        else:
            problems.append(f"--arms {name}: neither {' nor '.join(LAVER_AND_BASELINE)} nor a .yaml file of arms")
    for text in options.arm:
        name, equals, given = text.partition("=")
        label = f"--arm {name}"
        if not equals:
            problems.append(f"--arm {text}: expected NAME=field:value,field:value")
            continue
        # YAML wants a space after the colon, and a shell would want quotes for it.
        values = parse_mapping("{" + _COLON.sub(": ", given) + "}", label, problems)
        yield name, _settings(values or {}, label, problems), label


def _settings(content: Mapping[Any, Any], label: str, problems: list[str]) -> dict[str, Any]:
    """The overrides of one arm as the types of their fields."""
    values = known_keys(content, label, problems)
    for name in values:
        if name in _NOT_AN_ARMS:
            problems.append(f"{label}: {name} cannot be overridden, it is {_NOT_AN_ARMS[name]}")
    return coerce_all(values, lambda name: f"{label}: {name}", problems)


def _is_fit(name: str, label: str, problems: list[str]) -> bool:
    if NAME.fullmatch(name):
        return True
    problems.append(
        f"{label}: the name {name!r} would be part of file names; use letters, digits, dot, dash, underscore"
    )
    return False


def equal_arms(arms: Sequence[Arm], config: Config) -> Iterator[str]:
    """Arms whose runs would be the same, by what decides a run's numbers."""
    same: dict[str, list[str]] = {}
    for arm in arms:
        same.setdefault(config_hash(arm.configured(config)), []).append(arm.name)
    for names in same.values():
        if len(names) > 1:
            yield (
                f"the arms {' and '.join(names)} are equal: nothing that decides a run's numbers differs between them; "
                "leave out all but one"
            )
