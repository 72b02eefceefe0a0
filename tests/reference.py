"""Slow, obvious oracles: plain loops in float64, written from the definitions.

Nothing here comes from the package. A loss is a list of units (loss value,
gradient), so that the same loops give value, per-row value and gradient.
"""

from __future__ import annotations

import math

import numpy as np


def distance_and_slopes(x, y, word):
    """Distance of two vectors and its gradients with respect to x and y."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if word == "cosine":
        nx, ny = np.linalg.norm(x), np.linalg.norm(y)
        if nx == 0 or ny == 0:
            return (0.0 if nx == ny else 0.5), 0 * x, 0 * y
        u, v = x / nx, y / ny
        cos = u @ v
        return 1 - cos, -(v - cos * u) / nx, -(u - cos * v) / ny
    squared = float(((x - y) ** 2).sum())
    if word == "squared_euclidean":
        return squared, 2 * (x - y), -2 * (x - y)
    root = math.sqrt(squared)
    slope = (x - y) / root if root > 0 else 0 * x
    return root, slope, -slope


def distance_matrix(embeddings, word):
    n = len(embeddings)
    return np.array(
        [
            [
                distance_and_slopes(embeddings[i], embeddings[j], word)[0]
                for j in range(n)
            ]
            for i in range(n)
        ]
    ).reshape(n, n)


def census(labels, embeddings, margin=0.2, word="euclidean"):
    """One dict per anchor with the keys of the package's Census."""
    d = distance_matrix(embeddings, word)
    result = []
    for a, positives, negatives in _anchors(labels):
        kinds = {"easy": 0, "semi_hard": 0, "hard": 0}
        pairs = 0
        for p in positives:
            found = False
            for n in negatives:
                if d[a, n] <= d[a, p]:
                    kinds["hard"] += 1
                elif d[a, n] < d[a, p] + margin:
                    kinds["semi_hard"] += 1
                    found = True
                else:
                    kinds["easy"] += 1
            pairs += found
        result.append(
            {
                "positives": len(positives),
                "negatives": len(negatives),
                **kinds,
                "pairs_with_semi_hard": pairs,
                "pos_dist": sum(d[a, p] for p in positives),
                "neg_dist": sum(d[a, n] for n in negatives),
            }
        )
    return result


def census_figures(batches, margin=0.2, word="euclidean"):
    """What TripletCensus reports after some batches (labels, embeddings)."""
    anchors, shapes = [], []
    for labels, embeddings in batches:
        x = np.asarray(embeddings, np.float64)
        anchors += census(labels, x, margin, word)
        variances = np.linalg.eigvalsh(np.cov(x.T, bias=True).reshape(x.shape[1], -1))
        spread = variances.sum()
        shapes.append((len(x) * spread, spread**2 / (variances**2).sum()))
    lengths = [np.linalg.norm(rows, axis=1) for _, rows in batches]
    apart = [len(length) * length.var() for length in lengths]
    total = {key: sum(anchor[key] for anchor in anchors) for key in anchors[0]}
    triplets = max(total["easy"] + total["semi_hard"] + total["hard"], 1)
    return {
        **{key: total[key] / triplets for key in ("easy", "semi_hard", "hard")},
        "active": (total["semi_hard"] + total["hard"]) / triplets,
        "pairs_with_semi_hard": total["pairs_with_semi_hard"] / total["positives"],
        "anchors_without_positive": np.mean([a["positives"] == 0 for a in anchors]),
        "pos_dist": total["pos_dist"] / total["positives"],
        "neg_dist": total["neg_dist"] / total["negatives"],
        "norm": np.mean([np.linalg.norm(row) for _, rows in batches for row in rows]),
        "norm_std": np.sqrt(sum(apart) / len(anchors)),
        "spread": sum(spread for spread, _ in shapes) / len(anchors),
        "effective_dim": np.mean([dimension for _, dimension in shapes]),
    }


def chosen_triplets(labels, d, margin, mining):
    """The triplets (a, p, n) that a mining word takes from a distance matrix."""
    triplets = []
    for a, positives, negatives in _anchors(labels):
        if not positives or not negatives:
            continue
        if mining == "all":
            triplets += [(a, p, n) for p in positives for n in negatives]
            continue
        if mining == "hard":
            farthest = max(positives, key=lambda p: d[a, p])
            triplets.append((a, farthest, min(negatives, key=lambda n: d[a, n])))
            continue
        for p in positives:
            beyond = [n for n in negatives if d[a, n] > d[a, p]]
            if mining == "semi_hard":
                fallback = max(negatives, key=lambda n: d[a, n])
            else:
                beyond = [n for n in beyond if d[a, n] < d[a, p] + margin]
                fallback = min(negatives, key=lambda n: d[a, n])
            chosen = min(beyond, key=lambda n: d[a, n]) if beyond else fallback
            triplets.append((a, p, chosen))
    return triplets


def triplet_loss(
    labels,
    embeddings,
    *,
    margin=0.2,
    mining="semi_hard",
    word="euclidean",
    soft=False,
    average_over="all",
    weights=None,
):
    """Per-row values, and the gradient of sum(weights * values)."""
    x = np.asarray(embeddings, np.float64)
    d = distance_matrix(x, word)
    units = []
    for a, p, n in chosen_triplets(labels, d, margin, mining):
        gap = d[a, p] - d[a, n]
        if soft:
            loss, slope = np.logaddexp(0, gap), 1 / (1 + math.exp(-gap))
        else:
            loss, slope = max(gap + margin, 0.0), float(gap + margin > 0)
        gradient = {a: 0, p: 0, n: 0}
        for other, sign in ((p, slope), (n, -slope)):
            _, to_a, to_other = distance_and_slopes(x[a], x[other], word)
            gradient[a] = gradient[a] + sign * to_a
            gradient[other] = gradient[other] + sign * to_other
        units.append((a, loss, gradient))
    return _collect(units, x, average_over, weights)


