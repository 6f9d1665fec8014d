"""What both kits' readers return: results of one directory, whatever kit wrote them."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from laver_megatron.scores.benchmarks import OTHER, Benchmark, Source


@dataclass(frozen=True)
class Sample:
    """One answered question.

    Attributes:
        score: 0 to 1.
        question: what tells that the same key is the same question in another directory: its hash, or its answer.
    """

    score: float
    question: str


Samples = Mapping[str, Sample]


@dataclass(frozen=True)
class Result:
    """The score of one benchmark in one directory.

    Attributes:
        benchmark: of the table; for one that it does not know, of the type "other" under the kit's name.
        value: in the table's unit; of an unknown one in the kit's.
        source: the metric; `scale` is 1 for an unknown one.
        when: of the run; sorts by time within a kit.
        read_samples: reads the score of each question. None where the kit wrote none.
    """

    benchmark: Benchmark
    kit: str
    value: float
    source: Source
    path: Path
    when: str
    read_samples: Callable[[], Samples] | None

    @property
    def row(self) -> tuple[str, str]:
        """What is compared with what: the same benchmark by the same kit, whose prompts and scoring differ."""
        return self.benchmark.name, self.kit


@dataclass(frozen=True)
class Found:
    """What a reader found in a directory.

    Attributes:
        models: the names under which the kit filed them.
        notes: what was left out, and why.
    """

    results: tuple[Result, ...]
    models: frozenset[str]
    notes: tuple[str, ...]


def unknown_benchmark(name: str) -> Benchmark:
    return Benchmark(name, OTHER, in_paper=False, lmms_eval=None, vlmevalkit=None)


def newest(results: Iterable[Result]) -> tuple[dict[tuple[str, str], Result], list[str]]:
    """One result of each row, the newest, and a note for each row that had several."""
    chosen: dict[tuple[str, str], Result] = {}
    number: dict[tuple[str, str], int] = {}
    for result in sorted(results, key=lambda it: (it.when, str(it.path))):
        chosen[result.row] = result
        number[result.row] = number.get(result.row, 0) + 1
    notes = [
        f"{result.benchmark.name} ({result.kit}) has {number[row]} results; the newest is used, {result.path}"
        for row, result in chosen.items()
        if number[row] > 1
    ]
    return chosen, notes
