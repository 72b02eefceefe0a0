"""What embeddings say about their labels: wrong ones, doubled and merged classes.

NumPy on the CPU, exact neighbours, in blocks of rows.
"""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from kerastrip import _checks
from kerastrip._labels import sorted_by
from kerastrip.evaluation.confusions import nearest_others
from kerastrip.evaluation.retrieval import label_table
from kerastrip.evaluation.search import embeddings_array, unit_rows

__all__ = [
    "Audit",
    "LikeOne",
    "LikeTwo",
    "Misplaced",
    "audit",
]

# A row is compared by its third nearest row of a class: one or two rows of a class can
# be mislabelled themselves, and a class often has few rows near any one of its rows.
_NTH = 3
# Two classes look like one from this mixing on, and a class like two up to it. With 5 % of
# wrong labels, doubled classes had 0.45 or more, merged ones 0.2 or less.
_MIXED = 0.3
# Ends of intervals that miss in one case of twenty: the quantile of the normal.
_QUANTILE = 1.645
# So many rows of a class, evenly spread over it, decide how to cut it into two.
_LOOKED_AT = 100
# So many lines of each list are printed.
_PRINTED = 10


class Misplaced(NamedTuple):
    """A row that lies nearer to another class than to its own.

    Attributes:
        row: the number of the row.
        label: its label.
        suggested: the label of the nearest other class.
        nearer: by how much that class is nearer, 0 ... 1: 0.7 is 70 % nearer.
        share: share of the k nearest other rows that have the label of the row.
    """

    row: int
    label: Any
    suggested: Any
    nearer: float
    share: float


class LikeOne(NamedTuple):
    """Two classes that are mixed as if they were one.

    Attributes:
        first: a label.
        second: a later label.
        mixing: 0 for classes apart, about 1 for two random parts of one class.
        low: lower end of the mixing, which counts how few rows the classes have.
    """

    first: Any
    second: Any
    mixing: float
    low: float


class LikeTwo(NamedTuple):
    """A class whose best cut leaves two parts that are hardly mixed.

    Attributes:
        label: the label.
        mixing: mixing of the two parts.
        high: upper end of the mixing, which counts how few rows the class has.
        parts: the numbers of the rows of each part, the larger part first.
    """

    label: Any
    mixing: float
    high: float
    parts: tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Audit:
    """What to look at, the most suspicious first; a table when printed or shown.

    Attributes:
        rows: `Misplaced` rows, likely mislabelled, by `nearer`, the largest first.
        pairs: classes that look like one (`LikeOne`), by `low`, the largest first.
        classes: classes that look like two (`LikeTwo`), by `high`, the smallest first.
    """

    rows: list[Misplaced]
    pairs: list[LikeOne]
    classes: list[LikeTwo]

    def __str__(self) -> str:
        lines = []
        for title, columns, cells in self._tables():
            lines.append(f"{title}: {len(cells)}")
            shown = [columns, *cells[:_PRINTED]] if cells else []
            widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
            lines += [
                "  " + "  ".join(map(str.ljust, line, widths)).rstrip()
                for line in shown
            ]
            if len(cells) > _PRINTED:
                lines.append(f"  ... and {len(cells) - _PRINTED} more")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        parts = []
        for title, columns, cells in self._tables():
            lines = [
                "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in line)
                for tag, some in (("th", [columns]), ("td", cells[:_PRINTED]))
                for line in some
                if cells
            ]
            body = "".join(f"<tr>{line}</tr>" for line in lines)
            caption = html.escape(f"{title}: {len(cells)}")
            parts.append(f"<table><caption>{caption}</caption>{body}</table>")
        return "".join(parts)

    def _tables(self) -> list[tuple[str, list[str], list[list[str]]]]:
        """The title, the columns and the lines of each list."""
        return [
            (
                "rows that look mislabelled",
                ["row", "label", "suggested", "nearer", "share"],
                [
                    [f"{one.row}", f"{one.label}", f"{one.suggested}"]
                    + [f"{one.nearer:.0%}", f"{one.share:.0%}"]
                    for one in self.rows
                ],
            ),
            (
                "pairs of classes that look like one",
                ["first", "second", "mixing", "at least"],
                [
                    [f"{one.first}", f"{one.second}"]
                    + [f"{one.mixing:.2f}", f"{one.low:.2f}"]
                    for one in self.pairs
                ],
            ),
            (
                "classes that look like two",
                ["label", "mixing", "at most", "rows"],
                [
                    [f"{one.label}", f"{one.mixing:.2f}", f"{one.high:.2f}"]
                    + [" + ".join(f"{len(part)}" for part in one.parts)]
                    for one in self.classes
                ],
            ),
        ]


