"""Does it help to take the rows of a class from different cameras?

    python examples/benchmarks/spread.py characters.npz --keep runs/spread

`characters.npz` holds `images` (n, height, width) uint8, `labels` (n,), `fonts` (n,) and
`names`, the names of the fonts: pictures of characters in many typefaces. The class is the
character; the camera is the typeface, or the style of the typeface. The network learns
from some characters in some typefaces and is judged on other characters in other
typefaces, across cameras: rows of the same character and camera are left out of a ranking.

Each training is made with `spread=` and without, with equal steps and seeds:

- `all`: every typeface of the training. There is one picture of a character in a typeface,
  so K rows of it are always in K typefaces; a style has one to seven typefaces.
- `skewed`: a character is there in all typefaces of one style, and in two others of other
  styles, as a person is seen much by one camera and seldom by the others.
"""

import argparse
import pathlib

import keras
import numpy as np

import kerastrip

STEPS, MARGIN = 1000, 0.5
METRICS = ("map", "cmc@1")
STYLES = {
    "brush": ("AoyagiKouzanT", "kouzan-mouhitsu-gyosho", "KouzanBrushFontSousyo"),
    "hand": ("KleeOne-Regular", "setofont"),
    "kai": ("LXGWWenKai-Regular", "ukai", "TW-Kai-98_1", "cwfs"),
    "round": ("MTLmr3m", "cwyen"),
    "odd": ("DotGothic16-Regular", "SmileySans-Oblique"),
    "serif": (
        "OradanoGSRR",
        "dejima-mincho-r227",
        "BIZUDMincho-Regular",
        "NotoSerifCJK-Bold",
        "sawarabi-mincho-medium",
        "ipaexm",
        "uming",
    ),
}  # and "sans", all the others
COMPARED = (  # what is learned from, the camera, P and K
    ("all", "typeface", 16, 4),
    ("all", "style", 16, 4),
    ("mild", "style", 16, 4),
    ("skewed", "style", 16, 4),
    ("skewed", "style", 32, 2),
)


def load(path):
    """The images, labels and cameras, and the rows to learn from and to judge by."""
    with np.load(path) as file:
        images, labels, fonts, names = (
            file[key] for key in ("images", "labels", "fonts", "names")
        )
    of_font = {font: style for style, some in STYLES.items() for font in some}
    styles = np.array([of_font.get(name, "sans") for name in names])
    _, unseen = kerastrip.split_classes(labels, test=530, seed=0)
    # Of every style some typefaces are held out.
    _, new_fonts = kerastrip.split_samples(styles, test=0.3, seed=0)
    held_label = np.isin(np.arange(len(labels)), unseen)
    held_font = np.isin(fonts, new_fonts)
    cameras = {"typeface": names[fonts], "style": styles[fonts]}
    rows = {"all": np.flatnonzero(~held_label & ~held_font)}
    for name, fewest in (("mild", 2), ("skewed", 4)):
        rows[name] = skewed(rows["all"], labels, cameras["style"], fewest)
    judged = np.flatnonzero(held_label & held_font)
    return images[..., None], labels, cameras, rows, judged


def skewed(rows, labels, styles, fewest):
    """Of each label all rows of one style, `fewest` at least, and two rows of others."""
    rng, kept = np.random.default_rng(0), []
    order = rows[np.argsort(labels[rows], kind="stable")]
    for group in np.split(order, np.flatnonzero(np.diff(labels[order])) + 1):
        found, counts = np.unique(styles[group], return_counts=True)
        main = styles[group] == rng.choice(found[counts >= fewest])
        kept += [*group[main], *rng.choice(group[~main], 2, replace=False)]
    return np.sort(kept)


def build_model(shape):
    layers = keras.layers
    images = keras.Input(shape)
    x = layers.Rescaling(1 / 255)(images)
    for filters in (32, 64, 128):
        x = layers.Conv2D(filters, 3, padding="same", use_bias=False)(x)
        x = layers.ReLU()(layers.BatchNormalization(momentum=0.9)(x))
        x = layers.MaxPooling2D()(x)
    x = layers.Dense(128)(layers.Flatten()(x))
    return keras.Model(images, layers.UnitNormalization(dtype="float32")(x))


