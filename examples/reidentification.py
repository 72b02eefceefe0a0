"""Find identities again across cameras, learned from a table of photographs.

    python examples/reidentification.py table.csv --out runs/reidentification

`table.csv` has a line for each photograph: its `path` (from the folder of the table on),
`identity` (a person, an animal, a car) and `camera` (or site, or day: whatever a network
could learn in place of the identity).

Whole identities are held out. Of each of them and each camera the first photograph is a
query, the others are the gallery. Photographs of the query's identity *and* camera are
left out of its ranking: to find the next picture of a burst is no achievement.

The folder `--out` gets `model.keras`, `augmentation.json`, `reading.json` (how images are
resized: `sources.read_image`), `report.html` and `neighbours.png`. What to change, and
what the figures mean, stands in `guides/reidentification.md`.
"""

import argparse
import csv
import json
import pathlib

import keras
import numpy as np

import kerastrip  # isort: skip  (before albumentations: it keeps that off the network)
import albumentations as A

METRICS = ("map", "cmc@1", "cmc@5", "cmc@10", "minp")
OPTIONS = {"epochs": 30, "classes-per-batch": 16, "samples-per-class": 4, "seed": 0}


def read_table(path):
    """The columns as arrays."""
    with open(path, newline="") as file:
        lines = list(csv.DictReader(file))
    if not lines or not {"path", "identity", "camera"} <= lines[0].keys():
        raise SystemExit(f"{path} needs lines with path, identity, camera.")
    table = {name: np.array([line[name] for line in lines]) for name in lines[0]}
    table["path"] = [str(path.parent / name) for name in table["path"]]
    return table


def split_queries(rows, identities, cameras):
    """Of each identity and camera with two rows or more the first; the other rows."""
    pairs = np.stack([identities, cameras], axis=1)[rows]
    _, first, counts = np.unique(pairs, axis=0, return_index=True, return_counts=True)
    queries = rows[first[counts > 1]]
    return queries, np.setdiff1d(rows, queries)


def augmentation(seed):
    """What changes from photograph to photograph without another identity."""
    steps = [
        A.HorizontalFlip(p=0.5),
        A.Affine(translate_percent=(-0.08, 0.08), scale=(0.9, 1.1), p=0.8),
        A.RandomBrightnessContrast(p=0.5),
        A.CoarseDropout(num_holes_range=(1, 1), p=0.3),  # "random erasing"
    ]
    return kerastrip.Augmentation(A.Compose(steps), seed=seed)


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
    x = layers.Dense(128)(layers.Flatten()(x))
    embedding = layers.UnitNormalization(dtype="float32", name="embedding")(x)
    logits = layers.Dense(identities, name="identity")(
        layers.Rescaling(10.0)(embedding)
    )
    return keras.Model(images, [logits, embedding])


def train(sampler, callbacks, args):
    """The trained network."""
    model = build_model((*args.size, 3), len(sampler.classes_))
    steps = args.epochs * len(sampler)
    model.compile(
        keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(1e-3, steps)),
        loss=[
            keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1),
            kerastrip.TripletLoss(margin=0.3),
        ],
    )
    callbacks = [kerastrip.EpochSync(sampler), kerastrip.MiningStats(), *callbacks]
    model.fit(
        sampler, epochs=args.epochs, shuffle=False, verbose=2, callbacks=callbacks
    )
    # In a training of few steps the averages of BatchNormalization still lag behind.
    kerastrip.recalibrate(model, sampler)
    return model


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("table", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, default="runs/reidentification")
    parser.add_argument("--size", type=int, nargs=2, default=(128, 64))
    parser.add_argument("--test", type=float, default=0.3, help="share of identities")
    for name, default in OPTIONS.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    keras.utils.set_random_seed(args.seed)

    table, subset = read_table(args.table), kerastrip.sources.Subset
    identities, cameras = table["identity"], table["camera"]
    photos = kerastrip.sources.ImageFiles(table["path"], identities, size=args.size)
    known, unseen = kerastrip.split_classes(identities, test=args.test, seed=args.seed)
    queries, gallery = split_queries(unseen, identities, cameras)
    aug = augmentation(args.seed)
    sampler = kerastrip.PKSampler(
        subset(photos, known),
        classes_per_batch=args.classes_per_batch,
        samples_per_class=args.samples_per_class,
        spread=cameras[known],  # the rows of an identity come from different cameras
        targets=("one_hot", "label"),
        augment=aug,
        seed=args.seed,
    )
    print(sampler.report())

    asked, searched = subset(photos, queries), subset(photos, gallery)
    left_out = {"groups": cameras[queries], "gallery_groups": cameras[gallery]}
    watch = kerastrip.RetrievalEvaluation(
        asked, gallery=searched, metrics=("map", "cmc@1", "minp"), **left_out
    )
    held_out = subset(photos, unseen), identities[unseen]
    page = args.out / "report.html"
    report = kerastrip.TrainingReport(page, *held_out, groups=cameras[unseen])
    model = train(sampler, [watch, report], args)

    figures = {}
    for name, rerank in (("by distance", False), ("re-ranked", True)):
        figures[name] = kerastrip.evaluation.retrieval_metrics(
            kerastrip.embed(model, asked),
            asked.labels,
            gallery=kerastrip.embed(model, searched),
            gallery_labels=searched.labels,
            metrics=METRICS,
            rerank=rerank,
            **left_out,
        )
        print(name, *(f"{word} {figures[name][word]:.3f}" for word in METRICS))
    kerastrip.plotting.plot_neighbours(
        kerastrip.embed(model, held_out[0]),
        held_out[1],
        held_out[0],
        groups=cameras[unseen],
        path=args.out / "neighbours.png",
    )
    model.save(args.out / "model.keras")
    aug.save(args.out / "augmentation.json")
    (args.out / "reading.json").write_text(json.dumps(photos.reading))
    return figures


if __name__ == "__main__":
    main()