def audit(
    embeddings: Any,
    labels: Any,
    *,
    k: int = 10,
    distance: str = "euclidean",
) -> Audit:
    """Rows that look mislabelled, classes that look like one, classes that look like two.

    **Rows.** With d(c) the distance of a row to the third nearest other row of class c
    (to the second or first if its own class has less than six or four rows), a row of
    class a is listed if another class b has d(b) < d(a), and that many rows among the k
    nearest:

        nearer = 1 - d(b) / d(a)

    Where a and b look like one class the pair is listed, and the row is not.

    **Pairs of classes.** The rows of both classes look at their k nearest other rows (at
    all but one of their class in smaller classes), as far as they belong to the two
    classes, T_a and T_b of them. Were a and b one class of N rows, each would be of the
    other class by its size alone; X are:

        mixing = X / (T_a n_b / (N - 1) + T_b n_a / (N - 1))

    Few rows may be mixed by chance. So the list is ordered by a lower end: that of
    X / (T_a + T_b) by Wilson's interval, for as many trials as there are rows. A pair is
    listed if it is 0.3 or more.

    **Classes.** A class is cut in two at its mean, across the direction in which it is
    longest, and the mixing of the two parts is measured in the same way, among the
    nearest quarter of the class; a class is listed if the upper end is 0.3 or less. Of a
    class of more than 100 rows 100 are looked at. A class of less than about 15 rows is not listed:
    that its parts are apart might be chance.

    Judge embeddings of a model that has not learned the labels in question, or has not
    learned them by heart. Classes of one row are not judged. The time is that of one
    `search` among all rows, the memory is linear in them.

    Args:
        embeddings: (n, dim) finite numbers.
        labels: (n,) integers or strings, or (n, classes) one-hot rows; two classes at
            least.
        k: the number of neighbours that are looked at, at least 3. Default 10.
        distance: `"euclidean"` (default), `"squared_euclidean"` or `"cosine"`. Give the
            distance of the loss.

    Returns:
        The `Audit`, three lists with their numbers.

    Raises:
        TypeError, ValueError: if the arrays do not fit together, hold NaN or infinity,
            or there is one class only.

    Example:

    >>> import numpy as np
    >>> rows = np.array([0, 1, 2, 3, 4, 5, 2.4, 20, 21, 22, 23, 24])[:, None]
    >>> found = audit(rows, list("aaaaaabbbbbb"), k=5)
    >>> print(found)
    rows that look mislabelled: 1
      row  label  suggested  nearer  share
      6    b      a          93%     0%
    pairs of classes that look like one: 0
    classes that look like two: 0
    >>> found.rows[0].suggested
    'a'

    References:
        - Schilling, "Multivariate Two-Sample Tests Based on Nearest Neighbors", 1986
          (neighbours of the other sample, and how many are expected in one sample).
        - Wilson, "Probable Inference, the Law of Succession, and Statistical
          Inference", 1927 (the interval).
    """
    rows = embeddings_array("embeddings", embeddings)
    table = label_table("labels", labels, len(rows))
    k = _checks.integer("k", k, _NTH)
    sizes = np.bincount(table.codes, minlength=len(table.classes))
    if np.count_nonzero(sizes) < 2:
        raise _checks.value_error(
            "labels", "two classes or more", _checks.Told("one class")
        )
    names = table.classes.tolist()
    near = _Near.of(rows, table.codes, sizes, k, distance)
    pairs = _like_one(near, names)
    return Audit(_misplaced(near, names, pairs), pairs, _like_two(near, names))


class _Near(NamedTuple):
    """Rows with their classes and their nearest other rows.

    Attributes:
        rows: (n, dim) embeddings.
        codes: (n,) class of every row.
        sizes: (C,) number of rows of every class.
        members: for every class the numbers of its rows, ascending.
        distances: (n, k) distances to the nearest other rows.
        classes: (n, k) the classes of these rows.
        distance: one of `DISTANCES`.
    """

    rows: np.ndarray
    codes: np.ndarray
    sizes: np.ndarray
    members: Sequence[np.ndarray]
    distances: np.ndarray
    classes: np.ndarray
    distance: str

    @classmethod
    def of(
        cls,
        rows: np.ndarray,
        codes: np.ndarray,
        sizes: np.ndarray,
        k: int,
        distance: str,
    ) -> _Near:
        """The neighbours of all rows; they are searched here, once for all lists."""
        distances, neighbours = nearest_others(rows, k, distance)
        members = np.split(sorted_by(codes)[0], np.cumsum(sizes)[:-1])
        return cls(rows, codes, sizes, members, distances, codes[neighbours], distance)


