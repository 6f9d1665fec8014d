"""What an export says of itself and how it is used: processor, chat template, descriptions, README, examples/chat.py.

The model and its tokenizer are the demo's: small, random, in the form of the real ones.
"""

import base64
import importlib.util
import inspect
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2ForCausalLM,
    SiglipVisionModel,
)

from laver_megatron.convert.export import description, modeling_laver
from laver_megatron.convert.export.modeling_laver import LaverProcessor
from laver_megatron.data.index.faults import SampleFault
from laver_megatron.data.read import images as data_images
from laver_megatron.data.read.conversations import parse_conversation
from laver_megatron.data.read.images import decode_image, upright_rgb
from laver_megatron.data.read.sample_encoder import SampleEncoder
from laver_megatron.demo.encoders import save_encoder
from laver_megatron.demo.models import save_language_model
from laver_megatron.encoders import open_preprocessor
from tests.exports import add_processor, write_export
from tests.picture_files import images, picture_files

GRID = (8, 8)
CHAT = Path(__file__).parents[3] / "examples" / "chat.py"

TRIPLE = "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/ and encoder/ as a run starts from them."""
    directory = tmp_path_factory.mktemp("sources")
    save_language_model(directory / "model", ["What is in this picture? A cat and two dogs, I think."])
    save_encoder(directory / "encoder")
    return directory


def _export(sources: Path, directory: Path, format: str, attention: str, positions: str) -> Path:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(sources / "model")
    language = Qwen2ForCausalLM.from_pretrained(sources / "model")
    with torch.no_grad():  # a fresh model with tied embeddings repeats its last token, a line break, for ever
        for weight in language.parameters():
            if weight.ndim == 2:
                weight.normal_(0.0, 1.5 * weight.shape[1] ** -0.5)
        language.model.embed_tokens.weight[len(tokenizer) :] = 0  # no answers that the tokenizer cannot spell
    encoder = SiglipVisionModel.from_pretrained(sources / "encoder")
    connector = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 128))
    write_export(
        directory,
        language,
        encoder,
        connector,
        text_config=json.loads((sources / "model" / "config.json").read_text()),
        vision_config=json.loads((sources / "encoder" / "config.json").read_text()),
        attention=attention,
        positions=positions,
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        format=format,
    )
    readme = description.readme(
        format=format,
        name="tiny",
        encoder="siglip_vision_model",
        attention=attention,
        positions=positions,
        weights="student",
        dtype="float32",
    )
    (directory / "README.md").write_text(readme)
    return add_processor(directory, sources / "model", sources / "encoder")


