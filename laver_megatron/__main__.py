"""The front door: `laver COMMAND ...`, which is `python -m laver_megatron COMMAND ...`.

Each program is a module with a parser and a `main` of its own, which is imported only when it is asked for.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

from laver_megatron import __version__
from laver_megatron.runtime.exit_status import FAILED, WRONG_USE


class Command(NamedTuple):
    """Where a program is, and what it does in a few words."""

    module: str
    function: str
    summary: str


COMMANDS = {
    "train": Command("launcher", "main", "train, or go on with a run; starts its processes itself"),
    "dry-run": Command("launcher", "dry_run_main", "check a run of N processes without weights, data or GPUs"),
    "status": Command("status_command", "main", "what a run is doing, or how it ended"),
    "plan": Command("planning.plan_command", "main", "the fastest layout that fits, and what it costs"),
    "stages": Command("stages.stages_command", "main", "train several stages in order"),
    "shards make": Command("shards.commands", "make_main", "make WebDataset shards of published forms of data"),
    "shards index": Command("shards.commands", "index_main", "index shards, so that training starts at once"),
    "shards subset": Command("shards.commands", "subset_main", "choose a seeded subset, as an index"),
    "show": Command("shards.commands", "show_main", "draw packs of a run as the model will see them"),
    "convert": Command("convert.import_command", "main", "Hugging Face weights to a Megatron checkpoint"),
    "export": Command("convert.export_command", "main", "a Megatron checkpoint to Hugging Face weights"),
    "verify": Command("convert.verify_command", "main", "whether both sides hold the same model"),
    "checkpoint": Command("checkpoint_command", "main", "what checkpoints hold, and whether they are whole"),
    "inspect": Command("inspection.inspect_command", "main", "look inside models: visual tokens layer by layer"),
    "sweep": Command("studies.sweep_command", "main", "make the runs of a scaling study"),
    "fit": Command("studies.fit_command", "main", "fit a scaling law to finished runs"),
    "arm-table": Command("studies.arm_table_command", "main", "compare the arms of an ablation with its baseline"),
    "scores": Command("scores.command", "main", "results of lmms-eval and VLMEvalKit as one table, tested"),
    "score-masks": Command("scores.segmentation", "main", "gIoU and cIoU of predicted masks"),
    "curves": Command("studies.curves_command", "main", "draw the training curves of a run"),
    "make-tasks": Command("tasks.make_command", "main", "make a set of questions that only a picture answers"),
    "score": Command("tasks.score_command", "main", "an export's answers to the questions of shards, by family"),
    "demo": Command("demo.demo_command", "main", "make a tiny model and shards to try things with"),
    "ablation-parts": Command("demo.ablation_command", "main", "make the model, encoder and texts of an ablation"),
    "examples": Command("demo.demo_command", "copy_examples", "copy the examples of this version into a directory"),
}

USAGE = """usage: laver COMMAND ...        (laver COMMAND --help: its flags)

{commands}

exit status: 0 done, 1 failed while running, 2 wrong use, 75 hung, 130 interrupted

examples:
  laver demo && laver train
  laver plan --model 7b --gpus 16 --gpu a100-80gb
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Finds the command and runs it with the words behind it."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage(COMMANDS), end="")
    elif words[0] == "--version":
        print(f"laver_megatron {__version__}")
    elif words[0] in COMMANDS:
        run(COMMANDS[words[0]], words[1:])
    elif " ".join(words[:2]) in COMMANDS:
        run(COMMANDS[" ".join(words[:2])], words[2:])
    else:
        of_group = {name: command for name, command in COMMANDS.items() if name.startswith(f"{words[0]} ")}
        if of_group and words[1:2] in ([], ["-h"], ["--help"]):
            print(usage(of_group), end="")
        else:
            sys.exit(unknown(words[:2] if of_group else words[:1]))


def run(command: Command, arguments: Sequence[str]) -> None:
    """Imports the program and runs its main, which may need packages that the planner does without."""
    try:
        getattr(import_module(f"laver_megatron.{command.module}"), command.function)(arguments)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("laver_megatron"):
            raise
        print(f"error: this needs {error.name}, which is not installed: pip install laver_megatron", file=sys.stderr)
        sys.exit(FAILED)


def usage(commands: dict[str, Command]) -> str:
    """The page of these commands."""
    width = max(map(len, commands))
    return USAGE.format(commands="\n".join(f"  {name:{width}}  {it.summary}" for name, it in commands.items()))


def unknown(words: Sequence[str]) -> int:
    """Says which command may have been meant; returns the exit status."""
    asked = " ".join(words)
    nearest = difflib.get_close_matches(asked, COMMANDS, n=1, cutoff=0.5)
    remedy = f"did you mean {nearest[0]}?" if nearest else f"choose from {', '.join(COMMANDS)}"
    print(f"laver: there is no command {asked}; {remedy}", file=sys.stderr)
    return WRONG_USE


if __name__ == "__main__":
    main()
