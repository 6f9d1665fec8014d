"""The wheel, installed without its dependencies: what runs where there is no torch, and what comes along."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

ROOT = Path(__file__).resolve().parents[2]
PLAN = ("plan", "--model", "7b", "--gpus", "16", "--gpu", "a100-80gb")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """`pip wheel . --no-deps`, of a copy: building leaves folders behind."""
    pytest.importorskip("setuptools")
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    for name in ("laver_megatron", "examples"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    run_pip("wheel", source, "--no-deps", "--no-build-isolation", "--wheel-dir", target)
    (built,) = target.glob("*.whl")
    return built


def run_pip(*words):
    done = subprocess.run([sys.executable, "-m", "pip", *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def install(wheel: Path, directory: Path) -> Path:
    """An environment with nothing but the wheel; returns its site-packages."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(directory)], check=True)
    run_pip("--python", directory / "bin" / "python", "install", "--no-deps", "--no-index", wheel)
    (site,) = directory.glob("lib/python*/site-packages")
    return site


@pytest.fixture(scope="module")
def bare(wheel, tmp_path_factory):
    """With PyYAML and nothing else."""
    directory = tmp_path_factory.mktemp("bare") / "env"
    site = install(wheel, directory)
    (site / "yaml").symlink_to(Path(sysconfig.get_path("purelib")) / "yaml")
    return directory


@pytest.fixture(scope="module")
def full(wheel, tmp_path_factory):
    """With all packages of this environment, the editable install of this one excepted."""
    directory = tmp_path_factory.mktemp("full") / "env"
    (install(wheel, directory) / "others.pth").write_text(sysconfig.get_path("purelib"))
    return directory


def laver(environment: Path, *words, cwd: Path) -> subprocess.CompletedProcess:
    environ = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RANK", "WORLD_SIZE")}
    command = [str(environment / "bin" / "laver"), *map(str, words)]
    return subprocess.run(command, env=environ, cwd=cwd, capture_output=True, text=True)


def test_without_torch(bare, tmp_path):
    for words, said in (
        (["--help"], "laver plan --model 7b --gpus 16 --gpu a100-80gb"),
        (["train", "--help"], "--tensor-model-parallel-size"),
        (PLAN, "layouts that fit"),
        (["train", "--config", bare.parent / "mine" / "demo.yaml", "--print-config"], "train_iters: 60"),
    ):
        if "--print-config" in words:
            assert laver(bare, "examples", bare.parent / "mine", cwd=tmp_path).returncode == 0
        done = laver(bare, *words, cwd=tmp_path)
        assert done.returncode == 0 and said in done.stdout, done.stderr
    done = laver(bare, "curves", "nowhere", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("error: this needs matplotlib, which is not installed")
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_leaves_early_is_no_error(bare, tmp_path):
    """As in `laver plan ... | head -1`."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [str(bare / "bin" / "laver"), *PLAN]
    done = subprocess.run(command, cwd=tmp_path, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert done.returncode == 1 and done.stderr == ""


@pytest.mark.slow(reason="training through the launcher is tried without a wheel")
def test_with_everything(full, demo_dir, tmp_path):
    """A dry run, and training on one process, of the examples that came with the wheel."""
    assert laver(full, "examples", "mine", cwd=tmp_path).returncode == 0
    directories = [
        "--config", "mine/demo.yaml", "--load", f"hf:{demo_dir}/model", "--encoder", demo_dir / "encoder",
        "--data-path", demo_dir / "shards" / "train-*.tar", "--valid-data-path", demo_dir / "shards" / "valid-*.tar",
    ]  # fmt: skip
    done = laver(full, "dry-run", "4", *directories, cwd=tmp_path)
    assert done.returncode == 0 and "dry run, nothing wrong" in done.stdout, done.stderr
    layout = ["--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "1", "--no-sequence-parallel"]
    steps = ["--train-iters", "1", "--lr-warmup-iters", "0", "--eval-interval", "none", "--num-workers", "0"]
    done = laver(full, "train", *directories, *layout, *steps, cwd=tmp_path)
    assert done.returncode == 0 and "saved runs/demo/checkpoints/iter_0000001" in done.stderr, done.stderr
