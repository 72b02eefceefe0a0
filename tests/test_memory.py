"""EmbeddingMemory: what is mined in it, when, and that it survives."""

import keras
import numpy as np
import pytest
import reference
from keras import ops

from kerastrip import EmbeddingMemory, MiningStats, PKSampler, TripletLoss, mining

BACKEND = keras.backend.backend()
BATCH, STEPS, SIZE = 6, 5, 20
RNG = np.random.default_rng(0)
X = RNG.normal(size=(BATCH * STEPS, 3)).astype("float32")
Y = RNG.integers(0, 4, BATCH * STEPS).astype("int32")


def build(mining="semi_hard", jit_compile=False, **options):
    """A model whose embedding is its input, as it learns nothing; its memory."""
    memory = EmbeddingMemory(SIZE, name="memory", **options)
    start = keras.layers.Dense(3, kernel_initializer="identity")
    model = keras.Sequential([keras.Input((3,)), start, memory])
    loss = TripletLoss(margin=0.3, mining=mining, memory=memory)
    model.compile(keras.optimizers.SGD(0.0), loss, jit_compile=jit_compile)
    return model, memory


def step(model, index, function="train_on_batch"):
    """The loss of one batch."""
    rows = slice(index * BATCH, (index + 1) * BATCH)
    return float(getattr(model, function)(X[rows], Y[rows], return_dict=True)["loss"])


def rows_of(index, used):
    """Labels and rows of that batch and the `used` before it, newest batch first."""
    batches = np.arange(len(X)).reshape(STEPS, BATCH)
    rows = np.r_[batches[index], batches[:index][::-1].ravel()[:used]]
    return Y[rows], X[rows]


def expected(index, used, mining="semi_hard", positives=False):
    """The loss of that batch."""
    values, _ = reference.triplet_loss(
        *rows_of(index, used),
        margin=0.3,
        mining=mining,
        batch=BATCH,
        positives=positives,
    )
    return values.mean()


@pytest.mark.slow
@pytest.mark.backend
@pytest.mark.parametrize(
    ("word", "positives", "jit"),
    [("semi_hard", False, True), ("hard", True, True), ("all", False, False)],
)
def test_the_loss_mines_in_past_batches(word, positives, jit):
    if jit and BACKEND == "torch":
        pytest.skip("PyTorch compiles for minutes")
    model, memory = build(word, jit, positives=positives)
    for index in range(STEPS):
        # Those of the batch itself are among the rows it holds.
        used = min(index * BATCH, SIZE - BATCH)
        assert step(model, index) == pytest.approx(
            expected(index, used, word, positives), abs=1e-5
        )
        assert int(memory.filled) == min((index + 1) * BATCH, SIZE)
    newest = np.concatenate([X[i * BATCH : (i + 1) * BATCH] for i in (4, 3, 2, 1)])
    np.testing.assert_allclose(
        ops.convert_to_numpy(memory.embeddings), newest[:SIZE], atol=1e-6
    )


@pytest.mark.backend
def test_warm_up_and_validation():
    model, memory = build(warmup=2)
    for index in range(2):
        assert step(model, index) == pytest.approx(expected(index, 0), abs=1e-5)
    before = model.get_weights()
    assert step(model, 2, "test_on_batch") == pytest.approx(expected(2, 0), abs=1e-5)
    after = model.get_weights()
    np.testing.assert_array_equal(after.pop(), 0)  # no training step
    for old, new in zip(before, after, strict=False):
        np.testing.assert_array_equal(new, old)
    assert int(memory.filled) == 2 * BATCH
    assert step(model, 2) == pytest.approx(expected(2, 2 * BATCH), abs=1e-5)


@pytest.mark.backend
def test_a_batch_larger_than_the_memory():
    memory = EmbeddingMemory(4)
    loss = TripletLoss(margin=0.3, memory=memory)
    rows = memory(X[:BATCH], training=True)
    value = float(loss(Y[:BATCH], rows))
    assert value == pytest.approx(expected(0, 0), abs=1e-5)
    np.testing.assert_array_equal(ops.convert_to_numpy(memory.labels), Y[:4])


@pytest.mark.backend
def test_the_batch_gets_the_gradient_and_the_memory_none():
    labels, past = Y[:BATCH], X[BATCH : 3 * BATCH]
    others = mining.Others(Y[BATCH : 3 * BATCH], past)

    def through_memory(x):
        memory = EmbeddingMemory(3 * BATCH, positives=True)
        loss = TripletLoss(margin=0.3, memory=memory, reduction=None)
        memory(past, training=True)
        memory.add(others.labels, past)
        return loss(labels, x)

    def plain(x):
        return mining.triplet_losses(labels, x, margin=0.3, others=others)

    if BACKEND == "jax":
        pytest.skip("variables made inside a traced function")
    found = reference.value_and_gradient(through_memory, X[:BATCH])
    wanted = reference.value_and_gradient(plain, X[:BATCH])
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5)
    np.testing.assert_allclose(found[1], wanted[1], atol=1e-5)
    assert np.abs(wanted[1]).max() > 0


@pytest.mark.backend
def test_the_embedding_is_not_pulled_together(rng):
    """Where the positives of remembered negatives move too, spread ends at 0.08."""
    keras.utils.set_random_seed(0)
    labels = np.repeat(np.arange(200), 8)
    points = rng.normal(size=(200, 32))[labels] + 0.7 * rng.normal(size=(1600, 32))
    memory = EmbeddingMemory(960, warmup=20)
    model = keras.Sequential(
        [
            keras.Input((32,)),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(16),
            keras.layers.UnitNormalization(),
            memory,
        ]
    )
    model.compile(keras.optimizers.Adam(3e-3), TripletLoss(0.4, memory=memory))
    batches = PKSampler(
        points.astype("float32"),
        labels,
        classes_per_batch=32,
        samples_per_class=2,
        batches_per_epoch=100,
        seed=0,
    )
    history = model.fit(
        batches, epochs=2, shuffle=False, verbose=0, callbacks=[MiningStats()]
    ).history
    assert history["from_memory"][-1] > 0.9
    assert history["spread"][-1] > 0.5


