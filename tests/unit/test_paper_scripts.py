"""examples/paper from the downloads' file lists to the exports, with stand-ins of the same form.

The hub is a folder, and `hf` a program that copies from it: LLaVA's JSON and zip, Parquet with the columns and under
the names of FineVision and LLaVA-OneVision-Data, a small random Qwen2.5 and SigLIP.
"""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from laver_megatron.data.index.index_file import read_table
from tests.picture_files import picture_files
from tests.programs import python_path

PAPER = Path(__file__).resolve().parents[2] / "examples" / "paper"
KITS = Path(__file__).resolve().parents[1] / "data" / "scores" / "kits.tar.xz"
SCRIPTS = ("1_download.sh", "2_shards.sh", "3_train.sh", "4_export.sh", "5_evaluate.sh", "hours.sh")
JPEG = next(content for content in picture_files().values() if content[:2] == b"\xff\xd8")
# Of every subset: files of the whole dataset, in the form of the hub's names.
FINEVISION = {"ai2d_merged": 4, "chartqa": 2, "text_ruozhiba": 1}
ONEVISION = {"aokvqa(cauldron,llava_format)": 3, "sharegpt4o": 3}
HF = """
import shutil, sys
from pathlib import Path
words = sys.argv[1:]
assert words[0] == "download"
words = [word for word in words if word != "--"]
place = Path(words[words.index("--local-dir") + 1])
if "--repo-type" in words:
    assert words[words.index("--repo-type") + 1] == "dataset"
named, skip = [], False
for word in words[2:]:
    if not skip and not word.startswith("--"):
        named.append(word)
    skip = word.startswith("--")
source = Path({hub!r}) / words[1]
for path in [source / name for name in named] or [path for path in source.rglob("*") if path.is_file()]:
    target = place / path.relative_to(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        shutil.copyfile(path, target)
        print("downloaded", path.relative_to(source))
"""
# A layout of one process, and a model that has 64 visual tokens of a picture.
SMALL = (
    "--tensor-model-parallel-size", "1", "--no-sequence-parallel", "--no-bf16", "--seq-length", "256",
    "--micro-batch-size", "1", "--global-batch-size", "2", "--train-iters", "2", "--lr-warmup-iters", "1",
    "--save-interval", "2", "--num-workers", "0",
)  # fmt: skip


def write_table(path: Path, columns: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path)


def finevision(path: Path, name: str, num_rows: int) -> None:
    turns = [[{"user": f"What is {name} {row}?", "assistant": f"The answer {row}."}] for row in range(num_rows)]
    ratings = {
        f"{key}_{kind}": [[4]] * num_rows if kind == "ratings" else [4] * num_rows
        for key in ("relevance", "image_correspondence", "visual_dependency", "formatting")
        for kind in ("ratings", "min")
    }
    images = [[] if name.startswith("text") else [{"bytes": JPEG, "path": None}]] * num_rows
    columns = {"images": pyarrow.array(images, pyarrow.list_(pyarrow.struct({"bytes": "binary", "path": "string"})))}
    write_table(path, columns | {"texts": turns, "source": [name] * num_rows} | ratings)


def onevision(path: Path, name: str, num_rows: int) -> None:
    talk = [
        [{"from": "human", "value": f"<image>\nWhat is {row}?"}, {"from": "gpt", "value": f"It is {name}."}]
        for row in range(num_rows)
    ]
    columns = {"id": [str(row) for row in range(num_rows)], "image": [{"bytes": JPEG, "path": None}] * num_rows}
    write_table(path, columns | {"conversations": talk, "data_source": [name] * num_rows})


def put_dataset(hub: Path, lists: Path, repo: str, subsets: dict[str, int], write) -> None:
    files = ["1500 README.md"]
    for name, number in subsets.items():
        for place in range(number):
            path = hub / repo / name / f"train-{place:05d}-of-{number:05d}.parquet"
            write(path, name, 8)
            files.append(f"{path.stat().st_size} {path.relative_to(hub / repo)}")
    (lists / f"{Path(repo).name}.txt").write_text("\n".join(files) + "\n")


