"""Chooses one Parquet file of every N of a Hugging Face dataset, seeded; prints their names, and their size to stderr.

Files are put in the order of their folder, which is a subset's, and of a hash of seed and name within it; of these
every N-th is taken, from a place that the seed chooses. So each subset keeps its share, to within one file.

    python examples/paper/choose_files.py --repo HuggingFaceM4/FineVision --every 20 --seed 1 > files.txt
"""

import argparse
import hashlib
import sys
from pathlib import Path, PurePosixPath


def choose(names: list[str], every: int, seed: int) -> list[str]:
    """One of every `every` names, in the order of names. The same names, in any order, give the same choice."""

    def rank(name: str) -> str:
        return hashlib.sha256(f"{seed}:{name}".encode()).hexdigest()

    ordered = sorted(names, key=lambda name: (str(PurePosixPath(name).parent), rank(name)))
    return sorted(ordered[int(rank(""), 16) % every :: every])


def read_list(path: Path) -> dict[str, int]:
    """{name: bytes} of a file with lines of both: SIZE NAME."""
    lines = [line.split(" ", 1) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if any(len(line) != 2 or not line[0].isdigit() for line in lines):
        raise ValueError(f"{path}: every line must be SIZE NAME, such as 475000000 ai2d/train-00000-of-00001.parquet")
    return {name: int(size) for size, name in lines}


def ask_hub(repo: str, revision: str | None) -> dict[str, int]:
    from huggingface_hub import HfApi

    entries = HfApi().list_repo_tree(repo, repo_type="dataset", recursive=True, revision=revision)
    return {entry.path: entry.size for entry in entries if hasattr(entry, "size")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--repo", help="the dataset, such as HuggingFaceM4/FineVision")
    source.add_argument("--list", type=Path, help="a file with its files, a line each: SIZE NAME")
    parser.add_argument("--revision", help="of --repo: a commit, so that the list stays the same")
    parser.add_argument("--every", type=int, required=True, help="one file of so many; 1: all")
    parser.add_argument("--seed", type=int, default=1, help="another one chooses other files (default: 1)")
    options = parser.parse_args()
    if options.every < 1:
        parser.error(f"--every {options.every} must be a positive integer")
    try:
        sizes = read_list(options.list) if options.list else ask_hub(options.repo, options.revision)
    except (OSError, ValueError) as error:  # huggingface_hub's are among these, too
        parser.error(str(error))
    parquet = [name for name in sizes if name.endswith(".parquet")]
    chosen = choose(parquet, options.every, options.seed)
    if not chosen:
        parser.error(f"of {len(parquet)} Parquet files every {options.every}th is none; choose a smaller number")
    total, whole = (sum(sizes[name] for name in names) / 1e9 for names in (chosen, parquet))
    print(f"{len(chosen)} of {len(parquet)} Parquet files, {total:,.1f} of {whole:,.1f} GB", file=sys.stderr)
    print("\n".join(chosen))


if __name__ == "__main__":
    main()
