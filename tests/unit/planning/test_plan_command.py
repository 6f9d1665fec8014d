"""What the planner reads and writes: flags that cannot be are refused at once, and what it writes can run."""

import json
import shutil

import pytest
import yaml

from laver_megatron.config.command_line import read_command_line
from laver_megatron.config.fields import ConfigError
from laver_megatron.demo.encoders import save_encoder
from laver_megatron.planning import plan_command
from laver_megatron.planning.dry_run_command import show_dry_run
from laver_megatron.planning.hardware import find_gpu
from laver_megatron.planning.models import MODELS, SIGLIP2, encoder_sizes
from laver_megatron.planning.plan import plan_layout
from laver_megatron.planning.plan_command import main
from tests.unit.planning.plans import job_of

H100 = ("--gpu", "h100-80gb")
SEVEN = ("--model", "7b", "--gpus", "16", *H100, "--seq-length", "2048", "--global-batch-size", "128")


@pytest.fixture
def no_search(monkeypatch):
    """What is refused must be so before anything is searched."""

    def search(*arguments):
        raise AssertionError("searched")

    monkeypatch.setattr(plan_command, "search", search)


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--gpu", "h1000"), "GPU 'h1000' is not known; choose one of a100-40gb"),
        ((), "no GPU is named; choose one of a100-40gb"),
        ((*H100, "--gpus", "0"), "--gpus is 0, but must be at least 1"),
        ((*H100, "--gpus", "2000000000"), "--gpus is 2000000000, but must be at most 1,000,000"),
        ((*H100, "--gpus", "29"), "the nearest number of GPUs that is possible: 28"),
        ((*H100, "--seq-length", "65536"), "seq_length 65536 is above the model's max_position_embeddings"),
        ((*H100, "--visual-share", "0.01"), "less than one image of 729"),
        ((*H100, "--visual-share", "0"), "leaves nothing to reconstruct; give a --visual-share above 0, or --no-laver"),
        ((*H100, "--visual-share", "nan"), "the visual share is nan"),
        ((*H100, "--visual-share", "inf"), "the visual share is inf"),
        ((*H100, "--visual-share", "-0.5"), "the visual share is -0.5"),
        ((*H100, "--image-tokens", "100"), "--image-tokens is 100, but the encoder makes 729 visual tokens"),
        ((*H100, "--tp", "0"), "tensor_model_parallel_size is 0, but must be at least 1"),
        ((*H100, "--tp", str(10**18)), "must be at most 1,000,000"),
        ((*H100, "--model", "8b"), "model '8b' is not known"),
        ((*H100, "--encoder", "/nowhere"), "no such directory"),
        ((*H100, "--gpu-memory", "1"), "--gpu-memory is 1 GiB, of which nothing is left for tensors"),
        *[
            ((*H100, flag, number), f"{flag} is {float(number)}, but must be a number from 0.001 to 1,000,000")
            for flag in ("--gpu-memory", "--gpu-tflops", "--bandwidth", "--node-bandwidth")
            for number in ("nan", "inf", "0", "-1")
        ],
        ((*H100, "--gpus-per-node", "0"), "--gpus-per-node is 0, but must be a number from"),
    ],
)
def test_bad_input_ends_with_2(no_search, capsys, flags, message):
    given = [] if "--model" in flags else ["--model", "7b"]
    given += [] if "--gpus" in flags else ["--gpus", "16"]
    with pytest.raises(SystemExit) as caught:
        main([*given, *flags])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_text_alone_is_planned_without_laver(capsys):
    main([*SEVEN, "--visual-share", "0", "--no-laver", "--json"])
    assert json.loads(capsys.readouterr().out)["workload"]["num_images"] == 0


@pytest.mark.parametrize(
    "place, message",
    [("missing/plan.yaml", "there is no directory"), (".", "is a directory"), ("there.yaml", "exists already")],
)
def test_where_nothing_can_be_written_nothing_is_searched(no_search, tmp_path, capsys, place, message):
    (tmp_path / "there.yaml").write_text("mine")
    with pytest.raises(SystemExit) as caught:
        main([*SEVEN, "--write", str(tmp_path / place)])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / "there.yaml").read_text() == "mine"


def test_a_file_is_replaced_if_it_is_asked_for(tmp_path, capsys):
    file = tmp_path / "there.yaml"
    file.write_text("mine")
    main([*SEVEN, "--write", str(file), "--overwrite"])
    assert "# Made by: laver plan" in file.read_text()


def test_what_the_weights_lack_is_said(tmp_path, capsys):
    for model, is_said in (("110b", True), ("72b", False)):
        file = tmp_path / f"{model}.yaml"
        main(["--model", model, "--gpus", "128", *H100, "--tp", "8", "--pp", "16", "--write", str(file)])
        text = file.read_text()
        assert ("lacks <|vision_start|>" in text) == is_said
        assert all(len(line) <= 120 for line in text.splitlines() if line.startswith("#") and "Made by" not in line)
        assert yaml.safe_load(text)["pipeline_model_parallel_size"] == 16
        assert yaml.safe_load(text)["save_interval_minutes"] == 30


