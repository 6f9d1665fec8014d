"""Parameters that an encoder's features do not depend on do not train, and all others do: held against autograd."""

import pytest
import torch

from laver_megatron.demo.encoders import KINDS
from laver_megatron.encoders import (
    build_encoder,
    encoder_tensor_sizes,
    idle_parameters,
    open_preprocessor,
    read_encoder,
)
from tests.encoders import picture

# The demo's encoders have three layers.
LAYERS = {kind: (None, *range(-4, 4)) for kind in KINDS} | {"qwen2_5_vl": (None,), "patches": (None,)}
CASES = [(kind, layer) for kind in KINDS for layer in LAYERS[kind]]


@pytest.mark.parametrize("load_weights", [True, False], ids=["loaded", "empty"])
@pytest.mark.parametrize("kind, layer", CASES)
def test_what_has_no_gradient_does_not_train(encoders, kind, layer, load_weights):
    encoder = build_encoder(encoders[kind], layer, torch.float32, load_weights=load_weights)
    trains = {name: parameter.requires_grad for name, parameter in encoder.named_parameters()}
    assert not trains or any(trains.values())
    encoder.requires_grad_(True)
    features_TE = encoder([open_preprocessor(encoders[kind])(picture(80, 64)).requires_grad_()])
    parameters = list(encoder.parameters())
    gradients = torch.autograd.grad(features_TE.sum(), parameters, allow_unused=True) if parameters else ()
    assert trains == {name: gradient is not None for name, gradient in zip(trains, gradients, strict=True)}


@pytest.mark.parametrize("kind, layer", CASES)
def test_by_names_alone(encoders, kind, layer):
    encoder = build_encoder(encoders[kind], layer, torch.float32, load_weights=False)
    still = [name.removeprefix("model.") for name, p in encoder.named_parameters() if not p.requires_grad]
    assert idle_parameters(read_encoder(encoders[kind]), encoder_tensor_sizes(encoders[kind]), layer) == still
    assert bool(still) == (kind not in ("qwen2_5_vl", "patches"))


def test_a_module_around_the_vision_model(encoders):
    names = [
        "vision_model.post_layernorm.weight",
        "vision_model.encoder.layers.1.mlp.fc1.bias",
        "vision_model.head.probe",
    ]
    shape = read_encoder(encoders["siglip"])
    assert idle_parameters(shape, names, -2) == [names[0], names[2]]
    assert idle_parameters(shape, names, 1) == names
