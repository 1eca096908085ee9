"""The image cache: right rows for every key, whatever leaves and whoever writes meanwhile, in bounded memory."""

import subprocess
import sys
import threading

import numpy as np
import pytest

from buffer.image_cache import ImageCache

SHAPE = (8, 8, 3)
ROW = 8 * 8 * 3


def image(key, salt=0, shape=SHAPE):
    return np.full(shape, (key * 7 + salt) % 251, np.uint8)


def read(cache, keys, column="top", salt=0, shape=SHAPE):
    """Reads and checks; returns the keys that were decoded."""
    keys, decoded = np.asarray(keys, np.int64), []
    out = np.empty((len(keys), *shape), np.uint8)

    def decode(i, row):
        decoded.append(int(keys[i]))
        row[:] = image(int(keys[i]), salt, shape)
        return True

    cache.rows(column, keys, out, decode)
    for i, key in enumerate(keys.tolist()):
        assert (out[i] == image(key, salt, shape)).all(), (key, out[i].ravel()[:4])
    return decoded


def test_what_was_decoded_once_is_read_from_memory():
    cache = ImageCache(100 * ROW, page_bytes=10 * ROW)
    assert read(cache, [1, 2, 3, 2, 1]) == [1, 2, 3]
    assert read(cache, [3, 4, 1]) == [4]
    assert read(cache, [1], column="wrist", salt=100) == [1]  # another column, another image
    assert cache.cached(np.array([1, 2, 9]), ("top",)).tolist() == [True, True, False]
    assert cache.cached(np.array([1, 2, 9])).tolist() == [True, False, False]
    assert cache.cached(np.array([1]), ("top", "never seen")).tolist() == [False]
    stats = cache.stats()
    assert (stats.hits, stats.misses, stats.evictions, stats.bytes) == (2, 7, 0, 20 * ROW)
    assert read(cache, []) == [] and stats.hit_rate == pytest.approx(2 / 9)


def test_rows_leave_when_it_is_full_and_those_that_were_read_stay_longer():
    cache = ImageCache(20 * ROW, page_bytes=5 * ROW)
    read(cache, range(20))
    read(cache, range(10))  # read since they came
    read(cache, range(20, 30))
    assert cache.cached(np.arange(30)).sum() == 20 and cache.stats().evictions == 10
    assert cache.cached(np.arange(10)).all() and cache.cached(np.arange(20, 30)).all()
    rng = np.random.default_rng(0)
    for _ in range(50):
        read(cache, rng.integers(0, 200, 16))
    assert cache.stats().bytes == 20 * ROW


def test_nothing_is_kept_without_memory_and_of_a_call_that_fails():
    nothing = ImageCache(0)
    assert read(nothing, [1, 1]) == [1] and read(nothing, [1]) == [1] and nothing.stats().bytes == 0
    small = ImageCache(ROW - 1)
    assert read(small, [1]) == [1] and read(small, [1]) == [1] and small.stats().bytes == 0
    cache = ImageCache(100 * ROW)

    def broken(i, row):
        if i == 1:
            raise ValueError("not an image")
        row[:] = 0
        return True

    with pytest.raises(ValueError, match="not an image"):
        cache.rows("top", np.array([5, 6]), np.empty((2, *SHAPE), np.uint8), broken)
    assert read(cache, [5, 6]) == [5, 6]
    with pytest.raises(ValueError, match="contiguous"):
        cache.rows("top", np.array([5]), np.empty((1, 8, 8, 6), np.uint8)[..., ::2], broken)


def test_what_may_not_be_kept_is_asked_for_at_every_place():
    cache, asked = ImageCache(100 * ROW), []

    def decode(i, row):
        asked.append(i)
        row[:] = 0
        return i == 1

    cache.rows("top", np.array([4, 5, 4, 5]), np.empty((4, *SHAPE), np.uint8), decode)
    assert asked == [0, 1, 2] and cache.cached(np.array([4, 5])).tolist() == [False, True]


def test_a_column_that_comes_late_gets_its_share():
    cache = ImageCache(40 * ROW, page_bytes=5 * ROW)
    read(cache, range(40))
    read(cache, range(40), column="wrist", salt=9)
    stats = cache.stats()
    assert stats.bytes == 40 * ROW
    assert cache.cached(np.arange(40), ("wrist",)).sum() == 20 == cache.cached(np.arange(40), ("top",)).sum()
    large = (16, 16, 3)
    read(cache, range(3), column="large", shape=large)  # rows of another size
    assert cache.cached(np.arange(3), ("large",)).any() and cache.stats().bytes <= 40 * ROW
    read(cache, range(40))
    read(cache, range(40), column="wrist", salt=9)
    read(cache, range(3), column="large", shape=large)


def test_threads_that_read_while_rows_leave_never_see_another_image(scale):
    shape = (64, 64, 3)  # large enough that copies run without the interpreter's lock
    cache = ImageCache(6 * 64 * 64 * 3, page_bytes=2 * 64 * 64 * 3)
    failed = []

    def work(seed):
        rng = np.random.default_rng(seed)
        try:
            for _ in range(300 * scale):
                read(cache, rng.integers(0, 9, 6), shape=shape)
        except BaseException as error:
            failed.append(error)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        [thread.start() for thread in threads]
        [thread.join(60) for thread in threads]
    finally:
        sys.setswitchinterval(before)
    assert not failed, failed[0]
    stats = cache.stats()
    assert stats.hits > 100 and stats.evictions > 100 and stats.hits + stats.misses == 4 * 300 * 6 * scale


MEMORY = """
import numpy as np
from buffer.image_cache import ImageCache

def resident_mb():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024

cache, out = ImageCache(32 << 20), np.ones((64, 128, 128, 3), np.uint8)
base = resident_mb()
for column in ("a", "b"):
    for start in range(0, 2048, 64):
        cache.rows(column, np.arange(start, start + 64), out, lambda i, row: row.fill(i) is None)
print(resident_mb() - base)
"""


def test_resident_memory_stays_within_its_bound():
    """192 MB of images through a cache of 32 MB."""
    out = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, timeout=60)
    assert out.returncode == 0, out.stderr
    assert 24 < float(out.stdout) < 40
