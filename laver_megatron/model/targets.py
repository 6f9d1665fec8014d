"""What the vision head predicts where that is not the teacher's output: features or pixels of the visual tokens, made
on the first stage, which therefore must be the last one, too.

Letters: t visual tokens of this rank's images, T those of all, E feature width, K numbers of a target on this rank.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from laver_megatron.encoders.modules import token_pixels
from laver_megatron.flops.encoder import ImageCost
from laver_megatron.model.image_division import gather_visual_tokens
from laver_megatron.objective.regression import normalised_pixels


@torch.no_grad()
def reconstruction_target(
    kind: str,
    pixels: Sequence[Tensor],
    features_tE: Tensor,
    num_tokens: Sequence[int],
    token_size: int,
    group: dist.ProcessGroup,
    cost: ImageCost,
) -> Tensor:
    """The target of all visual tokens of a micro-batch, this rank's part of its numbers: `[T, K]`. Collective.

    Args:
        kind: `features`, as the connector gets them, or `pixels`.
        pixels, features_tE: of the images that this rank encodes.
        num_tokens: of all images.
    """
    if kind == "features":
        own = features_tE.detach()
    else:
        of_images = [normalised_pixels(token_pixels(image_3HW, token_size)) for image_3HW in pixels]
        own = torch.cat(of_images) if of_images else features_tE.new_zeros(0, 3 * token_size**2, dtype=torch.float32)
    whole = gather_visual_tokens(own, num_tokens, group, cost)
    return whole.chunk(group.size(), dim=-1)[group.rank()]
