"""Which checkpoints of a run stay when a new one is whole."""

import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from laver_megatron.checkpoint.choice import quick_problem
from laver_megatron.checkpoint.directory import checkpoints_in, iteration_directory, iteration_of
from laver_megatron.config.reliability_fields import ReliabilityConfig
from laver_megatron.runtime.files import sync_directory
from laver_megatron.runtime.terminal import say


def superfluous(iterations: Collection[int], settings: ReliabilityConfig, best: int | None) -> list[int]:
    """Of whole checkpoints at these iterations those that need not be kept. The newest always is."""
    if settings.keep_last is None:
        return []
    newest = sorted(iterations)[-settings.keep_last :]
    every = settings.keep_every
    return sorted(
        iteration
        for iteration in iterations
        if iteration not in newest and iteration != best and not (every and iteration % every == 0)
    )


def delete_superfluous(directory: Path, newest: Path, settings: ReliabilityConfig, losses: Mapping[int, float]) -> None:
    """Deletes what `superfluous` names of a checkpoints/ folder, after `newest` has been put there whole.

    Only folders count that this program names so, that are whole, and that are not newer than `newest`: links, damaged
    ones and anything else stay. A folder loses its name first, so that a kill leaves no half of one.

    losses: of the validations so far, by iteration.
    """
    if settings.keep_last is None:
        return
    if problem := quick_problem(newest):  # nothing goes for one that cannot be loaded
        say(f"WARNING: no old checkpoint is deleted: {problem}")
        return
    whole = {
        iteration_of(path): path
        for path in checkpoints_in(directory)
        if path == iteration_directory(directory, iteration_of(path))
        and not path.is_symlink()
        and iteration_of(path) <= iteration_of(newest)
        and (path == newest or not quick_problem(path))
    }
    validated = whole.keys() & losses.keys() if settings.keep_best else ()
    best = min(validated, key=lambda iteration: (losses[iteration], -iteration), default=None)
    for iteration in superfluous(whole, settings, best):
        path = whole[iteration]
        try:
            going = path.with_name(f".{path.name}.deleted")
            os.replace(path, going)
            sync_directory(directory)
            shutil.rmtree(going)
        except OSError as error:
            say(f"WARNING: {path} could not be deleted ({error}); delete it by hand")
