"""The model beside Hugging Face's for every division of it: final hidden states and logits, fp32, within 1e-4.

The reference (`tests.parity`) is transformers' Qwen2 under an explicit mask, for `mrope` Qwen2.5-VL's text
model on the same `[3, B, S]` positions; it runs once in this process. tests/unit/model/test_parity.py is the
same comparison without processes and shows that it can fail.
"""

import pytest
import torch

from tests.distributed.harness import Layout, join
from tests.parity import (
    assert_parity,
    build_model,
    image_micro_batches,
    model_outputs,
    parity_config,
    reference_outputs,
    text_micro_batches,
    write_checkpoints,
)

NUM_LAYERS = 4


def text_and_images():
    """A micro-batch of text only and one with images: the interleaved schedule wants as many as stages."""
    return text_micro_batches() + image_micro_batches()[:1]


FOUR = Layout(tp=2, pp=2, sp=True)
# What runs: (micro-batches, settings). `1d` is transformers' Qwen2 as it is, with nothing replaced.
CASES = {
    "causal, 1d": (text_and_images, {"attention": "causal", "positions": "1d", "laver": False}),
    "mixed, 1d": (image_micro_batches, {"attention": "mixed", "positions": "1d"}),
    "mixed, 2d": (image_micro_batches, {"attention": "mixed", "positions": "2d"}),
    "mixed, mrope": (image_micro_batches, {"attention": "mixed", "positions": "mrope"}),
}
# (checkpoint, layout). Checkpoints have four heads in two key/value groups, `one group` in one.
IN_OTHERS = pytest.mark.slow(reason="a division that others of these hold")
DIVISIONS = [
    pytest.param("tied", Layout(), marks=IN_OTHERS),
    pytest.param("tied", Layout(tp=2), marks=IN_OTHERS),
    pytest.param("tied", Layout(pp=2), marks=IN_OTHERS),
    ("tied", FOUR),
    ("tied", Layout(pp=2, vpp_layers=1)),
    ("tied", Layout(tp=4)),
    ("untied", Layout()),
    pytest.param("untied", Layout(tp=2), marks=IN_OTHERS),
    pytest.param("untied", Layout(pp=2), marks=IN_OTHERS),
    ("untied", FOUR),
    ("untied", Layout(tp=4, sp=True)),
    ("one group", Layout(tp=2, sp=True)),
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    directory = tmp_path_factory.mktemp("parity")
    return {
        "tied": write_checkpoints(directory / "tied", tied=True),
        "untied": write_checkpoints(directory / "untied", tied=False),
        "one group": write_checkpoints(directory / "one-group", tied=True, num_key_value_heads=1),
    }


@pytest.fixture(scope="module")
def reference(checkpoints):
    """Outputs of transformers, computed once for each (checkpoint, case)."""
    outputs = {}

    def of(checkpoint, case):
        if (checkpoint, case) not in outputs:
            micro_batches, settings = CASES[case]
            config = parity_config(checkpoints[checkpoint], **settings)
            outputs[checkpoint, case] = reference_outputs(config, checkpoints[checkpoint], micro_batches())
        return outputs[checkpoint, case]

    return of


def run(layout, checkpoints):
    """Job: this rank's outputs of every case, None off the last pipeline stage."""
    join(layout, num_layers=NUM_LAYERS)
    outputs = {}
    for case, (micro_batches, settings) in CASES.items():
        config = parity_config(checkpoints, **layout.settings, **settings)
        outputs[case] = model_outputs(build_model(config, checkpoints), micro_batches())
    return outputs


@pytest.mark.parametrize("checkpoint, layout", DIVISIONS, ids=str)
def test_any_layout_is_hugging_face(pool, checkpoints, reference, checkpoint, layout):
    results = pool.run(run, layout, checkpoints[checkpoint])
    on_last_stage = [result for result in results if result["causal, 1d"] is not None]
    assert len(on_last_stage) == layout.tp * layout.dp
    for case in CASES:
        for result in on_last_stage:
            assert_parity(result[case], reference(checkpoint, case))


def test_mixed_attention_and_positions_show_at_image_positions(reference):
    """The cases differ where they are meant to differ: comparing them is no comparison of the same thing."""
    visual_BS = torch.cat([packs.image_BS >= 0 for packs, _ in image_micro_batches()])
    hidden = [reference("tied", case).hidden_BSH[visual_BS] for case in CASES if case.startswith("mixed")]
    for i, one in enumerate(hidden):
        for other in hidden[:i]:
            assert (one - other).abs().max() > 1e-2
