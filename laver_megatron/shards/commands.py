"""The command lines of the shard tools: `laver shards make`, `index` and `subset`, and `laver show`."""

import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from laver_megatron.config.command_line import from_command_line
from laver_megatron.config.fields import ConfigError
from laver_megatron.program import program, program_parser
from laver_megatron.runtime.exit_status import FAILED
from laver_megatron.shards.build import UsageError, usage_errors

if TYPE_CHECKING:
    from laver_megatron.data.index.shard_index import ShardIndex

_MAKE = """
Makes WebDataset shards, with an index, of LLaVA JSON, FineVision or LLaVA-OneVision Parquet, or tars.

JPEG, PNG and WebP are copied byte for byte, other pictures become PNG. Unusable samples are counted by reason, and end
the work only when they exceed --max-bad-fraction. Interrupted work continues with --resume.
"""
_INDEX = """
Indexes WebDataset tars, once, so that training starts at once and knows what is wrong with its data.

Reads every shard once and reports what cannot be used; the index's column `fault` names the samples.
"""
_SUBSET = """
Selects a seeded subset of the samples of shards, as an index over the same tars; no tar is copied.

With the same seed, a smaller subset is contained in every larger one. Train with the file as --data-path. The manifest
hash, printed and stored in the file, identifies the selection.
"""
_SHOW = """
Draws packs of a run as the model will see them: tokens, sample bounds, labels, attention, masked patches.

Takes every option of the trainer. Prints each pack's text (trained text in [[ ]]) and writes pack-N.png.
"""


@program
def make_main(argv: Sequence[str] | None = None) -> None:
    """Makes shards of published data."""
    from laver_megatron.shards import FORMATS, RATINGS, MakeSettings, make_shards

    examples = [
        "--source blip_laion_cc_sbu_558k.json --images images/ --output shards/llava-558k",
        "--source FineVision/ai2d FineVision/chartqa --min-relevance 4 --output shards/finevision",
        "--source LLaVA-OneVision-Data/ --output shards/onevision --num-workers 16",
    ]
    parser = program_parser("shards make", _MAKE, examples)
    add = parser.add_argument
    add("--source", dest="sources", type=Path, nargs="+", required=True, metavar="PATH", help="files or folders")
    add("--format", dest="format_name", choices=FORMATS, help="default: recognised from the files")
    add("--images", type=Path, metavar="FOLDER", help="where LLaVA's pictures are; names may not lead out of it")
    add("--output", type=Path, required=True, metavar="DIR", help="the folder of the shards")
    add("--samples-per-shard", type=int, default=10_000, metavar="N", help="records a shard at most (default: 10000)")
    add("--max-shard-bytes", type=int, default=10**9, metavar="B", help="bytes a shard at most (default: 1000000000)")
    add("--num-workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (default: one a core)")
    for name in RATINGS:
        add(f"--min-{name.replace('_', '-')}", type=float, metavar="X", help="drops turns of Parquet files with less")
    add("--max-bad-fraction", type=float, default=0.01, metavar="X", help="unusable samples allowed (default: 0.01)")
    add("--decode-images", action="store_true", help="decode every picture to its end, which finds garbled ones; slow")
    add("--images-in-answers", action="store_true", help="<image> in an answer stands for a picture, not for the word")
    add("--tokenizer", type=Path, metavar="DIR", help="counts text tokens in the summary, instead of words")
    mode = parser.add_mutually_exclusive_group().add_argument
    mode("--overwrite", dest="mode", action="store_const", const="overwrite", default="new", help="start over")
    mode("--resume", dest="mode", action="store_const", const="resume", default="new", help="keep finished shards")
    options = vars(parser.parse_args(argv))
    minima = {name: options.pop(f"min_{name}") for name in RATINGS}
    ratings = {name: minimum for name, minimum in minima.items() if minimum is not None}

    def make() -> None:
        with usage_errors():
            settings = MakeSettings(**options, min_ratings=ratings)
        print(make_shards(settings).summary(has_tokenizer=settings.tokenizer is not None))

    _run(make, "; go on with --resume")


