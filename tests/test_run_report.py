"""Reports: what is read of a run's folder, whatever became of the run, and what the page shows of it."""

import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from run_cases import DOMAINS, write_run

from moejax.commands import report
from moejax.commands.main import main
from moejax.run_report.axis import Axis, short
from moejax.run_report.chart import HEIGHT, Chart, Line
from moejax.run_report.colours import LEVELS, levels, series
from moejax.run_report.curves import Curve
from moejax.run_report.domains import domains_svg
from moejax.run_report.heatmap import Heatmap, scale_end
from moejax.run_report.page import render
from moejax.run_report.panels import loads_by_domain, loads_over_time
from moejax.run_report.reading import PARSED, read_metrics, read_runs
from moejax.run_report.tables import domain_rows, final_values


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "first")


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "second", steps=150, seed=1, lr=2e-3)


def write_lines(path: Path, *lines: str) -> Path:
    path.write_text("".join(lines))
    return path


def line(step: int, loss: float | None, **more: object) -> str:
    return json.dumps({"step": step, "loss": loss, **more}) + "\n"


def test_a_resumed_run_is_read_as_it_went_on(tmp_path):
    path = write_lines(
        tmp_path / "metrics.jsonl",
        *(line(step, float(step), old=1.0) for step in range(1, 9)),
        *(line(step, 10.0 * step) for step in range(4, 7)),
    )
    curves, last, unreadable = read_metrics(path)
    assert curves["loss"].steps.tolist() == [1, 2, 3, 4, 5, 6]
    assert curves["loss"].values.tolist() == [1, 2, 3, 40, 50, 60]
    assert curves["old"].steps.tolist() == [1, 2, 3]
    assert (last["step"], unreadable) == (6, 0)


def test_lines_that_a_kill_cut_off_are_left_out(tmp_path):
    whole = line(2, 2.0)
    path = write_lines(tmp_path / "metrics.jsonl", line(1, 1.0), whole[:11], whole, line(3, None), whole[:-9])
    curves, last, unreadable = read_metrics(path)
    assert curves["loss"].steps.tolist() == [1, 2]  # a loss that is not finite is null
    assert (last, unreadable) == ({"step": 3, "loss": None}, 2)


def test_of_a_long_run_no_peak_and_no_evaluation_is_missed(tmp_path):
    rows = [line(step, 99.0 if step == 7003 else 2.0, learning_rate=0.1) for step in range(1, 20_001)]
    rows[5000] = line(5001, 2.0, **{"eval/loss/chat": 3.0})
    began = time.perf_counter()
    curves, _, _ = read_metrics(write_lines(tmp_path / "metrics.jsonl", *rows))
    assert time.perf_counter() - began < 10
    assert len(curves["loss"]) == 20_000 and curves["loss"].values.max() == 99
    assert PARSED <= len(curves["learning_rate"]) <= PARSED + 1
    assert curves["learning_rate"].steps[[0, -1]].tolist() == [1, 20_000]
    assert curves["eval/loss/chat"].steps.tolist() == [5001]
    low, high = curves["loss"].band(250)
    assert len(high) == 250 and (high.values.max(), low.values.max()) == (99, 2)


def test_curves_are_smoothed_thinned_and_binned():
    ramp = Curve(np.arange(1, 11), np.arange(10.0))
    assert ramp.smoothed(1).values.tolist() == ramp.values.tolist()
    assert ramp.smoothed(5).values.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 7.5, 8]
    assert ramp.thinned(4).steps.tolist() == [1, 4, 7, 10]
    assert ramp.thinned(50).steps.tolist() == ramp.steps.tolist()
    binned = Curve(ramp.steps, np.stack([ramp.values, 2 * ramp.values], 1)).bins(3)
    assert binned.values.tolist() == [[1, 2], [4, 8], [7.5, 15]]


def test_axes_have_round_ticks():
    assert Axis.over(0, 4000, 0, 1).ticks(7) == [0, 1000, 2000, 3000, 4000]
    assert Axis.over(0.13, 2.6, 0, 1, logarithmic=True).ticks(5) == [0.2, 0.5, 1, 2]
    assert Axis.over(1e-6, 1e2, 0, 1, logarithmic=True).ticks(5) == pytest.approx([1e-6, 1e-4, 1e-2, 1, 100])
    assert Axis.over(3, 3, 0, 1).place(3) == pytest.approx(0.5)
    assert Axis.over(1, 100, 0, 10, logarithmic=True).place([1, 10, 100]).tolist() == [0, 5, 10]
    assert [short(v) for v in (0, 0.35, 3e-4, 1000, 12_000, 16_320_000)] == [
        "0",
        "0.35",
        "3e-4",
        "1000",
        "12k",
        "16.32M",
    ]


