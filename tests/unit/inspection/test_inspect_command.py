"""`laver inspect` as a program: its numbers are those of a computation by hand, its page needs nothing beside it, bad
input is refused with a reason before a model is loaded."""

import csv
import json
import re
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from laver_megatron.convert.hf_to_megatron import hf_to_megatron
from laver_megatron.inspection import inspect_command, model
from laver_megatron.inspection.measures import cknna
from laver_megatron.inspection.model import InspectedModel
from laver_megatron.inspection.samples import samples_of_files
from laver_megatron.runtime.exit_status import WRONG_USE
from tests.conversions import write_laver, write_qwen
from tests.unit.inspection.test_model import picture


@pytest.fixture(scope="module")
def export(demo_dir, tmp_path_factory) -> Path:
    """With its training state."""
    return write_laver(tmp_path_factory.mktemp("inspected") / "export", demo_dir)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number in range(2):
        picture(number).save(folder / f"{number}.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture(scope="module")
def page(export, photos, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("pages") / "seen"
    words = ["--model", export, "--images", photos, "--question", "What is it?", "--answer", "a red house"]
    inspect_command.main([*map(str, words), "--output", str(output), "--dtype", "float32", "--no-tsne"])
    return output


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def curve(page: Path, measure: str) -> list[float]:
    rows = [row for row in rows_of(page / "curves.csv") if row["measure"] == measure]
    assert [int(row["layer"]) for row in rows] == list(range(len(rows)))
    return [float(row["mean"] or "nan") for row in rows]


@torch.no_grad()
def test_the_numbers_are_those_of_a_computation_by_hand(page, export, photos):
    inspected = InspectedModel(export, "laver", "cpu", "float32")
    expected: dict[str, list[list[float]]] = {}
    answers = []
    for sample in samples_of_files([photos], "What is it?", "a red house"):
        inputs, before = inspected.prepare(sample, 1)
        inspected.decoder.norm, norm = torch.nn.Identity(), inspected.decoder.norm
        output = inspected.model(**inputs, output_hidden_states=True, output_attentions=True)
        inspected.decoder.norm = norm
        visual = inputs["input_ids"][0] == inspected.model.config.image_token_id
        features = inspected.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2][0]
        behind = ~visual & (torch.arange(len(visual)) > visual.nonzero()[0])
        by_layer: dict[str, list[float]] = {"visual_similarity": [], "cknna": [], "attention_mass": [float("nan")]}
        for hidden in output.hidden_states:
            gram = torch.nn.functional.normalize(hidden[0, visual], dim=-1)
            gram = gram @ gram.T
            by_layer["visual_similarity"].append(float(gram[~torch.eye(len(gram), dtype=torch.bool)].mean()))
            by_layer["cknna"].append(float(cknna(hidden[0, visual], features, 10)))
        masses = torch.stack([weights[0, :, :, visual].sum(-1).mean(0) for weights in output.attentions])
        by_layer["attention_mass"] += masses[:, behind].mean(1).tolist()
        answers.append(masses[:, before - 1 : -1])
        for name, values in by_layer.items():
            expected.setdefault(name, []).append(values)
    for name, values in expected.items():
        np.testing.assert_allclose(curve(page, name), np.mean(values, axis=0), atol=1e-5)
    decay = torch.stack(answers).mean(0)
    found = [float(row["mean"]) for row in rows_of(page / "attention_decay.csv")]
    np.testing.assert_allclose(found, decay.flatten(), atol=1e-6)


def test_the_page_needs_no_network_and_holds_its_pictures(page):
    text = (page / "index.html").read_text()
    assert not re.search(r"https?:|<script|<link|@import", text)
    pictures = {path.name for path in page.glob("*.png")}
    assert {
        "curves.png",
        "attention_decay.png",
        "gram.png",
        "patches_1.png",
        "patches_2.png",
        "tokens_1.png",
    } == pictures
    assert text.count("data:image/png;base64,") == len(pictures)
    with Image.open(page / "curves.png") as image:
        assert len(image.convert("L").histogram()) == 256 and image.width > 800
    shares = [row for row in rows_of(page / "gram.csv") if row["measure"] == "share"]
    assert 0 < float(shares[0]["mean"]) < 1 and shares[0]["count"] == "2"


def test_steps_of_a_run_become_a_map_and_shards_bring_their_answers(export, demo_dir, tmp_path, capsys):
    run = tmp_path / "run/checkpoints"
    run.mkdir(parents=True)
    for step in (10, 20):
        hf_to_megatron(export, run / f"iter_{step:07d}")
    words = ["--compare", *sorted(run.iterdir()), "--data-path", f"{demo_dir}/shards/valid-*.tar", "--samples", 3]
    inspect_command.main([*map(str, words), "--output", str(tmp_path / "seen"), "--num-pictures", "1"])
    assert capsys.readouterr().out.endswith(f"{tmp_path}/seen/index.html\n")
    rows = rows_of(tmp_path / "seen/curves.csv")
    assert {(row["model"], row["step"]) for row in rows} == {("iter_0000010", "10"), ("iter_0000020", "20")}
    one, other = ([row["mean"] for row in rows if row["step"] == step] for step in ("10", "20"))
    assert one == other, "the same weights"
    assert (tmp_path / "seen/steps.png").exists()


def test_empty_answers_are_said_and_leave_the_rest(export, photos, tmp_path):
    output = tmp_path / "seen"
    words = ["--model", export, "--images", photos / "0.png", "--answer", "", "--output", output, "--no-tsne"]
    inspect_command.main(list(map(str, words)))
    assert "Most answers of export are empty" in (output / "index.html").read_text()
    assert not (output / "attention_decay.csv").exists() and not (output / "attention_decay.png").exists()
    assert all(row["mean"] for row in rows_of(output / "curves.csv") if row["measure"] == "visual_similarity")


def refused(capsys, *words: object, loaded: bool = False) -> str:
    """The message of a command line that ends with exit status 2; without a model having been loaded."""
    with (
        pytest.raises(SystemExit) as end,
        mock.patch.object(model, "open_processor", side_effect=None if loaded else AssertionError("loaded")) as load,
    ):
        inspect_command.main([str(word) for word in words])
    assert end.value.code == WRONG_USE
    assert loaded or not load.called
    return capsys.readouterr().err


def test_bad_input_is_refused_before_a_model_is_loaded(export, photos, demo_dir, tmp_path, capsys):
    output = "--output", tmp_path / "seen"
    shown = "--images", photos, *output
    text_only = write_qwen(tmp_path / "qwen")
    assert "no such directory" in refused(capsys, "--model", tmp_path / "nowhere", *shown)
    assert "holds no model" in refused(capsys, "--model", photos, *shown)
    assert "model_type is 'qwen2', but a model that is given images" in refused(capsys, "--model", text_only, *shown)
    hf_to_megatron(demo_dir / "model", tmp_path / "text/iter_0000001")
    assert "is text only" in refused(capsys, "--model", tmp_path / "text/iter_0000001", *shown)
    assert "named twice" in refused(capsys, "--compare", export, export, *shown)
    llava = tmp_path / "mixed"
    llava.mkdir()
    (llava / "config.json").write_text(json.dumps({"model_type": "llava", "is_mm_prefix_lm": True}))
    assert "mixed attention" in refused(capsys, "--model", llava, *shown)

    asked = "--model", export, *output, "--images"
    assert "no such file" in refused(capsys, *asked, tmp_path / "none.png")
    assert "is a JSON file" in refused(capsys, *asked, llava / "config.json")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no pictures in this folder" in refused(capsys, *asked, empty)
    Image.new("1", (11_000, 10_000)).save(tmp_path / "huge.png")
    assert "11000 x 10000 pixels are more than 100000000" in refused(capsys, *asked, tmp_path / "huge.png")

    shards = "--model", export, *output, "--data-path", demo_dir / "shards"
    assert "--samples 100000, but" in refused(capsys, *shards, "--samples", 100_000)
    assert "have their own" in refused(capsys, *shards, "--question", "What?")
    assert "--data-path: " in refused(capsys, "--model", export, *output, "--data-path", tmp_path / "none.tar")
    assert "--device abacus: " in refused(capsys, "--model", export, *shown, "--device", "abacus")
    assert "is there already" in refused(capsys, "--model", export, "--images", photos, "--output", photos)
    assert "is no directory" in refused(capsys, "--model", export, "--images", photos, "--output", "/nowhere/seen")
    with mock.patch("os.access", return_value=False):
        assert f"{tmp_path} may not be written to" in refused(capsys, "--model", export, *shown)
    assert not (tmp_path / "seen").exists()


def test_images_of_one_token_have_no_pairs(export, photos, tmp_path, capsys):
    """Curves of pairs are empty for them; a set of nothing else is refused."""
    with (
        mock.patch.object(InspectedModel, "observe", one_token(InspectedModel.observe)),
        pytest.raises(SystemExit) as end,
    ):
        inspect_command.main(["--model", str(export), "--images", str(photos), "--output", str(tmp_path / "seen")])
    assert end.value.code == WRONG_USE
    assert "no image has more than one visual token" in capsys.readouterr().err
    assert not (tmp_path / "seen").exists()


def test_numbers_that_are_not_finite_are_refused_by_layer(export, photos, tmp_path, capsys):
    def overflowing(inspected, *inputs):
        seen = observe(inspected, *inputs)
        seen.hidden[2][-1, 0] = float("inf")
        return seen

    observe, output = InspectedModel.observe, tmp_path / "seen"
    with mock.patch.object(InspectedModel, "observe", overflowing), pytest.raises(SystemExit) as end:
        inspect_command.main(["--model", str(export), "--images", str(photos), "--output", str(output)])
    said = capsys.readouterr().err
    assert end.value.code == WRONG_USE and not output.exists()
    assert "sample '0.png': layer 2 of " in said and "--dtype float32" in said


def test_damaged_weights_are_named(export, photos, tmp_path, capsys):
    damaged = tmp_path / "damaged"
    shutil.copytree(export, damaged)
    (damaged / "model.safetensors").write_bytes(b"")
    with pytest.raises(SystemExit) as end:
        inspect_command.main(["--model", str(damaged), "--images", str(photos), "--output", str(tmp_path / "seen")])
    assert end.value.code == WRONG_USE and f"{damaged} cannot be loaded" in capsys.readouterr().err


def one_token(observe):
    """As if the encoder made one token of each image."""

    def observed(self, inputs, before):
        seen = observe(self, inputs, before)
        images = [model.SeenImage((1, 1), image.places_N[:1]) for image in seen.images]
        features = [features_NE[:1] for features_NE in seen.features]
        return model.Observation(seen.hidden, seen.mass_LS, features, images, seen.text_M, seen.answer_Q)

    return observed
