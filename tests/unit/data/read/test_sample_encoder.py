import random
from dataclasses import replace

import pytest
import torch
from transformers import Qwen2Tokenizer

from laver_megatron.data.read.conversations import Message
from laver_megatron.data.read.sample_encoder import SampleEncoder
from laver_megatron.objective.language import IGNORE_LABEL
from tests.content import messages_of

GRID = (2, 3)
PADS = "<|vision_start|>" + "<|image_pad|>" * 6 + "<|vision_end|>"

CONVERSATIONS = {
    "one turn": ["user: <image>\nWhat is it?", "assistant: A cat."],
    "image last": ["user: What is this? <image>", "assistant: A cat."],
    "two images in a row": ["user: <image><image>Which?", "assistant: The second."],
    "images in two turns": [
        "user: <image> One?",
        "assistant: Yes.",
        "user: And <image> this?",
        "assistant: No.",
    ],
    "text only": ["user: Two plus three?", "assistant: Five."],
    "own system prompt": ["system: Be brief.", "user: <image>Well?", "assistant: Yes."],
    "empty system prompt": ["system: ", "user: Well?", "assistant: Yes."],
    "white space around": ["user: \n\n  <image> \n", "assistant: \n  indented\n\n"],
    "other scripts": ["user: <image>Où est le café? 猫はどこ", "assistant: 在这里 e\u0301 👍🏽."],
    "special token in text": ["user: Say <|endoftext|> or <|im_start|>", "assistant: <|video_pad|>."],
    "no answer": ["user: <image>Hello?"],
    "image in the answer": ["user: Draw.", "assistant: Here: <image> so."],
}


def grids_of(messages):
    return [GRID] * sum(message.num_images for message in messages)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_tokens_equal_apply_chat_template(tokenizer, encoder, name):
    messages = messages_of(CONVERSATIONS[name])
    encoded = encoder.encode(messages, grids_of(messages), "key")
    written_out = [{"role": message.role, "content": PADS.join(message.texts)} for message in messages]
    assert encoded.tokens_T.tolist() == tokenizer.apply_chat_template(written_out)["input_ids"]


def test_labels_are_the_next_tokens_of_the_answers(tokenizer, encoder):
    messages = messages_of(CONVERSATIONS["images in two turns"])
    encoded = encoder.encode(messages, grids_of(messages), "key")
    trained_T = encoded.labels_T != IGNORE_LABEL
    assert torch.equal(encoded.labels_T[:-1][trained_T[:-1]], encoded.tokens_T[1:][trained_T[:-1]])
    assert tokenizer.decode(encoded.labels_T[trained_T]) == "Yes.<|im_end|>No.<|im_end|>"
    # The first label of an answer sits on the newline that ends "<|im_start|>assistant\n".
    first = int(trained_T.nonzero()[0])
    assert tokenizer.decode(encoded.tokens_T[first - 2 : first + 1]) == "<|im_start|>assistant\n"


def test_nothing_else_is_trained(tokenizer, encoder):
    def trained(name):
        messages = messages_of(CONVERSATIONS[name])
        labels_T = encoder.encode(messages, grids_of(messages), "key").labels_T
        return tokenizer.decode(labels_T[labels_T != IGNORE_LABEL])

    assert trained("no answer") == ""
    assert trained("own system prompt") == "Yes.<|im_end|>"
    assert trained("image in the answer") == "Here:  so.<|im_end|>"


def test_an_untrained_answer_has_no_labels(tokenizer, encoder):
    question, wrong, again, right = messages_of(["user: A", "assistant: WRONG", "user: C", "assistant: D"])
    unmarked = encoder.encode([question, wrong, again, right], [], "key")
    marked = encoder.encode([question, replace(wrong, is_trained=False), again, right], [], "key")
    assert torch.equal(marked.tokens_T, unmarked.tokens_T)
    assert tokenizer.decode(unmarked.labels_T[unmarked.labels_T != IGNORE_LABEL]) == "WRONG<|im_end|>D<|im_end|>"
    assert tokenizer.decode(marked.labels_T[marked.labels_T != IGNORE_LABEL]) == "D<|im_end|>"


