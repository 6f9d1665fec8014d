"""One or more samples in a sequence: the tensors that masks, positions and streams are all derived from.

Letters: B packs, S tokens of a pack, T tokens of one sample, 3 colours, height, width of an image's pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from laver_megatron.objective.language import IGNORE_LABEL


@dataclass(frozen=True)
class EncodedSample:
    """A sample as tokens; all tensors int64 `[T]`.

    Attributes:
        labels_T: the token to predict at each position (already shifted); IGNORE_LABEL where none is trained.
        image_number_T: number of the image within the sample at its visual tokens, -1 elsewhere.
        row_T, col_T: position of a visual token in its image's grid of patches, 0 elsewhere.
        grids: (rows, columns) of each image.
        num_dropped_turns: turns removed from the end because the sample was too long.
    """

    key: str
    tokens_T: Tensor
    labels_T: Tensor
    image_number_T: Tensor
    row_T: Tensor
    col_T: Tensor
    grids: tuple[tuple[int, int], ...]
    num_dropped_turns: int = 0

    def __len__(self) -> int:
        return len(self.tokens_T)

    @property
    def num_visual_tokens(self) -> int:
        return sum(rows * columns for rows, columns in self.grids)


@dataclass(frozen=True)
class PackedSample:
    """A sample in a pack.

    Attributes:
        sample_id: its global id.
        num_tokens: the slots that were planned for it.
        encoded: its tokens; None if it proved bad: its slots stay padding.
        pixels: of its images, `[3, height, width]`.
    """

    sample_id: int
    num_tokens: int
    encoded: EncodedSample | None
    pixels: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class PackBatch:
    """A micro-batch of packs; all tensors int64 `[B, S]` on the CPU. Documents and images count from 0 without gaps.

    Attributes:
        tokens_BS: token ids; the padding token's where there is no token.
        labels_BS: label for the logits at each position, already shifted; IGNORE_LABEL elsewhere.
        document_BS: document in the pack; -1 padding (at the end, and where a bad sample was planned).
        image_BS: image in the pack at visual tokens, -1 elsewhere.
        row_BS, col_BS: position of a visual token in its image's grid of patches, 0 elsewhere.
        sample_id_BS: global sample id, also where a bad sample was planned; -1 other padding.
        image_number_BS: image within its sample, -1 elsewhere.
        pixels: for each pack its images in order, `[3, height, width]`.
        keys: for each pack the keys of its documents.
        families: for each pack the kinds of question of its documents, empty for none.
    """

    tokens_BS: Tensor
    labels_BS: Tensor
    document_BS: Tensor
    image_BS: Tensor
    row_BS: Tensor
    col_BS: Tensor
    sample_id_BS: Tensor
    image_number_BS: Tensor
    pixels: list[list[Tensor]]
    keys: list[list[str]]
    families: list[list[str]] = field(default_factory=list)


PACK_TENSORS = tuple(field.name for field in fields(PackBatch) if field.name.endswith("_BS"))


def image_grids(packs: PackBatch) -> list[tuple[int, int]]:
    """(rows, columns) of the visual tokens of every image, in order: the position of its last token, plus one."""
    next_BS = torch.full_like(packs.image_BS, -1)
    next_BS[:, :-1] = packs.image_BS[:, 1:]
    last_BS = (packs.image_BS >= 0) & (packs.image_BS != next_BS)
    return list(zip((packs.row_BS[last_BS] + 1).tolist(), (packs.col_BS[last_BS] + 1).tolist(), strict=True))


_PADDING = {
    "labels_BS": IGNORE_LABEL,
    "document_BS": -1,
    "image_BS": -1,
    "row_BS": 0,
    "col_BS": 0,
    "sample_id_BS": -1,
    "image_number_BS": -1,
}


def build_packs(packs: Sequence[Sequence[PackedSample]], *, seq_length: int, padding_token: int) -> PackBatch:
    """Places each pack's samples one after the other from position 0, and pads to `seq_length`.

    Raises:
        ValueError: a sample is not as long as planned (the data has changed).
    """
    shape = (len(packs), seq_length)
    tensors = {name: torch.full(shape, value) for name, value in {"tokens_BS": padding_token, **_PADDING}.items()}
    batch = PackBatch(**tensors, pixels=[[] for _ in packs], keys=[[] for _ in packs], families=[])
    for row, pack in enumerate(packs):
        start = 0
        for sample in pack:
            slots = slice(start, start + sample.num_tokens)
            start += sample.num_tokens
            assert start <= seq_length, f"a pack of {start} tokens was planned for {seq_length}"
            batch.sample_id_BS[row, slots] = sample.sample_id
            if sample.encoded is not None:
                _place(batch, row, slots, sample, sample.encoded)
    return batch


def _place(batch: PackBatch, row: int, slots: slice, sample: PackedSample, encoded: EncodedSample) -> None:
    if len(encoded) != sample.num_tokens:
        raise ValueError(
            f"sample {encoded.key!r} has {len(encoded)} tokens but was planned with {sample.num_tokens}: the "
            "data has changed since the run started"
        )
    visual_T = encoded.image_number_T >= 0
    batch.tokens_BS[row, slots] = encoded.tokens_T
    batch.labels_BS[row, slots] = encoded.labels_T
    batch.document_BS[row, slots] = len(batch.keys[row])
    batch.image_BS[row, slots] = torch.where(visual_T, encoded.image_number_T + len(batch.pixels[row]), -1)
    batch.row_BS[row, slots] = encoded.row_T
    batch.col_BS[row, slots] = encoded.col_T
    batch.image_number_BS[row, slots] = encoded.image_number_T
    batch.keys[row].append(encoded.key)
    batch.pixels[row].extend(sample.pixels)


def check_features(encoded: EncodedSample, num_features: Sequence[int]) -> None:
    """Compares the image tokens of a sample with the features that its pictures will have, image by image.

    Raises:
        ValueError: they differ; never padded or cut.
    """
    num_images = len(encoded.grids)
    if len(num_features) != num_images:
        raise ValueError(f"sample {encoded.key!r} has tokens for {num_images} images but {len(num_features)} pictures")
    tokens_of = torch.bincount(encoded.image_number_T + 1, minlength=num_images + 1)[1:].tolist()
    for number, (num_tokens, expected) in enumerate(zip(tokens_of, num_features, strict=True)):
        if num_tokens != expected:
            raise ValueError(
                f"sample {encoded.key!r}, image {number}: {num_tokens} image tokens but {expected} features"
            )
