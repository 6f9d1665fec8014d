"""A user's own pictures and conversations: through make_shards, into three steps of training, as programs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[3]
NUM_RECORDS = 48


def picture(number: int) -> Image.Image:
    return Image.effect_noise((40 + number, 64), 80).convert("RGB")


def save_pictures(folder: Path) -> list[str]:
    """One picture of every kind that people have lying about; their names."""
    turned = Image.Exif()
    turned[0x0112] = 6
    kinds = {
        "photo.jpg": (picture(0), {}),
        "turned.jpg": (picture(1), {"exif": turned}),
        "grey.jpg": (picture(2).convert("L"), {}),
        "print.jpg": (picture(3).convert("CMYK"), {}),
        "see-through.png": (picture(4).convert("RGBA"), {}),
        "palette.png": (picture(5).convert("P"), {}),
        "two-colours.png": (picture(6).convert("1"), {}),
        "deep.png": (Image.new("I;16", (47, 64), 30_000), {}),
        "thin.png": (picture(8).resize((1, 64)), {}),
        "web.webp": (picture(9), {}),
        "old.gif": (picture(10).convert("P"), {}),
        "raw.bmp": (picture(11), {}),
        "scan.tiff": (picture(12), {}),
        "sub folder/name with blanks.jpeg": (picture(13), {}),
    }
    for name, (image, options) in kinds.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(folder / name, **options)
    return list(kinds)


def write_records(path: Path, names: list[str]) -> None:
    """LLaVA's JSON: one picture or two, or none; one exchange or two."""
    records = []
    for number in range(NUM_RECORDS):
        used = [names[number % len(names)], names[(number * 5 + 1) % len(names)]][: (1, 1, 2, 0)[number % 4]]
        turns = [{"from": "human", "value": "<image>\n" * len(used) + f"What is number {number}?"}]
        turns += [{"from": "gpt", "value": f"It is number {number}."}]
        turns += [{"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes."}] * (number % 3 == 0)
        image = {} if not used else {"image": used[0] if len(used) == 1 else used}
        records.append({"id": f"r{number}", **image, "conversations": turns})
    path.write_text(json.dumps(records))


def run(*command: object) -> subprocess.CompletedProcess:
    inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment = {**inherited, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *map(str, command)], env=environment, capture_output=True, text=True, timeout=180
    )


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("own")
    write_records(directory / "own.json", save_pictures(directory / "images"))
    done = run(
        ROOT / "tools/make_shards.py", "--source", directory / "own.json", "--images", directory / "images",
        "--output", directory / "shards", "--samples-per-shard", 20, "--num-workers", 2, "--max-bad-fraction", 0,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"{NUM_RECORDS}" in done.stdout
    assert len(list((directory / "shards").glob("*.tar"))) == 3
    return directory / "shards"


def train(shards: Path, demo_dir: Path, run_dir: Path, *options: object) -> subprocess.CompletedProcess:
    """One process, without the launcher and torchrun."""
    return run(
        "-m", "laver_megatron.train", "--config", ROOT / "examples/demo.yaml", "--data-path", shards,
        "--load", f"hf:{demo_dir / 'model'}", "--encoder", demo_dir / "encoder", "--run-dir", run_dir,
        "--tensor-model-parallel-size", 1, "--pipeline-model-parallel-size", 1, "--no-sequence-parallel",
        "--train-iters", 3, "--lr-warmup-iters", 0, "--valid-data-path", "none", "--eval-interval", "none", *options,
    )  # fmt: skip


@pytest.mark.processes
def test_three_steps(shards, demo_dir, tmp_path):
    """With the visual budget that the data propose; going on takes over what was proposed."""
    done = train(shards, demo_dir, tmp_path / "run", "--visual-seq-length", 0, "--exit-interval", 2)
    assert done.returncode == 0, done.stderr
    assert f"data: {NUM_RECORDS} samples, " in done.stderr + done.stdout
    done = train(shards, demo_dir, tmp_path / "run", "--visual-seq-length", 0)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [record["iteration"] for record in records] == [1, 2, 3]
    assert all(record["lm_loss"] > 0 and record["mim_loss"] > 0 and record["num_samples"] > 0 for record in records)
    (written,) = {
        json.loads(path.read_text())["visual_seq_length"] for path in (tmp_path / "run/checkpoints").glob("*/run.json")
    }
    assert 64 <= written <= 256 and written % 64 == 0, "whole images of 64 tokens"


@pytest.mark.processes
def test_too_many_bad_samples_end_the_run(shards, demo_dir, tmp_path):
    """A shard that has changed since it was indexed: the checksums tell, and the table says why the run ends."""
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in shards.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    tar = damaged / "shard-000000-00.tar"
    content = bytearray(tar.read_bytes())
    for start in range(3000, len(content), 4096):
        content[start] ^= 0xFF
    tar.write_bytes(content)
    done = train(damaged, demo_dir, tmp_path / "run")
    assert done.returncode == 1
    assert "samples cannot be used" in done.stderr and "--max-bad-fraction" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run/checkpoints").exists()
