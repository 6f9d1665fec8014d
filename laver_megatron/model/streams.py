"""One micro-batch as the model sees it: `[language S | masked visual V | unmasked visual V]`.

Letters: B packs, S language tokens, V visual slots, L either, D width of an attention head.

The visual stream is not stored anywhere: it is the visual tokens of the language stream in order, moved to
the front and padded. Spans and positions of all three parts follow from the packs' metadata.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from laver_megatron.config.fields import Config
from laver_megatron.data.batch.packing import PackBatch
from laver_megatron.hf.shape import ModelShape
from laver_megatron.model.positions import language_positions, reconstruction_positions, rotary_angles
from laver_megatron.model.spans import concatenate_spans, language_spans, reconstruction_spans, span_area


@dataclass(frozen=True)
class StreamSettings:
    """What turns packs into streams; fixed for a run."""

    visual_seq_length: int
    attention: str
    positions: str
    head_dim: int
    rope_theta: float
    laver: bool

    @classmethod
    def of(cls, config: Config, shape: ModelShape) -> "StreamSettings":
        """Those of a run of a model."""
        return cls(
            visual_seq_length=config.data.visual_seq_length,
            attention=config.model.attention,
            positions=config.model.positions,
            head_dim=shape.kv_channels,
            rope_theta=shape.rope_theta,
            laver=config.objective.laver,
        )


@dataclass(frozen=True)
class MicroBatch:
    """Everything a pipeline stage needs to know of a micro-batch besides the hidden states, on the device.

    slot_BS: the visual slot of a visual token, -1 for text and padding. image_BV: the image in a slot, -1
    for padding. masked_BV: slots that the student sees as [MASK]. The student's spans and angles cover
    S + V tokens (S without LaVer), the teacher's V. image_slots: (pack, first slot, one past the last) of
    every image, on the host.
    """

    tokens_BS: Tensor
    labels_BS: Tensor
    slot_BS: Tensor
    image_BV: Tensor
    masked_BV: Tensor
    student_spans_B2L: Tensor
    student_angles_LB1D: Tensor
    teacher_spans_B2V: Tensor | None
    teacher_angles_VB1D: Tensor | None
    image_slots: tuple[tuple[int, int, int], ...]

    @property
    def image_num_tokens(self) -> tuple[int, ...]:
        """Visual tokens of every image, in order."""
        return tuple(end - start for _, start, end in self.image_slots)


def visual_slots(image_BS: Tensor, visual_seq_length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where the visual tokens go: (slot_BS, source_BV, filled_BV).

    slot_BS: slot of the visual token at a position, -1 elsewhere; source_BV: position that a slot's token
    comes from (any valid index for an empty slot); filled_BV: slots in use. Raises ValueError, with the
    numbers, if a pack has more visual tokens than slots.
    """
    visual_BS = image_BS >= 0
    most = int(visual_BS.sum(1).max())
    if most > visual_seq_length:
        raise ValueError(f"a pack holds {most} visual tokens, more than --visual-seq-length {visual_seq_length}")
    slot_BS = torch.where(visual_BS, visual_BS.cumsum(1) - 1, -1)
    source_BV = (~visual_BS).int().argsort(dim=1, stable=True)[:, :visual_seq_length]
    filled_BV = torch.arange(visual_seq_length, device=image_BS.device) < visual_BS.sum(1, keepdim=True)
    return slot_BS, source_BV, filled_BV


def images_of(image_BV: Tensor) -> tuple[tuple[int, int, int], ...]:
    """(pack, first slot, one past the last slot) of every image, in order."""
    found = []
    for pack, images_V in enumerate(image_BV.tolist()):
        start = 0
        for slot in range(1, len(images_V) + 1):
            if slot == len(images_V) or images_V[slot] != images_V[start]:
                if images_V[start] >= 0:
                    found.append((pack, start, slot))
                start = slot
    return tuple(found)


def span_areas(packs: PackBatch, settings: StreamSettings) -> tuple[int, int]:
    """(query, key) pairs that are attended to, padding excluded: in the language stream, and within images.
    The second is what the reconstruction stream costs, and, with LaVer or without, an encoder that attends
    over whole images."""
    language_B2S = language_spans(packs.document_BS, packs.image_BS, settings.attention)
    images_B2S = reconstruction_spans(packs.image_BS)
    return span_area(language_B2S, packs.document_BS >= 0), span_area(images_B2S, packs.image_BS >= 0)


def build_micro_batch(
    packs: PackBatch, masked_BS: Tensor, settings: StreamSettings, device: torch.device
) -> MicroBatch:
    """Derives the streams of one micro-batch from its packs (metadata only, no pixels) on the CPU and moves
    them to the device. masked_BS: visual tokens to hide from the student's reconstruction stream."""
    slot_BS, source_BV, filled_BV = visual_slots(packs.image_BS, settings.visual_seq_length)

    def in_slots(values_BS: Tensor, padding: int) -> Tensor:
        return torch.where(filled_BV, values_BS.gather(1, source_BV), padding)

    image_BV = in_slots(packs.image_BS, -1)
    row_BV, col_BV = in_slots(packs.row_BS, 0), in_slots(packs.col_BS, 0)

    def angles(position_3BL: Tensor) -> Tensor:
        return rotary_angles(position_3BL, settings.head_dim, settings.rope_theta, settings.positions)

    student_spans = language_spans(packs.document_BS, packs.image_BS, settings.attention)
    student_angles = angles(
        language_positions(packs.document_BS, packs.image_BS, packs.row_BS, packs.col_BS, settings.positions)
    )
    teacher_spans = teacher_angles = None
    if settings.laver:
        teacher_spans = reconstruction_spans(image_BV)
        teacher_angles = angles(reconstruction_positions(image_BV, row_BV, col_BV, settings.positions))
        student_spans = concatenate_spans(student_spans, teacher_spans)
        student_angles = torch.cat([student_angles, teacher_angles])
        teacher_spans, teacher_angles = teacher_spans.to(device), teacher_angles.to(device)
    return MicroBatch(
        tokens_BS=packs.tokens_BS.to(device),
        labels_BS=packs.labels_BS.to(device),
        slot_BS=slot_BS.to(device),
        image_BV=image_BV.to(device),
        masked_BV=(in_slots(masked_BS.long(), 0) > 0).to(device),
        student_spans_B2L=student_spans.to(device),
        student_angles_LB1D=student_angles.to(device),
        teacher_spans_B2V=teacher_spans,
        teacher_angles_VB1D=teacher_angles,
        image_slots=images_of(image_BV),
    )
