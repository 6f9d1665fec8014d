"""What is said of tensors under names with another beginning."""

import pytest

from laver_megatron.hf.tensor_names import misnamed

MODEL = [f"model.layers.{i}.{name}.weight" for i in range(3) for name in ("mlp.up_proj", "input_layernorm")]
MODEL += ["model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"]


@pytest.mark.parametrize(
    ("rename", "expected"),
    [
        (lambda name: f"_orig_mod.{name}", "name.removeprefix('_orig_mod.'),"),
        (lambda name: f"module.{name}", "name.removeprefix('module.'),"),
        (lambda name: f"module._orig_mod.{name}", "name.removeprefix('module._orig_mod.'),"),
        (lambda name: name.removeprefix("model."), "'model.' + name,"),
        (lambda name: name.replace("model.", "module."), "'model.' + name.removeprefix('module.'),"),
    ],
)
def test_the_remedy_is_exact(rename, expected):
    found = {rename(name) for name in MODEL}
    said = misnamed(found - set(MODEL), sorted(set(MODEL) - found))
    assert expected in said and "besides" not in said
    new_name = said.split("rename each such tensor to ")[1].split(", in the files")[0]
    assert {eval(new_name, {"name": name}) for name in found - set(MODEL)} == set(MODEL) - found


def test_whose_beginning_it_is():
    for wrapper, inner in (("_orig_mod.", "model._orig_mod"), ("module.", "model.module")):
        assert f"begin with '{wrapper}' (" in (said := misnamed([wrapper + name for name in MODEL], MODEL))
        assert f"save {inner})" in said
    assert misnamed([f"text.{name}" for name in MODEL], MODEL).startswith(
        "the names of its tensors begin with 'text.': rename each"
    )
    bare = [name.removeprefix("model.") for name in MODEL[:-1]]
    assert misnamed(bare, MODEL).startswith("the names of its tensors lack 'model.' at their beginning: rename each")


def test_what_is_missing_all_the_same():
    bare = [name.removeprefix("model.") for name in MODEL[:-1]]
    assert misnamed(bare, MODEL).endswith("; besides, 1 are missing, such as lm_head.weight")


@pytest.mark.parametrize(
    "found",
    [
        [],
        ["transformer.h.0.ln_1.weight", "transformer.wte.weight"],
        # Of other layers they are other tensors.
        [name.replace("layers.", "layers.1") for name in MODEL],
        # A few tensors of the same names in another part are no explanation.
        [f"vision.{name}" for name in MODEL[:3]],
    ],
)
def test_what_other_names_do_not_explain(found):
    assert misnamed(found, MODEL) == ""


def test_beginnings_that_need_not_go():
    """The part of a larger model keeps the name it has there, and of two parts it is the one that fits."""
    parts = [f"module.vision_model.{name}" for name in MODEL] + [f"module.text_model.{name}" for name in MODEL[:5]]
    assert "removeprefix('module.')," in misnamed(parts, MODEL, known=("visual.", "vision_model."))
    assert "removeprefix('module.vision_model.')," in misnamed(parts, MODEL)
