"""Train an embedding of your own images: a folder that holds one folder per class.

    python examples/image_folder.py photos --out runs/photos
    python examples/image_folder.py images_background_small1.zip \
        --label-from path --color gray --out runs/omniglot

DIRECTORY may be a zip archive, read as it stands. Whole classes are held out: the
embedding is judged by looking up every image of classes that it has never seen among
the others of those classes. Raw pixels and the untrained network stand beside it,
because they are the thing to beat; the last row averages several augmented views.

The folder `--out` gets `model.keras`, `augmentation.json`, `reading.json` (how images are
resized, which new ones must be as well: `sources.read_image`), `history.csv` and
`report.html`, a page on the training that is written anew after every epoch.

Two lines to change for your own images: what may happen to one without making it
another class (`augmentation`), and, for photographs, the network (`build_model`).
There must be four classes at least; with so few the figures mean little.
"""

import argparse
import json
import pathlib
import time

import keras
import numpy as np

import kerastrip  # isort: skip  (before albumentations: it keeps that off the network)
import albumentations as A
import cv2

DIM = 64
VIEWS = 8


def load(args):
    """The images with their labels, decoded when they are asked for.

    What cannot be read is left out: to be judged, every image is needed.
    """
    sources = kerastrip.sources
    kind = sources.ZipImages if args.directory.is_file() else sources.ImageFolder
    images = kind(
        args.directory,
        size=args.size,
        color=args.color,
        label_from=args.label_from,
        on_error="skip",
        cache="memory",
    )
    print(images)
    broken = images.find_broken()
    for why in broken.values():
        print(f"left out: {why}")
    return sources.Subset(images, np.setdiff1d(np.arange(len(images)), list(broken)))


def augmentation(seed):
    """Leaning, shifting, growing and shrinking: no letter becomes another by that.

    For photographs add A.HorizontalFlip() and A.ColorJitter(hue=(-0.05, 0.05)).
    """
    affine = A.Affine(
        rotate=(-15, 15),
        shear=(-10, 10),
        scale=(0.85, 1.15),
        translate_percent=(-0.1, 0.1),
        border_mode=cv2.BORDER_REPLICATE,
        p=1.0,
    )
    return kerastrip.Augmentation(A.Compose([affine]), seed=seed)


def build_model(shape, classes):
    """Images -> [logits, embedding]; the logits are read from the embedding.

    For photographs put a trained network in place of the loop, for example
    `keras.applications.EfficientNetV2B0(include_top=False)(images)`.
    """
    layers = keras.layers
    images = keras.Input(shape)
    x, filters = layers.Rescaling(1 / 255)(images), 32
    while min(x.shape[1:3]) > 4:
        x = layers.Conv2D(filters, 3, padding="same", use_bias=False)(x)
        x = layers.ReLU()(layers.BatchNormalization(momentum=0.9)(x))
        x, filters = layers.MaxPooling2D()(x), min(2 * filters, 128)
    x = layers.Dense(DIM)(layers.Flatten()(x))
    embedding = layers.UnitNormalization(dtype="float32", name="embedding")(x)
    logits = layers.Dense(classes, name="class")(layers.Rescaling(10.0)(embedding))
    return keras.Model(images, [logits, embedding])


def judge(embeddings, labels):
    """recall@1 and MAP@R of looking up every image among all others."""
    return kerastrip.evaluation.retrieval_metrics(
        embeddings, labels, metrics=("recall@1", "map@r")
    )


def print_epoch(epoch, logs):
    print(
        f"epoch {epoch + 1:>3}  loss {logs['loss']:.3f}  easy {logs['easy']:.3f}  "
        f"semi-hard {logs['semi_hard']:.3f}  hard {logs['hard']:.3f}  "
        f"val recall@1 {logs['val_recall@1']:.3f}",
        flush=True,
    )


def train(images, args):
    """One training: the figures of pixels, untrained and trained network."""
    keras.utils.set_random_seed(args.seed)
    count = len(np.unique(images.labels))
    if count < 4:
        raise SystemExit(
            f"{args.directory} has {count} classes. It takes at least four: two to learn "
            "from and two others to judge by."
        )
    held_out = min(max(round(args.test * count), 2), count - 2)
    fit_rows, unseen_rows = kerastrip.split_classes(
        images.labels, test=held_out, seed=args.seed
    )
    _, sizes = np.unique(images.labels[fit_rows], return_counts=True)
    classes = np.count_nonzero(sizes > 1)  # one image alone has no positive
    unseen = kerastrip.sources.Subset(images, unseen_rows)
    aug = augmentation(args.seed)
    sampler = kerastrip.PKSampler(
        kerastrip.sources.Subset(images, fit_rows),
        classes_per_batch=min(args.classes_per_batch, classes),
        samples_per_class=args.samples_per_class,
        targets=("one_hot", "label"),
        augment=aug,
        seed=args.seed,
    )
    print(sampler.report())

    pixels = unseen.take(np.arange(len(unseen)))
    model = build_model(pixels.shape[1:], len(sampler.classes_))
    steps = args.epochs * len(sampler)
    schedule = keras.optimizers.schedules.CosineDecay(args.learning_rate, steps)
    model.compile(
        keras.optimizers.Adam(schedule),
        loss=[
            kerastrip.CategoricalFocalLoss(gamma=2.0, from_logits=True),
            kerastrip.TripletLoss(margin=0.2, mining="semi_hard"),
        ],
        loss_weights=[1.0, 1.0],
    )
    figures = {
        "raw pixels": judge(pixels.reshape(len(pixels), -1), unseen.labels),
        "untrained": judge(kerastrip.embed(model, unseen), unseen.labels),
    }
    guard = kerastrip.CollapseGuard()
    model.fit(
        sampler,
        epochs=args.epochs,
        shuffle=False,
        verbose=0,
        callbacks=[
            kerastrip.EpochSync(sampler),
            kerastrip.MiningStats(),
            guard,
            kerastrip.RetrievalEvaluation(unseen),
            keras.callbacks.CSVLogger(args.out / "history.csv"),
            keras.callbacks.LambdaCallback(on_epoch_end=print_epoch),
            kerastrip.TrainingReport(args.out / "report.html", unseen, guard=guard),
        ],
    )
    # In a training of few steps the averages of BatchNormalization still lag behind.
    kerastrip.recalibrate(model, sampler)
    figures["trained"] = judge(kerastrip.embed(model, unseen), unseen.labels)
    figures[f"{VIEWS} views"] = judge(
        kerastrip.embed(model, unseen, augmentation=aug, views=VIEWS), unseen.labels
    )
    model.save(args.out / "model.keras")
    aug.save(args.out / "augmentation.json")
    (args.out / "reading.json").write_text(json.dumps(images.reading))
    return figures


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("directory", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, default="runs/image_folder")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--color", choices=("rgb", "gray"), default="rgb")
    parser.add_argument("--label-from", choices=("parent", "top", "path"))
    parser.add_argument("--test", type=float, default=0.2, help="share of the classes")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--classes-per-batch", type=int, default=16)
    parser.add_argument("--samples-per-class", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)

    start = time.perf_counter()
    figures = train(load(args), args)
    print(f"\n{'unseen classes':<16}{'recall@1':>9}{'MAP@R':>9}")
    for row, found in figures.items():
        print(f"{row:<16}{found['recall@1']:>9.3f}{found['map@r']:>9.3f}")
    print(f"\n{time.perf_counter() - start:.0f} s; files in {args.out}")
    return figures


if __name__ == "__main__":
    main()
