"""Random access to the records of TFRecord files.

A file is a chain of records, without a table of contents:

    length     CRC-32C of the length    data           CRC-32C of the data | next record
    8 bytes    4 bytes                  length bytes   4 bytes             |

So TensorFlow reads every file once from end to end, and checks the checksums. An index
file beside it then keeps the offset, the label and a CRC-32 of each record. (Python has
CRC-32 built in, but not CRC-32C.) The CRC-32 is compared when a record is first read.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import itertools
import json
import os
import pathlib
import re
import zipfile
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from kerastrip import _checks
from kerastrip._files import refuse_devices, write_whole
from kerastrip.sources.arrays import RowSource
from kerastrip.sources.decoding import (
    MAX_PIXELS,
    Reading,
    checked_reading,
    checked_size,
)

__all__ = [
    "TFRecordSource",
]

_VERSION = 2
# Bytes of the length, of all that stands before the data, and of all beside the data.
_LENGTH, _HEAD, _FRAME = 8, 12, 16
_CONTROL = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f]")  # characters of no text


class TFRecordSource:
    """Samples from TFRecord files, read by offset.

    The records are `tf.train.Example` messages, of which one feature is the sample,
    or whatever `parse` understands. A feature is one of

    - an encoded image, decoded to uint8 (height, width, channels) as by
      `ImageFiles`;
    - with `shape=`, raw bytes (uint8) or a list of numbers (int64 or float32), or
      numbers of another `dtype`.

    Images of several sizes need `size=`; models of several inputs need `parse`.

    The first use reads every file once, checks its checksums and writes
    `<file>.index.npz` beside it. If the size or the time of change of a file differs
    later, the file is indexed again. A record that has changed all the same is an error
    when it is first read. Files must not be compressed: compressed files have no random
    access.

    The source is safe in threads and processes: files are opened for one `take` only. Of
    TensorFlow it uses the reader of files and the message classes, but no operation.

    Args:
        paths: a TFRecord file or a sequence of them; their records are numbered in
            this order.
        feature: name of the feature that is the sample. Default "image".
        label: name of the feature that is the label, one integer or string (bytes
            in UTF-8), of one kind in all files; or a function
            `(record: bytes) -> label`, for labels of another form, such as integers
            written as raw bytes (these labels are not kept in the index file); or
            None. Default "label".
        parse: function `(record: bytes) -> sample` in place of `feature`; a sample
            is an array or a dict or tuple of arrays. Threads call it side by side.
            Default None.
        shape: shape of a feature that is no image. Default None.
        dtype: dtype of a feature that is no image. Raw bytes are read as numbers of
            this dtype. Numbers in a list are converted to it; it is an error if a number
            changes by more than the rounding from one float to another. Default None: raw
            bytes are uint8, and lists stay int64 or float32.
        color: "rgb" (default) or "gray".
        size: (height, width) that images are resized to, or one integer for both.
            Default: the size of each image.
        bits: None (default) or 9 ... 16, as for `ImageFiles`.
        max_pixels: the largest image that is decoded, as for `ImageFiles`.
        index: True (default) keeps the index beside the files, a directory keeps it
            there, False in memory only.

    Attributes:
        labels: (n,) integers or strings; None with `label=None`.
        reading: how images are read, as of `ImageFiles`; None without `size=`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file is truncated, damaged or compressed, or a record lacks the
            feature; the message names the file and the record.
        TypeError: labels are neither integers nor strings, or some are integers
            and others strings.

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
        dtype: Any = None,
        color: str = "rgb",
        size: int | tuple[int, int] | None = None,
        bits: int | None = None,
        max_pixels: int = MAX_PIXELS,
        index: bool | str | os.PathLike[str] = True,
    ):
        if isinstance(paths, (str, os.PathLike)):
            paths = [paths]
        files = [pathlib.Path(path) for path in paths]
        if not files:
            raise _checks.value_error("paths", "at least one file", paths)
        _checks.text("feature", feature)
        if label is not None and not callable(label):
            _checks.text("label", label)
        self.reading: dict[str, Any] | None = None
        size = None if size is None else checked_size(size)
        reading = checked_reading(size, color, bits, max_pixels)
        if parse is None:
            if shape is not None:
                kind = None if dtype is None else np.dtype(dtype)
                parse = partial(_numbers, feature, shape, kind)
            else:
                parse = partial(_image, feature, reading)
                self.reading = reading.as_dict() if size else None
        elif not callable(parse):
            raise _checks.type_error("parse", "a function of bytes", parse)
        indices = list(map(partial(_indexed, label=label, index=index), files))
        if not any(len(of_file.checks) for of_file in indices):
            raise _checks.value_error("paths", "at least one record", files)
        self.labels = None
        if label is not None:
            self.labels = _joined(files, [of_file.labels for of_file in indices])
        # A record is known by the length and the CRC-32 of its data.
        self._stamps = np.concatenate(
            [
                np.c_[np.diff(of_file.offsets) - _FRAME, of_file.checks]
                for of_file in indices
            ]
        )
        self._rows = RowSource(_Records(files, indices, parse), "record")

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, indices: Any) -> Any:
        """Fresh arrays of the samples, in the order asked for.

        Raises:
            ValueError: a record has changed, cannot be read or parsed, or its sample
                has another shape than the first sample; the message names the file and
                the record.
            IndexError: there is no such sample.
        """
        return self._rows.take(indices)

    def stamps(self) -> np.ndarray:
        """(n, 2) integers, length and CRC-32 of the data of each record."""
        return self._stamps


