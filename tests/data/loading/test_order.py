"""The order: whole batches, exact proportions, one shape per batch, a pure function of its keys."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.loading.order import Order, Source, choose_per_epoch, locate
from data.schema import DataError

SIZES = np.array([7, 7, 7, 5])


def one(batch, seed=0, shuffle=True, nodes=1, sizes=SIZES):
    source = Source(sizes, int(sizes.sum()), 0)
    return Order((source,), batch, seed, shuffle, nodes)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("nodes", [1, 2, 4])
@pytest.mark.parametrize("batch", [4, 8, 12])
def test_an_epoch_is_whole_batches_without_repeats(batch, nodes, shuffle):
    orders = [one(batch, 0, shuffle, nodes).epoch(epoch) for epoch in range(3)]
    for order in orders[: 3 if nodes == 1 else 1]:
        assert order.shape == (26 // batch, batch)
        assert len(set(order.flatten().tolist())) == order.size
        assert order.min() >= 0 and order.max() < 26
    assert np.array_equal(orders[1], one(batch, 0, shuffle, nodes).epoch(1))
    other_seed = one(batch, 1, shuffle, nodes).epoch(0)
    assert np.array_equal(orders[0], other_seed) is not shuffle


def test_every_sample_has_its_turn_though_some_are_left_out_of_an_epoch():
    seen = {int(i) for epoch in range(8) for i in one(4).epoch(epoch).flatten()}
    assert seen == set(range(26))


def test_canonical_nodes_read_their_own_shards():
    for epoch in range(3):
        order = one(4, nodes=2, sizes=np.array([8, 8, 8, 8])).epoch(epoch)
        halves = [{int(i) // 8 for i in part.flatten()} for part in np.split(order, 2, axis=1)]
        assert not halves[0] & halves[1] and all(len(half) == 2 for half in halves)


def test_locate_is_a_pure_function_of_the_step():
    assert [locate(step, 6) for step in (0, 5, 6, 13)] == [(0, 0), (0, 5), (1, 0), (2, 1)]


def test_proportions_by_largest_remainder():
    assert choose_per_epoch([10, 20], [None, None]) == [10, 20]
    assert choose_per_epoch([10, 20], [1.0, 1.0]) == [15, 15]
    assert choose_per_epoch([10, 10, 10], [1.0, 1.0, 2.0]) == [8, 7, 15]


def test_more_nodes_than_samples_is_refused():
    with pytest.raises(DataError, match="num_canonical_nodes=4: a stream has only 3 samples"):
        one(4, nodes=4, sizes=np.array([3]))


SHARDS = st.lists(st.integers(1, 9), min_size=1, max_size=4).map(np.array)


@st.composite
def orders(draw):
    """1 to 4 streams in 1 or 2 buckets, with or without proportions."""
    shards = draw(st.lists(SHARDS, min_size=1, max_size=4))
    buckets = [0, *(draw(st.integers(0, 1)) for _ in shards[1:])]
    weighted = draw(st.booleans())
    weights = [draw(st.sampled_from([0.5, 1.0, 3.0])) if weighted else None for _ in shards]
    chosen = choose_per_epoch([int(sizes.sum()) for sizes in shards], weights)
    nodes = draw(st.sampled_from([1, 2]))
    shards = [np.append(sizes, 1) for sizes in shards]  # at least a sample per node
    sources = tuple(map(Source, shards, chosen, buckets))
    batch = draw(st.sampled_from([2, 4]))
    return Order(sources, batch, draw(st.integers(0, 9)), draw(st.booleans()), nodes)


@settings(max_examples=60, deadline=None)
@given(orders(), st.integers(0, 5))
def test_every_batch_lies_in_one_bucket_and_every_epoch_has_as_many(order, epoch):
    rows = order.epoch(epoch)
    assert rows.shape == (order.steps_per_epoch, order.global_batch_size)
    ends = np.cumsum([source.size for source in order.sources])
    buckets = np.array([source.bucket for source in order.sources])
    of_sample = buckets[np.searchsorted(ends, rows, side="right")]
    assert (of_sample == of_sample[:, :1]).all()
    steps = [int((of_sample[:, 0] == bucket).sum()) for bucket in range(max(buckets) + 1)]
    assert steps == order.bucket_steps
    assert np.array_equal(rows, order.epoch(epoch))


@settings(max_examples=40, deadline=None)
@given(SHARDS, st.integers(1, 40), st.integers(0, 9))
def test_a_stream_is_read_pass_after_pass(sizes, choose, seed):
    """Over any number of epochs no sample is ahead of another by more than one turn."""
    source = Source(sizes, choose, 0)
    order = Order((source,), 1, seed)
    seen: Counter = Counter({sample: 0 for sample in range(source.size)})
    for epoch in range(4):
        rows = order.epoch(epoch)
        assert len(rows) == choose
        seen.update(rows.flatten().tolist())
        assert max(seen.values()) - min(seen.values()) <= 1


def test_streams_are_mixed_in_their_proportion():
    sources = (Source(np.array([100]), 300, 0), Source(np.array([500]), 300, 0))
    rows = Order(sources, 6, 1).epoch(0)
    small = (rows < 100).sum(axis=1)
    assert small.sum() == 300 and small.std() > 0.5  # exact over the epoch, mixed within it
    assert abs(small[:50].sum() - small[50:].sum()) < 60


def test_a_second_stream_does_not_change_how_the_first_is_read():
    both = Order((Source(SIZES, 26, 0), Source(np.array([9]), 9, 0)), 5, 2).epoch(1).flatten()
    alone = one(1, seed=2).epoch(1).flatten()
    assert both.size == 35 and np.array_equal(both[both < 26], alone)
