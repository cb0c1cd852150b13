"""`data.augment.hflip: auto`: a fit mirrors training images only where mirrored ones are recognised."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import timm
from module_tools import data_of, equal, model_of, state_of, trainer_of

from rexnet_lit.search.symmetries import MeasureSymmetries
from rexnet_lit.training.callbacks import mirroring
from rexnet_lit.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("quick_runs")

AUTO = {"name": "light", "min_scale": 0.8, "hflip": "auto"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """In ``sides`` mirroring exchanges the classes; in ``ends`` they differ in what is above and below."""
    rng = np.random.default_rng(0)
    for kind, axis in (("sides", 1), ("ends", 0)):
        for split, count in (("train", 30), ("val", 20)):
            for name in ("a", "b"):
                folder = tmp_path_factory.getbasetemp() / kind / split / name
                folder.mkdir(parents=True)
                for i in range(count):
                    image = rng.integers(0, 60, (32, 32, 3), np.uint8)
                    half = image if axis == 0 else image.transpose(1, 0, 2)
                    (half[:16] if name == "a" else half[16:])[:] += np.uint8(rng.integers(80, 180))
                    cv2.imwrite(str(folder / f"{i}.png"), image)
    return tmp_path_factory.getbasetemp()


def model_of_two(**settings):
    return model_of(class_names=("a", "b"), strategy={"blend": False}, calibrate=False, **settings)


def fit(folder, tmp_path, augment, **trainer):
    model, data = model_of_two(), data_of(folder, augment=augment)
    fitted = trainer_of(tmp_path, max_epochs=2, **trainer)
    fitted.fit(model, data)
    return fitted, data, state_of(model)


def flips(data):
    return [
        step.p for step in data.train_dataloader().dataset.transform._compose.transforms if "Horizontal" in str(step)
    ]


@pytest.mark.parametrize(("kind", "hflip"), [("sides", 0.0), ("ends", 0.5)])
def test_the_choice(folders, tmp_path, capsys, kind, hflip):
    """It is what the images ask for; apart from that, the fit is that of the number."""
    trainer, data, state = fit(folders / kind, tmp_path, AUTO)
    assert flips(data) == [hflip] * (hflip > 0)
    assert f"data.augment.hflip auto: {hflip:g}, because mirrored images are recognised" in capsys.readouterr().out
    assert data.augment.hflip == "auto"
    other, _, expected = fit(folders / kind, tmp_path, {**AUTO, "hflip": hflip})
    assert equal(state, expected)
    chosen = [c.chosen for t in (trainer, other) for c in t.callbacks if isinstance(c, mirroring.ChooseMirroring)]
    assert chosen == [{"data.augment.hflip": hflip}, {}]
    assert "auto" not in capsys.readouterr().out


def test_a_resumed_run_keeps_it(folders, tmp_path, monkeypatch, capsys):
    trainer, _, _ = fit(folders / "sides", tmp_path, AUTO)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    monkeypatch.setattr(mirroring, "measure_symmetries", None)
    model, data = model_of_two(), data_of(folders / "sides", augment=AUTO)
    capsys.readouterr()
    trainer_of(tmp_path, max_epochs=3).fit(model, data, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert flips(data) == []
    assert "auto" not in capsys.readouterr().out


def test_the_checkpoint_of_a_search_is_resumed_as_any_other(folders, tmp_path, capsys):
    trainer, _, _ = fit(folders / "sides", tmp_path, AUTO, callbacks=[MeasureSymmetries(tmp_path / "found.json")])
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    model = model_of_two()
    data = data_of(folders / "ends", augment=AUTO)  # which would choose otherwise
    capsys.readouterr()
    trainer_of(tmp_path, max_epochs=3).fit(model, data, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert flips(data) == []
    assert "auto" not in capsys.readouterr().out


def test_a_validation_leaves_no_choice_behind(folders, tmp_path, capsys):
    trainer, data, _ = fit(folders / "sides", tmp_path, AUTO)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    model = trainer.lightning_module
    trainer.validate(model, data, ckpt_path=tmp_path / "last.ckpt", weights_only=True, verbose=False)
    capsys.readouterr()
    trainer.fit_loop.max_epochs += 1
    other = data_of(folders / "ends", augment=AUTO)
    trainer.fit(model, other)
    assert flips(other) == [0.5]
    assert "auto: 0.5" in capsys.readouterr().out


def test_without_validation_images(folders, tmp_path):
    """Some of the training images take their place."""
    split_file = tmp_path / "split.csv"
    paths = sorted((folders / "sides").glob("*/*/*.png"))
    rows = [f"{path.relative_to(folders / 'sides')},{path.parent.name},train" for path in paths]
    split_file.write_text("\n".join(["path,label,split", *rows]))
    data = data_of(folders / "sides", augment=AUTO, split_file=str(split_file), val_fraction=0.0)
    assert set(data.splits()) == {"train"}
    model = model_of_two()
    trainer_of(tmp_path, max_epochs=1, limit_val_batches=0).fit(model, data)
    assert flips(data) == []


def test_what_cannot_be_told(folders, tmp_path, capsys):
    """Then images are mirrored; and nothing is measured where nothing is mirrored."""
    model = model_of_two(network=timm.create_model("test_resnet", num_classes=2))
    data = data_of(folders / "sides", augment=AUTO)
    trainer_of(tmp_path, max_epochs=1).fit(model, data)
    assert "auto: 0.5, as it cannot be told" in capsys.readouterr().out
    fit(folders / "sides", tmp_path, {"name": "none", "hflip": "auto"})
    assert "auto" not in capsys.readouterr().out


def test_another_word(folders):
    with pytest.raises(UserError, match=r"data.augment.hflip is 'maybe'; expected a number in \[0, 1\]; or auto"):
        data_of(folders / "sides", augment={**AUTO, "hflip": "maybe"})
