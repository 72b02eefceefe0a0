"""Random access to the records of TFRecord files.

A record is framed by its length (8 bytes, little-endian), the masked CRC-32C of the
length, the data, and the masked CRC-32C of the data. Nothing says where the next but
one begins, so every file is read once from end to end; where its records lie, and
their labels, is kept in a file beside it.
"""

from __future__ import annotations

import itertools
import json
import os
import pathlib
import struct
import threading
import warnings
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, BinaryIO

import numpy as np

from kerastrip._checks import Told, message, one_of
from kerastrip.sources.arrays import RowSource
from kerastrip.sources.images import checked_size, decode_image

_VERSION = 1
_HEAD, _FRAME = 12, 16  # bytes before the data; before and after it


class TFRecordSource:
    """Samples from TFRecord files, read by offset.

    The records are `tf.train.Example` messages, of which one feature is the sample,
    or whatever `parse` understands. A feature is one of

    - an encoded picture, decoded to uint8 (height, width, channels) as by
      `ImageFiles`;
    - with `shape=`, raw bytes of `dtype` or a list of numbers.

    Pictures of several sizes need `size=`; models of several inputs need `parse`.

    The first use reads every file once, checks its checksums and writes
    `<file>.index.npz` beside it. A file whose size or time of change is another is
    indexed anew. Files must not be compressed: those have no random access.

    Safe in threads and processes: files are opened for one `take` only, and
    TensorFlow is used for its message classes, none of its operations.

    Args:
        paths: a TFRecord file or a sequence of them; their records are numbered in
            this order.
        feature: name of the feature that is the sample. Default "image".
        label: name of the feature that is the label, one integer or string (bytes
            in UTF-8); or a function `(record: bytes) -> label`, whose labels are not
            kept in the index file; or None. Default "label".
        parse: function `(record: bytes) -> sample` in place of `feature`; a sample
            is an array or a dict or tuple of arrays. Default None.
        shape: shape of a feature that is no picture. Default None.
        dtype: its dtype. Default "uint8".
        color: "rgb" (default) or "gray".
        size: (height, width) that pictures are resized to, or one integer for both.
            Default: as they are.
        index: True (default) keeps the index beside the files, a directory keeps it
            there, False in memory only.

    Attributes:
        labels: (n,) integers or strings; None with `label=None`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file is truncated, damaged or compressed, or a record has no
            such feature: says which, and where.
        TypeError: labels are neither integers nor strings.

    Warns:
        UserWarning: the index cannot be written; it is kept in memory.

    Example:
        >>> import pathlib, tempfile
        >>> import tensorflow as tf
        >>> def example(pixels, label):
        ...     image = tf.train.Feature(bytes_list=tf.train.BytesList(value=[pixels]))
        ...     label = tf.train.Feature(int64_list=tf.train.Int64List(value=[label]))
        ...     features = tf.train.Features(feature={"image": image, "label": label})
        ...     return tf.train.Example(features=features).SerializeToString()
        >>> path = pathlib.Path(tempfile.mkdtemp(), "train.tfrecord")
        >>> with tf.io.TFRecordWriter(str(path)) as writer:
        ...     for i in range(6):
        ...         writer.write(example(bytes([i] * 4), i // 2))
        >>> source = TFRecordSource(path, shape=(2, 2))
        >>> source.take([5, 0]).tolist(), source.labels.tolist()
        ([[[5, 5], [5, 5]], [[0, 0], [0, 0]]], [0, 0, 1, 1, 2, 2])
    """

    def __init__(
        self,
        paths: Any,
        feature: str = "image",
        *,
        label: str | Callable[[bytes], Any] | None = "label",
        parse: Callable[[bytes], Any] | None = None,
        shape: Sequence[int] | None = None,
        dtype: Any = "uint8",
        color: str = "rgb",
        size: int | tuple[int, int] | None = None,
        index: bool | str | os.PathLike[str] = True,
    ):
        one_of("color", color, ("rgb", "gray"))
        if isinstance(paths, (str, os.PathLike)):
            paths = [paths]
        files = [pathlib.Path(path) for path in paths]
        if not files:
            raise ValueError(message("paths", "at least one file", paths))
        if parse is None:
            size = None if size is None else checked_size(size)
            parse = partial(_picture, feature, color, size)
            if shape is not None:
                parse = partial(_numbers, feature, shape, np.dtype(dtype))
        elif not callable(parse):
            raise TypeError(message("parse", "a function of bytes", parse))
        indexed = map(partial(_indexed, label=label, index=index), files)
        offsets, labels = zip(*indexed, strict=True)
        if not any(len(some) > 1 for some in offsets):
            raise ValueError(message("paths", "at least one record", files))
        self.labels = None if label is None else _joined(files, labels)
        self._rows = RowSource(_Records(files, offsets, parse), "record")

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, indices: Any) -> Any:
        """Fresh arrays of the samples, in the order asked for.

        Raises:
            ValueError: a record cannot be read or parsed, or its sample has another
                shape than the first; names the file and the record.
            IndexError: there is no such sample.
        """
        return self._rows.take(indices)


