"""The reconstruction stream of a LaVer model: the visual logits of student and teacher, as training anchors them.

Letters: N visual tokens of one image, K visual logits, H width of the decoder.

Visual tokens alone, bidirectional within their image, positions from 0. The student sees [MASK] in place of some, the
teacher all of them.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from laver_megatron.hf.safetensors_reader import TRAINING_STATE, SafetensorsReader
from laver_megatron.inspection.model import InspectedModel, SeenImage
from laver_megatron.model.positions import reconstruction_positions
from laver_megatron.objective.masking import mask_visual_tokens

_STUDENT, _TEACHER = "", "teacher."


class Reconstruction:
    """Student and teacher beside an inspected export that has its training state.

    Args:
        directory: of the export.
        mask_ratio: share of visual tokens that the student sees as [MASK], each by its own coin.
    """

    def __init__(self, inspected: InspectedModel, directory: Path, mask_ratio: float) -> None:
        self.inspected, self.mask_ratio = inspected, mask_ratio
        with SafetensorsReader(directory, TRAINING_STATE) as tensors:
            dtype = inspected.model.dtype
            state = {name: tensors.read_whole(name).to(inspected.device, dtype) for name in tensors.names()}
        student: Any = inspected.decoder
        # The embedding is not used and need not be there twice.
        teacher = copy.deepcopy(student, {id(student.embed_tokens): student.embed_tokens})
        prefix = f"{_TEACHER}model."
        own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        missing, unknown = teacher.load_state_dict(own, strict=False)
        if unknown or [name for name in missing if not name.startswith("embed_tokens.")]:
            raise ValueError(f"{directory}: the teacher lacks {missing} or has {unknown} beyond its layers")
        self.decoders = {_STUDENT: student, _TEACHER: teacher}
        self.heads = {part: _head(state, f"{part}vision_head.") for part in self.decoders}
        self.mask_token_H = state["mask_token"]

    @torch.no_grad()
    def logits(self, tokens_NH: Tensor, image: SeenImage, number: int) -> tuple[Tensor, Tensor]:
        """Logits of student and teacher, `[N, K]` each, of an image whose visual tokens these are (layer 0).

        number: of the image, by which its masked tokens are drawn.
        """
        image_1N = torch.zeros(1, len(tokens_NH), dtype=torch.int64)
        masked_N = mask_visual_tokens(
            image_1N, image_1N + number, image_1N, mask_ratio=self.mask_ratio, sampling="bernoulli", seed=0, step=0
        )[0].to(tokens_NH.device)
        masked_NH = torch.where(masked_N[:, None], self.mask_token_H, tokens_NH)
        student_NK, teacher_NK = (
            self._run(part, seen, image) for part, seen in ((_STUDENT, masked_NH), (_TEACHER, tokens_NH))
        )
        return student_NK, teacher_NK

    def _run(self, part: str, tokens_NH: Tensor, image: SeenImage) -> Tensor:
        place_1N = torch.arange(len(tokens_NH))[None]
        rows_1N, columns_1N = place_1N // image.grid[1], place_1N % image.grid[1]
        positions = self.inspected.model.config.positions
        position_31N = reconstruction_positions(torch.zeros_like(place_1N), rows_1N, columns_1N, positions)
        everything_11NN = tokens_NH.new_zeros(1, 1, len(tokens_NH), len(tokens_NH))  # what is added to the scores
        output = self.decoders[part](
            inputs_embeds=tokens_NH[None],
            attention_mask={"full_attention": everything_11NN},
            position_ids=position_31N.to(tokens_NH.device) if positions != "1d" else place_1N.to(tokens_NH.device),
            use_cache=False,
        )
        return self.heads[part](output.last_hidden_state[0])


def _head(state: dict[str, Tensor], prefix: str) -> nn.Module:
    """The vision head (`model/heads.py:VisionHead`) of these weights."""
    layers: list[nn.Module] = []
    for number in (1, 2, 3):
        weight, bias = (state.get(f"{prefix}linear_{number}.{name}") for name in ("weight", "bias"))
        assert weight is not None
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
        layer.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            layer.bias = nn.Parameter(bias, requires_grad=False)
        layers += [layer, nn.GELU()]
    return nn.Sequential(*layers[:-1])