@pytest.fixture(scope="module")
def laver(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _export(sources, tmp_path_factory.mktemp("laver") / "tiny-laver", "laver", "mixed", "2d")


@pytest.fixture(scope="module")
def llava(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _export(sources, tmp_path_factory.mktemp("llava") / "tiny-llava", "llava", "mixed", "1d")


@pytest.fixture(scope="module")
def processor(laver: Path) -> LaverProcessor:
    return LaverProcessor.from_pretrained(laver)


def picture(number: int, size: tuple[int, int] = (90, 50)) -> Image.Image:
    """A picture of noise, which no resizing leaves as it was."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.processes
def test_the_auto_classes_need_nothing_of_this_package(laver, processor, tmp_path):
    """In a process where laver_megatron cannot be imported: the same tokens, pixels and logits as here."""
    script = f"""
import sys
sys.modules["laver_megatron"] = None
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
directory = {str(laver)!r}
assert AutoConfig.from_pretrained(directory, trust_remote_code=True).attention == "mixed"
processor = AutoProcessor.from_pretrained(directory, trust_remote_code=True)
model, found = AutoModelForImageTextToText.from_pretrained(
    directory, trust_remote_code=True, output_loading_info=True
)
assert not any(found.values()), found
inputs = processor(text="a <image> b", images=Image.open("photo.png"), return_tensors="pt")
with torch.no_grad():
    torch.save({{**inputs, "logits": model(**inputs).logits}}, "output.pt")
"""
    picture(0).save(tmp_path / "photo.png")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    theirs = torch.load(tmp_path / "output.pt")
    inputs = processor(text="a <image> b", images=picture(0), return_tensors="pt")
    with torch.no_grad():
        ours = modeling_laver.LaverForConditionalGeneration.from_pretrained(laver)(**inputs).logits
    assert torch.equal(theirs["input_ids"], inputs["input_ids"])
    assert torch.equal(theirs["pixel_values"], inputs["pixel_values"])
    # Two processes may split the sums of a matrix product differently.
    assert torch.allclose(theirs["logits"], ours, atol=1e-5)


# --- the processor ----------------------------------------------------------------------------------------

CONVERSATION = [
    {"from": "human", "value": "<image>\nWhat is in this picture?"},
    {"from": "gpt", "value": "A cat."},
    {"from": "human", "value": "And here: <image><image>?"},
    {"from": "gpt", "value": "Two dogs, I think."},
]


@pytest.mark.parametrize("system", [[], [{"from": "system", "value": "Be brief."}]])
def test_tokens_are_those_of_training(system, sources, processor):
    messages = parse_conversation(json.dumps([*system, *CONVERSATION]), 3, "test").messages
    encoder = SampleEncoder(AutoTokenizer.from_pretrained(sources / "model"))
    expected = encoder.encode(messages, [GRID] * 3, "test").tokens_T
    pictures = [picture(i) for i in range(3)]
    plain = [{"role": message.role, "content": message.content} for message in messages]
    prompt = processor.apply_chat_template(plain)
    assert processor(text=prompt, images=pictures, return_tensors="pt")["input_ids"][0].equal(expected)
    # The same with the pictures written out, and as lists of parts.
    written_out = [{**m, "content": m["content"].replace("<image>", TRIPLE)} for m in plain]
    prompt = processor.apply_chat_template(written_out)
    assert processor(text=[prompt], images=[pictures])["input_ids"] == [expected.tolist()]
    remaining = iter(pictures)
    in_parts = [{**m, "content": _in_parts(m["content"], remaining)} for m in plain]
    inputs = processor.apply_chat_template(in_parts, tokenize=True, return_dict=True, return_tensors="pt")
    assert inputs["input_ids"][0].equal(expected)
    assert inputs["pixel_values"].shape == (3, 3, 64, 64)


def _in_parts(text: str, pictures) -> list[dict]:
    parts = []
    for piece in re.split("(<image>)", text):
        if piece:
            image = piece == "<image>"
            parts.append({"type": "image", "image": next(pictures)} if image else {"type": "text", "text": piece})
    return parts


@pytest.mark.parametrize("name", picture_files())
def test_pixels_are_those_of_training(name, sources, processor, chat, tmp_path):
    """Of every mode, transparent or not, turned or not, however the picture comes: to the bit."""
    content = picture_files()[name]
    upright = decode_image(content)
    expected_3HW = open_preprocessor(sources / "encoder")(upright)
    path = tmp_path / "picture"
    path.write_bytes(content)
    encoded = base64.b64encode(content).decode()
    address = f"data:image/any;base64,{encoded}"
    ways = (
        Image.open(io.BytesIO(content)),
        Image.open(path),  # Pillow maps such a file into memory, and garbles a turned TIFF
        path,
        str(path),
        path.as_uri(),
        address,
        encoded,
        base64.encodebytes(content).decode(),
        content,
        chat._open(path, "laver"),
        np.asarray(upright),
    )
    for given in ways:
        found_I3HW = processor(text="<image>", images=given, return_tensors="pt")["pixel_values"]
        assert found_I3HW.dtype == torch.float32 and torch.equal(found_I3HW[0], expected_3HW)
    for shown in ({"image": str(path)}, {"path": str(path)}, {"url": address}, {"base64": encoded}):
        messages = [{"role": "user", "content": [{"type": "image", **shown}]}]
        inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
        assert torch.equal(inputs["pixel_values"][0], expected_3HW)


def test_a_frame_of_a_tiff_opened_by_its_name(sources, processor, tmp_path):
    """The one that was asked for, turned as training turns it, and the caller's object is left as it was."""
    exif = Image.Exif()
    exif[0x0112] = 6
    first, second = (picture(i, (37, 23)).convert("CMYK") for i in range(2))
    first.save(tmp_path / "two.tif", exif=exif, save_all=True, append_images=[second])
    content = io.BytesIO()
    second.save(content, "TIFF", exif=exif)
    expected_3HW = open_preprocessor(sources / "encoder")(decode_image(content.getvalue()))
    opened = Image.open(tmp_path / "two.tif")
    opened.seek(1)
    found_I3HW = processor(text="<image>", images=opened, return_tensors="pt")["pixel_values"]
    assert torch.equal(found_I3HW[0], expected_3HW)
    assert opened.tell() == 1 and opened.tile


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"\xef\xbb\xbf \n<!DOCTYPE html><p>not found", "an HTML page"),
        (b"<HTML>", "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b"no picture", "a file that begins b'no pictu'"),
        (b"", "empty"),
    ],
)
def test_what_is_no_picture_is_named(content, kind, processor, tmp_path):
    path = tmp_path / "page.jpg"
    path.write_bytes(content)
    encoded = base64.b64encode(content).decode()
    ways = {str(path): path, str(path) + " ": str(path), path.as_uri(): path.as_uri()}
    ways |= {f"a picture of {len(content)} bytes": content, "data:;base64,": f"data:;base64,{encoded}"}
    if content:
        ways[f"'{encoded}'"] = encoded
    for name, given in ways.items():
        with pytest.raises(ValueError) as caught:
            processor(text="<image>", images=given)
        message = str(caught.value)
        assert message.startswith(name) and f" is {kind}, but no picture that Pillow can read" in message


