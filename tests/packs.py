"""Packs written down as lists, for tests: `pack([3, (2, 3), 2], padding(4), [(4, 4)])`.

A document is a list of segments: an int is that many text tokens, a pair is an image of (rows, columns).
"""

import torch

from laver_megatron.data.batch.packing import PackBatch
from laver_megatron.objective.language import IGNORE_LABEL


class padding(int):  # noqa: N801 - reads as a word in a list of documents
    """A number of padding positions between or after documents."""


def pack(*documents, seq_length=None, vocab_size=128, seed=0, image_size=None) -> PackBatch:
    """One pack, padded to seq_length: random tokens from a generator of its own, a label at every text token
    whose next token is text of the same document, and pixels if image_size is given."""
    generator = torch.Generator().manual_seed(seed)
    columns = {name: [] for name in ("document", "image", "row", "col", "sample_id", "image_number")}

    def add(**values):
        for name, value in values.items():
            columns[name].append(value)

    num_documents = num_images = 0
    for document in documents:
        if isinstance(document, padding):
            for _ in range(document):
                add(document=-1, image=-1, row=0, col=0, sample_id=-1, image_number=-1)
            continue
        number = 0
        place = {"document": num_documents, "sample_id": 100 * seed + num_documents}
        for segment in document:
            if isinstance(segment, int):
                for _ in range(segment):
                    add(**place, image=-1, row=0, col=0, image_number=-1)
                continue
            rows, cols = segment
            for index in range(rows * cols):
                add(**place, image=num_images, row=index // cols, col=index % cols, image_number=number)
            num_images, number = num_images + 1, number + 1
        num_documents += 1
    length = len(columns["document"])
    seq_length = length if seq_length is None else seq_length
    assert length <= seq_length, f"{length} tokens written down for {seq_length}"
    fill = {"row": 0, "col": 0}
    tensors = {
        f"{name}_BS": torch.tensor([values + [fill.get(name, -1)] * (seq_length - length)])
        for name, values in columns.items()
    }
    tokens_BS = torch.randint(0, vocab_size, (1, seq_length), generator=generator)
    text_BS = (tensors["image_BS"] < 0) & (tensors["document_BS"] >= 0)
    same_BS = tensors["document_BS"] == tensors["document_BS"].roll(-1, 1)
    labelled_BS = text_BS & text_BS.roll(-1, 1) & same_BS
    labelled_BS[:, -1] = False
    pixels = []
    if image_size is not None:
        pixels = [torch.randn(3, image_size, image_size, generator=generator) for _ in range(num_images)]
    return PackBatch(
        tokens_BS=tokens_BS,
        labels_BS=torch.where(labelled_BS, tokens_BS.roll(-1, 1), IGNORE_LABEL),
        pixels=[pixels],
        keys=[[f"document-{i}" for i in range(num_documents)]],
        **tensors,
    )


def stack(*packs: PackBatch) -> PackBatch:
    """Several packs of one length as one micro-batch."""
    fields = [name for name in PackBatch.__dataclass_fields__ if name.endswith("_BS")]
    return PackBatch(
        **{name: torch.cat([getattr(p, name) for p in packs]) for name in fields},
        pixels=[images for p in packs for images in p.pixels],
        keys=[keys for p in packs for keys in p.keys],
    )


# Every shape a pack can take, by name.
LAYOUTS = {
    "two images in a document": lambda: pack([3, (2, 3), 2, (3, 2), 4], seq_length=24),
    "adjacent images": lambda: pack([2, (2, 2), (2, 2), 1]),
    "packed documents": lambda: pack([2, (2, 2), 1], [4], [1, (1, 3), 2], seq_length=20),
    "padding at the end": lambda: pack([3, (2, 2)], seq_length=12),
    "hole of padding": lambda: pack([2, (2, 2), 1], padding(4), [1, (2, 1), 3], seq_length=20),
    "hole at the start": lambda: pack(padding(3), [2, (2, 2), 1], seq_length=12),
    "text only": lambda: pack([7], [3], seq_length=12),
    "image first": lambda: pack([(2, 2), 3], [(3, 1), 2], seq_length=14),
    "image last": lambda: pack([3, (2, 2)], [2, (1, 3)], seq_length=12),
    "images touch across documents": lambda: pack([1, (2, 2)], [(2, 2), 1]),
    "image is all": lambda: pack([(3, 4)]),
    "wide and tall images": lambda: pack([1, (1, 6), 2, (6, 1), 2, (2, 5), 3], seq_length=32),
    "all padding": lambda: pack(seq_length=6),
}
