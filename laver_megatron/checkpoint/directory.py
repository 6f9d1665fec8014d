"""Where checkpoints lie: the directory of a run's checkpoints, which one is the newest, and what each says of itself.

    RUN_DIR/checkpoints/latest                the newest complete checkpoint's iteration, as text
    RUN_DIR/checkpoints/iter_0000040/         Megatron-Core's files, loadable at any TP x PP x DP
        run.json                              the configuration it was written with
        hf/  encoder/                         config.json, tokenizer, preprocessor: what building the model needs
        manifest.json                         size and checksum of every file

Nothing here needs Megatron-Core.
"""

from pathlib import Path

from laver_megatron.config.fields import ConfigError
from laver_megatron.runtime.files import read_object, write_text

RUN_FILE = "run.json"
MANIFEST_FILE = "manifest.json"
_LATEST = "latest"


def iteration_directory(directory: Path, iteration: int) -> Path:
    """Where the checkpoint of an iteration lies in a checkpoints/ folder."""
    return directory / f"iter_{iteration:07d}"


def set_latest(directory: Path, iteration: int) -> None:
    """Names the newest checkpoint."""
    write_text(directory / _LATEST, str(iteration))


def latest_checkpoint(directory: Path) -> Path | None:
    """The newest complete checkpoint of a checkpoints/ folder, or `directory` itself if it is an iter_*
    folder with its hf/config.json; None if there is none.

    The file `latest` decides. Without it (the first save was stopped just before writing it, or it was not
    copied along) the highest iter_* folder with a manifest does: folders get that name when they are whole.

    Raises:
        ConfigError: `latest` names a checkpoint that is not there.
    """
    if (directory / "hf" / "config.json").is_file():
        return directory
    pointer = directory / _LATEST
    if not pointer.is_file():
        folders = (path.parent for path in directory.glob(f"iter_*/{MANIFEST_FILE}"))
        numbered = [path for path in folders if path.name.removeprefix("iter_").isdecimal()]
        return max(numbered, key=lambda path: int(path.name.removeprefix("iter_")), default=None)
    try:
        text = pointer.read_text().strip()
    except (OSError, ValueError) as error:
        raise ConfigError([f"{pointer} cannot be read ({error})"]) from None
    remedy = f"copy the folder again, or remove {pointer} to take the newest complete checkpoint"
    if not text.isdecimal():
        raise ConfigError([f"{pointer} says {text!r}, which is no iteration; {remedy}"])
    path = iteration_directory(directory, int(text))
    if not (path / "hf" / "config.json").is_file():
        raise ConfigError([f"{pointer} says {text!r}, but {path}/hf/config.json does not exist; {remedy}"])
    return path


def has_encoder(checkpoint: Path) -> bool:
    """Whether a checkpoint brings its image encoder; one converted from a text-only model does not."""
    return (checkpoint / "encoder").is_dir()


def is_converted(checkpoint: Path) -> bool:
    """Whether a checkpoint holds weights alone because it was converted, not trained."""
    try:
        return read_object(checkpoint / RUN_FILE).get("weights_only") is True
    except ValueError:
        return False  # what is wrong with the file is said where the rest of it is needed
