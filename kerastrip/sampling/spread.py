"""Which samples of a class a draw takes when its rows are spread: `spread=` of `PKPlan`.

`spread=` gives each sample a word: its camera, its session, its typeface. In this
module a *camera* is the set of samples of one stratum that have one word: the samples of
two classes from one real camera are two cameras here. Cameras are numbered stratum by
stratum, and inside a stratum from the smallest to the largest.
Samples are numbered camera by camera: the *place* of a sample is its position in this
order. For two strata, the first with samples of three words:

    place      0 1 2 3 4 5 6 7
    stratum    0 0 0 0 0 0 1 1
    word       z x x y y y x z
    camera     0 1 1 2 2 2 3 4
"""

from __future__ import annotations

import dataclasses

import numpy as np

from kerastrip import _labels
from kerastrip.sampling import permutation
from kerastrip.sampling.permutation import mix

__all__ = [
    "Cameras",
    "Cover",
    "Spread",
    "camera_order",
]

# The streams of keys: cameras, samples, and the samples of a covered epoch.
_CAMERAS, _SAMPLES, _COVER = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class Cameras:
    """The cameras of all strata, as in the module docstring.

    Attributes:
        starts: `(cameras,)` place of the first sample.
        sizes: `(cameras,)` number of samples, ascending inside a stratum.
        first: `(strata,)` first camera.
        counts: `(strata,)` number of cameras.
    """

    starts: np.ndarray
    sizes: np.ndarray
    first: np.ndarray
    counts: np.ndarray

    @property
    def strata(self) -> np.ndarray:
        """`(cameras,)` the stratum of each camera."""
        return np.repeat(np.arange(len(self.first)), self.counts)

    def sums(self, values: np.ndarray) -> np.ndarray:
        """`(strata,)` sums of `(cameras,)` values over the cameras of each stratum."""
        return np.add.reduceat(values, self.first, dtype=np.int64)

    def span(self, place: int) -> tuple[int, int]:
        """The first place and the size of the camera that a place belongs to."""
        camera = int(np.searchsorted(self.starts, place, "right")) - 1
        return int(self.starts[camera]), int(self.sizes[camera])

    def of_strata(self, kept: np.ndarray) -> Cameras:
        """The cameras of some strata; `kept` is `(strata,)` booleans."""
        chosen = np.repeat(kept, self.counts)
        counts = self.counts[kept]
        first = np.cumsum(counts) - counts
        return Cameras(self.starts[chosen], self.sizes[chosen], first, counts)


def camera_order(strata: np.ndarray, words: np.ndarray) -> tuple[np.ndarray, Cameras]:
    """The samples by stratum, camera and position, and the cameras.

    Args:
        strata: `(samples,)` stratum of each sample. Strata that do not occur do not
            count.
        words: `(samples,)` code of the word of each sample.

    Returns:
        `(samples,)` sample at each place, and the cameras.
    """
    # Two sorts of 12 bytes a sample: one sort of pairs would take 40.
    by_word, _ = _labels.sorted_by(words)
    by_stratum, _ = _labels.sorted_by(strata[by_word])
    order = by_word[by_stratum]
    del by_word, by_stratum
    stratum, word = strata[order], words[order]
    begins = np.ones(len(order), bool)
    begins[1:] = (stratum[1:] != stratum[:-1]) | (word[1:] != word[:-1])
    starts = np.flatnonzero(begins)
    stratum = stratum[starts]
    sizes = np.diff(starts, append=len(order))
    by_size = np.lexsort((sizes, stratum))
    starts, sizes = starts[by_size], sizes[by_size]
    counts = np.bincount(stratum)
    counts = counts[counts > 0]
    cameras = Cameras(
        starts=np.cumsum(sizes) - sizes,
        sizes=sizes,
        first=np.cumsum(counts) - counts,
        counts=counts,
    )
    return order[
        np.repeat(starts - cameras.starts, sizes) + np.arange(len(order))
    ], cameras


