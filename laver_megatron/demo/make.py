"""Makes the demo's directory, one complete part at a time."""

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from laver_megatron.data.index.build import index_tars
from laver_megatron.data.index.index_file import INDEX_NAME, write_index
from laver_megatron.demo.encoders import save_encoder
from laver_megatron.demo.models import save_language_model
from laver_megatron.demo.questions import make_examples
from laver_megatron.demo.shards import write_shards
from laver_megatron.runtime.files import new_directory, read_object, write_json

NUM_TRAIN_SAMPLES, NUM_VALID_SAMPLES = 384, 48


def make_demo(
    directory: str | Path,
    *,
    num_train_samples: int = NUM_TRAIN_SAMPLES,
    num_valid_samples: int = NUM_VALID_SAMPLES,
    encoders: Sequence[str] = (),
    models: Sequence[str] = (),
) -> Path:
    """Makes `model/`, `encoder/` and `shards/` (train-*.tar, valid-*.tar, their index) in a directory, and returns it.

    A part that is there is kept: each is built beside its place and renamed when it is complete, so a part
    is never half there. Which sample is which depends on nothing but its number and the versions of Pillow,
    scikit-image, scikit-learn, torch and tokenizers.

    Args:
        encoders: kinds (`demo.encoders.KINDS`), each of which gets an `encoder_KIND/` as well.
        models: sizes as WIDTHxLAYERS, each of which gets a `model_WIDTHxLAYERS/` as well.

    Raises:
        ValueError: an unknown kind, a size that a model cannot have, or shards of another number of samples.
    """
    sizes = {name: _read_size(name) for name in models}
    directory = Path(directory)
    numbers = {"num_train_samples": num_train_samples, "num_valid_samples": num_valid_samples}
    check_part(directory / "shards", numbers)
    directory.mkdir(parents=True, exist_ok=True)

    def texts() -> list[str]:
        # The tokenizer learns from the first examples, with as many for a small demo as for a large one.
        return [message["value"] for example in make_examples(0, 200) for message in example.conversation]

    def shards(place: Path) -> None:
        write_shards(place, "train", make_examples(0, num_train_samples), samples_per_shard=192)
        valid = make_examples(1_000_000, num_valid_samples)
        write_shards(place, "valid", valid, samples_per_shard=192)
        write_index(index_tars(sorted(place.glob("*.tar"))), place / INDEX_NAME)

    model = directory / "model"
    make_part(model, "a Qwen2.5 checkpoint with its tokenizer", lambda place: save_language_model(place, texts()))
    make_part(directory / "encoder", "a SigLIP encoder", save_encoder)
    for kind in encoders:
        make_part(directory / f"encoder_{kind}", f"an encoder of type {kind}", partial(save_encoder, kind=kind))
    for name, (width, num_layers) in sizes.items():
        save = partial(save_language_model, texts=texts(), hidden_size=width, num_layers=num_layers)
        make_part(directory / f"model_{name}", f"a Qwen2.5 checkpoint of {num_layers} layers of width {width}", save)
    make_part(directory / "shards", f"{num_train_samples} + {num_valid_samples} samples", shards, numbers)
    return directory


def _read_size(name: str) -> tuple[int, int]:
    width, _, num_layers = name.partition("x")
    if not (width.isdecimal() and num_layers.isdecimal()):
        raise ValueError(f"{name!r} is not the size of a model; write WIDTHxLAYERS, such as 64x3")
    return int(width), int(num_layers)


def make_part(place: Path, what: str, build: Callable[[Path], None], settings: Mapping[str, int] | None = None) -> None:
    """Builds a directory beside its place and renames it when it is complete; one that is there is kept.

    Args:
        settings: what it is made with, by the names of the flags; kept in `PLACE.json`.

    Raises:
        ValueError: one that was made with other settings is there.
    """
    check_part(place, settings or {})
    if place.exists():
        unknown = "" if not settings or _settings_file(place).is_file() else "; which settings it has is not known"
        print(f"demo: {place} is there{unknown}", file=sys.stderr)
        return
    print(f"demo: making {place}: {what}", file=sys.stderr)
    try:
        with new_directory(place) as unfinished:
            build(unfinished)
    except OSError:
        if not place.exists():  # else another process was faster
            raise
        check_part(place, settings or {})
        return
    if settings:
        write_json(_settings_file(place), dict(settings))


def check_part(place: Path, settings: Mapping[str, int]) -> None:
    """Raises ValueError, with both, if a part is there that was made with other settings than these. Parts of earlier
    versions, and links, have no settings."""
    path = _settings_file(place)
    if not (place.exists() and path.is_file()):
        return
    made = read_object(path)
    if other := [name for name, value in settings.items() if made.get(name) != value]:
        was = ", ".join(f"--{name.replace('_', '-')} {made.get(name)}, not {settings[name]}" for name in other)
        raise ValueError(f"{place} is there, and was made with {was}; name another --dir, or remove it")


def _settings_file(place: Path) -> Path:
    return place.with_name(f"{place.name}.json")
