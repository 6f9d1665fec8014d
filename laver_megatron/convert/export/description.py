"""What an exported checkpoint says of itself: config.json, processor_config.json, chat template and README.md.

Functions of what the checkpoint's own files hold; nothing is read or written here. The two formats:

    laver   comes with its own code (modeling_laver.py) and computes what was trained
    llava   stock LlavaForConditionalGeneration, for tools that know no other code
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from laver_megatron.hf.tokenizer import IMAGE_TOKENS

REMOTE_CODE = Path(__file__).with_name("modeling_laver.py")
"""The one file of code that goes into a laver export."""

_IMAGE_TOKEN = IMAGE_TOKENS[1]
_ONE_PICTURE = "".join(IMAGE_TOKENS)

# What people call the encoders, by model_type of their vision_config.
_ENCODER_NAMES = {
    "siglip_vision_model": "SigLIP",
    "clip_vision_model": "CLIP",
    "dinov2": "DINOv2",
    "dinov2_with_registers": "DINOv2 with registers",
    "aimv2_vision_model": "AIMv2",
    "qwen2_5_vl_vision": "Qwen2.5-VL",
    "laver_patches": "none: patches of the picture go into the connector as they are",
}
# Encoders that the tools reading Llava's format know, and the features before the patches that Llava drops for each.
_LLAVA_PREFIX_TOKENS = {"siglip_vision_model": 0, "clip_vision_model": 1}


def export_config(
    format: str,
    text_config: dict[str, Any],
    vision_config: dict[str, Any],
    *,
    attention: str,
    positions: str,
    feature_layer: int | None,
    image_token_id: int,
    dtype: str,
) -> dict[str, Any]:
    """config.json of an export.

    Args:
        format: one of FORMATS.
        text_config: the decoder's config.json, which goes in unchanged.
        vision_config: the vision model's, with its model_type.
        attention, positions, feature_layer: the run's.
        image_token_id: the number of <|image_pad|>.
        dtype: that of the tensors, such as `bfloat16`.

    Raises:
        ValueError: an encoder or positions that Llava does not have.
    """
    models = {"text_config": dict(text_config), "vision_config": dict(vision_config)}
    ending = {"tie_word_embeddings": bool(text_config.get("tie_word_embeddings", False)), "dtype": dtype}
    if format == "laver":
        return {
            "architectures": ["LaverForConditionalGeneration"],
            "model_type": "laver",
            "auto_map": {
                "AutoConfig": "modeling_laver.LaverConfig",
                "AutoModelForImageTextToText": "modeling_laver.LaverForConditionalGeneration",
                "AutoProcessor": "modeling_laver.LaverProcessor",
            },
            **models,
            "vision_feature_layer": feature_layer,
            "attention": attention,
            "positions": positions,
            "image_token_id": image_token_id,
            **ending,
        }
    num_prefix_tokens = _llava_prefix_tokens(vision_config)
    if positions != "1d":
        raise ValueError(
            f"the model was trained with positions {positions}, and Llava has only 1d positions: it would compute "
            "something else without saying so; export with --format laver"
        )
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        **models,
        "vision_feature_layer": feature_layer,
        "vision_feature_select_strategy": _select_strategy(num_prefix_tokens),
        "image_token_index": image_token_id,
        "image_seq_length": (vision_config["image_size"] // vision_config["patch_size"]) ** 2,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        **ending,
        **({"is_mm_prefix_lm": True} if attention == "mixed" else {}),
    }


def _llava_prefix_tokens(vision_config: Mapping[str, Any]) -> int:
    """Features before the patches, which Llava drops.

    Raises:
        ValueError: an encoder of which Llava would compute something else, or that its readers do not know.
    """
    model_type = vision_config["model_type"]
    if model_type in _LLAVA_PREFIX_TOKENS:
        return _LLAVA_PREFIX_TOKENS[model_type]
    if model_type in ("laver_patches", "qwen2_5_vl_vision") or vision_config.get("is_native"):
        reason = "its images differ in their numbers of tokens, and Llava gives every image as many"
    elif vision_config.get("num_register_tokens"):
        reason = "Llava drops a class token and would take the registers for patches"
    else:
        reason = "the tools that read this format know CLIP and SigLIP alone"
    raise ValueError(
        f"--format llava cannot hold an encoder of type {model_type}: {reason}; export with --format laver"
    )


def _select_strategy(num_prefix_tokens: int) -> str:
    """Llava's word for dropping the first feature or none."""
    return "default" if num_prefix_tokens else "full"