def test_a_chart_draws_its_points_where_its_axes_say():
    chart = Chart("loss", [Line("one", Curve(np.array([0, 100]), np.array([0.0, 10.0])), *series(0))], from_zero=True)
    svg = chart.svg()
    axis = {name: [float(n) for n in re.search(f'data-{name}="([^"]*)"', svg)[1].split()] for name in "xy"}
    points = [[float(n) for n in point.split(",")] for point in re.search(r'points="([^"]*)"', svg)[1].split()]
    for (x, y), step, value in zip(points, (0, 100), (0, 10), strict=True):
        for place, number, (low, high, begin, end, _) in ((x, step, axis["x"]), (y, value, axis["y"])):
            assert low + (place - begin) / (end - begin) * (high - low) == pytest.approx(number, abs=0.02)
    assert points[0][1] > points[1][1]  # larger values are higher up
    assert points[0][1] < HEIGHT


def test_levels_are_even_in_the_middle_and_steps_of_a_logarithm():
    assert levels(np.array([0, 0.25, 0.5, 1, 2, 4, 9]), 4).tolist() == [
        0, 0, LEVELS // 4, LEVELS // 2, 3 * (LEVELS // 4), LEVELS - 1, LEVELS - 1,
    ]  # fmt: skip


def cells_of(svg: str) -> np.ndarray:
    """The load of each cell, as the picture has it."""
    found: dict[tuple[int, int], float] = {}
    for load, path in re.findall(r'data-load="[^"]*?([\d.]+)" d="([^"]*)"', svg):
        for x, y, count in re.findall(r"M(\d+) (\d+)h(\d+)v1", path):
            found |= {(int(y), int(x) + i): float(load) for i in range(int(count))}
    rows, columns = (max(axis) + 1 for axis in zip(*found, strict=True))
    assert len(found) == rows * columns
    return np.array([[found[y, x] for x in range(columns)] for y in range(rows)])


def test_heatmaps_show_each_load_where_it_belongs(run):
    (read,) = read_runs([run])
    for heatmap in (*loads_by_domain(read), *loads_over_time(read)):
        np.testing.assert_allclose(cells_of(heatmap.svg(8)), np.clip(heatmap.cells, 1 / 8, 8), rtol=0.05, atol=0.006)
    over_time, by_domain = loads_over_time(read), loads_by_domain(read)
    assert [each.title for each in over_time] == [f"layer {layer}" for layer in range(4)]
    assert [each.title for each in by_domain] == list(DOMAINS)
    load = read.last["eval/router/load/code/layer_02"]
    np.testing.assert_allclose(by_domain[2].cells[2], 8 * np.array(load))
    np.testing.assert_allclose(np.mean(over_time[0].cells, 0), 1, atol=1e-3)  # the mean over experts is the even share


def test_scales_end_where_loads_do():
    def heatmap(highest: float) -> Heatmap:
        return Heatmap("", np.array([[highest, 0.0]]), "layer", "expert", ["0"], ["0", "1"], (20, 10))

    assert [scale_end([heatmap(h), heatmap(0.1)]) for h in (1.5, 3, 4, 60)] == [2, 4, 4, 8]
    assert scale_end([]) == 2


def test_an_evaluation_becomes_one_picture_that_needs_no_page():
    load = [[0.5, 0.25, 0.25], [0.2, 0.3, 0.5]]
    files = [{"name": "chat", "load": load}, {"name": "a<b", "load": load[::-1]}]
    svg = domains_svg({"layers": [1, 3], "files": files})
    assert svg.startswith('<svg xmlns="http://www.w3.org/2000/svg"')
    assert "a&lt;b" in svg and "var(" not in svg
    first, second = svg.split('class="title"')[1:]
    np.testing.assert_allclose(cells_of(first), 3 * np.array(load), rtol=0.05)
    np.testing.assert_allclose(cells_of(second), 3 * np.array(load[::-1]), rtol=0.05)
    assert re.findall(r'text-anchor="end">(\d)</text>', first) == ["1", "3"]


