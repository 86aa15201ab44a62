import math

from manyform.training.guard import Guard


def _warm(guard, n=64):
    for i in range(n):
        assert guard.judge(3.0 + 0.1 * math.sin(i), 1.0 + 0.3 * math.cos(i)) == ""


def test_not_finite_is_always_skipped():
    guard = Guard(10.0, 3)
    assert guard.judge(float("nan"), 1.0) == "non-finite"
    assert guard.judge(1.0, float("inf")) == "non-finite"
    assert not guard.diverged
    assert guard.judge(float("-inf"), 1.0) == "non-finite"
    assert guard.diverged
    assert guard.judge(1.0, 1.0) == ""
    assert not guard.diverged


def test_spikes_are_judged_once_the_window_is_full():
    guard = Guard(10.0, 3)
    _warm(guard, 63)
    assert guard.judge(50.0, 1.0) == ""
    guard = Guard(10.0, 3)
    _warm(guard)
    assert guard.judge(9.0, 1.0) == "loss spike"
    assert guard.judge(3.0, 100.0) == "gradient spike"
    assert guard.judge(3.4, 5.0) == ""  # within the wide bounds


def test_zero_turns_spikes_off():
    guard = Guard(0.0, 3)
    _warm(guard)
    assert guard.judge(1e6, 1e6) == ""


def test_a_restored_guard_decides_alike():
    guard = Guard(10.0, 3)
    _warm(guard)
    guard.judge(float("nan"), 0.0)
    other = Guard(10.0, 3)
    other.load_state_dict(guard.state_dict())
    assert other.streak == 1
    for loss in (3.0, 4.4, 9.0):
        assert guard.judge(loss, 1.0) == other.judge(loss, 1.0)
