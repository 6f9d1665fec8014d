"""The small files around the weights of a model: config.json, tokenizer, image processor. Copied, never re-saved.

(transformers drops what it does not know when it saves a configuration again, among it `rope_theta`.)
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from laver_megatron.hf.shape import VISION_PART, is_laver_export, read_part
from laver_megatron.runtime.files import read_object, write_json
from laver_megatron.runtime.terminal import quiet_transformers

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
PREPROCESSOR_FILE = "preprocessor_config.json"
PROCESSOR_FILE = "processor_config.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json",
    "special_tokens_map.json", CHAT_TEMPLATE_FILE, "chat_template.json",
)  # fmt: skip

SMALL_FILES = (CONFIG_FILE, GENERATION_FILE, PREPROCESSOR_FILE, PROCESSOR_FILE, *TOKENIZER_FILES)


@contextmanager
def loading_model(directory: Path) -> Iterator[None]:
    """Loads a model by transformers without its warnings and progress bars.

    Raises:
        ValueError: it cannot be loaded, whatever transformers, its code or safetensors raise.
    """
    from safetensors import SafetensorError

    try:
        with quiet_transformers():
            yield
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{directory} cannot be loaded: {error}") from error


def read_image_processor(directory: Path) -> tuple[Path, dict[str, Any]]:
    """The image processor's settings and their file: processor_config.json with an image_processor in it, which is all
    that transformers 5 writes, else preprocessor_config.json. Of both, transformers, too, takes the first.

    Raises:
        ValueError: neither file, or one that cannot be read.
    """
    path = directory / PROCESSOR_FILE
    if path.is_file() and "image_processor" in (content := read_object(path)):
        settings = content["image_processor"]
        if not isinstance(settings, dict):
            raise ValueError(f"{path}: image_processor is {settings!r}, but must be the settings of an image processor")
        return path, settings
    path = directory / PREPROCESSOR_FILE
    if not path.is_file():
        raise ValueError(f"{directory}: no {PREPROCESSOR_FILE} in it, and no {PROCESSOR_FILE} with an image_processor")
    return path, read_object(path)


def copy_model_files(source: Path, target: Path, part: str) -> None:
    """What building the decoder (TEXT_PART) or the image encoder (VISION_PART) needs besides weights. The part's
    own config.json is taken out of a LaVer export's, the encoder's preprocessor_config.json of processor_config.json if
    it stands there."""
    target.mkdir(parents=True, exist_ok=True)
    for name in (CONFIG_FILE, GENERATION_FILE, PREPROCESSOR_FILE, *TOKENIZER_FILES):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if part == VISION_PART and (source / PROCESSOR_FILE).is_file():
        path, settings = read_image_processor(source)
        if path.name == PROCESSOR_FILE:
            write_json(target / PREPROCESSOR_FILE, settings)
    if is_laver_export(source):
        write_json(target / CONFIG_FILE, read_part(source, part)[1])
