"""Whether the shards of all ranks tile every tensor exactly once, judged by the offsets that a checkpoint goes by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from math import prod
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories, is_main_replica
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors

Size = tuple[int, ...]


@dataclass(frozen=True)
class Tile:
    """One rank's piece of a tensor. is_main: whether a checkpoint takes it from this rank; other ranks hold copies."""

    key: str
    whole: Size
    start: Size
    size: Size
    is_main: bool


def tiles_of(sharded_state: dict[str, Any]) -> list[Tile]:
    """The pieces that one rank's sharded state dict describes. Changes the dict: factories become tensors."""
    apply_factories(sharded_state)
    tensors, _ = extract_sharded_tensors(sharded_state)
    return [_tile(tensor) for tensor in nested_values(tensors)]


def _tile(tensor: ShardedTensor) -> Tile:
    assert not tensor.prepend_axis_num and tensor.flattened_range is None, tensor.key
    return Tile(
        tensor.key,
        tuple(tensor.global_shape),
        tuple(tensor.global_offset),
        tuple(tensor.local_shape),
        is_main_replica(tensor.replica_id),
    )


def tiling_problems(tiles: Iterable[Tile], expected: Mapping[str, Size]) -> Iterator[str]:
    """Everything wrong with the pieces of all ranks: tensors that are unexpected, missing, or of another size; values
    that no rank holds or several do; copies of pieces that no rank has."""
    by_key: dict[str, list[Tile]] = {}
    for tile in tiles:
        by_key.setdefault(tile.key, []).append(tile)
    yield from (f"{key}: no rank holds any of it" for key in expected if key not in by_key)
    for key, pieces in by_key.items():
        if key not in expected:
            yield f"{key}: a tensor that the model does not have"
            continue
        sizes = {piece.whole for piece in pieces}
        if sizes != {expected[key]}:
            yield f"{key}: the ranks take it to be of size {sorted(sizes)}, but it is {expected[key]}"
            continue
        yield from _faults_of_one(key, expected[key], pieces)


def _faults_of_one(key: str, whole: Size, pieces: list[Tile]) -> Iterator[str]:
    main = [piece for piece in pieces if piece.is_main]
    boxes = {(piece.start, piece.size) for piece in main}
    for piece in pieces:
        if any(start + size > total for start, size, total in zip(piece.start, piece.size, whole, strict=True)):
            yield f"{key}: the piece {piece.size} at {piece.start} reaches out of {whole}"
        if not piece.is_main and (piece.start, piece.size) not in boxes:
            yield f"{key}: the piece {piece.size} at {piece.start} is a copy of none"
    for one, other in combinations(main, 2):
        sides = zip(one.start, one.size, other.start, other.size, strict=True)
        if all(max(a, b) < min(a + m, b + n) for a, m, b, n in sides):
            yield f"{key}: the pieces {one.size} at {one.start} and {other.size} at {other.start} overlap"
    held = sum(prod(piece.size) for piece in main)
    if held != prod(whole):
        yield f"{key}: the ranks hold {held} values of {prod(whole)}"


def division_problems(name: str, num_values: int, parts: Iterable[tuple[int, int]]) -> Iterator[str]:
    """What is wrong with [start, end) parts of one tensor, which data-parallel ranks hold in any order."""
    reached = 0
    for start, end in sorted(part for part in parts if part[1] > part[0]):
        if start != reached:
            yield f"{name}: data-parallel ranks {'share' if start < reached else 'leave out'} values near {start}"
        reached = max(reached, end)
    if reached != num_values:
        yield f"{name}: data-parallel ranks hold {reached} of {num_values} values"
