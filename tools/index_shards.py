"""Indexes WebDataset-format tars, once, so that training starts at once and knows what is wrong with its data.

    python tools/index_shards.py --shards /data/shards                     # writes /data/shards/index.parquet
    python tools/index_shards.py --shards '/data/a/train-*.tar' --output /data/train.parquet --num-workers 16
    python tools/index_shards.py --shards 'https://host/train-{00000..00099}.tar' --output train.parquet

Reads every shard once and says what cannot be used; which samples these are stands in the index's column `fault`.
"""

import argparse
import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path

from laver_megatron.data.index.index_file import INDEX_NAME, is_url, write_index
from laver_megatron.data.index.opening import find_shards_and_urls, index_with_bar
from laver_megatron.data.read.remote import ShardCache
from laver_megatron.shards.index_summary import summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", nargs="+", required=True, help="folders, globs, tars or URLs")
    parser.add_argument("--output", type=Path, help="the index file (default: index.parquet in the shards' folder)")
    parser.add_argument("--num-workers", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    parser.add_argument("--overwrite", action="store_true", help="replace an index that is there")
    parser.add_argument("--allow-pipe", action="store_true", help="shards named pipe:COMMAND may run it in a shell")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        shards = find_shards_and_urls(options.shards)
        folders = {"a server" if is_url(shard) else Path(shard).absolute().parent for shard in shards}
        if options.output is None and (len(folders) != 1 or "a server" in folders):
            raise ValueError(
                f"the shards lie in {', '.join(map(str, folders))}; say where the index goes with --output"
            )
        output = options.output or folders.pop() / INDEX_NAME
        if output.suffix != ".parquet":
            raise ValueError(f"--output {output} must end in .parquet")
        if output.exists() and not options.overwrite:
            raise ValueError(f"{output} is there already; replace it with --overwrite")
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            cache = ShardCache(folder, shutil.disk_usage(folder).free // 2, options.allow_pipe)
            cache.check_urls(shards)
            index = index_with_bar(shards, options.num_workers, cache.open_once)
        write_index(index, output)
    except (ValueError, OSError) as error:
        sys.exit(f"index_shards: {error}")
    print(f"{summary(index)}\nwritten to {output}")


if __name__ == "__main__":
    main()