def _misplaced(
    near: _Near, names: Sequence[Any], pairs: Sequence[LikeOne]
) -> list[Misplaced]:
    """The rows that lie nearer to another class, the clearest first."""
    codes, classes = near.codes, near.classes
    # Half of a small class is asked: among 4 rows one may be mislabelled, too.
    nth = np.minimum(_NTH, near.sizes // 2)[codes]
    # How many rows of its class stand before each neighbour. The classes of the
    # neighbours a b a a have the ranks 0 0 1 2.
    rank = np.stack(
        [
            np.count_nonzero(classes[:, :column] == classes[:, [column]], axis=1)
            for column in range(classes.shape[1])
        ],
        axis=1,
    )
    is_nth = rank == nth[:, None] - 1
    is_own = classes == codes[:, None]
    by_class = np.where(is_nth & ~is_own, near.distances, np.inf)
    column = by_class.argmin(axis=1)
    other = by_class.min(axis=1)
    own = np.where(is_nth & is_own, near.distances, np.inf).min(axis=1)
    # Where the own class is farther than all k neighbours, it is searched alone.
    asked = np.flatnonzero(np.isinf(own) & np.isfinite(other))
    for code in np.unique(codes[asked]):
        members = near.members[code]
        some = asked[codes[asked] == code]
        own[some] = nearest_others(
            near.rows[members],
            int(nth[some[0]]),
            near.distance,
            np.searchsorted(members, some),
        )[0][:, -1]
    found = np.flatnonzero(other < own)
    nearer = 1 - other[found] / own[found]
    share = is_own[found].mean(axis=1)
    alike = {(one.first, one.second) for one in pairs}
    alike |= {(second, first) for first, second in alike}
    listed = []
    for i in np.argsort(-nearer, kind="stable"):
        label = names[codes[found[i]]]
        suggested = names[classes[found[i], column[found[i]]]]
        if (label, suggested) not in alike:
            listed.append(
                Misplaced(
                    int(found[i]), label, suggested, float(nearer[i]), float(share[i])
                )
            )
    return listed


def _like_one(near: _Near, names: Sequence[Any]) -> list[LikeOne]:
    """The pairs of classes that are mixed, the most certain first."""
    sizes, count = near.sizes, len(near.sizes)
    # A row of a class of 3 has 2 others of its class: more neighbours had to be strange.
    looks = np.arange(near.classes.shape[1]) < (sizes - 1)[near.codes, None]
    row, column = np.nonzero(looks)
    own, other = near.codes[row].astype(np.int64), near.classes[row, column]
    inside = np.bincount(own[own == other], minlength=count)
    own, other = own[own != other], other[own != other]
    keys, pair = np.unique(
        np.minimum(own, other) * count + np.maximum(own, other), return_inverse=True
    )
    a, b = np.divmod(keys, count)
    from_a = np.bincount(pair[own < other], minlength=len(keys))
    from_b = np.bincount(pair[own > other], minlength=len(keys))
    of_a, of_b = inside[a] + from_a, inside[b] + from_b  # T_a and T_b
    total = sizes[a] + sizes[b]
    expected = (of_a * sizes[b] + of_b * sizes[a]) / (total - 1) / (of_a + of_b)
    crossing = (from_a + from_b) / (of_a + of_b)
    low = _wilson(crossing, total, -1) / expected
    order = np.argsort(-low, kind="stable")
    return [
        LikeOne(
            names[a[i]], names[b[i]], float(crossing[i] / expected[i]), float(low[i])
        )
        for i in order[low[order] >= _MIXED]
    ]


def _like_two(near: _Near, names: Sequence[Any]) -> list[LikeTwo]:
    """The classes that fall into two parts, the most certain first."""
    found = []
    for name, members in zip(names, near.members, strict=True):
        # Two halves between which no neighbour crosses have the least upper end.
        n = len(members)
        if n < 4 or _wilson(0.0, n, 1) * 2 * (n - 1) / n > _MIXED:
            continue
        rows = near.rows[members].astype("float64")
        one = _cut(unit_rows(rows) if near.distance == "cosine" else rows)
        if one is not None and one[1] <= _MIXED:
            mixing, high, side = one
            parts = sorted((members[side], members[~side]), key=len, reverse=True)
            found.append(LikeTwo(name, mixing, high, (parts[0], parts[1])))
    return sorted(found, key=lambda one: one.high)


def _cut(rows: np.ndarray) -> tuple[float, float, np.ndarray] | None:
    """The mixing of the two parts of a class, its upper end, and who is in the first.

    Args:
        rows: (n, dim) float64 rows of the class.

    Returns:
        None if all rows are equal. The last of the three is (n,) booleans.
    """
    n = min(len(rows), _LOOKED_AT)
    chosen = rows[np.arange(n) * len(rows) // n]
    mean = chosen.mean(axis=0)
    centred = chosen - mean
    products = centred @ centred.T  # (n, n), from which everything below comes
    lengths = np.diag(products)
    if not lengths.any():
        return None
    # The rows, times the first eigenvector: the direction in which the class is longest.
    direction = centred.T @ np.linalg.eigh(products)[1][:, -1]
    side = centred @ direction > 0
    squares = lengths[:, None] + lengths - 2 * products
    np.fill_diagonal(squares, np.inf)
    neighbours = np.argsort(squares, axis=1, kind="stable")[:, : n // 4]
    first = np.count_nonzero(side)
    expected = 2 * first * (n - first) / (n * (n - 1))
    crossing = float(np.mean(side[neighbours] != side[:, None]))
    high = float(_wilson(crossing, n, 1) / expected)
    return float(crossing / expected), high, (rows - mean) @ direction > 0


def _wilson(share: Any, trials: Any, sign: int) -> Any:
    """The lower (sign -1) or upper (1) end of Wilson's interval for a share."""
    z = _QUANTILE
    spread = np.sqrt(share * (1 - share) / trials + (z / trials) ** 2 / 4)
    return (share + z * z / trials / 2 + sign * z * spread) / (1 + z * z / trials)
