"""Learning-rate schedules against values computed by hand."""

from __future__ import annotations

import itertools

import pytest
import torch

from rexnet_lit.training.schedules import Plateau, ScheduleSettings, auto_epochs, lr_factor
from rexnet_lit.utils.errors import UserError

# 10 epochs of 10 steps, one of them warm-up: steps 0 to 9 rise by elevenths, 90 steps remain.
COSINE = ScheduleSettings("cosine", warmup_epochs=1, min_factor=0.01)


@pytest.mark.parametrize(
    ("step", "factor"),
    [
        (0, 1 / 11),
        (4, 5 / 11),
        (9, 10 / 11),
        (10, 1.0),
        (25, 0.01 + 0.99 * (1 + 3**0.5 / 2) / 2),  # a sixth of the way: cos 30 degrees
        (40, 0.01 + 0.99 * 0.75),  # a third: cos 60 degrees
        (55, 0.01 + 0.99 * 0.5),  # half: cos 90 degrees
        (70, 0.01 + 0.99 * 0.25),
        (100, 0.01),
        (250, 0.01),  # asked for after the end, it stays there
    ],
)
def test_cosine(step, factor):
    assert lr_factor(COSINE, step, 100, 10) == pytest.approx(factor, rel=1e-12)


def test_cosine_rises_and_falls_without_a_jump():
    factors = [lr_factor(COSINE, step, 100, 10) for step in range(101)]
    assert factors[:11] == sorted(factors[:11])
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert max(abs(a - b) for a, b in itertools.pairwise(factors)) <= 1 / 11 + 1e-12


@pytest.mark.parametrize(
    ("step", "factor"),
    [(0, 1.0), (29, 1.0), (30, 0.1), (59, 0.1), (60, 0.01), (90, 0.001)],
)
def test_step(step, factor):
    settings = ScheduleSettings("step", warmup_epochs=0, step_epochs=3, gamma=0.1)
    assert lr_factor(settings, step, 100, 10) == pytest.approx(factor)


@pytest.mark.parametrize("step_epochs", [0.1, 0.3, 0.7, 1.1, 2.3])
def test_step_at_fractions_of_an_epoch(step_epochs):
    """A drop comes with its very step, whatever the division of fractions leaves."""
    settings = ScheduleSettings("step", warmup_epochs=0, step_epochs=step_epochs, gamma=0.5)
    between = round(10 * step_epochs)
    for step in range(100):
        assert lr_factor(settings, step, 100, 10) == 0.5 ** (step // between)


def test_step_after_a_warmup_counts_epochs_from_the_run_s_start():
    settings = ScheduleSettings("step", warmup_epochs=0.5, step_epochs=2, gamma=0.5)
    assert [lr_factor(settings, s, 100, 10) for s in (0, 4, 5, 19, 20, 40)] == pytest.approx(
        [1 / 6, 5 / 6, 1.0, 1.0, 0.5, 0.25]
    )


def test_constant():
    settings = ScheduleSettings("constant", warmup_epochs=0.2)
    assert [lr_factor(settings, s, 100, 10) for s in (0, 1, 2, 99)] == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0])


def test_a_warmup_takes_a_quarter_of_a_short_run_at_most():
    settings = ScheduleSettings("cosine", warmup_epochs=5)
    assert lr_factor(settings, 4, 20, 10) == pytest.approx(5 / 6)  # 5 steps of 20, not 50
    assert lr_factor(settings, 5, 20, 10) == 1.0


@pytest.mark.parametrize("total", [0, 1, 2, 3])
def test_the_shortest_runs_have_a_rate(total):
    assert 0 < lr_factor(ScheduleSettings(), 0, total, 1) <= 1


@pytest.mark.parametrize("total", [10, 37, 100])
def test_one_cycle_is_torch_s(total):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=total, cycle_momentum=False)
    for step in range(total):
        assert lr_factor(ScheduleSettings("one_cycle"), step, total, 10) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        if step < total - 1:
            theirs.step()


def test_plateau_by_hand():
    """Patience 1: the second epoch in a row without a new lowest loss drops the rate."""
    plateau = Plateau.start(ScheduleSettings("plateau", warmup_epochs=0.3, gamma=0.5, patience=1), 100, 10)
    assert [plateau(s) for s in (0, 1, 2, 3, 50)] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    factors = []
    for loss in (1.0, 0.9, 0.95, 0.9, 0.91, 0.8, 0.8, 0.8):
        plateau.update(loss)
        factors.append(plateau(50))
    assert factors == [1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.25]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"name": "cosin"},
            "model.schedule.name is 'cosin'; expected one of cosine, one_cycle, step, plateau, constant",
        ),
        ({"warmup_epochs": -1}, "model.schedule.warmup_epochs is -1"),
        ({"min_factor": 1.5}, "model.schedule.min_factor is 1.5"),
        ({"step_epochs": 0}, "model.schedule.step_epochs is 0"),
        ({"gamma": 0}, "model.schedule.gamma is 0"),
        ({"patience": -1}, "model.schedule.patience is -1"),
        ({"rise": 1.0}, "model.schedule.rise is 1"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(UserError, match=message):
        ScheduleSettings(**settings)


@pytest.mark.parametrize(
    ("images", "batch_size", "from_weights", "scratch"),
    [
        (1000, 32, 20, 20), (320, 32, 20, 32), (250, 32, 20, 40), (100, 32, 20, 80), (96, 32, 27, 80), (40, 32, 40, 80),
        (3, 32, 80, 80), (100, 4, 20, 20),
    ],
)  # fmt: skip
def test_few_images_have_more_epochs(images, batch_size, from_weights, scratch):
    """At least 80 steps, 320 from scratch: 250 images are 8 steps of 32. No more than 80 epochs, no fewer than 20."""
    assert auto_epochs(images, batch_size) == from_weights
    assert auto_epochs(images, batch_size, scratch=True) == scratch
