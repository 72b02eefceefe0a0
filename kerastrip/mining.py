"""The mining engine: exact triplets and an exact census of a batch, by blocks of rows.

Words: d is the distance, m the margin, a an anchor, p a positive (same label, other
row), n a negative (other label). A triplet (a, p, n) is

    hard        d(a,n) <= d(a,p)
    semi-hard   d(a,p) < d(a,n) < d(a,p) + m
    easy        d(a,n) >= d(a,p) + m

The functions return one value per row of the batch. Never is there a tensor of shape
(batch, batch, batch), and beyond 2,048 rows none of shape (batch, batch) unless a
callable distance makes it. They accept a batch size unknown when traced and compile
under XLA. Second derivatives are not defined.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from kerastrip import _checks, _mining_dense, _mining_pairs
from kerastrip._mining_blocks import (
    Batch,
    OtherRows,
    compiled,
    compiled_on_jax,
    inverse_order,
    order_by_label,
    padded_size,
    take_padded,
    with_gradient,
)
from kerastrip._numerics import integer_labels, nan_unless, plain, safe_divide
from kerastrip.distances import (
    DISTANCES,
    called_distances,
    checked_distance,
    is_rooted,
    prepare,
)

__all__ = [
    "Census",
    "Others",
    "contrastive_losses",
    "triplet_census",
    "triplet_losses",
    "triplet_losses_and_census",
]

MININGS = ("semi_hard", "semi_hard_or_hard", "hard", "all")
AVERAGES = ("all", "active")


class Others(NamedTuple):
    """Rows beside the batch that serve its anchors and are no anchors themselves."""

    labels: Any
    """(rows,) integers."""
    embeddings: Any
    """(rows, dim) floats. They get no gradient; in a triplet with one the anchor alone."""
    size: Any = None
    """int32 scalar: only the first `size` rows are there. None: all of them."""
    positives: bool = True
    """Whether rows of an anchor's label are positives; if not they are left out."""


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

    batch: Batch
    order: Any
    inverse: Any
    given: Any  # the batch size, an integer or a scalar tensor

    def restore(self, x: Any, axis: int = 0) -> Any:
        """Entries along `axis` in the order of the batch, without the padding."""
        return ops.take(x, self.inverse[: self.given], axis=axis)


def check_choice(mining: str, soft: bool, average_over: str) -> None:
    """Raise for unknown words, and for choices that exclude each other."""
    _checks.one_of("mining", mining, MININGS)
    _checks.one_of("average_over", average_over, AVERAGES)
    _checks.boolean("soft", soft)
    if soft and average_over == "active":
        raise ValueError(
            _checks.message(
                "average_over",
                "'all' with soft=True",
                average_over,
                "The softplus is always > 0, so every unit is active.",
            )
        )


def _checked(labels: Any, embeddings: Any) -> tuple[Any, Any, Any]:
    """Integer labels and embeddings as tensors of one length; whether they are labels.

    The third is None, or a () bool tensor where the labels are not seen yet.
    """
    labels, known = integer_labels(labels)
    embeddings = ops.convert_to_tensor(plain("embeddings", embeddings))
    if len(embeddings.shape) != 2:
        raise ValueError(
            _checks.message(
                "embeddings",
                "shape (batch, dim)",
                _checks.Told(f"shape {tuple(embeddings.shape)}"),
                "Flatten or pool what comes before the loss.",
            )
        )
    length, rows = labels.shape[0], embeddings.shape[0]
    if length is not None and rows is not None and length != rows:
        raise ValueError(
            _checks.message(
                "labels",
                f"one label for each of the {rows} embeddings",
                _checks.Told(f"{length} labels"),
            )
        )
    # Lengths known only at run time: the reshape fails where they differ.
    return ops.reshape(labels, (ops.shape(embeddings)[0],)), embeddings, known


def _mined(
    function: Callable,
    labels: Any,
    embeddings: Any,
    margin: Any,
    others: Others | None,
    **settings: Any,
) -> tuple[Any, Any]:
    """What `function` finds in a batch that is checked; whether its labels are labels.

    Args:
        function: of labels (batch,), embeddings (batch, dim), margin and others.
        labels, embeddings, margin, others: as given to the public functions.
        **settings: keyword arguments of `function`, `distance` among them.

    Returns:
        The result, and None or a () bool tensor for `nan_unless`.
    """
    labels, embeddings, known = _checked(labels, embeddings)
    margin = ops.convert_to_tensor(margin, "float32")
    given, positives = None, False
    if others is not None:
        given = *_checked(others.labels, others.embeddings)[:2], others.size
        positives = others.positives  # decides what is traced: no tensor
    # A callable distance may hold tensors that belong to one trace only.
    bind = functools.partial if callable(settings["distance"]) else compiled_on_jax
    mine = bind(_with_others, function=function, positives=positives, **settings)
    return mine(labels, embeddings, margin, given), known


