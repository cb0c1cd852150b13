"""What trains: frozen parts that stay as they are, and the optimiser's groups."""

from __future__ import annotations

import itertools

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from rexnet_lit.data.datamodule import ImageFolderDataModule
from rexnet_lit.models.heads import HeadSpec
from rexnet_lit.models.rexnet import build_network
from rexnet_lit.training.freezing import StrategySettings, backbone_groups, freeze, freeze_batchnorm
from rexnet_lit.training.module import RexNetModule
from rexnet_lit.training.optim import OptimizerSettings, build_optimizer
from rexnet_lit.utils.errors import UserError


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return build_network("rexnet_100", 3)


@pytest.fixture(scope="module")
def frozen() -> set[str]:
    """What the strategies have frozen of `network`."""
    return set()


def rates(network: nn.Module, settings: OptimizerSettings) -> dict[str, tuple[float, float]]:
    """The learning rate and weight decay of every parameter."""
    names = {id(p): name for name, p in network.named_parameters()}
    optimizer = build_optimizer(network, settings)
    found = [(names[id(p)], (g["lr"], g["weight_decay"])) for g in optimizer.param_groups for p in g["params"]]
    assert len(found) == len(dict(found)), "a parameter is in two groups"
    return dict(found)


def test_norms_and_biases_do_not_decay(network):
    found = rates(network, OptimizerSettings(lr=0.5, weight_decay=0.1))
    norms = {
        f"{name}.{part}" for name, m in network.named_modules() if isinstance(m, nn.BatchNorm2d) for part in
        ("weight", "bias")
    }  # fmt: skip
    assert found.keys() == {name for name, _ in network.named_parameters()}
    for name, (rate, decay) in found.items():
        assert rate == 0.5
        assert decay == (0.0 if name in norms or name.endswith(".bias") else 0.1), name


def test_layer_decay_by_hand(network):
    """rexnet_100 has a stem, 17 blocks and a head: the stem's rate is multiplied 18 times, the last block's once."""
    found = rates(network, OptimizerSettings(lr=1.0, weight_decay=0.1, layer_decay=0.5))
    assert found.keys() == {name for name, _ in network.named_parameters()}
    assert found["head.fc.weight"] == (1.0, 0.1)
    assert found["head.fc.bias"] == (1.0, 0.0)
    assert found["features.16.conv.weight"] == (0.5, 0.1)
    assert found["features.16.bn.weight"] == (0.5, 0.0)
    assert found["features.15.conv_pwl.conv.weight"] == (0.25, 0.1)
    assert found["features.0.conv_dw.conv.weight"] == (0.5**17, 0.1)
    assert found["stem.conv.weight"] == (0.5**18, 0.1)


def test_layer_decay_of_an_mlp_head():
    network = build_network("rexnet_100", 3, HeadSpec("mlp", 8))
    found = rates(network, OptimizerSettings(lr=1.0, layer_decay=0.5))
    assert {found[f"head.fc.{i}.weight"][0] for i in (0, 3)} == {1.0}


@pytest.mark.parametrize("layer_decay", [1.0, 0.7])
def test_frozen_parameters_are_in_the_optimiser_from_the_first_step(layer_decay):
    frozen: set[str] = set()
    network = build_network("rexnet_100", 3)
    freeze(network, StrategySettings("linear_probe"), 0, frozen)
    before = {name: p.requires_grad for name, p in network.named_parameters()}
    assert {n for n, trains in before.items() if trains} == {"head.fc.weight", "head.fc.bias"}
    found = rates(network, OptimizerSettings(layer_decay=layer_decay))
    assert found.keys() == before.keys()
    assert {name: p.requires_grad for name, p in network.named_parameters()} == before


@pytest.mark.parametrize("name", ["sgd", "adamw", "AdamW", "lamb", "lion", "rmsprop"])
def test_optimisers_by_name(name):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    optimizer = build_optimizer(network, OptimizerSettings(name=name, lr=0.01, momentum=0.8))
    before = [p.detach().clone() for p in network.parameters()]
    network(torch.ones(2, 3, 3, 3)).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
    if name == "sgd":
        assert all(g["nesterov"] and g["momentum"] == 0.8 for g in optimizer.param_groups)