@pytest.mark.parametrize("text", ["none.jpg", "some words", "abc" * 2000 + "!", "a\0b", ""])
def test_text_that_names_no_picture(text, processor):
    with pytest.raises(ValueError, match="is no file that exists, no address .* and no base64 of a picture") as caught:
        processor(text="<image>", images=text)
    assert len(str(caught.value)) < 300


def test_the_files_cover_what_can_go_wrong():
    names = " ".join(picture_files())
    kinds = ("PNG LA", "PNG RGBA", "PNG P, transparent", "PNG I;16, transparent", "PNG 1, transparent")
    others = ("GIF P, transparent", "TIFF I;16B", "TIFF PA", "TIFF I", "WEBP RGBA", "JPEG CMYK")
    for what in (*kinds, *others, "turned behind its pixels", "turned by xmp", "TIFF L, turned by exif"):
        assert what in names
    assert {decode_image(content).size for content in picture_files().values()} == {(37, 23), (23, 37)}


@pytest.mark.parametrize("mode", images())
def test_every_mode_of_pillow_is_the_same_here_and_there(mode):
    """Also modes that no file has."""
    image = images()[mode]
    if mode == "F":
        for function in (upright_rgb, modeling_laver.upright_rgb):
            with pytest.raises(ValueError, match="floating-point pixels have no agreed range"):
                function(image)
        return
    assert upright_rgb(image).tobytes() == modeling_laver.upright_rgb(image).tobytes()


def test_the_two_copies_are_the_same_text():
    for name in ("upright_rgb", "_opaque_rgb"):
        assert inspect.getsource(getattr(data_images, name)) == inspect.getsource(getattr(modeling_laver, name))
    assert data_images._UPRIGHT == modeling_laver._UPRIGHT


def test_arrays_of_sixteen_bits_and_with_alpha(sources, processor):
    preprocessor = open_preprocessor(sources / "encoder")
    grey_HW = (np.arange(2400).reshape(40, 60) * 20).astype(np.uint16)
    clear_HW4 = np.zeros((40, 60, 4), np.uint8)
    scaled = Image.fromarray((grey_HW >> 8).astype(np.uint8)).convert("RGB")
    for given, rgb in ((grey_HW, scaled), (clear_HW4, Image.new("RGB", (60, 40), "white"))):
        found_I3HW = processor(text="<image>", images=given, return_tensors="pt")["pixel_values"]
        assert torch.equal(found_I3HW[0], preprocessor(rgb))


