"""The choice of threads by the clock, on machines made of numbers."""

from tinydrug.engine.pace import LONGEST, Pace


def run(pace: Pace, steps: int, seconds) -> list[int]:
    """The threads used in each step; seconds(threads) is what a step takes."""
    used = []
    for _ in range(steps):
        used.append(pace.choose())
        pace.note(seconds(used[-1]))
    return used


def test_a_quiet_machine_always_uses_all_threads():
    assert set(run(Pace(2), 1000, {2: 1.0, 1: 1.9}.get)) == {2}


def test_slowly_growing_steps_are_no_disturbance():
    pace, now = Pace(2), [1.0]

    def seconds(threads):
        now[0] *= 1.001
        return now[0]

    assert set(run(pace, 2000, seconds)) == {2}


def test_a_busy_machine_uses_one_and_comes_back():
    pace = Pace(2)
    run(pace, 50, {2: 1.0, 1: 1.9}.get)
    busy = run(pace, 400, {2: 6.0, 1: 2.0}.get)
    assert busy.count(1) > 360
    after = run(pace, 2 * LONGEST, {2: 1.0, 1: 1.9}.get)
    assert after[-20:] == [2] * 20


def test_hiccups_are_no_disturbance():
    pace, steps = Pace(2), iter(range(10_000))
    assert set(run(pace, 2000, lambda threads: 50.0 if next(steps) % 40 == 0 else 1.0)) == {2}


def test_disturbed_but_still_faster_together():
    pace = Pace(4)
    run(pace, 50, {4: 1.0, 1: 3.6}.get)
    assert run(pace, 400, {4: 2.0, 1: 3.8}.get).count(4) > 200


def test_one_thread_is_one_thread():
    assert set(run(Pace(1), 100, {1: 1.0}.get)) == {1}