def test_an_unknown_optimiser_names_its_neighbour():
    with pytest.raises(UserError, match=r"model.optimizer.name: timm has no optimiser 'adamv'; did you mean 'adam"):
        build_optimizer(nn.Linear(1, 1), OptimizerSettings(name="adamv"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine on which these optimisers do not work")
def test_an_optimiser_that_cannot_be_had_here_is_one_line():
    with pytest.raises(UserError, match=r"model.optimizer: fusedadam"):
        build_optimizer(nn.Linear(1, 1), OptimizerSettings(name="fusedadam"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0}, "model.optimizer.lr is 0"),
        ({"name": "adahessian"}, "model.optimizer.name: adahessian needs"),
        ({"name": "kronw"}, "model.optimizer.name: kronw compiles itself"),
        ({"lr": float("nan")}, "model.optimizer.lr is nan"),
        ({"layer_decay": 0}, "model.optimizer.layer_decay is 0"),
        ({"layer_decay": 1.1}, "model.optimizer.layer_decay is 1.1"),
        ({"weight_decay": -1}, "model.optimizer.weight_decay is -1"),
        ({"momentum": 1.0}, "model.optimizer.momentum is 1"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(UserError, match=message):
        OptimizerSettings(**settings)


def test_an_unknown_strategy():
    with pytest.raises(
        UserError, match=r"model.strategy.name is 'half'; expected one of full, linear_probe, partial, staged"
    ):
        StrategySettings("half")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"frozen": 19}, "model.strategy.frozen is 19"),
        ({"unfreeze_epochs": (3, 1)}, r"unfreeze_epochs is \[3, 1\]; expected two epochs in order"),
        ({"bn": "off"}, "model.strategy.bn is 'off'; expected one of train, frozen"),
        ({"solver": "svm"}, "model.strategy.solver is 'svm'"),
        ({"views": -1}, "model.strategy.views is -1"),
    ],
)
def test_wrong_strategies(settings, message):
    with pytest.raises(UserError, match=message):
        StrategySettings(**settings)


def test_groups_are_those_of_timm_s_group_matcher(network, frozen):
    from timm.models._manipulate import group_with_matcher

    groups = group_with_matcher(network.named_parameters(), network.group_matcher(), return_values=False)
    theirs = ["stem" if name.startswith("stem") else ".".join(name.split(".")[:2]) for name, *_ in groups.values()]
    assert backbone_groups(network) == theirs[:18]  # and the head
    assert theirs[18] == "head.fc"
    for settings in (StrategySettings("partial", frozen=5), StrategySettings("partial", frozen=0)):
        for epoch in (0, 9):
            freeze(network, settings, epoch, frozen)
            still = {n for n, p in network.named_parameters() if not p.requires_grad}
            groups_frozen = tuple(f"{group}." for group in theirs[: settings.frozen])
            expected = {n for n, _ in network.named_parameters() if n.startswith(groups_frozen)}
            assert still == expected if groups_frozen else not still


def test_staged_trains_the_head_then_the_upper_half_then_all(network, frozen):
    settings = StrategySettings("staged", unfreeze_epochs=[2, 3])
    for epoch, first in ((0, None), (1, None), (2, "features.8"), (3, "stem"), (50, "stem")):
        freeze(network, settings, epoch, frozen)
        groups = [g for g in backbone_groups(network) if next(network.get_submodule(g).parameters()).requires_grad]
        assert (groups[0] if groups else None) == first, epoch
        assert groups == backbone_groups(network)[18 - len(groups) :]
        assert network.head.fc.weight.requires_grad


def test_batchnorm_can_stay_frozen_where_all_trains(network):
    network.train()
    freeze_batchnorm(network, StrategySettings("full", bn="frozen"), 0)
    training = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d) and m.training]
    assert not training
    assert network.features[3].training
    network.train()


@pytest.mark.parametrize(
    ("name", "batch", "rate"), [("sgd", 64, 0.2), ("adamw", 64, 0.1 * 2**0.5), ("lamb", 16, 0.1 / 2**0.5)]
)
def test_the_rate_follows_the_batch_size_by_timm_s_rule(name, batch, rate):
    """timm's train.py: in proportion, but with the square root for "ada" and "lamb"."""
    settings = OptimizerSettings(name, lr=0.1, base_batch_size=32)
    assert settings.full_lr(True, batch) == pytest.approx(rate)
    assert settings.full_lr(True) == 0.1  # where nobody knows the batch size


def test_sgd_without_momentum_is_plain(network):
    optimizer = build_optimizer(network, OptimizerSettings("sgd", momentum=0))
    assert {(group["momentum"], group["nesterov"]) for group in optimizer.param_groups} == {(0, False)}


@pytest.mark.parametrize(("name", "given", "scratch"), [("sgd", 0.05, 0.1), ("adamw", 0.0015, 0.004)])
def test_the_default_rate_depends_on_the_start(name, given, scratch, shapes, tmp_path):
    assert OptimizerSettings(name).full_lr(False) == given
    assert OptimizerSettings(name).full_lr(True) == scratch
    data = ImageFolderDataModule(str(shapes), image_size=32, batch_size=12, num_workers=0)
    module = RexNetModule(pretrained=False, optimizer=name, num_classes=3, image_size=32)
    trainer = pl.Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, accelerator="cpu", limit_train_batches=1, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, data)
    assert {g["initial_lr"] for g in trainer.optimizers[0].param_groups} == {scratch}


def test_freezing_is_undone_by_a_strategy_that_trains_all(network, frozen):
    freeze(network, StrategySettings("linear_probe"), 0, frozen)
    freeze(network, StrategySettings("full"), 0, frozen)
    assert all(p.requires_grad for p in network.parameters())


