"""The adapters of examples/evaluation, driven by requests like those of lmms-eval and VLMEvalKit.

Their base classes are the real ones where these packages are installed; elsewhere stand-ins of a few lines take
their place, which hold just what the adapters use.
"""

import importlib.util
import io
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from laver_megatron.data.read.images import decode_image
from laver_megatron.encoders import open_preprocessor
from tests.exports import random_export
from tests.picture_files import picture_files

ADAPTERS = Path(__file__).resolve().parents[2] / "examples" / "evaluation"
NUM_NEW = 6


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """A random model with mixed attention and 2d positions, in laver format, with tokenizer and processor."""
    return random_export(tmp_path_factory.mktemp("evaluation"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Files of three pictures that are unlike each other."""
    directory = tmp_path_factory.mktemp("pictures")
    shown = [Image.linear_gradient("L"), Image.radial_gradient("L"), Image.new("RGB", (90, 40), "red")]
    files = [directory / f"{number}.png" for number in range(3)]
    for picture, file in zip(shown, files, strict=True):
        picture.save(file)
    return files


def adapter(name, stand_ins, monkeypatch):
    """The adapter's module; stand_ins: {module: {name: object}} where the package is not installed."""
    if importlib.util.find_spec(next(iter(stand_ins))) is None:
        for module, contents in stand_ins.items():
            monkeypatch.setitem(sys.modules, module, ModuleType(module))
            vars(sys.modules[module]).update(contents)
    spec = importlib.util.spec_from_file_location(name, ADAPTERS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class LmmsStandIn:
    """Of `lmms_eval.api.model.lmms`."""

    def __init__(self):
        self._rank, self._world_size, self.task_dict = 0, 1, {}
        self.cache_hook = SimpleNamespace(add_partial=lambda attribute, request, result: None)


class BaseModelStandIn:
    """Of `vlmeval.vlm.base.BaseModel`."""

    def generate(self, message, dataset=None):
        return self.generate_inner(message, dataset)

    def chat(self, messages, dataset=None):
        return self.chat_inner(messages, dataset=dataset)


@pytest.fixture
def laver_of_lmms_eval(export, monkeypatch):
    stand_ins = {"lmms_eval": {}, "lmms_eval.api": {}, "lmms_eval.api.model": {"lmms": LmmsStandIn}}
    module = adapter("lmms_eval_laver", stand_ins, monkeypatch)

    def build(documents=(), **settings):
        model = module.Laver(pretrained=str(export), device="cpu", **settings)
        model.task_dict = {"task": {"test": list(documents)}}
        return model

    build.module = module
    return build


@pytest.fixture
def laver_of_vlmeval(export, monkeypatch):
    stand_ins = {"vlmeval": {}, "vlmeval.vlm": {}, "vlmeval.vlm.base": {"BaseModel": BaseModelStandIn}}
    return adapter("vlmeval_laver", stand_ins, monkeypatch).Laver(str(export), max_new_tokens=NUM_NEW)


@pytest.fixture(scope="module")
def answer(export):
    """The answer of the export itself, one question at a time: text in which <image> stands for a picture."""
    processor = AutoProcessor.from_pretrained(export, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(export, trust_remote_code=True)

    def of(question, files, system=None, num_new=NUM_NEW):
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": question})
        text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        inputs = processor(text=text, images=[Image.open(file) for file in files], return_tensors="pt")
        tokens_1L = model.generate(**inputs, do_sample=False, max_new_tokens=num_new)
        return processor.decode(tokens_1L[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    return of


def conversation(document):
    """lmms-eval's messages of a document of this test: a list of words and pictures."""
    content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "url": p} for p in document]
    return [{"role": "user", "content": content}]


def request(number, **settings):
    settings = {"max_new_tokens": NUM_NEW, "until": ["\n\n"], **settings}
    return SimpleNamespace(args=("context", conversation, settings, number, "task", "test"))


@pytest.fixture
def documents(pictures):
    """No picture, one as an object, two and three as in VLMEvalKit's and lmms-eval's own tasks; a mark to drop."""
    opened = Image.open(pictures[0])
    return [
        ["How many people are there?"],
        [opened, "What is it?"],
        [opened, "and", Image.open(pictures[1]), "differ in what?"],
        [Image.open(file) for file in pictures] + ["<image> Which one is red? Answer with its number alone."],
    ]


@pytest.fixture
def expected(answer, pictures):
    return [
        answer("How many people are there?", []),
        answer("<image>What is it?", pictures[:1]),
        answer("<image>and<image>differ in what?", pictures[:2]),
        answer("<image><image><image> Which one is red? Answer with its number alone.", pictures),
    ]


def test_questions_of_the_test_have_different_answers(expected):
    assert len(set(expected)) == len(expected) and all(expected)


@pytest.mark.parametrize("batch_size", [1, 4, "3"])
def test_lmms_eval_batches_are_single_questions(laver_of_lmms_eval, documents, expected, batch_size):
    """Rows of other lengths, other numbers of pictures and none, padded on the left; and the order is kept."""
    model = laver_of_lmms_eval(documents, batch_size=batch_size)
    order = [2, 0, 3, 1]
    assert model.generate_until([request(number) for number in order]) == [expected[number] for number in order]


def test_lmms_eval_settings_are_each_requests_own(laver_of_lmms_eval, documents, expected, answer, pictures):
    model = laver_of_lmms_eval(documents, batch_size=4, max_new_tokens=2)
    short = request(1)
    del short.args[2]["max_new_tokens"]
    stop = expected[2][len(expected[2]) // 2]
    requests = [request(0), short, request(2, until=[stop]), request(3, temperature=0)]
    got = model.generate_until(requests)
    assert got == [
        expected[0],
        answer("<image>What is it?", pictures[:1], num_new=2),
        expected[2].split(stop)[0].strip(),
        expected[3],
    ]
    assert got[1] != expected[1] and got[2] != expected[2]


def test_lmms_eval_takes_a_system_prompt(laver_of_lmms_eval, documents, expected, answer, pictures):
    (got,) = laver_of_lmms_eval(documents, system_prompt="Be brief.").generate_until([request(1)])
    assert got == answer("<image>What is it?", pictures[:1], system="Be brief.") != expected[1]


def test_lmms_eval_refuses_what_it_cannot_do(laver_of_lmms_eval):
    with pytest.raises(ValueError, match="--batch_size is 'auto'"):
        laver_of_lmms_eval(batch_size="auto")
    model = laver_of_lmms_eval([["a film"]])
    film = SimpleNamespace(
        args=("", lambda d: [{"role": "user", "content": [{"type": "video", "url": "x"}]}], {}, 0, "task", "test")
    )
    with pytest.raises(ValueError, match="task, document 0: laver sees pictures, but no video"):
        model.generate_until([film])
    for method in (model.loglikelihood, model.generate_until_multi_round):
        with pytest.raises(NotImplementedError, match="generate_until"):
            method([])


def test_lmms_eval_is_told_that_conversations_are_wanted(laver_of_lmms_eval):
    assert laver_of_lmms_eval.module.Laver.is_simple is False


def parts(*words_and_files):
    return [
        {"type": "image", "value": str(part)} if isinstance(part, Path) else {"type": "text", "value": part}
        for part in words_and_files
    ]


def test_vlmeval_questions(laver_of_vlmeval, pictures, expected):
    first, second, third = pictures
    assert laver_of_vlmeval.INTERLEAVE
    questions = [
        parts("How many people are there?"),
        parts(first, "What is it?"),
        parts(first, "and", second, "differ in what?"),
        parts(first, second, third, "<image> Which one is red? Answer with its number alone."),
    ]
    assert [laver_of_vlmeval.generate(question, dataset="MMBench") for question in questions] == expected


def test_the_word_image_stays_where_there_is_no_picture(
    laver_of_lmms_eval, laver_of_vlmeval, documents, expected, answer
):
    """In a batch with pictures, too."""
    question = "What does <image> do in HTML?"
    model = laver_of_lmms_eval([[question], documents[1], ["<image>"]], batch_size=3)
    known = answer(question, [])
    assert known != answer(question.replace("<image>", ""), [])
    assert model.generate_until([request(0), request(1), request(2)])[:2] == [known, expected[1]]
    assert laver_of_vlmeval.generate(parts(question)) == known


def test_vlmeval_conversations(laver_of_vlmeval, export, pictures):
    turns = [
        {"role": "user", "content": parts(pictures[0], "What is it?")},
        {"role": "assistant", "content": parts("A gradient.")},
        {"role": "user", "content": parts("And this?", pictures[1])},
    ]
    processor = AutoProcessor.from_pretrained(export, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(export, trust_remote_code=True)
    words = [("user", "<image>What is it?"), ("assistant", "A gradient."), ("user", "And this?<image>")]
    messages = [{"role": role, "content": text} for role, text in words]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = processor(text=text, images=[Image.open(file) for file in pictures[:2]], return_tensors="pt")
    tokens_1L = model.generate(**inputs, do_sample=False, max_new_tokens=NUM_NEW)
    theirs = processor.decode(tokens_1L[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert laver_of_vlmeval.chat(turns) == theirs != laver_of_vlmeval.chat(turns[:1])


def test_adapters_see_the_pixels_of_training(laver_of_lmms_eval, laver_of_vlmeval, export, tmp_path, monkeypatch):
    """Of every mode, transparent or not, turned or not: what either adapter hands to the model, to the bit."""
    preprocessor = open_preprocessor(export.parent / "encoder")
    seen = []

    def generate(input_ids, pixel_values, **settings):
        seen.append(pixel_values[0])
        return input_ids

    of_lmms_eval, of_vlmeval = laver_of_lmms_eval(), laver_of_vlmeval
    monkeypatch.setattr(of_lmms_eval.model, "generate", generate)
    monkeypatch.setattr(of_vlmeval.model, "generate", generate)
    for number, (name, content) in enumerate(picture_files().items()):
        expected_3HW = preprocessor(decode_image(content))
        path = tmp_path / str(number)
        path.write_bytes(content)
        of_lmms_eval.task_dict = {"task": {"test": [[Image.open(io.BytesIO(content)), "What?"]]}}
        of_lmms_eval.generate_until([request(0)])
        of_vlmeval.generate(parts(path, "What?"))
        assert [torch.equal(pixels_3HW, expected_3HW) for pixels_3HW in seen] == [True, True], name
        seen.clear()


def test_vlmeval_refuses_films(laver_of_vlmeval):
    with pytest.raises(ValueError, match="no video"):
        laver_of_vlmeval.generate_inner([{"type": "video", "value": "film.mp4"}])