def contrastive_loss(
    labels,
    embeddings,
    *,
    positive_margin=0.0,
    negative_margin=1.0,
    word="euclidean",
    average_over="all",
    weights=None,
):
    """Per-row values, and the gradient of sum(weights * values)."""
    x = np.asarray(embeddings, np.float64)
    units = []
    for a in range(len(x)):
        for b in range(len(x)):
            if a == b:
                continue
            d, to_a, to_b = distance_and_slopes(x[a], x[b], word)
            if labels[a] == labels[b]:
                slope = max(d - positive_margin, 0.0)
            else:
                slope = -max(negative_margin - d, 0.0)
            units.append((a, slope**2 / 2, {a: slope * to_a, b: slope * to_b}))
    return _collect(units, x, average_over, weights)


def _anchors(labels):
    """Every anchor with its positives and its negatives."""
    rows = range(len(labels))
    for a in rows:
        yield (
            a,
            [j for j in rows if j != a and labels[j] == labels[a]],
            [j for j in rows if labels[j] != labels[a]],
        )


def _collect(units, x, average_over, weights):
    weights = np.ones(len(x)) if weights is None else weights
    values, gradient = np.zeros(len(x)), np.zeros_like(x)
    counted = [u for u in units if average_over == "all" or u[1] > 0]
    for a, loss, slopes in counted:
        scale = len(x) / len(counted)
        values[a] += scale * loss
        for row, slope in slopes.items():
            gradient[row] += weights[a] * scale * slope
    return values, gradient


def market1501(d, persons, cameras, gallery_persons, gallery_cameras):
    """The evaluation of Market-1501 (Zheng et al. 2015), one query at a time.

    Images of the query's person from the query's camera are removed from its ranking.
    Queries of which no image is then left to find are not counted.

    Args:
        d: (queries, gallery) distances.

    Returns:
        List of (first match, average precision, inverse negative penalty) of the
        queries that count; the first match is its place from 0.
    """
    found = []
    for i, (person, camera) in enumerate(zip(persons, cameras, strict=True)):
        ranking = []
        for j in sorted(range(len(d[i])), key=lambda j, i=i: (d[i][j], j)):
            same = gallery_persons[j] == person
            if not (same and gallery_cameras[j] == camera):
                ranking.append(same)
        good = sum(ranking)
        if good == 0:
            continue
        right, precisions, last = 0, [], 0
        for place, match in enumerate(ranking):
            if match:
                right += 1
                precisions.append(right / (place + 1))
                last = place + 1
        found.append((ranking.index(True), sum(precisions) / good, good / last))
    return found


def reranked_distances(d, queries, k1=20, k2=6, weight=0.3):
    """k-reciprocal re-ranking, the equations of Zhong et al. 2017, section by section.

    Args:
        d: (rows, rows) distances of queries and gallery together, 0 on the diagonal.
        queries: the rows that are queries.

    Returns:
        (queries, rows) distances d* of section 3.5.
    """
    d = np.asarray(d, np.float64)
    d = d / d.max(axis=1, keepdims=True)
    rows = range(len(d))
    order = [sorted(rows, key=lambda g, p=p: (d[p][g], g)) for p in rows]

    def near(p, k):  # N(p, k): the row itself and k others
        return order[p][: k + 1]

    def reciprocal(p, k):  # R(p, k), section 3.2
        return {g for g in near(p, k) if p in near(g, k)}

    vectors = np.zeros((len(d), len(d)))
    for p in rows:
        mutual = reciprocal(p, k1)
        extended = set(mutual)
        for q in mutual:  # R*(p, k)
            candidates = reciprocal(q, round(k1 / 2))
            if 3 * len(candidates & mutual) >= 2 * len(candidates):
                extended |= candidates
        for g in extended:  # section 3.3
            vectors[p][g] = math.exp(-d[p][g])
        vectors[p] /= vectors[p].sum()
    # section 3.4
    vectors = np.array([np.mean([vectors[g] for g in order[p][:k2]], 0) for p in rows])
    result = np.empty((len(queries), len(d)))
    for i, p in enumerate(queries):
        for g in rows:
            least = np.minimum(vectors[p], vectors[g]).sum()
            most = np.maximum(vectors[p], vectors[g]).sum()
            result[i, g] = (1 - weight) * (1 - least / most) + weight * d[p][g]
    return result


def value_and_gradient(function, x):
    """function(x) and the gradient of its sum, as NumPy, on whatever backend runs."""
    import keras

    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        x = tf.constant(x)
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = function(x)
            total = tf.reduce_sum(value)
        return value.numpy(), tape.gradient(total, x).numpy()
    if backend == "jax":
        import jax

        def total(x):
            value = function(x)
            return value.sum(), value

        gradient, value = jax.jit(jax.grad(total, has_aux=True))(x)
        return np.asarray(value), np.asarray(gradient)
    import torch

    x = torch.tensor(x, requires_grad=True)
    value = function(x)
    value.sum().backward()
    return value.detach().numpy(), x.grad.numpy()


def traced(function):
    """`function` as a training step sees it, on the backends that trace."""
    import keras

    if keras.backend.backend() == "jax":
        import jax

        return jax.jit(function)
    import tensorflow as tf

    return tf.function(function)
