"""A gallery of enrolled embeddings that names queries, or says that they are unknown."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from kerastrip import _checks, _files
from kerastrip._labels import LabelTable, label_array
from kerastrip.distances import DISTANCES
from kerastrip.evaluation.identification import IdentificationPoint, curve_of_nearest
from kerastrip.evaluation.retrieval import label_table
from kerastrip.evaluation.search import (
    Space,
    embeddings_array,
    neighbours,
    row_distances,
    unit_rows,
)

__all__ = ["Gallery", "Identification"]

# A saved gallery: one line with the version, and the length and checksum of what follows.
_VERSION = 1
_START = b"kerastrip gallery "
_LINE = re.compile(rb"(\d+) (\d{20}) ([0-9a-f]{64})\n")


@dataclasses.dataclass(frozen=True, eq=False)
class Identification:
    """What `Gallery.identify` says of each query: `for label, distance, known in ...`.

    Attributes:
        label: (n,) objects, the label of the nearest row, or None for an unknown query.
        distance: (n,) float32, the distance to the nearest row.
        known: (n,) booleans, whether that distance is at most the threshold.
    """

    label: np.ndarray
    distance: np.ndarray
    known: np.ndarray

    def __len__(self) -> int:
        return len(self.label)

    def __iter__(self) -> Iterator[tuple[Any, float, bool]]:
        columns = (self.label, self.distance, self.known)
        return zip(*(column.tolist() for column in columns), strict=True)


class Gallery:
    """Enrolled embeddings with labels: whose is a query, or is it unknown?

    A query is given the label of its nearest row if the distance is at most the
    threshold, and is unknown otherwise. `calibrate` finds the threshold for a wanted
    share of strangers that get a label.

    The search is exact and goes through all rows, as `kerastrip.search` does. For more
    rows than that suits, `index` takes the place of it: a function that is called with
    all (m, dim) float32 rows, and called again when rows came or went, and returns an
    object whose `search(queries, k)` finds nearest rows, such as an index of FAISS or
    usearch. It sees rows of length 1 if the distance is the cosine, so that an index for
    the euclidean distance or for its square serves all three words. The distances are
    computed again from the rows.

    Args:
        embeddings: (m, dim) rows to enrol, finite numbers. They are copied.
        labels: (m,) integers or strings, a label for each row.
        threshold: queries farther than this from their nearest row are unknown. Default
            None: `identify` is an error until there is a threshold.
        distance: `"euclidean"` (default), `"squared_euclidean"` or `"cosine"`. The
            arrays do not tell which distance they were trained with: give the distance
            of the loss.
        index: the function that makes an index. Default None: exact search.

    Attributes:
        threshold: as above. It may be set at any time.

    Raises:
        TypeError, ValueError: if the arrays are not embeddings and their labels, or
            another argument is not as above.

    Example:

    >>> gallery = Gallery([[0.0, 0.0], [3.0, 4.0]], ["ann", "bob"], threshold=1.0)
    >>> gallery
    Gallery(2 rows of 2 numbers, threshold=1.0)
    >>> for name, distance, known in gallery.identify([[0.0, 0.5], [9.0, 9.0]]):
    ...     print(name if known else "unknown", round(distance, 1))
    ann 0.5
    unknown 7.8
    """

    def __init__(
        self,
        embeddings: Any,
        labels: Any,
        *,
        threshold: float | None = None,
        distance: str = "euclidean",
        index: Callable[[np.ndarray], Any] | None = None,
    ) -> None:
        if index is not None and not callable(index):
            raise _checks.type_error(
                "index",
                "a function that makes an index of all rows",
                index,
                "An index that holds rows already would not learn of others.",
            )
        if threshold is not None:
            _checks.number("threshold", threshold)
        self.threshold = threshold
        self._distance = _checks.one_of("distance", distance, DISTANCES)
        rows, values = _enrolled(embeddings, labels)
        self._rows, self._labels = [rows], [values]  # the parts, as they were added
        self._make_index = index
        self._index: Any = None  # made when it is first needed

    def __len__(self) -> int:
        return sum(map(len, self._rows))

    def __repr__(self) -> str:
        dim = self._rows[0].shape[1]
        return f"Gallery({len(self)} rows of {dim} numbers, threshold={self.threshold})"

    @property
    def distance(self) -> str:
        """The word for the distance."""
        return self._distance

    @property
    def embeddings(self) -> np.ndarray:
        """(m, dim) float32 rows in the order in which they were enrolled, read-only."""
        self._rows = [_joined(self._rows)]
        return self._rows[0]

    @property
    def labels(self) -> np.ndarray:
        """(m,) labels of the rows, read-only."""
        self._labels = [_joined(self._labels)]
        return self._labels[0]

    def add(self, embeddings: Any, labels: Any) -> None:
        """Enrols more rows, behind the others.

        More rows accept more strangers at the same threshold: `calibrate` again after
        many.

        Args:
            embeddings: (m, dim) rows, finite numbers. They are copied.
            labels: (m,) labels of the kind that is there, new ones or not.
        """
        rows, values = _enrolled(embeddings, labels)
        self._check_dim("embeddings", rows)
        there, new = (part[:1].tolist()[0] for part in (self._labels[0], values))
        if type(there) is not type(new):
            expected = f"labels of the kind that is there, such as {there!r}"
            raise _checks.type_error("labels", expected, new)
        self._rows.append(rows)
        self._labels.append(values)
        self._index = None

    def remove(self, labels: Any) -> None:
        """Removes all rows of a label, or of several; the others keep their order.

        Args:
            labels: one label or several.

        Raises:
            ValueError: if a label has no row, or no row would be left. Then nothing is
                removed.
        """
        table = LabelTable(self.labels)
        codes = table.encode(labels if np.ndim(labels) else [labels])
        stay = ~np.isin(table.codes, codes)
        if not stay.any():
            received = _checks.Told(f"all {len(table.classes)} labels of the gallery")
            raise _checks.value_error("labels", "labels that leave a row", received)
        self._rows, self._labels = [self.embeddings[stay]], [self.labels[stay]]
        self._index = None

    def search(self, queries: Any, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest rows of every query, whatever the threshold.

        Args:
            queries: (n, dim) embeddings.
            k: number of neighbours per query, 1 ... m.

        Returns:
            (n, k) float32 distances, ascending, and (n, k) int64 rows, whose labels are
            `gallery.labels[rows]`. Where an `index` finds fewer rows, infinity and -1
            fill the rest.
        """
        queries = embeddings_array("queries", queries)
        self._check_dim("queries", queries)
        if self._make_index is None:
            if self._index is None:
                self._index = Space.of(queries, self.embeddings, self.distance)
            return neighbours(self._index.with_queries(queries), k)
        k = _checks.integer("k", k, 1)
        if k > len(self):
            expected = f"at most the {len(self)} rows of the gallery"
            raise _checks.value_error("k", expected, k)
        is_cosine = self.distance == "cosine"
        if self._index is None:
            rows = self.embeddings
            self._index = self._make_index(unit_rows(rows) if is_cosine else rows)
        queries = unit_rows(queries) if is_cosine else queries
        found = _found_rows(self._index.search(queries, k), len(queries), k, len(self))
        return self._in_order(queries, found)

    def identify(self, queries: Any) -> Identification:
        """The label of each query, or None where the query is unknown.

        Args:
            queries: (n, dim) embeddings.

        Returns:
            An `Identification`, of three arrays. A loop over it gives a label, a
            distance and whether the query is known, query by query.

        Raises:
            ValueError: if there is no threshold.
        """
        if self.threshold is None:
            raise _checks.value_error(
                "threshold",
                "a number",
                None,
                "`calibrate` finds one, or set `gallery.threshold`; `search` needs none.",
            )
        threshold = _checks.number("threshold", self.threshold)
        distances, rows = self.search(queries, 1)
        known = distances[:, 0] <= threshold
        label = np.full(len(rows), None, object)
        label[known] = self.labels[rows[known, 0]]
        return Identification(label, distances[:, 0], known)

    def calibrate(
        self,
        queries: Any,
        query_labels: Any,
        *,
        far: float = 0.01,
        confidence: float = 0.95,
        seed: int = 0,
    ) -> IdentificationPoint:
        """Sets the threshold at which at most a share `far` of all strangers get a label.

        The strangers are the queries whose label is not in the gallery. What is sure
        about the threshold, and why the classes of the strangers count, is told at
        `IdentificationCurve.certified`.

        Args:
            queries: (n, dim) embeddings of strangers, and of enrolled classes if DIR is
                wanted, too. None of them may be a row of the gallery.
            query_labels: (n,) their labels, of the kind that is there.
            far: the wanted share, 0 < far < 1. Default 0.01.
            confidence: of the bound on it, 0.5 <= confidence < 1. Default 0.95.
            seed: of the draw of one query from each class of strangers. Default 0.

        Returns:
            An `IdentificationPoint`: the threshold, and the DIR and FAR of these
            queries.

        Raises:
            ValueError: if there are too few classes of strangers; the error says how
                many are needed. The threshold stays as it was.
        """
        queries = embeddings_array("queries", queries)
        table = label_table("query_labels", query_labels, len(queries))
        distances, rows = self.search(queries, min(2, len(self)))
        curve = curve_of_nearest(
            distances,
            rows,
            table,
            LabelTable(self.labels),
            distance=self.distance,
            seed=seed,
        )
        point = curve.certified(far, confidence)
        self.threshold = point.threshold
        return point

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes rows, labels, threshold and distance to a file, whole or not at all.

        An `index` is not in the file: give it to `load` again.

        Args:
            path: the file. An earlier file stays if the new one cannot be written.

        Raises:
            OSError: if the file cannot be written.
        """
        labels = self.labels
        if is_literal := labels.dtype.kind == "O":  # bytes, or integers over 64 bits
            labels = np.array([repr(label) for label in labels.tolist()])
        rest = {
            "threshold": None if self.threshold is None else float(self.threshold),
            "distance": self.distance,
            "is_literal": is_literal,
        }
        file = io.BytesIO()
        file.write(_first_line(0, ""))
        start = file.tell()
        for array in (self.embeddings, labels, np.array(json.dumps(rest))):
            np.save(file, array, allow_pickle=False)
        with file.getbuffer() as content:
            checksum = hashlib.sha256(content[start:]).hexdigest()
            content[:start] = _first_line(len(content) - start, checksum)
        _files.write_whole(path, file.getvalue())

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        index: Callable[[np.ndarray], Any] | None = None,
    ) -> Gallery:
        """The gallery that `save` wrote.

        Args:
            path: the file.
            index: as for `Gallery`.

        Raises:
            OSError: if the file cannot be read.
            ValueError: if it is no gallery, or of another version, truncated or
                damaged.
        """
        _files.refuse_devices("path", path)
        with open(path, "rb") as file:
            if wrong := _wrong_with(file):
                received = _checks.Told(f"{str(path)!r}, {wrong}")
                raise _checks.value_error("path", "a file of `Gallery.save`", received)
            rows, labels, rest = (np.load(file, allow_pickle=False) for _ in range(3))
        settings = json.loads(rest.item())
        if settings.pop("is_literal"):
            labels = [ast.literal_eval(label) for label in labels.tolist()]
        return cls(rows, labels, index=index, **settings)

    def _check_dim(self, name: str, rows: np.ndarray) -> None:
        dim = self._rows[0].shape[1]
        if rows.shape[1] != dim:
            expected = f"rows of {dim} numbers, as the gallery has"
            raise _checks.value_error(name, expected, rows)

    def _in_order(
        self, queries: np.ndarray, found: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The distances to the rows that an index found, -1 for none, and the rows, sorted.

        Args:
            queries: (n, dim), of length 1 for the cosine distance.
            found: (n, k) rows.
        """
        gallery, is_cosine = self.embeddings, self.distance == "cosine"
        distances = np.empty(found.shape, np.float32)
        # One neighbour of all queries at a time: all k would be k times the queries.
        for column, rows in zip(distances.T, found.T, strict=True):
            ends = unit_rows(gallery[rows]) if is_cosine else gallery[rows]
            column[:] = row_distances(queries, ends, self.distance)
        distances[found < 0] = np.inf
        order = np.lexsort((found, distances), axis=-1)
        distances = np.take_along_axis(distances, order, axis=1)
        return distances, np.take_along_axis(found, order, axis=1)


