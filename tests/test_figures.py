"""figures.py: every picture is drawn without a display, from little or much, and says what is missing."""

import sys

import matplotlib
import numpy as np
import pytest
from PIL import Image

from ct.tasks import ORGANS
from ct.volumes import BadInput
from engine import figures, report
from tools import overview

pytestmark = pytest.mark.pictures


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """drawn(draw, *args) -> the pixels of the picture; the axes' titles are kept in drawn.titles."""
    monkeypatch.delenv("DISPLAY", raising=False)

    def draw(picture, *args):
        save, draw.texts = figures._save, []

        def keep(plt, figure, path):
            draw.texts = [t.get_text() for t in figure.findobj(matplotlib.text.Text)]
            draw.lines = [line.get_xydata() for axes in figure.axes for line in axes.lines]
            save(plt, figure, path)
            draw.figure = figure

        monkeypatch.setattr(figures, "_save", keep)
        picture(tmp_path / "x.png", *args)
        monkeypatch.setattr(figures, "_save", save)
        assert not matplotlib.pyplot.get_fignums()  # nothing stays open
        return np.asarray(Image.open(tmp_path / "x.png").convert("RGB"))

    return draw


def record(step, **more):
    return {"step": step, "loss": 2.0, "loss_global": 2.0, "loss_local": 0.0, "accuracy": 0.5, "lr": 0.1, **more}


def test_curves_show_what_the_log_holds(drawn):
    drawn(figures.curves, [record(1)], 6.9)
    assert "chance 6.90" in drawn.texts and "effective rank" not in drawn.texts and "local (Eq. 2)" not in drawn.texts
    full = dict(effective_rank=9.0, effective_rank_embedding=4.0, similarity_positive=0.9, similarity_negative=0.1,
                queue_filled=1.0)
    drawn(figures.curves, [record(1), record(2, loss_local=1.0, **full), record(3, effective_rank=None)], 6.9)
    assert {"effective rank", "mean cosine similarity", "local (Eq. 2)", "learning rate"} <= set(drawn.texts)
    assert "before the first step" not in drawn.texts
    drawn(figures.curves, [record(i, probe_dice=0.1 * i, probe_dice_start=0.1) for i in (1, 2, 3)], 6.9)
    assert {"probe: mean Dice, labelled slices", "now", "before the first step"} <= set(drawn.texts)
    assert any(len(line) == 3 and np.allclose(line, [[1, 0.1], [2, 0.2], [3, 0.3]]) for line in drawn.lines)


def test_a_running_mean_is_one():
    values = np.random.default_rng(0).normal(size=500)
    plt = figures.pyplot()
    axes = plt.figure().add_subplot()
    figures._curve(axes, np.arange(500.0), values, "x", {"color": "k", "linestyle": "-"})
    shown = axes.lines[1].get_ydata()
    plt.close("all")
    for i in (0, 3, 250, 499):
        assert shown[i] == pytest.approx(values[max(0, i - 5) : i + 6].mean())


def test_overlays_use_each_organs_colour_and_name_those_shown(drawn):
    image = np.full((40, 30), 90, np.uint8)
    truth = np.zeros_like(image)
    truth[10:30, 10:20] = 6
    rows = [("worst", image, truth, truth * 0), ("b", image, truth, truth), ("c", image, truth, truth)]
    drawn(figures.overlays, rows, "a title", ORGANS)
    assert {"worst", "liver", "truth", "prediction"} <= set(drawn.texts) and "spleen" not in drawn.texts
    shown = figures._coloured(image, truth)
    liver = [int(figures.ORGAN_COLOURS[5][i : i + 2], 16) / 255 for i in (1, 3, 5)]
    np.testing.assert_allclose(shown[10, 15], liver)  # the border, in full
    np.testing.assert_allclose(shown[20, 15], 0.45 * np.array(liver) + 0.55 * 90 / 255)
    np.testing.assert_allclose(shown[0, 0], 90 / 255)
    assert len(set(figures.ORGAN_COLOURS)) == len(ORGANS) - 1


