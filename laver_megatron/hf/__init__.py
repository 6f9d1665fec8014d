"""Hugging Face directories: sizes, files, tensors, and the one table of weight names."""
