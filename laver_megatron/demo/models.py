"""The demo's language model: a Qwen2.5 with random weights and its tokenizer, in the form of the real ones."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from laver_megatron.hf.files import CONFIG_FILE, GENERATION_FILE
from laver_megatron.runtime.files import write_json
from laver_megatron.runtime.terminal import quiet_transformers

VOCABULARY_SIZE = 2048

# Qwen2.5's special tokens in their order; those after the vision tokens are ordinary added tokens there.
_SPECIAL_TOKENS = [
    f"<|{name}|>"
    for name in (
        "endoftext", "im_start", "im_end", "object_ref_start", "object_ref_end", "box_start", "box_end", "quad_start",
        "quad_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad",
    )
]  # fmt: skip
_ADDED_TOKENS = [
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>",
    "<|file_sep|>",
]  # fmt: skip

_SYSTEM_PROMPT = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."

# The text that Qwen2.5's template gives for conversations without tools.
_CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' %}"
    "{{- '<|im_start|>system\\n" + _SYSTEM_PROMPT + "<|im_end|>\\n' }}"
    "{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)

# How Qwen2.5 cuts text before byte-level BPE: digits one by one, words with one character before them.
_PRE_TOKENS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)

_SENTENCES = """\
Return the number of items in the list, or zero if the list is empty.
Raises ValueError if the argument is not a positive integer.
Open the file for reading and return its content as a string of text.
The first argument names the directory; the second one is optional and defaults to None.
Split the sequence into parts of equal length, with the last part possibly shorter.
Compute the mean and the standard deviation of each column of the table.
This function does not change its input; it returns a new dictionary instead.
If the key is found, the value that belongs to it is returned and removed.
A picture is a grid of pixels, and every pixel has a red, a green and a blue part.
The model looks at the picture and answers the question that the person has asked.
Words are made of letters, sentences are made of words, and stories are made of sentences.
She walked along the river in the morning and came back before the sun had set.
The weather in the mountains changes quickly: sunshine, clouds, rain, and then snow.
Please describe what you can see in the upper left corner of the photograph.
How many people are standing in front of the building, and what are they doing?
There are two birds in the tree, three boats on the water, and no cars on the street.
Yes, the object on the right is larger than the one on the left.
No, I do not think that this is a good idea, because it would take too much time.
The train leaves at a quarter past seven from platform nine and arrives two hours later.
Write to standard output what was read from standard input, one line after the other.
import json, os, sys
def main(argv=None): parser = argparse.ArgumentParser(description=__doc__)
for index, item in enumerate(items): total += weights[index] * item
assert result == expected, f"got {result} instead of {expected}"
with open(path, encoding="utf-8") as file: return json.load(file)
""".splitlines()


def check_language_sizes(hidden_size: int, num_layers: int) -> None:
    """Raises ValueError for a size that a Qwen2 of this form cannot have."""
    if hidden_size < 16 or hidden_size % 16 or num_layers < 1:
        raise ValueError(
            f"a demo model has a width that is a multiple of 16 and at least one layer, not {hidden_size} "
            f"and {num_layers}"
        )


def save_language_model(
    directory: Path,
    texts: Sequence[str],
    *,
    hidden_size: int = 128,
    num_layers: int = 4,
    system_prompt: str = _SYSTEM_PROMPT,
) -> None:
    """A small Qwen2ForCausalLM in float32 with random weights, and a tokenizer trained on `texts`.

    Args:
        system_prompt: what the chat template inserts where a conversation has none.

    Raises:
        ValueError: a size that a Qwen2 of this form cannot have.
    """
    check_language_sizes(hidden_size, num_layers)
    tokenizer = train_tokenizer([*texts, *_SENTENCES, system_prompt, "system\nuser\nassistant\n"])
    tokenizer.chat_template = _CHAT_TEMPLATE.replace(_SYSTEM_PROMPT, system_prompt)
    tokenizer.save_pretrained(directory)
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("endoftext", "im_end")}
    config = {
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": ids["endoftext"],
        "eos_token_id": ids["im_end"], "hidden_act": "silu", "hidden_size": hidden_size, "initializer_range": 0.02,
        "intermediate_size": 11 * hidden_size // 4, "max_position_embeddings": 32768, "max_window_layers": num_layers,
        "model_type": "qwen2", "num_attention_heads": 4, "num_hidden_layers": num_layers, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True,
        "torch_dtype": "float32", "use_cache": True, "use_sliding_window": False, "vocab_size": VOCABULARY_SIZE,
    }  # fmt: skip
    with seeded(1):
        model = Qwen2ForCausalLM(Qwen2Config(**config))
    with quiet_transformers():
        model.save_pretrained(directory)
    # transformers 5 writes RoPE and dtype in a form of its own; the published checkpoints have this one.
    write_json(directory / CONFIG_FILE, config)
    ends = {"pad_token_id": ids["endoftext"], "eos_token_id": [ids["im_end"], ids["endoftext"]]}
    write_json(directory / GENERATION_FILE, {"bos_token_id": ids["endoftext"], **ends, "do_sample": False})


def train_tokenizer(texts: Sequence[str]) -> Qwen2Tokenizer:
    """Byte-level BPE as Qwen2.5 has it: NFC, its pre-tokens, its special tokens after the vocabulary."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(_PRE_TOKENS), behavior="isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE - len(_SPECIAL_TOKENS) - len(_ADDED_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    learnt = json.loads(bpe.to_str())["model"]
    # In the vocabulary already, so that the wrapper numbers them in this order and not its own.
    tokens = [*sorted(learnt["vocab"], key=learnt["vocab"].get), *_SPECIAL_TOKENS, *_ADDED_TOKENS]
    tokenizer = Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[tuple(merge) for merge in learnt["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,
        model_max_length=32768,
        clean_up_tokenization_spaces=False,
        chat_template=_CHAT_TEMPLATE,
    )
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in _ADDED_TOKENS])
    assert len(tokenizer) <= VOCABULARY_SIZE, len(tokenizer)
    return tokenizer


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's CPU generator at a seed, and back where it was afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
