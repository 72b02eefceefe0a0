"""Random numbers as a function of a key.

All generators that a pipeline draws from are set to a key at once, a batch of keys
by one call.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np

from kerastrip import _checks

__all__ = [
    "SCHEME",
    "KeyedRandom",
]

# The way from a key to random numbers. All of a key but its last integer is hashed by
# BLAKE2b, as 64-bit integers, little-endian, with the seed and the length before them;
# the hash is the key of a Philox. The last integer, times 5, is the counter where 20
# words begin: 4 for the state and the increment of a PCG64, and 16 for the first numbers
# of Python's kind. So a whole batch is keyed by one call. The way is frozen: another
# would be scheme 3, or saved augmentations would become others without a word.
SCHEME = 2
_HASH_NAME = b"kerastrip-aug-v2"
_WORDS, _STATE_WORDS = 20, 4


class KeyedRandom:
    """A NumPy and a Python generator of one key after the other.

    Attributes:
        rng: the `numpy.random.Generator`.
        python: the `random.Random`.
    """

    def __init__(self) -> None:
        self._words = np.random.Philox(0)
        self.rng = _Late(np.random.PCG64(0))
        self.python = _PythonRandom(self.rng)

    def draws(self, seed: int, key: tuple[int, ...], count: int) -> Iterator[tuple]:
        """What `set` takes for `count` keys, whose last integers run on from `key`'s."""
        advice = "Write aug(image, epoch, step, position)."
        *rest, last = [_checks.integer64("key", value, advice) for value in key or (0,)]
        _checks.integer64("key", last + count - 1)
        packed = struct.pack(f"<{len(rest) + 2}q", seed, len(key), *rest)
        digest = hashlib.blake2b(packed, digest_size=16, person=_HASH_NAME).digest()
        counter = (last % 2**64 * (_WORDS // 4)).to_bytes(32, "little")
        self._words.state = {
            "bit_generator": "Philox",
            "state": {
                "counter": np.frombuffer(counter, "<u8"),
                "key": np.frombuffer(digest, "<u8"),
            },
            "buffer": np.zeros(4, np.uint64),
            "buffer_pos": 4,
            "has_uint32": 0,
            "uinteger": 0,
        }
        words = self._words.random_raw(_WORDS * count).reshape(count, _WORDS)
        numbers = (words[:, _STATE_WORDS:] >> 11) * 2.0**-53
        return zip(words[:, :_STATE_WORDS].tolist(), numbers.tolist(), strict=True)

    def set(self, words: list[int], numbers: list[float]) -> None:
        """Sets the generators to a key, by its `draws`."""
        self.rng.words = words
        self.python.set(numbers)


class _Late(np.random.Generator):
    """A generator that is set to `words` when somebody wants something of it.

    Most transforms do not, and to set it takes 2 microseconds.
    """

    words: list[int] | None = None

    def __getattribute__(self, name: str) -> Any:
        get = super().__getattribute__
        if words := get("words"):
            self.words = None
            get("bit_generator").state = {
                "bit_generator": "PCG64",
                "state": {
                    "state": words[0] << 64 | words[1],
                    "inc": words[2] << 64 | words[3] | 1,
                },
                "has_uint32": 0,
                "uinteger": 0,
            }
        return get(name)


class _PythonRandom(random.Random):
    """Python's random numbers: those that it was given, then those of a generator.

    To seed a Mersenne Twister for every image would take longer than all else that a
    keyed call adds.
    """

    def __init__(self, rng: np.random.Generator):
        super().__init__(0)
        # Not `rng.random` itself: looked up once, it would not set a `_Late` any more.
        self._rest = iter(lambda: rng.random(), None)

    def set(self, numbers: list[float]) -> None:
        """Sets what comes first."""
        self.random = itertools.chain(numbers, self._rest).__next__  # type: ignore[method-assign]

    def getrandbits(self, k: int) -> int:
        value = 0
        for _ in range(0, k, 32):
            value = value << 32 | int(self.random() * 2**32)
        return value >> -k % 32

    def gauss(self, mu: float = 0.0, sigma: float = 1.0) -> float:
        return self.normalvariate(mu, sigma)  # the other keeps every second number