class Spread:
    """Draws of k samples from as many cameras of a stratum as it has.

    The k rows of a draw are dealt to the cameras one by one, round after round, as long
    as a camera has samples left. For k = 8 and cameras of 1, 2, 5, 6 and 9 samples:

        samples                1  2  5  6  9
        rows of a draw         1  2  1  1  1    = 6: one from each, a second of the second
                                     +  +       2 more, of two of the larger cameras

    So a camera is one of two kinds. The small cameras (here 1 and 2 samples) give all
    their samples in every draw. The others are *open*: each gives `each` samples (here
    1), and `extra` of them (here 2) give one more. Which open cameras give one more
    goes round, so that after every draw the numbers of samples that two open cameras
    have given differ by at most 1. With more cameras than rows `each` is 0, and which
    cameras meet must be mixed: they come from shuffled cycles (`permutation.cycle`).

    Each camera gives its samples in shuffled cycles: all its samples once, then all
    of them once more (`permutation.stream`).

    Args:
        cameras: the cameras.
        rows: `(strata,)` k, 1 ... the number of samples of the stratum. (In an epoch of
            coverage, where `Cover` deals the samples to the draws, one draw is the
            samples of an epoch, and k is their number.)
        key: 64-bit integer.
    """

    def __init__(self, cameras: Cameras, rows: np.ndarray, key: int) -> None:
        self.cameras = cameras
        self._key = key
        strata = cameras.strata
        # If this camera and all larger ones gave as many samples as this camera has, and
        # the smaller ones all of theirs, would that be at most k rows?
        smaller = cameras.starts - cameras.starts[cameras.first][strata]
        number = np.arange(len(strata)) - cameras.first[strata]
        reached = smaller + (cameras.counts[strata] - number) * cameras.sizes
        small = reached <= rows[strata]
        self._rows_of_small = cameras.sums(np.where(small, cameras.sizes, 0))
        small_cameras = cameras.sums(small)
        self._open = cameras.counts - small_cameras
        self._first_open = cameras.first + small_cameras
        open_ = np.maximum(self._open, 1)
        self._each, self._extra = np.divmod(rows - self._rows_of_small, open_)
        lot = mix(key, _CAMERAS, np.arange(len(rows))) >> np.uint64(1)
        self._starts_at = lot.view(np.int64) % open_

    def places(
        self, stratum: np.ndarray, draw: np.ndarray, row: np.ndarray
    ) -> np.ndarray:
        """The places of the samples in some rows of some draws.

        Args:
            stratum: `(..., 1)` int64.
            draw: `(..., 1)` int64, how many draws of the stratum came before.
            row: `(..., rows)` int64 in 0..k-1. First come the samples of the small
                cameras, then the open cameras round by round: in the example of the
                class cameras 1 2 2, then 3 4 5, then 4 5.

        Returns:
            `(..., rows)` int64.
        """
        of_small = self._rows_of_small[stratum]
        open_ = np.maximum(self._open[stratum], 1)
        each, extra = self._each[stratum], self._extra[stratum]
        layer, column = np.divmod(np.maximum(row - of_small, 0), open_)
        # The last round has `extra` rows only, and starts where that of the draw before
        # ended; that of the first draw starts at a camera by lot.
        start = self._starts_at[stratum] + draw * extra
        camera = np.where(layer < each, column, (start + column) % open_)
        full_rounds, last_rounds = draw * each, self._last_rounds(stratum, draw, camera)
        use = full_rounds + last_rounds + layer  # samples it gave before this one
        mixed = (each == 0)[..., 0]
        if mixed.any():
            use[mixed], camera[mixed] = self._mixed(
                stratum[mixed], draw[mixed], column[mixed]
            )
        # A stratum without open cameras has no camera to look up; any camera will do.
        camera = self._first_open[stratum] + camera
        camera = np.minimum(camera, len(self.cameras.sizes) - 1)
        start = self.cameras.starts[self.cameras.first[stratum]]
        return np.where(row < of_small, start + row, self.sample(stratum, camera, use))

    def _last_rounds(
        self, stratum: np.ndarray, draw: np.ndarray, camera: np.ndarray
    ) -> np.ndarray:
        """How often an open camera was in the last round of draws 0..draw-1.

        The last rounds go round the cameras, so this is the number of whole turns among
        draw * extra, counted from where the camera comes first.
        """
        open_ = np.maximum(self._open[stratum], 1)
        comes_first = (camera - self._starts_at[stratum]) % open_
        return (draw * self._extra[stratum] - comes_first + open_ - 1) // open_

    def _mixed(
        self, stratum: np.ndarray, draw: np.ndarray, row: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """How often the camera of a row came before, and its number among the open ones."""
        return permutation.numbered_cycle(
            draw,
            row,
            np.maximum(self._open[stratum], 1),
            np.maximum(self._extra[stratum], 1),
            mix(self._key, _CAMERAS, stratum),
        )

    def sample(
        self, stratum: np.ndarray, camera: np.ndarray, use: np.ndarray
    ) -> np.ndarray:
        """The place of the sample that a camera gives after `use` others."""
        size = self.cameras.sizes[camera]
        window = self._each[stratum] + (self._extra[stratum] > 0)
        item = permutation.stream(
            use,
            size,
            np.clip(window, 1, size),
            mix(self._key, _SAMPLES, camera),
        )
        return self.cameras.starts[camera] + item

    def uses(self, draws: np.ndarray) -> np.ndarray:
        """`(cameras,)` samples that the first draws take from each camera.

        Args:
            draws: `(strata,)` number of draws.
        """
        strata = self.cameras.strata
        number = np.arange(len(strata)) - self._first_open[strata]
        count = draws[strata]
        open_, extra = np.maximum(self._open, 1), self._extra
        given = count * self._each[strata] + self._last_rounds(strata, count, number)
        given = np.where(number < 0, count * self.cameras.sizes, given)
        # Where cameras are mixed, those of the cycle that has begun are looked up.
        mixed = np.flatnonzero((self._each == 0) & (extra > 0))
        cycles, begun = np.divmod(draws[mixed] * extra[mixed], open_[mixed])
        given[(number >= 0) & (self._each == 0)[strata]] = np.repeat(
            cycles, open_[mixed]
        )
        stratum = np.repeat(mixed, begun)
        turn = np.repeat(cycles * open_[mixed], begun) + _labels.counted(begun)
        draw, row = np.divmod(turn, extra[stratum])
        given[self._first_open[stratum] + self._mixed(stratum, draw, row)[1]] += 1
        return given


class Cover:
    """An epoch of coverage: every sample of the epoch, dealt evenly to the draws.

    A stratum of n samples has D draws of k rows in an epoch, n <= D * k. Its samples are
    written down camera by camera, and dealt to the draws like cards. For cameras a, b
    and c of 2, 1 and 4 samples, k = 3 and D = 3:

        samples      a a b c c c c        a a b b c c c c c
        draw                              0 1 2 0 1 2 0 1 2

    So each camera is spread over the draws as evenly as possible. The D * k - n rows that
    are left over go to the cameras with the fewest samples (here one to b and, by lot,
    one to c); but a camera of m samples never gets more than D * m rows, so that the rows
    of a draw can be distinct. Cameras that are not in every draw stand side by side
    in the list, in an order that the epoch shuffles, so that they are spread evenly, too.

    Args:
        epoch: number of the epoch.
        samples: the draws of one epoch as one draw: it chooses the samples of the epoch.
        draws: `(strata,)` D.
        rows: `(strata,)` distinct rows of a draw.
        key: 64-bit integer.
    """

    def __init__(
        self,
        epoch: int,
        samples: Spread,
        draws: np.ndarray,
        rows: np.ndarray,
        key: int,
    ) -> None:
        cameras = samples.cameras
        strata = cameras.strata
        self._samples, self._draws = samples, draws
        self._key = mix(key, _COVER, epoch)
        self._before = samples.uses(np.full(len(draws), epoch))
        self._given = samples.uses(np.full(len(draws), epoch + 1)) - self._before
        least, most = self._given, self._given * draws[strata]
        total = draws * rows
        level = _filled_to(cameras, least, most, total)[strata]
        filled = np.clip(level, least, most)
        # By stratum, cameras of some draws before cameras of all, then by lot: in one
        # number, because one sort is faster than three.
        lot = mix(self._key, np.arange(len(strata))) >> np.uint64(32)
        everywhere = filled >= draws[strata]
        lot |= (strata.view(np.uint64) * 2 + everywhere) << np.uint64(32)
        self._order = np.argsort(lot, kind="stable")
        # The rows that the level leaves over: one each to the first cameras with room.
        room = (np.clip(level + 1, least, most) > filled)[self._order]
        left = (total - cameras.sums(filled))[strata]
        nth = np.cumsum(room)
        nth -= (nth - room)[cameras.first][strata]
        filled = filled[self._order] + (room & (nth <= left))
        self._ends = np.cumsum(filled)
        self._begins = self._ends - filled

    def places(
        self, stratum: np.ndarray, draw: np.ndarray, row: np.ndarray
    ) -> np.ndarray:
        """The places of the samples in some rows of some draws, as `Spread.places`.

        Draws from D on go through the list again, with other samples side by side.
        """
        draws = self._draws[stratum]
        lap, draw = np.divmod(draw, draws)
        first = self._begins[self._samples.cameras.first[stratum]]
        card = first + row * draws + draw
        number = np.searchsorted(self._ends, card, "right")
        camera = self._order[number]
        card = card - self._begins[number]
        # No draw holds a sample twice: there are at most given * D cards (`most`), as many
        # as there are pairs of a sample and a draw, and each pair comes once. Card and
        # card + lcm(given, D) would be one pair, so after each lcm the samples move on
        # by one. For 2 samples x and y, D = 4 and 8 rows:
        #
        #     draw     0 1 2 3 0 1 2 3
        #     sample   x y x y y x y x
        given = self._given[camera]
        card += card // np.lcm(given, draws)
        shift = mix(self._key, lap, camera) >> np.uint64(1)
        item = (card + shift.view(np.int64) % given) % given
        return self._samples.sample(stratum, camera, self._before[camera] + item)


def _filled_to(
    cameras: Cameras, least: np.ndarray, most: np.ndarray, total: np.ndarray
) -> np.ndarray:
    """`(strata,)` the largest level at which the cameras hold at most `total` rows.

    A camera below the level is filled up to it, but it never holds more than `most`
    rows, nor fewer than `least`. The level is found by halving its range.
    """
    strata = cameras.strata
    low, high = np.zeros_like(total), total.copy()
    for _ in range(int(total.max()).bit_length()):
        middle = (low + high + 1) // 2
        fits = cameras.sums(np.clip(middle[strata], least, most)) <= total
        low = np.where(fits, middle, low)
        high = np.where(fits, high, middle - 1)
    return low
