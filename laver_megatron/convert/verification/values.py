"""Whether all tensors of both directories have the same values, read from the files a block of rows at a time.

Outputs do not show everything: a word that no prompt has, a layer of the encoder behind the one that is used.
"""

import torch

from laver_megatron.convert.torch_dist import TorchDistReader
from laver_megatron.convert.verification.forward import stored_key
from laver_megatron.convert.verification.pair import Pair, some
from laver_megatron.hf.parts import parts_of_megatron
from laver_megatron.hf.rows import row_blocks
from laver_megatron.hf.safetensors_reader import SafetensorsReader
from laver_megatron.hf.weights import Weight, weight_table

_BLOCK_BYTES = 32 << 20


def value_problems(pair: Pair) -> tuple[str, ...]:
    """Tensors whose values differ, or are not numbers. A missing one, or one of another shape, is left to
    `key_problems`. Values are compared in the Hugging Face directory's type, which may be the narrower one."""
    megatron = TorchDistReader(pair.megatron.checkpoint)
    differing = []
    with SafetensorsReader(pair.hugging_face) as hugging_face:
        for weight in weight_table(parts_of_megatron(pair.megatron.checkpoint, {})).values():
            key = stored_key(weight.megatron, pair.megatron.weights)
            if megatron.sizes.get(key) != weight.size:
                continue
            for part, (name, size) in enumerate(weight.hugging_face_sizes()):
                is_there = name in hugging_face.names() and hugging_face.size(name) == size
                if is_there and not _is_same(megatron, key, hugging_face, weight, part):
                    differing.append(name)
    return (some("tensors of other values", differing),) if differing else ()


def _is_same(megatron: TorchDistReader, key: str, hugging_face: SafetensorsReader, weight: Weight, part: int) -> bool:
    name, (num_rows, *rest) = weight.hugging_face[part], weight.sizes[part]
    row_bytes = torch.Size(rest).numel() * hugging_face.dtype(name).itemsize
    for start, stop in row_blocks(num_rows, row_bytes, _BLOCK_BYTES):
        ours = megatron.read_part_rows(key, weight, part, start, stop)
        theirs = hugging_face.read(name, start, stop)
        if not torch.equal(ours.to(theirs.dtype), theirs):
            return False
    return True
