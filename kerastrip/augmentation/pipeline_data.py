"""The data that goes into a pipeline and comes out: an image, or a dict of targets.

*Targets* is the word of albumentations for all that is transformed alike: the image, its
masks, boxes and keypoints. albumentations silently leaves some inputs as they are, and
spoils others. Such inputs are refused here.

    batch -> samples() -> sample -> check_image() or check_targets() -> pipeline
                                                                           |
    batch of views <- targets() <- CollectedViews.put() <- view <----------+
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kerastrip import _checks

__all__ = [
    "CollectedViews",
    "check_image",
    "check_targets",
    "samples",
]

_UINT8, _FLOAT32 = np.dtype("uint8"), np.dtype("float32")
_MASKS = ("uint8", "uint16", "int16", "int32", "float32")
_ROUNDING = 1e-3  # how far outside [0, 1] a float image may lie
# Types of results that are stacked to an array. All others, such as strings, stay a list.
_ARRAYS = (np.ndarray, np.number, np.bool_)


def check_image(name: str, image: Any) -> None:
    """TypeError or ValueError unless `image` is one image, uint8 or float32 in [0, 1]."""
    if not isinstance(image, np.ndarray):
        raise _checks.type_error(name, "a NumPy array", image)
    shape, expected = image.shape, "(height, width) or (height, width, channels)"
    if len(shape) not in (2, 3):
        advice = "Use aug.batch(images, *key) for several." if len(shape) == 4 else ""
        raise _checks.value_error(name, f"one image {expected}", image, advice)
    if len(shape) == 3 and _is_channels_first(shape):
        advice = "Channels come last: np.moveaxis(image, 0, -1)."
        raise _checks.value_error(name, expected, image, advice)
    if image.dtype == _UINT8:
        return
    expected = "an image of uint8, or of float32 in [0, 1]"
    if image.dtype != _FLOAT32:
        advice = "Keep images uint8, as they are decoded, or convert them to float32."
        raise _checks.type_error(name, expected, image, advice)
    # NaN fails both comparisons, so that it is refused too.
    low, high = image.min(), image.max()
    if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):
        advice = (
            "albumentations would clip them. Keep images uint8 and scale them in the "
            "model (keras.layers.Rescaling), or scale them to [0, 1] before."
        )
        received = _checks.Told(f"values from {low:g} to {high:g}")
        raise _checks.value_error(name, expected, received, advice)


def _is_channels_first(shape: tuple[int, ...]) -> bool:
    """Whether (a, b, c) can hardly be (height, width, channels).

    That is so for 3 or 4 channels of an image with usual proportions, and for 1 channel
    of a square image. Patches of 3 x 3 pixels with 103 bands, and signals
    (1, time, features), are taken for what they are.

        (3, 224, 224)   (1, 28, 28)   (4, 480, 640)      channels first: refused
        (3, 3, 103)     (1, 500, 12)  (28, 28, 1)        accepted
    """
    channels, *size = shape
    least, most = min(size), max(size)
    return least >= 8 and (
        (channels in (3, 4) and most <= 4 * least) or (channels == 1 and least == most)
    )


def check_targets(pipeline: Any, targets: dict[str, Any]) -> None:
    """Refuses a dict of targets that `pipeline` would not transform alike."""
    if "image" not in targets:
        raise _checks.value_error("image", "a dict with the key 'image'", targets)
    # A further target has a name of its own and the kind of a known target.
    kinds = getattr(pipeline, "additional_targets", {})
    known = getattr(pipeline, "available_keys", ())
    size = np.shape(targets["image"])[:2]
    for name, value in targets.items():
        kind = kinds.get(name, name)
        if kind == "image":
            check_image(name, value)
        elif kind in ("mask", "masks"):
            for mask in value if isinstance(value, (list, tuple)) else [value]:
                if str(getattr(mask, "dtype", "")) not in _MASKS:
                    advice = "OpenCV cannot warp others: use mask.astype('uint8')."
                    expected = f"a mask as an array of {', '.join(_MASKS)}"
                    raise _checks.type_error(name, expected, mask, advice)
        elif kind in ("bboxes", "keypoints"):
            if kind not in getattr(pipeline, "processors", {}):
                option = {"bboxes": "bbox_params", "keypoints": "keypoint_params"}[kind]
                expected = f"albumentations.Compose(..., {option}=...) for {name!r}"
                raise _checks.value_error("pipeline", expected, pipeline)
        # An array of the size of the image is meant to be transformed with the image.
        elif name not in known and np.ndim(value) > 1 and np.shape(value)[:2] == size:
            advice = (
                "It has the size of the image and would stay as it is. Declare it: "
                f"Compose(..., additional_targets={{{name!r}: 'image'}}) or 'mask'."
            )
            raise _checks.value_error(
                name, "a target that the pipeline knows", value, advice
            )


def samples(images: Any, rows: Any = None) -> list:
    """The samples of a batch as a list of images, or of dicts of targets.

    Args:
        images: array or list of images, or a dict of columns: one list for each target.
        rows: the samples to take. Default: all.
    """
    if rows is not None:
        rows = np.asarray(rows).tolist()
        if isinstance(images, dict):
            images = {n: [column[row] for row in rows] for n, column in images.items()}
        else:
            images = [images[row] for row in rows]
    if isinstance(images, dict):
        lengths = {name: len(column) for name, column in images.items()}
        if len(set(lengths.values())) > 1:
            raise _checks.value_error("images", "targets of one length", lengths)
        # {"image": [i0, i1], "mask": [m0, m1]} -> [{"image": i0, "mask": m0}, ...]
        columns = zip(*images.values(), strict=True)
        rows = [dict(zip(images, column, strict=True)) for column in columns]
    else:
        rows = list(images)
    if not rows:
        raise _checks.value_error("images", "at least one image", images)
    return rows


class CollectedViews:
    """The views of a batch, put together: arrays are stacked, all else stays in lists.

    Args:
        pipeline: says which targets (boxes, keypoints and their labels) may differ in
            number from image to image; these stay lists.
        shape: (batch,) or (batch, views).
        out: None, or a dict of arrays to write into, by target.
    """

    def __init__(self, pipeline: Any, shape: tuple[int, ...], out: Any):
        self._shape, self._out = shape, dict(out or {})
        # target -> (array of all views, (shape, dtype) of one view or None)
        self._columns: dict[str, tuple[np.ndarray, Any]] = {}
        self._lists = {"bboxes", "keypoints", "masks"}
        for processor in getattr(pipeline, "processors", {}).values():
            self._lists.update(processor.data_fields)
            self._lists.update(processor.params.label_fields or ())

    def put(self, index: tuple[int, ...], name: str, value: Any) -> None:
        """Writes one target of one view; ValueError if its size or dtype differs."""
        if name not in self._columns:
            self._columns[name] = self._column(name, value)
        column, layout = self._columns[name]
        if layout is not None and (value.shape, value.dtype) != layout:
            raise ValueError(
                f"The pipeline must give every `{name}` of a batch one size and dtype: "
                f"received {layout[0]} {layout[1]} first and {value.shape} "
                f"{value.dtype} at position {index[0]}. Begin it with "
                "albumentations.RandomResizedCrop(size=(height, width)) or end it "
                "with albumentations.Resize(height, width)."
            )
        column[index] = value

    def _column(self, name: str, value: Any) -> tuple[np.ndarray, Any]:
        """An array for a target of all views, and the (shape, dtype) of each value.

        The array holds Python objects, and (shape, dtype) is None, for what stays a list.
        """
        if name in self._lists or not isinstance(value, _ARRAYS):
            return np.empty(self._shape, object), None
        shape, dtype = self._shape + value.shape, value.dtype
        out = self._out.get(name)
        if out is None:
            out = np.empty(shape, dtype)
        elif out.shape != shape or not np.can_cast(dtype, out.dtype):
            expected = f"an array of shape {shape} that holds {dtype}"
            raise _checks.value_error("out", expected, out)
        return out, (value.shape, dtype)

    def targets(self) -> dict[str, Any]:
        """The collected views: an array or a list for each target."""
        return {
            name: column.tolist() if layout is None else column
            for name, (column, layout) in self._columns.items()
        }
