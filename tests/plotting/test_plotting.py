"""Figures: what is drawn is the data, the file is an image, bad input is told."""

import re

import numpy as np
import pytest

from kerastrip import plotting, sources
from kerastrip.evaluation.confusions import confusions, nearest_others
from kerastrip.evaluation.verification import verification_curve
from kerastrip.plotting.thumbnails import png

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


def test_embeddings_of_twenty_classes_have_their_names_at_their_means(rng):
    centres = np.array([[x, y, 0] for x in range(5) for y in range(4)]) * 10.0
    embeddings = np.repeat(centres, 3, axis=0) + 0.01 * rng.normal(size=(60, 3))
    ax = plotting.plot_embeddings(embeddings, np.repeat(np.arange(20), 3)).axes[0]
    assert ax.get_legend() is None
    shown = {int(text.get_text()): text.get_position() for text in ax.texts}
    # There is room, so that no name had to move.
    names = np.array([shown[code] for code in range(20)])
    for i, j in ((7, 16), (0, 19)):
        expected = np.linalg.norm(centres[i] - centres[j])
        assert np.linalg.norm(names[i] - names[j]) == pytest.approx(expected, rel=1e-2)


def test_names_of_classes_never_lie_on_one_another(rng):
    labels = np.array([f"a long name {code}" for code in np.arange(300) % 100])
    figure = plotting.plot_embeddings(rng.normal(size=(300, 8)), labels)
    figure.canvas.draw()
    boxes = [text.get_window_extent().extents for text in figure.axes[0].texts]
    assert 5 < len(boxes) <= 30
    for i, (left, bottom, right, top) in enumerate(boxes):
        for x0, y0, x1, y1 in boxes[:i]:
            assert x1 <= left or right <= x0 or y1 <= bottom or top <= y0


def test_no_colour_and_shape_are_of_two_classes(rng):
    few = plotting.plot_embeddings(rng.normal(size=(19, 3)), np.arange(19)).axes[0]
    looks = {
        (*points.get_facecolor()[0], points.get_paths()[0].vertices.tobytes())
        for points in few.collections
    }
    assert len(looks) == len(few.get_legend().get_texts()) == 19


@pytest.mark.parametrize(
    "draw",
    [
        lambda curve: plotting.plot_mining(HISTORY),
        lambda curve: plotting.plot_distances(curve, margin=0.5, distance="cosine"),
        plotting.plot_roc,
        lambda curve: plotting.plot_embeddings(np.eye(12), np.arange(12)),
    ],
)
def test_charts_have_titles_units_words_and_a_legend_that_covers_nothing(rows, draw):
    figure = draw(verification_curve(*rows, distance="cosine"))
    figure.canvas.draw()
    ax = figure.axes[0]
    assert ax.get_title()
    assert all(axes.get_ylabel() for axes in figure.axes)
    assert ax.get_xlabel()
    assert figure.get_label().endswith(".")
    legend, title = (one.get_window_extent() for one in (ax.get_legend(), ax.title))
    assert not legend.overlaps(ax.get_window_extent())
    assert not legend.overlaps(title)


def test_the_axis_of_distances_says_which(rows):
    curve = verification_curve(*rows)
    for word, told in (
        (None, "distance"),
        ("squared_euclidean", "squared euclidean distance"),
    ):
        figure = plotting.plot_distances(curve, distance=word)
        assert figure.axes[0].get_xlabel() == told
        assert f"Histograms of the {told} of 180 positive" in figure.get_label()


def lightness(colour):
    """CIE L* of sRGB as a person with deuteranopia sees it (Machado et al. 2009)."""
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = np.array([red, green, blue]) ** 2.2
    seen = np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ) @ linear.clip(0)
    return 116 * float([0.2126, 0.7152, 0.0722] @ seen.clip(0)) ** (1 / 3) - 16, seen


def test_colours_stay_apart_without_red_and_green():
    steps = sorted(lightness(colour)[0] for colour in plotting.COLOURS.values())
    assert min(np.diff(steps)) > 8
    same, different = (
        lightness(colour)[1] for colour in (plotting.SAME, plotting.DIFFERENT)
    )
    assert np.abs(same - different).max() > 0.25  # blue and vermilion


@pytest.mark.parametrize("channels", [(), (1,), (3,)])
def test_batch_has_a_line_for_each_class(rng, channels, tmp_path):
    images = rng.integers(0, 256, (7, 5, 5, *channels), dtype=np.uint8)
    figure = plotting.plot_batch(
        images, [4, 4, 4, 9, 9, 9, 9], names=["four", "nine"], path=tmp_path / "b.png"
    )
    (ax,) = figure.axes
    assert [text.get_text() for text in ax.texts] == ["Batch", "four", "nine"]
    heights = [image.get_extent()[3] for image in ax.images]
    assert len(set(heights[:3])) == len(set(heights[3:])) == 1
    assert heights[0] < heights[3]  # the axis goes downwards
    assert len(ax.images) == 7
    shown = ax.images[3].get_array()
    np.testing.assert_array_equal(shown, images[3].reshape(shown.shape))


