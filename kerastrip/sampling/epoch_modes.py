"""Which classes a batch draws: the two epoch modes of `PKPlan`.

A *draw* takes K samples of one class; a batch is P draws of distinct classes. The
batch has C *shares* of P / C draws each, and the classes of a share are of one group,
each share of another group (C is `groups_per_batch=`, 1 by default; without `groups=`
there is one group). Both modes have a method `draws(epoch, steps, columns)`. `steps` (n,) are numbers of batches, and `columns`
(m,) are places in a batch, 0..P-1. For each pair of a batch and a place it returns
two numbers: the class that is drawn there, and how many draws of that class came
before this draw. Both arrays are (n, m) int64. Classes are numbered group by group.
"""

from __future__ import annotations

import math

import numpy as np

from kerastrip.sampling import permutation
from kerastrip.sampling.permutation import mix, permute

__all__ = [
    "Balanced",
    "Coverage",
]

# Parts of a coverage table. Classes that stand in one row of a part never meet in a batch
# of this part; in another part they mostly stand in different rows, and meet there.
_PARTS = 3
# Orders of the groups that take turns where several groups share a batch (`_shared_turns`).
_ORDERS = 8


class Balanced:
    """Every class equally often: the closed form of balanced epochs.

    A group of C classes has N = L*P slots in an epoch. With N = q*C + r, every class
    is drawn q times (in q *rounds*, each a shuffle of all classes), and then r classes
    are drawn once more. The r extra classes stand at places s, ..., s+r-1 (mod C) of
    one keyed order, where s is the number of slots of the group before the epoch. So
    the counts of two classes differ by at most 1, in each epoch and over all epochs.
    The number of earlier draws has a closed form: the class at place x was drawn as
    often as there are numbers below s that leave the remainder x modulo C. For C = 5,
    P = 3 and L = 4 an epoch has N = 12 slots, so that q = 2 and r = 2:

        epoch     s     extra places       batch      0       1        2       3
        0         0     0, 1               round    0 0 0   0 0 1    1 1 1   1 2 2
        1        12     2, 3               place    0 1 2   3 4 0    1 2 3   4 0 1
        2        24     4, 0

    A batch may run across the seam of two rounds (batches 1 and 3 above). Then it takes
    the tail of the first round and the head of the second, and `arrange` makes sure
    that no class is in both: each epoch cuts the classes into two halves, tails hold
    classes of one half only, and heads hold classes of the other half. The r extra
    classes belong to the half of the heads, as far as they fit. With fewer than
    2 (P - 1) classes the halves are too small for that. Then all rounds up to the next
    seam at which a batch ends too have the same order. The classes stand on a circle,
    as it were, and P neighbours on a circle of C >= P classes are distinct.

    The shares of batches go to groups in proportion to their classes, as far as a group
    can have one share of a batch only. After the batches of one table of turns
    (`_single_turns`, `_shared_turns`) the proportion is exact, and the table begins anew.

    Args:
        group_sizes: `(groups,)` classes of each group, all >= P / C.
        classes_per_batch: P.
        batches: L, batches in an epoch.
        key: 64-bit integer.
        shares: C, shares of a batch, at most as many as groups. Default 1.
    """

    def __init__(
        self,
        group_sizes: np.ndarray,
        classes_per_batch: int,
        batches: int,
        key: int,
        shares: int = 1,
    ) -> None:
        self.batches = batches
        self._sizes = group_sizes
        self._first = np.cumsum(group_sizes) - group_sizes
        self._p = classes_per_batch // shares
        self._key = key
        turns = (
            _single_turns(group_sizes)
            if shares == 1
            else _shared_turns(group_sizes, shares, mix(key, 0))
        )
        self._turns = turns  # (batches of a table, shares) groups
        # Group g in batch b is the number g * len(turns) + b.
        places = turns * len(turns) + np.arange(len(turns))[:, None]
        self._places = np.sort(places, axis=None)
        self._turns_of_group = np.bincount(turns.ravel(), minlength=len(group_sizes))
        self._first_turn = np.cumsum(self._turns_of_group) - self._turns_of_group
        # The class at each place of the one keyed order of its group.
        group = np.repeat(np.arange(len(group_sizes)), group_sizes)
        turn = np.arange(len(group)) - self._first[group]
        order = permute(turn, group_sizes[group], mix(key, group))
        self._classes = self._first[group] + order

    def _turns_before(self, batch: np.ndarray | int, group: np.ndarray) -> np.ndarray:
        """How many of the batches 0..batch-1 have a share of `group`."""
        cycles, rest = np.divmod(batch, len(self._turns))
        counted = np.searchsorted(self._places, group * len(self._turns) + rest)
        counted -= self._first_turn[group]
        return cycles * self._turns_of_group[group] + counted

    def draws(
        self, epoch: int, steps: np.ndarray, columns: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The classes and draw numbers of some batches (module docstring)."""
        start, steps = epoch * self.batches, steps[:, None]
        group = self._turns[(start + steps[:, 0]) % len(self._turns)]
        if group.shape[1] > 1:
            group = group[:, columns // self._p]
        columns = columns % self._p
        p, size = self._p, self._sizes[group]
        past = self._turns_before(start, group) * p
        slots = self._turns_before(start + self.batches, group) * p - past
        batch = self._turns_before(start + steps, group) - past // p
        full_rounds, extra = np.divmod(slots, size)
        round_, place, head, tail = permutation.deal(batch, columns, size, p)
        key = mix(self._key, epoch, group)

        roomy = size >= 2 * (p - 1)
        item = np.empty_like(place)
        if roomy.any():
            # The last round of an epoch is cut off: it holds the extra classes only, and
            # needs no tail, because no batch runs from one epoch into the next.
            places = np.where(round_ < full_rounds, size, np.maximum(extra, 1))
            tail = np.where(round_ < full_rounds, tail, 0)
            half = np.minimum((size + 1) // 2, places)
            item = permutation.arrange(
                place, places, head, tail, half, mix(key, round_)
            )
        if not roomy.all():
            # `turns` rounds have a number of slots that p divides: a round and a batch end
            # together there. The order of the last `turns` rounds begins with the extra
            # classes, because the last round of the epoch is cut off behind these.
            turns = p // np.gcd(size, p)
            turn = round_ // turns
            first = np.where(turn == full_rounds // turns, extra, 0)
            circle = permutation.split_permute(place, first, size, mix(key, turn))
            item = np.where(roomy, item, circle)

        # Item 0 stands at place s = `past` of the keyed order. So the items below `extra`
        # are the extra classes of this epoch.
        in_order = (past + item) % size
        # Draws before the epoch (see the class docstring), and one in each round since.
        draw = (past - in_order + size - 1) // size + round_
        return self._classes[self._first[group] + in_order], draw

    def draws_per_class(self, epoch: int) -> np.ndarray:
        """`(classes,)` how often each class is drawn in `epoch`."""
        group = np.repeat(np.arange(len(self._sizes)), self._sizes)
        size, place = self._sizes[group], np.arange(len(group)) - self._first[group]
        before, after = (
            (self._turns_before(batch, group) * self._p - place + size - 1) // size
            for batch in (epoch * self.batches, (epoch + 1) * self.batches)
        )
        counts = np.empty_like(size)
        counts[self._classes] = after - before
        return counts


class Coverage:
    """Every class often enough to see all its samples, in the fewest batches.

    A class of n samples needs D = ceil(n / K) draws. With P distinct classes in each
    batch, an epoch cannot have fewer than L = max(ceil(sum D / P), max D) batches. The
    spare slots go to the classes that are drawn least (see `_fill_level`).

    A table of P rows and L columns, where each column is a batch, is filled row by row
    with the draws of the first class, then with the draws of the second class, and so
    on, in an order of the classes that is keyed by the epoch. No class has more than L
    draws, so no column holds a class twice (McNaughton, "Scheduling with deadlines and
    loss functions", 1959).

    In such a table neighbouring classes would meet again and again. Two steps mix them:

    1. The columns are dealt to three parts (columns 0, 3, 6, ... to part 0). Each part
       is a table of its own, filled with its share of the draws in its own order of
       the classes.
    2. In each row of a part the draws are shuffled. A class that runs across the end of
       a row is restricted to columns in which the next row does not hold it (`_Part`).

    With groups, each group has a table of its own, and a column of it is the share that
    the group has in a batch. Where C > 1 groups share a batch, one more table deals the
    shares to the batches: it has C rows, and what the tables above are to the draws of
    classes, this one is to the shares of groups.

    Args:
        group_sizes: `(groups,)` classes of each group, all >= P.
        needed: `(classes,)` draws that each class needs, >= 1.
        classes_per_batch: P.
        key: 64-bit integer.
        shares: C, shares of a batch, at most as many as groups. Default 1.
    """

    def __init__(
        self,
        group_sizes: np.ndarray,
        needed: np.ndarray,
        classes_per_batch: int,
        key: int,
        shares: int = 1,
    ) -> None:
        self._p = classes_per_batch // shares
        self._shares = shares
        self._key = key
        ends = np.cumsum(group_sizes)
        self._needed = np.split(needed, ends[:-1])
        self._first = ends - group_sizes
        lengths = [
            max(-(-int(of_group.sum()) // self._p), int(of_group.max()))
            for of_group in self._needed
        ]
        self._lengths = np.array(lengths, np.int64)
        self._ends = np.cumsum(self._lengths)
        self.batches = int(self._ends[-1])
        if shares > 1:
            self.batches = max(-(-self.batches // shares), max(lengths))
        self._tables: dict[tuple[int, int], _Table] = {}

    def draws(
        self, epoch: int, steps: np.ndarray, columns: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The classes and draw numbers of some batches (module docstring)."""
        group, column = self._groups_of(epoch, steps)
        # The shares and the rows of tables that the columns are in, as a grid.
        share, at_share = np.unique(columns // self._p, return_inverse=True)
        row, at_row = np.unique(columns % self._p, return_inverse=True)
        group, column = group[:, share], column[:, share]
        class_ = np.empty((*group.shape, len(row)), np.int64)
        draw = np.empty_like(class_)
        for g in np.unique(group):
            inside = group == g
            table = self._table(epoch, int(g))
            class_[inside], draw[inside] = table.draws(column[inside], row)
            class_[inside] += self._first[g]
        return class_[:, at_share, at_row], draw[:, at_share, at_row]

    def _groups_of(
        self, epoch: int, steps: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """`(steps, shares)` group of each share, and its column in the group's table."""
        if self._shares > 1:
            return self._table(epoch, -1).draws(steps, np.arange(self._shares))
        batch = steps
        if len(self._lengths) > 1:
            batch = permute(steps, self.batches, mix(self._key, epoch, 0))
        group = np.searchsorted(self._ends, batch, "right")
        column = batch - (self._ends - self._lengths)[group]
        return group[:, None], column[:, None]

    def _table(self, epoch: int, group: int) -> _Table:
        """The table of a group in an epoch, of all groups for -1; the last are kept."""
        tables = self._tables
        table = tables.get((epoch, group))
        if table is None:
            if group < 0:
                needed, p, length = self._lengths, self._shares, self.batches
                key = mix(self._key, epoch, 0)
            else:
                needed, p, length = self._needed[group], self._p, self._lengths[group]
                if self._shares > 1:
                    length = self._table(epoch, -1).counts[group]
                key = mix(self._key, epoch, 1, group)
            table = _Table(needed, p, int(length), key)
            # The dict is replaced, not changed, so no lock is needed: at worst another
            # thread makes the same table once more.
            kept = {k: other for k, other in self._tables.items() if k[0] == epoch}
            self._tables = {**kept, (epoch, group): table}
        return table

    def draws_per_class(self, epoch: int) -> np.ndarray:
        """`(classes,)` how often each class is drawn in `epoch`."""
        groups = range(len(self._needed))
        return np.concatenate([self._table(epoch, g).counts for g in groups])


class _Table:
    """The P x L table of one group in one epoch (see `Coverage`).

    Args:
        needed: `(classes,)` draws that each class needs; L at most.
        p: P, rows.
        length: L, columns.
        key: 64-bit integer.

    Attributes:
        counts: `(classes,)` draws of each class.
    """

    def __init__(self, needed: np.ndarray, p: int, length: int, key: int) -> None:
        self._length, self._key = length, key
        classes = len(needed)
        order = permute(np.arange(classes), classes, mix(key, 0))
        level = _fill_level(needed, length * p)
        draws = np.maximum(needed[order], level)
        # Fewer slots are left than there are classes at the level. The first such classes
        # of the order get one draw more.
        at_level = draws == level
        at_level &= np.cumsum(at_level) <= length * p - draws.sum()
        draws += at_level
        ends = np.concatenate(([0], np.cumsum(draws)))
        # Part s has the columns s, s + parts, s + 2 parts, ... of the table. So each part
        # gets an even share of the draws of every class.
        rounds, rest = np.divmod(ends, length)
        parts = min(_PARTS, length)
        self._parts: list[_Part] = []
        self.counts = np.zeros(classes, np.int64)
        for part in range(parts):
            columns = (length - part + parts - 1) // parts
            share = np.empty_like(self.counts)
            share[order] = np.diff(
                rounds * columns + (rest - part + parts - 1) // parts
            )
            self._parts.append(_Part(share, self.counts, p, columns, mix(key, 1, part)))
            self.counts = self.counts + share

    def draws(
        self, batches: np.ndarray, rows: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The classes and draw numbers of the cells in some columns and rows."""
        column = permute(batches, self._length, mix(self._key, 2))
        column, part = np.divmod(column, len(self._parts))
        class_ = np.empty((len(batches), len(rows)), np.int64)
        draw = np.empty_like(class_)
        for number in np.unique(part):
            inside = part == number
            columns = column[inside]
            class_[inside], draw[inside] = self._parts[number].draws(columns, rows)
        return class_, draw


class _Part:
    """Some columns of a table, filled row by row (see `Coverage`).

    For three rows, seven columns and classes a, b, c, d, e of 4, 5, 4, 5 and 3 draws:

        filled row by row       tail, head     in the order of some key
        a a a a b b b           b 3            b b b a a a a
        b b c c c c d           d 1, b 2       c c c b b d c
        d d d d e e e           d 4            e d d d d e e

    Class b runs across the end of the first row: the last 3 cells of that row are its
    *tail*, and the first 2 cells of the second row are its *head*. In the shuffled rows
    the tail is in columns 0 ... 2 and the head in columns 3 ... 4, so that no column
    holds class b twice. Likewise class d has its tail in column 5 of the second row, and
    its head in columns 1 ... 4 of the third. All other draws of a row (its *inner* draws)
    are shuffled freely over the remaining columns.

    How a cell (row, column) is looked up: measured from where the head of its row
    begins, round the circle of columns, a row consists of four intervals

        offset    0 ... head-1 | head ... tail_at-1 | tail_at ... | ... columns-1
                  head         | inner              | tail        | inner ("behind")

    Heads and tails stand in the order in which they were filled. The inner draws are
    permuted by a key of the row.

    Args:
        counts: `(classes,)` draws of each class in this part, at most `columns`.
        before: `(classes,)` draws of each class in the parts before.
        p: rows; the counts fill all of the cells.
        columns: number of columns.
        key: 64-bit integer.
    """

    def __init__(
        self, counts: np.ndarray, before: np.ndarray, p: int, columns: int, key: int
    ) -> None:
        self._columns, self._key = columns, key
        self._classes = permute(np.arange(len(counts)), len(counts), mix(key, 0))
        self._ends = np.concatenate(([0], np.cumsum(counts[self._classes])))
        self._before = before
        # Tails and heads are intervals on the circle of columns:
        #
        #     row 0   head ... tail
        #     row 1                 ... head ... tail
        #     row 2                                   ... head ... tail
        #
        # The head of a row begins at column `_head_at`. Its tail begins `_tail_at`
        # columns further on, and somewhere behind the tail the next row's head begins.
        # The gaps (...) are random. Without gaps, the classes at neighbouring row ends
        # would hardly ever meet in a batch.
        border = np.arange(1, p) * columns
        crossing = np.searchsorted(self._ends, border, "right") - 1
        self._tail = tail = np.append(border - self._ends[crossing], 0)
        self._head = head = np.append(
            0, np.where(tail[:-1], self._ends[crossing + 1] - border, 0)
        )
        row = np.arange(p)
        room = columns - head - tail, columns - tail - np.append(head[1:], 0)
        gap, next_gap = (
            (mix(key, number, row) % (free + 1).view(np.uint64)).view(np.int64)
            for number, free in enumerate(room, 1)
        )
        self._tail_at = head + gap
        ahead = self._tail_at + tail + next_gap
        self._head_at = np.cumsum(ahead) - ahead

    def draws(
        self, column: np.ndarray, rows: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The classes and draw numbers of the cells in some columns and rows."""
        columns, head, tail = self._columns, self._head[rows], self._tail[rows]
        # The four intervals of the class docstring.
        offset = (column[:, None] - self._head_at[rows]) % columns
        tail_at = self._tail_at[rows]
        behind = offset >= tail_at + tail
        in_tail = ~behind & (offset >= tail_at) & (tail > 0)
        inner = (offset >= head) & ~in_tail
        # The inner draws are numbered without the head and the tail, then permuted.
        shuffled = permute(
            np.where(inner, offset - head - np.where(behind, tail, 0), 0),
            np.maximum(columns - head - tail, 1),
            mix(self._key, 3, rows),
        )
        # The cell in the order of filling: heads stand first in their row, tails last.
        cell = np.where(in_tail, columns - tail + offset - tail_at, offset)
        cell = rows * columns + np.where(inner, head + shuffled, cell)
        place = np.searchsorted(self._ends, cell, "right") - 1
        class_ = self._classes[place]
        return class_, self._before[class_] + cell - self._ends[place]


def _fill_level(needed: np.ndarray, slots: int) -> int:
    """The largest level w with sum(max(needed, w)) <= slots.

    Every class that needs fewer than w draws gets w draws, like water that fills the low
    places first. For needed = 1, 4, 2 and 10 slots w is 3, as 3 + 4 + 3 = 10.
    """
    ordered = np.sort(needed)
    # Raising the i smallest to w costs i * w instead of their sum.
    above = needed.sum() - np.cumsum(ordered)
    counts = np.arange(1, len(ordered) + 1)
    level = (slots - above) // counts
    # The first i for which the next class is not below the level it would get.
    following = np.append(ordered[1:], np.iinfo(np.int64).max)
    return int(level[np.argmax(level < following)])


def _single_turns(group_sizes: np.ndarray) -> np.ndarray:
    """`(classes, 1)` the group of each batch, evenly interleaved.

    A group of C_g classes has C_g turns; the i-th stands at (i + 1/2) / C_g of the way.
    """
    group = np.repeat(np.arange(len(group_sizes)), group_sizes)
    turn = np.arange(len(group)) - np.repeat(
        np.cumsum(group_sizes) - group_sizes, group_sizes
    )
    way = (turn + 0.5) / group_sizes[group]
    return group[np.argsort(way, kind="stable")][:, None]


def _shared_turns(group_sizes: np.ndarray, shares: int, key: int) -> np.ndarray:
    """`(batches, shares)` the groups of each batch, distinct, in proportion to their size.

    A group can have one share of a batch only. A group so large that its proportion is
    more is in every batch; the others have the rest of the shares. For 2 shares and groups
    of 6, 2, 1 and 1 classes, group 0 is in all of 4 batches, and the others have 2, 1 and
    1 turns. The turns of the groups are laid side by side and cut into rows; each column
    is a batch. No group is longer than a row, so no batch has a group twice:

        0 0 0 0
        1 1 2 3

    Batches take the columns in steps of about 0.618 of a row, which spreads a group
    evenly over time (Kronecker's sequence). In one such table a group meets the same
    few groups again and again. So several tables, each with a keyed order of the groups,
    take turns.
    """
    turns = _turns_in_proportion(group_sizes, shares)
    groups, length = len(turns), int(turns.sum()) // shares
    step = next(
        step
        for step in range(max(round(0.618 * length), 1), 2 * length + 1)
        if math.gcd(step, length) == 1
    )
    column = np.arange(length) * step % length
    cells = np.add.outer(column, np.arange(shares) * length)
    tables = []
    for number in range(_ORDERS):
        order = permute(np.arange(groups), groups, mix(key, number))
        ends = np.cumsum(turns[order])
        tables.append(order[np.searchsorted(ends, cells, "right")])
    return np.stack(tables, axis=1).reshape(-1, shares)


def _turns_in_proportion(group_sizes: np.ndarray, shares: int) -> np.ndarray:
    """`(groups,)` turns of each group in a table of `_shared_turns`."""
    left, classes = shares, int(group_sizes.sum())
    always = []  # the groups that are in every batch
    for group in np.argsort(-group_sizes, kind="stable"):
        size = int(group_sizes[group])
        if not left or size * left < classes:
            break
        always.append(group)
        left, classes = left - 1, classes - size
    common = math.gcd(left, classes) or 1
    turns = group_sizes * (left // common)
    turns[always] = max(classes // common, 1)
    return turns
