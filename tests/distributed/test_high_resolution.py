"""An image of 2048 visual tokens beside smaller ones, from files to a step: prepared, packed, divided, trained."""

import io
import json

import pytest
from webdataset import TarWriter

from laver_megatron import train
from laver_megatron.config.fields import Config
from laver_megatron.data.batch.packing import image_grids
from laver_megatron.demo.encoders import save_encoder
from tests.distributed.harness import Layout
from tests.encoders import picture

LARGE, SMALL = (1024, 512), ((96, 64), (20, 300))  # 32 x 64 tokens of 16 pixels; 4 x 6 and 19 x 1


@pytest.fixture(scope="module")
def config(tmp_path_factory, demo_dir):
    directory = tmp_path_factory.mktemp("high-resolution")
    save_encoder(directory / "encoder", "qwen2_5_vl")
    with TarWriter(str(directory / "train-0.tar"), encoder=False, mtime=0) as tar:
        for number in range(4):
            files = {}
            for place, size in enumerate((LARGE, *SMALL)):
                buffer = io.BytesIO()
                picture(*size, seed=number).save(buffer, "JPEG")
                files[f"{place}.jpg"] = buffer.getvalue()
            turns = [
                {"role": "user", "content": "<image> <image>\nand <image>\nWhich is the largest?"},
                {"role": "assistant", "content": "The first one is the largest."},
            ]
            tar.write({"__key__": f"s{number}", "json": json.dumps(turns).encode(), **files})
    return Config.of(
        load=f"hf:{demo_dir / 'model'}",
        encoder=str(directory / "encoder"),
        data_path=(str(directory / "*.tar"),),
        run_dir=str(directory / "run"),
        seq_length=2304,
        visual_seq_length=2112,
        max_image_tokens=2048,
        micro_batch_size=1,
        global_batch_size=1,
        num_workers=0,
        mask_ratio=0.4,
        vision_head_hidden_size=32,
        train_iters=4,
        freeze=(),
        lr=1e-3,
    )


def run(layout, config):
    """Job: a step; its record, and the grids and pixels of the first batch."""
    trainer = train.setup(config.replace(**layout.settings))
    batch = trainer.training_data.at(0, mask_ratio=0.4, step=0)
    sizes = [[tuple(image.shape[1:]) for image in images] for images in batch.pixels or []]
    record = train.train_step(trainer)
    moved = any(bool(p.main_grad.any()) for p in trainer.stages[0].encoder.parameters())
    return [image_grids(pack) for pack in batch.packs], sizes, record, moved


def test_a_step_with_an_image_of_2048_tokens(pool, config):
    """In one process, and divided: the large image is one rank's alone."""
    records = []
    for layout in (Layout(), Layout(tp=2, sp=True)):
        results = pool.run(run, layout, config)
        for grids, _, record, encoder_learns in results:
            assert grids == [[(32, 64), (4, 6), (19, 1)]]
            assert record["visual_token_share"] * record["num_tokens"] == 2048 + 24 + 19
            assert record["num_samples"] == 1 and record["num_masked_tokens"] > 500
            assert encoder_learns
        pixels = [size for _, sizes, _, _ in results for of_pack in sizes for size in of_pack]
        assert sorted(pixels) == sorted([(512, 1024), (64, 96), (304, 16)])
        records.append(results[0][2])
    for name in ("lm_loss", "mim_loss", "gram_loss", "grad_norm"):
        assert records[1][name] == pytest.approx(records[0][name], rel=1e-5), name
