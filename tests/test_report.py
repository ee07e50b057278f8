"""Metrics files, tables, the report, and that plots draw what they are given."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from unime_jax import report
from unime_jax.report import plots, style

# ---------------------------------------------------------------- metrics files


def test_metrics_are_readable_while_the_run_goes_on(tmp_path):
    writer = report.MetricsWriter(tmp_path / "run", tensorboard=False)
    writer.write(1, {"loss": np.float32(0.5), "x": float("nan")})
    writer.write(1, {"validation/r1": 0.25})
    assert report.read_metrics(tmp_path / "run") == [
        {"step": 1, "loss": 0.5, "x": None, "validation/r1": 0.25}
    ]
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    writer.close()


def test_resuming_drops_later_lines_and_a_torn_one(tmp_path):
    with report.MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step in range(1, 7):
            writer.write(step, {"loss": step / 10})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')
    with report.MetricsWriter(tmp_path, first_step=4, tensorboard=False) as writer:
        writer.write(5, {"loss": 9.0})
    lines = report.read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert lines[-1]["loss"] == 9.0
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5


def test_a_fresh_run_starts_anew(tmp_path):
    for loss in (1.0, 2.0):
        with report.MetricsWriter(tmp_path, tensorboard=False) as writer:
            writer.write(0, {"loss": loss})
            writer.write(1, {"loss": loss})
    assert [line["loss"] for line in report.read_metrics(tmp_path)] == [2.0, 2.0]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert report.read_metrics(tmp_path / "nothing") == []


def test_tensorboard_needs_no_torch(tmp_path):
    """Where torch is installed, tensorboardX would take it; in a process that has none so far."""
    code = (
        "import sys; from unime_jax import report; report.MetricsWriter(sys.argv[1]).close(); "
        "assert 'torch' not in sys.modules; import torch"
    )
    pytest.importorskip("torch")
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True)


def test_tensorboard_holds_the_same_numbers(tmp_path):
    with report.MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": 0.5, "validation/r1": 0.125})
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import RecordWriter  # noqa: F401 (the package is there)

    found = {}
    for path in (tmp_path / "tensorboard").iterdir():
        content, at = path.read_bytes(), 0
        while at < len(content):
            size = int.from_bytes(content[at : at + 8], "little")
            event = Event.FromString(content[at + 12 : at + 12 + size])
            found |= {v.tag: (event.step, v.simple_value) for v in event.summary.value}
            at += 12 + size + 4
    assert found == {"train/loss": (1, 0.5), "validation/r1": (1, 0.125)}


# ---------------------------------------------------------------- tables and the report

TABLE = report.Table(
    header=("row", "R@1", "n"),
    rows=[("chance", 0.5, None), ("a|b", 12.34, 7), ("c", 12.31, 8), ("teacher", 50.0, 9)],
    formats=("", ".1f", "d"),
    best=("R@1",),
    reference=("chance", "teacher"),
)


def test_markdown_table():
    assert TABLE.markdown().splitlines() == [
        "| row | R@1 | n |",
        "| --- | ---: | ---: |",
        "| chance | 0.5 | - |",
        "| a\\|b | **12.3** | 7 |",
        "| c | **12.3** | 8 |",
        "| teacher | 50.0 | 9 |",
    ]


def test_terminal_table_is_aligned():
    assert TABLE.text().splitlines() == [
        "row       R@1   n",
        "-------  -----  -",
        "chance    0.5   -",
        "a|b      12.3*  7",
        "c        12.3*  8",
        "teacher  50.0   9",
    ]


def test_nan_is_shown_but_never_the_best_and_no_json():
    table = report.Table(("row", "x"), [("a", float("nan")), ("b", 0.5)], ("", ".1f"), best=("x",))
    assert table.markdown().splitlines()[2:] == ["| a | nan |", "| b | **0.5** |"]
    assert table.records() == [{"row": "a", "x": None}, {"row": "b", "x": 0.5}]


def test_rows_must_fit_the_header():
    with pytest.raises(ValueError, match="2 values, not 3"):
        report.Table(("a", "b", "c"), [(1, 2)])


def test_report_is_written_in_both_forms(tmp_path):
    path = report.write_report(
        tmp_path / "out",
        "Results",
        [
            report.Section("Scores", "What was measured.", TABLE, note="Read it so."),
            report.Section("Losses", image="losses.png"),
        ],
        seconds=3.5,
    )
    text = path.read_text()
    assert path.name == "report.md"
    for part in ["# Results", "## Scores", TABLE.markdown(), "Read it so.", "](losses.png)"]:
        assert part in text
    stored = json.loads((tmp_path / "out" / "report.json").read_text())
    assert stored["tables"]["Scores"][0] == {"row": "chance", "R@1": 0.5, "n": None}
    assert stored["images"] == {"Losses": "losses.png"} and stored["seconds"] == 3.5
    assert sorted(os.listdir(tmp_path / "out")) == ["report.json", "report.md"]


# ---------------------------------------------------------------- plots


@pytest.fixture
def drawn(monkeypatch):
    """Catches the figure of a plot, so that a test can ask what is on it."""
    import matplotlib.figure

    figures = []
    save = matplotlib.figure.Figure.savefig

    def keep(figure, *args, **kwargs):
        figures.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
    return figures


def texts(figure):
    import matplotlib.text

    return [t.get_text() for t in figure.findobj(matplotlib.text.Text) if t.get_text()]


def test_loss_plot(tmp_path, drawn):
    steps = [
        {"step": s, "loss": 2.0 / s, "positive_cosine": s / 20, "hard_negative_cosine": None}
        for s in range(1, 11)
    ]
    steps[4]["validation/image_to_text_recall_at_10"] = 0.25
    path = report.plot_losses(
        {"Stage 1": steps[:4], "Nothing": [], "Stage 2": steps}, tmp_path / "new" / "x.png"
    )
    assert path.stat().st_size > 5000
    words = texts(drawn[0])
    assert {"Stage 1", "Stage 2", "matching pairs", "i2t R@10"} <= set(words)
    assert "Nothing" not in words and "hard negatives" not in words
    raw = drawn[0].axes[1].lines[0]  # first row, second column
    np.testing.assert_allclose(raw.get_ydata(), [2.0 / s for s in range(1, 11)])
    of_stage_2 = [
        color
        for name, (_, color) in plots.COSINES.items()
        if "negative" in name or "positive" in name
    ]
    assert len(set(of_stage_2)) == len(of_stage_2) == 3  # that stand in one panel
    legends = [ax.get_legend() for ax in drawn[0].axes if ax.get_legend()]
    assert len(legends) == 3
    for legend in legends:  # above its axes: it covers no curve
        assert legend.get_window_extent().y0 >= legend.axes.get_window_extent().y1 - 1
    with pytest.raises(ValueError, match="no run has any metrics"):
        report.plot_losses({"Nothing": []}, tmp_path / "y.png")


def test_long_names_stay_inside_the_figure(tmp_path, drawn):
    names = [f"{place} run of twenty-five letters" for place in "abcde"]
    rows = {name: {"IND": 10.0, "OOD": 20.0} for name in names}
    report.plot_groups(rows, tmp_path / "x.png", label="%", reference=names[3:])
    rows, pair = {"VQA": [("GQA", 10.0, 20.0)]}, (names[0], names[1])
    report.plot_dumbbells(rows, tmp_path / "y.png", names=pair, label="%", muted=["GQA"])
    for figure, count in zip(drawn, (5, 4), strict=True):
        (legend,) = figure.legends
        assert len(legend.get_texts()) == count
        inside, box = figure.bbox, legend.get_window_extent()
        assert inside.x0 <= box.x0 and box.x1 <= inside.x1 and box.y1 <= inside.y1


def test_legends_name_everything_in_any_letters(tmp_path, drawn):
    names = ["_a", "_b$^$", "runs/llava16_stage2_of_a_very_long_name_indeed_with_seed0"]
    rows = {name: {"IND": 10.0} for name in [*names, names[2].replace("seed0", "seed1")]}
    report.plot_groups(rows, tmp_path / "x.png", label="%", chance={"IND": 5.0})
    report.plot_dumbbells({"VQA": [("GQA", 1.0, None)]}, tmp_path / "y.png", names=("_a", "_b"),
                          label="%")  # fmt: skip
    groups, dumbbells = ([t.get_text() for t in f.legends[0].get_texts()] for f in drawn)
    assert groups[:2] == names[:2] and groups[4:] == ["chance"] and len(set(groups)) == 5
    assert groups[2].startswith("runs/llava16") and groups[2].endswith("_with_seed0")
    assert all(len(name) <= 48 for name in groups)
    assert dumbbells == ["_a", "_b", "_b, lower"]
    with style.figure_of(2.0, 2.0, os.devnull) as figure:
        style.legend_above(figure, [])
        assert not figure.legends


def test_texts_are_wrapped_by_their_width_and_boxes_stand_for_unknown_letters():
    with style.figure_of(2.0, 2.0, os.devnull) as figure:
        narrow, wide = (
            style.wrap(figure, f"{letter * 3} " * 60, 1.3, size=7.6, lines=4) for letter in "iW"
        )
    assert len(narrow) == len(wide) == 4 and len(narrow[0]) > 2 * len(wide[0])
    assert style.drawable("a\u4e00 b") == "a\u25a1 b"


def test_long_runs_are_thinned_by_means(tmp_path, drawn):
    steps = [{"step": s, "loss": float(s)} for s in range(1, 20_001)]
    report.plot_losses({"long": steps}, tmp_path / "x.png")
    raw = drawn[0].axes[0].lines[0]
    assert len(raw.get_xdata()) == 1000
    np.testing.assert_allclose(raw.get_xdata()[:2], [10.5, 30.5])
    np.testing.assert_allclose(raw.get_ydata(), raw.get_xdata())


def test_smoothing_keeps_lines_and_removes_noise():
    line = np.linspace(5, 1, 60)
    np.testing.assert_allclose(plots._smooth(line), line)
    noisy = line + np.random.default_rng(0).normal(size=60)
    assert np.abs(plots._smooth(noisy) - line).mean() < 0.6 * np.abs(noisy - line).mean()
    np.testing.assert_array_equal(plots._smooth(line[:2]), line[:2])


def test_cosine_matrices_share_a_scale_and_tell_the_means(tmp_path, drawn):
    matrix = np.full((4, 4), 0.25) + 0.5 * np.eye(4)
    path = report.plot_cosine_matrices(
        [("before", np.full((4, 4), 0.875)), ("after", matrix)], tmp_path / "x.png"
    )
    assert path.is_file()
    images = [ax.images[0] for ax in drawn[0].axes[:2]]
    assert {image.get_clim() for image in images} == {(0.0, 1.0)}
    assert any(t.split() == "pairs 0.75 others 0.25".split() for t in texts(drawn[0]))


def test_retrieval_sheet_ticks_the_right_captions(tmp_path, drawn):
    similarity = np.array([[0.9, 0.1, 0.5, 0.3], [0.9, 0.8, 0.7, 0.1]])
    images = [np.zeros((20, 30, 3), np.uint8), np.zeros((400, 30, 4), np.uint8)]
    captions = ["a dog", "$\\frac a$ cat " + "of many words " * 9, "a fish", "a cow"]
    report.plot_retrieval_sheet(images, captions, similarity, [0, 3], tmp_path / "x.png", top=3)
    words = texts(drawn[0])
    assert words.count("✓") == 1
    order = [w for w in words if w in ("a dog", "a fish", "a cow")]
    assert order == ["a dog", "a fish", "a cow", "a dog", "a fish"]
    assert "rank 4:  a cow" in words
    assert any(w.startswith("$\\frac a$ cat of many") and w.endswith("…") for w in words)


def test_pictures_are_squared_on_white():
    image = np.zeros((2, 4, 4), np.uint8)
    image[..., 3] = [[0, 255, 255, 255]] * 2
    square = style.square(image)
    assert square.shape == (4, 4, 3)
    assert square[0].min() == 255 and square[1, 0].min() == 255 and square[1, 1].max() == 0
    assert style.square(np.full((3, 2), 7, np.uint8))[0, 0].tolist() == [7, 7, 7]


def test_recall_bars_tell_their_values(tmp_path, drawn):
    panels = {
        title: {"chance": {1: 0.005, 10: 0.05}, "ours": {1: value, 10: None}}
        for title, value in [("image to text", 0.125), ("text to image", 0.25)]
    }
    report.plot_recall(panels, tmp_path / "x.png", reference=["chance"])
    words = texts(drawn[0])
    assert {"0.5", "5.0", "12.5", "25.0", "R@1", "R@10", "chance", "ours"} <= set(words)
    assert "0.0" not in words
