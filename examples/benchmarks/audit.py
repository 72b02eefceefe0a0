"""How much of what was made wrong in labels does `kerastrip.evaluation.audit` find?

    python examples/benchmarks/audit.py characters.npz

`characters.npz` holds `images` (n, height, width) uint8 and `labels` (n,). A network learns
from all classes but 500 and embeds these. Then, in their labels, 5 % of the classes
are split at random into two, 5 % are merged with another one, and 5 % of the rows get
another label. Each list is judged by its precision where its recall is 0.8, each
seed making other mistakes; "listed" is the precision and the recall of the whole list.
With `--learn noisy` the network learns from the 500 classes with the mistakes of the seed.
"""

import argparse
import time

import keras
import numpy as np

import kerastrip

SHARE = 0.05


def plant(labels, rng):
    """Labels with mistakes, and which: rows, pairs of labels, merged labels."""
    codes = np.unique(labels, return_inverse=True)[1]
    count = codes.max() + 1
    some = round(SHARE * count)
    order = rng.permutation(count)
    split, kept, gone = order[:some], order[some : 2 * some], order[2 * some : 3 * some]
    wrong = codes.copy()
    for number, code in enumerate(split):
        rows = rng.permutation(np.flatnonzero(codes == code))
        wrong[rows[: len(rows) // 2]] = count + number
    for stays, goes in zip(kept, gone, strict=True):
        wrong[codes == goes] = stays
    flipped = rng.choice(len(codes), round(SHARE * len(codes)), replace=False)
    twin = {int(code): count + number for number, code in enumerate(split)}
    twin |= {second: first for first, second in twin.items()}
    names, before = np.unique(wrong), wrong.copy()
    for row in flipped:
        own = int(before[row])
        wrong[row] = rng.choice(names[(names != own) & (names != twin.get(own, -1))])
    pairs = {(int(code), count + number) for number, code in enumerate(split)}
    return wrong, set(flipped.tolist()), pairs, set(kept.tolist())


def judged(found, planted):
    """Precision at recall 0.8, and precision and recall of all that is listed."""
    hits = np.cumsum([one in planted for one in found])
    if not len(hits):
        return 0.0, 0.0, 0.0
    place = np.searchsorted(hits, np.ceil(0.8 * len(planted)))
    at = hits[place] / (place + 1) if place < len(hits) else 0.0
    return at, hits[-1] / len(hits), hits[-1] / len(planted)


def train(images, labels, steps):
    """A small network after `steps` batches of triplets."""
    keras.utils.set_random_seed(0)
    layers = keras.layers
    inputs = keras.Input(images.shape[1:])
    x = layers.Rescaling(-1 / 255, 1)(inputs)
    for filters in (32, 64, 96, 128):
        x = layers.Conv2D(filters, 3, padding="same", use_bias=False)(x)
        x = layers.ReLU()(layers.BatchNormalization(momentum=0.9)(x))
        x = layers.MaxPooling2D()(x)
    x = layers.Dense(128)(layers.Flatten()(x))
    model = keras.Model(inputs, layers.UnitNormalization(dtype="float32")(x))
    sampler = kerastrip.PKSampler(
        images,
        labels,
        classes_per_batch=16,
        samples_per_class=4,
        batches_per_epoch=steps,
        seed=0,
    )
    schedule = keras.optimizers.schedules.CosineDecay(1e-3, steps)
    loss = kerastrip.TripletLoss(margin=0.5)
    model.compile(keras.optimizers.Adam(schedule), loss)
    model.fit(sampler, epochs=1, shuffle=False, verbose=0)
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path")
    parser.add_argument("--learn", choices=("others", "noisy"), default="others")
    parser.add_argument("--classes", type=int, default=500)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()

    with np.load(args.path) as file:
        images, labels = file["images"][..., None], file["labels"]
    order = np.random.default_rng(0).permutation(np.unique(labels))
    mine = np.isin(labels, order[: args.classes])
    if args.learn == "others":
        model = train(images[~mine], labels[~mine], args.steps)
    for seed in range(args.seeds):
        wrong, *planted = plant(labels[mine], np.random.default_rng(seed))
        if args.learn == "noisy":
            model = train(images[mine], wrong, args.steps)
        embeddings = kerastrip.embed(model, images[mine])
        start = time.perf_counter()
        found = kerastrip.evaluation.audit(embeddings, wrong)
        seconds = time.perf_counter() - start
        lists = {
            "flipped rows": [one.row for one in found.rows],
            "split classes": [(one.first, one.second) for one in found.pairs],
            "merged classes": [one.label for one in found.classes],
        }
        print(f"seed {seed}: {len(wrong)} rows, {seconds:.1f} s", flush=True)
        for (name, some), of in zip(lists.items(), planted, strict=True):
            at, precision, recall = judged(some, of)
            print(
                f"  {len(of):>4} {name:15} precision {at:.3f} at recall 0.8; "
                f"{len(some)} listed, precision {precision:.3f}, recall {recall:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
