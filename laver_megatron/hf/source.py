"""An opened Hugging Face directory: its parts, its weights, and the files that hold them."""

from pathlib import Path

import torch

from laver_megatron.hf.parts import copies_of_tied_embedding, has_training_state, parts_of_hugging_face
from laver_megatron.hf.safetensors_reader import TRAINING_STATE, SafetensorsReader, check_tensors
from laver_megatron.hf.weights import Weight, is_training_state, weight_table


class WeightSource:
    """A text-only Qwen2.5 or a LaVer export, whose headers fit its config.json. Collective.

    Attributes:
        directory: where it lies.
        parts: what it consists of.
        weights: its weights by Megatron key.

    Raises:
        ValueError: see `parts_of_hugging_face`, `SafetensorsReader`, `copies_of_tied_embedding` and `check_tensors`.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.parts = parts_of_hugging_face(directory)
        self.weights = weight_table(self.parts)
        self._model = SafetensorsReader(directory)
        self._training_state: SafetensorsReader | None = None
        of_training = {key: w for key, w in self.weights.items() if is_training_state(w.hugging_face[0])}
        of_model = {key: weight for key, weight in self.weights.items() if key not in of_training}
        check_tensors(self._model, of_model, may_hold=copies_of_tied_embedding(self._model, self.parts.text))
        if has_training_state(directory):
            self._training_state = SafetensorsReader(directory, TRAINING_STATE)
            check_tensors(self._training_state, of_training)

    def __enter__(self) -> "WeightSource":
        return self

    def __exit__(self, *exception: object) -> None:
        self._model.close()
        if self._training_state is not None:
            self._training_state.close()

    def reader(self, weight: Weight) -> SafetensorsReader:
        """The set of files that holds a weight."""
        if not is_training_state(weight.hugging_face[0]):
            return self._model
        assert self._training_state is not None
        return self._training_state

    def dtype(self, weight: Weight) -> torch.dtype:
        return self.reader(weight).dtype(weight.hugging_face[0])

    def num_bytes(self, weight: Weight) -> int:
        return torch.Size(weight.size).numel() * self.dtype(weight).itemsize

    @property
    def num_bytes_read(self) -> int:
        """Bytes that the files have been asked for."""
        return sum(reader.num_bytes_read for reader in (self._model, self._training_state) if reader)
