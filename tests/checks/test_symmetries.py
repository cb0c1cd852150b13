"""Which symmetries the images of a folder have."""

from __future__ import annotations

import numpy as np

from rexnet_lit.checks.symmetries import judge, measure, report

HFLIP, VFLIP, TURNS = "data.augment.hflip", "data.augment.vflip", "data.augment.quarter_turns"


def features(targets, rng, strength=3.0):
    """Features in which each class has a direction of its own, with noise."""
    return (strength * np.eye(4, 16)[targets] + rng.normal(size=(len(targets), 16))).astype(np.float32)


def test_a_symmetry_holds_where_changed_images_are_recognised_as_well():
    rng = np.random.default_rng(0)
    train, val = np.arange(200) % 4, np.arange(120) % 4
    upright, mirrored = features(val, rng), features(val, rng)
    changed = {HFLIP: mirrored, VFLIP: features((val + 1) % 4, rng), TURNS: features(rng.permutation(val), rng)}
    found = judge(features(train, rng), train, upright, val, changed)
    assert found.upright > 0.9
    assert found.holds == {HFLIP: True, VFLIP: False, TURNS: False}
    assert found.changed[VFLIP] < 0.1


def test_nothing_is_said_where_the_features_tell_nothing():
    rng = np.random.default_rng(0)
    train, val = np.arange(200) % 4, np.arange(120) % 4
    changed = {key: features(val, rng, 0) for key in (HFLIP, VFLIP, TURNS)}
    found = judge(features(train, rng, 0), train, features(val, rng, 0), val, changed)
    assert set(found.holds.values()) == {None}


def test_findings():
    """The left half is brighter, or the right one: mirroring exchanges the classes, and a turn makes them alike."""
    rng = np.random.default_rng(0)
    targets = np.arange(300) % 2
    images = rng.integers(0, 100, (300, 8, 8, 1), dtype=np.uint8)
    images[targets == 0, :, :4] += 100
    images[targets == 1, :, 4:] += 100

    def embed(some, change):
        return np.stack([change(images[i]).reshape(64) for i in some]).astype(np.float32)

    found = measure(embed(range(300), lambda image: image), targets, np.arange(300), embed)
    assert found.holds == {HFLIP: False, VFLIP: True, TURNS: False}
    mirrored, upside_down = report(found)
    assert (mirrored.severity, mirrored.code, mirrored.advice) == (
        "info",
        "symmetry",
        f"train with {HFLIP}: 0 (auto, the default of finetune, does that)",
    )
    assert "mirrored are recognised worse: 0% of them, 100% as they are" in mirrored.message
    assert upside_down.advice == f"train with {VFLIP}: 0.5"
    assert measure(np.zeros((3, 2), np.float32), np.zeros(3, int), np.arange(3), embed) is None
    assert report(None) == []