@pytest.fixture
def place(tmp_path, demo_dir):
    """Environment of the scripts: the stand-in hub, its lists, `hf` and `laver`, and the settings of a small run."""
    hub, lists, programs = tmp_path / "hub", tmp_path / "lists", tmp_path / "bin"
    lists.mkdir()
    programs.mkdir()
    put_dataset(hub, lists, "HuggingFaceM4/FineVision", FINEVISION, finevision)
    put_dataset(hub, lists, "lmms-lab/LLaVA-OneVision-Data", ONEVISION, onevision)
    shutil.copytree(demo_dir / "model", hub / "Qwen" / "Qwen2.5-7B-Instruct")
    shutil.copytree(demo_dir / "encoder", hub / "google" / "siglip2-so400m-patch14-384")
    pretrain = hub / "liuhaotian" / "LLaVA-Pretrain"
    pretrain.mkdir(parents=True)
    records = []
    with zipfile.ZipFile(pretrain / "images.zip", "w") as archive:
        for number in range(12):
            archive.writestr(f"{number // 6:05d}/{number:09d}.jpg", JPEG)
            turns = [{"from": "human", "value": "Describe it.\n<image>"}, {"from": "gpt", "value": f"caption {number}"}]
            image = f"{number // 6:05d}/{number:09d}.jpg"
            records.append({"id": f"{number:09d}", "image": image, "conversations": turns})
    (pretrain / "blip_laion_cc_sbu_558k.json").write_text(json.dumps(records))
    (programs / "hf").write_text(f"#!{sys.executable}\n{HF.format(hub=str(hub))}")
    (programs / "laver").write_text(f'#!/bin/bash\nexec {sys.executable} -m laver_megatron "$@"\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    (tmp_path / "work").mkdir()
    return os.environ | {
        "PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": python_path(),
        "WORK": str(tmp_path / "work"), "LISTS": str(lists), "NUM_SAMPLES": "14", "FINEVISION_EVERY": "2",
        "ONEVISION_EVERY": "2", "NPROC_PER_NODE": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip


def run(script: str, environment: dict, *words: str) -> str:
    done = subprocess.run(
        ["bash", str(PAPER / script), *words], env=environment, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.processes
@pytest.mark.parametrize("script", [*SCRIPTS, "settings.sh"])
def test_syntax(script):
    subprocess.run(["bash", "-n", str(PAPER / script)], check=True)


@pytest.mark.parametrize(
    ("content", "message"), [(None, "No such file"), ("ai2d/train.parquet", "every line must be SIZE NAME")]
)
def test_lists_of_files_that_are_refused(tmp_path, monkeypatch, capsys, content, message):
    path = tmp_path / "files.txt"
    if content is not None:
        path.write_text(content)
    monkeypatch.setattr(sys, "argv", ["choose_files.py", "--list", str(path), "--every", "2"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(PAPER / "choose_files.py"), run_name="__main__")
    said = capsys.readouterr()
    assert end.value.code == 2 and message in said.err and str(path) in said.err and not said.out


def test_the_choice_of_files_keeps_shares_and_does_not_depend_on_their_order():
    choose = runpy.run_path(str(PAPER / "choose_files.py"))["choose"]
    subsets = {"ai2d": 40, "chartqa": 20, "docvqa": 7, "tiny": 1}
    names = [f"{name}/train-{place:05d}.parquet" for name, number in subsets.items() for place in range(number)]
    chosen = choose(names, 5, 1)
    assert choose(names[::-1], 5, 1) == chosen
    assert choose(names, 5, 2) != chosen
    assert choose(names, 1, 1) == sorted(names)
    counts = Counter(name.split("/")[0] for name in chosen)
    assert all(abs(counts[name] - number / 5) < 1 for name, number in subsets.items())
    # Over seeds, every file has the same chance.
    drawn = Counter(name for seed in range(400) for name in choose(names, 5, seed))
    assert all(80 / 2 < drawn[name] < 80 * 2 for name in names)


@pytest.mark.processes
def test_from_the_lists_to_the_dry_run(place):
    """Every second file of every subset is downloaded, shards and subsets are made of them, all stages are checked."""
    said = run("1_download.sh", place)
    work = Path(place["WORK"])
    found = sorted(path.parent.name for path in (work / "downloads" / "FineVision").rglob("*.parquet"))
    assert len(found) in (3, 4) and 1 <= Counter(found)["ai2d_merged"] <= 3
    assert found == sorted(Path(name).parent.name for name in (work / "downloads/FineVision.txt").read_text().split())
    assert any("(cauldron,llava_format)" in line for line in said.splitlines() if line.startswith("downloaded"))
    assert re.search(r"of 7 Parquet files, 0\.0 of 0\.0 GB", said)
    run("2_shards.sh", place)
    for name in ("finevision-800k", "onevision-800k"):
        assert read_table(work / "shards" / f"{name}.parquet").num_rows == 14
    assert "images" in os.listdir(work / "downloads" / "LLaVA-Pretrain")
    run("3_train.sh", place, *SMALL, "--dry-run")
    assert not (work / "runs").exists()
    # Again: nothing is made twice.
    before = {path: path.stat().st_mtime_ns for path in (work / "shards").rglob("*.tar")}
    run("1_download.sh", place)
    run("2_shards.sh", place)
    assert {path: path.stat().st_mtime_ns for path in (work / "shards").rglob("*.tar")} == before


@pytest.mark.processes
def test_the_kits_are_called_for_both_arms_and_their_folders_are_read(place, tmp_path):
    """The kits' programs stand for themselves: each leaves what it once wrote where it was told to."""
    copy = """
import sys, tarfile
from pathlib import Path
words, arm = sys.argv[1:], "baseline" if "baseline" in " ".join(sys.argv) else "laver"
given = {first: second for first, second in zip(words, words[1:])}
place = Path(given.get("--work-dir") or given["--output_path"])
kit, target = ("vlmevalkit_tsv", place / arm) if "--work-dir" in given else ("lmms_eval", place)
with tarfile.open(%r) as archive:
    for member in archive.getmembers():
        if member.name.startswith(f"{kit}/{arm}/"):
            member.name = str(Path(member.name).relative_to(f"{kit}/{arm}"))
            archive.extract(member, target, filter="data")
"""
    for program in ("torchrun", "accelerate"):
        path = tmp_path / "bin" / program
        path.write_text(f"#!{sys.executable}\n{copy % str(KITS)}")
        path.chmod(0o755)
    said = run("5_evaluate.sh", place)
    assert len(re.findall("^average", said, re.MULTILINE)) == 2
    for kit in ("vlmevalkit", "lmms-eval"):
        assert "MMVP" in (Path(place["WORK"]) / "scores" / "7b" / f"{kit}.md").read_text()


@pytest.mark.processes
@pytest.mark.slow("trains five stages; test_stages.py and test_export_model.py show the parts")
def test_to_the_exports(place):
    """What is left for the kits: two exports that hold what was trained, laver and baseline."""
    for script in SCRIPTS[:2]:
        run(script, place)
    run("3_train.sh", place, *SMALL)
    run("4_export.sh", place)
    work = Path(place["WORK"])
    for arm in ("laver", "baseline"):
        assert json.loads((work / "exports" / "7b" / arm / "config.json").read_text())["architectures"]
    assert sorted(os.listdir(work / "runs" / "7b")) == [
        "stage1_align", "stage2_laver", "stage2_laver-baseline", "stage3_instruct", "stage3_instruct-baseline",
    ]  # fmt: skip