def test_modules_that_are_recomputed(tmp_path, capsys):
    """They are not searched, and count in memory, time and what is written."""
    layout = ("--tp", "2", "--pp", "1", "--micro-batch-size", "2", "--json")
    plans = {}
    for name, flags in {
        "none": ("--recompute", "none"),
        "core_attn": ("--recompute", "selective"),
        "mlp": ("--recompute-modules", "mlp"),
        "both": ("--recompute", "selective", "--recompute-modules", "core_attn", "mlp"),
        "full": ("--recompute", "full"),
    }.items():
        file = tmp_path / f"{name}.yaml"
        main([*SEVEN, *layout, *flags, "--write", str(file)])
        [plans[name]] = json.loads(capsys.readouterr().out)["best"]
        written = yaml.safe_load(file.read_text())
        assert written["recompute_granularity"] == plans[name]["layout"]["recompute_granularity"]
        assert written["recompute_modules"] == {"mlp": ["mlp"], "both": ["core_attn", "mlp"]}.get(name)
    memory = {name: plan["stages"][0]["activation_bytes"]["layers"] for name, plan in plans.items()}
    assert memory["none"] > memory["mlp"] > memory["full"]
    assert memory["none"] - memory["both"] == 2 * memory["none"] - memory["mlp"] - memory["core_attn"]
    flops = {name: plan["hardware_flops"] for name, plan in plans.items()}
    assert flops["none"] < flops["core_attn"] < flops["both"] < flops["full"] and flops["none"] < flops["mlp"]
    seconds = {name: plan["seconds"] for name, plan in plans.items()}
    assert seconds["none"] < seconds["mlp"] < seconds["both"] < seconds["full"]
    sent = {name: plan["stages"][0]["sent_bytes"]["tensor_parallel"] for name, plan in plans.items()}
    assert sent["none"] == sent["core_attn"] < sent["mlp"] == sent["both"] < sent["full"]


def test_modules_are_named_in_the_report(capsys):
    main([*SEVEN, "--recompute-modules", "mlp", "layernorm"])
    printed = capsys.readouterr().out
    assert "mlp and layernorm recomputed" in printed and "mlp+layernorm" in printed


@pytest.mark.parametrize("kind", ["none", "full"])
def test_modules_of_another_recomputation_are_refused(no_search, capsys, kind):
    with pytest.raises(SystemExit) as caught:
        main([*SEVEN, "--recompute", kind, "--recompute-modules", "mlp"])
    assert caught.value.code == 2
    assert f"recompute_modules (mlp) are those of recompute_granularity selective, but it is {kind}" in (
        capsys.readouterr().err
    )


def test_links_of_a_described_gpu():
    described = {"memory_gib": 96, "tflops": 400, "bandwidth_gb": 25}
    assert find_gpu(None, **described).node_bandwidth == 25e9
    gpu = find_gpu(None, **described, node_bandwidth_gb=450)
    assert (gpu.node_bandwidth, gpu.network_bandwidth) == (450e9, 25e9)
    assert find_gpu("h100-80gb", node_bandwidth_gb=64).node_bandwidth == 64e9
    flags = ("--model", "7b", "--gpus", "8", "--gpu-memory", "96", "--gpu-tflops", "400", "--bandwidth", "25")
    slow, fast = job_of(*flags), job_of(*flags, "--node-bandwidth", "450")
    config = slow.base.replace(tensor_model_parallel_size=4, sequence_parallel=True)
    assert plan_layout(slow, config).seconds > 1.5 * plan_layout(fast, config).seconds


def test_image_tokens_are_the_encoders(tmp_path):
    """Those of a fixed size cannot be chosen; of native resolution they are a limit that the trainer must know."""
    for kind in ("siglip", "patches"):
        save_encoder(tmp_path / kind, kind)
    flags = ("--model", "7b", "--gpus", "8", *H100, "--encoder")
    fixed = job_of(*flags, str(tmp_path / "siglip"))
    tokens = fixed.workload.image_tokens
    assert fixed.base.data.max_image_tokens is None
    same = job_of(*flags, str(tmp_path / "siglip"), "--image-tokens", str(tokens))
    assert same.base == fixed.base and same.workload == fixed.workload
    with pytest.raises(ConfigError, match=f"--image-tokens is {tokens + 1}, but the encoder makes {tokens} "):
        job_of(*flags, str(tmp_path / "siglip"), "--image-tokens", str(tokens + 1))
    native = job_of(*flags, str(tmp_path / "patches"), "--image-tokens", "100")
    assert native.workload.image_tokens == native.base.data.max_image_tokens == 100


@pytest.mark.parametrize(
    "layout, name",
    [
        (("--tp", "2", "--pp", "2"), "# TP 2 x PP 2 x DP 2"),
        (
            ("--pp", "2", "--decoder-first-pipeline-num-layers", "1", "--tp", "1"),
            "# TP 1 x PP 2 x DP 4, 1 layer first",
        ),
    ],
)
def test_the_written_configuration_passes_a_dry_run(demo_dir, tmp_path, capsys, layout, name):
    """On directories without weights, as examples/ and the hub's small files make them."""
    for part in ("model", "encoder"):
        shutil.copytree(demo_dir / part, tmp_path / part, ignore=shutil.ignore_patterns("*.safetensors"))
    file = tmp_path / "plan.yaml"
    flags = ["--model", str(tmp_path / "model"), "--encoder", str(tmp_path / "encoder"), "--gpus", "8", "--gpu-memory",
             "4", "--gpu-tflops", "1", "--bandwidth", "1", "--seq-length", "512", "--global-batch-size", "64",
             *layout, "--write", str(file)]  # fmt: skip
    main(flags)
    text = file.read_text()
    assert text.startswith(name) and "# Made by: laver plan --model" in text
    capsys.readouterr()
    show_dry_run(read_command_line(["--config", str(file), "--dry-run", "8"]))
    assert "dry run, nothing wrong" in capsys.readouterr().out


def test_a_job_by_hand_is_that_of_the_command():
    paper = job_of(*SEVEN[:5], "a100-80gb", *SEVEN[6:])
    assert paper.shape == MODELS["7b"] and paper.encoder_sizes == encoder_sizes(SIGLIP2)
    assert paper.gpu == find_gpu("a100-80gb")
    assert (
        paper.base.data.visual_seq_length % 128 == 0
        and paper.base.data.visual_seq_length >= paper.workload.num_visual_tokens
    )
