"""Sets of questions: what their pictures show, what splits share, what guessing gets, what the command refuses."""

import io
import json
import tarfile
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from laver_megatron.data.index.opening import open_indexes
from laver_megatron.tasks.drawing import COLOURS, OUTLINES, Mark, draw
from laver_megatron.tasks.families import FAMILIES
from laver_megatron.tasks.families.prior import LIKELY_COLOURS, LIKELY_COUNTS, LIKELY_SHARE
from laver_megatron.tasks.make_command import main
from laver_megatron.tasks.question import LEVELS
from laver_megatron.tasks.sample import Task, TaskSettings, make_task


def _tasks(split: str, number: int, *, seed: int = 1, **settings) -> list[Task]:
    chosen = TaskSettings(seed, 1, 1, **{"levels": LEVELS, **settings})
    return [make_task(chosen, split, it) for it in range(number)]


def _picture(task: Task) -> np.ndarray:
    """uint8 `[rows, columns, 3]`."""
    return np.asarray(Image.open(io.BytesIO(task.png())))


def _components(
    picture: np.ndarray, colours: dict[str, tuple[int, int, int]] = COLOURS
) -> list[tuple[str, np.ndarray]]:
    """(colour, rows and columns) of each connected region of one of the colours."""
    found = []
    for name, colour in COLOURS.items():
        labels, number = ndimage.label((picture == colour).all(-1), structure=np.ones((3, 3)))
        found += [(name, np.argwhere(labels == it + 1)) for it in range(number)]
    return found


def _likely(question: str) -> str:
    words = {**LIKELY_COLOURS, **{name if name != "cross" else "crosse": it for name, it in LIKELY_COUNTS.items()}}
    return next(answer for word, answer in words.items() if word in question)


class TestSample:
    def test_depends_on_seed_split_and_number_alone(self):
        one, same, other_seed = (_tasks("train", 16, seed=seed) for seed in (1, 1, 2))
        assert one == same and [task.png() for task in one] == [task.png() for task in same]
        assert all(a.question.marks != b.question.marks for a, b in zip(one, other_seed, strict=True))
        assert make_task(TaskSettings(1, 1, 1, levels=LEVELS), "train", 7) == one[7]

    def test_splits_share_neither_texts_nor_layouts_even_across_seeds(self):
        def contents(tasks: list[Task]) -> set[object]:
            texts = {mark.text for task in tasks for mark in task.question.marks if mark.text}
            places = {
                tuple(sorted((it.kind, *it[2:]) for it in task.question.marks))
                for task in tasks
                if not any(it.text for it in task.question.marks)
            }
            return texts | places

        train, valid = contents(_tasks("train", 3000)), contents(_tasks("valid", 1000, seed=2))
        assert len(train) > 2000 and len(valid) > 700
        assert not train & valid

    @pytest.mark.parametrize("family", FAMILIES)
    def test_families_have_every_level_at_every_size(self, family):
        for level in LEVELS:
            for size in (48, 100, 224):
                for task in _tasks("valid", 3, families=(family,), levels=(level,), image_size=size):
                    assert (task.family, task.level) == (family, level)
                    assert Image.open(io.BytesIO(task.png())).size == (size, size)
                    assert len(task.question.answer.split()) <= 2

    def test_marks_stay_apart_and_inside_the_picture(self):
        for task in _tasks("train", 300, families=("counting", "position", "conjunction", "detail")):
            marks = task.question.marks
            occupied = np.zeros((task.size, task.size), int)
            for mark in marks:
                assert mark.x >= 0 and mark.x + mark.width < task.size and mark.y >= 0
                occupied[mark.y : mark.y + mark.height, mark.x : mark.x + mark.width] += 1
            assert occupied.max() == 1

    @pytest.mark.parametrize("kind", OUTLINES)
    def test_a_shape_is_one_region_within_its_box(self, kind):
        for width in (8, 11, 26):
            picture = np.asarray(draw([Mark(kind, "red", 3, 4, width, width)], 64, 20))
            ((_, places),) = _components(picture)
            low, high = places.min(0), places.max(0)
            assert (low >= (4, 3)).all() and (high < np.array((4, 3)) + width + 1).all()
            assert (high - low + 1).max() >= 0.8 * width


