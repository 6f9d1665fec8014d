"""examples/ablation: the files are read, and the arms are the rows of the paper."""

from pathlib import Path

import pytest

from laver_megatron.config.command_line import load_config
from laver_megatron.studies.arms import equal_arms, read_arms
from laver_megatron.studies.sweep_options import SweepOptions

FILES = Path(__file__).parents[3] / "examples" / "ablation"
OF_THE_SWEEP = ["--train-iters", "100", "--run-dir", "runs/x"]


@pytest.mark.parametrize("name", ["base", "align", "cpu", "gpu", "cluster"])
def test_configurations_are_read(name):
    config = load_config(["--config", str(FILES / f"{name}.yaml"), *OF_THE_SWEEP])
    if name in ("cpu", "gpu", "cluster"):  # arms change both, and the last iteration must be validated
        assert set(config.start.allow_change) == {"attention", "positions"} and config.start.finetune
        assert config.run.eval_interval is not None and config.data.valid_data_path is not None


@pytest.mark.parametrize("name", ["cpu", "gpu", "cluster"])
def test_arms_are_the_papers_rows(name):
    arms = read_arms(SweepOptions(arms=[str(FILES / "arms.yaml")]))
    assert [arm.name for arm in arms] == ["baseline", "mixed", "2d", "both", "mim", "mim-ga", "mim-cga"]
    base = load_config(["--config", str(FILES / f"{name}.yaml"), *OF_THE_SWEEP])
    assert not list(equal_arms(arms, base))
    settings = [
        (it.objective.laver and it.objective.gram_loss, it.model.attention, it.model.positions)
        for it in (arm.configured(base) for arm in arms)
    ]
    assert settings == [
        (False, "causal", "1d"), (False, "mixed", "1d"), (False, "causal", "2d"), (False, "mixed", "2d"),
        ("none", "mixed", "2d"), ("ga", "mixed", "2d"), ("cga", "mixed", "2d"),
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["cpu", "gpu", "cluster"])
def test_controls_differ_from_the_configuration_in_one_setting(name):
    arms = read_arms(SweepOptions(arms=[str(FILES / "controls.yaml")]))
    base = load_config(["--config", str(FILES / f"{name}.yaml"), *OF_THE_SWEEP])
    assert not list(equal_arms(arms, base))
    for arm in arms:
        changed = {field for field, value in arm.configured(base).flat().items() if value != base.flat()[field]}
        assert len(changed - {"arm"}) == (0 if arm.name == "mim-cga" else 1), arm.name


def test_the_second_setting_has_the_papers_mask_ratio_and_weight():
    """And is otherwise the first, so that `both` of either can serve."""
    base = load_config(["--config", str(FILES / "cpu.yaml"), *OF_THE_SWEEP])
    first, second = (
        {arm.name: arm.configured(base) for arm in read_arms(SweepOptions(arms=[str(FILES / name)]))}
        for name in ("arms.yaml", "arms_paper_values.yaml")
    )
    assert second.keys() == {"both", "mim", "mim-ga", "mim-cga"} and second["both"] == first["both"]
    for name in second.keys() - {"both"}:
        assert second[name] == first[name].replace(mask_ratio=0.05, mim_weight=1.0)