def _with_others(
    labels: Any,
    embeddings: Any,
    margin: Any,
    given: tuple[Any, Any, Any] | None,
    *,
    function: Callable,
    positives: bool,
    **settings: Any,
) -> Any:
    others = None if given is None else Others(*given, positives=positives)
    return function(labels, embeddings, margin, others, **settings)


def _ordered(
    labels: Any,
    rows: Any,
    others: Others | None = None,
    distance: Any = None,
) -> _Ordered:
    given = ops.shape(rows)[0]
    rows = ops.stop_gradient(rows)
    order = order_by_label(labels, given, padded_size(given))
    rows = take_padded(rows, order)
    if callable(distance):
        rows = ops.transpose(take_padded(ops.transpose(rows), order))
    size = ops.convert_to_tensor(given, "int32")
    batch = Batch(rows, take_padded(labels, order), size)
    if others is not None:
        batch = batch._replace(others=_ordered_others(others, batch, distance))
    return _Ordered(batch, order, inverse_order(order), given)


def _ordered_others(others: Others, batch: Batch, distance: Any) -> OtherRows:
    labels = others.labels
    rows = ops.stop_gradient(prepare(others.embeddings, distance))
    padded, given = ops.shape(batch.rows)[0], ops.shape(rows)[0]
    more = padded_size(padded + given) - padded
    size = ops.convert_to_tensor(given if others.size is None else others.size, "int32")
    # What is not there has the largest label: a stable sort leaves it at the end.
    last = np.iinfo(keras.backend.standardize_dtype(batch.labels.dtype)).max
    place = ops.arange(more, dtype="int32")
    real = place[:given] < size
    rows = ops.where(real[:, None], rows, 0.0)
    labels = ops.where(real, ops.cast(labels, batch.labels.dtype), last)
    order = order_by_label(labels, given, more)
    labels = ops.where(place < given, take_padded(labels, order), last)
    return OtherRows(take_padded(rows, order), labels, size, others.positives)


def _census(found: dict[str, Any], ordered: _Ordered) -> Census:
    counts = ordered.restore(found["counts"], axis=1)
    positives, negatives, hard, semi_hard, pairs = (counts[i] for i in range(5))
    sums = ordered.restore(found["sums"], axis=1)
    return Census(
        positives,
        negatives,
        positives * negatives - hard - semi_hard,
        semi_hard,
        hard,
        pairs,
        sums[0],
        sums[1],
    )


