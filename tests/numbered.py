"""A source whose clips say which they are, for tests of the loader."""

import itertools

import numpy as np

from rise_jax.data.sources import BadClipError, Sample, Text


class Numbered:
    """Item n is a clip of level n with a random second pixel; the items in `bad` cannot be read."""

    shape = (2, 4, 4, 3)

    def __init__(self, count, bad=()):
        self.count, self.bad = count, set(bad)
        self.texts = [Text(str(item), None) for item in range(count)]

    def __len__(self):
        return self.count

    def name(self, item):
        return f"clip {item}"

    def load(self, item, rng):
        if item in self.bad:
            raise BadClipError(self.name(item), "is damaged")
        video = np.full(self.shape, item, np.uint8)
        video[:, 0, 1] = rng.integers(256, size=3)
        return Sample(video, item)


def take(loader, count):
    return list(itertools.islice(loader, count))


def joined(batches):
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def assert_same(one, other):
    assert len(one) == len(other) > 0
    for left, right in zip(one, other):
        assert left.keys() == right.keys()
        for name in left:
            assert left[name].dtype == right[name].dtype
            np.testing.assert_array_equal(left[name], right[name])