def test_colours_of_any_number_of_organs():
    colours = figures.organ_colours()
    assert colours.shape == (255, 3) and 0 <= colours.min() <= colours.max() <= 1
    for c, hexadecimal in enumerate(figures.ORGAN_COLOURS, 1):  # BTCV's stay
        assert "#" + "".join(f"{round(255 * x):02x}" for x in colours[c]) == hexadecimal
    apart = np.linalg.norm(colours[:, None] - colours, axis=2) + 9 * np.eye(255)
    assert apart.min() > 0.06 and apart[:105, :105].min() > 0.15  # of 104 organs none is like another
    assert (np.ptp(colours[14:], axis=1) > 0.2).all()  # none is grey, as CT is
    image, labels = np.full((9, 9), 90, np.uint8), np.full((9, 9), 200, np.uint8)
    labels[:3] = 255
    shown = figures._coloured(image, labels)
    np.testing.assert_allclose(shown[6, 4], 0.45 * colours[200] + 0.55 * 90 / 255)
    np.testing.assert_allclose(shown[1, 4], 90 / 255)  # 255: no label


@pytest.mark.parametrize("organs, length", [(1, 6), (13, 24), (104, 6), (104, 29), (104, 60)])
def test_the_legend_of_any_number_of_organs_has_room(drawn, organs, length):
    names = ["background", *(f"organ {c} ".ljust(length, "n") for c in range(1, organs + 1)), "unseen"]
    truth = np.zeros((40, 40), np.uint8)
    truth[10:36, 10:36].flat[: 6 * organs] = np.repeat(np.arange(1, organs + 1), 6)
    rows = [("a", np.full((40, 40), 90, np.uint8), truth, truth)] * 6
    drawn(figures.overlays, rows, "a title", names)
    assert set(names[1:-1]) <= set(drawn.texts) and not {"unseen", "background"} & set(drawn.texts)
    figure = drawn.figure
    legend, (width, height) = figure.legends[0].get_window_extent(), figure.get_size_inches() * figure.dpi
    assert 0 <= legend.x0 < legend.x1 <= width and 0 <= legend.y0 < legend.y1 <= height
    told = [patch.get_facecolor()[:3] for patch in figure.legends[0].get_patches()]
    np.testing.assert_allclose(told, figures.organ_colours()[1 : organs + 1])
    pictures = [axes.get_window_extent() for axes in figure.axes if axes.images]
    assert len(pictures) == 18 and min(p.y0 for p in pictures) > legend.y1
    assert min(p.height for p in pictures) > 1.5 * figure.dpi  # inches: the pictures keep their size


def test_a_slice_is_shown_without_most_of_its_air():
    image = np.zeros((200, 200), np.uint8)
    image[80:120, 60:140] = 100
    rows, columns = figures._body(image)
    assert image[rows, columns].shape == (87, 87) and image[rows, columns].sum() == image.sum()
    assert figures._body(image * 0) == (slice(None), slice(None))


@pytest.mark.parametrize("number", [1, 3, 20])
def test_contact_sheet(drawn, number):
    slices = [np.full((20 + i, 30), 5 * i, np.uint8) for i in range(number)]
    drawn(figures.contact_sheet, slices, [f"slice {i}" for i in range(number)])
    assert {f"slice {i}" for i in range(number)} <= set(drawn.texts)


def test_contact_sheet_shows_labels(drawn):
    image, label = np.full((20, 20), 100, np.uint8), np.zeros((20, 20), np.uint8)
    grey = drawn(figures.contact_sheet, [image], ["a"], [label])
    label[4:16, 4:16] = 6
    tinted = drawn(figures.contact_sheet, [image], ["a"], [label])
    assert np.ptp(grey.astype(int), axis=2).max() == 0 and np.ptp(tinted.astype(int), axis=2).max() > 20
    drawn.texts.clear()
    drawn(figures.contact_sheet, [image], ["a"], [label], [f"organ {i}" for i in range(9)])
    assert "organ 6" in drawn.texts and "organ 5" not in drawn.texts


