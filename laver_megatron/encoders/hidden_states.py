"""Families whose features are a hidden state of a vision transformer."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from laver_megatron.encoders.interface import EncoderShape, Family

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from laver_megatron.encoders.modules import HiddenStateEncoder

_LAYER = re.compile(r"(?:^|\.)layers?\.(\d+)\.")  # in the name of a parameter, the number of its layer


class HiddenStateFamily(Family):
    """behind_layers: beginnings of the names of parameters that no hidden
    state depends on, such as those of the final norm and of a pooling head."""

    behind_layers: tuple[str, ...]

    def is_idle(self, name: str, num_layers: int | None) -> bool:
        assert num_layers is not None
        layer = _LAYER.search(name)
        # Some versions of transformers have another module around the vision model.
        behind = name.removeprefix("vision_model.").startswith(self.behind_layers)
        return behind or (layer is not None and int(layer[1]) >= num_layers)

    def encoder(
        self, model: PreTrainedModel | None, shape: EncoderShape, feature_layer: int | None
    ) -> HiddenStateEncoder:
        from laver_megatron.encoders.modules import HiddenStateEncoder

        assert model is not None and feature_layer is not None
        return HiddenStateEncoder(model, shape, feature_layer)
