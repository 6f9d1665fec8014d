"""What became of the samples: counted by each worker, added up, and reported at the end."""

from collections import Counter
from dataclasses import dataclass, field, fields
from typing import Any

from laver_megatron.data.index.faults import Fault, SampleFault, fault_table
from laver_megatron.data.read.record_keys import add_keys, keys_line

NUM_EXAMPLES = 5  # of each fault that a worker keeps for the log


@dataclass
class MakeReport:
    """Counts of a part of the work or of all of it.

    Attributes:
        num_placed: samples whose pictures were put before the first question, as no text said where they belong.
        num_converted: pictures that became PNG.
        num_unwanted, num_dropped_turns: samples and turns that the user's own filters left out.
        num_untrained: answers that are excluded from training.
        num_words, num_tokens: of the text without `<image>`; words if no tokenizer was given.
        other_keys: unused keys of records.
        ignored: files that were never opened, by extension.
        examples: (key, message) of the first faults of each kind.
    """

    num_samples: int = 0
    num_images: int = 0
    num_image_bytes: int = 0
    num_text_bytes: int = 0
    num_words: int = 0
    num_tokens: int = 0
    num_placed: int = 0
    num_converted: int = 0
    num_unwanted: int = 0
    num_dropped_turns: int = 0
    num_untrained: int = 0
    other_keys: Counter[str] = field(default_factory=Counter)
    ignored: Counter[str] = field(default_factory=Counter)
    faults: Counter[Fault] = field(default_factory=Counter)
    examples: dict[Fault, list[tuple[str, str]]] = field(default_factory=dict)

    @property
    def num_seen(self) -> int:
        """Samples that the user wants, usable or not."""
        return self.num_samples + self.faults.total()

    def add_fault(self, fault: SampleFault, key: str) -> None:
        """Counts a fault, and keeps its message if it is among the first."""
        self.faults[fault.fault] += 1
        kept = self.examples.setdefault(fault.fault, [])
        if len(kept) < NUM_EXAMPLES:
            kept.append((key, str(fault)))

    def add(self, other: "MakeReport") -> None:
        """Adds another part's counts; examples are dropped."""
        for name in (entry.name for entry in fields(self) if entry.name.startswith("num_")):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.faults.update(other.faults)
        add_keys(self.other_keys, other.other_keys)
        add_keys(self.ignored, other.ignored)

    def to_json(self) -> dict[str, Any]:
        """For a file, without the examples."""
        document = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "examples"}
        return {**document, **{name: dict(getattr(self, name)) for name in ("faults", "other_keys", "ignored")}}

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> "MakeReport":
        """Back from `to_json`."""
        faults = Counter({Fault(name): count for name, count in document["faults"].items()})
        others = {name: Counter(document[name]) for name in ("other_keys", "ignored")}
        return cls(**{**document, "faults": faults, **others})

    def summary(self, has_tokenizer: bool) -> str:
        """A few lines for the user."""
        size = f"{self.num_image_bytes / 1e6:,.1f} MB of pictures, {self.num_text_bytes / 1e6:,.1f} MB of text"
        text = f"{self.num_tokens:,} text tokens" if has_tokenizer else f"{self.num_words:,} words (no --tokenizer)"
        lines = [f"{self.num_samples:,} samples, {self.num_images:,} images, {text}; {size}"]
        if self.num_placed:
            lines.append(f"{self.num_placed:,} samples had pictures but no <image>: put before the first question")
        if self.num_converted:
            lines.append(f"{self.num_converted:,} pictures of other formats became PNG")
        if self.num_unwanted or self.num_dropped_turns:
            lines.append(
                f"left out by --min-...: {self.num_dropped_turns:,} turns, and with them {self.num_unwanted:,} samples"
            )
        if self.num_untrained:
            lines.append(f"answers marked as not to be trained, which carry no labels: {self.num_untrained:,}")
        if self.other_keys:
            lines.append(f"unused keys of records: {keys_line(self.other_keys)}")
        if self.ignored:
            lines.append(f"other files, never opened: {keys_line(self.ignored)}")
        share = self.faults.total() / max(self.num_seen, 1)
        lines.append(f"skipped: {self.faults.total():,} ({share:.2%})" if self.faults else "skipped: none")
        return "\n".join(
            lines + ([fault_table({str(fault): count for fault, count in self.faults.items()})] if self.faults else [])
        )
