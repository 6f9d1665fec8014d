"""The picture: which panels it has, and that odd records don't stop it."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from PIL import Image

from laver_megatron.run_log.curves import PANELS, _running_mean, draw_curves
from laver_megatron.run_log.metrics import REQUIRED_FIELDS

LAVER_FIELDS = (
    "mim_loss",
    "gram_loss",
    "mask_ratio",
    "ema_momentum",
    "student_visual_similarity",
    "teacher_visual_similarity",
    "teacher_entropy",
)
ALL_TITLES = [title for title, _, _ in PANELS]


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved, in order."""
    saved, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (saved.append(self), save(self, *a, **k))[1])
    return saved


def write(path: Path, num: int, **changes) -> Path:
    records = [dict.fromkeys(REQUIRED_FIELDS, 0.3 + 1 / i) | {"iteration": i} | changes for i in range(1, num + 1)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def titles(figure) -> list[str]:
    return [axes.get_title(loc="left") for axes in figure.axes if axes.get_title(loc="left")]


def panel(figure, title):
    return next(axes for axes in figure.axes if axes.get_title(loc="left") == title)


def test_all_panels_and_validation(tmp_path, figures):
    source = write(tmp_path / "metrics.jsonl", 6)
    (tmp_path / "validation.jsonl").write_text('{"iteration": 3, "lm_loss": 2.0}\n{"iteration": 6, "lm_loss": 1.0}\n')
    draw_curves(source, tmp_path / "out.png")
    assert titles(figures[0]) == ALL_TITLES
    lines = {line.get_label(): line for line in panel(figures[0], "Language loss").get_lines()}
    assert list(lines["validation"].get_xdata()) == [3, 6]
    assert list(lines["validation"].get_ydata()) == [2.0, 1.0]
    assert list(lines["train"].get_ydata()) == [0.3 + 1 / i for i in range(1, 7)]
    with Image.open(tmp_path / "out.png") as image:
        assert image.format == "PNG" and image.width > 1000
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("nothing", [None, 0.0])
def test_panels_without_anything_to_show_are_left_out(tmp_path, figures, nothing):
    source = write(tmp_path / "metrics.jsonl", 4, **dict.fromkeys(LAVER_FIELDS, nothing))
    draw_curves(source, tmp_path / "out.png")
    assert titles(figures[0]) == ["Language loss", "Gradient norm", "Learning rate", "Throughput"]


def test_skipped_steps_are_gaps_with_a_mark(tmp_path, figures):
    records = [{"iteration": i, "lm_loss": 1.0, "skipped_iterations": 0} for i in range(1, 6)]
    records[2]["lm_loss"] = None
    for record in records[2:]:
        record["skipped_iterations"] = 1
    source = tmp_path / "metrics.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    draw_curves(source, tmp_path / "out.png")
    lines = {line.get_label(): line for line in panel(figures[0], "Language loss").get_lines()}
    assert [math.isnan(value) for value in lines["train"].get_ydata()] == [False, False, True, False, False]
    assert list(lines["skipped step"].get_xdata()) == [3, 3]


@pytest.mark.parametrize("num", [1, 250])
def test_very_short_and_smoothed_runs(tmp_path, figures, num):
    draw_curves(write(tmp_path / "metrics.jsonl", num), tmp_path / "out.png")
    assert titles(figures[0]) == ALL_TITLES


def test_running_mean():
    means = _running_mean([math.nan, 1.0, 3.0, math.nan, 8.0], 2)
    assert math.isnan(means[0])
    assert means[1:] == [1.0, 2.0, 2.0, 5.5]


def test_nothing_to_draw(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"torn')
    with pytest.raises(ValueError, match="no records"):
        draw_curves(tmp_path / "metrics.jsonl", tmp_path / "out.png")
    assert not (tmp_path / "out.png").exists()


@pytest.mark.processes
def test_command_line(tmp_path):
    tool = Path(__file__).parents[3] / "tools" / "plot_curves.py"
    write(tmp_path / "metrics.jsonl", 3)

    def run(*arguments):
        environment = {"PYTHONPATH": str(tool.parents[1]), "PATH": "", "HOME": str(tmp_path)}
        return subprocess.run(
            [sys.executable, tool, *arguments], check=False, capture_output=True, text=True, env=environment
        )

    done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "curves.png").exists()
    failed = run(tmp_path / "nowhere.jsonl")
    assert failed.returncode == 2 and "nowhere.jsonl" in failed.stderr and "Traceback" not in failed.stderr
