"""What has been done in an output folder, so that interrupted work can be resumed.

During the work, FOLDER/.progress holds the settings' fingerprint and, of every finished slice, its report and the index
of its shards. At the end, the folder gets `made.json` and, last of all, `index.parquet`.
"""

import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from laver_megatron.data.index.index_file import INDEX_NAME, PROGRESS_NAME, check_index, read_index, write_index
from laver_megatron.data.index.shard_index import ShardIndex, concatenate
from laver_megatron.runtime.files import write_text
from laver_megatron.shards.report import MakeReport
from laver_megatron.shards.shard_writer import PARTIAL

SHARDS = "shard-*.tar"
_MADE, _SETTINGS = "made.json", "settings.json"


class Ledger:
    """The output folder of one set of settings.

    Args:
        fingerprint: of everything that determines the shards' bytes.
        mode: `new`, `overwrite` or `resume`.

    Raises:
        ValueError: the folder holds shards and mode is `new`, `resume` finds those of other settings, or another
            process works in it.
    """

    def __init__(self, folder: Path, fingerprint: str, mode: str) -> None:
        assert mode in ("new", "overwrite", "resume"), mode
        self.folder, self._progress = folder, folder / PROGRESS_NAME
        self._fingerprint = fingerprint
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = open(folder / ".lock", "w")  # noqa: SIM115  # held until __exit__
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise ValueError(f"another process is making shards in {folder}") from error
        try:
            self._prepare(mode)
        except BaseException:
            self._lock.close()
            raise

    def _prepare(self, mode: str) -> None:
        folder = self.folder
        is_used = any((folder / name).exists() for name in (INDEX_NAME, PROGRESS_NAME, _MADE)) or any(
            folder.glob(SHARDS)
        )
        if is_used and mode == "new":
            raise ValueError(f"{folder} holds shards already; go on with --resume, or start anew with --overwrite")
        if mode == "overwrite":
            self._clear()
        elif is_used:
            self._check_fingerprint()
        for path in folder.glob(f"{SHARDS}{PARTIAL}"):
            path.unlink()
        if not self._is_made():
            self._progress.mkdir(exist_ok=True)
            write_text(self._progress / _SETTINGS, json.dumps({"fingerprint": self._fingerprint}, indent=1))

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def made(self, stamps: Callable[[], Iterable[str]]) -> MakeReport | None:
        """The report of the whole work, if it was finished before. stamps: of all slices, see `RecordSource.stamp`.

        Raises:
            ValueError: it was, but a shard or one of the files apart has been removed or changed since.
        """
        if not self._is_made():
            return None
        try:
            check_index(read_index(self.folder / INDEX_NAME))
        except ValueError as error:
            raise ValueError(
                f"{self.folder} was finished, but has changed; start anew with --overwrite: {error}"
            ) from error
        made = json.loads((self.folder / _MADE).read_text())
        if made.get("files_apart") != _together(stamps()):
            raise ValueError(
                f"{self.folder} was finished, but pictures that it was made from have changed since; start anew with "
                "--overwrite"
            )
        return MakeReport.from_json(made["report"])

    def _is_made(self) -> bool:
        return (self.folder / _MADE).exists() and (self.folder / INDEX_NAME).exists()

    def finished(self, number: int, stamp: Callable[[], str]) -> MakeReport | None:
        """The report of a slice whose shards are whole and whose files apart are unchanged (see `RecordSource.stamp`).
        Remains of any other slice are removed."""
        path = self._progress / f"{number:06d}.json"
        if not path.exists():
            return None
        document = json.loads(path.read_text())
        shards = {self.folder / name: num_bytes for name, num_bytes in document["shards"].items()}
        are_whole = all(path.exists() and path.stat().st_size == num_bytes for path, num_bytes in shards.items())
        if are_whole and document.get("stamp") == stamp():
            return MakeReport.from_json(document["report"])
        for file in (path, path.with_suffix(".parquet"), *shards):
            file.unlink(missing_ok=True)
        return None

    def finish(self, report: MakeReport, num_slices: int) -> ShardIndex:
        """Writes the index of all shards, and removes the progress folder.

        Raises:
            ValueError: there is no sample at all.
        """
        parts = [self._progress / f"{number:06d}.parquet" for number in range(num_slices)]
        indexes = [read_index(path) for path in parts if path.exists()]
        if not indexes:
            raise ValueError(f"{self.folder}: no sample can be used\n{report.summary(has_tokenizer=False)}")
        index = concatenate(indexes)
        stamps = (json.loads(path.with_suffix(".json").read_text())["stamp"] for path in parts)
        made = {"fingerprint": self._fingerprint, "files_apart": _together(stamps), "report": report.to_json()}
        write_text(self.folder / _MADE, json.dumps(made, indent=1))
        write_index(index, self.folder / INDEX_NAME)
        shutil.rmtree(self._progress)
        return index

    def _clear(self) -> None:
        # What says that the folder is finished goes first.
        files = self.folder / _MADE, self.folder / INDEX_NAME
        for path in (*files, *self.folder.glob(SHARDS), *self.folder.glob("counts-*.parquet")):
            path.unlink(missing_ok=True)
        shutil.rmtree(self._progress, ignore_errors=True)

    def _check_fingerprint(self) -> None:
        for path in (self._progress / _SETTINGS, self.folder / _MADE):
            if path.exists():
                if json.loads(path.read_text())["fingerprint"] == self._fingerprint:
                    return
                raise ValueError(
                    f"{self.folder} was begun with other sources or settings; give those again, or start anew with "
                    "--overwrite"
                )
        raise ValueError(f"{self.folder} holds shards, but not what they were made from; start anew with --overwrite")


def record_slice(folder: Path, number: int, indexes: Sequence[ShardIndex], report: MakeReport, stamp: str) -> None:
    """Records in an output folder that a slice and its shards are finished, from files with this stamp; called by the
    worker that made them."""
    progress = folder / PROGRESS_NAME
    if indexes:
        write_index(concatenate(indexes), progress / f"{number:06d}.parquet")
    shards = {Path(shard.path).name: shard.num_bytes for index in indexes for shard in index.shards}
    write_text(
        progress / f"{number:06d}.json",
        json.dumps({"shards": shards, "report": report.to_json(), "stamp": stamp}, indent=1),
    )


def _together(stamps: Iterable[str]) -> str:
    return hashlib.sha256("/".join(filter(None, stamps)).encode()).hexdigest()
