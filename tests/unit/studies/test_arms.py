"""Arms of a sweep as named overrides: what they change, what they cost, and bad input."""

import pytest
import yaml

from laver_megatron.config.fields import ConfigError
from laver_megatron.flops.step import matmul_flops
from laver_megatron.studies.arms import read_arms
from laver_megatron.studies.sweep_options import SweepOptions
from tests.unit.studies.test_sweep import refused

ROWS = {
    "plain": {"laver": False, "attention": "causal", "positions": "1d"},
    "mixed": {"laver": False, "positions": "1d"},
    "mim": {"gram_loss": "none"},
    "cga": {},
    "wide": {"vision_head_output_size": 64},
    "official": {"preset": "official-settings", "mask_ratio": "0.5"},
}


def test_arms_of_a_file_and_of_the_command_line(sweep, tmp_path):
    """Runs differ in what their arm says and in nothing else; every arm is planned at what it costs."""
    (tmp_path / "arms.yaml").write_text(yaml.safe_dump(ROWS, sort_keys=False))
    del sweep.models[1]
    inline = "frozen=freeze:[encoder, connector],mask_ratio:0.2"
    assert sweep("--iterations", "2", "--seeds", "1", "2", "--arms", tmp_path / "arms.yaml", "--arm", inline) == 0
    runs = sweep.runs
    assert len(runs) == 7 * 2
    configs = {arm: sweep.config(f"model_16x1-iterations2-{arm}-seed2").flat() for arm in [*ROWS, "frozen"]}
    base = configs["cga"]
    changed = {
        arm: {key for key in base if config[key] != base[key]} - {"run_dir", "arm"} for arm, config in configs.items()
    }
    assert changed["plain"] == {"laver", "attention", "positions"} and changed["mim"] == {"gram_loss"}
    assert changed["frozen"] == {"freeze", "mask_ratio"} and configs["frozen"]["freeze"] == ("encoder", "connector")
    assert configs["official"]["centre_momentum"] == 0.9 and configs["official"]["mask_ratio"] == 0.5
    assert all(config["arm"] == arm for arm, config in configs.items())
    for seed in (1, 2):
        lines = {arm: runs[f"model_16x1-iterations2-{arm}-seed{seed}"] for arm in configs}
        assert len({(line["tokens"], line["visual_tokens"]) for line in lines.values()}) == 1
        flops = {arm: int(line["flops"]) for arm, line in lines.items()}
        assert flops["plain"] < flops["mixed"] < flops["mim"] < flops["cga"] < flops["wide"]
        assert flops["official"] == flops["cga"] > flops["frozen"]
        # Per visual token the last layer of two heads, one of which trains; the rest is the Gram matrices'.
        head = 4 * int(lines["cga"]["visual_tokens"]) * matmul_flops(1, 64 - 16, 32)
        assert flops["wide"] - flops["cga"] > head


@pytest.mark.parametrize(
    "arms, said",
    [
        ({"one": {"mask_rate": 0.1}}, "arm one: unknown key mask_rate; did you mean mask_ratio?"),
        ({"one": {"mask_ratio": "many"}}, "arm one: mask_ratio: expected a number, not 'many'"),
        ({"one": {"mask_ratio": 1.5}}, "mask_ratio is 1.5, but must be from 0 to 1"),
        ({"one": {"lr": 1e-3}}, "lr cannot be overridden, it is the same for all arms of a size"),
        ({"one": {"seed": 1}}, "seed cannot be overridden, it is the sweep's, by --seeds"),
        ({"one": {"data_path": "x"}}, "data_path cannot be overridden"),
        ({"one": {"train_iters": 3}}, "train_iters cannot be overridden"),
        ({"one": {"tensor_model_parallel_size": 2}}, "tensor_model_parallel_size cannot be overridden"),
        ({"one": {}, "two": {"laver": True}}, "the arms one and two are equal"),
        ({"one": {"laver": False}, "two": {"laver": False, "mask_ratio": 0.3}}, "the arms one and two are equal"),
        ({"one": {}, "two": {"log_interval": 3}}, "the arms one and two are equal"),
        ({"one two": {}}, "the name 'one two' would be part of file names"),
        ({"one": 3}, "arm one: expected a mapping of settings, found 3"),
        ([1], "expected `key: value` lines, found a list"),
        ({}, "arms.yaml names no arm"),
    ],
)
def test_arms_that_cannot_be(sweep, tmp_path, arms, said):
    (tmp_path / "arms.yaml").write_text(yaml.safe_dump(arms, sort_keys=False))
    assert said in refused(sweep, "--iterations", "2", "--arms", tmp_path / "arms.yaml")


@pytest.mark.parametrize(
    "options, said",
    [
        ({"arms": ["absent.yaml"]}, "absent.yaml: cannot be read"),
        ({"arms": ["other"]}, "--arms other: neither laver nor baseline nor a .yaml file"),
        ({"arms": ["laver", "laver"]}, "the arms name laver twice"),
        ({"arms": ["laver"], "arm": ["laver=mask_ratio:0.1"]}, "the arms name laver twice"),
        ({"arm": ["mim"]}, "--arm mim: expected NAME=field:value"),
        ({"arm": ["mim=gram_loss:none,gram_loss:ga"]}, "'gram_loss' is given twice"),
        ({"arm": ["mim=gram_loss:many"]}, "gram_loss: 'many' is not one of"),
    ],
)
def test_options_that_name_no_arm(options, said):
    with pytest.raises(ConfigError) as error:
        read_arms(SweepOptions(**options))
    assert said in str(error.value)


def test_the_order_is_that_of_the_command_line():
    names = [arm.name for arm in read_arms(SweepOptions(arms=["baseline"], arm=["b=", "a=mim_weight:0"]))]
    assert names == ["baseline", "b", "a"]
    assert [arm.name for arm in read_arms(SweepOptions())] == ["laver", "baseline"]
    assert [dict(arm.overrides) for arm in read_arms(SweepOptions(arm=["a=mim_weight:0"]))] == [{"mim_weight": 0.0}]
