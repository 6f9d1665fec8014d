"""The modules of the model that train or stand still as a whole (`--freeze`), by the prefixes of their parameters."""

from collections.abc import Mapping

MODULES: Mapping[str, tuple[str, ...]] = {
    "encoder": ("encoder.",),
    "connector": ("connector.",),
    "decoder": ("embedding.", "decoder.", "output_layer."),
    "heads": ("vision_head.", "mask_token"),  # only LaVer has them
}