def test_a_shortened_sample_ends_with_a_trained_answer(encoder):
    messages = messages_of(["user: A", "assistant: B", "user: C", "assistant: WRONG", "user: E", "assistant: F"])
    messages[3] = replace(messages[3], is_trained=False)
    whole, alone = (encoder.encode(turns, [], "key") for turns in (messages, messages[:2]))
    assert_same_sample(encoder.encode(messages, [], "key", (len(whole) - 1, 9)), alone)


def test_the_word_image_is_text_where_it_is_no_place(tokenizer, encoder):
    answer = "![fig](<image>)"
    messages = [*messages_of(["user: <image>\nCopy it."]), Message("assistant", (answer,), True)]
    encoded = encoder.encode(messages, [GRID], "key")
    assert encoded.num_visual_tokens == 6
    assert tokenizer.decode(encoded.labels_T[encoded.labels_T != IGNORE_LABEL]) == f"{answer}<|im_end|>"


def test_an_image_lies_in_raster_order(encoder):
    encoded = encoder.encode(messages_of(["user: a <image> b <image>"]), [(2, 3), (1, 2)], "key")
    visual_T = encoded.image_number_T >= 0
    assert torch.equal(visual_T, encoded.tokens_T == encoder.image_pad)
    assert encoded.image_number_T[visual_T].tolist() == [0] * 6 + [1] * 2
    assert encoded.row_T[visual_T].tolist() == [0, 0, 0, 1, 1, 1, 0, 0]
    assert encoded.col_T[visual_T].tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert not encoded.row_T[~visual_T].any() and not encoded.col_T[~visual_T].any()
    assert encoded.num_visual_tokens == 8


@pytest.mark.parametrize("text, num_pictures", [("Hello", 1), ("<image>", 0), ("<image> <image>", 3)])
def test_placeholders_must_match_the_pictures(encoder, text, num_pictures):
    message = f"'some/key': the text has places for {text.count('<image>')} pictures but there are {num_pictures}"
    with pytest.raises(ValueError, match=message):
        encoder.encode(messages_of([f"user: {text}"]), [GRID] * num_pictures, "some/key")


def test_image_tokens_spelt_out_are_refused(encoder):
    with pytest.raises(ValueError, match=r"'k': the text holds 2 image tokens but there are 1 pictures"):
        encoder.encode(messages_of(["user: <image> <|image_pad|>"]), [GRID], "k")


def test_tokenizer_without_a_special_token_or_with_another_template(tokenizer):
    poor = Qwen2Tokenizer(vocab={"a": 0}, merges=[], chat_template=tokenizer.chat_template)
    with pytest.raises(ValueError, match=r"no <\|vision_start\|> token"):
        SampleEncoder(poor)
    other = type(tokenizer).from_pretrained(tokenizer.name_or_path)
    other.chat_template = tokenizer.chat_template.replace("message['role'] + '\\n'", "message['role'] + ':'")
    with pytest.raises(ValueError, match="not Qwen2.5's ChatML"):
        SampleEncoder(other)
    other.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        SampleEncoder(other)


LONG = ["system: Be brief.", "user: <image> One?", "assistant: Yes.", "user: <image> Two? <image>", "assistant: No.",
        "user: Three?", "assistant: Perhaps."]  # fmt: skip