WORDS = ["What does <image> do in HTML?", "See:\n```\n<image>\n```\nWell?", "Mend it: ```\n<image>\n", "`<image>`"]
PLACES = [
    "<image> Which?",
    "What is this? <image>",
    "Which?\n \t<image>\nSay.",
    "```a``` <image> \t",
    "a <image>\n```b```",
]


def test_a_word_that_looks_like_a_place(processor):
    """Where every picture has its place, `<image>` is a word of the text, as in training."""
    tokens = processor.tokenizer
    text = f"{TRIPLE} Write <image>."
    inputs = processor(text=text, images=picture(0))
    (ids,) = inputs["input_ids"]
    assert ids.count(tokens.convert_tokens_to_ids("<|image_pad|>")) == 64
    assert tokens.decode(ids, skip_special_tokens=True) == " Write <image>."
    with pytest.raises(ValueError, match="1 places for pictures .*, but 0 were given"):
        processor(text="<image> Which?")


def test_a_word_in_a_text_without_pictures(processor):
    """The rule is training's; only a list that is empty says that no picture is missing."""
    for said in WORDS:
        prompt = processor.apply_chat_template([{"role": "user", "content": said}])
        for text in (said, prompt):
            assert processor.decode(processor(text=text)["input_ids"][0]) == text
    for said in PLACES:
        prompt = processor.apply_chat_template([{"role": "user", "content": text} for text in ("```", said)])
        for text in (said, prompt):
            with pytest.raises(ValueError, match=r"places for pictures \(<image>\), but 0 were given"):
                processor(text=text)
            assert processor.decode(processor(text=text, images=[])["input_ids"][0]) == text
            assert processor.decode(processor(text=[text], images=[[]])["input_ids"][0]) == text
    with pytest.raises(ValueError, match="2 places"):
        processor(text=[WORDS[0], PLACES[0]])
    with pytest.raises(ValueError, match="1 places for pictures .*, but 0 were given"):
        processor(text=TRIPLE, images=[])


@pytest.mark.parametrize("said", [*WORDS, *PLACES])
def test_the_rule_for_words_is_training_s(said):
    record = json.dumps([{"role": "user", "content": said}, {"role": "assistant", "content": "A tag."}])
    if said in WORDS:
        assert parse_conversation(record, 0, "test").messages[0].texts == (said,)
    else:
        with pytest.raises(SampleFault, match="but 0 pictures"):
            parse_conversation(record, 0, "test")


def test_the_image_processor_is_the_one_of_pillow(laver, monkeypatch):
    """Where torchvision is installed, transformers would take its own, which resizes otherwise."""
    asked = []
    real = modeling_laver.AutoImageProcessor.from_pretrained

    class Recorder:
        @staticmethod
        def from_pretrained(*args, **options):
            asked.append(options)
            return real(*args, **options)

    monkeypatch.setattr(modeling_laver, "AutoImageProcessor", Recorder)
    processor = LaverProcessor.from_pretrained(laver, local_files_only=True)
    assert asked == [{"backend": "pil", "local_files_only": True}]
    assert type(processor.image_processor).__name__ == "SiglipImageProcessorPil"


def test_batches_are_padded_on_the_left(processor):
    texts, pictures = ["<image> a", "b c d", "<image> and <image>"], [picture(i) for i in range(3)]
    flat = processor(text=texts, images=pictures, padding=True, return_tensors="pt")
    nested = processor(text=texts, images=[pictures[:1], [], pictures[1:]], padding=True, return_tensors="pt")
    for name, tensor in flat.items():
        assert torch.equal(tensor, nested[name])
    assert set(flat) == {"input_ids", "attention_mask", "pixel_values"}
    for row, text, own in zip(range(3), texts, (pictures[:1], None, pictures[1:]), strict=True):
        single = processor(text=text, images=own)["input_ids"][0]
        keep = flat["attention_mask"][row].bool()
        assert flat["input_ids"][row][keep].tolist() == single
        assert keep.tolist() == sorted(keep.tolist())
    right = processor(text=texts, images=pictures, padding=True, padding_side="right")
    assert right["attention_mask"][1][0] == 1 and right["attention_mask"][1][-1] == 0