# The census ---------------------------------------------------------------------------


def counted(index, used, positives):
    """Triplets of that batch: all, those of the memory, the hard, the semi-hard."""
    labels, rows = rows_of(index, used)
    beside = {"batch": BATCH, "shared": positives}
    d = reference.distance_matrix(rows, "euclidean")
    triplets = reference.chosen_triplets(labels, d, 0.3, "all", **beside)
    gaps = np.array([d[a, n] - d[a, p] for a, p, n in triplets])
    remembered = [p >= BATCH or n >= BATCH for _, p, n in triplets]
    kinds = gaps <= 0, (gaps > 0) & (gaps < 0.3)
    return np.array([len(triplets), sum(remembered), *map(np.sum, kinds)])


@pytest.mark.backend
@pytest.mark.parametrize(
    ("positives", "jit"),
    [(True, False), pytest.param(False, True, marks=pytest.mark.slow)],
)
def test_what_fit_mines_and_counts_in_past_batches(positives, jit):
    if jit and BACKEND == "torch":
        pytest.skip("PyTorch compiles for minutes")
    model, memory = build(jit_compile=jit, positives=positives, warmup=1)
    seen = []
    keep = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: seen.append(dict(logs))
    )
    history = model.fit(
        X,
        Y,
        batch_size=BATCH,
        shuffle=False,
        verbose=0,
        validation_data=(X[:BATCH], Y[:BATCH]),
        callbacks=[MiningStats(per_batch=True), keep],
    ).history
    used = [0, *(min(i * BATCH, SIZE - BATCH) for i in range(1, STEPS))]
    wanted = np.array([counted(i, n, positives) for i, n in enumerate(used)])
    losses = [expected(i, n, positives=positives) for i, n in enumerate(used)]
    assert history["loss"] == pytest.approx([np.mean(losses)], abs=1e-5)
    keys = "from_memory", "hard", "semi_hard"
    for logs, (triplets, *parts) in zip(seen, wanted, strict=True):
        for key, part in zip(keys, parts, strict=True):
            assert logs[key] == np.float32(part / triplets), key
    triplets, *parts = wanted.sum(axis=0)
    for key, part in zip(keys, parts, strict=True):
        assert history[key][0] == np.float32(part / triplets), key
    assert 0.5 < history["from_memory"][0] < 1
    assert history["val_from_memory"] == [0]
    validation = counted(0, 0, positives)
    assert history["val_hard"][0] == np.float32(validation[2] / validation[0])
    assert int(memory.filled) == SIZE
    assert not model.loss.listeners


# It survives --------------------------------------------------------------------------


@pytest.mark.backend
def test_saved_models_remember(tmp_path):
    model, _ = build(positives=True)
    for index in range(3):
        step(model, index)
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "only.weights.h5")
    wanted = step(model, 3)

    with pytest.raises(ValueError, match=r"memory.*compile=False.*get_layer\('memory"):
        keras.models.load_model(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras", compile=False)
    loss = TripletLoss(margin=0.3, memory=loaded.get_layer("memory"))
    loaded.compile(keras.optimizers.SGD(0.0), loss, jit_compile=False)
    assert step(loaded, 3) == pytest.approx(wanted, abs=1e-6)

    fresh, _ = build(positives=True)
    fresh.load_weights(tmp_path / "only.weights.h5")
    assert step(fresh, 3) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.backend
def test_backup_and_restore(tmp_path):
    def fit(epochs, folder):
        model, memory = build()
        backup = keras.callbacks.BackupAndRestore(folder, delete_checkpoint=False)
        options = {"batch_size": BATCH, "shuffle": False, "verbose": 0}
        model.fit(X, Y, epochs=epochs, callbacks=[backup], **options)
        return ops.convert_to_numpy(memory.embeddings)

    fit(1, tmp_path / "one")
    resumed = fit(2, tmp_path / "one")  # the second epoch alone
    np.testing.assert_array_equal(resumed, fit(2, tmp_path / "two"))


# Arguments ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"size": 0}, ValueError, "size.*at least 1"),
        ({"size": 8.0}, TypeError, "size.*integer"),
        ({"size": 8, "warmup": -1}, ValueError, "warmup.*at least 0"),
        ({"size": 8, "positives": 1}, TypeError, "positives.*True or False"),
    ],
)
def test_bad_arguments(options, error, says):
    with pytest.raises(error, match=says):
        EmbeddingMemory(**options)


def test_what_does_not_go_together():
    with pytest.raises(ValueError, match=r"\(batch, dim\).*\(2, 2, 2\)"):
        EmbeddingMemory(8)(np.zeros((2, 2, 2)))
    with pytest.raises(TypeError, match=r"memory.*EmbeddingMemory or None"):
        TripletLoss(memory=8)
    with pytest.raises(ValueError, match=r"distance.*a loss with a memory"):
        TripletLoss(distance=np.sum, memory=EmbeddingMemory(8))
    stranger = EmbeddingMemory(8, name="stranger")
    with pytest.raises(ValueError, match=r"a layer of the model.*'stranger'.*Put it"):
        TripletLoss(memory=stranger)(np.zeros(2, "int32"), np.eye(2, dtype="float32"))
