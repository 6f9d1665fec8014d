"""Result folders side by side: scores, gains over the baseline, paired tests, averages."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from laver_megatron.scores.benchmarks import BENCHMARKS, OTHER, TYPES, VLMEVALKIT, Benchmark
from laver_megatron.scores.lmms_eval import read_lmms_eval
from laver_megatron.scores.paired import DifferentSamples, PairedTest, compare
from laver_megatron.scores.results import Found, Result, newest
from laver_megatron.scores.vlmevalkit import read_vlmevalkit

_ORDER = {benchmark.name: place for place, benchmark in enumerate(BENCHMARKS)}
# Of percent: beyond it, the mean of the samples is not the kit's score rounded.
_ROUNDING = 0.051


@dataclass(frozen=True)
class Cell:
    """One directory's score of one row.

    Attributes:
        gain: over the baseline, in the row's unit; None for the baseline, and where they cannot be compared.
    """

    value: float
    gain: float | None = None
    test: PairedTest | None = None


@dataclass(frozen=True)
class Row:
    benchmark: Benchmark
    kit: str
    cells: Mapping[str, Cell]


@dataclass(frozen=True)
class Average:
    """A mean over benchmarks that every directory has, each divided by its divisor.

    Attributes:
        values: by directory.
    """

    name: str
    benchmarks: tuple[str, ...]
    values: Mapping[str, float]


@dataclass(frozen=True)
class Table:
    directories: tuple[str, ...]
    baseline: str
    rows: tuple[Row, ...]
    averages: tuple[Average, ...]
    notes: tuple[str, ...]


def read_directory(directory: Path) -> tuple[dict[tuple[str, str], Result], list[str]]:
    """The results of one model by row, and notes.

    Raises:
        OSError: it is not a directory.
        ValueError: it holds no results, or those of several models.
    """
    entries = sorted(path.name for path in directory.iterdir())
    if not entries:
        raise ValueError(f"{directory} is empty; name the folder that lmms-eval's --output_path or VLMEvalKit wrote")
    by_kit = [read_lmms_eval(directory), read_vlmevalkit(directory)]
    for found in by_kit:
        if len(found.models) > 1:
            names = ", ".join(sorted(found.models))
            raise ValueError(
                f"{directory} holds results of {len(found.models)} models ({names}); name the folder of one"
            )
    notes = [note for found in by_kit for note in found.notes]
    results = [result for found in by_kit for result in found.results]
    if not results:
        raise ValueError(_nothing(directory, entries, by_kit, notes))
    chosen, duplicates = newest(results)
    return chosen, [f"{directory}: {note}" for note in [*notes, *duplicates]]


def _nothing(directory: Path, entries: Sequence[str], by_kit: Iterable[Found], notes: Sequence[str]) -> str:
    if any(found.models for found in by_kit):
        return f"{directory} holds no score: {'; '.join(notes) or 'its files of results are empty'}"
    return (
        f"{directory} holds no results of lmms-eval (DATE_results.json) or VLMEvalKit (status.json, "
        f"MODEL_DATASET_acc.csv, MODEL_DATASET_score.json), but {', '.join(entries[:5])}"
        f"{' ...' if len(entries) > 5 else ''}; name the folder that a kit wrote"
    )


def make_table(directories: Sequence[Path], baseline: Path) -> Table:
    """Reads the directories and compares each with the baseline, which is one of them.

    Raises:
        ValueError: what `read_directory` raises, or the directories have no benchmark in common.
    """
    assert baseline in directories
    notes: list[str] = []
    read: dict[str, dict[tuple[str, str], Result]] = {}
    for directory in directories:
        read[str(directory)], found = read_directory(directory)
        notes += found
    keys = sorted({key for results in read.values() for key in results}, key=_place)
    if len(read) > 1 and not any(all(key in results for results in read.values()) for key in keys):
        raise ValueError("the directories have no benchmark of the same kit in common; there is nothing to compare")
    rows = [_row(key, read, str(baseline), notes) for key in keys]
    averages = _averages(rows, list(read), notes)
    return Table(tuple(read), str(baseline), tuple(rows), tuple(averages), tuple(notes))


def _place(key: tuple[str, str]) -> tuple[int, str, str]:
    name, kit = key
    return _ORDER.get(name, len(_ORDER)), name, kit


def _row(
    key: tuple[str, str], read: Mapping[str, dict[tuple[str, str], Result]], baseline: str, notes: list[str]
) -> Row:
    has = {directory: results[key] for directory, results in read.items() if key in results}
    cells = {}
    for directory, result in has.items():
        reference = has.get(baseline)
        if directory == baseline or reference is None:
            cells[directory] = Cell(result.value)
        else:
            cells[directory] = _compared(directory, reference, result, notes)
    if missing := [directory for directory in read if directory not in has]:
        notes.append(f"{key[0]} ({key[1]}) is missing in {', '.join(missing)}: not in the averages")
    return Row(next(iter(has.values())).benchmark, key[1], cells)


def _compared(directory: str, reference: Result, result: Result, notes: list[str]) -> Cell:
    """The gain, and its test if both have samples; neither if they did not answer the same questions."""
    gain, name = result.value - reference.value, f"{directory}: {result.benchmark.name} ({result.kit})"
    if result.source != reference.source:
        notes.append(f"{name}: {result.source.metric} is no {reference.source.metric}, the baseline's score: no gain")
        return Cell(result.value)
    if reference.read_samples is None or result.read_samples is None:
        return Cell(result.value, gain)
    try:
        test = compare(reference.read_samples(), result.read_samples(), result.benchmark.questions_per_sample)
    except DifferentSamples as error:
        notes.append(f"{name}: {error}: no gain, not in the averages")
        return Cell(result.value)
    except ValueError as error:
        notes.append(f"{name}: no test: {error}")
        return Cell(result.value, gain)
    for value, mean in ((reference.value, test.mean_baseline), (result.value, test.mean_treated)):
        percent = value / result.benchmark.divisor
        if result.benchmark.type != OTHER and abs(percent - 100 * mean) > _ROUNDING:
            notes.append(
                f"{name}: the kit's score is {percent:.2f}, the mean of its samples {100 * mean:.2f}; the test is of "
                "the latter (some scores weight parts equally; if this one does not, the files are of other runs)"
            )
    return Cell(result.value, gain, test)


def _averages(rows: Sequence[Row], directories: Sequence[str], notes: list[str]) -> list[Average]:
    """Of every type and of all, over the known benchmarks that all directories have and that can be compared."""
    usable: dict[str, Row] = {}
    for row in rows:
        is_everywhere = all(name in row.cells for name in directories)
        is_compared = sum(cell.gain is None for cell in row.cells.values()) == 1
        if row.benchmark.type == OTHER or not (is_everywhere and is_compared):
            continue
        name = row.benchmark.name
        if name in usable:
            notes.append(f"{name} was scored by both kits: the averages take VLMEvalKit's, the paper's kit")
        if name not in usable or row.kit == VLMEVALKIT:
            usable[name] = row
    averages = []
    for name in [*TYPES, "average"]:
        chosen = [row for row in usable.values() if name in ("average", row.benchmark.type)]
        if chosen:
            averages.append(Average(name, tuple(row.benchmark.name for row in chosen), _means(chosen, directories)))
    return averages


def _means(rows: Sequence[Row], directories: Sequence[str]) -> dict[str, float]:
    return {
        directory: sum(row.cells[directory].value / row.benchmark.divisor for row in rows) / len(rows)
        for directory in directories
    }
