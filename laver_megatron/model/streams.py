"""One micro-batch as the model sees it: `[language S | masked visual V | unmasked visual V]`.

Letters: B packs, S language tokens, V visual slots, L either, R rows with a label, T visual tokens, M masked ones, I
images of N visual tokens.

The visual stream is not stored anywhere: it is the visual tokens of the language stream in order, moved to
the front and padded. Spans and positions of all three parts follow from the packs' metadata.
"""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import pad

from laver_megatron.config.fields import Config
from laver_megatron.data.batch.broadcast import image_num_tokens
from laver_megatron.data.batch.packing import PackBatch
from laver_megatron.hf.shape import ModelShape
from laver_megatron.model.attention import prepare, resolve_kernel
from laver_megatron.model.positions import language_positions, reconstruction_positions, rotary_angles, rotary_table
from laver_megatron.model.spans import concatenate_spans, language_spans, reconstruction_spans, span_area
from laver_megatron.objective.language import IGNORE_LABEL
from laver_megatron.runtime.transfer import on_device

# Matrix products in FP8 take multiples of 16; fewer shapes also mean fewer kernels to choose.
ROWS_MULTIPLE = 64


@dataclass(frozen=True)
class StreamSettings:
    """What turns packs into streams; fixed for a run."""

    visual_seq_length: int
    attention: str
    positions: str
    head_dim: int
    rope_theta: float
    laver: bool
    kernel: str
    dtype: torch.dtype

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
            kernel=resolve_kernel(config, shape),
            dtype=torch.bfloat16 if config.training.bf16 else torch.float32,
        )

    def rotary_table(self, position_3BL: Tensor) -> Tensor:
        """Cosines and sines `[2, L, B, 1, F]` of these positions, on their device."""
        return rotary_table(rotary_angles(position_3BL, self.head_dim, self.rope_theta, self.positions), self.dtype)


@dataclass(frozen=True)
class MicroBatch:
    """Everything a pipeline stage needs to know of a micro-batch besides the hidden states, on the device. A "row" is a
    place in a stream `[length, B]` that is flattened; visual tokens are in the order of packs, then of images.

    Attributes:
        tokens_BS: token ids.
        label_rows_R: rows of the language stream whose logits are computed, int64; filled up to a multiple of
            ROWS_MULTIPLE with row 0.
        labels_R: their labels, IGNORE_LABEL in what is filled up.
        language_rows_T: row of each visual token in the language stream, int64.
        visual_rows_T: its row in the masked and in the unmasked visual stream, int64.
        masked_T: whether the student sees it as [MASK], bool.
        masked_M: the visual tokens that are masked, int64.
        student_spans_B2L: of S + V tokens (S without LaVer).
        student_positions_3BL: the same.
        teacher_spans_B2V, teacher_positions_3BV: of the unmasked visual stream; None without LaVer.
        image_num_tokens: visual tokens of every image, in order, on the host.
        images_by_size: for each number of tokens that images have, that number, and which visual tokens theirs are,
            int64 `[images, tokens]`.
    """

    tokens_BS: Tensor
    label_rows_R: Tensor
    labels_R: Tensor
    language_rows_T: Tensor
    visual_rows_T: Tensor
    masked_T: Tensor
    masked_M: Tensor
    student_spans_B2L: Tensor
    student_positions_3BL: Tensor
    teacher_spans_B2V: Tensor | None
    teacher_positions_3BV: Tensor | None
    image_num_tokens: tuple[int, ...]
    images_by_size: tuple[tuple[int, Tensor], ...]


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


def images_by_size(num_tokens: tuple[int, ...]) -> list[tuple[int, Tensor]]:
    """(tokens, which visual tokens theirs are, int64 `[images, tokens]`) for each number of tokens that images have."""
    ranges_of: dict[int, list[Tensor]] = {}
    for end, size in zip(accumulate(num_tokens), num_tokens, strict=True):
        ranges_of.setdefault(size, []).append(torch.arange(end - size, end))
    return [(size, torch.stack(ranges)) for size, ranges in sorted(ranges_of.items())]