def test_validation_and_report(drawn):
    drawn(figures.validation, [{"step": 1, "mDS": None, "mDice_with_background": 0.2},
                               {"step": 2, "mDS": 0.5, "mDice_with_background": 0.6}], "title")
    assert "50.00" in drawn.texts and "60.00" in drawn.texts
    result = {"data": "phantom", "slices": 9, "split": "25", "draw": 0, "backbone": "random",
              "protocol": "linear-frozen", "mDS": 0.25, "organs": [0.25] * 12 + [None]}
    others = [result | {"backbone": f"run{i}", "draw": 0} for i in range(9)]  # more than there are markers
    drawn(figures.report, report.cells([result, *others], ("linear-frozen", "a", "b")))
    title = "linear-frozen, 25 % of the training volumes\ngenerated phantom"
    assert {title, "mean (mDS)", "Random weights", "run8", "pancreas"} <= set(drawn.texts)


def test_spectrum_draws_no_numerical_zeros_and_is_readable_in_grey(drawn):
    runs = [(f"run {i}", np.array([2.0, 1.0, 1e-20]), 1.9) for i in range(len(figures.STYLES))]
    drawn(figures.spectrum, runs, "title")
    assert all(len(line) == 2 for line in drawn.lines)
    assert {"run 0", "1.9", "effective rank: the lower, the more collapsed"} <= set(drawn.texts)
    assert len({str(line) for _, line in figures.STYLES}) == len(figures.STYLES)


def test_a_missing_matplotlib_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    figures._tell_once.cache_clear()
    with pytest.raises(BadInput, match="pip install"):
        figures.pyplot()
    for _ in range(2):
        assert not figures.attempt(figures.validation, tmp_path / "x.png", [], "title")
    assert capsys.readouterr().err.count("\n") == 1 and not list(tmp_path.iterdir())


def test_the_strip_has_the_spectra_of_its_rows_and_the_slice_with_its_labels(tmp_path, monkeypatch):
    head = ["backbone", "data", "vectors", "effective_rank", "rankme", "remarks", 1, 2, 3]
    rows = [[run, "phantom", 9, 2, 2, "", 4.0 + i, 1.0, ""] for i, run in enumerate(overview.SPECTRA)]
    report.write_csv(tmp_path / "spectrum.csv", [head, ["random", *rows[0][1:]], *rows])
    spectra = overview.spectra(tmp_path / "spectrum.csv")
    assert [(name, values.tolist()) for name, values in spectra] == [
        (name, [4.0 + i, 1.0]) for i, name in enumerate(overview.SPECTRA.values())]
    drawn = []
    monkeypatch.setattr(figures, "_save", lambda plt, figure, path: (drawn.append(figure), plt.close(figure)))
    image, labels = np.full((40, 40), 90, np.uint8), np.zeros((40, 40), np.uint8)
    labels[10:20, 10:20] = 6
    views = [np.full((8, 8), x) for x in (0.25, 0.75)]
    figures.overview(tmp_path / "x.png", views, spectra, [("truth", labels)], image)
    axes = drawn[0].axes
    assert [a.get_title(loc="left") for a in axes][:3] == ["a CT slice", "a query view", "its key view"]
    assert [a.images[0].get_array()[0, 0] for a in axes[1:3]] == [0.25, 0.75]
    assert [line.get_ydata().tolist() for line in axes[3].lines] == [[1.0, 1 / (4 + i)] for i in range(3)]
    colours = [np.ptp(axes[i].images[0].get_array(), axis=2).max() for i in (0, 4)]
    assert colours[0] == 0 < colours[1]  # grey, and with its labels

    report.write_csv(tmp_path / "spectrum.csv", [head, rows[0]])
    with pytest.raises(BadInput, match="has no phantom-moco-local-zca"):
        overview.spectra(tmp_path / "spectrum.csv")
