"""Random numbers as a function of a key.

A pipeline draws from two generators: one of NumPy and one of Python's `random`. Both are
set to the key of an image before the image is augmented. How a key such as
(epoch, step, position) becomes random numbers:

    seed, length of the key, epoch, step        position * 5
      |                                           |
      | BLAKE2b                                   |
      v                                           v
    key of a Philox                             counter of the Philox
      |                                           |
      +---------------------+---------------------+
                            v
                 20 words of 64 bits, w0 ... w19
                   |                  |
        w0 ... w3  |                  |  w4 ... w19
                   v                  v
          state and increment       16 floats in [0, 1): w >> 11, times 2**-53
          of a PCG64                  |
                   |                  v
                   v                numbers of Python's kind: these 16 first,
          numbers of NumPy's kind --> then numbers of the PCG64

The Philox gives 4 words for each value of its counter, so the words of position p begin
at counter 5 p. The words of a whole batch (positions p, p + 1, ...) follow one another
and come from one call.
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

# The number of the scheme drawn above. Do not change the scheme: a new one needs
# SCHEME = 3, otherwise saved augmentations silently give other views. BLAKE2b reads the
# seed, the length of the key and all integers of the key but the last, each as 64 bits,
# little-endian.
SCHEME = 2
_HASH_NAME = b"kerastrip-aug-v2"
_WORDS, _STATE_WORDS = 20, 4


class KeyedRandom:
    """A NumPy and a Python generator, set to one key after the other.

    Attributes:
        rng: the `numpy.random.Generator`.
        python: the `random.Random`.
    """

    def __init__(self) -> None:
        self._words = np.random.Philox(0)
        self.rng = _Late(np.random.PCG64(0))
        self.python = _PythonRandom(self.rng)

    def draws(self, seed: int, key: tuple[int, ...], count: int) -> Iterator[tuple]:
        """The arguments of `set` for `count` keys in a row.

        Args:
            seed: 64-bit integer.
            key: the first key. Each following key has a last integer that is 1 larger.
            count: number of keys.

        Returns:
            An iterator over (words of the PCG64, floats in [0, 1)).
        """
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
        # The upper 53 bits of a word fill the mantissa of a float.
        words = self._words.random_raw(_WORDS * count).reshape(count, _WORDS)
        numbers = (words[:, _STATE_WORDS:] >> 11) * 2.0**-53
        return zip(words[:, :_STATE_WORDS].tolist(), numbers.tolist(), strict=True)

    def set(self, words: list[int], numbers: list[float]) -> None:
        """Sets both generators to a key, given one item of `draws`."""
        # The NumPy generator takes the words when it is first used: see `_Late`.
        self.rng.words = words
        self.python.set(numbers)


class _Late(np.random.Generator):
    """A generator that sets its state to `words` when it is first used.

        words = [...]           any attribute is looked up
    ---------------> waiting ----------------------------> set, `words` is None

    Most transforms draw from Python's generator alone, and to set the state of a PCG64
    takes 2 microseconds. Without this class (the state set by `KeyedRandom.set`) all
    numbers stay the same, but each image takes 2 microseconds more, of about 12 for an
    image of 28 x 28 pixels and two flips: measured by `timeit`, as the least of 7
    repeats of `KeyedRandom.set`, and of `Augmentation.batch` with 256 images.

    Every look-up of an attribute passes `__getattribute__`. Whoever keeps a bound method
    (`draw = rng.random`) across two keys never passes it again, and draws numbers of the
    first key for ever: see `_PythonRandom`.
    """

    words: list[int] | None = None

    def __getattribute__(self, name: str) -> Any:
        get = super().__getattribute__
        if words := get("words"):
            self.words = None  # first: the look-ups below come here again
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
    """Python's random numbers: first the numbers it was given, then those of a generator.

    It has no Mersenne Twister: to seed one for every image would take longer than
    everything else that a keyed call adds.
    """

    def __init__(self, rng: np.random.Generator):
        super().__init__(0)
        # A lambda, not `rng.random` itself: a `_Late` must see each look-up.
        self._rest = iter(lambda: rng.random(), None)

    def set(self, numbers: list[float]) -> None:
        """Sets the numbers that come first."""
        self.random = itertools.chain(numbers, self._rest).__next__  # type: ignore[method-assign]

    def getrandbits(self, k: int) -> int:
        value = 0
        for _ in range(0, k, 32):
            value = value << 32 | int(self.random() * 2**32)
        return value >> -k % 32

    def gauss(self, mu: float = 0.0, sigma: float = 1.0) -> float:
        # `random.Random.gauss` makes two numbers at a time and keeps the second for the
        # next call, which would carry a number from one key to the next.
        return self.normalvariate(mu, sigma)