def test_float_images_outside_0_1_are_scaled(rng):
    figure = plotting.plot_batch(rng.normal(size=(2, 4, 4)) * 9, [0, 0])
    shown = np.stack([image.get_array() for image in figure.axes[0].images])
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


def samples_of(figure):
    """(row, frame) of the samples of a sheet of numbered images, line by line."""
    from matplotlib.colors import to_hex

    (ax,) = figure.axes
    rows = [int(image.get_array()[0, 0]) for image in ax.images]
    frames = [(to_hex(line.get_color()), line.get_linestyle()) for line in ax.lines]
    return list(zip(rows, frames, strict=True))


RIGHT, WRONG = (plotting.SAME, "-"), (plotting.DIFFERENT, "--")


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
    shown, words = iter(samples_of(figure)), figure.get_label()
    for query in (7, 30):
        assert next(shown)[0] == query
        told = [f"sample {query}"]
        for row in distances[query].argsort()[:4]:
            right = codes[row] == codes[query]
            assert next(shown) == (row, RIGHT if right else WRONG)
            sign, far = "✓" if right else "✗", distances[query, row]
            told.append(f"sample {row} {sign} {names[codes[row]]} {far:.2g}")
        assert ", ".join(told) in words
    assert not list(shown)
    assert len(plotting.plot_neighbours(*rows, queries=3).get_label().splitlines()) == 7


LEFT_OUT = (plotting.LEFT_OUT, ":")


def test_neighbours_of_the_class_and_group_are_shown_as_left_out(rows):
    embeddings, codes = rows
    cameras = np.array(["left", "right"])[np.arange(40) % 3 % 2]
    figure = plotting.plot_neighbours(
        embeddings, codes, numbered(40), groups=cameras, queries=[7, 30, 11], k=9
    )
    distances = brute_force(embeddings)
    np.fill_diagonal(distances, np.inf)
    _, *lines = figure.get_label().splitlines()
    shown, left_out = iter(samples_of(figure)), 0
    for i, query in enumerate((7, 30, 11)):
        assert next(shown)[0] == query
        told, counts = [f"sample {query}"], {RIGHT: 0, WRONG: 0, LEFT_OUT: 0}
        for row in distances[query].argsort()[:9]:  # where it is in the ranking
            frame, words = WRONG, f"✗ {codes[row]}"
            if codes[row] == codes[query]:
                frame, words = RIGHT, f"✓ {codes[row]}"
                if cameras[row] == cameras[query]:
                    frame, words = LEFT_OUT, "⊘ left out"
            assert next(shown) == (row, frame)
            counts[frame] += 1
            told.append(f"sample {row} {words} {distances[query, row]:.2g}")
        assert lines[2 * i + 1] == "  " + ", ".join(told)
        right, wrong, out = counts.values()
        counted = f"{right} of {right + wrong} right, {out} left out"
        assert lines[2 * i] == f"sample {query}: {codes[query]}, {counted}"
        left_out += out
    assert left_out > 3
    plain = plotting.plot_neighbours(*rows, queries=[7, 30, 11], k=9).get_label()
    assert "left out" not in plain
    # Where no two samples have one camera, no neighbour is left out.
    alone = plotting.plot_neighbours(
        *rows, groups=np.arange(40), queries=[7, 30, 11], k=9
    )
    assert alone.get_label() == plain


def test_a_line_without_a_neighbour_that_counts():
    figure = plotting.plot_neighbours(
        np.eye(4), [0, 0, 0, 1], groups=[5, 5, 5, 5], queries=[0], k=2
    )
    assert "sample 0: 0, 0 of 0 right, 2 left out" in figure.get_label()


def test_grey_is_grey_and_can_be_read():
    red, green, blue = (int(plotting.LEFT_OUT[i : i + 2], 16) for i in (1, 3, 5))
    assert red == green == blue
    assert lightness(plotting.LEFT_OUT)[0] < 55  # text on white


def test_confusions_are_counted_and_shown(rows, tmp_path):
    embeddings, codes = rows
    distances = brute_force(embeddings)
    np.fill_diagonal(distances, np.inf)
    nearest = distances.argmin(axis=1)
    pairs = np.zeros((4, 4), int)
    np.add.at(pairs, (codes, codes[nearest]), codes != codes[nearest])
    figure = plotting.plot_confusions(
        embeddings,
        codes,
        numbered(40),
        pairs=2,
        examples=1,
        path=tmp_path / "confusions.png",
    )
    shown, (_, *lines) = samples_of(figure), figure.get_label().splitlines()
    for i, count in enumerate(np.sort(pairs.ravel())[:-3:-1]):
        told = re.fullmatch(r"(\d) taken for (\d), (\d+) of 10", lines[2 * i])
        code, taken_for, counted = map(int, told.groups())
        assert counted == count == pairs[code, taken_for]
        (query, _), (neighbour, frame) = shown[2 * i : 2 * i + 2]
        assert (codes[query], nearest[query]) == (code, neighbour)
        assert codes[neighbour] == taken_for
        assert frame == WRONG
        assert lines[2 * i + 1] == f"  sample {query}, sample {neighbour}"
    assert (tmp_path / "confusions.png").exists()


