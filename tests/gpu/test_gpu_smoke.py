"""The real stage module on a GPU: parity in fp32, and bf16 training steps, with every kernel."""

from types import SimpleNamespace

import pytest
import torch

from tests.gpu.kernels import BF16, FP32, kernels
from tests.packs import pack, padding
from tests.parity import (
    IMAGE_SIZE,
    assert_parity,
    build_model,
    image_micro_batches,
    model_outputs,
    parity_config,
    reference_outputs,
    single_process,  # noqa: F401
    write_checkpoints,
)

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("single_process"),
]

SEQ_LENGTH, VISUAL_SEQ_LENGTH = 320, 80


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return write_checkpoints(tmp_path_factory.mktemp("checkpoints"), tied=True)


def train(checkpoints, num_steps, **changes):
    """Terms of each of a few training steps on two fixed packs, and whether the teacher followed."""
    from megatron.core import parallel_state

    from laver_megatron import train as trainer_module
    from laver_megatron.data.batch.batches import GlobalBatch, count
    from laver_megatron.model.build import wrap
    from laver_megatron.model.streams import StreamSettings, span_areas
    from laver_megatron.model.teacher import TeacherAverage
    from laver_megatron.objective.micro_batch import TERMS
    from laver_megatron.runtime.backend import use_backend

    config = parity_config(
        checkpoints, seq_length=SEQ_LENGTH, visual_seq_length=VISUAL_SEQ_LENGTH, global_batch_size=2, lr=1e-3, **changes
    )
    stages = build_model(config, checkpoints)
    chunks, optimizer = wrap(config, stages)
    teacher = TeacherAverage(stages, optimizer, parallel_state.get_data_parallel_group())
    settings = StreamSettings.of(config, checkpoints.shape)
    backend = use_backend()
    common = {"seq_length": SEQ_LENGTH, "image_size": IMAGE_SIZE}
    packs = [
        pack([40, (4, 4), 30, (4, 4), 50], padding(9), [(2, 8), 100], **common, seed=1),
        pack([200, (4, 4), 60], **common, seed=2),
    ]
    masked = [
        (torch.rand(p.image_BS.shape, generator=torch.Generator().manual_seed(0)) < 0.4) & (p.image_BS >= 0)
        for p in packs
    ]
    counts = count(packs, masked, lambda p: (*span_areas(p, settings), 0), backend.device)
    dtype = torch.bfloat16 if config.training.bf16 else torch.float32
    pixels = [[image.to(backend.device, dtype) for image in p.pixels[0]] for p in packs]
    batch = GlobalBatch(packs, masked, pixels, counts)
    trainer = SimpleNamespace(
        config=config, backend=backend, stages=stages, chunks=chunks, optimizer=optimizer, teacher=teacher, centre=None,
        streams=settings,
    )  # fmt: skip
    start = [p.detach().float().clone() for p in stages[0].teacher.parameters()]
    steps = []
    for _ in range(num_steps):
        for chunk in chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        terms = dict(zip(TERMS, trainer_module.run_schedule(trainer, batch, forward_only=False).tolist(), strict=True))
        grad_norm, skipped = trainer_module.update_student(trainer, config.training.lr, terms["loss"])
        assert not skipped
        teacher.update(0.9)
        steps.append({**terms, "grad_norm": grad_norm})
    moved = any(
        not torch.equal(p.detach().float(), s) for p, s in zip(stages[0].teacher.parameters(), start, strict=True)
    )
    return steps, moved


@pytest.mark.parametrize("kernel", ["dense", *kernels(FP32)])
def test_parity_in_fp32(checkpoints, kernel):
    config = parity_config(checkpoints, attention_kernel=kernel)
    ours = model_outputs(build_model(config, checkpoints), image_micro_batches())
    reference = reference_outputs(config, checkpoints, image_micro_batches())
    # The CPU's sums against the GPU's, both fp32 without TF32.
    assert_parity(ours, reference, tolerance=5e-4)


@pytest.mark.parametrize("kernel", kernels(FP32))
def test_kernels_train_as_dense_in_fp32(checkpoints, kernel):
    dense, found = (train(checkpoints, 3, attention_kernel=name)[0] for name in ("dense", kernel))
    for one, other in zip(dense, found, strict=True):
        for name in one:
            # Three Adam steps; rounding differs between the kernels.
            assert other[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("recompute", [None, "full", "selective"])
@pytest.mark.parametrize("kernel", ["dense", *kernels(BF16)])
def test_bf16_training_steps(checkpoints, kernel, recompute):
    exact, _ = train(checkpoints, 1, attention_kernel="dense")
    steps, teacher_moved = train(checkpoints, 5, attention_kernel=kernel, bf16=True, recompute_granularity=recompute)
    assert steps[-1]["lm_loss"] < steps[0]["lm_loss"] and teacher_moved
    for name in ("lm_loss", "mim_loss"):
        # bf16 has 8 bits: some percent on a loss of logits of order 1 to 5.
        assert steps[0][name] == pytest.approx(exact[0][name], rel=0.05), name
