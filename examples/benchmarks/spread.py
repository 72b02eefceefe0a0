"""What `spread=` and re-ranking are worth: characters found again in other typefaces.

    python examples/benchmarks/spread.py characters.npz

`characters.npz` holds `images` (n, height, width) uint8, `labels` (n,), `fonts` (n,) and
`names`, the names of the fonts. The class is the character; the camera is the typeface, or
the style of the typeface (brush, serif, ...). The network learns from some characters in
some typefaces, and is judged on other characters in other typefaces, across cameras: rows
of the same character and camera are left out of a ranking. It learns

- from `all`: every typeface of the training;
- from `mild` and `skewed`: each character in all typefaces of one style, and in two others
  of other styles, as somebody is seen much by one camera and seldom by others. In `mild`
  the one style has two typefaces or more, in `skewed` four or more.

The second table looks for each held-out character in one row, among n rows of each
character in other typefaces.
"""

import argparse
import pathlib

import keras
import numpy as np

import kerastrip

STEPS, MARGIN = 1000, 0.5
METRICS = ("map", "cmc@1", "minp")
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


def trained(start, seeds, *data, **options):
    """The embeddings of `train` with each seed, kept in files that begin with `start`."""
    runs = []
    for seed in range(seeds):
        path = start.with_name(f"{start.name}-{seed}.npy")
        if not path.exists():
            np.save(path, train(*data, seed=seed, **options))
        runs.append(np.load(path))
    return runs


def cameras_met(labels, cameras, steps=200, **options):
    """How many different cameras the K rows of a class come from, in the mean."""
    plan = kerastrip.PKPlan(labels, **options)
    codes = np.unique(cameras, return_inverse=True)[1]
    rows = np.concatenate(
        [plan.indices(*divmod(step, len(plan))) for step in range(steps)]
    )
    ordered = np.sort(codes[rows].reshape(-1, plan.samples_per_class), axis=1)
    return 1 + np.count_nonzero(np.diff(ordered), axis=1).mean()


def judge(embeddings, labels, cameras):
    """(classes, 4): of each class the sums of the three metrics, and the queries."""
    sums = []
    for label in np.unique(labels):
        own = labels == label
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


def print_row(title, met, sums):
    """One row of the first table, of the (seeds, classes, 4) `sums` of `judge`."""
    sums = sums.sum(axis=1).T  # (4, seeds)
    figures = sums[:-1] / sums[-1]
    seeds = ", ".join(f"{value:.3f}" for value in figures[0])
    means = [f"{mean:.3f}" for mean in figures.mean(axis=1)]
    print(f"| {title} | {met:.2f} | {means[0]} ({seeds}) | {means[1]} | {means[2]} |")


def print_difference(plain, spread):
    """The difference of `map`, and where it lies in 95 % of samples of the classes.

    Args:
        plain, spread: (seeds, classes, 4), of `judge`.
    """
    queries = plain[0, :, -1]
    difference = (spread - plain)[..., 0].mean(axis=0)  # (classes,)
    drawn = np.random.default_rng(0).integers(0, len(queries), (2000, len(queries)))
    means = difference[drawn].sum(axis=1) / queries[drawn].sum(axis=1)
    low, high = np.percentile(means, (2.5, 97.5))
    mean = difference.sum() / queries.sum()
    print(f"| difference | | {mean:+.3f} ({low:+.3f} to {high:+.3f}) | | |")


def print_reranked(runs, labels):
    """`map` by distance and re-ranked, by the number of right rows in the gallery."""
    ways = (False, True, {"k1": 6, "k2": 2})
    shuffled = np.random.default_rng(0).permutation(len(labels))
    print("\n| right rows | by distance | re-ranked | re-ranked, k1 = 6, k2 = 2 |")
    print("|---|---|---|---|")
    for right in (1, 2, 4, 7):
        of_class = [shuffled[labels[shuffled] == label] for label in np.unique(labels)]
        of_class = [rows for rows in of_class if len(rows) > 7]
        queries = np.array([rows[-1] for rows in of_class])
        gallery = np.concatenate([rows[:right] for rows in of_class])
        found = [
            kerastrip.evaluation.retrieval_metrics(
                embeddings[queries],
                labels[queries],
                gallery=embeddings[gallery],
                gallery_labels=labels[gallery],
                metrics="map",
                rerank=way,
            )["map"]
            for way in ways
            for embeddings in runs
        ]
        means = np.reshape(found, (len(ways), -1)).mean(axis=1)
        print(f"| {right} | " + " | ".join(f"{mean:.3f}" for mean in means) + " |")


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

    print("| learned from, camera, P x K | cameras | map (by seed) | cmc@1 | minp |")
    print("|---|---|---|---|---|")
    for learned, camera, p, k in COMPARED:
        own, words, found = rows[learned], cameras[camera], []
        data = images[own], labels[own], images[judged]
        title = f"{learned}, {camera}, {p} x {k}"
        for name, spread in (("plain", None), (camera, words[own])):
            options = {"classes_per_batch": p, "samples_per_class": k, "spread": spread}
            start = args.keep / f"{learned}-{p}x{k}-{name}"
            runs = trained(start, args.seeds, *data, **options)
            found.append([judge(run, labels[judged], words[judged]) for run in runs])
            met = cameras_met(labels[own], words[own], **options)
            print_row(title, met, np.array(found[-1]))
            title = "the same, `spread=`"
        print_difference(*map(np.array, found))
    print_reranked(runs, labels[judged])


if __name__ == "__main__":
    main()
