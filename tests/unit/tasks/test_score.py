"""Scores of exports: agreement with teacher forcing, wrong pictures, contrastive decoding, the command."""

import importlib.util
import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen2ForCausalLM, SiglipVisionModel

from laver_megatron.data.read.conversations import Message
from laver_megatron.data.read.images import decode_image
from laver_megatron.data.read.sample_encoder import SampleEncoder
from laver_megatron.demo.encoders import save_encoder
from laver_megatron.demo.models import save_language_model
from laver_megatron.objective.language import IGNORE_LABEL
from laver_megatron.tasks.contrast import blank_like, contrast_logits
from laver_megatron.tasks.exported import ExportedModel
from laver_megatron.tasks.make import make_tasks
from laver_megatron.tasks.sample import TaskSettings
from laver_megatron.tasks.score import Sample, by_family, normalised, read_samples, score, swap_partners
from laver_megatron.tasks.score_command import main
from tests.exports import add_processor, write_export

CHAT = Path(__file__).parents[3] / "examples" / "chat.py"
QUESTIONS = "In which corner is the square? In which corner is the circle? top left bottom right user assistant system"


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Path:
    return _export(tmp_path_factory.mktemp("score"), format="laver", attention="mixed", positions="2d")


def _export(place: Path, *, format: str, attention: str, positions: str) -> Path:
    """A small random model."""
    save_language_model(place / "model", [QUESTIONS])
    save_encoder(place / "encoder")
    torch.manual_seed(0)
    language = Qwen2ForCausalLM.from_pretrained(place / "model")
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    with torch.no_grad():  # a fresh model with tied embeddings repeats its last token for ever
        for weight in language.parameters():
            if weight.ndim == 2:
                weight.normal_(0.0, weight.shape[1] ** -0.5)
        language.model.embed_tokens.weight[len(tokenizer) :] = 0
    write_export(
        place / "export",
        language,
        SiglipVisionModel.from_pretrained(place / "encoder"),
        torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 128)),
        text_config=json.loads((place / "model" / "config.json").read_text()),
        vision_config=json.loads((place / "encoder" / "config.json").read_text()),
        attention=attention,
        positions=positions,
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        format=format,
    )
    return add_processor(place / "export", place / "model", place / "encoder")


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("shards") / "set"
    make_tasks(TaskSettings(1, 8, 8, families=("position", "conjunction"), levels=(1,)), place)
    return place


