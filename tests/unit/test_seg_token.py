"""examples/segmentation: an export with one token more, loaded by a program without this package."""

import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.exports import random_export

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "segmentation" / "add_seg_token.py"
QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where is it?"}]}]
LOAD = """
import sys, torch
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
assert "laver_megatron" not in sys.modules
print(processor.tokenizer.convert_tokens_to_ids("[SEG]"), model.get_input_embeddings().weight.shape[0])
"""


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    return random_export(tmp_path_factory.mktemp("seg"))


@pytest.fixture(scope="module")
def added(export):
    output = export.parent / "with_seg"
    return output, runpy.run_path(str(SCRIPT))["add_token"](export, output)


def load(directory):
    processor = AutoProcessor.from_pretrained(directory, trust_remote_code=True)
    return AutoModelForImageTextToText.from_pretrained(directory, trust_remote_code=True).eval(), processor


def ask(processor, answer: str):
    text = processor.apply_chat_template(QUESTION, add_generation_prompt=True) + answer
    return processor(text=[text], images=[Image.linear_gradient("L")], return_tensors="pt")


def test_the_model_is_the_same_but_for_the_token(export, added):
    directory, number = added
    (before, old), (after, new) = load(export), load(directory)
    assert len(new.tokenizer) == len(old.tokenizer) + 1 and number == len(old.tokenizer)
    assert new.tokenizer.convert_tokens_to_ids("[SEG]") == number
    assert ask(new, "It is")["input_ids"].tolist() == ask(old, "It is")["input_ids"].tolist()
    with torch.no_grad():
        logits_LW = [model(**ask(processor, "It is")).logits[0] for model, processor in ((before, old), (after, new))]
    others = torch.arange(number)
    torch.testing.assert_close(logits_LW[1][:, others], logits_LW[0][:, others], rtol=0, atol=0)
    for layer in ("get_input_embeddings", "get_output_embeddings"):
        old_WH, new_WH = getattr(before, layer)().weight, getattr(after, layer)().weight
        torch.testing.assert_close(new_WH[number], old_WH[:number].mean(dim=0))
        assert len(new_WH) == max(len(old_WH), number + 1)  # never cut to the number of tokens


def test_states_of_the_token(added):
    """As the script's head shows it: one state a [SEG], that of the last layer, which the head reads."""
    directory, number = added
    model, processor = load(directory)
    inputs = ask(processor, "It is [SEG] and [SEG].")
    places_BL = inputs["input_ids"] == number
    assert places_BL.sum() == 2
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True)
    seg_states = output.hidden_states[-1][places_BL]
    torch.testing.assert_close(model.get_output_embeddings()(seg_states), output.logits[places_BL])


@pytest.mark.processes
def test_it_loads_without_this_package(added, tmp_path):
    directory, number = added
    done = subprocess.run([sys.executable, "-c", LOAD, str(directory)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) == number < int(done.stdout.split()[1])


def test_refused(export, added, tmp_path, monkeypatch, capsys):
    text_only = tmp_path / "text"
    text_only.mkdir()
    (text_only / "config.json").write_text('{"model_type": "qwen2"}')
    cut_off = tmp_path / "cut"
    cut_off.mkdir()
    (cut_off / "config.json").write_text('{"model_type": ')
    for source, output, message in (
        (export, export, "exists; choose another"),
        (added[0], tmp_path / "again", "has the token [SEG]"),
        (text_only, tmp_path / "again", "holds a model of type 'qwen2'; export with --format laver"),
        (cut_off, tmp_path / "again", "config.json cannot be read: Expecting value"),
    ):
        monkeypatch.setattr(sys, "argv", ["add_seg_token.py", "--export", str(source), "--output", str(output)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        assert end.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


def test_the_matrices_grow_where_no_row_is_free(export, tmp_path):
    full = shutil.copytree(export, tmp_path / "full")
    model, processor = load(full)
    num_rows = model.get_input_embeddings().weight.shape[0]
    processor.tokenizer.add_tokens([f"[{row}]" for row in range(num_rows - len(processor.tokenizer))])
    processor.tokenizer.save_pretrained(full)
    assert runpy.run_path(str(SCRIPT))["add_token"](full, tmp_path / "grown") == num_rows
    grown, _ = load(tmp_path / "grown")
    assert grown.get_input_embeddings().weight.shape[0] == grown.config.text_config.vocab_size == num_rows + 1
    assert grown.get_output_embeddings().weight.shape[0] == num_rows + 1
