"""What can be wrong with a sample, by name; counted and logged, up to a limit, without flooding the log.

A bad sample never ends a run by itself: it is left out, or stays padding, and is counted here. Only when the share of
bad samples exceeds a limit does the run end, with a table of what was found.

Letters: I samples.
"""

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

REMEDY = "look at these samples, or allow more with --max-bad-fraction"
_NAME_THE_FOLDER = "say in which folder their pictures lie with --images (and start anew with --overwrite)"


class Fault(StrEnum):
    """Why a sample cannot be used. The names stand in indexes, logs and summaries."""

    no_json = "no_json"
    invalid_json = "invalid_json"
    no_turns = "no_turns"
    unknown_role = "unknown_role"
    text_not_string = "text_not_string"
    image_count = "image_count"
    empty_answer = "empty_answer"
    no_answer = "no_answer"
    video_or_audio = "video_or_audio"
    tool_use = "tool_use"
    loss_weight = "loss_weight"
    no_image_folder = "no_image_folder"
    unreadable_image = "unreadable_image"
    image_too_large = "image_too_large"
    image_shape = "image_shape"
    damaged_shard = "damaged_shard"
    scattered = "scattered"
    duplicate_key = "duplicate_key"
    unsafe_key = "unsafe_key"

    @property
    def description(self) -> str:
        """One line for a person."""
        return _DESCRIPTIONS[self]

    @property
    def code(self) -> int:
        """Number in columns of faults, where 0 is a usable sample; never written to a file."""
        return _CODES[self]


_DESCRIPTIONS = {
    Fault.no_json: "files without a KEY.json of their key",
    Fault.invalid_json: "the .json cannot be parsed",
    Fault.no_turns: "no list of turns, bare or under `conversations` or `messages`",
    Fault.unknown_role: "a turn is neither human/user, gpt/assistant nor system",
    Fault.text_not_string: "the text of a turn is not a string",
    Fault.image_count: "not as many <image> in the questions as images",
    Fault.empty_answer: "an answer without words",
    Fault.no_answer: "no answer to learn from",
    Fault.video_or_audio: "video or audio, which this trainer cannot learn from",
    Fault.tool_use: "tool calls, which this trainer cannot learn from",
    Fault.loss_weight: "a turn whose loss, weight or train is neither 0 nor 1",
    Fault.no_image_folder: "names a picture, but no --images says in which folder",
    Fault.unreadable_image: "an image that cannot be read",
    Fault.image_too_large: "an image with more pixels than allowed",
    Fault.image_shape: "an image far longer than wide, or the other way round",
    Fault.damaged_shard: "lost in a truncated, garbled or changed tar",
    Fault.scattered: "files of one sample that do not lie together in the tar; `tar --sort=name` puts them together",
    Fault.duplicate_key: "a key, or a file of it, comes twice in a tar",
    Fault.unsafe_key: "a key that is absolute, climbs with .. or holds odd characters",
}
FAULTS = tuple(Fault)
FAULT_NAMES = ("", *FAULTS)  # by code
_CODES = {fault: code for code, fault in enumerate(FAULTS, start=1)}


class SampleFault(ValueError):
    """This one sample cannot be used. fault: why."""

    def __init__(self, fault: Fault, message: str) -> None:
        super().__init__(message)
        self.fault = fault

    def __reduce__(self) -> tuple[type["SampleFault"], tuple[Fault, str]]:
        return type(self), (self.fault, str(self))


class FaultLog:
    """Counts faults and logs them with shard and key: the first few of each, then every power of ten.

    counts: how often each fault was added.
    """

    def __init__(self, logger: logging.Logger, first: int = 5) -> None:
        self.counts: Counter[Fault] = Counter()
        self._logger, self._first = logger, first

    def add(self, fault: Fault, shard: str, key: str, detail: str = "", count: int = 1) -> None:
        """Counts a fault and logs it if it is among the first.

        Args:
            key: of the sample; "" if unknown.
            detail: what exactly is wrong; by default the fault's description.
        """
        before, self.counts[fault] = self.counts[fault], self.counts[fault] + count
        now = self.counts[fault]
        if fault is Fault.no_image_folder and before:
            return  # one line says it of all
        if before < self._first or len(str(now)) > len(str(before)):
            last = "; more of these are counted and rarely logged" if now == self._first else ""
            self._logger.warning(
                "%s: %s cannot be used (%s, %d so far): %s%s",
                shard,
                repr(key) if key else "a part of it",
                fault,
                now,
                detail or fault.description,
                last,
            )

    def add_rows(
        self, rows_I: NDArray[np.integer], code_I: NDArray[np.integer], name: Callable[[int], tuple[str, str]]
    ) -> None:
        """Adds the faults of many rows as if one after the other.

        Args:
            rows_I, code_I: ascending rows, and the `Fault.code` of each.
            name: (shard, key) of a row; asked for those that are logged.
        """
        logged: list[tuple[int, Fault, int]] = []  # row, its fault, how many there were before
        totals = Counter(self.counts)
        for code in np.unique(code_I).tolist():
            fault, of_fault_I = FAULTS[code - 1], rows_I[code_I == code]
            before, totals[fault] = totals[fault], totals[fault] + len(of_fault_I)
            powers = (10**digits - 1 for digits in range(1, len(str(totals[fault]))))
            for number in {*range(self._first), *powers}:  # of this fault, from 0
                if before <= number < totals[fault]:
                    logged.append((int(of_fault_I[number - before]), fault, number))
        for row, fault, number in sorted(logged):
            self.counts[fault] = number
            self.add(fault, *name(row))
        self.counts.update(totals - self.counts)

    def check(
        self,
        limit_fraction: float,
        num_samples: int,
        num_bad: int | None = None,
        found: Mapping[Fault, int] | None = None,
    ) -> None:
        """Ends the run when too many samples are bad.

        Args:
            num_samples: all samples of an epoch, bad ones included.
            num_bad, found: number and kinds of the faults, if other processes have found some too.

        Raises:
            ValueError: more than `limit_fraction` of the samples are bad; with the table of the faults.
        """
        num_bad = self.counts.total() if num_bad is None else num_bad
        if num_bad > limit_fraction * num_samples:
            share, limit = _format_distinct(num_bad / max(num_samples, 1), limit_fraction)
            counts = self.counts if found is None else found
            table = fault_table(counts) or "what is wrong was logged before this start"
            most = max(counts, key=lambda fault: counts[fault], default=None)
            remedy = _NAME_THE_FOLDER if most is Fault.no_image_folder else REMEDY
            raise ValueError(
                f"{num_bad} of {num_samples} samples cannot be used ({share}, allowed are {limit}); {remedy}\n{table}"
            )


def _format_distinct(one: float, other: float) -> tuple[str, str]:
    """Two shares in per cent, with as many digits as it takes to tell them apart."""
    for num_digits in range(1, 16):
        texts = f"{one:.{num_digits}%}", f"{other:.{num_digits}%}"
        if texts[0] != texts[1]:
            break
    return texts


def fault_table(counts: Mapping[Fault, int] | Mapping[str, int]) -> str:
    """Count, name and description of each fault, the most frequent first, one a line."""
    lines = []
    for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        description = Fault(name).description if name in _CODES else ""
        lines.append(f"{count:>12,}  {name:<17} {description}".rstrip())
    return "\n".join(lines)
