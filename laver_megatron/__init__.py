"""LaVer on Megatron-Core: multimodal language models that also learn from their own visual tokens."""

__version__ = "0.1.0"
