"""Train an embedding of handwritten digits and judge it on digits it never saw.

The data are the 1,797 scanned digits (8 x 8 pixels) that scikit-learn ships. The
model learns from the digits 0 to 6. It is judged on held-out scans of those and on
the digits 7, 8 and 9, which it has never seen: an embedding is good when it puts
equal things together, known or not.

    python examples/digits.py --out runs/digits

writes `model.keras`, `augmentation.json`, `history.csv`, `figures.csv`, `mining.png`,
`embedding.png` and `report.html` (a page on the training, anew after every epoch) into
that folder, and prints a table. Raw pixels and the untrained
network stand beside the trained one, because they are the thing to beat; the last row
averages the embeddings of several augmented views of each digit.

Seven classes are few to learn from. So characters are made up that no one writes: the
upper (or left) half of one digit with the lower (or right) half of another. They join
the training as classes of their own.
"""

import argparse
import csv
import itertools
import pathlib
import time

import keras
import numpy as np
from sklearn.datasets import load_digits

import kerastrip  # isort: skip  (before albumentations: it keeps that off the network)
import albumentations as A

UNSEEN = (7, 8, 9)
DIM = 64
VIEWS = 16
COMPOSED = 100  # characters of each composed class


def load():
    """The digits: (n, 8, 8, 1) uint8 images and their names, "0" ... "9"."""
    digits = load_digits()
    images = np.round(digits.images * 255 / 16).astype("uint8")
    return images[..., None], digits.target.astype(str)


def with_composed(images, names, seed):
    """The digits, and characters composed of halves of two, as further classes."""
    rng = np.random.default_rng(seed)
    all_images, all_names = [images], [names]
    for first, second in itertools.permutations(np.unique(names), 2):
        a, b = (
            rng.choice(images[names == name], COMPOSED, replace=False)
            for name in (first, second)
        )
        all_images.append(np.concatenate([a[:, :4], b[:, 4:]], axis=1))
        all_names.append([f"{first} over {second}"] * COMPOSED)
        all_images.append(np.concatenate([a[:, :, :4], b[:, :, 4:]], axis=2))
        all_names.append([f"{first} beside {second}"] * COMPOSED)
    return np.concatenate(all_images), np.concatenate(all_names)


def build_model(classes):
    """Images -> [logits, embedding]; the logits are read from the embedding."""
    layers = keras.layers
    images = keras.Input((8, 8, 1))
    x = layers.Rescaling(1 / 255)(images)
    for filters in (64, 128):
        x = layers.Conv2D(filters, 3, padding="same", use_bias=False)(x)
        x = layers.ReLU()(layers.BatchNormalization()(x))
        x = layers.MaxPooling2D()(x)
    x = layers.Dense(DIM)(layers.Flatten()(x))
    embedding = layers.UnitNormalization(dtype="float32", name="embedding")(x)
    logits = layers.Dense(classes, name="digit")(layers.Rescaling(10.0)(embedding))
    return keras.Model(images, [logits, embedding])


def augmentation(seed):
    """What a hand does to a digit: it leans, shifts, grows and shrinks."""
    return kerastrip.Augmentation(
        A.Affine(
            rotate=(-15, 15),
            shear=(-15, 15),
            scale=(0.8, 1.2),
            translate_percent=(-0.12, 0.12),
            p=1.0,
        ),
        seed=seed,
    )


def judge(judged, embed):
    """recall@1 and MAP@R of looking up every digit among all others."""
    figures = {}
    for part, (images, names) in judged.items():
        metrics = kerastrip.evaluation.retrieval_metrics(embed(images), names)
        figures[part] = metrics["recall@1"], metrics["map@r"]
    return figures


def print_epoch(epoch, logs):
    print(
        f"epoch {epoch + 1:>3}  loss {logs['loss']:.3f}  easy {logs['easy']:.3f}  "
        f"semi-hard {logs['semi_hard']:.3f}  hard {logs['hard']:.3f}  "
        f"val map@r {logs['val_map@r']:.3f}",
        flush=True,
    )


