"""Find an identity again across cameras, learned from a table of photographs.

    python examples/reidentification.py table.csv --out runs/reidentification

`table.csv` has a line for each photograph and the columns `path` (from the folder of the
table on), `identity` (a person, an animal, a car, a product) and `camera` (or the site,
the day, the session: what could be learned in place of the identity).

Whole identities are held out. Of each held-out identity and camera one photograph is a
query, the rest are the gallery. Photographs of the query's identity *and* camera are left
out of its ranking, because to find them again is no achievement.

The folder `--out` gets `model.keras`, `augmentation.json`, `reading.json` (how images are
resized: `sources.read_image`), `history.csv`, `report.html` and `neighbours.png`. The guide
beside it, `guides/reidentification.md`, tells what to change and what the figures mean.
"""

import argparse
import csv
import json
import pathlib

import keras
import numpy as np

import kerastrip  # isort: skip  (before albumentations: it keeps that off the network)
import albumentations as A

DIM = 128
WATCHED = ("map", "cmc@1", "minp")
JUDGED = ("map", "cmc@1", "cmc@5", "cmc@10", "minp")


def read_table(path):
    """The columns as arrays; `pandas.read_csv` serves as well."""
    with open(path, newline="") as file:
        lines = list(csv.DictReader(file))
    if not lines or not {"path", "identity", "camera"} <= lines[0].keys():
        raise SystemExit(f"{path} needs lines, and the columns path, identity, camera.")
    table = {name: np.array([line[name] for line in lines]) for name in lines[0]}
    table["path"] = [str(path.parent / name) for name in table["path"]]
    return table


def query_and_gallery(rows, identities, cameras):
    """Of each identity and camera with two rows or more the first; and the others."""
    pairs = np.stack([identities[rows], cameras[rows]], axis=1)
    _, first, counts = np.unique(pairs, axis=0, return_index=True, return_counts=True)
    queries = rows[np.sort(first[counts > 1])]
    return queries, np.setdiff1d(rows, queries)


def augmentation(seed):
    """What changes from photograph to photograph without making it another identity."""
    return kerastrip.Augmentation(
        A.Compose(
            [
                A.HorizontalFlip(p=0.5),
                A.Affine(translate_percent=(-0.08, 0.08), scale=(0.9, 1.1), p=0.8),
                A.RandomBrightnessContrast(p=0.5),
                A.CoarseDropout(num_holes_range=(1, 1), p=0.3),  # "random erasing"
            ]
        ),
        seed=seed,
    )


def build_model(shape, identities):
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
    logits = layers.Dense(identities, name="identity")(layers.Rescaling(10.0)(embedding))
    return keras.Model(images, [logits, embedding])


def train(photos, cameras, known, queries, gallery, args):
    """One training on the rows `known`, watched on queries and gallery."""
    keras.utils.set_random_seed(args.seed)
    subset = kerastrip.sources.Subset
    sampler = kerastrip.PKSampler(
        subset(photos, known),
        classes_per_batch=args.classes_per_batch,
        samples_per_class=args.samples_per_class,
        spread=cameras[known],  # the rows of an identity come from different cameras
        targets=("one_hot", "label"),
        augment=augmentation(args.seed),
        seed=args.seed,
    )
    print(sampler.report())
    model = build_model(photos.take([0]).shape[1:], len(sampler.classes_))
    steps = args.epochs * len(sampler)
    schedule = keras.optimizers.schedules.CosineDecay(args.learning_rate, steps)
    model.compile(
        keras.optimizers.Adam(schedule),
        loss=[
            keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1),
            kerastrip.TripletLoss(margin=0.3),
        ],
    )
    untrained = kerastrip.embed(model, photos)
    held_out = kerastrip.RetrievalEvaluation(
        subset(photos, queries),
        groups=cameras[queries],
        gallery=subset(photos, gallery),
        gallery_groups=cameras[gallery],
        metrics=("map", "cmc@1", "minp"),
    )
    model.fit(
        sampler,
        epochs=args.epochs,
        shuffle=False,
        verbose=2,
        callbacks=[
            kerastrip.EpochSync(sampler),
            kerastrip.MiningStats(),
            held_out,
            keras.callbacks.CSVLogger(args.out / "history.csv"),
            kerastrip.TrainingReport(args.out / "report.html", subset(photos, unseen)),
        ],
    )