class _Index(NamedTuple):
    """The index of one file with n records.

    Attributes:
        offsets: (n + 1,) int64, where the records begin, then the end of the last one.
        checks: (n,) uint32, CRC-32 of the data of each record.
        labels: (n,) integers or strings; empty if no labels are kept.
    """

    offsets: np.ndarray
    checks: np.ndarray
    labels: np.ndarray


class _Records:
    """The samples of some files, for `RowSource`.

    Args:
        files: the paths of the files.
        indices: the index of each file.
        parse: bytes of a record -> sample.
    """

    def __init__(
        self,
        files: Sequence[pathlib.Path],
        indices: Sequence[_Index],
        parse: Callable[[bytes], Any],
    ):
        self._files, self._indices, self._parse = files, indices, parse
        counts = [len(of_file.checks) for of_file in indices]
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        self._checked = [bytearray(count) for count in counts]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list:
        for index in indices:
            if not 0 <= index < len(self):
                raise IndexError(f"sample {index} of {len(self)}")
        which = np.searchsorted(self._starts, indices, "right") - 1
        # Records in a row that are of one file are read while the file is open.
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
        index = self._indices[number]
        start, end = index.offsets[place : place + 2].tolist()
        file.seek(start + _HEAD)
        data = file.read(end - start - _FRAME)
        if len(data) < end - start - _FRAME:
            raise _damaged(self._files[number], place, start, "a truncated record")
        if not self._checked[number][place]:
            if zlib.crc32(data) != index.checks[place]:
                what = "a record that has changed since the file was indexed"
                raise _damaged(self._files[number], place, start, what)
            self._checked[number][place] = 1
        return _parsed(self._parse, data, self._files[number], place)


def _parsed(
    parse: Callable[[bytes], Any], data: bytes, path: pathlib.Path, place: int
) -> Any:
    try:
        return parse(data)
    except MemoryError:
        raise  # the record may be whole
    except Exception as error:
        raise ValueError(
            f"Record {place} of {path} cannot be parsed: {error}"
        ) from error


def _damaged(path: pathlib.Path, place: int, offset: int, what: str) -> ValueError:
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b" or path.suffix in (".gz", ".zlib")
    received = _checks.Told(f"{path} with {what} (record {place}, at byte {offset})")
    advice = "Write it again, or leave it out."
    if packed:
        advice = "It is compressed, which leaves no random access: write it without."
    return _checks.value_error("paths", "whole TFRecord files", received, advice)


# -- the index -------------------------------------------------------------------