@program
def index_main(argv: Sequence[str] | None = None) -> None:
    """Indexes tars, local and remote ones."""
    from laver_megatron.data.index.index_file import INDEX_NAME, is_url, write_index
    from laver_megatron.data.index.opening import find_shards_and_urls, index_with_bar
    from laver_megatron.data.read.shard_cache import ShardCache

    examples = [
        "--shards /data/shards",
        "--shards '/data/a/train-*.tar' --output /data/train.parquet --num-workers 16",
        "--shards 'https://host/train-{00000..00099}.tar' --output train.parquet",
    ]
    parser = program_parser("shards index", _INDEX, examples)
    add = parser.add_argument
    add("--shards", nargs="+", required=True, help="folders, globs, tars or URLs")
    add("--output", type=Path, help="the index file (default: index.parquet in the shards' folder)")
    add("--num-workers", type=int, default=os.cpu_count(), metavar="N", help="processes (default: one a core)")
    add("--overwrite", action="store_true", help="replace an existing index")
    add("--allow-pipe", action="store_true", help="shards named pipe:COMMAND may run it in a shell")
    options = parser.parse_args(argv)

    def output_of(shards: Sequence[str]) -> Path:
        folders = {"a server" if is_url(shard) else str(Path(shard).absolute().parent) for shard in shards}
        if options.output is None and (len(folders) != 1 or "a server" in folders):
            raise ValueError(f"the shards lie in {', '.join(folders)}; say where the index goes with --output")
        output = options.output or Path(folders.pop()) / INDEX_NAME
        _check_output(output, options.overwrite)
        return output

    def index() -> None:
        with tempfile.TemporaryDirectory() as folder:
            cache = ShardCache(folder, shutil.disk_usage(folder).free // 2, options.allow_pipe)
            with usage_errors():
                shards = find_shards_and_urls(options.shards)
                output = output_of(shards)
                cache.check_urls(shards)
                output.parent.mkdir(parents=True, exist_ok=True)
            found = index_with_bar(shards, options.num_workers, cache.open_once)
        write_index(found, output)
        print(f"{index_summary(found)}\nwritten to {output}")

    _run(index, level=logging.WARNING)


@program
def subset_main(argv: Sequence[str] | None = None) -> None:
    """Selects a seeded subset."""
    from laver_megatron.data.index.opening import open_indexes, path_problems
    from laver_megatron.data.index.shard_index import concatenate
    from laver_megatron.shards.subset import write_subset

    examples = [
        "--index shards/ --num-samples 800000 --seed 1 --output subset-800k.parquet",
        "--index shards/ --num-samples 2000000 --seed 1 --output subset-2m.parquet",
    ]
    parser = program_parser("shards subset", _SUBSET, examples)
    add = parser.add_argument
    add("--index", nargs="+", required=True, metavar="PATH", help="folders of shards, indexes, tars or globs of tars")
    add("--num-samples", type=int, required=True, metavar="N", help="usable samples to select")
    add("--seed", type=int, default=1, metavar="N", help="another seed selects other samples (default: 1)")
    add("--output", type=Path, required=True, metavar="FILE", help="the subset's index; its name ends with .parquet")
    add("--num-workers", type=int, default=1, metavar="N", help="processes, for tars without an index (default: 1)")
    add("--overwrite", action="store_true", help="replace an existing file")
    options = parser.parse_args(argv)

    def subset() -> None:
        _check_output(options.output, options.overwrite)
        if problems := path_problems(options.index):
            raise UsageError(f"shards: {'; '.join(problems)}")
        indexes = open_indexes(options.index, options.num_workers, reads_shards=False)
        manifest = write_subset(concatenate(indexes), options.num_samples, options.seed, options.output)
        print(f"{manifest.num_samples:,} of {manifest.of_samples:,} samples, seed {manifest.seed}: {options.output}")
        print(f"manifest hash: {manifest.hash}")

    _run(subset)


@program
def show_main(argv: Sequence[str] | None = None) -> None:
    """Prints and draws packs of a run."""
    examples = [
        "--config examples/demo.yaml --packs 0 1 --output shown/",
        "--config examples/demo.yaml --packs 7 --step 90 --mask-ratio 0.3 --output shown/",
    ]
    parser = program_parser("show", _SHOW, examples, allow_abbrev=False)
    add = parser.add_argument
    add("--packs", type=int, nargs="+", default=[0], metavar="N", help="numbers of packs (default: 0)")
    add("--step", type=int, help="mask as at this step (default: the step that trains on the pack)")
    add("--validation", action="store_true", help="packs of --valid-data-path")
    add("--output", type=Path, required=True, metavar="DIR", help="where the pictures go")
    options, of_trainer = parser.parse_known_args(argv)

    # Here, because they take seconds, which --help should not.
    from laver_megatron.data.batch.data_spec import DataSpec
    from laver_megatron.data.batch.pack_reader import open_reader
    from laver_megatron.data.index.opening import path_problems
    from laver_megatron.encoders import open_preprocessor
    from laver_megatron.hf.tokenizer import load_tokenizer
    from laver_megatron.shards.show import describe, draw, show_packs
    from laver_megatron.start import find_start

    config = from_command_line(of_trainer).config

    def show() -> None:
        start = find_start(config)
        paths = config.data.valid_data_path if options.validation else config.data.data_path
        if start.model_dir is None or start.encoder_dir is None or not paths or min(options.packs) < 0:
            raise UsageError("model, encoder, data and packs from 0 on are needed: --load, --encoder, --data-path")
        if problems := path_problems(paths):
            raise UsageError(f"shards: {'; '.join(problems)}")
        tokenizer = load_tokenizer(start.model_dir)
        preprocessor = open_preprocessor(start.encoder_dir, config.data.max_image_tokens)
        reader = open_reader(DataSpec.of(config, paths), tokenizer, preprocessor)
        options.output.mkdir(parents=True, exist_ok=True)
        for shown in show_packs(config, reader, options.packs, options.step):
            print(describe(shown, tokenizer))
            path = options.output / f"pack-{shown.number}.png"
            draw(shown, preprocessor, path)
            print(path)
        reader.close()

    _run(show)


def index_summary(index: "ShardIndex") -> str:
    """Shards, samples and pictures, then what cannot be used by reason, and files that belong to no sample."""
    from laver_megatron.data.index.faults import fault_table
    from laver_megatron.data.read.record_keys import keys_line

    num_bytes = sum(shard.num_bytes for shard in index.shards)
    usable_I = index.fault_I == 0
    lines = [
        f"{len(index.shards):>12,}  shards, {num_bytes / 1e9:.2f} GB",
        f"{int(usable_I.sum()):>12,}  usable samples",
        f"{int(index.num_images_I[usable_I].sum()):>12,}  pictures in them",
    ]
    bad = index.faults + index.left_out
    lines += [f"{bad.total():>12,}  samples that cannot be used" + (":" if bad else "")]
    lines += [fault_table(bad)] if bad else []
    if index.ignored:
        lines.append(f"{index.ignored.total():>12,}  other files, never opened: {keys_line(index.ignored)}")
    if index.other_keys:
        lines.append(f"{len(index.other_keys):>12,}  unused keys of records: {keys_line(index.other_keys)}")
    return "\n".join(lines)


def _check_output(path: Path, overwrite: bool) -> None:
    if path.suffix != ".parquet":
        raise UsageError(f"--output {path} must end with .parquet")
    if path.exists() and not overwrite:
        raise UsageError(f"--output {path} is there already; replace it with --overwrite")


def _run(work: Callable[[], None], when_interrupted: str = "", level: int = logging.INFO) -> None:
    """Does the work. What is a ValueError once it has begun is a failure and not wrong use."""
    logging.basicConfig(level=level, format="%(levelname)s: %(message)s" if level == logging.INFO else "%(message)s")
    try:
        work()
    except (ConfigError, UsageError):
        raise
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(FAILED)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted{when_interrupted}") from None
