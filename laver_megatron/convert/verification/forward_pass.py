"""A Megatron model's forward pass over whole micro-batches, at any layout, for those who hold it against another model.

Letters: B packs, S language tokens, H hidden.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from laver_megatron.data.batch.packing import PackBatch
from laver_megatron.model.laver import LaverStage, StageOutput
from laver_megatron.model.streams import MicroBatch, StreamSettings, build_micro_batch


@torch.no_grad()
def forward_pass(
    stages: Sequence[LaverStage],
    micro_batches: Sequence[tuple[PackBatch, Tensor]],
    keep: Callable[[MicroBatch, Tensor, StageOutput], None],
) -> None:
    """Runs Megatron's own pipeline schedule, without gradients. Call on every rank.

    Args:
        stages: this rank's parts of the model.
        micro_batches: packs of one size, and which of their tokens are masked, bool `[B, S]`.
        keep: called on the ranks of the last stage for each micro-batch, in order, with the micro-batch, its final
            hidden states `[S, B, H]`, whole on every rank, and the output, of whose logits (at all rows) a rank has its
            part.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

    from laver_megatron.model.image_division import own_images

    config = stages[0].run_config
    settings = StreamSettings.of(config, stages[0].shape)
    device = torch.device(torch.cuda.current_device())
    hidden: list[Tensor] = []

    def feed() -> Iterator[tuple[MicroBatch, list[Tensor] | None]]:
        for packs, masked_BS in micro_batches:
            pixels = [image.to(device) for images in packs.pixels for image in images]
            batch = build_micro_batch(packs, masked_BS, settings, device, all_logits=True)
            yield batch, own_images(pixels, batch.image_num_tokens, stages[0].tp_group)

    def report(batch: MicroBatch, output: StageOutput) -> tuple[Tensor, Tensor, Tensor]:
        states = hidden.pop()
        assert not hidden, "the last stage's decoder has run more than once for a micro-batch"
        if config.parallel.sequence_parallel:
            states = gather_from_sequence_parallel_region(states)
        keep(batch, states[: config.data.seq_length], output)
        nothing = torch.zeros((), device=device)
        return nothing, nothing.int(), nothing

    def forward_step(batches: Iterator, stage: LaverStage) -> tuple[Tensor | StageOutput, Callable]:
        batch, pixels = next(batches)
        return stage(batch, pixels), partial(report, batch)

    hooks = [
        stage.decoder.register_forward_hook(lambda module, args, output: hidden.append(output))
        for stage in stages
        if stage.post_process
    ]
    for stage in stages:
        stage.eval()
    visual_tokens = 2 * config.data.visual_seq_length if config.objective.laver else 0
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[feed() for _ in stages],
        model=list(stages),
        num_microbatches=len(micro_batches),
        seq_length=config.data.seq_length + visual_tokens,
        micro_batch_size=len(micro_batches[0][0].tokens_BS),
        forward_only=True,
    )
    for hook in hooks:
        hook.remove()
