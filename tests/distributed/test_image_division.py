"""Images over the tensor-parallel ranks: each gets the pixels of its own, all get all visual tokens, no work twice."""

from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state

from laver_megatron.data.batch.broadcast import image_num_tokens, is_reader, scatter_pixels
from laver_megatron.data.batch.division import divide_images
from laver_megatron.encoders.modules import HiddenStateEncoder
from laver_megatron.model.image_division import gather_visual_tokens
from laver_megatron.train import train_step
from tests.distributed.build import IMAGES, PACKS_PER_STEP, make_config, make_trainer
from tests.distributed.harness import Layout, join
from tests.packs import pack

# Two micro-batches: five images of three sizes, and none.
DOCUMENTS = ([2, (2, 2), 1, (1, 3), (2, 3)], [(2, 2), 4, (1, 3), 3]), ([20],)


def micro_batches():
    batches = [pack(*documents, image_size=6, seed=seed) for seed, documents in enumerate(DOCUMENTS)]
    for batch in batches:
        # Pixels of as many sizes.
        batch.pixels[0][:] = [torch.full((3, 4 + i, 5), float(i)) for i in range(len(batch.pixels[0]))]
    return batches


def scatter(layout):
    """Job: the pixels that this rank gets of what rank 0 has; none of its own where it does not read."""
    join(layout)
    batches = micro_batches()
    if not is_reader():
        for batch in batches:
            batch.pixels[0].clear()
    return scatter_pixels(batches, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_each_rank_gets_the_pixels_of_its_images(pool, num_ranks):
    results = pool.run(scatter, Layout(tp=num_ranks))
    expected = micro_batches()[0].pixels[0]
    division = divide_images(image_num_tokens(micro_batches()[0]), num_ranks)
    for (with_images, without), images in zip(results, division, strict=True):
        assert without == [] and len(with_images) == len(images)
        assert all(torch.equal(found, expected[image]) for found, image in zip(with_images, images, strict=True))


def gather(layout):
    """Job: all visual tokens, and the gradient of this rank's own."""
    join(layout)
    group = parallel_state.get_tensor_model_parallel_group()
    num_tokens = image_num_tokens(micro_batches()[0])
    starts = torch.tensor([0, *num_tokens]).cumsum(0).tolist()
    own = [torch.arange(starts[i], starts[i + 1]) for i in divide_images(num_tokens, group.size())[group.rank()]]
    numbers = torch.cat(own) if own else torch.zeros(0)
    own_tH = torch.stack([numbers, 100 + numbers], dim=1).float().requires_grad_()
    tokens_TH = gather_visual_tokens(own_tH, num_tokens, group)
    tokens_TH.backward(tokens_TH.detach() * 2)
    return tokens_TH.detach(), own_tH.detach(), own_tH.grad


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_every_rank_gets_all_visual_tokens(pool, num_ranks):
    for tokens_TH, own_tH, gradient_tH in pool.run(gather, Layout(tp=num_ranks)):
        number_T = torch.arange(20.0)
        assert torch.equal(tokens_TH, torch.stack([number_T, 100 + number_T], dim=1))
        assert torch.equal(gradient_tH, 2 * own_tH)


def encoded_images(layout, config):
    """Job: how many images this rank's encoder sees in a step."""
    counts = []
    forward = HiddenStateEncoder.forward

    def counted(self, images):
        counts.append(len(images))
        return forward(self, images)

    trainer = make_trainer(config)
    HiddenStateEncoder.forward = counted
    try:
        train_step(trainer)
    finally:
        HiddenStateEncoder.forward = forward
    return sum(counts)


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2), Layout(tp=2, pp=2, sp=True)], ids=str)
def test_no_image_is_encoded_twice(pool, assets, tmp_path: Path, layout):
    counts = pool.run(encoded_images, layout, make_config(assets, tmp_path, layout, micro_batch_size=PACKS_PER_STEP))
    num_images = sum(sum(images) for images in IMAGES[0])
    assert sum(counts) == num_images
    on_first_stage = counts[: layout.tp]
    assert max(on_first_stage) - min(on_first_stage) <= 1 and not any(counts[layout.tp :])
