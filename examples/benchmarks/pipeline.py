"""From samples to batches: the sampler beside bare loops, Keras, tf.data and PyTorch.

    python examples/benchmarks/pipeline.py [--only augment jpeg transport peers]

Batches of 128 images, or of 64 JPEGs. Four tables:

- augment: RandomResizedCrop, HorizontalFlip and ColorJitter of images in memory. The
  loop makes the same calls of albumentations and writes into a batch. Wanted: one
  thread at least 0.90 of the loop; two processes at least 1.6 x one thread at 64
  pixels and 1.8 x at 224.
- jpeg: the same after decoding JPEGs of 512 pixels, at 224. Wanted: 1.8 x one thread.
- transport: `fit` of a model that does nothing on batches that are ready, 128x64x64x3;
  milliseconds a batch, those of `fit` itself included: "one thread" makes them where
  Keras asks for them. Wanted: at most 6 from worker processes.
- peers: JPEGs of 512 pixels decoded, cropped to 224, flipped and made brighter by two
  threads or processes, beside a tf.data pipeline and a PyTorch DataLoader. Wanted: at
  least as fast. tf.data can also decode no more than the crop, which OpenCV cannot.

Contestants take turns; the fastest and the median repetition are shown, and the median
of the ratios of each turn. Ratios hold within one run only: "spin" says what two
processes that share nothing reach at it.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import statistics
import subprocess
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations as A
import cv2
import keras
import numpy as np

from kerastrip import PKSampler

SAMPLES, CLASSES, K = 256, 32, 4
LABELS = np.arange(SAMPLES) % CLASSES
SHAPE = (512, 512, 3)  # of the decoded JPEGs


def photo(rng, size):
    """Smooth noise of every scale: as a JPEG about as large as a photograph."""
    image = np.zeros((size, size, 3))
    for scale in (4, 16, 64, 256):
        noise = rng.normal(size=(scale, scale, 3)) / scale**0.54
        image += cv2.resize(noise, (size, size), interpolation=cv2.INTER_CUBIC)
    image = 128 + 48 * image / image.std()
    return np.clip(image, 0, 255).astype("uint8")


class Jpegs:
    """A source that decodes; it keeps the files in memory."""

    thread_safe = True

    def __init__(self):
        rng = np.random.default_rng(0)
        self.files = [
            cv2.imencode(".jpg", photo(rng, SHAPE[0]), [cv2.IMWRITE_JPEG_QUALITY, 90])[
                1
            ]
            for _ in range(SAMPLES)
        ]
        self.labels = LABELS

    def __len__(self):
        return len(self.files)

    def decode(self, index):
        return cv2.imdecode(self.files[index], cv2.IMREAD_COLOR_RGB)

    def take(self, indices):
        batch = np.empty((len(indices), *SHAPE), "uint8")
        for image, index in zip(batch, indices, strict=True):
            image[...] = self.decode(index)
        return batch


class Ready:
    """A source whose batches are made already."""

    def __init__(self, batch):
        self.batch, self.labels = batch, LABELS

    def __len__(self):
        return len(self.labels)

    def take(self, indices):
        return self.batch[: len(indices)]


def jitter(size):
    crop = A.RandomResizedCrop((size, size), scale=(0.5, 1))
    return A.Compose([crop, A.HorizontalFlip(), A.ColorJitter()])


def brighter(size):
    light = A.RandomBrightnessContrast(0.2, 0, p=1)
    return A.Compose([A.RandomCrop(size, size), A.HorizontalFlip(), light])


def sampler(x, batch, steps=10**6, **options):
    return PKSampler(
        x,
        None if hasattr(x, "labels") else LABELS,
        classes_per_batch=batch // K,
        samples_per_class=K,
        batches_per_epoch=steps,
        **options,
    )


MODES = {
    "one thread": {"workers": 0},
    "two threads": {"workers": 2},
    "two processes": {"workers": 2, "use_multiprocessing": True},
}


def drained(train):
    """A contestant: makes so many batches, as fast as they come."""
    epochs = itertools.count(step=2)  # what was made ahead last time is of no use

    def run(count):
        train.set_epoch(next(epochs))
        for step in range(count):
            train[step]

    return run


class Nothing(keras.Model):
    """What is left of `fit` is the feeding."""

    def train_step(self, data):
        return {"sum": keras.ops.sum(data[1])}


def fitted(batches):
    """A contestant: `fit` of a model that does nothing."""
    model = Nothing()
    model.compile()

    def run(count):
        model.fit(batches, shuffle=False, verbose=0)

    return run


def spin(steps):
    while steps:
        steps -= 1


def spun(processes):
    """A contestant: counts down, in processes that share nothing."""
    pool = multiprocessing.get_context("fork").Pool(processes)

    def run(count):
        pool.map(spin, [2 * 10**7 // processes] * processes, chunksize=1)

    return run


def race(contestants, count, rounds):
    """Seconds a batch of every repetition, in turns.

    The first is not counted: there the process still pays for its forks, by a copy of
    every page that it writes to (0.2 s in all).
    """
    times = {name: [] for name in contestants}
    for turn in range(-1, rounds):
        for name in list(contestants)[:: 1 if turn % 2 else -1]:
            begun = time.perf_counter()
            contestants[name](count)
            if turn >= 0:
                times[name].append((time.perf_counter() - begun) / count)
            time.sleep(0.3)  # batches made ahead are finished
    return times


def faster(times, name, base):
    """How many times `name` is as fast as `base`: the fastest, the median of turns."""
    turns = [b / s for b, s in zip(times[base], times[name], strict=True)]
    return min(times[base]) / min(times[name]), statistics.median(turns)


def table(title, times, base, batch=None):
    """Fastest and median, and how many times faster than `base` (median of turns)."""
    print(f"\n{title}\n")
    unit = "ms a batch" if batch is None else "images/s"
    print(f"| | {unit} | median | x {base} | median |")
    print("|---|---|---|---|---|")
    for name, seconds in times.items():
        if name.startswith("spin"):
            continue
        picks = [min(seconds), statistics.median(seconds)]
        shown = [1e3 * s if batch is None else batch / s for s in picks]
        figures = [f"{value:,.{2 if batch is None else 0}f}" for value in shown]
        print(f"| {name} | {' | '.join(figures)} | ", end="")
        ratios = faster(times, name, base)
        print(" | ".join(f"{ratio:.2f}" for ratio in ratios), "|", flush=True)


def augment(rounds):
    for size, count in ((64, 120), (224, 40)):
        rng = np.random.default_rng(0)
        images = np.stack([photo(rng, size) for _ in range(SAMPLES)])
        pipeline, batch = jitter(size), 128
        contestants = {
            name: sampler(images, batch, augment=pipeline, **mode)
            for name, mode in MODES.items()
        }
        plan = contestants["one thread"].plan

        def loop(count, pipeline=pipeline, images=images, plan=plan):
            for step in range(count):
                rows = plan.indices(0, step)
                out = np.empty_like(images[: len(rows)])
                for position, row in enumerate(rows):
                    out[position] = pipeline(image=images[row])["image"]

        runs = {name: drained(train) for name, train in contestants.items()}
        spins = {"spin 1": spun(1), "spin 2": spun(2)}
        pair = {"loop": loop, "one thread": runs["one thread"]}
        times = race(pair, count // 12, 6 * rounds)
        table(f"augment, {size} pixels, short turns", times, "loop", batch)
        times = race({**runs, **spins}, count, rounds)
        table(f"augment, {size} pixels", times, "one thread", batch)
        summary(times)
        close(contestants)


def jpeg(rounds):
    source, batch = Jpegs(), 64
    size = statistics.mean(map(len, source.files))
    contestants = {
        name: sampler(source, batch, augment=jitter(224), **mode)
        for name, mode in MODES.items()
    }
    runs = {name: drained(train) for name, train in contestants.items()}
    spins = {"spin 1": spun(1), "spin 2": spun(2)}
    times = race({**runs, **spins}, 16, rounds)
    table(f"jpeg, {size / 1e3:.0f} kB each", times, "one thread", batch)
    summary(times)
    close(contestants)


class Plain(keras.utils.PyDataset):
    """A batch that is ready, by the threads or processes of Keras."""

    def __init__(self, batch, steps, **options):
        super().__init__(**options)
        self._made, self._steps = (batch, LABELS[: len(batch)].astype("int32")), steps

    def __len__(self):
        return self._steps

    def __getitem__(self, step):
        return self._made


def transport(rounds):
    steps = 100
    for dtype in ("uint8", "float32"):
        batch = np.zeros((128, 64, 64, 3), dtype)
        contestants = {}
        for name, mode in MODES.items():
            contestants[name] = sampler(Ready(batch), 128, steps, **mode)
            contestants[f"Keras, {name}"] = Plain(batch, steps, **mode)
        runs = {name: fitted(train) for name, train in contestants.items()}
        table(f"transport, {dtype}", race(runs, steps, rounds), "two processes")
        close(contestants)


def peers(rounds):
    source, batch, size, count = Jpegs(), 64, 224, 12
    contestants = {
        name: sampler(source, batch, augment=brighter(size), **mode)
        for name, mode in MODES.items()
    }
    runs = {name: drained(train) for name, train in contestants.items()}
    for fused in (False, True):
        name = "tf.data, decoding the crop only" if fused else "tf.data"
        runs[name] = from_tf_data(source.files, batch, size, fused)
    if loader := from_torch(source, batch, brighter(size), count):
        runs["DataLoader, two workers"] = loader
    times = race(runs, count, rounds)
    table("peers", times, "two processes", batch)
    close(contestants)


def from_tf_data(files, batch, size, fused):
    import tensorflow as tf

    def load(data):
        if fused:
            corner = tf.random.uniform((2,), maxval=SHAPE[0] - size + 1, dtype=tf.int32)
            window = tf.concat([corner, (size, size)], axis=0)
            image = tf.io.decode_and_crop_jpeg(data, window, channels=3)
        else:
            image = tf.io.decode_jpeg(data, channels=3)
            image = tf.image.random_crop(image, (size, size, 3))
        image = tf.image.random_flip_left_right(image)
        return tf.image.random_brightness(image, 0.2)

    dataset = tf.data.Dataset.from_tensor_slices([file.tobytes() for file in files])
    dataset = dataset.repeat().map(load, num_parallel_calls=2).batch(batch).prefetch(2)

    def run(count):
        for _ in dataset.take(count):
            pass

    return run


class Torch:
    """The dataset of a DataLoader."""

    def __init__(self, source, pipeline, length):
        self.source, self.pipeline, self.length = source, pipeline, length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        image = self.source.decode(index % len(self.source))
        return self.pipeline(image=image)["image"], index


def from_torch(source, batch, pipeline, count):
    try:
        from torch.utils.data import DataLoader
    except ImportError:
        return None
    loader = DataLoader(
        Torch(source, pipeline, count * batch),
        batch_size=batch,
        num_workers=2,
        persistent_workers=True,
        multiprocessing_context="fork",
        worker_init_fn=lambda _: cv2.setNumThreads(0),
    )

    def run(count):
        for _ in loader:
            pass

    return run


def summary(times):
    """The ratios that are wanted."""
    pairs = dict.fromkeys(("two threads", "two processes"), "one thread")
    told = []
    for name, base in {**pairs, "spin 2": "spin 1"}.items():
        fastest, median = faster(times, name, base)
        told.append(f"{name} {fastest:.2f} (median {median:.2f})")
    print(f"\nx one thread: {', '.join(told)}", flush=True)


def close(contestants):
    for each in contestants.values():
        if isinstance(each, PKSampler):
            each.close()


PARTS = {"augment": augment, "jpeg": jpeg, "transport": transport, "peers": peers}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if len(options.only) > 1:  # each in a process of its own, untouched by the others
        for part in options.only:
            command = [__file__, "--only", part, "--rounds", str(options.rounds)]
            subprocess.run([sys.executable, *command], check=True)
        return
    print(f"{os.cpu_count()} cores, {keras.backend.backend()}")
    PARTS[options.only[0]](options.rounds)


if __name__ == "__main__":
    sys.exit(main())
