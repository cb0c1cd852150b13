"""The network: all ten variants, heads, and weights that travel to and from timm."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from torch import nn

from rexnet_lit.data.settings import EvalRecipe
from rexnet_lit.models import checkpoint, predictor, rexnet, variants, weights
from rexnet_lit.models.blocks import save_memory_traffic
from rexnet_lit.models.heads import HeadSpec
from rexnet_lit.models.spec import ModelSpec
from rexnet_lit.training.plugins import TimmSyncBatchNorm
from rexnet_lit.utils.errors import UserError

# Parameters with 1000 classes, and the pooled features' width: timm's, as listed in shared/features.md.
VARIANTS = {
    "rexnet_100": (4_796_873, 1280),
    "rexnet_130": (7_557_091, 1664),
    "rexnet_150": (9_728_593, 1920),
    "rexnet_200": (16_366_620, 2560),
    "rexnet_300": (34_708_792, 3840),
    "rexnetr_100": (4_883_304, 1280),
    "rexnetr_130": (7_608_080, 1664),
    "rexnetr_150": (9_782_256, 1920),
    "rexnetr_200": (16_522_432, 2560),
    "rexnetr_300": (34_810_008, 3840),
}
# Millions at 224 px. The paper (arXiv:2007.00992, table 5) rounds them to 0.40, 0.66, 0.88 and 1.5 B.
MULTIPLY_ADDS = {"rexnet_100": 398.4, "rexnet_130": 662.2, "rexnet_150": 875.8, "rexnet_200": 1528.9}


@pytest.fixture(scope="module")
def rows() -> dict[str, variants.Variant]:
    return {variant.name: variant for variant in variants.variants()}


def test_there_are_these_variants(rows):
    assert list(rows) == list(VARIANTS)
    assert {name: (v.parameters, v.features) for name, v in rows.items()} == VARIANTS


def test_weights_and_published_top1(rows):
    assert {name: v.weights for name, v in rows.items() if v.weights and not name.startswith("rexnetr")} == {
        name: ("nav_in1k",) for name in VARIANTS if not name.startswith("rexnetr")
    }
    assert set(rows["rexnetr_200"].weights) == set(rows["rexnetr_300"].weights) == {"sw_in12k_ft_in1k", "sw_in12k"}
    assert not any(rows[f"rexnetr_{width}"].weights for width in (100, 130, 150))
    assert rows["rexnet_100"].top1 == {"nav_in1k": "77.862"}


@pytest.mark.parametrize("name", VARIANTS)
def test_multiply_adds_counted_by_layer(rows, name):
    """Each output value of a layer costs its inputs' number: channels of its group x kernel."""
    with torch.device("meta"):
        model = timm.create_model(name).eval()
        total = 0

        def count(layer, inputs, output):
            nonlocal total
            total += output.numel() * layer.weight[0].numel()

        for layer in model.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.register_forward_hook(count)
        model(torch.empty(1, 3, 224, 224))
    assert rows[name].multiply_adds == pytest.approx(total, rel=1e-3)
    if name in MULTIPLY_ADDS:
        assert rows[name].multiply_adds / 1e6 == pytest.approx(MULTIPLY_ADDS[name], rel=0.01)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_learns_is_saved_and_loads_with_equal_logits(name, tmp_path):
    torch.manual_seed(0)
    model = rexnet.build_network(name, 5, drop_path_rate=0.1).train()
    images, targets = torch.randn(2, 3, 64, 64), torch.tensor([1, 3])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = nn.functional.cross_entropy(model(images), targets)
    # A head drawn for five classes starts at guessing: ln 5.
    assert loss.item() == pytest.approx(1.609, abs=0.4)
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    before = model.head.fc.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model.head.fc.weight, before)

    spec = ModelSpec(name, tuple("abcde"), eval_recipe=EvalRecipe(64))
    checkpoint.save_model(tmp_path / "model.safetensors", spec, model.state_dict())
    loaded = predictor.load(tmp_path / "model.safetensors", device="cpu")
    model.eval().to(memory_format=torch.channels_last)
    with torch.no_grad():
        logits = model(images)
        assert torch.equal(loaded.network(images), logits)
        assert torch.isfinite(logits).all()
        features = rexnet.embed(model, images)
        fused = rexnet.fuse_batchnorm(model.double())
        assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
        torch.testing.assert_close(fused(images.double()), model(images.double()), atol=1e-9, rtol=1e-9)
    assert features.shape == (2, VARIANTS[name][1])
    assert loaded.spec == spec


