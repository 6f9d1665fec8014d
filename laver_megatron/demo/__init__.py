"""Everything a first run needs, made on the spot: a tiny Qwen2.5 checkpoint, a tiny SigLIP encoder, shards of
real photographs with questions and answers. No download, and the same bytes every time.
"""

from laver_megatron.demo.make import make_demo

__all__ = ["make_demo"]