def label_rows(labels_BS: Tensor, everywhere: bool) -> tuple[Tensor, Tensor]:
    """(label_rows_R, labels_R) of a MicroBatch. everywhere: of all rows, labelled or not."""
    labels_N = labels_BS.t().flatten()
    if everywhere:
        return torch.arange(len(labels_N)), labels_N
    rows_R = (labels_N != IGNORE_LABEL).nonzero().squeeze(1)
    filled_up = -len(rows_R) % ROWS_MULTIPLE
    return pad(rows_R, (0, filled_up)), pad(labels_N[rows_R], (0, filled_up), value=IGNORE_LABEL)


def span_areas(packs: PackBatch, settings: StreamSettings) -> tuple[int, int]:
    """(query, key) pairs that are attended to, padding excluded: in the language stream, and within images.
    The second is what the reconstruction stream costs, and, with LaVer or without, an encoder that attends
    over whole images."""
    language_B2S = language_spans(packs.document_BS, packs.image_BS, settings.attention)
    images_B2S = reconstruction_spans(packs.image_BS)
    return span_area(language_B2S, packs.document_BS >= 0), span_area(images_B2S, packs.image_BS >= 0)


def build_micro_batch(
    packs: PackBatch,
    masked_BS: Tensor,
    settings: StreamSettings,
    device: torch.device,
    *,
    all_logits: bool = False,
) -> MicroBatch:
    """Derives the streams of one micro-batch from its packs (metadata only, no pixels) on the CPU and moves them to the
    device, which does not wait for it.

    Args:
        masked_BS: visual tokens to hide from the student's reconstruction stream.
        all_logits: also the logits of tokens without a label, in the order `[S, B]`.
    """
    slot_BS, source_BV, filled_BV = visual_slots(packs.image_BS, settings.visual_seq_length)
    num_packs = len(packs.tokens_BS)

    def in_slots(values_BS: Tensor, padding: int) -> Tensor:
        return torch.where(filled_BV, values_BS.gather(1, source_BV), padding)

    def to_layers(spans_B2L: Tensor, *segments: int) -> Tensor:
        moved_B2L = on_device(spans_B2L, device)
        prepare(settings.kernel, spans_B2L, moved_B2L, segments, settings.dtype)
        return moved_B2L

    image_BV = in_slots(packs.image_BS, -1)
    spans = language_spans(packs.document_BS, packs.image_BS, settings.attention)
    positions = language_positions(packs.document_BS, packs.image_BS, packs.row_BS, packs.col_BS, settings.positions)
    segments = [packs.tokens_BS.shape[1]]
    of_teacher: dict[str, Tensor | None] = {"teacher_spans_B2V": None, "teacher_positions_3BV": None}
    if settings.laver:
        teacher_spans = reconstruction_spans(image_BV)
        teacher_positions = reconstruction_positions(
            image_BV, in_slots(packs.row_BS, 0), in_slots(packs.col_BS, 0), settings.positions
        )
        segments.append(settings.visual_seq_length)
        spans = concatenate_spans(spans, teacher_spans)
        positions = torch.cat([positions, teacher_positions], dim=2)
        of_teacher = {
            "teacher_spans_B2V": to_layers(teacher_spans, settings.visual_seq_length),
            "teacher_positions_3BV": on_device(teacher_positions, device),
        }
    pack_T, place_T = (packs.image_BS >= 0).nonzero(as_tuple=True)
    masked_T = masked_BS[pack_T, place_T]
    label_rows_R, labels_R = label_rows(packs.labels_BS, all_logits)
    num_tokens = tuple(image_num_tokens(packs))
    return MicroBatch(
        tokens_BS=on_device(packs.tokens_BS, device),
        label_rows_R=on_device(label_rows_R, device),
        labels_R=on_device(labels_R, device),
        language_rows_T=on_device(place_T * num_packs + pack_T, device),
        visual_rows_T=on_device(slot_BS[pack_T, place_T] * num_packs + pack_T, device),
        masked_T=on_device(masked_T, device),
        masked_M=on_device(masked_T.nonzero().squeeze(1), device),
        student_spans_B2L=to_layers(spans, *segments),
        student_positions_3BL=on_device(positions, device),
        **of_teacher,
        image_num_tokens=num_tokens,
        images_by_size=tuple((size, on_device(tokens_IN, device)) for size, tokens_IN in images_by_size(num_tokens)),
    )