@pytest.mark.parametrize("name", ["rexnet_99", "resnet50", "rexnet_100.nope", ""])
def test_an_unknown_backbone_is_one_line(name):
    for build in (variants.check_backbone, variants.eval_recipe, lambda n: rexnet.build_network(n, 2)):
        with pytest.raises(UserError, match=rf"^model.backbone: no ReXNet is named {name!r}; (did you mean|known:)"):
            build(name)


# --- heads ----------------------------------------------------------------------------------------


def test_a_linear_head_makes_timm_s_own_state_dict():
    ours, theirs = rexnet.build_network("rexnet_100", 7), timm.create_model("rexnet_100", num_classes=7)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(theirs.eval()(images), ours.eval()(images))
    assert weights.load_weights(ours, timm.create_model("rexnet_100", num_classes=7).state_dict(), "timm")


@pytest.mark.parametrize("pool", ["avg", "max", "avgmax"])
@pytest.mark.parametrize("name", ["linear", "mlp", "cosine"])
def test_heads_by_hand(name, pool):
    """Logits from the feature map (B, C, h, w) by plain pooling and matrix products."""
    head = HeadSpec(name, hidden=6, dropout=0.5, layers=2, temperature=0.25, pool=pool)
    model = rexnet.build_network("rexnet_100", 4, head).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features, w = model.forward_features(images).flatten(2), model.state_dict()
        mean, highest = features.mean(2), features.amax(2)
        x = {"avg": mean, "max": highest, "avgmax": (mean + highest) / 2}[pool]
        torch.testing.assert_close(rexnet.embed(model, images), x)
        if name == "mlp":
            for layer in (0, 3):
                x = x @ w[f"head.fc.{layer}.weight"].T + w[f"head.fc.{layer}.bias"]
                assert x.shape == (2, 6)
                x = x * torch.sigmoid(x)
            x = x @ w["head.fc.6.weight"].T + w["head.fc.6.bias"]
        elif name == "linear":
            x = x @ w["head.fc.weight"].T + w["head.fc.bias"]
        else:
            vectors = w["head.fc.weight"]
            x = (x @ vectors.T) / x.norm(dim=1, keepdim=True) / vectors.norm(dim=1) / 0.25
        torch.testing.assert_close(model(images), x)


@pytest.mark.parametrize("name", ["rexnet_100", "rexnetr_200"])
def test_untrained_residual_blocks_pass_on_what_they_are_given(name):
    net = rexnet.build_network(name, 3)
    blocks = [block for block in net.features if getattr(block, "use_shortcut", False)]
    assert len(blocks) == 11  # in 16 blocks, five change the stride or begin the network
    for block in blocks:
        given = torch.randn(2, block.in_channels, 8, 8)
        for mode in (True, False):
            out = block.train(mode)(given.clone())
            torch.testing.assert_close(out[:, : block.in_channels], given)
            assert not out[:, block.in_channels :].any()


def test_dropout_and_drop_path_reach_the_network():
    model = rexnet.build_network("rexnet_100", 4, HeadSpec("linear", dropout=0.35), drop_path_rate=0.2)
    assert model.head.drop.p == 0.35 if hasattr(model.head, "drop") else model.head.drop_rate == 0.35
    rates = [m.drop_prob for m in model.modules() if type(m).__name__ == "DropPath"]
    assert max(rates) == pytest.approx(0.2)
    assert rates == sorted(rates)
    torch.manual_seed(0)
    features = torch.ones(1, 1280, 1, 1)
    model.train()
    seen = {model.forward_head(features).sum().item() for _ in range(5)}
    assert len(seen) == 5  # other features are dropped each time


def test_an_unknown_head_is_one_line():
    with pytest.raises(UserError, match=r"model.head.name is 'cosin'; expected one of linear, mlp, cosine"):
        rexnet.build_network("rexnet_100", 2, HeadSpec("cosin"))  # type: ignore[arg-type]


