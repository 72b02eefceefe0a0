"""Find identities again across cameras, learned from a table of photographs.

    python examples/reidentification.py table.csv --out runs/reidentification

`table.csv` has a line for each photograph: its `path` (from the folder of the table on),
`identity` (a person, an animal, a car) and `camera` (or site, or day: whatever a network
could learn in place of the identity).

Whole identities are held out. Of each of them and each camera the first photograph is a
query, the others are the gallery. Photographs of the query's identity *and* camera are
left out of its ranking: to find the next picture of a burst is no achievement.

The folder `--out` gets `model.keras`, `reading.json` (how images are resized) and
`neighbours.png`. `guides/reidentification.md` tells what to change and what figures mean.
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
    return {name: np.array([line[name] for line in lines]) for name in lines[0]}


def split_queries(rows, identities, cameras):
    """Of each identity and camera with two rows or more the first; the other rows."""
    pairs = np.stack([identities, cameras], axis=1)[rows]
    _, first, counts = np.unique(pairs, axis=0, return_index=True, return_counts=True)
    queries = rows[first[counts > 1]]
    return queries, np.setdiff1d(rows, queries)


def augmentation(seed):
    """What changes from photograph to photograph of one identity."""
    moves = A.HorizontalFlip(), A.Affine(translate_percent=(-0.08, 0.08), p=0.8)
    hides = A.RandomBrightnessContrast(), A.CoarseDropout(p=0.3)  # "random erasing"
    return kerastrip.Augmentation(A.Compose([*moves, *hides]), seed=seed)


def build_model(shape, identities):
    """Images -> [logits, embedding]; the logits are read from the embedding."""
    layers = keras.layers
    images = keras.Input(shape)
    x, filters = layers.Rescaling(1 / 255)(images), 32
    # For photographs put a trained network in place of the loop, for example
    # `x = keras.applications.EfficientNetV2B0(include_top=False)(images)`.
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


def train(sampler, watch, args):
    """The trained network; `watch` looks at the held-out identities after each epoch."""
    model = build_model((*args.size, 3), len(sampler.classes_))
    decay = keras.optimizers.schedules.CosineDecay(1e-3, args.epochs * len(sampler))
    softmax = keras.losses.CategoricalCrossentropy(
        from_logits=True, label_smoothing=0.1
    )
    triplets = kerastrip.TripletLoss(margin=0.3)
    model.compile(keras.optimizers.Adam(decay), [softmax, triplets])
    callbacks = [kerastrip.EpochSync(sampler), kerastrip.MiningStats(), watch]
    model.fit(sampler, epochs=args.epochs, shuffle=False, callbacks=callbacks)
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
    paths = [args.table.parent / path for path in table["path"]]
    photos = kerastrip.sources.ImageFiles(paths, identities, size=args.size)
    known, unseen = kerastrip.split_classes(identities, test=args.test, seed=args.seed)
    queries, gallery = split_queries(unseen, identities, cameras)
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

    left_out = {"groups": cameras[queries], "gallery_groups": cameras[gallery]}
    watch = kerastrip.RetrievalEvaluation(
        subset(photos, queries),
        gallery=subset(photos, gallery),
        metrics=("map", "cmc@1", "minp"),
        **left_out,
    )
    model = train(sampler, watch, args)

    embeddings, figures = kerastrip.embed(model, photos), {}
    asked = embeddings[queries], identities[queries]
    among = {"gallery": embeddings[gallery], "gallery_labels": identities[gallery]}
    for name, rerank in (("by distance", False), ("re-ranked", True)):
        figures[name] = kerastrip.evaluation.retrieval_metrics(
            *asked, **among, **left_out, metrics=METRICS, rerank=rerank
        )
        print(name, *(f" {word} {figures[name][word]:.3f}" for word in METRICS))
    kerastrip.plotting.plot_neighbours(
        embeddings[unseen],
        identities[unseen],
        subset(photos, unseen),
        groups=cameras[unseen],
        path=args.out / "neighbours.png",
    )
    model.save(args.out / "model.keras")
    (args.out / "reading.json").write_text(json.dumps(photos.reading))
    return figures


if __name__ == "__main__":
    main()