def train(images, labels, judged, **options):
    """The embeddings of the judged images after one training."""
    keras.utils.set_random_seed(options["seed"])
    sampler = kerastrip.PKSampler(
        images, labels, batches_per_epoch=STEPS, workers=1, **options
    )
    model = build_model(images.shape[1:])
    schedule = keras.optimizers.schedules.CosineDecay(2e-3, STEPS)
    model.compile(keras.optimizers.Adam(schedule), kerastrip.TripletLoss(margin=MARGIN))
    model.fit(
        sampler, shuffle=False, verbose=0, callbacks=[kerastrip.EpochSync(sampler)]
    )
    return kerastrip.embed(model, judged)


def cameras_met(labels, cameras, steps=200, **options):
    """How many different cameras the K rows of a class come from, in the mean."""
    plan = kerastrip.PKPlan(labels, **options)
    codes = np.unique(cameras, return_inverse=True)[1]
    rows = np.concatenate([plan.indices(0, step % len(plan)) for step in range(steps)])
    ordered = np.sort(codes[rows].reshape(-1, plan.samples_per_class), axis=1)
    return 1 + np.count_nonzero(np.diff(ordered), axis=1).mean()


def judge(embeddings, labels, cameras):
    """(classes, 3): of each class the sums of map and cmc@1, and the queries."""
    sums = []
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        figures = kerastrip.evaluation.retrieval_metrics(
            embeddings[own],
            labels[own],
            groups=cameras[own],
            gallery=embeddings,
            gallery_labels=labels,
            gallery_groups=cameras,
            metrics=METRICS,
        )
        queries = figures["queries"]
        sums.append([*(figures[metric] * queries for metric in METRICS), queries])
    return np.array(sums)


def interval(difference, queries):
    """Where a difference of means lies in 95 % of samples of the classes."""
    drawn = np.random.default_rng(0).integers(0, len(queries), (2000, len(queries)))
    means = difference[drawn].sum(axis=1) / queries[drawn].sum(axis=1)
    return np.percentile(means, (2.5, 97.5))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("characters", type=pathlib.Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--keep",
        type=pathlib.Path,
        default="runs/spread",
        help="folder of embeddings; a training that left its embeddings is not repeated",
    )
    args = parser.parse_args(argv)
    args.keep.mkdir(parents=True, exist_ok=True)
    images, labels, cameras, rows, judged = load(args.characters)

    print("| learned from, camera, P x K | spread | cameras | map by seed | cmc@1 |")
    print("|---|---|---|---|---|")
    for learned, camera, p, k in COMPARED:
        own, words, found = rows[learned], cameras[camera], []
        shape = {"classes_per_batch": p, "samples_per_class": k}
        for spread in (None, words[own]):
            sums = []
            for seed in range(args.seeds):
                name = "plain" if spread is None else camera
                path = args.keep / f"{learned}-{p}x{k}-{name}-{seed}.npy"
                if not path.exists():
                    options = {**shape, "spread": spread, "seed": seed}
                    data = images[own], labels[own], images[judged]
                    np.save(path, train(*data, **options))
                sums.append(judge(np.load(path), labels[judged], words[judged]))
            found.append(np.array(sums))  # (seeds, classes, 3)
            average, first = found[-1].sum(axis=1).T[:-1] / found[-1].sum(axis=1).T[-1]
            met = cameras_met(labels[own], words[own], **shape, spread=spread)
            print(
                f"| {learned}, {camera}, {p} x {k} | {'yes' if spread is not None else 'no'} "
                f"| {met:.2f} | {' '.join(f'{value:.4f}' for value in average)} "
                f"| {first.mean():.4f} |"
            )
        plain, spread = found
        queries = plain[0, :, -1]
        difference = (spread - plain)[..., 0].mean(axis=0)  # (classes,)
        low, high = interval(difference, queries)
        print(
            f"| difference of map {difference.sum() / queries.sum():+.4f} "
            f"({low:+.4f} to {high:+.4f}) |"
        )


if __name__ == "__main__":
    main()
