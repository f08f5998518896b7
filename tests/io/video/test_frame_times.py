"""Times of frames: as text, and what a constant rate says as well."""

from fractions import Fraction

import pytest

from flax_vae.io.video.frame_times import constant, from_text, is_constant, join_times, to_text, uneven

NTSC = Fraction(30000, 1001)


def rounded(times, clock, how=round):
    return [Fraction(how(time * clock), clock) for time in times]


@pytest.mark.parametrize("fps", [NTSC, Fraction(25), Fraction(24000, 1001), Fraction(1, 5), Fraction(120)])
def test_a_constant_rate_is_known_through_the_clocks_of_containers(fps):
    times = constant(2000, fps)
    assert len(times) == 2001
    assert is_constant(times, fps)
    assert is_constant(rounded(times, 1000), fps)
    assert is_constant(rounded(times, 90000, int), fps)
    assert is_constant(times[300:], fps, 300)
    assert not is_constant(times[300:], fps, 299)
    assert uneven(rounded(times, 1000), fps) is None


def test_what_is_not_at_the_rate_is_known_whichever_frame_it_is():
    times = constant(50, Fraction(25))
    for number in range(1, 50):
        moved = list(times)
        moved[number] += Fraction(2, 1000)
        assert uneven(moved, Fraction(25)) == moved
    assert not is_constant([*times[:-1], times[-1] + Fraction(1, 25)], Fraction(25))  # a last frame of twice the length
    assert not is_constant(constant(50, Fraction(26)), Fraction(25))
    assert not is_constant(constant(2000, Fraction("29.98")), NTSC)  # frames drift by what no single step shows


def test_text_keeps_times_exactly():
    times = [Fraction(0), Fraction(1, 3), Fraction(1001, 1000), Fraction(90091, 90000), Fraction(7)]
    assert from_text(to_text(times)) == times
    assert to_text([Fraction(0), Fraction(1, 30), Fraction(1, 15)]) == "[30, 0, 1, 2]"
    assert join_times([times[:3], times[2:]]) == times


def test_a_part_that_begins_too_early_is_moved_behind_the_one_before():
    joined = join_times([[Fraction(0), Fraction(1), Fraction(2)], [Fraction(999, 1000), Fraction(3), Fraction(4)]])
    assert len(joined) == 5
    assert Fraction(1) < joined[2] < Fraction(1001, 1000)
    assert joined[:2] + joined[3:] == [0, 1, 3, 4]


@pytest.mark.parametrize(
    "text",
    ["", "7", "[]", "[30, 0]", "[0, 0, 1]", "[-30, 0, 1]", "[30, -1, 1]", "[30, 0, 0]", "[30, 2, 1]", "[30, 0, 1.5]",
     '[30, 0, "1"]', "[30, false, true]", "[30, 0, NaN]", "[1, 0, 999999999]", "[99999999999999, 0, 1]", '{"0": 1}',
     "[" * 100_000, "[30, 0, 1" + "0" * 5000 + "]"],
)  # fmt: skip
def test_text_that_holds_no_times_is_refused(text):
    with pytest.raises((ValueError, RecursionError)):
        from_text(text)