def assert_same_sample(found, expected):
    assert found.grids == expected.grids and len(found) == len(expected)
    for name in ("tokens_T", "labels_T", "image_number_T", "row_T", "col_T"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


@pytest.mark.parametrize("num_turns", [3, 5])
def test_last_turns_are_dropped_until_the_sample_fits(encoder, num_turns):
    """What is left is what the first turns alone would give, up to one token less than two turns more need."""
    messages = messages_of(LONG)
    first, more = messages[:num_turns], messages[: num_turns + 2]
    alone, longer = (encoder.encode(turns, grids_of(turns), "key") for turns in (first, more))
    for num_tokens in (len(alone), len(longer) - 1):
        found = encoder.encode(messages, grids_of(messages), "key", (num_tokens, 99))
        assert_same_sample(found, alone)
        assert found.num_dropped_turns == len(messages) - num_turns


def test_turns_are_dropped_for_too_many_visual_tokens(encoder):
    messages = messages_of(LONG)
    whole, alone = (encoder.encode(turns, grids_of(turns), "key") for turns in (messages, messages[:3]))
    assert whole.num_visual_tokens == 18 and alone.num_visual_tokens == 6
    assert_same_sample(encoder.encode(messages, grids_of(messages), "key", (999, 17)), alone)
    assert_same_sample(encoder.encode(messages, grids_of(messages), "key", (999, 18)), whole)


def test_a_sample_of_which_no_answer_fits_stays_whole(encoder):
    """The plan leaves it out and counts it; it is never cut."""
    messages = messages_of(LONG)
    whole = encoder.encode(messages, grids_of(messages), "key")
    first_answer = len(encoder.encode(messages[:3], grids_of(messages[:3]), "key"))
    for limits in ((first_answer - 1, 99), (999, 5)):
        found = encoder.encode(messages, grids_of(messages), "key", limits)
        assert len(found) == len(whole) and found.num_dropped_turns == 0


def random_conversation(source):
    """Messages, some answers untrained, and grids of other sizes; words of several bytes and of several characters."""
    words = ["a cat", "\n", " Où ", "猫", "e\u0301", "👍🏽", "<|endoftext|>", " 12", ""]
    messages = [Message("system", ("Be brief.",))] if source.random() < 0.5 else []
    for _ in range(source.randint(1, 6)):
        for role in ("user", "assistant"):
            num_images = source.choice([0, 0, 1, 3])
            texts = tuple("".join(source.choices(words, k=source.randint(0, 4))) for _ in range(num_images + 1))
            messages.append(Message(role, texts, role == "assistant" and source.random() < 0.7))
    return messages, [(source.randint(1, 4), source.randint(1, 4)) for m in messages for _ in range(m.num_images)]


def encoded_step_by_step(encoder, messages, grids):
    """(token, label, number of the image, row, column) of each token, and how many there are after each message. The
    text is as that of `encode`, whose special tokens let it be cut anywhere beside one."""
    tokenizer, rows, ends, remaining = encoder._tokenizer, [], [], iter(enumerate(grids))

    def add(text, is_trained=False):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        rows.extend([token, token if is_trained else IGNORE_LABEL, -1, 0, 0] for token in ids)

    system = [] if messages[0].role == "system" else [Message("system", (encoder.default_system,))]
    for message in [*system, *messages]:
        add(f"<|im_start|>{message.role}\n")
        for number, text in enumerate(message.texts):
            if number:
                image, (height, width) = next(remaining)
                add("<|vision_start|>")
                rows.extend(
                    [encoder.image_pad, IGNORE_LABEL, image, row, column]
                    for row in range(height)
                    for column in range(width)
                )
                add("<|vision_end|>")
            add(text, message.is_trained)
        add("<|im_end|>", message.is_trained)
        add("\n")
        ends.append(len(rows))
    for row, following in zip(rows, [*rows[1:], [0, IGNORE_LABEL]], strict=True):
        row[1] = following[1]
    return rows, ends[len(system) :]


@pytest.mark.parametrize("seed", range(40))
def test_random_conversations_are_those_encoded_step_by_step(encoder, seed):
    source = random.Random(seed)
    messages, grids = random_conversation(source)
    rows, ends = encoded_step_by_step(encoder, messages, grids)
    num_visual = sum(height * width for height, width in grids)

    def columns(found):
        return torch.stack([found.tokens_T, found.labels_T, found.image_number_T, found.row_T, found.col_T], 1).tolist()

    assert columns(encoder.encode(messages, grids, "key")) == rows
    for _ in range(5):
        limits = source.randint(1, len(rows)), source.randint(0, num_visual)
        found = encoder.encode(messages, grids, "key", limits)
        keep = None
        for number, (message, end) in enumerate(zip(messages, ends, strict=True)):
            fits = end <= limits[0] and sum(row[2] >= 0 for row in rows[:end]) <= limits[1]
            keep = number if message.is_trained and fits else keep
        if len(rows) <= limits[0] and num_visual <= limits[1]:
            keep = len(messages) - 1
        if keep is None:
            assert columns(found) == rows and found.num_dropped_turns == 0
            continue
        assert columns(found) == rows[: ends[keep]]
        assert found.num_dropped_turns == len(messages) - 1 - keep
        assert found.grids == tuple(grids[: sum(message.num_images for message in messages[: keep + 1])])