def test_a_head_for_other_classes_is_left_as_it_was_built():
    source = rexnet.build_network("rexnet_100", 7)
    for target, keep, kept in (
        (rexnet.build_network("rexnet_100", 3), True, False),
        (rexnet.build_network("rexnet_100", 7, HeadSpec("mlp", 8)), True, False),
        (rexnet.build_network("rexnet_100", 7), False, False),
        (rexnet.build_network("rexnet_100", 7), True, True),
    ):
        before = {k: v.clone() for k, v in target.state_dict().items()}
        assert weights.load_weights(target, source.state_dict(), "file", keep_head=keep) is kept
        wanted = source.state_dict()
        for name, tensor in target.state_dict().items():
            replaced = name.startswith("head.fc.") and not kept
            assert torch.equal(tensor, before[name] if replaced else wanted[name])


@pytest.mark.parametrize("given", ["rexnet_130", "rexnetr_100", "resnet18"])
def test_weights_of_another_architecture_are_one_line(given):
    model = rexnet.build_network("rexnet_100", 3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = timm.create_model(given, num_classes=3).state_dict()
    with pytest.raises(UserError, match=r"^x\.safetensors does not fit this backbone: .* set model.backbone"):
        weights.load_weights(model, state, "x.safetensors")
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())  # nothing half loaded


def test_weights_without_a_tensor_are_refused():
    model = rexnet.build_network("rexnet_100", 3)
    state = model.state_dict()
    del state["stem.conv.weight"]
    with pytest.raises(UserError, match=r"1 tensors missing, 0 unknown, 0 of another shape \(such as stem.conv.weight"):
        weights.load_weights(model, state, "x")


# --- published settings and weights ---------------------------------------------------------------


def test_eval_recipes_are_the_weights_own():
    plain = variants.eval_recipe("rexnet_100")
    assert plain == EvalRecipe(224, 0.875, "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert variants.eval_recipe("rexnet_150.nav_in1k") == plain
    assert variants.eval_recipe("rexnet_100", 96).image_size == 96
    # features.md: the sw_* weights were tested whole, at 288 px.
    for tag in ("sw_in12k_ft_in1k", "sw_in12k"):
        recipe = variants.eval_recipe(f"rexnetr_200.{tag}")
        assert (recipe.image_size, recipe.crop_pct) == (288, 1.0)
    assert variants.train_size("rexnetr_200.sw_in12k") == 224
    assert len(variants.published_names("rexnetr_200.sw_in12k")) == 11_821
    assert len(variants.published_names("rexnet_100")) == 1000


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, the same whether the hub's client is imported already or not."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def put(hub: Path, repository: str, state: dict[str, torch.Tensor]) -> None:
    """Lay weights into the cache as huggingface_hub does."""
    revision = "0123456789abcdef0123456789abcdef01234567"
    folder = hub / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(revision)
    (folder / "snapshots" / revision).mkdir(parents=True)
    safetensors.torch.save_file(state, folder / "snapshots" / revision / "model.safetensors")


def test_published_weights_come_from_the_local_cache(hub, no_network):
    theirs = timm.create_model("rexnet_100").eval()
    put(hub, "timm/rexnet_100.nav_in1k", theirs.state_dict())
    ours = rexnet.build_network("rexnet_100", 3)
    head = ours.head.fc.weight.detach().clone()
    weights.load_pretrained(ours, "rexnet_100")
    assert torch.equal(ours.head.fc.weight, head)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(ours.eval().forward_features(images), theirs.forward_features(images))

    classifier = predictor.load("rexnet_100", device="cpu")
    assert torch.equal(classifier.network.head.fc.weight, theirs.head.fc.weight)
    assert len(classifier.class_names) == 1000
    assert classifier.class_names[0].startswith("tench")
    assert classifier.class_names[258].lower().startswith("samoyed")  # ImageNet-1k's number of the Samoyed
    assert not no_network, "the cache was enough"


@pytest.mark.parametrize("name", ["rexnet_100", "rexnetr_200.sw_in12k"])
def test_published_weights_that_cannot_be_had_name_the_ways_out(hub, no_network, name):
    model = rexnet.build_network(name, 3)
    before = model.stem.conv.weight.detach().clone()
    with pytest.raises(UserError) as error:
        weights.load_pretrained(model, name)
    message = str(error.value)
    assert message.startswith(f"model.pretrained: the weights of {name} are neither in the local cache")
    assert "model.weights" in message
    assert "model.pretrained to false" in message
    assert "\n" not in message
    assert torch.equal(model.stem.conv.weight, before)
    assert no_network, "the hub was not asked"


def test_a_variant_without_published_weights(hub, no_network):
    with pytest.raises(UserError, match=r"model.pretrained: rexnetr_100 has no published weights"):
        weights.load_pretrained(rexnet.build_network("rexnetr_100", 3), "rexnetr_100")
    assert not no_network


def test_damaged_published_weights_are_one_line(hub, no_network):
    put(hub, "timm/rexnet_100.nav_in1k", {"a": torch.zeros(1)})
    with pytest.raises(UserError, match="the weights of rexnet_100"):
        weights.load_pretrained(rexnet.build_network("rexnet_100", 3), "rexnet_100")
    file = next(hub.rglob("model.safetensors"))
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(UserError, match=r"the weights of rexnet_100 .*damaged"):
        weights.load_pretrained(rexnet.build_network("rexnet_100", 3), "rexnet_100")


@pytest.mark.parametrize(("checkpointing", "drop_path_rate"), [(False, 0.0), (True, 0.0), (False, 0.3)])
def test_our_blocks_compute_what_timms_do(checkpointing, drop_path_rate):
    settings = {"num_classes": 5, "drop_path_rate": drop_path_rate}
    theirs = timm.create_model("rexnet_100", **settings).double()
    ours = timm.create_model("rexnet_100", **settings).double()
    ours.load_state_dict(theirs.state_dict())
    save_memory_traffic(ours)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    images = torch.rand(4, 3, 64, 64, dtype=torch.float64)
    outputs, gradients = [], []
    for made in (theirs, ours):
        made.set_grad_checkpointing(checkpointing)
        torch.manual_seed(0)
        found = made.train()(images)
        found.square().sum().backward()
        with torch.no_grad():
            outputs.append((found, made.eval()(images), made.train()(images)))
        gradients.append([parameter.grad for parameter in made.parameters()])
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=0)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-12)


