"""An exported model that answers questions of conversations, one at a time, by greedy generation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, LogitsProcessor, LogitsProcessorList

from laver_megatron.data.read.conversations import Message
from laver_megatron.hf.files import loading_model
from laver_megatron.hf.shape import refuse_mixed_attention
from laver_megatron.runtime.files import read_object
from laver_megatron.tasks.contrast import Contrast, blank_like

_FORMATS = ("laver", "llava")


class ExportedModel:
    """A model in a Hugging Face directory, whose code is run if it brings any.

    Raises:
        ValueError: not an export that reads pictures, or one that cannot be loaded.
    """

    def __init__(self, directory: Path, device: str) -> None:
        if not (directory / "config.json").is_file():
            raise ValueError(f"{directory} is no directory with a config.json; name one that laver export wrote")
        config = read_object(directory / "config.json")
        kind = config.get("model_type")
        if kind not in _FORMATS:
            raise ValueError(
                f"{directory} holds a model of type {kind!r}, not an export that reads pictures "
                f"({', '.join(_FORMATS)}); make one with laver export"
            )
        self._is_laver = kind == "laver"
        refuse_mixed_attention(directory, config, "score an export with --format laver")
        with loading_model(directory):
            self._processor = AutoProcessor.from_pretrained(directory, trust_remote_code=self._is_laver)
            model = AutoModelForImageTextToText.from_pretrained(
                directory, trust_remote_code=self._is_laver, dtype="auto"
            )
        self._model = model.to(device).eval()
        self._turn_end = self._processor.tokenizer.convert_tokens_to_ids("<|im_end|>")

    def answer(
        self, asked: Sequence[Message], pictures: Sequence[Image.Image], *, contrast: float, max_new_tokens: int
    ) -> str:
        """What the model says next.

        Args:
            asked: the conversation so far.
            contrast: alpha of `contrast_logits`; 0 for plain decoding.

        Raises:
            ValueError: the model's logits are not finite.
        """
        prompt = self._processor.apply_chat_template([_as_chat(it) for it in asked], add_generation_prompt=True)
        inputs = self._inputs(prompt, pictures)
        processors = LogitsProcessorList()
        if contrast > 0 and pictures:
            blank = self._inputs(prompt, [blank_like(picture) for picture in pictures])
            processors.append(Contrast(self._model, blank, contrast))
        processors.append(_CheckFinite())
        output = self._model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            eos_token_id=self._turn_end,
            pad_token_id=self._turn_end,
            logits_processor=processors,
        )
        said = output[0, inputs["input_ids"].shape[1] :]
        return self._processor.tokenizer.decode(said, skip_special_tokens=True)

    def _inputs(self, prompt: str, pictures: Sequence[Image.Image]) -> Any:
        # A list, even an empty one, tells a processor of the laver format that the prompt holds all places.
        images = list(pictures) if self._is_laver or pictures else None
        return self._processor(text=prompt, images=images, return_tensors="pt").to(self._model.device)


class _CheckFinite(LogitsProcessor):
    """Raises ValueError for logits without a largest finite one: of these some word would be taken all the same."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not torch.isfinite(scores.amax()):  # excluded words have -inf
            raise ValueError(
                "the model's logits are not finite: its weights are damaged, its training has diverged, or numbers of "
                "16 bits overflow; `laver inspect` names the layer, metrics.jsonl of the run the iteration"
            )
        return scores


def _as_chat(message: Message) -> dict[str, Any]:
    content: list[dict[str, str]] = []
    for number, text in enumerate(message.texts):
        content += [{"type": "image"}] if number else []
        content += [{"type": "text", "text": text}] if text else []
    return {"role": message.role, "content": content}