def _indexed(path: pathlib.Path, label: Any, index: Any) -> _Index:
    """The index of a file: read from the index file, or made now."""
    refuse_devices("paths", path)
    status = path.stat()
    # Labels that a function makes are not stored: the function may change.
    stored_label = label if isinstance(label, str) else None
    about = json.dumps([_VERSION, status.st_size, status.st_mtime_ns, stored_label])
    beside = None if index is False else _index_path(path, index)
    loaded = beside and _loaded(beside, about, status.st_size, stored_label is not None)
    if loaded and (label is None or stored_label):
        return loaded
    read = label if callable(label) else partial(_label, label)
    made = _walked(path, None if label is None else read)
    if beside and not loaded:
        stored = made if stored_label else made._replace(labels=np.empty(0))
        _save(beside, about, stored)
    return made


def _index_path(path: pathlib.Path, index: Any) -> pathlib.Path:
    name = f"{path.name}.index.npz"
    if index is True:
        return path.with_name(name)
    # Files of one name from several directories must not share an index.
    place = hashlib.blake2b(os.fsencode(path.resolve()), digest_size=8).hexdigest()
    return pathlib.Path(index, f"{place}-{name}")


def _loaded(
    beside: pathlib.Path, about: str, size: int, labelled: bool
) -> _Index | None:
    """The index in an index file; None unless it fits the data file in its present state.

    Args:
        beside: the index file.
        about: what the index file must say of the data file.
        size: bytes of the data file.
        labelled: whether the index must have labels.
    """
    try:
        refuse_devices("index", beside)
        with zipfile.ZipFile(beside) as members:
            if any(member.compress_type for member in members.infolist()):
                return None  # not ours, and a few bytes may unpack to gigabytes
        with np.load(beside) as arrays:
            if arrays["about"].item() != about:
                return None
            loaded = _Index(*(arrays[name] for name in _Index._fields))
    except Exception:
        return None  # no index file, or not ours: a new index file takes its place
    return loaded if _agrees(loaded, size, labelled) else None


def _agrees(index: _Index, size: int, labelled: bool) -> bool:
    """Whether an index can be of a file of `size` bytes, and has labels if `labelled`."""
    offsets, checks, labels = index
    return (
        offsets.dtype == np.int64
        and offsets.shape == (len(checks) + 1,)
        and offsets[0] == 0
        and offsets[-1] == size
        and bool((np.diff(offsets) >= _FRAME).all())
        and checks.dtype == np.uint32
        and labels.shape == (len(checks) if labelled else 0,)
        and (len(labels) == 0 or labels.dtype.kind in "iuU")
    )


def _save(beside: pathlib.Path, about: str, index: _Index) -> None:
    file = io.BytesIO()
    np.savez(file, about=np.array(about), **index._asdict())
    try:
        write_whole(beside, file.getvalue())
    except OSError as error:
        _checks.warn(
            f"The index of a TFRecord file cannot be kept ({error}) and will be built "
            "again next time. Pass index=<a directory that can be written to>.",
        )


def _walked(path: pathlib.Path, read_label: Callable[[bytes], Any] | None) -> _Index:
    """The index of a file, made by reading the file; TensorFlow checks the checksums."""
    import tensorflow as tf

    # The first operation of TensorFlow, for example of tf.data, reserves every GPU. This
    # reader is no operation. `unwrap` avoids its warning that it is deprecated.
    read = inspect.unwrap(tf.compat.v1.io.tf_record_iterator)
    records = read(os.fsencode(path))
    offsets, size = [0], path.stat().st_size
    checks: list[int] = []
    labels: list[Any] = []
    with open(path, "rb", buffering=0) as file:
        while (start := offsets[-1]) < size:
            place = len(checks)
            file.seek(start)
            length = int.from_bytes(file.read(_LENGTH), "little")
            # TensorFlow takes memory for the data before it looks whether the file is long
            # enough: a length of 2**62 would end the process.
            if start + length + _FRAME > size:
                what = "a truncated record, or a damaged length"
                raise _damaged(path, place, start, what)
            try:
                data = next(records)
            except (tf.errors.OpError, StopIteration) as error:
                raise _damaged(path, place, start, "a damaged record") from error
            offsets.append(start + len(data) + _FRAME)
            checks.append(zlib.crc32(data))
            if read_label is not None:
                labels.append(_parsed(read_label, data, path, place))
    return _Index(
        np.array(offsets, np.int64),
        np.array(checks, np.uint32),
        _label_array(path, labels),
    )


