"""What a conversion prints: the mapping, sizes and memory beforehand, a progress bar, a line at the end."""

import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from laver_megatron.hf.weights import Weight
from laver_megatron.runtime.ranks import rank

# Threads hold a block each, and torch.save and the reading of joined rows copy it once more.
_COPIES_OF_A_BLOCK = 3
_INTERPRETER_BYTES = 100 << 20


@dataclass
class Conversion:
    """A conversion to be described beforehand and afterwards.

    Attributes:
        source, target: from where to where.
        tensors: every Megatron tensor with its type and bytes.
    """

    source: Path
    target: Path
    tensors: Sequence[tuple[Weight, str, int]]
    started: float = field(default_factory=time.perf_counter)

    @property
    def num_bytes(self) -> int:
        return sum(num_bytes for _, _, num_bytes in self.tensors)

    def print_plan(self, num_threads: int, block_bytes: int) -> None:
        """Prints the mapping, layers of one form in one line, and what the conversion will take."""
        if rank() != 0:
            return
        lines: dict[tuple, list[int]] = {}
        for weight, dtype, num_bytes in self.tensors:
            names = " + ".join(_without_number(name) for name in weight.hugging_face)
            form = (_without_number(weight.megatron), names, weight.size, dtype.removeprefix("torch."))
            lines.setdefault(form, []).append(num_bytes)
        print(f"{self.source} -> {self.target}")
        for (megatron, names, size, dtype), sizes in lines.items():
            print(f"  {len(sizes):4d} x {megatron}  {list(size)} {dtype}  {sum(sizes) / 1e6:,.1f} MB  <->  {names}")
        peak = num_threads * _COPIES_OF_A_BLOCK * min(block_bytes, self.num_bytes) + _INTERPRETER_BYTES
        print(
            f"{len(self.tensors)} tensors, {self.num_bytes / 1e9:.3f} GB; memory beside the interpreter's own: at most "
            f"{peak / 1e6:.0f} MB ({num_threads} threads, blocks of {block_bytes >> 20} MiB)"
        )

    def print_summary(self) -> None:
        seconds = time.perf_counter() - self.started
        if rank() == 0:
            print(
                f"{self.target}: {len(self.tensors)} tensors, {self.num_bytes / 1e9:.3f} GB in {seconds:.1f} s "
                f"({self.num_bytes / 1e6 / max(seconds, 1e-9):,.0f} MB/s)",
                file=sys.stderr,
            )


def _without_number(name: str) -> str:
    return re.sub(r"layers\.\d+\.", "layers.N.", name)


class ByteBar(tqdm):
    """A bar of bytes and rate on rank 0, of its own share of the work. Several threads may add."""

    def __init__(self, what: str, num_bytes: int) -> None:
        super().__init__(total=num_bytes, desc=what, unit="B", unit_scale=True, disable=rank() != 0, mininterval=0.5)

    def add(self, num_bytes: int) -> None:
        with self.get_lock():
            self.update(num_bytes)


def warn(message: str, strict: bool) -> None:
    """A warning on the terminal; with `strict` a ValueError."""
    if strict:
        raise ValueError(f"{message}; refused because of --strict")
    tqdm.write(f"warning: {message}", file=sys.stderr)
