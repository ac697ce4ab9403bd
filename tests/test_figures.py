"""figures.py and methods.py: every picture is drawn without a display, from little or much, and says what is missing; a
method looks the same in all of them.
"""

import sys

import matplotlib
import numpy as np
import pytest
from PIL import Image

from ct.tasks import ORGANS
from ct.volumes import BadInput
from engine import figures, methods, report, runs
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


@pytest.fixture
def sketched(tmp_path, monkeypatch):
    """sketched(draw, *args) -> its figure, which is not rendered: that takes a second."""
    kept = []
    monkeypatch.setattr(figures, "_save", lambda plt, figure, path: (kept.append(figure), plt.close(figure)))
    return lambda picture, *args: picture(tmp_path / "x.png", *args) or kept[-1]


def record(step, **more):
    return {"step": step, "loss": 2.0, "loss_global": 2.0, "loss_local": 0.0, "accuracy": 0.5, "lr": 0.1, **more}


def test_curves_show_what_the_log_holds(drawn):
    drawn(figures.curves, [record(1)], 6.9, 3.0)
    assert "global, chance 6.90" in drawn.texts and not {"effective rank", "local (Eq. 2)", "local, chance 3.00"} & {
        *drawn.texts}
    full = dict(effective_rank=9.0, effective_rank_embedding=4.0, similarity_positive=0.9, similarity_negative=0.1,
                queue_filled=1.0)
    drawn(figures.curves, [record(1), record(2, loss_local=1.0, **full), record(3, effective_rank=None)], 6.9, 3.0)
    assert {"effective rank", "mean cosine similarity", "local (Eq. 2)", "learning rate"} <= set(drawn.texts)
    assert "before the first step" not in drawn.texts and "local, chance 3.00" in drawn.texts
    assert any(line[:, 1].tolist() == [3, 3] for line in drawn.lines)  # across the panel
    for axes in drawn.figure.axes:
        if legend := axes.get_legend():
            assert legend.get_window_extent().x0 >= axes.get_window_extent().x1  # beside the curves
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


def test_a_similarity_margin_below_zero_is_seen(sketched):
    """It is where the key of another slice is nearer than a slice's own; a rank, which cannot be negative, starts at 0.
    """
    figure = sketched(figures.curves, [record(i, held_out_gap=0.01 * (2 - i), effective_rank=9.0) for i in (1, 3)],
                      6.9)
    limits = {axes.get_title(loc="left"): axes.get_ylim() for axes in figure.axes}
    assert limits["similarity margin, held out"][0] < -0.01 and limits["effective rank"][0] == 0


def test_overlays_use_each_organs_colour_and_name_those_shown(drawn):
    image = np.full((40, 30), 90, np.uint8)
    truth = np.zeros_like(image)
    truth[10:30, 10:20] = 6
    rows = [("worst", image, truth, truth * 0), ("b", image, truth, truth), ("c", image, truth, truth)]
    drawn(figures.overlays, rows, "a title", ORGANS)
    assert {"worst", "liver", "truth", "prediction"} <= set(drawn.texts) and "spleen" not in drawn.texts
    shown = figures._coloured(image, truth)
    liver = [int(methods.ORGAN_COLOURS[5][i : i + 2], 16) / 255 for i in (1, 3, 5)]
    np.testing.assert_allclose(shown[10, 15], liver)  # the border, in full
    np.testing.assert_allclose(shown[20, 15], 0.45 * np.array(liver) + 0.55 * 90 / 255)
    np.testing.assert_allclose(shown[0, 0], 90 / 255)
    assert len(set(methods.ORGAN_COLOURS)) == len(ORGANS) - 1