def test_text_alone_needs_no_pictures(processor):
    inputs = processor(text="a b", return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert processor.decode(inputs["input_ids"][0]) == "a b"


@pytest.mark.parametrize(
    ("text", "images", "message"),
    [
        ("<image> <image>", [picture(0)], r"2 places for pictures \(<image>\), but 1 were given"),
        ("none", picture(0), "0 places for pictures.*but 1"),
        ("<image>", None, "1 places for pictures.*but 0"),
        (["<image>", "b"], [[], [picture(0)]], r"\[1, 0\] places.*but \[0, 1\]"),
        (["a", "b"], [[]], r"\[0, 0\] places.*but \[0\]"),
        ("<|image_pad|>", picture(0), r"1 times <\|image_pad\|>, but 0 times"),
        (TRIPLE.replace("<|image_pad|>", "<|image_pad|>" * 64), picture(0), r"64 times <\|image_pad\|>, but 0 times"),
        (None, picture(0), "text is missing"),
    ],
)
def test_pictures_that_do_not_fit_the_text_are_refused(text, images, message, processor):
    with pytest.raises(ValueError, match=message):
        processor(text=text, images=images)


def test_what_cannot_be_used_is_refused(processor):
    with pytest.raises(ValueError, match="no videos and no audio"):
        processor(text="a", videos=[np.zeros((2, 3, 8, 8))])
    with pytest.raises(ValueError, match="prepared as in training; size, do_resize cannot be chosen"):
        processor(text="<image>", images=picture(0), images_kwargs={"size": 32, "do_resize": False})


def test_options_in_transformers_groups_count(processor):
    options = {"text_kwargs": {"padding": True, "padding_side": "right"}, "common_kwargs": {"return_tensors": "pt"}}
    inputs = processor(text=["a", "b c d e"], **options)
    assert inputs["attention_mask"][0].tolist() == sorted(inputs["attention_mask"][0].tolist(), reverse=True)


def test_a_processor_saved_again_prepares_the_same(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    again = LaverProcessor.from_pretrained(tmp_path)
    ours, theirs = (p(text="a <image>", images=picture(0), return_tensors="pt") for p in (processor, again))
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    assert torch.equal(ours["pixel_values"], theirs["pixel_values"])
    assert again.chat_template == processor.chat_template


# --- the chat template ------------------------------------------------------------------------------------

# A stand-in for the instruction-tuned template: tools, tool calls, text before the first tag and after the last.
_WITH_TOOLS = """
  {%- if tools %}
TOOLS {{ tools | tojson }}
{%- endif %}
{%- for message in messages %}
{%- if message.tool_calls %}
    {{- 'CALL ' + message.tool_calls[0].name + ' ' + message.role }}
{%- else %}
    {{- message['role'] + ':' + message['content'] + '|' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'assistant:' }}
{%- endif %}

"""


@pytest.mark.parametrize("template", [None, _WITH_TOOLS, "\n\n" + _WITH_TOOLS, "x" + _WITH_TOOLS], ids=range(4))
@pytest.mark.parametrize("generation", [False, True])
def test_strings_come_out_as_from_the_tokenizer(template, generation, sources):
    tokenizer = AutoTokenizer.from_pretrained(sources / "model")
    template = tokenizer.chat_template if template is None else template
    conversations = [
        [{"role": "user", "content": "hello {{ 1 }} <image>"}],
        [{"role": "system", "content": ""}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b\n"}],
        [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [{"name": "look"}]}],
    ]
    for messages in conversations:
        for tools in (None, [{"type": "function", "function": {"name": "look"}}]):
            options = {"tools": tools, "tokenize": False, "add_generation_prompt": generation}
            ours = tokenizer.apply_chat_template(messages, chat_template=description.chat_template(template), **options)
            assert ours == tokenizer.apply_chat_template(messages, chat_template=template, **options)


def test_lists_come_out_as_text_with_pictures(processor, laver):
    parts = [{"type": "image"}, {"type": "text", "text": "a"}, "b", {"type": "image_url", "image_url": {"url": "x"}}]
    messages = [{"role": "system", "content": [{"type": "text", "text": "s"}]}, {"role": "user", "content": parts}]
    expected = f"<|im_start|>system\ns<|im_end|>\n<|im_start|>user\n{TRIPLE}ab{TRIPLE}<|im_end|>\n"
    assert processor.apply_chat_template(messages) == expected
    # The tokenizer of the export reads the same file.
    tokenizer = AutoTokenizer.from_pretrained(laver)
    assert tokenizer.apply_chat_template(messages, tokenize=False) == expected
    with pytest.raises(Exception, match="a message may hold images and text, not video"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}])


