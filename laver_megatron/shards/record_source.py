"""What every source has in common: references that are cheap to list, and samples that are loaded from them."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laver_megatron.data.index.faults import SampleFault
from laver_megatron.data.read.record_keys import first_present


@dataclass(frozen=True, slots=True)
class FoundSample:
    """A sample as its source has it.

    Attributes:
        name: for messages.
        sample_id, origin: kept in the shard's JSON, if there are any.
        conversation: parsed JSON in any of the accepted forms.
        pictures: the image files' bytes, in order.
        num_dropped_turns: turns that the user's own filters left out.
        unread_keys: unused keys beside the conversation.
        ignored: extensions of files that came with it and were never opened.
    """

    name: str
    sample_id: str | int | None
    conversation: object
    pictures: tuple[bytes, ...]
    origin: str | None = None
    num_dropped_turns: int = 0
    unread_keys: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class NoSample:
    """Files that are no sample and hold nothing to learn from. ignored: their extensions."""

    ignored: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Unwanted:
    """A sample that the user's own filters leave out: counted, but no fault. num_turns: those that it had."""

    num_turns: int


Found = FoundSample | SampleFault | Unwanted | NoSample


class RecordSource(ABC):
    """Files of one format. Holds paths and settings only, so that it can be sent to worker processes.

    A reference stands for one record, which is one sample, or several where a format packs them together.
    """

    paths: Sequence[Path]

    @abstractmethod
    def references(self) -> Iterator[Any]:
        """A reference for every record, in the order of the files. Reads as little as possible.

        Raises:
            ValueError: a file is not of this format.
        """

    @abstractmethod
    def load(self, references: Sequence[Any]) -> Iterator[list[Found]]:
        """For each reference in turn, the samples of its record, and what is wrong with those that are none."""

    def settings(self) -> dict[str, object]:
        """What determines, beside the files, what is loaded; part of the fingerprint of a run."""
        return {}

    @property
    def has_files_apart(self) -> bool:
        """Whether samples also consist of files that are not among `paths`."""
        return False

    def stamp(self, references: Sequence[Any]) -> str:
        """Changes whenever a file apart that these references name does; "" if there are none."""
        return ""


def identity(document: object, fallback: str | int | None = None) -> str | int | None:
    """The `id` of an object, if it is a text or a number."""
    value = document.get("id") if isinstance(document, dict) else None
    return value if isinstance(value, str | int) else fallback


def origin(document: object) -> str | None:
    """Where an object says that it comes from: `source` or `data_source`."""
    value = first_present(document, "source", "data_source") if isinstance(document, dict) else None
    return value if isinstance(value, str) else None
