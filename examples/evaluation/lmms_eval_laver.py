"""Scores an export with lmms-eval: its program with one more model, `laver`.

    python examples/evaluation/lmms_eval_laver.py --model laver --model_args pretrained=EXPORT \\
        --tasks mme,ai2d --batch_size 8 --output_path scores/
    accelerate launch --num_processes 8 examples/evaluation/lmms_eval_laver.py ...     # a copy of the model each

EXPORT is a directory in laver format; the code that it brings is run. All other options are lmms-eval's own.
Needs lmms-eval, torch and transformers, and nothing of this repository.
"""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lmms_eval.api.model import lmms
from transformers import AutoModelForImageTextToText, AutoProcessor

# lmms-eval's stop string where a task names none; a model that chats writes it within its answers.
_DEFAULT_STOP = "\n\n"
_PICTURE_IN_TEXT = "<image>"


class Laver(lmms):
    """Answers in batches, padded on the left; any number of pictures in a question.

    pretrained: the export. dtype: of the weights, `auto` as exported. max_new_tokens: where the task says nothing.
    system_prompt: instead of the one that the chat template puts in.
    """

    is_simple = False  # asks tasks for whole conversations, with the pictures in them

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        attn_implementation: str = "sdpa",
        max_new_tokens: int = 1024,
        system_prompt: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdecimal():
            raise ValueError(f"--batch_size is {batch_size!r}, but this model needs a number")
        self.batch_size, self.max_new_tokens, self.system_prompt = int(batch_size), int(max_new_tokens), system_prompt
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import Accelerator

            self.accelerator = Accelerator()
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
            device = str(self.accelerator.device)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.processor = AutoProcessor.from_pretrained(pretrained, trust_remote_code=True)
        model = AutoModelForImageTextToText.from_pretrained(
            pretrained, trust_remote_code=True, dtype=dtype, attn_implementation=attn_implementation
        )
        self.model = model.to(self.device).eval()

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answers, in the order of the requests."""
        answers = [""] * len(requests)
        for numbers, settings in self._batches(requests):
            conversations = [self._conversation(*requests[number].args) for number in numbers]
            for number, answer in zip(numbers, self._answer(conversations, settings), strict=True):
                answers[number] = answer
                self.cache_hook.add_partial("generate_until", (requests[number].args[0], settings), answer)
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError("laver answers in words; choose tasks of type generate_until")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise NotImplementedError("laver answers one question at a time; choose tasks of type generate_until")

    def _batches(self, requests: Sequence[Any]) -> Iterator[tuple[list[int], dict[str, Any]]]:
        """Requests with equal settings, at most `batch_size` together."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[2].items())), []).append(number)
        for numbers in groups.values():
            for first in range(0, len(numbers), self.batch_size):
                yield numbers[first : first + self.batch_size], requests[numbers[0]].args[2]

    def _conversation(
        self, context: str, messages_of: Any, settings: dict, document: Any, task: str, split: str
    ) -> tuple[list[dict[str, Any]], list[Any]]:
        """Messages for the chat template, and the pictures in them."""
        messages, pictures = [], []
        for message in messages_of(self.task_dict[task][split][document]):
            content = []
            for part in message["content"]:
                if part["type"] == "image":
                    pictures.append(part["url"])
                    content.append({"type": "image"})
                elif part["type"] == "text":
                    content.append({"type": "text", "text": part["text"]})
                else:
                    raise ValueError(f"{task}, document {document}: laver sees pictures, but no {part['type']}")
            messages.append({"role": message["role"], "content": content})
        if pictures:
            # A task may mark the places of its pictures in the text, too, before which lmms-eval puts them all. Here a
            # mark would be a word, where training put a picture in its place.
            for part in (part for message in messages for part in message["content"] if part["type"] == "text"):
                part["text"] = part["text"].replace(_PICTURE_IN_TEXT, "")
        if self.system_prompt is not None:
            spoken = [message for message in messages if message["role"] != "system"]
            system = {"role": "system", "content": [{"type": "text", "text": self.system_prompt}]}
            messages = [system, *spoken]
        return messages, pictures

    @torch.inference_mode()
    def _answer(self, conversations: Sequence[tuple[list, list]], settings: dict[str, Any]) -> list[str]:
        texts = [
            self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            for messages, _ in conversations
        ]
        pictures = [pictures for _, pictures in conversations]
        inputs = self.processor(text=texts, images=pictures, padding=True, padding_side="left", return_tensors="pt")
        inputs = inputs.to(self.device, self.model.dtype)
        temperature = settings.get("temperature") or 0.0
        sampling = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if temperature > 0:
            sampling = {"do_sample": True, "temperature": temperature, "top_p": settings.get("top_p")}
        tokens_BL = self.model.generate(
            **inputs,
            **sampling,
            num_beams=settings.get("num_beams") or 1,
            max_new_tokens=settings.get("max_new_tokens") or self.max_new_tokens,
        )
        new_BL = tokens_BL[:, inputs["input_ids"].shape[1] :]
        words = self.processor.batch_decode(new_BL, skip_special_tokens=True)
        return [_cut(text, settings.get("until")) for text in words]


def _cut(text: str, until: str | Sequence[str] | None) -> str:
    """The answer before the first of the task's stop strings."""
    for stop in [until] if isinstance(until, str) else until or ():
        if stop and stop != _DEFAULT_STOP:
            text = text.split(stop)[0]
    return text.strip()


def main() -> None:
    """lmms-eval's command line, which can now find `laver`."""
    from lmms_eval.__main__ import cli_evaluate
    from lmms_eval.models import MODEL_REGISTRY_V2
    from lmms_eval.models.registry_v2 import ModelManifest

    MODEL_REGISTRY_V2.register_manifest(ModelManifest(model_id="laver", chat_class_path="lmms_eval_laver.Laver"))
    cli_evaluate()


if __name__ == "__main__":
    main()
