"""Fixtures of the distributed tests: the worker processes and the small random model, both once a session."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.distributed.build import IMAGE_SIZE, IMAGE_TOKEN, VOCABULARY, Assets, make_assets
from tests.distributed.harness import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Four processes that stay for the whole session."""
    pool = Pool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Assets:
    """Random Qwen2.5 checkpoints (tied and untied) and a random SigLIP encoder in Hugging Face format."""
    return make_assets(tmp_path_factory.mktemp("assets"))


@pytest.fixture(scope="session")
def files(assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> Assets:
    """The small random models with what an export copies besides: a tokenizer and an image processor's settings."""
    directory = tmp_path_factory.mktemp("files")
    special = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
    words = {f"w{i}": i for i in range(VOCABULARY - len(special))}
    words |= {token: VOCABULARY - len(special) + i for i, token in enumerate(special)}
    plain = Tokenizer(models.WordLevel(words, unk_token="w0"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, chat_template="{{ messages }}")
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    assert tokenizer.convert_tokens_to_ids("<|image_pad|>") == IMAGE_TOKEN
    found = Assets(*(Path(shutil.copytree(path, directory / path.name)) for path in vars(assets).values()))
    for path in (found.tied, found.untied):
        tokenizer.save_pretrained(path)
    settings = {"image_processor_type": "SiglipImageProcessor", "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}}
    (found.encoder / "preprocessor_config.json").write_text(json.dumps(settings))
    return found