def _teacher_forced(model: ExportedModel, sample: Sample, encoder: SampleEncoder) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits `[tokens, words]` of a sample with its answer, and its labels."""
    pixels = model._processor._prepare(list(sample.read_pictures()))
    (count,) = model._processor._count_tokens(pixels)
    encoded = encoder.encode(sample.messages, [(1, count)], sample.key)
    inputs = {name: torch.as_tensor(value) for name, value in pixels.items()}
    return model._model(input_ids=encoded.tokens_T[None], **inputs).logits[0], encoded.labels_T


def test_generation_agrees_with_teacher_forcing(export, shards):
    """A model that has learnt two of four samples by heart."""
    model = ExportedModel(export, "cpu")
    encoder = SampleEncoder(model._processor.tokenizer)
    samples = read_samples([str(shards / "train-00.tar")], None)[0][:4]
    learnt = samples[:2]
    parameters = [it for name, it in model._model.named_parameters() if "vision_tower" not in name]
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    losses = [torch.inf]
    for _ in range(300):
        if max(losses) < 0.2:
            break
        losses = []
        for sample in learnt:
            logits_TW, labels_T = _teacher_forced(model, sample, encoder)
            loss = torch.nn.functional.cross_entropy(logits_TW, labels_T, ignore_index=IGNORE_LABEL)
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        forced = []
        for sample in samples:
            logits_TW, labels_T = _teacher_forced(model, sample, encoder)
            trained_T = labels_T != IGNORE_LABEL
            forced.append(bool((logits_TW.argmax(-1) == labels_T)[trained_T].all()))
    answers = score(model, samples, max_new_tokens=8)
    right = [it["right"] == it["expected"] for it in answers]
    assert all(forced[:2]) and not all(forced), (losses, forced)
    assert right == forced, [(it["right"], it["expected"]) for it in answers]
    table = by_family(answers, ["right"])
    assert table["all"]["right"] == sum(forced) / 4 and table["all"]["num_answers"] == 4
    assert {"position", "conjunction", "all"} == set(table)


@torch.no_grad()
def test_contrast_step_by_step_is_what_whole_passes_give(export):
    model = ExportedModel(export, "cpu")
    red = Image.new("RGB", (40, 60), (220, 20, 20))
    asked = [Message("user", ("", "In which corner is the square?"))]
    prompt = model._processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "In which corner is the square?"}]}],
        add_generation_prompt=True,
    )
    said = {}
    for alpha in (0.0, 3.0):
        inputs, blank = (model._inputs(prompt, [it]) for it in (red, blank_like(red)))
        tokens = inputs["input_ids"]
        for _ in range(6):
            logits = []
            for form in (inputs, blank):
                pixels = {name: value for name, value in form.items() if name not in ("input_ids", "attention_mask")}
                logits.append(model._model(input_ids=tokens, **pixels, use_cache=False).logits[:, -1])
            scores = contrast_logits(*logits, alpha)
            scores[:, model._model.config.image_token_id] = -torch.inf
            tokens = torch.cat([tokens, scores.argmax(-1, keepdim=True)], 1)
            if tokens[0, -1] == model._turn_end:
                break
        new = tokens[0, inputs["input_ids"].shape[1] :]
        said[alpha] = model._processor.tokenizer.decode(new, skip_special_tokens=True)
        assert model.answer(asked, [red], contrast=alpha, max_new_tokens=6) == said[alpha]
    assert said[0.0] != said[3.0], "contrast changes what is said"

    talk = _chat().Chat(export, "laver", [red], torch.device("cpu"), "auto", 6, contrast=3.0)
    assert talk.ask("In which corner is the square?") == said[3.0]


def test_contrast_prefers_what_the_picture_makes_likelier_among_the_plausible():
    right = torch.tensor([[2.0, 1.9, -3.0]])
    blank = torch.tensor([[2.0, 0.0, -9.0]])
    assert contrast_logits(right, blank, 0.0)[0, :2].tolist() == right[0, :2].tolist()
    contrasted = contrast_logits(right, blank, 1.0)[0]
    assert contrasted.tolist() == pytest.approx([2.0, 3.8, -torch.inf])
    assert contrast_logits(right, blank, 1.0, cutoff=1e-4)[0, 2] == pytest.approx(3.0)


class Fixed:
    """Says what it has for (question, mean colour of the picture)."""

    def answer(self, asked, pictures, *, contrast, max_new_tokens):
        return "Red." if pictures and pictures[0].getpixel((0, 0)) == (255, 0, 0) else "blue"


def _sample(key: str, colour: str, family: str, answer: str) -> Sample:
    messages = (Message("user", ("", "Which?")), Message("assistant", (answer,), True))
    return Sample(key, family, 0.5, messages, 1, lambda: (Image.new("RGB", (8, 8), colour),))


def test_wrong_pictures_show_how_far_answers_follow_the_text():
    samples = [_sample("a", "red", "x", "red"), _sample("b", "blue", "x", "blue"), _sample("c", "red", "y", "blue")]
    answers = score(Fixed(), samples, images=("right", "blank", "swapped"))
    assert [it["right"] for it in answers] == ["Red.", "blue", "Red."]
    assert [it["blank"] for it in answers] == ["blue"] * 3
    assert [it["swapped"] for it in answers] == ["blue", "Red.", "Red."]  # the only one of y takes the first's
    table = by_family(answers, ["right", "blank", "swapped"])
    assert table["x"] == {
        "num_answers": 2, "chance": 0.5, "right": 1.0, "blank": 0.5, "same_blank": 0.5, "swapped": 0.0,
        "same_swapped": 0.0,
    }  # fmt: skip
    assert table["y"]["right"] == 0.0 and table["all"]["right"] == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="'a' is the only one with 1 pictures"):
        swap_partners(samples[:1])


def test_case_spaces_and_a_full_stop_do_not_count():
    assert normalised(" Top  left.\n") == normalised("top left") != normalised("top right")


def test_samples_are_chosen_at_random_but_always_the_same(shards):
    every, unusable = read_samples([str(shards / "valid-00.tar")], None)
    some = read_samples([str(shards / "valid-00.tar")], 3)[0]
    assert len(every) == 8 and unusable == 0 and len(some) == 3
    assert [it.key for it in some] == [it.key for it in read_samples([str(shards / "valid-00.tar")], 3)[0]]
    assert every[0].family == "position" and every[0].chance == 0.25 and every[0].num_pictures == 1


def test_only_the_pictures_in_use_are_in_memory(shards, monkeypatch):
    decoded, most = [], 0

    def decode(content):
        picture = decode_image(content)
        decoded.append(weakref.ref(picture))
        return picture

    class Counting(Fixed):
        def answer(self, *args, **keywords):
            nonlocal most
            most = max(most, sum(picture() is not None for picture in decoded))
            return super().answer(*args, **keywords)

    monkeypatch.setattr("laver_megatron.tasks.score.decode_image", decode)
    samples, _ = read_samples([str(shards / "valid-00.tar")], None)
    assert len(score(Counting(), samples, images=("right", "blank", "swapped"))) == 8
    assert len(decoded) == 24 and most <= 4, "the right ones and the swapped ones, of one sample or of two"


def test_a_model_of_damaged_weights_has_no_accuracy(export, shards, tmp_path, capsys):
    shutil.copytree(export, tmp_path / "damaged")
    path = tmp_path / "damaged" / "model.safetensors"
    tensors = load_file(path)
    tensors["language_model.model.norm.weight"][0] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})
    for words in ([], ["--contrast", "1"]):
        with pytest.raises(SystemExit) as ended:
            main(["--model", str(path.parent), "--data-path", str(shards / "valid-00.tar"), *words])
        said, error = capsys.readouterr()
        assert ended.value.code == 2 and not said
        assert "sample 'valid-0000000' with right pictures: the model's logits are not finite" in error
        assert "laver inspect" in error


def test_the_command_writes_table_and_answers(export, shards, tmp_path, capsys):
    arguments = ["--model", str(export), "--data-path", str(shards / "valid-00.tar"), "--samples", "2"]
    output = tmp_path / "scores.json"
    main([*arguments, "--images", "right", "blank", "--max-new-tokens", "2", "--output", str(output)])
    assert "same_blank" in capsys.readouterr().out
    written = json.loads(output.read_text())
    assert written["table"]["all"]["num_answers"] == 2 == len(written["answers"]) and written["device"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", "0"], "'0' must be a positive integer"),
        (["--contrast", "-1"], "'-1' must be a number from 0 to 100"),
        (["--contrast", "nan"], "must be a number from 0 to 100"),
        (["--contrast", "1e308"], "must be a number from 0 to 100"),
        (["--data-path", "nowhere.tar"], "nowhere.tar"),
        (["--model", "nowhere"], "nowhere is no directory with a config.json"),
        (["--device", "abacus"], "--device abacus: "),
        (["--output", "/nowhere/bias.json"], "--output /nowhere/bias.json: /nowhere is no directory"),
        (["--output", "/"], "--output / is a directory"),
        (["--data-path", "TEXT", "--images", "blank"], "need samples with pictures"),
        (["--data-path", "TEXT", "--contrast", "1"], "--contrast needs samples with pictures"),
    ],
)
def test_refuses(arguments, message, export, shards, capsys):
    arguments = [str(shards / "text/valid-00.tar") if it == "TEXT" else it for it in arguments]
    with pytest.raises(SystemExit) as ended:
        main(["--model", str(export), "--data-path", str(shards / "valid-00.tar"), *arguments])
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_refuses_exports_whose_answers_would_be_wrong_and_damaged_ones(export, shards, tmp_path, capsys):
    """transformers' own Llava computes causal attention, whatever its config.json says."""
    mixed, damaged = tmp_path / "mixed", tmp_path / "damaged"
    mixed.mkdir()
    (mixed / "config.json").write_text('{"model_type": "llava", "is_mm_prefix_lm": true}')
    shutil.copytree(export, damaged)
    (damaged / "model.safetensors").write_bytes(b"")
    for model, message in ((mixed, "was trained with mixed attention"), (damaged, f"{damaged} cannot be loaded")):
        with pytest.raises(SystemExit) as ended:
            main(["--model", str(model), "--data-path", str(shards / "valid-00.tar")])
        assert ended.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("strength", ["-1", "nan", "1e308", "strong"])
