"""The tokenizer of a Qwen2.5: loading it, and what keeps it from serving a model with images."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from laver_megatron.hf.shape import ModelShape, is_laver_export, read_config
from laver_megatron.runtime.files import read_object

IMAGE_TOKENS = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a Qwen2.5, of a checkpoint's hf/ or of a LaVer export (whose code is not run for it)."""
    from transformers import AutoTokenizer, Qwen2Config  # here, because importing it takes seconds

    # Without a configuration transformers would read config.json, and ask to run the code that an export's names.
    return AutoTokenizer.from_pretrained(directory, config=Qwen2Config(), local_files_only=True)


def tokenizer_problems(directory: Path, shape: ModelShape) -> Iterator[str]:
    """What keeps a directory's tokenizer from serving a model with images."""
    file = directory / "tokenizer.json"
    has_words = all((directory / name).is_file() for name in ("vocab.json", "merges.txt"))
    if not file.is_file() and not has_words:
        yield f"{directory}: no tokenizer in it (tokenizer.json, or vocab.json with merges.txt)"
        return
    if not _has_chat_template(directory):
        yield (
            f"{directory}: its tokenizer has no chat template (chat_template.jinja, or chat_template in "
            "tokenizer_config.json); copy these files from the original model"
        )
    if not file.is_file():
        return
    try:
        added = {token["content"]: token["id"] for token in read_object(file)["added_tokens"]}
    except (ValueError, KeyError, TypeError):
        yield f"{file}: cannot be read as a tokenizer"
        return
    if is_laver_export(directory):
        named, meant = read_config(directory)[1].get("image_token_id"), added.get(IMAGE_TOKENS[1])
        if named != meant:
            yield f"{directory}/config.json: image_token_id is {named!r}, but {IMAGE_TOKENS[1]} is {meant} in {file}"
    absent = [token for token in IMAGE_TOKENS if token not in added]
    if absent:
        yield f"{file}: no {', '.join(absent)} among the special tokens; use the tokenizer of Qwen2.5"
    outside = [token for token, index in added.items() if index >= shape.vocab_size]
    if outside:
        token = outside[0]
        yield f"{file}: {token} has the id {added[token]}, but config.json's vocab_size is {shape.vocab_size}"


def _has_chat_template(directory: Path) -> bool:
    if (directory / "chat_template.jinja").is_file():
        return True
    try:
        return bool(read_object(directory / "tokenizer_config.json").get("chat_template"))
    except ValueError:
        return False
