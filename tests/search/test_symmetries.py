"""Which symmetries images have, and that measuring them changes no weights."""

from __future__ import annotations

import numpy as np
import pytest
from cli_tools import write_dataset
from module_tools import data_of, model_of, state_of, trainer_of

from rexnet_lit.search.space import Setting
from rexnet_lit.search.symmetries import MeasureSymmetries, Symmetries, judge, read_symmetries

HFLIP, VFLIP, TURNS = "data.augment.hflip", "data.augment.vflip", "data.augment.quarter_turns"


def features(targets, rng, strength=3.0):
    """Features in which each class has a direction of its own, with noise."""
    return (strength * np.eye(4, 16)[targets] + rng.normal(size=(len(targets), 16))).astype(np.float32)


def test_a_symmetry_holds_where_changed_images_are_recognised_as_well():
    rng = np.random.default_rng(0)
    train, val = np.arange(200) % 4, np.arange(120) % 4
    seen = [features(val, rng), features(val, rng), features((val + 1) % 4, rng), features(rng.permutation(val), rng)]
    found = judge(features(train, rng), train, seen, val)
    assert found.upright > 0.9
    assert found.holds == {HFLIP: True, VFLIP: False, TURNS: False}
    assert found.changed[VFLIP] < 0.1


def test_nothing_is_said_where_the_features_tell_nothing():
    rng = np.random.default_rng(0)
    train, val = np.arange(200) % 4, np.arange(120) % 4
    found = judge(features(train, rng, 0), train, [features(val, rng, 0) for _ in range(4)], val)
    assert set(found.holds.values()) == {None}


@pytest.mark.parametrize(
    ("holds", "wanted"),
    [
        ((False, False, None), {HFLIP: 0}),
        ((True, True, False), {VFLIP: 0.5}),
        ((None, None, True), {TURNS: 0.75}),
        ((True, False, False), {}),
    ],
)
def test_settings(holds, wanted):
    base = {HFLIP: 0.5, VFLIP: 0.0, TURNS: 0.0}
    space = {HFLIP: Setting(choices=(0, 0.5, 1)), VFLIP: Setting(choices=(0, 0.5)), TURNS: Setting(low=0.0, high=0.75)}
    assert Symmetries(0.9, {}, dict(zip(base, holds, strict=True))).wanted(base, space) == wanted
    assert Symmetries(0.9, {}, dict(zip(base, holds, strict=True))).wanted(base, {}) == {}


def test_measuring_changes_no_weights(tmp_path):
    root, file = write_dataset(tmp_path / "data", train=9, val=5), tmp_path / "found" / "symmetries.json"
    states = []
    for callbacks in ([], [MeasureSymmetries(file)]):
        model = model_of(class_names=("bars", "disc", "ring"), strategy={"blend": False}, calibrate=False)
        trainer_of(tmp_path, max_epochs=1, callbacks=callbacks).fit(model, data_of(root))
        states.append(state_of(model))
    assert all((states[0][name] == states[1][name]).all() for name in states[0])
    found = read_symmetries(file)
    assert set(found.holds) == {HFLIP, VFLIP, TURNS}
    assert 0 <= found.upright <= 1
    assert "as they are" in str(found)
