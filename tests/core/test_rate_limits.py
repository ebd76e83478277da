"""Token buckets, on a clock of the test's own."""

from server.core.rate_limits import TokenBuckets
from tests.support.clocks import Clock


def test_a_minutes_worth_then_a_steady_trickle() -> None:
    clock = Clock()
    buckets = TokenBuckets(clock)
    assert [buckets.take("a", 6) for _ in range(8)] == [None] * 6 + [10, 10]
    clock.now += 9.5
    assert buckets.take("a", 6) == 1
    clock.now += 0.5
    assert [buckets.take("a", 6), buckets.take("a", 6)] == [None, 10]


def test_names_do_not_share() -> None:
    buckets = TokenBuckets(Clock())
    assert [buckets.take(name, 1) for name in "abab"] == [None, None, 60, 60]


def test_looking_takes_nothing() -> None:
    buckets = TokenBuckets(Clock())
    assert [buckets.wait_s("a", 1) for _ in range(3)] == [None] * 3
    assert [buckets.take("a", 1), buckets.wait_s("a", 1)] == [None, 60]


def test_a_bucket_never_holds_more_than_a_minutes_worth() -> None:
    clock = Clock()
    buckets = TokenBuckets(clock)
    buckets.take("a", 2)
    clock.now += 3_600
    assert [buckets.take("a", 2) for _ in range(3)] == [None, None, 30]


def test_strangers_do_not_fill_the_memory() -> None:
    buckets = TokenBuckets(Clock(), max_names=100)
    assert buckets.take("kept", 1) is None
    for number in range(10_000):
        buckets.take(str(number), 1)
        assert buckets.take("kept", 1) == 60  # used lately, so never the one to go
    assert len(buckets._buckets) == 100


def test_several_tokens_are_taken_together_or_not_at_all() -> None:
    clock = Clock()
    buckets = TokenBuckets(clock)
    assert [buckets.take("a", 60, 50), buckets.take("a", 60, 20), buckets.take("a", 60, 10)] == [
        None,
        10,
        None,
    ]
    assert buckets.take("a", 60, 1_000) == 60, "more than it holds take a full bucket"
    clock.now += 60
    assert [buckets.take("a", 60, 1_000), buckets.take("a", 60)] == [None, 1]
