"""The small files around the weights of a model: config.json, tokenizer, image processor. Copied, never re-saved.

(transformers drops what it does not know when it saves a configuration again, among it `rope_theta`.)
"""

import json
import shutil
from pathlib import Path
from typing import Any

from laver_megatron.model.shape import is_laver_export, read_part

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
PREPROCESSOR_FILE = "preprocessor_config.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json",
    "special_tokens_map.json", CHAT_TEMPLATE_FILE, "chat_template.json",
)  # fmt: skip

SMALL_FILES = (CONFIG_FILE, GENERATION_FILE, PREPROCESSOR_FILE, "processor_config.json", *TOKENIZER_FILES)


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a Qwen2.5, of a checkpoint's hf/ or of a LaVer export (whose code is not run for it)."""
    from transformers import AutoTokenizer, Qwen2Config  # here, because importing it takes seconds

    # Without a configuration transformers would read config.json, and ask to run the code that an export's names.
    return AutoTokenizer.from_pretrained(directory, config=Qwen2Config(), local_files_only=True)


def copy_files(source: Path, target: Path, names: tuple[str, ...]) -> None:
    """Those of the files that are there."""
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def copy_model_files(source: Path, target: Path, part: str) -> None:
    """What building the decoder (TEXT_PART) or the image encoder (VISION_PART) needs besides weights. The part's
    own config.json is taken out of a LaVer export's."""
    copy_files(source, target, (CONFIG_FILE, GENERATION_FILE, PREPROCESSOR_FILE, *TOKENIZER_FILES))
    if is_laver_export(source):
        content = read_part(source, part)[1]
        (target / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n")
