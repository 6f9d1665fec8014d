"""Where checkpoints lie: the directory of a run's checkpoints, which one is the newest, and what each says of itself.

    RUN_DIR/checkpoints/latest                iteration of the newest complete checkpoint, a hint for people
    RUN_DIR/checkpoints/iter_0000040/         Megatron-Core's files, loadable at any TP x PP x DP
        run.json                              the configuration it was written with
        about.json                            by which versions, when, how far the run was
        hf/  encoder/                         config.json, tokenizer, preprocessor: what building the model needs
        manifest.json                         size and checksum of every file

Nothing here needs Megatron-Core.
"""

from pathlib import Path

from laver_megatron.runtime.files import read_object, read_small, write_text

RUN_FILE = "run.json"
MANIFEST_FILE = "manifest.json"
_LATEST = "latest"
_MOST_BYTES = 1 << 12  # of it


def iteration_directory(directory: Path, iteration: int) -> Path:
    """Where the checkpoint of an iteration lies in a checkpoints/ folder."""
    return directory / f"iter_{iteration:07d}"


def set_latest(directory: Path, iteration: int) -> None:
    """Names the newest checkpoint."""
    write_text(directory / _LATEST, str(iteration))


def checkpoints_in(directory: Path) -> list[Path]:
    """The iter_* folders of a checkpoints/ folder, the newest first, whole or not."""
    numbered = [path for path in directory.glob("iter_*") if path.name.removeprefix("iter_").isdecimal()]
    return sorted(numbered, key=iteration_of, reverse=True)


def iteration_of(checkpoint: Path) -> int:
    """The number in the name of an iter_* folder."""
    return int(checkpoint.name.removeprefix("iter_"))


def said_latest(directory: Path) -> int | None:
    """What the file `latest` says; None if it says nothing. It is a hint for people: folders decide."""
    try:
        text = read_small(directory / _LATEST, _MOST_BYTES).decode().strip()
        return int(text) if text.isdecimal() else None
    except (OSError, ValueError):
        return None


def is_checkpoint(directory: Path) -> bool:
    """Whether this is an iter_* folder itself, rather than a folder of them."""
    return (directory / "hf" / "config.json").is_file()


def latest_checkpoint(directory: Path) -> Path | None:
    """The newest complete checkpoint of a checkpoints/ folder, or `directory` itself if it is an iter_* folder with its
    hf/config.json; None if there is none. Folders get their names when they are whole; whether their files still are
    what was written is not looked at (`checkpoint/choice.py` does)."""
    if is_checkpoint(directory):
        return directory
    return next((path for path in checkpoints_in(directory) if (path / MANIFEST_FILE).is_file()), None)


def has_encoder(checkpoint: Path) -> bool:
    """Whether a checkpoint brings its image encoder; one converted from a text-only model does not."""
    return (checkpoint / "encoder").is_dir()


def is_converted(checkpoint: Path) -> bool:
    """Whether a checkpoint holds weights alone because it was converted, not trained."""
    try:
        return read_object(checkpoint / RUN_FILE).get("weights_only") is True
    except ValueError:
        return False  # what is wrong with the file is said where the rest of it is needed
