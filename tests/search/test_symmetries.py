"""What a search does with the symmetries of the images; measuring them changes no weights."""

from __future__ import annotations

import pytest
from cli_tools import write_dataset
from module_tools import data_of, model_of, state_of, trainer_of

from rexnet_lit.checks.symmetries import Symmetries
from rexnet_lit.search.space import Setting
from rexnet_lit.search.symmetries import MeasureSymmetries, read_symmetries, wanted_settings

HFLIP, VFLIP, TURNS = "data.augment.hflip", "data.augment.vflip", "data.augment.quarter_turns"


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
    found = Symmetries(0.9, {}, dict(zip(base, holds, strict=True)))
    assert wanted_settings(found, base, space) == wanted
    assert wanted_settings(found, base, {}) == wanted_settings(None, base, space) == {}


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