def triplet_census(
    labels: Any,
    embeddings: Any,
    *,
    margin: float = 0.2,
    distance: str = "euclidean",
    others: Others | None = None,
) -> Census:
    """Count the easy, semi-hard and hard triplets of a batch, exactly.

    The counts are exact for the float32 distances, those the losses of this package
    select by. Time grows as batch^2 * positives while an anchor has up to 64
    positives, beyond that as batch^2 * log(batch).

    Args:
        labels: (batch,), (batch, 1) integers or (batch, classes) one-hot.
        embeddings: (batch, dim) floats.
        margin: the margin m, > 0, in units of the distance.
        distance: `"euclidean"`, `"squared_euclidean"` or `"cosine"`.
        others: rows that serve as negatives and positives too, but not as anchors.

    Returns:
        A `Census` of (batch,) tensors. They carry no gradient. Labels that are found
        to be none while a function is traced make the distances NaN. An embedding with
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
    census, known = _mined(
        _counted, labels, embeddings, margin, others, distance=distance
    )
    return _marked(census, known)


def _marked(census: Census, known: Any) -> Census:
    """The census, its distances NaN if the labels turn out to be none."""
    sums = {"pos_dist": census.pos_dist, "neg_dist": census.neg_dist}
    return census._replace(**{k: nan_unless(known, v) for k, v in sums.items()})


def _counted(
    labels: Any, embeddings: Any, margin: Any, others: Others | None, *, distance: str
) -> Census:
    ordered = _ordered(labels, prepare(embeddings, distance), others, distance)
    count = compiled(
        _mining_pairs.sweep, mining=None, rooted=is_rooted(distance), census=True
    )
    return _census(count(ordered.batch, margin), ordered)


def triplet_losses(
    labels: Any,
    embeddings: Any,
    *,
    margin: float = 0.2,
    mining: str = "semi_hard",
    distance: str | Callable[[Any], Any] = "euclidean",
    soft: bool = False,
    average_over: str = "all",
    others: Others | None = None,
) -> Any:
    """Triplet losses by row, whose mean is the loss of the batch; see `TripletLoss`.

    `others` are rows beside the batch, as in `triplet_census`.

    Returns:
        (batch,) float32: the sum of the losses of a row's units (pairs, anchors or
        triplets), times batch / number of units in the batch.
    """
    values, _ = _triplets(
        labels, embeddings, margin, mining, distance, soft, average_over, others, False
    )
    return values


def triplet_losses_and_census(
    labels: Any,
    embeddings: Any,
    *,
    margin: float = 0.2,
    mining: str = "semi_hard",
    distance: str = "euclidean",
    soft: bool = False,
    average_over: str = "all",
    others: Others | None = None,
) -> tuple[Any, Census]:
    """`triplet_losses` and `triplet_census` from one pass over the distances."""
    _checks.one_of("distance", distance, DISTANCES)
    return _triplets(
        labels, embeddings, margin, mining, distance, soft, average_over, others, True
    )


def contrastive_losses(
    labels: Any,
    embeddings: Any,
    *,
    positive_margin: float = 0.0,
    negative_margin: float = 1.0,
    distance: str | Callable[[Any], Any] = "euclidean",
    average_over: str = "all",
) -> Any:
    """Contrastive losses by row over all pairs of the batch; see `ContrastiveLoss`.

    Returns:
        (batch,) float32: the sum of the losses of a row's pairs with all other rows,
        times batch / number of pairs.
    """
    _checks.one_of("average_over", average_over, AVERAGES)
    checked_distance(distance)
    values, known = _mined(
        _dense,
        *(labels, embeddings, [positive_margin, negative_margin], None),
        mining="contrastive",
        distance=distance,
        soft=False,
        average_over=average_over,
    )
    return nan_unless(known, values)


def _triplets(
    labels: Any,
    embeddings: Any,
    margin: float,
    mining: str,
    distance: Any,
    soft: bool,
    average_over: str,
    others: Others | None,
    census: bool,
) -> tuple[Any, Any]:
    """Losses by row, and the census if it is wanted, of arguments not checked yet."""
    check_choice(mining, soft, average_over)
    _checks.number("margin", margin, above=0)
    if others is not None and callable(distance):
        raise ValueError(
            _checks.message(
                "distance",
                "a word where rows beside the batch are given",
                distance,
                "A callable makes the matrix of the batch alone.",
            )
        )
    checked_distance(distance)
    (values, counts), known = _mined(
        _triplet_losses,
        *(labels, embeddings, margin, others),
        mining=mining,
        distance=distance,
        soft=soft,
        average_over=average_over,
        census=census,
    )
    values = nan_unless(known, values)
    return values, _marked(counts, known) if census else None


def _triplet_losses(
    labels: Any,
    embeddings: Any,
    margin: Any,
    others: Others | None,
    *,
    mining: str,
    distance: Any,
    soft: bool,
    average_over: str,
    census: bool,
) -> tuple[Any, Any]:
    if mining == "all" or callable(distance):
        batch = labels, embeddings, margin, others
        counts = _counted(*batch, distance=distance) if census else None
        values = _dense(
            *batch,
            mining=mining,
            distance=distance,
            soft=soft,
            average_over=average_over,
        )
        return values, counts

    rows, rooted = prepare(embeddings, distance), is_rooted(distance)
    ordered = _ordered(labels, rows, others, distance)
    forward = compiled(
        _mining_pairs.forward, mining=mining, rooted=rooted, soft=soft, census=census
    )
    backward = compiled(_mining_pairs.backward, mining=mining)
    found = forward(ordered.batch, margin)
    losses, active = found["losses"], found["active"]

    # Rows with more positives than the table holds: a loss of their own.
    rule = _mining_dense.Rule(
        mining, rooted, soft, above=_mining_pairs.TABLE_RANKS, census=census
    )
    many = mining != "hard" and _can_exceed(ordered, rule.above)
    if many:
        many_losses = _mining_dense.prepared(_mining_dense.dense_losses, rule)
        many_gradient = _mining_dense.prepared(_mining_dense.dense_gradient, rule)
        extra = ops.cond(
            found["most"] > rule.above,
            lambda: many_losses(ordered.batch, margin),
            lambda: _mining_dense.no_losses(ordered.batch, census),
        )
        losses, active = losses + extra.losses, active + extra.active
        if census:
            found = _with_many(found, extra)

    def gradient(ordered: _Ordered, state: Any, weights: Any) -> Any:
        margin, found, kept = state
        result = backward(ordered.batch, weights, found)
        if not many:
            return result
        return result + ops.cond(
            found["most"] > rule.above,
            lambda: many_gradient(ordered.batch, margin, weights, kept),
            lambda: ops.zeros_like(result),
        )

    state = margin, found, extra.coefficients if many else None
    units = found["units"] if average_over == "all" else active
    values = _attach(rows, ordered, losses, units, state, gradient)
    return values, _census(found, ordered) if census else None


def _with_many(found: dict[str, Any], extra: _mining_dense.Terms) -> dict[str, Any]:
    """The census that a sweep found, with the triplets of rows with many positives."""
    counts, sums = found["counts"], found["sums"]
    return {
        **found,
        "counts": ops.concatenate([counts[:2], counts[2:] + extra.counts]),
        "sums": ops.stack([sums[0] + extra.distance, sums[1]]),
    }


def _can_exceed(ordered: _Ordered, ranks: int) -> bool:
    """Whether a class of a batch of this size, if known, can have more positives."""
    size, others = ordered.given, ordered.batch.others
    if others is not None and others.positives:
        size += ops.shape(others.rows)[0]
    return not isinstance(size, int) or size > ranks + 1


def _dense(
    labels: Any,
    embeddings: Any,
    margin: Any,
    others: Others | None,
    *,
    mining: str,
    distance: Any,
    soft: bool,
    average_over: str,
) -> Any:
    """The losses by coefficients, for distance words and for callables."""
    matrix = callable(distance)
    if matrix:
        rows = called_distances(distance, embeddings)
        if mining != "contrastive":
            # Only differences of distances count in triplets: none need be negative.
            rows = rows - ops.stop_gradient(ops.min(rows, initial=0.0))
        rooted = False
    else:
        rows, rooted = prepare(embeddings, distance), is_rooted(distance)
    ordered = _ordered(labels, rows, others, distance)
    rule = _mining_dense.Rule(mining, rooted, soft, matrix)
    forward = _mining_dense.prepared(_mining_dense.forward, rule)
    terms, units = forward(ordered.batch, margin)
    backward = _mining_dense.prepared(_mining_dense.dense_gradient, rule)

    def gradient(ordered: _Ordered, state: Any, weights: Any) -> Any:
        margin, kept = state
        result = backward(ordered.batch, margin, weights, kept)
        return ordered.restore(result, axis=1) if matrix else result

    units = units if average_over == "all" else terms.active
    needed = margin, terms.coefficients
    return _attach(rows, ordered, terms.losses, units, needed, gradient)


def _attach(
    rows: Any,
    ordered: _Ordered,
    losses: Any,
    units: Any,
    state: Any,
    gradient: Callable,
) -> Any:
    """Values of the batch with the given gradient with respect to `rows`.

    Args:
        rows: what the gradient is for, in the order of the batch.
        ordered: the batch in the order of its labels.
        losses: (padded,) sums by row.
        units: (padded,) the number of units that the mean goes over, by row.
        state: a structure of all tensors that `gradient` needs beside `ordered`.
        gradient: from `ordered`, `state` and (padded,) weights by row to the gradient
            of the ordered rows.
    """
    units = ops.sum(ops.cast(units, "float32"))
    scale = safe_divide(ops.cast(ordered.batch.size, "float32"), units)
    values = ordered.restore(losses) * scale

    def of_rows(needed: Any, weights: Any) -> Any:
        ordered, scale, state = needed
        weights = take_padded(weights * scale, ordered.order)
        return ordered.restore(gradient(ordered, state, weights))

    return with_gradient(rows, values, (ordered, scale, state), of_rows)
