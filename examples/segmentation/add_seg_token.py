"""A laver export with [SEG] in its vocabulary, from which LISA-style training begins.

    python examples/segmentation/add_seg_token.py --export exports/laver --output exports/laver-seg

LISA (Lai et al. 2024) has the language model answer with a token [SEG], whose last hidden state a mask decoder turns
into a mask. What such training begins from is thus the export with one token more. Its embedding, and its row of the
head, are the means over the other tokens. Qwen2.5 has more rows than tokens, and the new one takes the first that is
free; the matrices only grow where there is none (transformers' resize_token_embeddings(len(tokenizer)) would cut the
free ones off). The logits of all other tokens stay the same to the last bit.

Load it, and take the states of [SEG], as of any export:

    model = AutoModelForImageTextToText.from_pretrained(DIR, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(DIR, trust_remote_code=True)
    seg_token_id = processor.tokenizer.convert_tokens_to_ids("[SEG]")
    states_BLH = model(**inputs, output_hidden_states=True).hidden_states[-1]
    seg_states = states_BLH[inputs["input_ids"] == seg_token_id]        # as many as there are [SEG]

The code of the export comes along and is run: use only exports that you trust.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

TOKEN = "[SEG]"


def add_token(export: Path, output: Path, token: str = TOKEN) -> int:
    """Writes the export with one more token to a folder that is not there yet; returns the token's number.

    Raises:
        ValueError: the export has the token.
    """
    processor = AutoProcessor.from_pretrained(export, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(export, trust_remote_code=True, dtype="auto")
    tokenizer = processor.tokenizer
    num_tokens = len(tokenizer)
    if tokenizer.add_tokens(token) == 0:
        raise ValueError(f"{export} has the token {token} already")
    number = tokenizer.convert_tokens_to_ids(token)
    if number >= model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(number + 1, mean_resizing=False)
    with torch.no_grad():
        for layer in {model.get_input_embeddings(), model.get_output_embeddings()}:
            layer.weight[number] = layer.weight[:num_tokens].float().mean(dim=0)
    model.save_pretrained(output)
    processor.save_pretrained(output)
    return number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--export", type=Path, required=True, metavar="DIR", help="an export of --format laver")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write")
    options = parser.parse_args()
    if not (options.export / "config.json").is_file():
        parser.error(f"{options.export} holds no config.json; name what `laver export` wrote")
    if options.output.exists():
        parser.error(f"{options.output} exists; choose another folder, or remove it")
    try:
        model_type = json.loads((options.export / "config.json").read_text(encoding="utf-8")).get("model_type")
        if model_type != "laver":
            raise ValueError(f"{options.export} holds a model of type {model_type!r}; export with --format laver")
        number = add_token(options.export, options.output)
    except (json.JSONDecodeError, AttributeError) as error:
        parser.error(f"{options.export / 'config.json'} cannot be read: {error}")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"{TOKEN} is token {number} of {options.output}")


if __name__ == "__main__":
    main()
