"""Saves by time, on a simulated clock."""

import numpy as np
import pytest

from spark.checkpoints import period


@pytest.mark.parametrize('slower', [False, True])
def test_periods(monkeypatch, slower):
    """Ten minutes of steps of two seconds, and of steps that become slower; the processes ask a few times only."""
    now, asked = [0.0], []
    monkeypatch.setattr(period.time, 'monotonic', lambda: now[0])
    monkeypatch.setattr(period.multihost_utils, 'broadcast_one_to_all', lambda x: asked.append(x) or np.asarray(x))
    clock, saves = period.Period(10, 0), []
    for step in range(1, 302):
        now[0] += 6 if slower and step > 250 else 2
        if clock.due(step):
            saves.append((step, now[0]))
            clock.restart(step)
    assert len(saves) == 1 and 600 <= saves[0][1] < 630 and len(asked) < 25


def test_the_first_steps_are_dispatched_in_no_time(monkeypatch):
    """They say little about how long a step takes."""
    now = [0.0]
    monkeypatch.setattr(period.time, 'monotonic', lambda: now[0])
    clock = period.Period(1, 0)
    for step in range(1, 100):
        now[0] += 1e-6 if step < 4 else 10
        if clock.due(step):
            break
    assert step <= 11


def test_another_process_decides(monkeypatch):
    monkeypatch.setattr(period.multihost_utils, 'broadcast_one_to_all', lambda x: np.int32(0 if x else 3))
    clock = period.Period(1, 0)
    assert clock.due(1)
    assert not period.Period(0, 0).due(1)