def test_a_template_is_wrapped_once():
    once = description.chat_template(_WITH_TOOLS)
    assert once.endswith(_WITH_TOOLS) and once != _WITH_TOOLS
    assert description.chat_template(once) == once


def test_training_accepts_the_wrapped_template(laver):
    """An export can be where the next run starts."""
    assert SampleEncoder(AutoTokenizer.from_pretrained(laver)).default_system.startswith("You are Qwen")


# --- descriptions -----------------------------------------------------------------------------------------

TEXT = {"model_type": "qwen2", "rope_theta": 1e6, "torch_dtype": "bfloat16", "tie_word_embeddings": True}
VISION = {"model_type": "siglip_vision_model", "hidden_size": 32, "image_size": 48, "patch_size": 14}
RUN = {"feature_layer": -2, "image_token_id": 151655, "dtype": "bfloat16"}


def test_laver_config_keeps_what_the_sources_said():
    config = description.export_config("laver", TEXT, VISION, attention="causal", positions="mrope", **RUN)
    assert config["text_config"] == TEXT and config["tie_word_embeddings"] is True
    assert config["vision_config"] == VISION
    kept = ("attention", "positions", "vision_feature_layer", "image_token_id", "dtype")
    assert [config[name] for name in kept] == ["causal", "mrope", -2, 151655, "bfloat16"]


def test_llava_config_says_how_many_tokens_and_which_attention():
    mixed = description.export_config("llava", TEXT, VISION, attention="mixed", positions="1d", **RUN)
    causal = description.export_config("llava", TEXT, VISION, attention="causal", positions="1d", **RUN)
    assert mixed["image_seq_length"] == 9 and mixed["vision_feature_select_strategy"] == "full"
    assert mixed.pop("is_mm_prefix_lm") is True and mixed == causal
    for positions in ("2d", "mrope"):
        with pytest.raises(ValueError, match=f"positions {positions}.*--format laver"):
            description.export_config("llava", TEXT, VISION, attention="causal", positions=positions, **RUN)


def test_llava_drops_the_class_token_of_clip():
    clip = {**VISION, "model_type": "clip_vision_model"}
    config = description.export_config("llava", TEXT, clip, attention="causal", positions="1d", **RUN)
    assert config["image_seq_length"] == 9 and config["vision_feature_select_strategy"] == "default"
    processor = description.processor_config("llava", clip, patch_size=14)
    assert (processor["num_additional_image_tokens"], processor["vision_feature_select_strategy"]) == (1, "default")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "dinov2"}, "the tools that read this format know CLIP and SigLIP alone"),
        ({"model_type": "dinov2_with_registers", "num_register_tokens": 4}, "would take the registers for patches"),
        ({"model_type": "aimv2_vision_model"}, "the tools that read this format know CLIP and SigLIP alone"),
        ({"model_type": "aimv2_vision_model", "is_native": True}, "Llava gives every image as many"),
        ({"model_type": "qwen2_5_vl_vision"}, "Llava gives every image as many"),
        ({"model_type": "laver_patches"}, "Llava gives every image as many"),
    ],
)
def test_llava_holds_no_other_encoder(change, reason):
    message = f"cannot hold an encoder of type {change['model_type']}: .*{reason}; export with --format laver"
    with pytest.raises(ValueError, match=message):
        description.export_config("llava", TEXT, {**VISION, **change}, attention="causal", positions="1d", **RUN)
    with pytest.raises(ValueError, match=message):
        description.processor_config("llava", {**VISION, **change}, patch_size=14)


