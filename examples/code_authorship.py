"""Who wrote this? Source code told apart by the package that it comes from.

No images here: a small character network learns from pieces of the Python files that
are installed beside this one, one class for each package, and is judged on packages
that it has never seen. Two questions are asked there. Verification: do two pieces come
from one package? Retrieval: is the piece nearest to this one from its package? The
cosine of the frequencies of character trigrams answers the same, and is printed beside.

    python examples/code_authorship.py --out runs/code

reads what is in `site-packages` (no download), so figures differ with what is
installed. The name of a package is blotted out in its own files.
"""

import argparse
import collections
import pathlib
import re
import sysconfig
import time

import keras
import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer

import kerastrip

CHARACTERS = "\n\t" + "".join(map(chr, range(32, 127)))  # code 0: any other
LENGTH = 512
DIM = 128


# Data ---------------------------------------------------------------------------------


def pieces_of(package, rng, most, per_file=6):
    """Up to `most` pieces of LENGTH characters from the files of a package folder."""
    own_name = re.compile(re.escape(package.name), re.IGNORECASE)
    pieces = []
    files = sorted(package.rglob("*.py"))
    for path in (files[i] for i in rng.permutation(len(files))):
        if re.search(r"vendor|extern|_pb2", str(path.relative_to(package.parent))):
            continue  # written by others, or by a machine
        text = own_name.sub("_", path.read_text("utf-8", errors="replace"))
        starts = np.arange(0, len(text) - LENGTH + 1, LENGTH)
        for start in rng.permutation(starts)[:per_file]:
            pieces.append(text[start : start + LENGTH])
        if len(pieces) >= most:
            break
    return pieces[:most]


def load(root, seed, fewest=60, most=150):
    """Pieces of code and the names of their packages, from every package in `root`."""
    rng = np.random.default_rng(seed)
    pieces, names = [], []
    for package in sorted(path for path in root.iterdir() if path.is_dir()):
        found = pieces_of(package, rng, most) if package.name.isidentifier() else []
        if len(found) >= fewest:
            pieces += found
            names += [package.name] * len(found)
    return pieces, np.array(names)


def encode(pieces):
    """(pieces, LENGTH) int32 codes of the characters."""
    codes = collections.defaultdict(
        int, zip(CHARACTERS, range(1, 1 + len(CHARACTERS)), strict=True)
    )
    return np.array([[codes[c] for c in piece] for piece in pieces], np.int32)


# Model --------------------------------------------------------------------------------


def build_model(width):
    """Codes of characters -> embedding."""
    layers = keras.layers
    codes = keras.Input((LENGTH,), dtype="int32")
    x = layers.Embedding(1 + len(CHARACTERS), 32)(codes)
    for filters, pool in ((width, 2), (width, 2), (2 * width, 2)):
        x = layers.Conv1D(filters, 5, padding="same", use_bias=False)(x)
        x = layers.ReLU()(layers.BatchNormalization()(x))
        x = layers.MaxPooling1D(pool)(x)
    x = layers.Concatenate()(
        [layers.GlobalMaxPooling1D()(x), layers.GlobalAveragePooling1D()(x)]
    )
    x = layers.Dense(DIM)(layers.Dropout(0.2)(x))
    embedding = layers.UnitNormalization(dtype="float32", name="style")(x)
    return keras.Model(codes, embedding)


def shifted(codes, rng):
    """A piece that begins up to an eighth later and loses some characters."""
    start = int(rng.integers(LENGTH // 8))
    codes = np.concatenate([codes[start:], np.zeros(start, codes.dtype)])
    return np.where(rng.random(LENGTH) < 0.05, 0, codes).astype(codes.dtype)


# Judging ------------------------------------------------------------------------------


def judge(rows, names, distance="euclidean"):
    """AUC, EER and the best threshold over all pairs; recall@1 among all others."""
    curve = kerastrip.verification.verification_curve(rows, names, distance=distance)
    retrieval = kerastrip.evaluation.retrieval_metrics(
        rows, names, metrics=("recall@1",), distance=distance
    )
    return curve.auc, curve.eer, curve.best("f1").threshold, retrieval["recall@1"]


def trigrams(fitted_on, pieces):
    """(pieces, features) weighted frequencies of character trigrams."""
    vectorizer = TfidfVectorizer(
        analyzer="char", ngram_range=(3, 3), sublinear_tf=True, max_features=8192
    )
    return vectorizer.fit(fitted_on).transform(pieces).toarray().astype("float32")


def print_epoch(epoch, logs):
    print(
        f"epoch {epoch + 1:>3}  loss {logs['loss']:.3f}  easy {logs['easy']:.3f}  "
        f"semi-hard {logs['semi_hard']:.3f}  hard {logs['hard']:.3f}  "
        f"val auc {logs['val_auc']:.3f}",
        flush=True,
    )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--packages", type=pathlib.Path, default=sysconfig.get_path("purelib")
    )
    parser.add_argument("--out", type=pathlib.Path, default="runs/code")
    parser.add_argument("--test", type=float, default=0.3, help="share of the packages")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--classes-per-batch", type=int, default=16)
    parser.add_argument("--samples-per-class", type=int, default=8)
    parser.add_argument("--batches-per-epoch", type=int, default=60)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--margin", type=float, default=0.2)
    parser.add_argument("--width", type=int, default=64)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()

    keras.utils.set_random_seed(args.seed)
    pieces, names = load(args.packages, args.seed)
    codes = encode(pieces)
    known, unseen = kerastrip.split_classes(names, test=args.test, seed=args.seed)
    print(
        f"{len(names)} pieces of {LENGTH} characters; {len(np.unique(names[known]))} "
        f"packages to learn from, {len(np.unique(names[unseen]))} never seen"
    )

    sampler = kerastrip.PKSampler(
        codes[known],
        names[known],
        classes_per_batch=args.classes_per_batch,
        samples_per_class=args.samples_per_class,
        batches_per_epoch=args.batches_per_epoch,
        augment=shifted,
        seed=args.seed,
    )
    model = build_model(args.width)
    steps = args.epochs * len(sampler)
    schedule = keras.optimizers.schedules.CosineDecay(args.learning_rate, steps)
    model.compile(
        keras.optimizers.Adam(schedule), kerastrip.TripletLoss(margin=args.margin)
    )
    model.fit(
        sampler,
        epochs=args.epochs,
        shuffle=False,
        verbose=0,
        callbacks=[
            kerastrip.EpochSync(sampler),
            kerastrip.MiningStats(),
            kerastrip.CollapseGuard(),
            kerastrip.VerificationEvaluation(codes[unseen], names[unseen]),
            keras.callbacks.CSVLogger(args.out / "history.csv"),
            keras.callbacks.LambdaCallback(on_epoch_end=print_epoch),
        ],
    )
    model.save(args.out / "model.keras")

    texts = np.array(pieces, dtype=object)
    figures = {
        "character trigrams": judge(
            trigrams(texts[known], texts[unseen]), names[unseen], "cosine"
        ),
        "trained network": judge(kerastrip.embed(model, codes[unseen]), names[unseen]),
    }
    print(
        f"\n{'unseen packages':<20}{'AUC':>8}{'EER':>8}{'threshold':>11}{'recall@1':>10}"
    )
    for row, (auc, eer, threshold, recall) in figures.items():
        print(f"{row:<20}{auc:>8.3f}{eer:>8.3f}{threshold:>11.3f}{recall:>10.3f}")
    print(f"\n{time.perf_counter() - start:.0f} s; files in {args.out}")
    return figures


if __name__ == "__main__":
    main()
