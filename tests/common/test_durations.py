"""common/durations.py: each unit from two of it on."""

import pytest

from common.durations import as_clock, in_words


@pytest.mark.parametrize(("seconds", "words"), [
    (0, "0 s"), (119, "119 s"), (120, "2 min"), (7199, "120 min"), (7200, "2.0 h"),
    (47.9 * 3600, "47.9 h"), (48 * 3600, "2.0 d"), (3650 * 86400, "3,650.0 d"),
])
def test_words(seconds, words):
    assert in_words(seconds) == words


@pytest.mark.parametrize(("seconds", "clock"), [
    (0, "0:00:00"), (59.6, "0:01:00"), (3599, "0:59:59"), (3723, "1:02:03"), (360000, "100:00:00"),
])
def test_clock(seconds, clock):
    assert as_clock(seconds) == clock
