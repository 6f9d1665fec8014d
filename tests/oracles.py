"""Masks and positions by their definition: slow loops over tokens, for tests to compare with.

Letters: B packs, L tokens of a sequence.
"""

import torch
from torch import Tensor

from laver_megatron.data.batch.packing import PackBatch


def language_mask(packs: PackBatch, attention: str) -> Tensor:
    """bool `[B, L, L]`, one (query, key) pair at a time: a token sees its document up to itself and, with
    mixed attention, a visual token all of its own image; padding sees itself."""
    document, image = packs.document_BS.tolist(), packs.image_BS.tolist()
    num_packs, length = packs.document_BS.shape
    mask_BLL = torch.zeros(num_packs, length, length, dtype=torch.bool)
    for b in range(num_packs):
        for query in range(length):
            for key in range(length):
                if document[b][query] == -1:
                    mask_BLL[b, query, key] = query == key
                elif document[b][query] == document[b][key]:
                    same_image = image[b][query] != -1 and image[b][query] == image[b][key]
                    mask_BLL[b, query, key] = key <= query or (attention == "mixed" and same_image)
    return mask_BLL


def language_positions(packs: PackBatch, positions: str) -> list[list[tuple[int, int, int] | None]]:
    """For each pack and token its (t, row, column); None at padding, where any value would do."""
    return [_positions_of_pack(packs, b, positions) for b in range(packs.document_BS.shape[0])]


def _positions_of_pack(packs: PackBatch, b: int, positions: str) -> list[tuple[int, int, int] | None]:
    document, image, row, col = (
        getattr(packs, name)[b].tolist() for name in ("document_BS", "image_BS", "row_BS", "col_BS")
    )
    indices: list[tuple[int, int, int] | None] = []
    counter = 0
    for i in range(len(document)):
        if i > 0 and document[i] != document[i - 1]:
            counter = 0
        if document[i] == -1:
            indices.append(None)
        elif positions == "1d" or image[i] == -1:
            indices.append((counter, counter, counter))
            counter += 1
        else:
            indices.append((counter, counter + row[i], counter + col[i]))
            if i + 1 == len(image) or image[i + 1] != image[i]:
                tokens = [j for j in range(len(image)) if image[j] == image[i]]
                counter += max(max(row[j] for j in tokens), max(col[j] for j in tokens)) + 1
    return indices


def image_positions(rows: list[int], cols: list[int], positions: str) -> list[tuple[int, int, int]]:
    """The same for the tokens of one image in the reconstruction stream."""
    if positions == "1d":
        return [(i, i, i) for i in range(len(rows))]
    return [(0, row, col) for row, col in zip(rows, cols, strict=True)]
