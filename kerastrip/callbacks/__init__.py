"""Callbacks for `Model.fit`."""

from kerastrip.callbacks.epoch_sync import EpochSync as EpochSync
