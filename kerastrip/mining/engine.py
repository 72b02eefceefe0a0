"""The mining engine: exact triplets and an exact census of a batch, by blocks of rows.

Words: d is the distance, m the margin, a an anchor, p a positive (same label, other
row), n a negative (other label). A triplet (a, p, n) is

    hard        d(a,n) <= d(a,p)
    semi-hard   d(a,p) < d(a,n) < d(a,p) + m
    easy        d(a,n) >= d(a,p) + m

The functions return one value per row of the batch. Never is there a tensor of shape
(batch, batch, batch), and beyond 2,048 rows none of shape (batch, batch). They accept a
batch size unknown when traced and compile under XLA. Second derivatives are not defined.

The way of a batch through the engine:

    labels, embeddings      checked; cosine rows are brought to length 1/sqrt(2), so that
                            their squared distance is 1 - cos
      -> ordered by label   so that a class is one stretch of rows (mining.blocks)
      -> losses             one chosen negative per pair or anchor (mining.pairs),
                            or all of the row (mining.dense)
      -> census             counts of every kind (mining.counting)
      -> restored           in the order of the batch, without the padding

Which rows are chosen carries no gradient; `losses` keeps what the gradient needs, and
`gradient` of the same module makes it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from keras import ops

from kerastrip import _checks
from kerastrip._numerics import (
    integer_labels,
    nan_unless,
    plain,
    safe_divide,
    with_gradient,
)
from kerastrip.distances import DISTANCES, prepare
from kerastrip.mining import blocks, counting, dense, pairs
from kerastrip.mining.blocks import OrderedBatch, Rule

__all__ = [
    "AVERAGES",
    "MININGS",
    "Census",
    "check_choice",
    "contrastive_losses",
    "triplet_census",
    "triplet_losses",
]

# What a word means stands in `blocks.Rule` (what is one unit), in `pairs` (which rows are
# chosen) or `dense` (which entries of the matrix), and for users in `TripletLoss`.
MININGS = ("semi_hard", "semi_hard_or_hard", "hard", "all")
AVERAGES = ("all", "active")


class Census(NamedTuple):
    """Counts over all valid triplets of a batch, one entry per anchor: (batch,).

    `easy + semi_hard + hard == positives * negatives` in every row.
    """

    positives: Any
    """int32: other rows of the same label."""
    negatives: Any
    """int32: rows of other labels."""
    easy: Any
    """int32: triplets with d(a,n) >= d(a,p) + margin."""
    semi_hard: Any
    """int32: triplets with d(a,p) < d(a,n) < d(a,p) + margin."""
    hard: Any
    """int32: triplets with d(a,n) <= d(a,p)."""
    pairs_with_semi_hard: Any
    """int32: positives for which at least one negative is semi-hard."""
    pos_dist: Any
    """float32: sum of the distances to the positives."""
    neg_dist: Any
    """float32: sum of the distances to the negatives."""


class _Ordered(NamedTuple):
    """What the compiled functions get, and the way back to the order of the batch."""

    batch: OrderedBatch
    order: Any
    inverse: Any
    batch_size: Any  # an integer where it is known when traced, else a scalar tensor

    def restore(self, x: Any, axis: int = 0) -> Any:
        """Entries along `axis` in the order of the batch, without the padding."""
        return ops.take(x, self.inverse[: self.batch_size], axis=axis)


def check_choice(mining: str, soft: bool, average_over: str) -> None:
    """Raise for unknown words, and for choices that exclude each other."""
    _checks.one_of("mining", mining, MININGS)
    _checks.one_of("average_over", average_over, AVERAGES)
    _checks.boolean("soft", soft)
    if soft and average_over == "active":
        raise _checks.value_error(
            "average_over",
            "'all' with soft=True",
            average_over,
            "The softplus is always > 0, so every unit is active.",
        )


def _checked(labels: Any, embeddings: Any) -> tuple[Any, Any, Any]:
    """Integer labels and embeddings as tensors of one length; whether labels are valid.

    The third is None where that is certain, or a () bool tensor for `nan_unless` where
    the labels are not seen yet.
    """
    labels, valid = integer_labels(labels)
    embeddings = ops.convert_to_tensor(plain("embeddings", embeddings))
    if len(embeddings.shape) != 2:
        raise _checks.value_error(
            "embeddings",
            "shape (batch, dim)",
            _checks.Told(f"shape {tuple(embeddings.shape)}"),
            "Flatten or pool what comes before the loss.",
        )
    length, rows = labels.shape[0], embeddings.shape[0]
    if length is not None and rows is not None and length != rows:
        raise _checks.value_error(
            "labels",
            f"one label for each of the {rows} embeddings",
            _checks.Told(f"{length} labels"),
        )
    # Lengths known only at run time: the reshape fails where they differ.
    return ops.reshape(labels, (ops.shape(embeddings)[0],)), embeddings, valid


def _mined(
    function: Callable, labels: Any, embeddings: Any, margin: Any, rule: Rule
) -> tuple[Any, Any]:
    """What `function` finds in a batch that is checked; whether its labels are valid.

    XLA compiles on JAX here, the whole function; on TensorFlow the parts that are worth
    it (`blocks.compiled_on_tensorflow`), since this may be a part of a larger graph.

    Args:
        function: of labels (batch,), embeddings (batch, dim), margin and `rule=`.
        labels, embeddings, margin: as given to the public functions.
        rule: what to take.

    Returns:
        The result, and None or a () bool tensor for `nan_unless`.
    """
    labels, embeddings, valid = _checked(labels, embeddings)
    margin = ops.convert_to_tensor(margin, "float32")
    mine = blocks.compiled_on_jax(function, rule=rule)
    return mine(labels, embeddings, margin), valid


def _ordered(labels: Any, rows: Any) -> _Ordered:
    given = ops.shape(rows)[0]
    order = blocks.order_by_label(labels, given, blocks.padded_size(given))
    batch = OrderedBatch(
        blocks.take_padded(ops.stop_gradient(rows), order),
        blocks.take_padded(labels, order),
        ops.convert_to_tensor(given, "int32"),
    )
    return _Ordered(batch, order, blocks.inverse_order(order), given)


def triplet_census(
    labels: Any,
    embeddings: Any,
    *,
    margin: float = 0.2,
    distance: str = "euclidean",
) -> Census:
    """Count the easy, semi-hard and hard triplets of a batch, exactly.

    The counts are exact for the float32 distances by which the losses of this package
    choose. Time grows as batch^2 * positives while an anchor has up to 64
    positives, beyond that as batch^2 * log(batch).

    Args:
        labels: (batch,), (batch, 1) integers or (batch, classes) one-hot.
        embeddings: (batch, dim) floats.
        margin: the margin m, > 0, in units of the distance.
        distance: `"euclidean"`, `"squared_euclidean"` or `"cosine"`.

    Returns:
        A `Census` of (batch,) tensors. They carry no gradient. Labels that are
        found to name no class in a compiled step make the distances NaN. An embedding with
        NaN or infinity makes `pos_dist` of its class and `neg_dist` of the other
        classes NaN or infinite, and the counts of these anchors then mean nothing.

    Raises:
        TypeError: for labels that are no numbers.
        ValueError: for an unknown `distance`, embeddings that are not 2-D, lengths
            that differ, rows that are not one-hot, or fractions as labels.

    Example:

    >>> census = triplet_census([0, 0, 1], [[0.0], [1.0], [1.1]], margin=0.2)
    >>> [int(x) for x in census.semi_hard], [int(x) for x in census.hard]
    ([1, 0, 0], [0, 1, 0])

    References:
        Schroff, Kalenichenko, Philbin, "FaceNet: a unified embedding for face
        recognition and clustering", 2015, section 3.2 (semi-hard).
    """
    _checks.one_of("distance", distance, DISTANCES)
    _checks.number("margin", margin, above=0)
    rule = Rule("census", distance)
    found, valid = _mined(_counted, labels, embeddings, margin, rule)
    return found._replace(
        pos_dist=nan_unless(valid, found.pos_dist),
        neg_dist=nan_unless(valid, found.neg_dist),
    )


def _counted(labels: Any, embeddings: Any, margin: Any, *, rule: Rule) -> Census:
    ordered = _ordered(labels, prepare(embeddings, rule.distance))
    count = blocks.compiled_on_tensorflow(counting.count, rooted=rule.rooted)
    counts, sums = count(ordered.batch, margin)  # (5, padded), (2, padded)
    counts = ops.unstack(ordered.restore(counts, axis=1), 5)
    sums = ops.unstack(ordered.restore(sums, axis=1), 2)
    positives, negatives, hard, semi_hard, with_semi_hard = counts
    return Census(
        positives=positives,
        negatives=negatives,
        easy=positives * negatives - hard - semi_hard,
        semi_hard=semi_hard,
        hard=hard,
        pairs_with_semi_hard=with_semi_hard,
        pos_dist=sums[0],
        neg_dist=sums[1],
    )


def triplet_losses(
    labels: Any,
    embeddings: Any,
    *,
    margin: float = 0.2,
    mining: str = "semi_hard",
    distance: str = "euclidean",
    soft: bool = False,
    average_over: str = "all",
) -> Any:
    """Triplet losses by row, whose mean is the loss of the batch; see `TripletLoss`.

    Returns:
        (batch,) float32: the sum of the losses of a row's units (pairs, anchors or
        triplets), times batch / number of units, or of active units, in the batch. So the
        mean over the rows is the mean over the units.
    """
    check_choice(mining, soft, average_over)
    _checks.number("margin", margin, above=0)
    _checks.one_of("distance", distance, DISTANCES)
    rule = Rule(mining, distance, soft, average_over)
    values, valid = _mined(_losses, labels, embeddings, margin, rule)
    return nan_unless(valid, values)


def contrastive_losses(
    labels: Any,
    embeddings: Any,
    *,
    positive_margin: float = 0.0,
    negative_margin: float = 1.0,
    distance: str = "euclidean",
    average_over: str = "all",
) -> Any:
    """Contrastive losses by row over all pairs of the batch; see `ContrastiveLoss`.

    Returns:
        (batch,) float32: the sum of the losses of a row's pairs with all other rows,
        times batch / number of pairs.
    """
    _checks.one_of("average_over", average_over, AVERAGES)
    _checks.one_of("distance", distance, DISTANCES)
    margins = [
        _checks.number("positive_margin", positive_margin, minimum=0),
        _checks.number("negative_margin", negative_margin, above=0),
    ]
    rule = Rule("contrastive", distance, average_over=average_over)
    values, valid = _mined(_losses, labels, embeddings, margins, rule)
    return nan_unless(valid, values)


def _losses(labels: Any, embeddings: Any, margin: Any, *, rule: Rule) -> Any:
    """(batch,) values of any rule, with their gradient."""
    rows = prepare(embeddings, rule.distance)  # (batch, dim)
    ordered = _ordered(labels, rows)
    # (Where a class is too large for the table of `pairs`, `pairs` asks `dense` for it.)
    module = pairs if rule.by_pairs or rule.by_anchors else dense
    terms = module.losses(ordered.batch, margin, rule)
    units = terms.units if rule.average_over == "all" else terms.active
    units = ops.sum(ops.cast(units, "float32"))
    scale = safe_divide(ops.cast(ordered.batch.size, "float32"), units)

    def gradient(needed: Any, weights: Any) -> Any:
        ordered, margin, scale, kept = needed
        weights = blocks.take_padded(weights * scale, ordered.order)
        slopes = module.gradient(ordered.batch, margin, weights, kept, rule)
        return ordered.restore(slopes)

    needed = ordered, margin, scale, terms.kept
    values = ordered.restore(terms.losses) * scale
    return with_gradient(rows, values, needed, gradient)