class _Records:
    """The samples of some files, for `RowSource`.

    Args:
        files: where they are.
        offsets: for each file where its records begin, and where the last one ends.
        parse: bytes -> sample.
    """

    def __init__(
        self,
        files: Sequence[pathlib.Path],
        offsets: Sequence[np.ndarray],
        parse: Callable[[bytes], Any],
    ):
        self._files, self._offsets, self._parse = files, offsets, parse
        counts = [len(some) - 1 for some in offsets]
        self._starts = np.concatenate([[0], np.cumsum(counts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list:
        for index in indices:
            if not 0 <= index < len(self):
                raise IndexError(f"sample {index} of {len(self)}")
        which = np.searchsorted(self._starts, indices, "right") - 1
        samples = []
        for number, group in itertools.groupby(
            zip(which.tolist(), indices, strict=True), lambda pair: pair[0]
        ):
            with open(self._files[number], "rb") as file:
                for _, index in group:
                    place = index - int(self._starts[number])
                    samples.append(self._sample(file, number, place))
        return samples

    def _sample(self, file: BinaryIO, number: int, place: int) -> Any:
        start, end = self._offsets[number][place : place + 2].tolist()
        file.seek(start + _HEAD)
        data = file.read(end - start - _FRAME)
        if len(data) < end - start - _FRAME:
            raise _damaged(self._files[number], place, start, "a truncated record")
        return _parsed(self._parse, data, self._files[number], place)


def _parsed(
    parse: Callable[[bytes], Any], data: bytes, path: pathlib.Path, place: int
) -> Any:
    try:
        return parse(data)
    except Exception as error:
        raise ValueError(
            f"Record {place} of {path} cannot be parsed: {error}"
        ) from error


def _damaged(path: pathlib.Path, place: int, offset: int, what: str) -> ValueError:
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b" or path.suffix in (".gz", ".zlib")
    return ValueError(
        message(
            "paths",
            "whole TFRecord files",
            Told(f"{path} with {what} (record {place}, at byte {offset})"),
            "It is compressed, which leaves no random access: write it without."
            if packed
            else "Write it again, or leave it out.",
        )
    )


# -- the index -------------------------------------------------------------------


def _indexed(path: pathlib.Path, label: Any, index: Any) -> tuple[np.ndarray, Any]:
    """(records + 1,) offsets and (records,) labels of a file, or None for labels."""
    told = path.stat()
    kept = label if isinstance(label, str) else None
    about = json.dumps([_VERSION, told.st_size, told.st_mtime_ns, kept])
    beside = None if index is False else _index_path(path, index)
    found = beside and _loaded(beside, about)
    if found and (label is None or kept):
        return found[0], found[1] if kept else None
    read = label if callable(label) else partial(_label, label)
    offsets, labels = _walked(path, None if label is None else read)
    if beside and not found:
        keep = labels if kept and labels is not None else np.empty(0)
        _save(beside, about, offsets, keep)
    return offsets, labels


def _index_path(path: pathlib.Path, index: Any) -> pathlib.Path:
    name = f"{path.name}.index.npz"
    if index is True:
        return path.with_name(name)
    # Files of one name from several directories must not share an index.
    return pathlib.Path(index, f"{_crc32c(os.fsencode(path.resolve())):08x}-{name}")


def _loaded(beside: pathlib.Path, about: str) -> tuple[np.ndarray, np.ndarray] | None:
    try:
        with np.load(beside) as kept:
            if kept["about"].item() == about:
                return kept["offsets"], kept["labels"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass  # none yet, or not ours: a new one takes its place
    return None


def _save(
    beside: pathlib.Path, about: str, offsets: np.ndarray, labels: np.ndarray
) -> None:
    # Whole or not at all, also where several processes begin together.
    part = beside.with_name(f"{beside.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        try:
            with open(part, "wb") as file:
                np.savez(file, about=np.array(about), offsets=offsets, labels=labels)
            os.replace(part, beside)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        warnings.warn(
            f"The index of a TFRecord file cannot be kept ({error}) and will be built "
            "again next time. Pass index=<a directory that can be written to>.",
            stacklevel=4,
        )


def _walked(
    path: pathlib.Path, read_label: Callable[[bytes], Any] | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Offsets and labels from the file itself, its checksums checked."""
    offsets, labels, size = [0], [], path.stat().st_size
    with open(path, "rb") as file:
        while head := file.read(_HEAD):
            place, start = len(offsets) - 1, offsets[-1]
            if len(head) < _HEAD:
                raise _damaged(path, place, start, "a truncated record")
            length, check = struct.unpack("<QI", head)
            if _masked_crc(head[:8]) != check:
                raise _damaged(path, place, start, "a damaged length")
            offsets.append(start + length + _FRAME)
            if offsets[-1] > size:
                raise _damaged(path, place, start, "a truncated record")
            data, check = file.read(length), struct.unpack("<I", file.read(4))[0]
            if _masked_crc(data) != check:
                raise _damaged(path, place, start, "damaged data")
            if read_label is not None:
                labels.append(_parsed(read_label, data, path, place))
    kinds = {type(value).__name__ for value in labels}
    array = np.array(labels)
    if len(kinds) > 1 or (labels and (array.ndim > 1 or array.dtype.kind not in "iuU")):
        raise TypeError(
            message(
                "label",
                "one integer or one string for each record",
                Told(f"{', '.join(sorted(kinds))} in {path}"),
            )
        )
    return np.array(offsets, np.int64), None if read_label is None else array


def _joined(files: Sequence[pathlib.Path], labels: Sequence[np.ndarray]) -> np.ndarray:
    filled = [some for some in labels if len(some)]
    if len({some.dtype.kind == "U" for some in filled}) > 1:
        received = Told(f"both in {', '.join(map(str, files))}")
        raise TypeError(message("label", "integers or strings", received))
    return np.concatenate(filled)


def _tables() -> np.ndarray:
    """(256, 256) uint32: the CRC of byte b with i bytes of zero after it."""
    table: Any = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = table >> 1 ^ (table & 1) * np.uint32(0x82F63B78)
    tables = [table]
    for _ in range(255):
        tables.append(tables[-1] >> 8 ^ table[tables[-1] & 255])
    return np.stack(tables)


_TABLES = _tables()
_BYTE = _TABLES[0].tolist()
_FIRST = _TABLES[:-5:-1].tolist()  # for the four bytes of the state, over 256 bytes
_PLACES = 256 * np.arange(255, -1, -1)


def _crc32c(data: bytes) -> int:
    """The CRC is linear: blocks of 256 bytes are summed up by table, then joined."""
    state, head = 0xFFFFFFFF, len(data) % 256
    for byte in data[:head]:
        state = state >> 8 ^ _BYTE[(state ^ byte) & 255]
    blocks = np.frombuffer(data, np.uint8, offset=head).reshape(-1, 256)
    sums = np.bitwise_xor.reduce(_TABLES.ravel()[blocks + _PLACES], axis=1)
    first, second, third, fourth = _FIRST
    for block in sums.tolist():
        state = (
            first[state & 255]
            ^ second[state >> 8 & 255]
            ^ third[state >> 16 & 255]
            ^ fourth[state >> 24]
            ^ block
        )
    return state ^ 0xFFFFFFFF


def _masked_crc(data: bytes) -> int:
    crc = _crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


# -- what is in a record ---------------------------------------------------------


def _values(name: str, record: bytes) -> Sequence:
    """The values of one feature: bytes, integers or floats."""
    import tensorflow as tf

    features = tf.train.Example.FromString(record).features.feature
    kind = features[name].WhichOneof("kind") if name in features else None
    if kind is None:
        raise ValueError(f"it has no {name!r} but {sorted(features)}")
    return getattr(features[name], kind).value


def _single(name: str, record: bytes) -> Any:
    values = _values(name, record)
    if len(values) != 1:
        raise ValueError(f"{name!r} has {len(values)} values, not one")
    return values[0]


def _label(name: str, record: bytes) -> Any:
    value = _single(name, record)
    return value.decode() if isinstance(value, bytes) else value


def _numbers(
    name: str, shape: Sequence[int], dtype: np.dtype, record: bytes
) -> np.ndarray:
    values = _values(name, record)
    if len(values) == 1 and isinstance(values[0], bytes):
        return np.frombuffer(values[0], dtype).reshape(shape)
    return np.array(values, dtype).reshape(shape)


def _picture(
    name: str, color: str, size: tuple[int, int] | None, record: bytes
) -> np.ndarray:
    data = _single(name, record)
    if not isinstance(data, bytes):
        raise ValueError(f"{name!r} is no picture but numbers: pass their shape=")
    try:
        return decode_image(data, size, color=color)
    except ValueError as error:
        raise ValueError(
            f"{name!r} is no picture: {error}. Raw pixels need shape="
        ) from error
