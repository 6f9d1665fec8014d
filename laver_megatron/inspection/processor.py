"""What makes a model's inputs of texts and pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from laver_megatron.hf.shape import LAVER_EXPORT


def open_processor(directory: Path, model_type: str) -> Any:
    """transformers' processor of a model, or what stands in for Qwen2.5-VL's.

    Raises:
        OSError, ValueError: files that are missing or cannot be read.
    """
    from transformers import AutoProcessor

    if model_type == "qwen2_5_vl":
        processor: Any = QwenProcessor(directory)
    else:
        trust = model_type == LAVER_EXPORT
        processor = AutoProcessor.from_pretrained(directory, trust_remote_code=trust, local_files_only=True)
    if not (getattr(processor, "chat_template", None) or processor.tokenizer.chat_template):
        raise ValueError("it has no chat template; put the model's chat_template.jinja into the directory")
    return processor


class QwenProcessor:
    """Texts and pictures of Qwen2.5-VL. Its own processor cannot be made without torchvision, which videos need."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoImageProcessor, AutoTokenizer

        self.image_processor = AutoImageProcessor.from_pretrained(directory, backend="pil", local_files_only=True)
        self.tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)

    def apply_chat_template(self, conversation: Sequence[dict[str, Any]], add_generation_prompt: bool = False) -> str:
        return self.tokenizer.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def __call__(self, text: str, images: Sequence[Image.Image], return_tensors: str) -> Any:
        """input_ids, attention_mask and mm_token_type_ids (1 at images) `[1, S]`, pixel_values, image_grid_thw."""
        pictures = self.image_processor(images=list(images), return_tensors=return_tensors)
        pad = "<|image_pad|>"
        first, *others = text.split(pad)
        if len(others) != len(images):
            raise ValueError(f"the text has places for {len(others)} pictures, but there are {len(images)}")
        sizes = (pictures["image_grid_thw"].prod(-1) // self.image_processor.merge_size**2).tolist()
        written = first + "".join(size * pad + other for size, other in zip(sizes, others, strict=True))
        inputs = self.tokenizer([written], return_tensors=return_tensors)
        is_image = inputs["input_ids"] == self.tokenizer.convert_tokens_to_ids(pad)
        pictures.update({**inputs, "mm_token_type_ids": is_image.long()})
        return pictures