class Page(HTMLParser):
    """Which elements a page holds, and what they load."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.loaded: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ("meta",):
            self.open.append(tag)
        self.loaded += [value for name, value in attrs if name in ("src", "href", "xlink:href") and value]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()


def test_the_page_of_one_run(run):
    page = render(read_runs([run]))
    parsed = Page(page)
    assert parsed.open == [] and parsed.loaded == []
    assert "url(#plot)" in page and not re.search(r"url\((?!#plot)|@import|https?://(?!www\.w3\.org/2000/svg)", page)
    for title in ("training loss", "loss by domain", "bits per byte by domain", "learning rate", "router entropy"):
        assert f"<figcaption>{title}" in page
    assert "fullest expert" in page and page.count('class="heatmap"') == 4 + len(DOMAINS)
    assert "optimizer.lr" in page and "data.mixture.1.path" in page
    assert "dropped (a step)" not in page  # nothing was


def test_the_page_of_several_runs_compares_them(run, other):
    runs = read_runs([run, other])
    page = render(runs)
    assert "2 runs" in page and "Where the recipes differ" in page
    differing = page.partition("Where the recipes differ")[2].partition("</table>")[0]
    assert re.findall(r"<tr><th>([^<]*)</th><td>([^<]*)</td><td>([^<]*)</td>", differing) == [
        ("steps", "200", "150"),
        ("seed", "0", "1"),
        ("optimizer.lr", "0.001", "0.002"),
    ]
    loss = page.partition("<figcaption>training loss")[2].partition("</figure>")[0]
    assert re.findall('data-label="([^"]*)" stroke="([^"]*)"', loss) == [
        ("first", series(0)[0]),
        ("second", series(1)[0]),
    ]
    values = final_values(runs)
    assert values["steps"] == [200, 150] and values["steps skipped"] == [0, 1]
    assert values["time in steps"] == pytest.approx([70, 52.5])
    losses = [run.curves["loss"].values[-len(run.curves["loss"]) // 50 :].mean() for run in runs]
    assert values["training loss"] == pytest.approx(losses, rel=1e-2)
    first = domain_rows(runs)[0]
    lower = runs[0].last["eval/loss/bible"] < runs[1].last["eval/loss/bible"]
    assert (first.name, list(first.best[:2])) == ("bible", [lower, not lower])
    assert first.cells[0] == f"{runs[0].last['eval/loss/bible']:.4f}"


def test_a_run_of_one_step_and_nothing_else_has_a_page(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", line(1, 3.5))
    page = render(read_runs([tmp_path]))
    assert Page(page).open == []
    assert "<figcaption>training loss" in page and "3.5000" in page and "recipe" not in page


def test_a_run_that_never_had_a_finite_loss_has_a_page_too(tmp_path):
    rows = (line(step, None, learning_rate=0.0, grad_norm=1.0, skipped=step) for step in range(1, 200))
    write_lines(tmp_path / "metrics.jsonl", *rows)
    page = render(read_runs([tmp_path]))
    assert "<figcaption>training loss" not in page and "<figcaption>gradient norm" in page
    assert "<b>199</b><span>steps skipped</span>" in page


def test_what_a_run_is_called_cannot_break_the_page(tmp_path):
    folder = write_run(tmp_path / "<b>&quot;", steps=3, every=2)
    assert Page(render(read_runs([folder, write_run(tmp_path / "b", steps=1)]))).open == []


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    folders = [write_run(tmp_path / place / "run", steps=2) for place in ("a", "b")]
    assert [each.name for each in read_runs(folders)] == ["a/run", "b/run"]


def test_the_command_writes_the_page_and_prints_where(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == "report.html\n"
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    out = tmp_path / "page.html"
    assert main(["report", str(run), "--out", str(out), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["page"] == str(out) and result["runs"][0]["final"]["steps"] == 200
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "report.html"]


def test_the_example_in_the_help_runs(tmp_path, capsys, monkeypatch):
    assert report.main(["--help"]) == 0
    words = capsys.readouterr().out.splitlines()[-1].split()
    monkeypatch.chdir(tmp_path)
    write_run(Path(words[2]), steps=2)
    assert main(words[1:]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "there is no folder nowhere"),
        (["empty"], "empty has no metrics.jsonl, so it is no run"),
        (["fresh"], "holds no step yet"),
        (["fresh", "--out", "empty"], "--out empty is a folder"),
        (["fresh", "--out", "no/page.html"], "--out no/page.html: there is no folder no"),
        ([], "the following arguments are required: RUN"),
    ],
)
def test_mistakes_are_one_line_and_leave_no_page(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "fresh").mkdir()
    (tmp_path / "fresh" / "metrics.jsonl").write_text('{"step": 1, "lo')
    assert report.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1
    assert err.startswith("error: ") and message in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "fresh"]
