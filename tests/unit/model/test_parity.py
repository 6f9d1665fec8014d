"""The stage module in one process against transformers, fp32: outputs and gradients."""

import dataclasses

import pytest
import torch

from laver_megatron.hf.rows import split
from laver_megatron.hf.weights import ModelParts, weight_table
from laver_megatron.model.streams import StreamSettings, build_micro_batch
from tests.parity import (
    Outputs,
    Reference,
    assert_parity,
    build_model,
    image_micro_batches,
    model_outputs,
    parity_config,
    reference_outputs,
    text_micro_batches,
    write_checkpoints,
)

pytestmark = pytest.mark.usefixtures("single_process")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoints")
    return {tied: write_checkpoints(directory / str(tied), tied=tied) for tied in (True, False)}


def compare(config, checkpoints, micro_batches) -> Outputs:
    ours = model_outputs(build_model(config, checkpoints), micro_batches)
    reference = reference_outputs(config, checkpoints, micro_batches)
    assert_parity(ours, reference)
    return ours


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_causal_text(checkpoints, tied):
    config = parity_config(checkpoints[tied], laver=False, attention="causal", positions="1d")
    compare(config, checkpoints[tied], text_micro_batches())


def test_plain_qwen2_on_plain_text(checkpoints):
    """One document and nothing given but tokens: the call that every user of the checkpoint makes."""
    (packs, _), *_ = text_micro_batches()
    tokens_BS = packs.tokens_BS[:1]
    config = parity_config(checkpoints[True], laver=False)
    first = dataclasses.replace(
        packs,
        **{n: getattr(packs, n)[:1] for n in packs.__dataclass_fields__ if n.endswith("_BS")},
        pixels=[[]],
        keys=[[]],
    )
    nothing_masked_BS = torch.zeros_like(tokens_BS, dtype=torch.bool)
    ours = model_outputs(build_model(config, checkpoints[True]), [(first, nothing_masked_BS)])
    plain = Reference(parity_config(checkpoints[True], positions="1d"), checkpoints[True]).language
    with torch.no_grad():
        theirs = plain(tokens_BS).logits
    assert (ours.language_logits_BSW.cpu() - theirs).abs().max() <= 1e-4


@pytest.mark.parametrize("positions", ["1d", "2d", "mrope"])
@pytest.mark.parametrize("attention", ["mixed", "causal"])
def test_images(checkpoints, attention, positions):
    """Language and both reconstruction streams. `mrope` is transformers' Qwen2.5-VL text model on the same ids."""
    config = parity_config(checkpoints[True], attention=attention, positions=positions)
    compare(config, checkpoints[True], image_micro_batches())


def test_images_without_laver(checkpoints):
    compare(parity_config(checkpoints[False], laver=False), checkpoints[False], image_micro_batches())


def test_multi_query_and_multi_head_attention(tmp_path):
    for num_key_value_heads in (1, 4):
        written = write_checkpoints(
            tmp_path / str(num_key_value_heads), tied=True, num_key_value_heads=num_key_value_heads, num_layers=2
        )
        compare(parity_config(written), written, image_micro_batches())


def test_the_comparison_can_fail(checkpoints):
    """A wrong mask or wrong positions are far outside the tolerance, at image positions too."""
    micro_batches = image_micro_batches()
    config = parity_config(checkpoints[True])
    ours = model_outputs(build_model(config, checkpoints[True]), micro_batches)
    visual_BS = torch.cat([packs.image_BS >= 0 for packs, _ in micro_batches])
    for change in ({"attention": "causal"}, {"positions": "1d"}, {"positions": "mrope"}):
        other = reference_outputs(config.replace(**change), checkpoints[True], micro_batches)
        difference_BS = (ours.hidden_BSH.cpu() - other.hidden_BSH).abs().amax(-1)
        assert difference_BS[visual_BS].max() > 1e-2, change
        assert difference_BS[~visual_BS].max() > 1e-2, change


@pytest.mark.parametrize("recompute", [None, "full", "selective"])
def test_gradients(checkpoints, recompute):
    """Gradients of a function of all trained outputs, for every trained parameter; the teacher gets none."""
    config = parity_config(checkpoints[False], recompute_granularity=recompute)
    (packs, masked_BS), *_ = image_micro_batches()
    (stage,) = build_model(config, checkpoints[False])
    reference = Reference(config, checkpoints[False])
    reference.encoder.requires_grad_(False)
    device = torch.device(torch.cuda.current_device())

    theirs = reference(packs, masked_BS)
    generator = torch.Generator().manual_seed(0)
    language_BSW = torch.randn(theirs.language_logits_BSW.shape, generator=generator)
    student_NK = torch.randn(theirs.student_logits_NK.shape, generator=generator)
    ((theirs.language_logits_BSW * language_BSW).mean() + (theirs.student_logits_NK * student_NK).mean()).backward()

    stage.train()
    settings = StreamSettings.of(config, stage.shape)
    batch = build_micro_batch(packs, masked_BS, settings, device, all_logits=True)
    output = stage(batch, [image.to(device) for images in packs.pixels for image in images])
    student = output.student_logits_TK
    language = output.language_logits_RW.unflatten(0, (-1, len(packs.tokens_BS))).transpose(0, 1)
    ((language * language_BSW.to(device)).mean() + (student * student_NK.to(device)).mean()).backward()

    expected = {name: p.grad for name, p in reference.language.named_parameters()}
    weights, compared = weight_table(ModelParts(stage.shape)), 0
    for name, parameter in stage.named_parameters():
        if name.startswith(("teacher.", "encoder.")):
            assert parameter.grad is None, name
            continue
        if name.startswith(("connector", "vision_head")):
            module, layer, kind = name.split(".")
            index = 2 * (int(layer.removeprefix("linear_")) - 1)
            wanted = [getattr(getattr(reference, module)[index], kind).grad]
            found = [parameter.grad]
        elif name == "mask_token":
            found, wanted = [parameter.grad], [reference.mask_token.grad]
        else:
            key = name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
            weight = weights[key.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")]
            found, wanted = split(weight, parameter.grad), [expected[n] for n in weight.hugging_face]
        for mine, theirs_grad in zip(found, wanted, strict=True):
            compared += 1
            error = (mine.cpu() - theirs_grad).norm() / theirs_grad.norm()
            # fp32 through four layers, forward and back; the key bias's gradient is the difference of large sums.
            assert error < 1e-4, f"{name}: relative error {error:.1e}"
    assert compared == 3 + 4 * 12 + 4 + 5 + 1