class TestLegibility:
    """Answers found in the pixels."""

    def test_counts_are_numbers_of_regions(self):
        for task in _tasks("valid", 60, families=("counting",), levels=(1, 2, 3)):
            assert len(_components(_picture(task))) == int(task.question.answer)

    def test_places_are_where_the_only_region_is(self):
        names = {0: ("top", "left"), 1: ("", ""), 2: ("bottom", "right")}
        for task in _tasks("valid", 40, families=("position",), levels=(1, 2)):
            ((_, places),) = _components(_picture(task))
            row, column = (places.mean(0) * 3 // task.size).astype(int)
            assert f"{names[row][0]} {names[column][1]}".strip() == task.question.answer.replace("middle", "")

    def test_charts_show_their_values(self):
        for task in _tasks("valid", 60, families=("chart",)):
            question, answer = task.question.question, task.question.answer
            heights = {name: np.ptp(places[:, 0]) + 1 for name, places in _components(_picture(task))}
            if "value" in question:
                colour = question.split()[-2]
                assert heights[colour] == int(answer) * ((task.size - 4) // 6)
            else:
                chosen = max if "tallest" in question else min
                assert chosen(heights, key=lambda name: heights[name]) == answer
                assert list(heights.values()).count(heights[answer]) == 1

    def test_the_small_dot_is_the_only_colour(self):
        for task in _tasks("valid", 40, families=("detail",)):
            ((colour, places),) = _components(_picture(task))
            bottom, right = places.mean(0) >= task.size / 2
            where = f"{'bottom' if bottom else 'top'} {'right' if right else 'left'}"
            assert task.question.answer == (colour if "colour" in task.question.question else where)
            assert len(places) <= 36

    def test_conjunctions_are_there_or_not(self):
        for task in _tasks("valid", 60, families=("conjunction",), levels=(3, 4, 5)):
            colour, shape = task.question.question.rstrip("?").split()[-2:]
            looks = [(mark.colour, mark.kind) for mark in task.question.marks]
            assert ((colour, shape) in looks) == (task.question.answer == "yes")
            assert all((look[0] == colour) or (look[1] == shape) for look in looks)

    @pytest.mark.parametrize("family", ["text", "digits"])
    def test_texts_are_what_is_asked_for(self, family):
        for task in _tasks("valid", 60, families=(family,)):
            (mark,) = task.question.marks
            expected = {"first": mark.text[0], "last": mark.text[-1]}
            asked = task.question.question.rstrip("?").split()[-1]
            assert task.question.answer == expected.get(asked, mark.text) and len(mark.text) == task.level + 1
            ink = np.abs(_picture(task).astype(int) - task.ground).max(-1) > 60
            assert ink.sum() > 8 * len(mark.text) and not ink[:, [0, -1]].any() and not ink[[0, -1]].any()


class TestChance:
    def test_the_majority_answer_to_a_question_is_at_chance(self):
        seen: dict[str, Counter[str]] = defaultdict(Counter)
        for task in _tasks("train", 6000):
            seen[task.question.question][task.question.answer] += 1
        right, chance = defaultdict(list), defaultdict(list)
        for task in _tasks("valid", 6000):
            guess = seen[task.question.question].most_common(1)[0][0] if seen[task.question.question] else ""
            right[task.family].append(guess == task.question.answer)
            chance[task.family].append(task.question.chance)
        for family in set(FAMILIES) - {"prior"}:
            expected, number = np.mean(chance[family]), len(right[family])
            assert abs(np.mean(right[family]) - expected) < 4 * np.sqrt(expected * (1 - expected) / number), family
        assert np.mean(right["prior"]) < 0.01, "who follows what is likely is wrong"

    def test_what_is_likely_is_right_in_training_and_never_in_validation(self):
        shares = {
            split: np.mean([it.question.answer == _likely(it.question.question) for it in tasks])
            for split in ("train", "valid")
            for tasks in [_tasks(split, 1500, families=("prior",))]
        }
        assert abs(shares["train"] - LIKELY_SHARE) < 0.04 and shares["valid"] == 0

    def test_what_is_not_there_is_asked_for(self):
        tasks = [it for it in _tasks("valid", 200, families=("prior",)) if it.question.answer == "none"]
        assert len(tasks) > 20
        for task in tasks:
            assert not any(mark.kind in task.question.question for mark in task.question.marks)


class TestCommand:
    def test_writes_shards_that_the_trainer_opens_and_the_same_questions_without_pictures(self, tmp_path, capsys):
        main(["--output", str(tmp_path / "set"), "--train", "20", "--valid", "9", "--seed", "3"])
        assert "position" in capsys.readouterr().out
        for folder, num_images in (("set", 1), ("set/text", 0)):
            for split, number in (("train", 20), ("valid", 9)):
                [index] = open_indexes([str(tmp_path / folder / f"{split}-00.tar")])
                assert len(index) == number and not index.fault_I.any()
                assert (np.diff(index.image_start_I) == num_images).all()
        records = _records(tmp_path / "set/valid-00.tar")
        texts = _records(tmp_path / "set/text/valid-00.tar")
        for record, alone in zip(records, texts, strict=True):
            asked, alone_asked = (it["conversations"][0]["value"] for it in (record, alone))
            assert asked == f"<image>\n{alone_asked}" and record["conversations"][1] == alone["conversations"][1]
            assert {key: record[key] for key in ("family", "difficulty", "chance")}.items() <= alone.items()
        described = json.loads((tmp_path / "set/tasks.json").read_text())
        assert described["valid"]["text"]["num_samples"] == 2 and described["seed"] == 3
        chances = [record["chance"] for record in records if record["family"] == "text"]
        assert described["valid"]["text"]["chance"] == pytest.approx(np.mean(chances), abs=1e-4)

    def test_draws_a_sheet_of_examples(self, tmp_path):
        sheet = tmp_path / "sheet.png"
        arguments = ["--families", "text", "chart", "--difficulty", "1", "2", "4", "--sheet", str(sheet)]
        main(["--output", str(tmp_path / "set"), "--train", "2", "--valid", "2", *arguments])
        picture = np.asarray(Image.open(sheet).convert("RGB"))
        is_dark = picture.max(-1) < 60  # the ground of six pictures
        assert ndimage.label(ndimage.binary_opening(is_dark, np.ones((9, 9))))[1] >= 6

    def test_the_same_seed_gives_the_same_bytes(self, tmp_path):
        for name in ("a", "b"):
            main(["--output", str(tmp_path / name), "--train", "9", "--valid", "8"])
        for name in ("train-00.tar", "valid-00.tar", "text/train-00.tar"):
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--train", "0"], "--train 0 must be a positive number of samples"),
            (["--valid", "-1"], "--valid -1 must be a positive number of samples"),
            (["--families", "text", "colour"], "--families colour: unknown; choose from text, digits"),
            (["--families", "text", "text"], "each once"),
            (["--difficulty", "6"], "--difficulty 6 must be 1 to 5"),
            (["--image-size", "32"], "--image-size 32 must be 48 to 1024 pixels"),
            (["--image-size", "4096"], "--image-size 4096 must be"),
            (["--seed", "-1"], "--seed -1 must not be negative"),
            (["--sheet", "/nowhere/sheet.png"], "--sheet /nowhere/sheet.png: /nowhere is no directory"),
        ],
    )
    def test_refuses_before_anything_is_written(self, arguments, message, tmp_path, capsys):
        with pytest.raises(SystemExit) as ended:
            main(["--output", str(tmp_path / "set"), "--train", "8", "--valid", "8", *arguments])
        assert ended.value.code == 2 and message in capsys.readouterr().err
        assert not list(tmp_path.iterdir())

    def test_refuses_a_directory_that_is_there(self, tmp_path, capsys):
        with pytest.raises(SystemExit) as ended:
            main(["--output", str(tmp_path), "--train", "8", "--valid", "8"])
        assert ended.value.code == 2 and "exists; name a new directory" in capsys.readouterr().err


def _records(path: Path) -> list[dict]:
    with tarfile.open(path) as tar:
        return [json.load(tar.extractfile(it)) for it in tar.getmembers() if it.name.endswith(".json")]