def test_unknown_words_are_refused():
    good = {
        "format": "laver", "name": "n", "encoder": "dinov2", "attention": "mixed", "positions": "2d",
        "weights": "teacher",
    }  # fmt: skip
    assert "teacher" in description.readme(**good, dtype="bfloat16")
    for name in ("format", "encoder", "attention", "positions", "weights"):
        with pytest.raises(KeyError, match="'other'"):
            description.readme(**{**good, name: "other"}, dtype="bfloat16")


def test_the_readme_warns_where_transformers_computes_something_else():
    common = {"name": "n", "encoder": "clip_vision_model", "weights": "student", "dtype": "bfloat16"}
    for format, attention, positions in (("laver", "mixed", "1d"), ("llava", "mixed", "1d"), ("llava", "causal", "1d")):
        text = description.readme(format=format, attention=attention, positions=positions, **common)
        assert ("is_mm_prefix_lm" in text) == (format == "llava" and attention == "mixed")
        assert ("trust_remote_code" in text) == (format == "laver")
        assert "training_state" not in text
    text = description.readme(format="laver", attention="mixed", positions="2d", training_state=True, **common)
    assert "training_state.safetensors" in text


@pytest.mark.parametrize("format", ["laver", "llava"])
def test_the_readme_s_example_runs(format, laver, llava, monkeypatch, capsys):
    directory = {"laver": laver, "llava": llava}[format]
    monkeypatch.chdir(directory)
    picture(7).save("photo.jpg")
    (code,) = re.findall("```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL)
    assert len(code.splitlines()) <= 15
    # A random model may answer with special tokens alone.
    code = code.replace("max_new_tokens=128", "max_new_tokens=3").replace("tokens=True", "tokens=False")
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()


# --- llava in stock transformers --------------------------------------------------------------------------


def test_llava_s_own_processor_prepares_the_same(llava, processor):
    stock = AutoProcessor.from_pretrained(llava)
    assert type(stock) is LlavaProcessor
    content = [{"type": "image"}, {"type": "text", "text": "What is it?"}, {"type": "image"}]
    messages = [{"role": "user", "content": content}]
    prompt = stock.apply_chat_template(messages, add_generation_prompt=True)
    assert prompt == processor.apply_chat_template(messages, add_generation_prompt=True)
    pictures = [picture(0), picture(1)]
    theirs = stock(text=prompt, images=pictures, return_tensors="pt")
    ours = processor(text=prompt, images=pictures, return_tensors="pt")
    assert theirs["input_ids"].tolist() == ours["input_ids"].tolist()
    # Where torchvision is installed, stock transformers resizes with it: off by one of 255 levels, of -1 to 1.
    tolerance = 1 / 127 if importlib.util.find_spec("torchvision") else 0.0
    assert (theirs["pixel_values"] - ours["pixel_values"]).abs().max() <= tolerance
    model, found = LlavaForConditionalGeneration.from_pretrained(llava, output_loading_info=True)
    assert not any(found.values()), found
    assert model(**theirs).logits.shape[1] == ours["input_ids"].shape[1]
    assert type(AutoModelForImageTextToText.from_pretrained(llava)) is LlavaForConditionalGeneration


# --- examples/chat.py -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chat():
    spec = importlib.util.spec_from_file_location("chat_example", CHAT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("format", ["laver", "llava"])
def test_chat_answers_and_remembers(format, chat, laver, llava, tmp_path, monkeypatch, capsys):
    directory = {"laver": laver, "llava": llava}[format]
    for number in range(2):
        picture(number).save(tmp_path / f"{number}.png")
    typed = iter(["What is this?", "And that?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    asked = []
    real = chat.Chat.ask
    monkeypatch.setattr(chat.Chat, "ask", lambda self, question: asked.append((self, real(self, question))))
    images = ["--image", str(tmp_path / "0.png"), str(tmp_path / "1.png")]
    code = chat.main(["--model", str(directory), *images, "--max-new-tokens", "5", "--device", "cpu"])
    printed = capsys.readouterr()
    assert code == 0 and len(asked) == 2
    for conversation, answer in asked:
        assert answer and answer.strip() in printed.out
        assert [m["role"] for m in conversation.messages] == ["user", "assistant"] * 2
        kinds = [[part["type"] for part in m["content"]] for m in conversation.messages]
        assert kinds == [["image", "image", "text"], ["text"], ["text"], ["text"]]
    assert ("mixed attention" in printed.err) == (format == "llava")


@pytest.mark.parametrize("format", ["laver", "llava"])
@pytest.mark.parametrize("num_pictures", [0, 1])
def test_chat_may_speak_of_the_word_image(format, num_pictures, chat, laver, llava, monkeypatch):
    """In a question at the start of a line, and in an answer, whose words are in all later prompts."""
    directory = {"laver": laver, "llava": llava}[format]
    talk = chat.Chat(directory, format, [picture(0)] * num_pictures, torch.device("cpu"), "auto", 3)
    tokenizer, seen = talk.processor.tokenizer, []

    def generate(input_ids, **inputs):
        seen.append(input_ids[0].tolist())
        said = tokenizer("<image>", return_tensors="pt")["input_ids"]
        return torch.cat([input_ids, said], 1)

    monkeypatch.setattr(talk.model, "generate", generate)
    for number, question in enumerate(["<image> is a tag?", "Is <image>", "And?"]):
        assert talk.ask(question) == "<image>"
        words = tokenizer.decode(seen[number])
        assert words.count("<image>") == number + min(number + 1, 2)
        assert seen[number].count(tokenizer.convert_tokens_to_ids("<|image_pad|>")) == 64 * num_pictures


@pytest.mark.processes
def test_chat_is_a_program(laver, tmp_path):
    picture(0).save(tmp_path / "photo.png")
    command = [sys.executable, str(CHAT), "--model", str(laver), "--image", "photo.png", "--question", "What?"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run(
        [*command, "--max-new-tokens", "4", "--dtype", "bfloat16"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip()


def test_chat_says_what_is_wrong(chat, laver, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "config.json").write_text('{"model_type": "qwen2"}')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "note.jpg").write_text("no picture")
    (tmp_path / "page.jpg").write_text("\n<!DOCTYPE HTML>\n<p>404")
    (tmp_path / "empty.jpg").touch()
    for arguments, message in (
        (["--model", tmp_path / "none"], "none: no such directory"),
        (["--model", tmp_path / "empty"], "has no config.json"),
        (["--model", tmp_path / "text"], "a model of type 'qwen2', not an export"),
        (["--model", tmp_path / "broken"], "config.json cannot be read"),
        (["--model", laver, "--image", tmp_path / "none.jpg"], "none.jpg: no such file"),
        (
            ["--model", laver, "--image", tmp_path / "note.jpg"],
            "note.jpg is not a picture that can be read: it begins b'no pictu'",
        ),
        (
            ["--model", laver, "--image", tmp_path / "page.jpg"],
            "page.jpg is not a picture that can be read: it is an HTML",
        ),
        (
            ["--model", laver, "--image", tmp_path / "empty.jpg"],
            "empty.jpg is not a picture that can be read: it is empty",
        ),
        (["--model", laver, "--device", "abacus"], "--device abacus"),
    ):
        assert chat.main([str(argument) for argument in arguments]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        chat.main(["--model", str(laver), "--max-new-tokens", "0"])
    assert "'0' is not a positive number" in capsys.readouterr().err
