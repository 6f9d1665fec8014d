"""What ranks tell each other beside their training: heartbeats and verdicts, through the store of the process group.

The store is a TCP server that torchrun (or rank 0) keeps. Every rank has a connection of its own for this: a request on
the group's own may wait for a key that another rank never writes, with the connection locked meanwhile. No file system
takes part, and no collective.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store


@dataclass(frozen=True)
class Beat:
    """A heartbeat.

    Attributes:
        count: rises with every beat.
        number: see `phases.Moment`.
        place, waits: see `stacks.Place`.
        busy, looks: how often the main thread was looked at while it trained, and how often it did not wait then.
        stage: of the pipeline; ranks of one stage have the same work.
        ended: the rank has left the loop in order and is no longer watched.
    """

    host: str
    pid: int
    count: int
    phase: str
    iteration: int
    number: int
    place: str
    waits: bool
    busy: int = 0
    looks: int = 0
    stage: int = 0
    ended: bool = False


class Link:
    """One rank's connection. Its methods raise RuntimeError when the store is gone, and wait where it is stopped."""

    def __init__(self) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's store outlives its ranks
        self._store = dist.PrefixStore(f"laver_watch/{attempt}", _get_default_store().clone())  # type: ignore[attr-defined]
        self._all_have_begun = False

    def publish(self, beat: Beat) -> None:
        """Tells the others."""
        self._store.set(self._beat_key(self.rank), json.dumps(asdict(beat)))

    def has_begun(self, rank: int) -> bool:
        """Whether a rank has given its first heartbeat of this attempt."""
        return self._store.check([self._beat_key(rank)])

    def beats(self) -> dict[int, Beat]:
        """The last beat of every rank that has begun."""
        ranks: Iterable[int] = range(self.world_size)
        if not self._all_have_begun:
            self._all_have_begun = self._store.check([self._beat_key(rank) for rank in ranks])
        if not self._all_have_begun:  # asking for a key that is not there would wait for it
            ranks = [rank for rank in ranks if self.has_begun(rank)]
        found = self._store.multi_get([self._beat_key(rank) for rank in ranks]) if ranks else []
        return {rank: Beat(**json.loads(text)) for rank, text in zip(ranks, found, strict=True)}

    def accuse(self, verdict: str) -> tuple[str, bool]:
        """Gives a verdict unless there is one; returns the one that stands, and whether it is this rank's."""
        mine = json.dumps([self.rank, verdict])
        standing = self._store.compare_set("verdict", "", mine).decode()
        return json.loads(standing)[1], standing == mine

    def verdict(self) -> str | None:
        """The verdict, if one was given."""
        return json.loads(self._store.get("verdict"))[1] if self._store.check(["verdict"]) else None

    def answer(self, text: str) -> None:
        """Tells who announces the verdict that this rank has written its stacks, and where."""
        self._store.set(f"answer/{self.rank}", text)

    def answer_of(self, rank: int) -> str | None:
        """What a rank has answered, if it has."""
        key = f"answer/{rank}"
        return self._store.get(key).decode() if self._store.check([key]) else None

    def release(self) -> None:
        """The verdict is announced: all may end."""
        self._store.set("released", "1")

    def is_released(self) -> bool:
        """Whether all may end."""
        return self._store.check(["released"])

    def _beat_key(self, rank: int) -> str:
        return f"beat/{rank}"