def test_chat_refuses_strengths_without_sense(export, capsys, strength):
    with pytest.raises(SystemExit) as ended:
        _chat().main(["--model", str(export), "--image", "x.png", "--contrast", strength])
    assert ended.value.code == 2 and "is not a number from 0 to 100" in capsys.readouterr().err


@torch.no_grad()
def test_chat_contrasts_with_an_export_of_transformers_own_classes(tmp_path):
    """Its plain Llava: every answer is what whole passes give, and that of the second turn sees the first."""
    chat, red = _chat(), Image.new("RGB", (40, 60), (220, 20, 20))
    export = _export(tmp_path, format="llava", attention="causal", positions="1d")
    said = {}
    for alpha in (0.0, 3.0):
        talk = chat.Chat(export, "llava", [red], torch.device("cpu"), "auto", 6, contrast=alpha)
        said[alpha] = [talk.ask("In which corner is the square?"), talk.ask("In which corner is the circle?")]
        for number, answer in enumerate(said[alpha]):
            prompt = talk.processor.apply_chat_template(talk.messages[: 2 * number + 1], add_generation_prompt=True)
            forms = [talk._inputs(prompt, [it]) for it in (red, blank_like(red))]
            start = forms[0]["input_ids"].shape[1]
            tokens = forms[0]["input_ids"]
            for _ in range(6):
                right, blank = (
                    talk.model(input_ids=tokens, pixel_values=form["pixel_values"]).logits[:, -1] for form in forms
                )
                tokens = torch.cat([tokens, contrast_logits(right, blank, alpha).argmax(-1, keepdim=True)], 1)
                if tokens[0, -1] == talk.processor.tokenizer.eos_token_id:
                    break
            assert answer == talk.processor.tokenizer.decode(tokens[0, start:], skip_special_tokens=True)
    assert said[0.0] != said[3.0], "contrast changes what is said"


@pytest.mark.parametrize(
    ("words", "message"), [([], "there are none; add --image"), (["--image", "x.png"], "needs the package")]
)
def test_chat_refuses_contrast_before_the_model_is_loaded(export, capsys, monkeypatch, words, message):
    chat = _chat()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert chat.main(["--model", str(export), "--contrast", "1", *words]) == 2
    assert message in capsys.readouterr().err


def _chat():
    spec = importlib.util.spec_from_file_location("chat_of_score", CHAT)
    chat = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(chat)
    return chat
