"""What an export of a checkpoint may be, without what it takes to write one."""

FORMATS = ("laver", "llava")
MAX_FILE_BYTES = 5_000_000_000  # of one safetensors file, by default
