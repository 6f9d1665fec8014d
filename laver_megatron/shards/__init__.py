"""Makes shards of data in the forms in which it is published."""

from laver_megatron.shards.build import MakeSettings, make_shards
from laver_megatron.shards.find import FORMATS
from laver_megatron.shards.parquet import RATINGS

__all__ = ["FORMATS", "RATINGS", "MakeSettings", "make_shards"]