def test_synchronised_batchnorm_keeps_the_activations():
    """Lightning's own conversion drops those that timm has inside its BatchNorm."""
    own = rexnet.build_network("rexnet_100", 5).eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected, before = own(images), [type(module) for module in own.modules()]
        sync = TimmSyncBatchNorm()
        changed = sync.apply(own)
        assert sum(isinstance(module, nn.SyncBatchNorm) for module in changed.modules()) == 62
        torch.testing.assert_close(changed(images), expected)
        changed.features[1].conv_exp.bn.running_mean = torch.ones(96)  # as a move to another device exchanges it
        back = sync.revert(changed)
    assert [type(module) for module in back.modules()] == before
    assert back.features[1].conv_exp.bn.running_mean.eq(1).all()


def test_rows_of_a_linear_head_are_of_no_use_to_an_mlp():
    theirs, ours = rexnet.build_network("rexnet_100", 3), rexnet.build_network("rexnet_100", 3, HeadSpec("mlp"))
    before = {name: tensor.clone() for name, tensor in ours.head.fc.state_dict().items()}
    assert not weights.load_weights(ours, theirs.state_dict(), "x", rows={0: 0})
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.head.fc.state_dict().items())


def test_rows_of_an_mlp_are_its_last_layers():
    head = HeadSpec("mlp", hidden=8)
    theirs, ours = rexnet.build_network("rexnet_100", 12, head), rexnet.build_network("rexnet_100", 13, head)
    assert not weights.load_weights(ours, theirs.state_dict(), "x", keep_head=False, rows={i: i for i in range(12)})
    for kept, given in zip(ours.head.fc[:-1].parameters(), theirs.head.fc[:-1].parameters(), strict=True):
        assert torch.equal(kept, given)
    assert torch.equal(ours.head.fc[-1].weight[:12], theirs.head.fc[-1].weight)
