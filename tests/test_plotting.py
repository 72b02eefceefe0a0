"""Figures: what is drawn is the data, the file is a picture, bad input is told."""

import numpy as np
import pytest

from kerastrip import plotting

HISTORY = {
    "easy": [0.2, 0.5, 0.7],
    "semi_hard": [0.5, 0.3, 0.2],
    "hard": [0.3, 0.2, 0.1],
    "loss": [1.0, 0.5, 0.25],
}


def test_mining_stacks_the_fractions_and_draws_the_loss(tmp_path):
    figure = plotting.plot_mining(HISTORY, path=tmp_path / "mining.png")
    fractions, losses = figure.axes
    tops = [area.get_paths()[0].vertices[:, 1].max() for area in fractions.collections]
    # From the bottom up: hard, hard + semi-hard, all three.
    np.testing.assert_allclose(tops, [0.3, 0.8, 1.0])
    np.testing.assert_allclose(losses.lines[0].get_ydata(), HISTORY["loss"])
    assert (tmp_path / "mining.png").read_bytes().startswith(b"\x89PNG")


def test_mining_prefix_reads_the_validation():
    history = {"val_" + key: values for key, values in HISTORY.items()}
    assert len(plotting.plot_mining(history, prefix="val_").axes) == 2
    with pytest.raises(ValueError, match=r"`history`.*easy, semi_hard, hard.*val_easy"):
        plotting.plot_mining(history)


def test_mining_draws_on_given_axes():
    from matplotlib.figure import Figure

    figure = Figure()
    ax = figure.add_subplot()
    assert plotting.plot_mining(HISTORY, ax=ax) is figure
    assert len(ax.collections) == 3


def test_embeddings_keep_the_plane_of_largest_variance(rng):
    plane = rng.normal(size=(50, 2)) * [5.0, 2.0]
    rotation, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    embeddings = np.c_[plane, np.zeros((50, 4))] @ rotation + 3.0
    labels = np.arange(50) % 2
    ax = plotting.plot_embeddings(embeddings, labels, names=["even", "odd"]).axes[0]
    drawn = np.concatenate([points.get_offsets() for points in ax.collections])
    expected = np.concatenate([plane[labels == label] for label in (0, 1)])

    def distances(points):
        return np.linalg.norm(points[:, None] - points[None], axis=-1)

    np.testing.assert_allclose(distances(drawn), distances(expected), atol=1e-9)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["even", "odd"]


def test_embeddings_of_many_classes_have_no_legend(rng):
    ax = plotting.plot_embeddings(rng.normal(size=(60, 3)), np.arange(60)).axes[0]
    assert ax.get_legend() is None
    assert len({tuple(points.get_facecolor()[0]) for points in ax.collections}) == 60


@pytest.mark.parametrize("channels", [(), (1,), (3,)])
def test_batch_has_a_row_for_each_class(rng, channels, tmp_path):
    images = rng.integers(0, 256, (7, 5, 5, *channels), dtype=np.uint8)
    figure = plotting.plot_batch(
        images, [4, 4, 4, 9, 9, 9, 9], names=["four", "nine"], path=tmp_path / "b.png"
    )
    assert [ax.get_ylabel() for ax in figure.axes] == ["four", "", "", ""] + [
        "nine",
        "",
        "",
        "",
    ]
    shown = [ax.images[0].get_array() for ax in figure.axes if ax.images]
    assert len(shown) == 7
    np.testing.assert_array_equal(shown[3], images[3].reshape(shown[3].shape))


def test_float_images_outside_0_1_are_scaled(rng):
    figure = plotting.plot_batch(rng.normal(size=(2, 4, 4)) * 9, [0, 0])
    shown = np.stack([ax.images[0].get_array() for ax in figure.axes])
    assert shown.min() == 0
    assert shown.max() == 1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: plotting.plot_embeddings(np.zeros(4), [0] * 4), "`embeddings`"),
        (lambda: plotting.plot_embeddings(np.zeros((4, 1)), [0] * 4), "dim >= 2"),
        (lambda: plotting.plot_embeddings(np.zeros((4, 2)), [0] * 3), "`labels`"),
        (lambda: plotting.plot_batch(np.zeros((4, 2)), [0] * 4), "`images`"),
        (lambda: plotting.plot_batch(np.zeros((4, 2, 2)), [0] * 3), "`labels`"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()