@pytest.mark.filterwarnings("ignore:.*(num_workers|logging interval|LeafSpec|exists and is not empty|in eval mode)")
@pytest.mark.parametrize("strategy", ["full", "partial", "staged"])
def test_what_the_user_has_frozen_stays_frozen(strategy, tmp_path, shapes):
    data = ImageFolderDataModule(str(shapes), image_size=32, batch_size=8, num_workers=0)
    settings = {"name": strategy, "unfreeze_epochs": [1, 1]}
    module = RexNetModule(pretrained=False, class_names=data.class_names, strategy=settings, image_size=32)
    own = [module.network.features[12].get_parameter("conv_exp.conv.weight"), module.network.head.fc.bias]
    for parameter in own:
        parameter.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in module.network.named_parameters()}
    saved = None
    for epochs in (2, 4):
        trainer = pl.Trainer(
            max_epochs=epochs, default_root_dir=tmp_path, accelerator="cpu", enable_progress_bar=False,
            enable_model_summary=False, num_sanity_val_steps=0,
        )  # fmt: skip
        trainer.fit(module, data, ckpt_path=saved)
        saved = trainer.checkpoint_callback.last_model_path
    same = {name for name, p in module.network.named_parameters() if torch.equal(p, before[name])}
    assert {"features.12.conv_exp.conv.weight", "head.fc.bias"} <= same
    assert "features.13.conv_exp.conv.weight" not in same
    assert ("stem.conv.weight" in same) == (strategy == "partial")
    own[1].requires_grad_(True)
    with pytest.raises(UserError, match=r"model.frozen \(2 parameters, \w+ then, 1 parameter, \w+ now\)"):
        pl.Trainer(max_epochs=5, default_root_dir=tmp_path, enable_progress_bar=False).fit(
            module, data, ckpt_path=saved
        )


def test_frozen_parts_are_in_eval_mode(network):
    network.train()
    freeze_batchnorm(network, StrategySettings("linear_probe"), 0)
    training = {name for name, m in network.named_modules() if m.training}
    assert not {name for name in training if name.startswith(("stem", "features."))}
    assert "head.fc" in training
    network.train()


def fit(root, folder, epochs, **settings):
    """Train on ``root``; return the network's state after each epoch, the first before any."""
    states = []

    class Look(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            states.append({name: t.clone() for name, t in pl_module.network.state_dict().items()})

    data = ImageFolderDataModule(str(root), image_size=32, batch_size=12, num_workers=0)
    module = RexNetModule(pretrained=False, optimizer="sgd", num_classes=3, image_size=32, **settings)
    states.append({name: t.clone() for name, t in module.network.state_dict().items()})
    trainer = pl.Trainer(
        max_epochs=epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, accelerator="cpu", callbacks=[Look()],
    )  # fmt: skip
    trainer.fit(module, data)
    return states


def changed(before, after):
    """The network's parts of which something has changed: parameters, running statistics."""
    return {".".join(n.split(".")[:2]) for n, tensor in before.items() if not torch.equal(tensor, after[n])}


def test_partial_leaves_the_first_groups_bit_for_bit(shapes, tmp_path):
    before, _, after = fit(shapes, tmp_path, 2, strategy=StrategySettings("partial", frozen=9))
    assert changed(before, after) == {f"features.{i}" for i in range(8, 17)} | {"head.fc"}


def test_staged_unfreezes_at_its_epochs(shapes, tmp_path):
    states = fit(shapes, tmp_path, 3, strategy=StrategySettings("staged", unfreeze_epochs=(1, 2)))
    upper = {f"features.{i}" for i in range(8, 17)} | {"head.fc"}
    stem = {"stem.conv", "stem.bn"}
    assert [changed(a, b) for a, b in itertools.pairwise(states)] == [
        {"head.fc"}, upper, upper | {f"features.{i}" for i in range(8)} | stem,
    ]  # fmt: skip


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_linear_probe_leaves_the_backbone_bit_for_bit(shapes, tmp_path, ema):
    """Weights, and BatchNorm's running statistics too, which Lightning's own freezing lets drift."""
    data = ImageFolderDataModule(str(shapes), image_size=32, batch_size=12, num_workers=0)
    module = RexNetModule(
        pretrained=False, strategy="linear_probe", optimizer="sgd", ema=ema, num_classes=3, image_size=32
    )
    before = {name: t.clone() for name, t in module.network.state_dict().items()}
    trainer = pl.Trainer(
        max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, num_sanity_val_steps=1, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(module, data)
    assert trainer.global_step == 4
    after = module.network.state_dict()
    for name, tensor in before.items():
        same = torch.equal(tensor, after[name])
        assert same != name.startswith("head.fc"), name
    assert any(name.endswith("num_batches_tracked") for name in before)
