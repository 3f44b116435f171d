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


def steps_of(profile, steps):
    """The numbers of updates before which the trace begins and ends."""
    for step in steps:
        if profile.turns(step):
            profile.turn()
            yield step


def test_the_trace_begins_and_ends_at_the_edges_of_the_window(tmp_path):
    with Profile("1:3", tmp_path) as profile:
        turns = steps_of(profile, range(5))
        assert next(turns) == 1 and not list(tmp_path.rglob("*.xplane.pb"))
        assert next(turns) == 3 and list(tmp_path.rglob("*.xplane.pb"))
        assert not list(turns)


def test_a_run_that_starts_or_ends_within_the_window_is_traced_too(tmp_path, capsys):
    """And told which steps those were: after 5 and 6 updates two more were made."""
    with Profile("1:9", tmp_path, 5) as profile:
        assert list(steps_of(profile, [5, 6])) == [5]
    assert list(tmp_path.rglob("*.xplane.pb"))
    assert f"traced steps 6 to 7 into {tmp_path}" in capsys.readouterr().out


def test_a_window_that_is_over_is_told(tmp_path, caplog):
    with Profile("1:3", tmp_path, 3) as profile:
        assert not list(steps_of(profile, range(3, 5)))
    assert "run.profile='1:3' traces nothing: the run goes on from step 3" in caplog.text


def test_no_window_is_no_trace(tmp_path):
    with Profile("", tmp_path) as profile:
        assert not list(steps_of(profile, range(3)))
    assert not list(tmp_path.iterdir())
