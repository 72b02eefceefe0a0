"""Figures: what is drawn is the data, the file is a picture, bad input is told."""

import numpy as np
import pytest

from kerastrip import plotting
from kerastrip._neighbours import confusions, nearest_others
from kerastrip.verification import verification_curve

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
    assert len(np.unique(ax.collections[0].get_facecolor(), axis=0)) == 60


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
    assert shown.max() == 255


def test_mining_of_one_epoch_is_a_band():
    history = {key: values[:1] for key, values in HISTORY.items()}
    ax = plotting.plot_mining(history, epochs=[7]).axes[0]
    corners = ax.collections[-1].get_paths()[0].vertices
    assert (corners[:, 0].min(), corners[:, 0].max()) == (6.5, 7.5)
    assert corners[:, 1].max() == pytest.approx(1.0)


@pytest.fixture
def rows(rng):
    codes = np.arange(40) % 4
    return rng.normal(size=(40, 3)) + rng.normal(size=(4, 3))[codes], codes


def brute_force(embeddings):
    embeddings = np.float32(embeddings)
    return np.linalg.norm(embeddings[:, None] - embeddings[None], axis=-1)


def test_distance_histograms_hold_every_pair(rows, tmp_path):
    embeddings, codes = rows
    curve = verification_curve(embeddings, codes)
    path = tmp_path / "distances.png"
    figure = plotting.plot_distances(curve, margin=0.5, bins=12, path=path)
    positives, negatives, margin = figure.axes[0].patches
    first, second = np.triu_indices(40, 1)
    distances = brute_force(embeddings)[first, second]
    same = codes[first] == codes[second]
    for drawn, values in ((positives, distances[same]), (negatives, distances[~same])):
        density, edges, _ = drawn.get_data()
        expected, _ = np.histogram(values, edges, density=True)
        np.testing.assert_allclose(density, expected, atol=0.02 * expected.max())
        assert (density * np.diff(edges)).sum() == pytest.approx(1.0)
    assert margin.get_x() == pytest.approx(distances[same].mean(), rel=1e-5)
    assert margin.get_width() == pytest.approx(0.5)
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("log", [False, True])
def test_roc_goes_through_the_points_of_the_curve(rows, log):
    curve = verification_curve(*rows)
    line, eer, _ = plotting.plot_roc(curve, log=log).axes[0].lines
    far, tar = line.get_data()
    assert set(zip(far, tar, strict=True)) <= set(
        zip(curve.far, curve.tar, strict=True)
    )
    assert (far[-1], tar[-1]) == (1, 1)
    assert abs(np.diff(tar)).max() < 0.02  # no gap is left out
    np.testing.assert_allclose(eer.get_xydata(), [[curve.eer, 1 - curve.eer]])


def numbered(count):
    """Images that tell their row."""
    return np.broadcast_to(
        np.arange(count, dtype=np.uint8)[:, None, None], (count, 4, 4)
    )


def row_shown(ax):
    return int(ax.images[0].get_array()[0, 0])


def is_framed(ax, colour):
    from matplotlib.colors import to_rgba

    spine = ax.spines["left"]
    return spine.get_visible() and spine.get_edgecolor() == to_rgba(colour)


def test_neighbours_are_the_nearest_and_framed_by_their_class(rows, tmp_path):
    embeddings, codes = rows
    names = ["a", "b", "c", "$\\not$ a formula"]
    figure = plotting.plot_neighbours(
        embeddings,
        codes,
        numbered(40),
        queries=[7, 30],
        k=4,
        names=names,
        path=tmp_path / "neighbours.png",
    )
    distances = brute_force(embeddings)
    np.fill_diagonal(distances, np.inf)
    grid = np.reshape(figure.axes, (2, 5))
    for query, line in zip((7, 30), grid, strict=True):
        expected = [query, *distances[query].argsort()[:4]]
        assert [row_shown(ax) for ax in line] == expected
        for ax, row in zip(line[1:], expected[1:], strict=True):
            right = codes[row] == codes[query]
            assert is_framed(ax, plotting.SAME if right else plotting.DIFFERENT)
            assert ax.get_title() == f"{names[codes[row]]} {distances[query, row]:.2g}"


def test_confusions_are_counted_and_shown(rows, tmp_path):
    embeddings, codes = rows
    distances = brute_force(embeddings)
    np.fill_diagonal(distances, np.inf)
    nearest = distances.argmin(axis=1)
    pairs = np.zeros((4, 4), int)
    np.add.at(pairs, (codes, codes[nearest]), codes != codes[nearest])
    figure = plotting.plot_confusions(
        embeddings, codes, numbered(40), pairs=2, path=tmp_path / "confusions.png"
    )
    grid = np.reshape(figure.axes, (2, -1))
    for line, count in zip(grid, np.sort(pairs.ravel())[::-1], strict=False):
        label, told = line[0].get_ylabel().splitlines()
        code, taken_for = map(int, label.split(" taken for "))
        assert told == f"{count} of 10"
        assert count == pairs[code, taken_for]
        query, neighbour = (row_shown(ax) for ax in line[:2])
        assert (codes[query], nearest[query]) == (code, neighbour)
        assert codes[neighbour] == taken_for
        assert is_framed(line[1], plotting.DIFFERENT)
    assert (tmp_path / "confusions.png").exists()


def test_no_confusions_is_told():
    figure = plotting.plot_confusions(np.eye(4)[[0, 0, 1]], [0, 0, 1], numbered(3))
    assert figure.texts[0].get_text() == "no confusions"  # the lone row is not counted


def test_a_row_is_never_its_own_neighbour():
    rows = np.float32([[0, 0]] * 6 + [[1, 0]])
    distances, nearest = nearest_others(rows, 2, "euclidean")
    assert (nearest != np.arange(7)[:, None]).all()
    assert (distances[:6] == 0).all()
    assert nearest_others(rows, 99, "euclidean")[1].shape == (7, 6)


def test_confusions_put_the_nearest_first():
    codes = np.array([0, 0, 0, 1, 1])
    nearest, distances = np.array([3, 4, 1, 4, 3]), np.array([0.5, 0.2, 0.1, 1, 1])
    (found,) = confusions(codes, nearest, distances, most=9)
    assert (found.code, found.taken_for, found.total) == (0, 1, 3)
    assert found.queries.tolist() == [1, 0]
    assert found.neighbours.tolist() == [4, 3]


def looked_up(**options):
    options.setdefault("images", np.zeros((4, 2, 2)))
    plotting.plot_neighbours(np.eye(4), [0, 0, 1, 1], **options)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: plotting.plot_embeddings(np.zeros(4), [0] * 4), "`embeddings`"),
        (lambda: plotting.plot_embeddings(np.zeros((4, 1)), [0] * 4), "dim >= 2"),
        (lambda: plotting.plot_embeddings(np.zeros((4, 2)), [0] * 3), "`labels`"),
        (lambda: plotting.plot_batch(np.zeros((4, 2)), [0] * 4), "`images`"),
        (lambda: plotting.plot_batch(np.zeros((4, 2, 2)), [0] * 3), "`labels`"),
        (lambda: looked_up(images=np.zeros((3, 2, 2))), "`images`.*4 images"),
        (lambda: looked_up(images=np.zeros((4, 2))), "`images`"),
        (lambda: looked_up(queries=[4]), r"`queries`.*rows 0 \.\.\. 3"),
        (lambda: looked_up(queries=[0.5]), "`queries`"),
        (lambda: looked_up(k=0), "`k`"),
        (lambda: looked_up(names=["one"]), "`names`.*2 names"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()