def _enrolled(embeddings: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    """(m, dim) rows and (m,) labels, checked: fresh arrays."""
    rows = embeddings_array("embeddings", embeddings)
    values = label_array(labels)
    values = values.argmax(axis=1) if values.ndim == 2 else values  # one-hot rows
    if len(values) != len(rows):
        received = _checks.Told(f"{len(values)} labels")
        raise _checks.value_error("labels", f"{len(rows)} labels", received)
    return np.array(rows), values


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    """All parts as one read-only array."""
    if len(parts) == 1:
        whole = parts[0]
    elif len({part.dtype.kind for part in parts}) == 1:
        whole = np.concatenate(parts)
    else:  # NumPy would make floats of int64 and uint64
        whole = label_array(np.concatenate([part.astype(object) for part in parts]))
    whole.flags.writeable = False
    return whole


def _found_rows(found: Any, queries: int, k: int, rows: int) -> np.ndarray:
    """(queries, k) int64 rows that an index found, -1 where it found fewer.

    FAISS returns distances and rows, and -1 for a missing row. usearch returns an object
    with `keys`, and beside it `counts` if there is more than one query: the keys behind
    that many mean nothing.
    """
    keys = np.asarray(found.keys if hasattr(found, "keys") else found[1])
    keys = keys.reshape(queries, -1).astype(np.int64)
    if hasattr(found, "counts"):
        counts = np.reshape(found.counts, (queries, 1))
        keys[np.arange(keys.shape[1]) >= counts] = -1
    if keys.shape[1] > k or keys.min(initial=-1) < -1 or keys.max(initial=-1) >= rows:
        raise _checks.value_error(
            "index",
            f"a search that finds at most {k} of the rows 0 ... {rows - 1} for a query",
            keys,
            "The index numbers the rows as they stand in the array that it is made of.",
        )
    return np.pad(keys, ((0, 0), (0, k - keys.shape[1])), constant_values=-1)


def _first_line(length: int, checksum: str) -> bytes:
    """The first line of a file, always as long."""
    return _START + f"{_VERSION} {length:020} {checksum:0>64}\n".encode()


def _wrong_with(file: Any) -> str:
    """What is wrong with a file, if anything; leaves it behind the first line."""
    start = file.read(len(_START))
    if start != _START:
        return (
            "which is truncated" if _START.startswith(start) else "which is no gallery"
        )
    line = file.readline(200)
    version = re.match(rb"(\d+) ", line)
    if version and int(version[1]) != _VERSION:
        return f"of version {int(version[1])} where this kerastrip reads {_VERSION}"
    told = _LINE.fullmatch(line)
    if told is None:
        return "which is damaged" if line.endswith(b"\n") else "which is truncated"
    begin = file.tell()
    length = os.fstat(file.fileno()).st_size - begin
    if length != int(told[2]):
        return "which is truncated" if length < int(told[2]) else "which is damaged"
    checksum = hashlib.sha256()
    for block in iter(lambda: file.read(1 << 20), b""):
        checksum.update(block)
    file.seek(begin)
    return "" if checksum.hexdigest().encode() == told[3] else "which is damaged"