@pytest.mark.parametrize("number", [1, 3, 4, 6])
def test_overlays_of_a_prediction_alone(sketched, number):
    """Of each slice two pictures, the slice and the slice with its labels; three slices a line."""
    image, labels = np.full((40, 40), 90, np.uint8), np.zeros((40, 40), np.uint8)
    labels[10:30, 10:30] = 6
    rows = [(f"slice {i}", image, labels) for i in range(number)]
    figure = sketched(figures.overlays, rows, "t", ORGANS, ("prediction",))
    pictures = [axes for axes in figure.axes if axes.images]
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["liver"] and len(pictures) == 2 * number
    assert [axes.get_title(loc="left") for axes in pictures[:2]] == ["slice 0", "prediction"]
    assert [np.ptp(axes.images[0].get_array(), axis=2).max() > 0 for axes in pictures] == [False, True] * number
    assert len({axes.get_subplotspec().rowspan.start for axes in pictures}) == -(-number // 3)


def test_colours_of_any_number_of_organs():
    colours = methods.organ_colours()
    assert colours.shape == (255, 3) and 0 <= colours.min() <= colours.max() <= 1
    for c, hexadecimal in enumerate(methods.ORGAN_COLOURS, 1):  # BTCV's stay
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
    np.testing.assert_allclose(told, methods.organ_colours()[1 : organs + 1])
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


RESULT = {"data": "phantom", "slices": 9, "draw": 0, "protocol": "linear-frozen", "mDS": 0.25,
          "organs": [0.25] * 12 + [None]}
PROTOCOLS = ("linear-frozen", "linear-finetune", "deeplabv3plus")


def colour(artist) -> str:
    return matplotlib.colors.to_hex(artist.get_color())


def test_panels_stand_in_the_order_of_split_and_protocol(sketched):
    """Whatever was measured first, and whatever a table shows first."""
    found = [RESULT | {"backbone": "random", "split": split, "protocol": protocol} for split, protocol in (
        ("100", "deeplabv3plus"), ("25", "deeplabv3plus"), ("25", "linear-frozen"), ("100", "linear-frozen"))]
    found += [RESULT | {"backbone": "x", "split": "12.5", "protocol": "linear-finetune"}]
    cells = sorted(report.cells(found, PROTOCOLS), key=lambda c: -float(c["split"]))  # as of several tables
    figure = sketched(figures.report, cells)
    titles = [axes.get_title(loc="left").splitlines()[0] for axes in figure.axes]
    assert titles == [f"{protocol}, {split} % of the training volumes" for split in ("12.5", "25", "100")
                      for protocol in PROTOCOLS]


def test_bars_are_deviations_over_random_subsets_and_seeds(sketched):
    """Of each class over the results that have it; none where one result has it."""
    spleen, other = (0.2, 0.5, 0.8), (None, 0.4, 0.6)
    found = [RESULT | {"backbone": "random", "split": "25", "draw": i % 2, "seed": i, "mDS": 0.3 + i / 10, "organs": [
        spleen[i], other[i], None if i else 0.7, *[0.1] * 10]} for i in range(3)]
    figure = sketched(figures.report, report.cells(found, PROTOCOLS))
    [axes] = figure.axes
    [(points, _, (bars,))] = axes.containers
    lengths = [np.ptp(segment[:, 0]) / 2 if len(segment) else None for segment in bars.get_segments()]
    assert points.get_xdata()[[0, 1, 2, 13]] == pytest.approx([50, 50, 70, 40])
    assert [lengths[place] for place in (0, 1, 3, 13)] == pytest.approx([30, 200**0.5, 0, 10])
    assert lengths[2] is None


def test_a_method_has_one_colour_and_marker_in_all_pictures(sketched):
    """report.png, spectrum.png, the study's and the strip: drawn from other methods, in another order."""
    words = methods.ROWS | methods.BEYOND
    assert methods.LOOKS.keys() >= words.keys()
    seen: dict[str, set] = {}

    def note(names, artists):
        for name, line in zip(names, artists, strict=True):
            seen.setdefault(words.get(name, name), set()).add((colour(line), line.get_marker()))

    names = [*words, "mine"]
    for order in (names, names[::-1], ["mine"], ["moco-zca", "mine", "start"]):
        spectra = [(words.get(n, n), n, np.array([2.0, 1.0]), 1.5) for n in order]
        figure = sketched(figures.spectrum, spectra, "title")
        note(order, figure.axes[0].lines)
        bars = [matplotlib.colors.to_hex(bar.get_facecolor()) for bar in figure.axes[1].patches]
        assert bars == [colour(line) for line in figure.axes[0].lines]
        points = {n: [(1, 50.0, 1.0), (2, 60.0, None)] for n in order}
        figure = sketched(figures.over_steps, {"a": ({}, points), "b": ({}, points)}, {})
        for axes in figure.axes:
            note(order, [container[0] for container in axes.containers])
        views, image = [np.zeros((8, 8))] * 2, np.zeros((9, 9), np.uint8)
        figure = sketched(figures.overview, views, [s[:3] for s in spectra], [("x", image)], image)
        assert [colour(line) for line in figure.axes[3].lines] == bars
        results = [RESULT | {"backbone": "phantom-" * (n != "mine") + n, "split": "100"} for n in order
                   if n not in ("imagenet", "random")]
        if results:
            cells = report.cells(results, PROTOCOLS)
            figure = sketched(figures.report, cells)
            handles = figure.legends[0].legend_handles
            note([c["method"] for c in cells if c["protocol"] == "linear-frozen"], handles)
    assert len(seen) == len(names) and {len(looks) for looks in seen.values()} == {1}
    colours, markers = zip(*(look for looks in seen.values() for look in looks), strict=True)
    assert len(set(colours)) == len(names)  # and no colour means two methods
    assert len({look.marker for look in methods.LOOKS.values()}) == len(methods.LOOKS)  # in grey


def test_other_names_get_what_is_left():
    taken = {look.colour for look in methods.LOOKS.values()}
    names = [f"run {i}" for i in range(60)]
    looks = methods.looks([*names, "moco"])
    assert not {looks[n].colour for n in names} & taken and looks == methods.looks(["moco", *names[::-1]])
    assert looks["moco"] == methods.LOOKS["moco"] == methods.looks(["MoCo v2"])["MoCo v2"]
    alone = {name: methods.looks([name])[name] for name in ("mine", "theirs", "zebra")}
    assert len({*alone.values()}) == 3 and methods.looks([*alone, "moco"]).items() >= alone.items()
    few = methods.looks(names[:8])
    assert len({look.colour for look in few.values()}) == 8 == len({look.marker for look in few.values()})
    assert len({looks[n][::2] for n in names}) == 60  # colour and marker
    assert methods.looks(["\ud800", "\udcff"])  # names of folders may hold anything


def test_several_lines_of_one_method_differ_in_their_markers(sketched):
    spectra = [("MoCo v2", f"MoCo v2, seed {i}", np.array([2.0, 1.0]), 1.5) for i in range(6)]
    lines = sketched(figures.spectrum, spectra, "title").axes[0].lines
    assert {colour(line) for line in lines} == {"#1f5fa8"} and len({line.get_fillstyle() for line in lines}) == 6


def test_red_is_no_curve_of_a_run(sketched):
    """What curves.png and validation.png show are no methods: they have no method's colour."""
    taken = {look.colour for look in (*methods.LOOKS.values(), *methods.SPARE)}
    records = [record(i, loss_local=1.0, similarity_positive=0.9, similarity_negative=0.1, held_out_positive=0.8,
                      held_out_negative=0.2) for i in (1, 2)]
    figure = sketched(figures.curves, records, 6.9, 3.0)
    lines = [line for axes in figure.axes for line in axes.lines]
    records = [{"step": i, "mDS": 0.1, "mDice_with_background": 0.2} for i in (1, 2)]
    lines += sketched(figures.validation, records, "title").axes[0].lines
    assert len(lines) == 11 and not {colour(line) for line in lines} & taken


def test_marks_are_in_the_picture_as_in_the_tables(sketched):
    known = {"step": 9, "horizon": 184, "gap": 0.001, "view_px": None, "slice_px": None, "checksum": ""}
    found = [RESULT | {"backbone": "mine", "split": "25", "pretraining": known},
             RESULT | {"backbone": "theirs", "split": "25", "pretraining": known | {"gap": 0.3, "step": 184}}]
    cells = report.cells(found, PROTOCOLS)
    figure = sketched(figures.report, cells)
    label = "mine (unfinished: step 9 of 184; did not train: it does not tell slices apart)"
    assert {label, "theirs"} <= {t.get_text() for t in figure.legends[0].get_texts()}
    head, *rows = report.csv_rows(cells)
    remarks = {row[3]: row[head.index("remarks")] for row in rows if row[4] == "linear-frozen"}
    assert remarks["mine"].startswith("unfinished: step 9 of 184; did not train: it does not tell slices apart")
    assert "unfinished" not in remarks["theirs"] and "did not train" not in remarks["theirs"]
    assert "**unfinished: step 9 of 184**; **did not train**" in report.markdown(cells)


def test_a_command_ends_with_its_own_numbers_and_where_all_are(tmp_path, capsys):
    """A line a method of this command: over all its random subsets and seeds, with what makes it doubtful."""
    known = {"step": 9, "horizon": 184, "gap": 0.3, "view_px": None, "slice_px": None, "checksum": ""}
    found = [RESULT | {"backbone": "random", "split": "25", "mDS": 0.9}, RESULT | {"backbone": "x", "split": "100"},
             RESULT | {"backbone": "x", "split": "25", "data": "other", "mDS": 0.8}]
    found += [RESULT | {"backbone": "x", "split": "25", "draw": draw, "mDS": 0.2 + draw / 5, "pretraining": known}
              for draw in (0, 1)]
    found += [RESULT | {"backbone": "x", "split": "25", "protocol": "deeplabv3plus", "pretraining": known}]
    runs.append(tmp_path / "results.jsonl", found)
    report.conclude(tmp_path, "25", {"random"}, {"data": "phantom", "slices": 9})
    assert capsys.readouterr().out.count("  Random weights: linear-frozen 90.00 (n = 1)\n") == 1  # of two tables
    report.conclude(tmp_path, "25", {"x"}, {"data": "phantom", "slices": 9})
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0] == "mean Dice in % on the generated phantom, 25 % of the training volumes:"
    assert lines[1] == ("  x (unfinished: step 9 of 184): linear-frozen 30.00 ± 14.14 (n = 2), "
                        "deeplabv3plus 25.00 (n = 1)")
    assert len(lines) == 3 and lines[2].startswith(f"all results: {tmp_path / 'report.md'}, ")
    assert "Random weights" in (tmp_path / "report.md").read_text()  # of all commands
    assert "Random weights" in (tmp_path / "report.csv").read_text()


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


def test_spectrum_draws_no_numerical_zeros(drawn):
    runs = [(f"run {i}", f"label {i}", np.array([2.0, 1.0, 1e-20]), 1.9) for i in range(9)]
    drawn(figures.spectrum, runs, "title")
    assert all(len(line) == 2 for line in drawn.lines)
    assert {"label 0", "1.9", "effective rank: the lower, the more collapsed"} <= set(drawn.texts)


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
    assert [(run, name, values.tolist()) for run, name, values in spectra] == [
        (run.removeprefix("phantom-"), name, [4.0 + i, 1.0]) for i, (run, name) in enumerate(overview.SPECTRA.items())]
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
