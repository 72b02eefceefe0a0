"""EpochSync: the epoch of `fit`, replicas, restored weights, random numbers.

Trainings that are killed and resumed: see test_resume.py.
"""

import copy
import gc
import pickle
import types
import warnings
import weakref

import keras
import numpy as np
import pytest

from kerastrip.callbacks import EpochSync
from kerastrip.callbacks.epoch_sync import sampler_beside
from kerastrip.sampling.sampler import PKSampler

LABELS = np.repeat(np.arange(6), 6)
SHAPE = {"classes_per_batch": 4, "samples_per_class": 2, "batches_per_epoch": 5}


def sampler(**arguments):
    x = np.random.default_rng(0).random((36, 3), "float32")
    return PKSampler(x, LABELS, **SHAPE, augment=jitter, **arguments)


def jitter(row, rng):
    return row + rng.random(row.shape, "float32")


@pytest.mark.backend
def test_every_sampler_follows():
    one, two = sampler(), sampler(seed=1)
    sync = EpochSync(one, two)
    for epoch in (4, 0, 9):
        sync.on_epoch_begin(epoch)
        assert one.epoch == two.epoch == epoch


@pytest.mark.backend
@pytest.mark.parametrize(
    ("samplers", "error", "words"),
    [
        ((), TypeError, "at least one sampler"),
        ((np.zeros(3),), TypeError, "set_epoch"),
        ((sampler(fixed=True),), ValueError, "fixed=True.*leave it out"),
    ],
)
def test_what_cannot_follow(samplers, error, words):
    with pytest.raises(error, match=words):
        EpochSync(*samplers)


@pytest.mark.backend
def test_replicas_are_checked_when_training_begins():
    for replicas in (1, 2, 4, 3):
        strategy = types.SimpleNamespace(num_replicas_in_sync=replicas)
        sync = EpochSync(sampler())
        sync.set_model(types.SimpleNamespace(distribute_strategy=strategy))
        if replicas != 3:
            sync.on_train_begin()  # raises nothing
        else:
            with pytest.raises(ValueError, match=r"3 replicas.*received 4.*=3"):
                sync.on_train_begin()
    model = keras.Sequential([keras.layers.Dense(6)])
    model.compile(loss="sparse_categorical_crossentropy")
    train = sampler()
    model.fit(train, callbacks=[EpochSync(train)], shuffle=False, verbose=0)


@pytest.mark.backend
def test_another_sampler_than_the_one_that_trains_is_told():
    model, train = small_model(), sampler()
    with pytest.warns(UserWarning, match="gave no batch.*the sampler that `fit` is"):
        model.fit(train, callbacks=[EpochSync(sampler())], shuffle=False, verbose=0)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*gave no batch")
        sync = EpochSync(sampler(seed=1), train)
        model.fit(train, epochs=2, callbacks=[sync], shuffle=False, verbose=0)


@pytest.mark.backend
@pytest.mark.parametrize("order", [1, -1])
def test_other_callbacks_of_a_fit_find_the_sampler(order):
    model, train = small_model(), sampler()
    sync, other = EpochSync(train), keras.callbacks.Callback()
    assert sampler_beside(other) is None
    keras.callbacks.CallbackList([sync, other][::order], model=model, epochs=1)
    assert sampler_beside(other) is train
    clone = copy.deepcopy(sync)  # is in no `fit` yet
    assert sampler_beside(clone) is None
    keras.callbacks.CallbackList([other], model=model, epochs=1)
    assert sampler_beside(other) is None  # in the next `fit`
    reference = weakref.ref(sync)
    del sync
    gc.collect()
    assert reference() is None


@pytest.mark.backend
def test_a_copy_drives_the_same_samplers():
    train = sampler(workers=0)
    sync = EpochSync(train)
    small_model().fit(train, callbacks=[sync], shuffle=False, verbose=0)
    copy.deepcopy(sync).on_epoch_begin(5)
    assert train.epoch == 5
    together = copy.deepcopy([train, sync])
    together[1].on_epoch_begin(7)
    assert (together[0].epoch, train.epoch) == (7, 5)
    carried = pickle.loads(pickle.dumps(sync))
    carried.on_epoch_begin(8)
    assert (carried.samplers[0].epoch, train.epoch) == (8, 5)


def small_model(*layers):
    model = keras.Sequential([keras.Input((3,)), *layers, keras.layers.Dense(6)])
    model.compile(loss="sparse_categorical_crossentropy")
    return model


class Restore(keras.callbacks.Callback):
    """Sets the steps that the optimizer has taken, as a backup would."""

    def __init__(self, steps):
        super().__init__()
        self.steps = steps

    def on_train_begin(self, logs=None):
        self.model.optimizer.iterations.assign(self.steps)


@pytest.mark.parametrize(
    ("restored", "epoch", "told"),
    [(10, 2, 0), (15, 2, 5), (5, 0, 5), (20, 0, 20), (12, 2, 2), (16, 2, 0)],
)
def test_restored_weights_that_are_ahead_are_told(restored, epoch, told):
    train = sampler(workers=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        small_model().fit(
            train,
            initial_epoch=epoch,
            epochs=epoch + 2,
            shuffle=False,
            verbose=0,
            callbacks=[EpochSync(train), Restore(restored)],
        )
    messages = [str(each.message) for each in caught if each.category is UserWarning]
    assert len(messages) == bool(told)
    assert not told or f"{told} steps ahead of epoch {epoch}" in messages[0]


@pytest.mark.backend
def test_random_layers_go_on_from_the_epoch():
    model = small_model(keras.layers.Dropout(0.5), keras.layers.GaussianNoise(0.5))
    train, states = sampler(workers=0), {}

    def note(epoch, logs):
        states[epoch] = [
            keras.ops.convert_to_numpy(variable + 0).tolist()
            for variable in model.non_trainable_variables
        ]

    callbacks = [EpochSync(train), keras.callbacks.LambdaCallback(on_epoch_begin=note)]
    options = {"shuffle": False, "verbose": 0, "callbacks": callbacks}
    model.fit(train, epochs=3, **options)
    whole = dict(states)
    (one, start), (other, same) = whole[0]
    assert one != other
    assert start == same == 0
    assert len({count for epoch in whole for _, count in whole[epoch]}) == 3
    model.fit(train, epochs=3, initial_epoch=2, **options)
    assert states[2] == whole[2]
