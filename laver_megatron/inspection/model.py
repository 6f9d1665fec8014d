"""A model of transformers as it is looked into: one conversation, one layer at a time.

Letters: S tokens of a conversation, N visual tokens of one image, T of all its images, M text tokens, Q queries that
predict the answer, H width of the decoder, E width of the encoder's features, L decoder layers, A heads.

Layer 0 is the decoder's input (words, and the connector's output), layer l what its l-th layer returns; all before the
final norm, which `output_hidden_states` of transformers applies to the last.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from laver_megatron.data.read.conversations import Message
from laver_megatron.hf.files import loading_model
from laver_megatron.hf.shape import LAVER_EXPORT
from laver_megatron.inspection.measures import visual_attention_mass
from laver_megatron.inspection.processor import open_processor
from laver_megatron.inspection.samples import Sample
from laver_megatron.inspection.sources import FAMILIES


@dataclass(frozen=True)
class SeenImage:
    """An image as the decoder has it: its grid of visual tokens in raster order, and where they stand, int64 `[N]`."""

    grid: tuple[int, int]
    places_N: Tensor


@dataclass(frozen=True)
class Observation:
    """What was seen in one pass.

    Attributes:
        hidden: `[S, H]` of layers 0 to L.
        mass_LS: share of its attention that each query gives to visual keys, fp32 `[L, S]`; row 0 is layer 1.
        features: the encoder's, of each image, `[N, E]`.
        text_M: where the text is.
        answer_Q: the queries that predict the answer's tokens, in order; the first stands before the answer.
    """

    hidden: list[Tensor]
    mass_LS: Tensor
    features: list[Tensor]
    images: list[SeenImage]
    text_M: Tensor
    answer_Q: Tensor

    @cached_property
    def text_queries(self) -> Tensor:
        """Text behind the first visual token: what stands before cannot see any."""
        first = min(int(image.places_N[0]) for image in self.images)
        return self.text_M[self.text_M > first]


class InspectedModel:
    """A model with its processor. Attention runs eagerly in the decoder, whose weights are needed; only one layer's
    `[A, S, S]` is there at a time.

    Raises:
        ValueError: it cannot be loaded.
    """

    def __init__(self, directory: Path, model_type: str, device: str, dtype: str = "auto") -> None:
        from transformers import AutoModelForImageTextToText

        with loading_model(directory):
            self.processor = open_processor(directory, model_type)
            self.model = AutoModelForImageTextToText.from_pretrained(
                directory,
                dtype=dtype,
                attn_implementation={"text_config": "eager", "vision_config": "sdpa"},
                trust_remote_code=model_type == LAVER_EXPORT,
                local_files_only=True,
            )
        self.model.to(device).eval()
        self.directory, self.model_type, self.device = directory, model_type, device
        family = FAMILIES[model_type]
        self.decoder: Any = self.model.get_submodule(family.decoder)
        self.connector = self.model.get_submodule(family.connector)
        self.num_layers = len(self.decoder.layers)

    # --- what goes in ---

    @torch.no_grad()
    def prepare(self, sample: Sample, max_new_tokens: int) -> tuple[dict[str, Tensor], int]:
        """The model's inputs for a conversation with its answer (of at most `max_new_tokens` where the sample has
        none), and the number of tokens before the answer."""
        prompt = self.processor.apply_chat_template(
            [_as_parts(message) for message in sample.messages], add_generation_prompt=True
        )
        inputs = self._process(prompt, sample)
        answer = sample.answer
        if answer is None:
            output = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
            new = output[0, inputs["input_ids"].shape[1] :]
            answer = self.processor.tokenizer.decode(new, skip_special_tokens=True)
        asked = inputs["input_ids"][0].tolist()
        inputs = self._process(prompt + answer, sample)
        told = inputs["input_ids"][0].tolist()
        # A tokenizer may join the end of the prompt and the beginning of the answer.
        same = next((i for i, pair in enumerate(zip(asked, told, strict=False)) if pair[0] != pair[1]), len(asked))
        return inputs, same

    def _process(self, text: str, sample: Sample) -> dict[str, Tensor]:
        inputs = self.processor(text=text, images=list(sample.pictures), return_tensors="pt").to(self.device)
        dtype = self.model.dtype
        return {
            name: value.to(dtype) if value.is_floating_point() and self.model_type != LAVER_EXPORT else value
            for name, value in inputs.items()
        }

    def images_of(self, inputs: dict[str, Tensor]) -> list[SeenImage]:
        """The images of one conversation.

        Raises:
            ValueError: as many image tokens as the images do not have.
        """
        grids = self._grids(inputs)
        places_T = (inputs["input_ids"][0] == self.model.config.image_token_id).nonzero().flatten()
        sizes = [rows * columns for rows, columns in grids]
        if len(places_T) != sum(sizes):
            raise ValueError(f"{self.directory}: {len(places_T)} image tokens, but images of {sizes} visual tokens")
        return [SeenImage(grid, own) for grid, own in zip(grids, places_T.split(sizes), strict=True)]

    def _grids(self, inputs: dict[str, Tensor]) -> list[tuple[int, int]]:
        vision = self.model.config.vision_config
        if "image_grids" in inputs:
            return [(rows, columns) for rows, columns in inputs["image_grids"].tolist()]
        if "image_grid_thw" in inputs:
            merge = vision.spatial_merge_size
            return [(rows // merge, columns // merge) for _, rows, columns in inputs["image_grid_thw"].tolist()]
        num_images, _, height, width = inputs["pixel_values"].shape
        return num_images * [(height // vision.patch_size, width // vision.patch_size)]

    # --- what is seen ---

    @torch.no_grad()
    def observe(self, inputs: dict[str, Tensor], num_before_answer: int) -> Observation:
        """One forward pass over a conversation of one sequence."""
        images = self.images_of(inputs)
        length = inputs["input_ids"].shape[1]
        visual_S = torch.zeros(length, dtype=torch.bool, device=inputs["input_ids"].device)
        visual_S[torch.cat([image.places_N for image in images])] = True
        hidden: list[Tensor] = []
        masses: list[Tensor] = []
        features: list[Tensor] = []

        def keep_mass(module: nn.Module, arguments: Any, output: tuple[Tensor, Tensor]) -> None:
            masses.append(visual_attention_mass(output[1][0], visual_S))

        with ExitStack() as hooks:
            layers = self.decoder.layers
            hooks.enter_context(before(layers[0], lambda tensor: hidden.append(tensor[0])))
            hooks.enter_context(before(self.connector, features.append))
            for layer in layers:
                handles = [
                    layer.register_forward_hook(lambda module, arguments, output: hidden.append(_first(output)[0])),
                    layer.self_attn.register_forward_hook(keep_mass),
                ]
                for handle in handles:
                    hooks.callback(handle.remove)
            self.model(**inputs, use_cache=False, logits_to_keep=1)
        (of_connector,) = features
        features_TE = self._in_raster_order(of_connector.flatten(0, -2), inputs)
        return Observation(
            hidden=hidden,
            mass_LS=torch.stack(masses),
            features=list(features_TE.split([len(image.places_N) for image in images])),
            images=images,
            text_M=(~visual_S).nonzero().flatten(),
            answer_Q=torch.arange(num_before_answer - 1, length - 1),
        )

    def _in_raster_order(self, features_TE: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """Qwen2.5-VL's own encoder keeps its tokens window by window up to the merger's end."""
        if self.model_type != "qwen2_5_vl":
            return features_TE
        from transformers.vision_utils import get_vision_window_index

        vision = self.model.config.vision_config
        window_T, _ = get_vision_window_index(
            inputs["image_grid_thw"].cpu(), vision.spatial_merge_size, vision.window_size, vision.patch_size
        )
        return features_TE[window_T.argsort().to(features_TE.device)]


@contextmanager
def before(module: nn.Module, keep: Any) -> Iterator[None]:
    """Calls `keep` with the first argument of each call of a module."""

    def hook(module: nn.Module, arguments: tuple, named: dict[str, Any]) -> None:
        keep(arguments[0] if arguments else named["hidden_states"])

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _first(output: Any) -> Tensor:
    """What a layer returns: the hidden states, in older versions of transformers as the first of a tuple."""
    return output[0] if isinstance(output, tuple) else output


def _as_parts(message: Message) -> dict[str, Any]:
    """A message as chat templates take it."""
    first, *others = message.texts
    parts: list[dict[str, str]] = [{"type": "text", "text": first}] if first else []
    for text in others:
        parts.append({"type": "image"})
        if text:
            parts.append({"type": "text", "text": text})
    return {"role": message.role, "content": parts}
