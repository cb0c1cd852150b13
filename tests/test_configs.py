"""Every shipped config is parsed by the command line, alone and with each overlay."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from rexnet_lit.cli import main
from rexnet_lit.models import variants

CONFIGS = Path(__file__).parents[1] / "configs"
WHOLE = sorted(set(CONFIGS.glob("*.yaml")) - {CONFIGS / "tune.yaml"})  # which is the search space of tune
OVERLAYS = sorted(CONFIGS.glob("*/*.yaml"))

# Lightning 2.6.6 calls functions that jsonargparse 4.49 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli")


def parse(capsys, *files):
    """The settings of a fit with these configs; nothing is built or run."""
    argv = ["fit", *(part for file in files for part in ("--config", str(file))), "--print_config"]
    assert main.main(argv) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return yaml.safe_load(out)


def leaves(tree, prefix=""):
    """``{"a.b": value}`` of nested dicts."""
    for key, value in tree.items():
        yield from leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]


def test_there_are_configs():
    assert {f.stem for f in WHOLE} >= {"finetune", "linear_probe", "quickstart", "imagenet"}
    assert {f.stem for f in OVERLAYS} >= {"cpu", "gpu_amp", "ddp", "ddp_sim", "multinode"}


@pytest.mark.parametrize("file", WHOLE, ids=lambda f: f.stem)
def test_a_config_sets_its_values(file, capsys):
    parsed = dict(leaves(parse(capsys, file)))
    for key, value in leaves(yaml.safe_load(file.read_text())):
        found = parsed[key] if key in parsed else parsed[f"{key}.name"]  # `strategy: linear_probe` names a kind
        assert found == value, key


@pytest.mark.parametrize("file", OVERLAYS, ids=lambda f: f.stem)
def test_an_overlay_sets_only_what_differs(file, capsys):
    base = dict(leaves(parse(capsys, CONFIGS / "finetune.yaml")))
    both = dict(leaves(parse(capsys, CONFIGS / "finetune.yaml", file)))
    overlay = dict(leaves(yaml.safe_load(file.read_text())))
    assert {key for key in both if both[key] != base[key]} == set(overlay)
    assert {key: both[key] for key in overlay} == overlay
    if file.stem == "multinode":
        parse(capsys, CONFIGS / "imagenet.yaml", file)


@pytest.mark.parametrize("file", WHOLE + OVERLAYS, ids=lambda f: f.stem)
def test_a_header_shows_the_command(file):
    lines = file.read_text().splitlines()
    header = "\n".join(lines[: next(i for i, line in enumerate(lines) if line[:1] != "#")])
    assert "-m rexnet_lit fit" in header
    name = file.relative_to(CONFIGS).with_suffix("").as_posix()
    assert f"--config {name}\n" in header or name == "finetune"  # the default


def test_imagenet_is_the_recipe_of_the_timm_page(capsys):
    """The values of timm's ReXNet page (https://huggingface.co/docs/timm/models/rexnet), model index of rexnet_100."""
    config = parse(capsys, CONFIGS / "imagenet.yaml")
    trainer, data, model = config["trainer"], config["data"], config["model"]
    assert model["backbone"] == "rexnet_100"
    assert model["pretrained"] is False
    assert trainer["max_epochs"] == 400
    assert data["batch_size"] * trainer["devices"] == 512  # on 4 V100
    assert (trainer["strategy"], trainer["devices"], trainer["precision"]) == ("ddp", 4, "16-mixed")
    assert model["optimizer"]["name"] == "sgd"  # timm's sgd uses Nesterov momentum
    assert model["optimizer"]["lr"] == 0.5
    assert model["optimizer"]["momentum"] == 0.9
    assert model["optimizer"]["weight_decay"] == 1e-5
    assert model["schedule"]["name"] == "cosine"
    assert model["schedule"]["warmup_epochs"] == 5
    assert model["head"]["dropout"] == 0.2
    assert model["loss"]["label_smoothing"] == 0.1
    assert data["image_size"] == 224
    assert data["augment"]["name"] == "randaugment"
    assert data["augment"]["magnitude"] == 9
    assert data["augment"]["erasing"] == 0.2
    recipe = variants.eval_recipe("rexnet_100", data["image_size"])
    assert (recipe.crop_pct, recipe.interpolation) == (0.875, "bicubic")


def test_sgd_uses_nesterov_momentum():
    import torch

    from rexnet_lit.training.optim import OptimizerSettings, build_optimizer

    optimizer = build_optimizer(torch.nn.Linear(2, 2), OptimizerSettings("sgd", lr=0.5, weight_decay=1e-5))
    assert all(group["nesterov"] and group["momentum"] == 0.9 for group in optimizer.param_groups)


def test_help_and_errors_list_what_the_registries_hold(capsys, tmp_path):
    from rexnet_lit.data.augmentation import RECIPES
    from rexnet_lit.data.sampler import SAMPLERS
    from rexnet_lit.models.heads import HEADS
    from rexnet_lit.training.freezing import STRATEGIES
    from rexnet_lit.training.losses import LOSSES
    from rexnet_lit.training.schedules import SCHEDULES

    assert main.main(["fit", "--help_all"]) == 0
    shown = capsys.readouterr().out
    registries = {
        "data.augment.name": RECIPES, "data.sampler": SAMPLERS, "model.head.name": HEADS,
        "model.strategy.name": STRATEGIES, "model.loss.name": LOSSES, "model.schedule.name": SCHEDULES,
    }  # fmt: skip
    for key, registry in registries.items():
        assert f"--{key} {{{','.join(registry)}}}" in shown
        config = tmp_path / "config.yaml"
        group, _, rest = key.partition(".")
        inner = rest.split(".")
        value = {inner[0]: "nope"} if len(inner) == 1 else {inner[0]: {inner[1]: "nope"}}
        config.write_text(yaml.safe_dump({group: value}))
        assert main.main(["fit", "--config", str(config)]) == 2
        error = capsys.readouterr().err
        assert str(config) in error
        assert all(name in error for name in (key, *registry))