def train(images, names, args):
    """One training: the figures of pixels, untrained and trained network."""
    keras.utils.set_random_seed(args.seed)
    unseen = np.isin(names, [str(digit) for digit in UNSEEN])
    seen_images, seen_names = images[~unseen], names[~unseen]
    fit_rows, held_out = kerastrip.split_samples(seen_names, seed=args.seed)
    judged = {
        "seen": (seen_images[held_out], seen_names[held_out]),
        "unseen": (images[unseen], names[unseen]),
    }

    aug = augmentation(args.seed)
    train_set = kerastrip.PKSampler(
        *with_composed(seen_images[fit_rows], seen_names[fit_rows], args.seed),
        classes_per_batch=args.classes_per_batch,
        samples_per_class=args.samples_per_class,
        batches_per_epoch=args.batches_per_epoch,
        targets=("one_hot", "label"),
        augment=aug,
        seed=args.seed,
    )
    val_set = kerastrip.PKSampler(
        *judged["seen"],
        classes_per_batch=7,
        samples_per_class=8,
        targets=("one_hot", "label"),
        classes=train_set.classes_,
        fixed=True,
    )

    model = build_model(len(train_set.classes_))
    steps = args.epochs * len(train_set)
    schedule = keras.optimizers.schedules.CosineDecay(args.learning_rate, steps)
    model.compile(
        keras.optimizers.Adam(schedule),
        loss=[
            kerastrip.CategoricalFocalLoss(gamma=2.0, from_logits=True),
            kerastrip.TripletLoss(margin=0.2, mining="semi_hard"),
        ],
        loss_weights=[args.focal_weight, args.triplet_weight],
    )
    figures = {
        "raw pixels": judge(judged, lambda x: x.reshape(len(x), -1)),
        "untrained": judge(judged, lambda x: kerastrip.embed(model, x)),
    }
    shown = [np.concatenate(part) for part in zip(*judged.values(), strict=True)]
    guard = kerastrip.CollapseGuard()
    history = model.fit(
        train_set,
        validation_data=val_set,
        epochs=args.epochs,
        shuffle=False,
        verbose=0,
        callbacks=[
            kerastrip.EpochSync(train_set),
            kerastrip.MiningStats(),
            kerastrip.RetrievalEvaluation(*judged["seen"]),
            keras.callbacks.CSVLogger(args.out / "history.csv"),
            keras.callbacks.LambdaCallback(on_epoch_end=print_epoch),
            guard,
            kerastrip.TrainingReport(
                args.out / "report.html", *shown, guard=guard, title="Digits"
            ),
        ],
    ).history
    figures["trained"] = judge(judged, lambda x: kerastrip.embed(model, x))
    figures[f"{VIEWS} views"] = judge(
        judged,
        lambda x: kerastrip.embed(model, x, augmentation=aug, views=VIEWS),
    )

    model.save(args.out / "model.keras")
    aug.save(args.out / "augmentation.json")
    kerastrip.plotting.plot_mining(history, path=args.out / "mining.png")
    kerastrip.plotting.plot_embeddings(
        kerastrip.embed(model, shown[0]), shown[1], path=args.out / "embedding.png"
    )
    return figures, history, reload_difference(model, aug, images[unseen], args.out)


def reload_difference(model, aug, images, out):
    """The largest change of an embedding after a trip through the disk."""
    loaded = keras.models.load_model(out / "model.keras")
    loaded_aug = kerastrip.Augmentation.load(out / "augmentation.json")
    before = kerastrip.embed(model, images, augmentation=aug, views=2)
    after = kerastrip.embed(loaded, images, augmentation=loaded_aug, views=2)
    return float(np.abs(before - after).max())


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default="runs/digits")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--classes-per-batch", type=int, default=16)
    parser.add_argument("--samples-per-class", type=int, default=4)
    parser.add_argument("--batches-per-epoch", type=int, default=40)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--focal-weight", type=float, default=1.0)
    parser.add_argument("--triplet-weight", type=float, default=0.1)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)

    start = time.perf_counter()
    figures, history, difference = train(*load(), args)

    print(f"\n{'':<12}{'seen digits 0-6':>20}{'unseen digits 7-9':>20}")
    print(f"{'':<12}" + f"{'recall@1':>12}{'MAP@R':>8}" * 2)
    for row, parts in figures.items():
        cells = "".join(f"{r:>12.3f}{m:>8.3f}" for r, m in parts.values())
        print(f"{row:<12}{cells}")
    print(f"\n{'triplets':<12}{'easy':>8}{'semi-hard':>12}{'hard':>8}")
    for row, epoch in (("first epoch", 0), ("last epoch", -1)):
        easy, semi, hard = (
            history[key][epoch] for key in ("easy", "semi_hard", "hard")
        )
        print(f"{row:<12}{easy:>8.3f}{semi:>12.3f}{hard:>8.3f}")
    print(f"\nreloaded from disk: embeddings differ by at most {difference:.1e}")
    print(f"{time.perf_counter() - start:.0f} s; files in {args.out}")
    with open(args.out / "figures.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["embedding", "digits", "recall@1", "map@r"])
        for row, parts in figures.items():
            writer.writerows([row, part, *values] for part, values in parts.items())


if __name__ == "__main__":
    main()
