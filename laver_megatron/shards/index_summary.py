"""What an index holds, as a table for a person."""

from laver_megatron.data.index.faults import fault_table
from laver_megatron.data.index.shard_index import ShardIndex
from laver_megatron.data.read.record_keys import keys_line


def summary(index: ShardIndex) -> str:
    """Shards, samples and pictures, then what cannot be used by reason, and files that belong to no sample."""
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
