"""Asks an exported model about pictures.

    python examples/chat.py --model EXPORT --image photo.jpg --question "What is in the picture?"
    python examples/chat.py --model EXPORT --image photo.jpg           # asks for questions; an empty line ends it

EXPORT is a directory written by tools/megatron_to_hf.py. Needs torch, transformers and Pillow, and nothing of this
repository but for --contrast. An export in laver format brings code of its own, which is run: use exports that you
trust.
"""

import argparse
import importlib.util
import io
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from safetensors import SafetensorError

_DTYPES = ("auto", "bfloat16", "float16", "float32")
_MOST_CONTRAST = 100.0  # beyond this only the difference of the two logits counts


class UserError(Exception):
    """Something on the command line that the user can put right."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the chat; 0, or 2 with a message where the command line is at fault."""
    options = _parse(argv)
    try:
        _check_contrast(options)
        format = _format_of(options.model)
        pictures = [_open(path, format) for path in options.image]
        device = _device(options.device)
        print(f"loading {options.model} on {device} ...", file=sys.stderr)
        try:
            chat = Chat(
                options.model, format, pictures, device, options.dtype, options.max_new_tokens, options.contrast
            )
        except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{options.model} cannot be loaded: {error}") from error
    except UserError as error:
        print(f"chat.py: {error}", file=sys.stderr)
        return 2
    for question in _questions(options.question):
        try:
            chat.ask(question)
        except ValueError as error:  # image tokens spelt out
            print(f"chat.py: this cannot be asked: {error}", file=sys.stderr)
            if options.question is not None:
                return 2
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Asks an exported model about pictures.")
    parser.add_argument("--model", type=Path, required=True, help="directory written by tools/megatron_to_hf.py")
    parser.add_argument("--image", type=Path, nargs="+", default=[], help="pictures, shown before the first question")
    parser.add_argument("--question", help="ask this and stop; without it, questions are read one after the other")
    parser.add_argument("--max-new-tokens", type=_positive, default=512, help="longest answer (default: 512)")
    parser.add_argument(
        "--contrast", type=_alpha, default=0.0, metavar="ALPHA",
        help="prefer what the pictures make likelier (visual contrastive decoding): 0 (off) to 100; 1 is usual",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=_DTYPES, default="auto", help="of the weights (default: as exported)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps; default: the best there is")
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def _alpha(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= _MOST_CONTRAST:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to {_MOST_CONTRAST:g}")
    return value


def _check_contrast(options: argparse.Namespace) -> None:
    """Before the model is loaded, which takes long."""
    if options.contrast and not options.image:
        raise UserError("--contrast compares pictures with blank ones, but there are none; add --image or leave it out")
    if options.contrast and importlib.util.find_spec("laver_megatron") is None:
        raise UserError("--contrast needs the package laver_megatron; install it, or leave the flag out")


def _format_of(directory: Path) -> str:
    """`laver` or `llava`; a UserError says what the directory is not."""
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory")
    path = directory / "config.json"
    if not path.is_file():
        raise UserError(f"{directory} has no config.json; is it an export of tools/megatron_to_hf.py?")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        format = config.get("model_type")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if format not in ("laver", "llava"):
        raise UserError(
            f"{directory} holds a model of type {format!r}, not an export that reads pictures (laver or llava); "
            "export the checkpoint with tools/megatron_to_hf.py --format laver"
        )
    if format == "llava" and config.get("is_mm_prefix_lm"):
        print(
            "chat.py: this model was trained with mixed attention, which transformers does not compute for the llava "
            "format; its answers will be worse than those of an export with --format laver",
            file=sys.stderr,
        )
    return format


def _open(path: Path, format: str) -> Image.Image:
    """A picture as it is in its file: a processor of the laver format makes of it what training did. That of the llava
    format is stock, and takes what transformers makes of it."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    content = path.read_bytes()
    try:
        picture = Image.open(io.BytesIO(content))
        picture.load()
        if format == "laver":
            return picture
        from transformers.image_utils import load_image

        return load_image(picture)
    except UnidentifiedImageError:  # its message names an object in memory
        is_page = content[:256].removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith((b"<!doctype html", b"<html"))
        kind = "it is an HTML page" if is_page else f"it begins {content[:8]!r}" if content else "it is empty"
        raise UserError(f"{path} is not a picture that can be read: {kind}") from None
    except Exception as error:  # Pillow's decoders raise what they like on broken files
        raise UserError(f"{path} is not a picture that can be read: {error}") from None


def _device(name: str) -> torch.device:
    if name == "auto":
        has_mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None


def _questions(question: str | None) -> Iterator[str]:
    """The one of the command line, or those typed until an empty line or the end of the input."""
    if question is not None:
        yield question
        return
    while True:
        try:
            typed = input("? ").strip()
        except EOFError:
            return
        if not typed:
            return
        yield typed


class Chat:
    """A conversation about some pictures; every answer sees all that was said before."""

    def __init__(
        self,
        directory: Path,
        format: str,
        pictures: list[Image.Image],
        device: torch.device,
        dtype: str,
        max_new_tokens: int,
        contrast: float = 0.0,
    ) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.is_laver = format == "laver"
        self.processor = AutoProcessor.from_pretrained(directory, trust_remote_code=self.is_laver)
        model = AutoModelForImageTextToText.from_pretrained(directory, trust_remote_code=self.is_laver, dtype=dtype)
        self.model = model.to(device).eval()
        self.pictures, self.max_new_tokens, self.contrast = pictures, max_new_tokens, contrast
        self.messages: list[dict[str, Any]] = []

    def ask(self, question: str) -> str:
        """Prints the answer as it comes, and returns it."""
        from transformers import TextStreamer

        shown = [] if self.messages else [{"type": "image"} for _ in self.pictures]
        asked = {"role": "user", "content": [*shown, {"type": "text", "text": question}]}
        prompt = self.processor.apply_chat_template([*self.messages, asked], add_generation_prompt=True)
        # To a processor of the laver format a list, even an empty one, says that the prompt holds the places of all
        # pictures, and that an `<image>` that someone says is a word. For that of the llava format it always is one.
        pictures = self.pictures if self.is_laver else self.pictures or None
        inputs = self._inputs(prompt, pictures)
        self.messages.append(asked)
        streamer = TextStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        contrasts = [self._against_blank(prompt)] if self.contrast and self.pictures else []
        output = self.model.generate(
            **inputs, max_new_tokens=self.max_new_tokens, streamer=streamer, logits_processor=contrasts
        )
        answer = self.processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        self.messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        return answer

    def _inputs(self, prompt: str, pictures: list[Image.Image] | None) -> Any:
        return self.processor(text=prompt, images=pictures, return_tensors="pt").to(self.model.device)

    def _against_blank(self, prompt: str) -> Any:
        from laver_megatron.tasks.contrast import Contrast, blank_like

        return Contrast(self.model, self._inputs(prompt, [blank_like(it) for it in self.pictures]), self.contrast)


if __name__ == "__main__":
    sys.exit(main())