def processor_config(
    format: str, vision_config: Mapping[str, Any], *, patch_size: int, native: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """processor_config.json of an export.

    Args:
        format, vision_config: as for `export_config`.
        patch_size: side in pixels of what becomes one visual token.
        native: for an encoder of native resolution, min_pixels and max_pixels of a picture.

    Raises:
        ValueError: an encoder that Llava does not have.
    """
    if format == "laver":
        return {
            "processor_class": "LaverProcessor",
            "auto_map": {"AutoProcessor": "modeling_laver.LaverProcessor"},
            "patch_size": patch_size,
            **(native or {}),
        }
    num_prefix_tokens = _llava_prefix_tokens(vision_config)
    return {
        "processor_class": "LlavaProcessor",
        "patch_size": patch_size,
        "image_token": _IMAGE_TOKEN,
        "num_additional_image_tokens": num_prefix_tokens,
        "vision_feature_select_strategy": _select_strategy(num_prefix_tokens),
    }


# Turns contents that are lists of pictures and texts into one text each, under the name that the tokenizer's own
# template reads. The last tag is an expression: Jinja drops the line break after a block, and the template that
# follows must stay as it is to the letter.
_PREAMBLE = (
    """\
{#- Contents may be lists of {"type": "image"} and {"type": "text", "text": ...}, which this part turns into text;
    the tokenizer's own template follows. -#}
{%- set laver = namespace(messages=[], text='') -%}
{%- for message in messages -%}
  {%- if message.content is defined and message.content is iterable
         and message.content is not string and message.content is not mapping -%}
    {%- set laver.text = '' -%}
    {%- for part in message.content -%}
      {%- if part is string -%}
        {%- set laver.text = laver.text + part -%}
      {%- elif part.type in ('image', 'image_url') -%}
        {%- set laver.text = laver.text + '"""
    + _ONE_PICTURE
    + """' -%}
      {%- elif part.type == 'text' -%}
        {%- set laver.text = laver.text + part.text -%}
      {%- else -%}
        {{- raise_exception('a message may hold images and text, not ' + (part.type | string)) -}}
      {%- endif -%}
    {%- endfor -%}
    {%- set laver.messages = laver.messages + [dict(message, content=laver.text)] -%}
  {%- else -%}
    {%- set laver.messages = laver.messages + [message] -%}
  {%- endif -%}
{%- endfor -%}
{%- set messages = laver.messages -%}
{{- '' }}"""
)


def chat_template(tokenizer_template: str) -> str:
    """chat_template.jinja: the tokenizer's own template, which then also takes lists as contents. Contents that are
    strings come out as before. A template that was wrapped already is left as it is."""
    return tokenizer_template if tokenizer_template.startswith(_PREAMBLE) else _PREAMBLE + tokenizer_template


STOCK_PICTURES = """\
Stock processors prepare the pictures. They agree with training on opaque pictures of 8 bits that lie upright (Pillow's
modes 1, L, P, RGB, CMYK). In training, what is transparent was laid over white (modes LA, PA, RGBA, and any mode with a
transparent colour), 16-bit grey was scaled (modes I and I;16), and EXIF tags turned pictures.
Convert such pictures to upright RGB in this way first, or export with --format laver, whose processor does it.
"""

_LOADING = {
    "laver": (
        "AutoModelForImageTextToText",
        ", trust_remote_code=True",
        "Loading runs `modeling_laver.py` of this directory, hence `trust_remote_code=True`: read it first if you do "
        "not know where it comes from.",
    ),
    "llava": (
        "LlavaForConditionalGeneration",
        "",
        "Stock transformers loads it; there is no code in this directory. Where torchvision is installed, transformers "
        "resizes\npictures with it and not with Pillow as in training: pixels differ by up to 1 in 255.\n\n"
        + STOCK_PICTURES.strip(),
    ),
}

_ATTENTION = {
    "mixed": "mixed: the tokens of an image see all of their own image; a later image sees earlier ones, never the "
    "reverse; text sees what stands before it",
    "causal": "causal: every token sees what stands before it",
}
_POSITIONS = {
    "1d": "1d: tokens are counted, those of images too",
    "2d": "2d: visual tokens are rotated by row and column, interleaved over the frequencies",
    "mrope": "mrope: visual tokens are rotated by row and column in the contiguous sections of Qwen2.5-VL",
}

_WEIGHTS = {
    "student": "the trained model itself (student)",
    "teacher": "the teacher's decoder, an average of the student's over training; all else is the student's",
}

_CAUSAL_IN_TRANSFORMERS = """\
**This directory computes what was trained only where `is_mm_prefix_lm` is honoured.** config.json says
`is_mm_prefix_lm: true`: the tokens of an image see all of their image. Recent versions of vLLM read it; older ones go
by a list of model types and ignore it. Stock transformers does not know it, computes causal attention over images,
which gives other logits, and does not warn. To use the model in transformers, export it with `--format laver`.
"""


def readme(
    *,
    format: str,
    name: str,
    encoder: str,
    attention: str,
    positions: str,
    weights: str,
    dtype: str,
    max_image_tokens: int | None = None,
    training_state: bool = False,
) -> str:
    """README.md of an export.

    Args:
        name: what to call the model.
        encoder: model_type of its vision_config.
        weights: `student` or `teacher`.
        max_image_tokens: of a picture, if pictures differ in their numbers of visual tokens.
        training_state: whether training_state.safetensors lies beside the model.
    """
    images = "all of one size"
    if max_image_tokens is not None:
        images = (
            f"keep their proportions and have at most {max_image_tokens} visual tokens each; larger ones are shrunk"
        )
    facts = {
        "format": format,
        "image encoder": _ENCODER_NAMES[encoder],
        "images": images,
        "attention": _ATTENTION[attention],
        "positions": _POSITIONS[positions],
        "weights": _WEIGHTS[weights],
        "dtype": dtype,
    }
    model_class, option, trust = _LOADING[format]
    parts = [
        f"# {name}\n",
        "A multimodal language model trained with LaVer: an image encoder, a connector of two layers and a Qwen2.5 "
        "decoder.\nWritten by `laver_megatron`.\n",
        "".join(f"- {name}: {fact}\n" for name, fact in facts.items()),
        "## Use\n",
        f"```python\n{_example(model_class, option)}```\n",
        f"{trust}\n",
    ]
    if format == "llava" and attention == "mixed":
        parts.append(_CAUSAL_IN_TRANSFORMERS)
    if training_state:
        parts.append(
            "`training_state.safetensors` holds what only training uses ([MASK], vision head, teacher); loading the "
            "model does\nnot read it.\n"
        )
    return "\n".join(parts)


def _example(model_class: str, option: str) -> str:
    return f"""\
from PIL import Image
from transformers import {", ".join(sorted((model_class, "AutoProcessor")))}

directory = "."  # this directory
processor = AutoProcessor.from_pretrained(directory{option})
model = {model_class}.from_pretrained(directory{option})

content = [{{"type": "image"}}, {{"type": "text", "text": "What is in the picture?"}}]
prompt = processor.apply_chat_template([{{"role": "user", "content": content}}], add_generation_prompt=True)
inputs = processor(text=prompt, images=Image.open("photo.jpg"), return_tensors="pt").to(model.device)
answer = model.generate(**inputs, max_new_tokens=128)[0, inputs["input_ids"].shape[1] :]
print(processor.decode(answer, skip_special_tokens=True))
"""