def test_confusions_leave_out_the_class_and_group_of_the_sample(rows):
    embeddings, codes = rows
    cameras = np.arange(40) % 3 % 2
    cameras[codes == 2] = 1  # a class of one camera: its samples have no positive
    distances, nearest, wrong = brute_force(embeddings), {}, {}
    for query in range(40):
        others = [
            row
            for row in distances[query].argsort()
            if (codes[row], cameras[row]) != (codes[query], cameras[query])
        ]
        if codes[others[0]] != codes[query] != 2:
            pair = codes[query], codes[others[0]]
            wrong.setdefault(pair, []).append(query)
            nearest[query] = others[0]
    plain = plotting.plot_confusions(*rows, pairs=99, examples=99).get_label()
    figure = plotting.plot_confusions(
        embeddings, codes, groups=cameras, pairs=99, examples=99
    )
    _, *lines = figure.get_label().splitlines()
    assert len(lines) == 2 * len(wrong) > 4
    for heading, samples in zip(lines[::2], lines[1::2], strict=True):
        told = re.fullmatch(r"(\d) taken for (\d), (\d+) of 10", heading)
        queries = wrong[int(told[1]), int(told[2])]
        assert int(told[3]) == len(queries)
        couples = re.findall(r"sample (\d+), sample (\d+)", samples)
        assert {int(a): int(b) for a, b in couples} == {q: nearest[q] for q in queries}
    assert figure.get_label() != plain
    one = plotting.plot_confusions(*rows, groups=[0] * 40).get_label()
    assert one.startswith("No confused classes")
    own = plotting.plot_confusions(*rows, groups=np.arange(40), pairs=99, examples=99)
    assert own.get_label() == plain


def test_confusions_look_beyond_many_rows_of_one_camera():
    rows = np.float32([[0, 0]] * 40 + [[9, 0], [1, 0], [1, 5]])
    codes, cameras = [0] * 41 + [1, 1], [0] * 40 + [1, 0, 1]
    figure = plotting.plot_confusions(rows, codes, groups=cameras, examples=99)
    title, heading, samples, *_ = figure.get_label().splitlines()
    assert title.startswith("Confused classes")
    assert heading == "0 taken for 1, 41 of 41"
    assert samples.count("sample 41") == 41


def test_samples_are_called_by_their_files(rows, tmp_path):
    embeddings, codes = rows
    paths = [tmp_path / f"{row}_a_long_name.png" for row in range(80)]
    for row, path in enumerate(paths):
        path.write_bytes(png(np.full((4, 4), row % 40, np.uint8)))
    files = sources.Subset(
        sources.ImageFiles(paths, size=(4, 4), color="gray"), np.arange(40, 80)
    )
    figure = plotting.plot_neighbours(embeddings, codes, files, queries=[7], k=1)
    assert "47_a_long_name.png: 3, " in figure.get_label()
    figure = plotting.plot_confusions(embeddings, codes, files, pairs=1, examples=1)
    written = "".join(text.get_text() for text in figure.axes[0].texts)
    (row, _), _ = samples_of(figure)
    assert f"{row + 40}_a_long_name.png" in written.replace("\n", "")
    named = plotting.plot_confusions(*rows, samples=[f"no {row}" for row in range(40)])
    assert "  no " in named.get_label()


def test_samples_without_images_are_named(rows):
    for draw in (plotting.plot_confusions, plotting.plot_neighbours):
        (ax,) = draw(*rows).axes
        assert not ax.images
        named = [text for text in ax.texts if text.get_text().startswith("sample")]
        assert len(named) >= 6


def test_no_confusions_is_told():
    figure = plotting.plot_confusions(np.eye(4)[[0, 0, 1]], [0, 0, 1], numbered(3))
    # The row without a positive is not counted.
    assert figure.get_label() == "No confused classes by euclidean distance"
    assert not figure.axes[0].images


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


def confused(**options):
    plotting.plot_confusions(np.eye(4), [0, 0, 1, 1], **options)


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
        (lambda: looked_up(queries=0), "`queries`"),
        (lambda: looked_up(samples=["one"]), "`samples`.*4 names"),
        (lambda: looked_up(groups=["one"]), "`groups`.*4 "),
        (lambda: looked_up(groups=["one", "two", None, "two"]), "`groups`.*position 2"),
        (lambda: confused(groups=[1, 2, 3]), "`groups`.*4 "),
        (lambda: looked_up(k=0), "`k`"),
        (lambda: looked_up(names=["one"]), "`names`.*2 names"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()
