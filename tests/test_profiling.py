import pytest

from rise_jax.profiling import Profile, window_fault


@pytest.mark.parametrize("window", ["", "0:1", "3:10"])
def test_windows_that_can_be_traced(window):
    assert window_fault(window, 10) == ""


@pytest.mark.parametrize(
    ("window", "nearest"),
    [
        ("3", "'' (no trace) or '0:3'"),
        ("3:", "'' (no trace) or '0:3'"),
        ("a:b", "'' (no trace) or '0:3'"),
        ("-1:3", "'' (no trace) or '0:3'"),
        ("3:11", "'3:10'"),
        ("4:4", "'3:4'"),
        ("5:2", "'1:2'"),
        ("0:0", "'0:1'"),
        ("12:15", "'9:10'"),
    ],
)
def test_windows_that_cannot_are_answered_with_the_nearest(window, nearest):
    fault = window_fault(window, 10)
    assert fault.startswith(f"run.profile={window!r} ") and fault.endswith(f"nearest: {nearest}")
    if "or" not in nearest:
        assert window_fault(nearest.strip("'"), 10) == ""


def test_the_window_is_traced_and_settled_at_both_edges(tmp_path):
    settled = []
    with Profile("1:3", tmp_path) as profile:
        for step in range(5):
            profile.follow(step, lambda step=step: settled.append(step))
            assert bool(list(tmp_path.rglob("*.xplane.pb"))) == (step >= 3)
    assert settled == [1, 3]


def test_a_run_that_starts_or_ends_within_the_window_is_traced_too(tmp_path):
    with Profile("1:9", tmp_path) as profile:
        profile.follow(5, lambda: None)
    assert list(tmp_path.rglob("*.xplane.pb"))


def test_no_window_is_no_trace(tmp_path):
    with Profile("", tmp_path) as profile:
        for step in range(3):
            profile.follow(step, pytest.fail)
    assert not list(tmp_path.iterdir())
