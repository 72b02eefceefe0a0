"""Which files of a folder, or members of an archive, are images, and their labels."""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from kerastrip import _checks
from kerastrip._labels import label_array

# Endings of image files. A key is the ending of an encoder without which OpenCV may have
# been built; the endings under "" can always be read.
_EXTENSIONS = {
    "": "bmp dib jfif jpe jpeg jpg pbm pgm png pnm ppm tif tiff webp",
    ".avif": "avif",
    ".gif": "gif",
    ".jp2": "j2k jp2",
}
# Endings of files that often lie beside images and are no images. All other files that
# are left out are named in a warning.
_NO_IMAGES = (
    "cfg csv db htm html ini json jsonl lnk lock log md py sh toml tsv txt url xml yaml "
    "yml zip"
)
_LABEL_FROM = ("parent", "top", "path")


class _Walk:
    """A walk through folders: the files, links and pipes it met, as relative paths.

    `visited` holds the real paths of the folders that it was in.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.links: list[tuple[str, str]] = []
        self.pipes: list[str] = []
        self.visited: set[str] = set()

    def visit(self, folder: str, within: str) -> None:
        """Notes all files of a folder and the folders below; links are not followed.

        Args:
            folder: its real path.
            within: the path by which it was reached, with a "/" at the end, or "".
        """
        todo = [(folder, within)]
        while todo:
            folder, within = todo.pop()
            if folder in self.visited:
                continue
            self.visited.add(folder)
            with os.scandir(folder) as entries:
                for entry in entries:
                    name = within + entry.name
                    if entry.name.startswith("."):
                        continue
                    if entry.is_symlink():
                        self.links.append((name, entry.path))
                    elif entry.is_dir():
                        todo.append((entry.path, name + "/"))
                    else:
                        (self.names if entry.is_file() else self.pipes).append(name)


def files_below(root: str) -> tuple[list[str], list[str]]:
    """The files in a folder and in all folders below it, each real file once.

    The files in the folders themselves come first, then the files in folders that links
    lead to, then the files that links lead to. So a file that is reached in several ways
    has the name of the place where it lies:

        photos/cat/1.jpg                      "cat/1.jpg"
        photos/cat/2.jpg -> photos/cat/1.jpg  left out: it is there already
        photos/pets -> photos/cat             left out: the folder was visited
        photos/dog -> /other/dog              "dog/...", the files of /other/dog

    Returns:
        The relative paths, with "/"; and notes on links and pipes that were left out.
    """
    real, walk = os.path.realpath(root), _Walk()
    walk.visit(real, "")
    again, to_files = [], []
    # Folders that links lead to may hold links themselves, hence the loop.
    while walk.links:
        links, walk.links = sorted(walk.links), []
        for name, path in links:
            if not os.path.isdir(path):
                to_files.append((name, path))
                continue
            target = os.path.realpath(path)
            above = f"{real}{os.sep}".startswith(target.rstrip(os.sep) + os.sep)
            if above or target in walk.visited:
                again.append(name)
            else:
                walk.visit(target, name + "/")
    reached: set[str] = set()
    # `realpath` asks the system for every part of a path. Many links lead to one folder,
    # so its answer is kept.
    real_folder = functools.cache(os.path.realpath)
    for name, path in sorted(to_files):
        if not is_image(name):
            continue
        # One step along the link, and the real folder there. Only a link to a link is
        # resolved as a whole.
        aim = os.path.join(os.path.dirname(path), os.readlink(path))
        folder, base = os.path.split(aim)
        folder = real_folder(folder)
        aim = os.path.join(folder, base)
        if os.path.islink(aim):
            folder, base = os.path.split(aim := os.path.realpath(aim))
        if not os.path.exists(aim):
            walk.names.append(name)  # a broken link: an error when it is read
        elif aim in reached or (folder in walk.visited and not base.startswith(".")):
            again.append(name)
        elif os.path.isfile(aim):
            reached.add(aim)
            walk.names.append(name)
        else:
            walk.pipes.append(name)
    notes = (
        (again, "links that lead to what is there already, or to a folder above ({})"),
        (walk.pipes, "pipes or devices ({})"),
    )
    return walk.names, [text.format(_some(names)) for names, text in notes if names]


def _some(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    text = ", ".join(repr(name) for name in sorted(names)[:3])
    return f"{text} and {len(names) - 3} more" if len(names) > 3 else text


def labelled_images(
    name: str, paths: Iterable[str], label_from: Any, notes: Sequence[str] = ()
) -> tuple[list[str], np.ndarray]:
    """The images among `paths`, sorted, and their labels.

    One warning names the files that were left out.

    Args:
        name: the argument that the paths come from, for errors.
        paths: relative paths, with "/" between folders.
        label_from: as for `ImageFolder`.
        notes: words on other files that were left out.

    Returns:
        Paths and labels.

    Raises:
        TypeError, ValueError: as `ImageFolder`.
    """
    if label_from is not None and not callable(label_from):
        _checks.one_of("label_from", label_from, _LABEL_FROM)
    paths = list(paths)
    images = sorted(path for path in paths if is_image(path))
    notes = [*_left_out(paths, images), *notes]
    if not images:
        expected = f"images ({', '.join(sorted(_extensions()))}) in class folders"
        advice = " ".join(f"Left out: {note}." for note in notes)
        raise _checks.value_error(name, expected, _checks.Told("none"), advice)
    if callable(label_from):
        pairs = [(path, label_from(path)) for path in images]
        pairs = [(path, label) for path, label in pairs if label is not None]
        if not pairs:
            expected = "a label for some of the images"
            raise _checks.value_error(
                "label_from", expected, _checks.Told("None for all")
            )
        images, labels = [list(column) for column in zip(*pairs, strict=True)]
    else:
        labels = [_folder_label(name, path, label_from) for path in images]
    checked = label_array(labels, "labels" if label_from is None else "label_from")
    if checked.ndim == 1 and (checked == checked[0]).all():
        received = _checks.Told(f"one, {labels[0]!r}, with {len(labels)} images")
        advice = (
            "Give the folder above, or read images without classes with "
            "ImageFiles(paths)."
        )
        raise _checks.value_error(name, "at least two classes", received, advice)
    if notes:
        _checks.warn(f"`{name}` holds more than is read. Left out: {'; '.join(notes)}.")
    return images, checked


def _left_out(paths: Sequence[str], images: Sequence[str]) -> list[str]:
    """Notes on files in class folders that may be images but are not read."""
    known = {*_NO_IMAGES.split()}
    left = [
        path
        for path in set(paths).difference(images)
        if "/" in path and not _is_hidden(path) and _ending(path) not in known
    ]
    if not left:
        return []
    counts = Counter(_ending(path) for path in left).most_common()
    endings = [
        f"{count} {f'.{end}' if end else 'without ending'}" for end, count in counts
    ]
    more = f" and {len(endings) - 10} other endings" if len(endings) > 10 else ""
    read = {path.rpartition("/")[0] for path in images}
    lost = {path.rpartition("/")[0] for path in left} - read
    whole = f", the whole of {_some([*lost])} among them" if lost else ""
    return [
        f"{len(left)} files by their ending ({', '.join(endings[:10])}{more}){whole} "
        "(convert them, or give them to ImageFiles, which looks into the file, if they "
        "are AVIF, BMP, GIF, JPEG, JPEG 2000, PGM, PNG, PPM, TIFF or WebP)"
    ]


def _folder_label(name: str, path: str, word: str | None) -> str:
    """The label of an image by its folders; `word` is None, "parent", "top" or "path"."""
    *folders, _ = path.split("/")
    if not folders:
        expected = "every image in the folder of its class"
        advice = "A callable label_from= makes labels of file names."
        raise _checks.value_error(name, expected, path, advice)
    if word == "path":
        return "/".join(folders)
    if word is None and len(folders) > 1:
        expected = "a word, as folders lie within folders"
        advice = (
            f"For {path!r} the class is {folders[-1]!r} with 'parent', {folders[0]!r} "
            f"with 'top', {'/'.join(folders)!r} with 'path'."
        )
        raise _checks.value_error("label_from", expected, None, advice)
    return folders[0] if word == "top" else folders[-1]


def is_image(path: str) -> bool:
    """Whether a path has the extension of an image and no hidden part."""
    return _ending(path) in _extensions() and not _is_hidden(path)


@functools.cache
def _extensions() -> frozenset[str]:
    import cv2

    return frozenset(
        extension
        for encoder, group in _EXTENSIONS.items()
        if not encoder or cv2.haveImageWriter(encoder)
        for extension in group.split()
    )


def _is_hidden(path: str) -> bool:
    return path.startswith(".") or "/." in path


def _ending(path: str) -> str:
    _, dot, ending = path.rpartition("/")[2].lower().rpartition(".")
    return ending if dot else ""