def _label_array(path: pathlib.Path, labels: Sequence[Any]) -> np.ndarray:
    kinds = {type(value).__name__: place for place, value in enumerate(labels)}
    array = np.array(labels)
    if len(kinds) > 1 or (labels and (array.ndim > 1 or array.dtype.kind not in "iuU")):
        received = ", ".join(
            f"{kind} (record {place})" for kind, place in kinds.items()
        )
        raise _no_labels(f"{received} in {path}")
    return array


def _joined(files: Sequence[pathlib.Path], labels: Sequence[np.ndarray]) -> np.ndarray:
    """The labels of all files; TypeError if some are integers and others strings."""
    kinds = {
        "strings" if of_file.dtype.kind == "U" else "integers": path
        for path, of_file in zip(files, labels, strict=True)
        if len(of_file)
    }
    if len(kinds) > 1:
        raise _no_labels(", ".join(f"{kind} in {path}" for kind, path in kinds.items()))
    return np.concatenate([of_file for of_file in labels if len(of_file)])


def _no_labels(received: str) -> TypeError:
    expected = "one integer or one string for each record, of one kind"
    advice = "A function label= makes labels of one kind."
    return _checks.type_error("label", expected, _checks.Told(received), advice)


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
    if not isinstance(value, bytes):
        return value
    text = value.decode("utf-8", "replace")
    if "\ufffd" in text or _CONTROL.search(text):
        # An integer written as raw bytes (a byte and seven zeros) must not pass for text.
        raise ValueError(
            f"{name!r} is {len(value)} bytes that are no text, {value[:16]!r}: raw "
            "numbers need a function label="
        )
    return text


def _numbers(
    name: str, shape: Sequence[int], dtype: np.dtype | None, record: bytes
) -> np.ndarray:
    values = _values(name, record)
    first = values[0] if values else 0.0  # a feature has values of one kind
    if isinstance(first, bytes):
        if len(values) > 1:
            raise ValueError(f"{name!r} has {len(values)} byte strings, not one")
        dtype = np.dtype(np.uint8 if dtype is None else dtype)
        try:
            return np.frombuffer(first, dtype).reshape(shape)
        except ValueError as error:
            raise ValueError(
                f"{name!r} has {len(first)} bytes, which do not reshape to {tuple(shape)} "
                f"in {dtype.name}. Raw numbers of another kind need their dtype=, bytes "
                "of tf.io.serialize_tensor need parse="
            ) from error
    whole = isinstance(first, int)
    numbers = np.array(values, np.int64 if whole else np.float32)
    return _converted(name, numbers, dtype).reshape(shape)


def _converted(name: str, numbers: np.ndarray, dtype: np.dtype | None) -> np.ndarray:
    """int64 or float32 numbers in another dtype; ValueError if a number changes."""
    if dtype is None or dtype == numbers.dtype:
        return numbers
    with np.errstate(all="ignore"):
        converted = numbers.astype(dtype)
        if numbers.dtype.kind == converted.dtype.kind == "f":
            same = np.isfinite(numbers) == np.isfinite(converted)
        else:
            # The second comparison is needed as well: NumPy compares an int64 with a
            # float as floats, in which integers beyond 2^53 are rounded.
            back = converted.astype(numbers.dtype)
            same = (numbers == converted) & (numbers == back)
    if not same.all():
        first = numbers[~same][0]
        raise ValueError(
            f"{name!r} holds {first:.9g}, which is no {dtype.name}. Without dtype= "
            f"lists of numbers stay {numbers.dtype.name}"
        )
    return converted


def _image(name: str, reading: Reading, record: bytes) -> np.ndarray:
    data = _single(name, record)
    if not isinstance(data, bytes):
        raise ValueError(f"{name!r} is no image but numbers: pass their shape=")
    try:
        return reading.decode(data)
    except ValueError as error:
        raise ValueError(
            f"{name!r} is no image: {error}. Raw pixels need shape=, and bytes of "
            "tf.io.serialize_tensor need parse="
        ) from error
