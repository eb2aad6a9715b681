"""`depo report`: numbers from cases small enough to work out by hand, and the page in a browser."""

import json
import os
import re
import sys
import time
from pathlib import Path

import made_run
import numpy as np
import pytest

from depo_plugin.commands import cli
from depo_plugin.report import figures
from depo_plugin.report.numbers import Numbers, Ratio, bins, weighted_mean
from depo_plugin.report.runs import NoRunError, RunFiles, SeveralRunsError, find, names_of
from depo_plugin.report.summary import key_figures, percent, points, sentences, settings_rows, source_table

CHROMIUM = Path("/usr/bin/chromium")
OPTIONS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


def numbers(folder, metrics=(), groups=(), settings=None, name="run"):
    """The numbers of a run with these lines."""
    folder = folder / "depo"
    folder.mkdir(parents=True, exist_ok=True)
    if metrics:
        made_run.dump(folder / "metrics.jsonl", [prefixed(row) for row in metrics])
    if groups:
        made_run.dump(folder / "groups.jsonl", list(groups))
    if settings:
        (folder / "settings.json").write_text(json.dumps(settings))
    files = RunFiles(folder)
    files.update()
    return Numbers(files, name)


def prefixed(row):
    return {name if name == "step" or "/" in name else f"depo/{name}": value for name, value in row.items()}


def group(step, key, y, q=1.0, reason="passed", **others):
    line = {"step": step, "key": key, "source": "a", "p": 0.5, "v": 0.9, "q": q, "reason": reason, "y": y, "n": 4}
    return line | {"signal": 0 < y < 1, "tokens": 100} | others


def said(run, warning=None):
    return [one.text for one in sentences(run) if warning is None or one.warning == warning]


# ── Reading ──


def test_a_run_is_found_directly_or_at_any_depth(tmp_path):
    for folder in ("one/depo", "deep/x/model/depo", "two/a/depo", "two/b/depo", "none/depo"):
        (tmp_path / folder).mkdir(parents=True)
        if "none" not in folder:
            (tmp_path / folder / "metrics.jsonl").touch()
    (tmp_path / "none" / "depo" / "global_step8.safetensors").touch()  # a folder of checkpoints
    assert find(tmp_path / "one") == find(tmp_path / "one" / "depo") == tmp_path / "one" / "depo"
    assert find(tmp_path / "deep") == tmp_path / "deep/x/model/depo"
    with pytest.raises(SeveralRunsError, match=r"2 runs are below it.*two/a, .*two/b"):
        find(tmp_path / "two")
    with pytest.raises(NoRunError, match=r"no data of a DEPO run \(looked for depo/metrics.jsonl in this folder"):
        find(tmp_path / "none")
    with pytest.raises(NoRunError, match="there is no such folder"):
        find(tmp_path / "missing")


def test_what_a_resume_wrote_again_counts_once(tmp_path):
    metrics = [{"step": s, "kept": k} for s, k in ((1, 1), (2, 2), (3, 3), (2, 20), (3, 30))]
    groups = [group(1, "k1", 0.0), group(2, "k2", 0.0), group(3, "k3", 0.0)]
    groups += [group(2, "k4", 0.5), group(2, "k5", 0.25), group(2, "k5", 0.75)]
    run = numbers(tmp_path, metrics, groups)
    assert run.metric("kept").tolist() == [1, 20, 30]
    assert run.step_N.tolist() == [1, 2, 2]
    assert run.y_N.tolist() == [0.0, 0.5, 0.75]


def test_half_a_line_waits_and_a_broken_line_is_counted(tmp_path):
    path = tmp_path / "depo" / "metrics.jsonl"
    path.parent.mkdir()
    path.write_text(
        '{"step": 1, "depo/kept": 4}\n{"step": 2, "depo/ke{"step": 2}\n[1]\n{"step": null}\n{"step": 3, "de'
    )
    files = RunFiles(path.parent)
    assert files.update()
    assert (files.steps, files.bad_lines) == ([1], 3)
    assert not files.update()
    with path.open("a") as file:
        file.write('po/kept": 7}\n')
    assert files.update()
    assert (files.steps, files.rows) == ([1, 3], [{"depo/kept": 4}, {"depo/kept": 7}])
    assert "3 lines of the files could not be read and are left out." in said(Numbers(files, "run"), warning=True)


@pytest.mark.parametrize("kind", ["shorter", "longer", "removed"])
def test_a_run_that_is_started_anew_in_the_same_folder_is_read_from_its_start(tmp_path, kind):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 101)))
    files = RunFiles(tmp_path)
    assert files.update()
    path.replace(tmp_path / "the old one")
    if kind == "removed":
        assert not files.update()
        assert files.steps == []
    count = 200 if kind == "longer" else 50
    path.write_text("".join(f'{{"step": {step}, "depo/kept": 1}}\n' for step in range(1, count + 1)))
    assert files.update()
    assert files.steps == list(range(1, count + 1))
    assert files.rows == [{"depo/kept": 1}] * count


def test_odd_values_in_the_files_do_no_harm(tmp_path):
    odd = group(1, ["list"], 0.5) | {"q": 0, "p": "x", "reason": ["?"], "source": None, "tokens": None, "signal": 1}
    run = numbers(tmp_path, [{"step": 1, "kept": None, "scanned": "many"}], [odd, group(1, "k", 1.0)])
    assert run.q_N.tolist() == [1.0, 1.0]
    assert np.isnan(run.p_N[0])
    assert run.signal.over() == 0.5
    assert [source.name for source in run.sources()] == ["a"]
    assert key_figures([run]).rows


def test_names_tell_runs_apart():
    assert names_of([Path("/x/a"), Path("/x/b")]) == ["a", "b"]
    assert names_of([Path("/x/a/model"), Path("/x/b/model")]) == ["a/model", "b/model"]
    assert names_of([Path("/x"), Path("/x")]) == ["//x (1)", "//x (2)"]


# ── Numbers ──


def test_a_ratio_weighs_steps_by_what_is_in_them():
    ratio = Ratio(np.array([1.0, np.nan, 6.0]), np.array([10.0, 5.0, 30.0]))
    assert ratio.over() == 7 / 40
    np.testing.assert_allclose(ratio.smooth(3), [0.1, 7 / 40, 0.2])
    assert np.isnan(ratio.over(slice(1, 2)))


def test_bins_and_their_error():
    found = bins(np.array([0.1, 0.2, 0.3, 0.9]), np.array([0.0, 0.5, 1.0, 1.0]), least=2)
    np.testing.assert_allclose(found.predicted, [0.15, 0.6])
    np.testing.assert_allclose(found.observed, [0.25, 1.0])
    assert found.off() == pytest.approx((0.1 + 0.4) / 2)
    assert bins(np.array([0.1]), np.array([0.0]), least=2) is None


def test_a_weighted_mean_and_its_error():
    # weights 1, 1, 2 of 0, 1, 1: mean 3/4; error √(1·9/16 + 1·1/16 + 4·1/16)/4 = √(14)/16; size 16/6
    found = weighted_mean(np.array([0.0, 1.0, 1.0]), np.array([1.0, 1.0, 2.0]))
    assert found == pytest.approx((0.75, np.sqrt(14) / 16, 16 / 6))
    assert weighted_mean(np.array([1.0]), np.array([0.0])) is None


def test_the_main_sentences_of_a_run(tmp_path):
    """Step 1 is warm-up. Then 31 of 100 prompts are kept, 82% have a signal, and 0.82/0.38 is the gain."""
    metrics = [{"step": 1, "kept": 100, "scanned": 100, "effective_ratio": 0.3, "effective_gain": 1.0}]
    for step in range(2, 30):
        row = {"step": step, "kept": 31, "scanned": 100, "effective_ratio": 0.82, "effective_gain": 0.82 / 0.38}
        row |= {"time_blocked": 1.0, "time_step": 10.0, "forced": 6, "unscored": 1, "rollouts_saved": 1234.5}
        metrics.append(row)
    run = numbers(tmp_path, metrics, settings={"depo": {"filter": {"warmup_steps": 1}}})
    assert said(run, warning=False)[:4] == [
        "29 steps; the figures below are over the 28 steps after the warm-up, which keeps every prompt.",
        "Rolled out 31% of the prompts it looked at.",
        "82% of the groups had a signal, about 38% would have without the filter: 2.2 times as many to learn from for "
        "the same rollouts.",
        "Dynamic sampling would have paid 1,234 more responses for as many groups with a signal.",
    ]
    assert said(run, warning=True) == [
        "19% of the groups filled batches up although the rule rejected them: too few prompts pass the filter's rule.",
        "Training waited 10% of the time for the estimator.",
        "groups.jsonl is missing or empty: no calibration, data sources, rollouts or tokens.",
    ]


def test_a_filter_that_does_not_help_is_said(tmp_path):
    row = {"kept": 10, "scanned": 20, "effective_ratio": 0.5, "effective_gain": 1.0}
    run = numbers(tmp_path, [{"step": step} | row for step in range(1, 4)])
    text = "50% of the groups had a signal, about 50% would have without the filter: the filter does not help here."
    assert text in said(run, warning=True)
    assert "3 steps. So few steps give rough numbers." in said(run, warning=True)


def test_without_metrics_the_groups_are_weighted(tmp_path):
    """Passed: 0.5 and 1.0, q = 1. Explored: 0.0 with q = 0.25, weight 4. Forced and unknown ones have no weight."""
    groups = [group(1, "a", 0.5), group(1, "b", 1.0), group(1, "c", 0.0, 0.25, "explored")]
    groups += [group(1, "d", 1.0, 1.0, "forced"), group(1, "e", 1.0, 1.0, None)]
    run = numbers(tmp_path, (), groups)
    assert run.reward_all.over() == pytest.approx(1.5 / 6)
    assert run.signal_without.over() == pytest.approx(1 / 6)
    assert run.signal.over() == pytest.approx(1 / 5)
    assert run.rollouts.over() == 20
    assert run.tokens.over() == 500
    assert "metrics.jsonl is missing or empty: no keep rate and no times." in said(run, warning=True)


@pytest.mark.parametrize("settings", [{"depo": {"shadow": True}}, None])
def test_a_shadow_run_is_weighted_with_q(tmp_path, settings):
    """Signals 1, 0 with q 0.75, 0.25: half without the filter, three quarters with it, half of it kept."""
    groups = [group(1, "a", 0.5, 0.75, "shadow"), group(1, "b", 1.0, 0.25, "shadow")]
    metrics = [
        {"step": 1, "effective_ratio": 0.5, "kept": 2, "scanned": 2, "effective_gain": 1.0, "target_mean": 0.75}
    ]
    run = numbers(tmp_path, metrics, groups, settings)
    assert (run.signal.over(), run.signal_without.over(), run.keep.over()) == (0.75, 0.5, 0.5)
    assert run.reward.over() == pytest.approx(0.75 * 0.5 + 0.25)
    assert run.reward_all.over() == 0.75
    assert run.rollouts.over() == pytest.approx(4 / 0.75)
    text = said(run)
    assert any("nothing was filtered" in one for one in text)
    assert "The filter would have rolled out about 50% of the prompts it looked at." in text
    assert (
        "50% of the groups had a signal, about 75% would have with the filter: 1.5 times as many to learn from for "
        "the same rollouts."
    ) in text


@pytest.mark.parametrize(
    ("shift", "text"), [(0.0, "Predictions are calibrated"), (0.25, "off by 25 points on average")]
)
def test_calibration_is_judged(tmp_path, shift, text):
    p = np.tile([0.25, 0.5], 100)
    groups = [group(i // 10 + 1, f"{i}", y - shift, p=y) for i, y in enumerate(p)]
    found = [one for one in sentences(numbers(tmp_path, (), groups)) if "Predictions" in one.text]
    assert [text in one.text for one in found] == [True]
    assert found[0].warning == (shift > 0)
    assert ("mostly too high" in found[0].text) == (shift > 0)


def test_a_source_that_gets_worse_is_named_only_if_it_is_no_chance(tmp_path):
    """Of "a" 19 of 20 groups pass in the first quarter and 10 of 20 in the last; "b" falls by one group of 20."""
    groups = []
    passed = {"a": (19, 19, 15, 15, 15, 15, 10, 10), "b": (10, 10, 10, 10, 10, 10, 10, 9)}
    for step in range(1, 9):
        for source, of_20 in passed.items():
            ys = [float(i < of_20[step - 1]) for i in range(20)]
            groups += [group(step, f"{source}{step}.{i}", y, source=source) for i, y in enumerate(ys)]
    run = numbers(tmp_path, (), groups)
    named = [text for text in said(run) if "Problems of" in text]
    assert named == ["Problems of source a lose 45 points (from 0.95 to 0.50)."]
    first = {row[0]: row for row in source_table(run).rows}["a"]
    assert first[1] == "160"
    assert first[3].startswith("0.95 ± 0.03")  # √(0.95·0.05/40) = 0.034
    assert first[4].startswith("0.50 ± 0.08")


def test_steps_in_which_the_estimator_was_behind_are_told(tmp_path):
    """Steps without a judgement have no `kept`: their groups are all unsent."""
    good = {"kept": 32.0, "unmatched": 0.0, "labels_unsent": 0.0, "effective_ratio": 0.5}
    bad = {"time_blocked": 1.0, "labels_unsent": 32.0}
    metrics = [{"step": step} | (good if step <= 30 else bad) for step in range(1, 41)]
    told = said(numbers(tmp_path, metrics), warning=True)
    assert "25% of the groups were not learned from: the estimator was behind." in told
    assert "In 25% of the steps the estimator judged no group: it was behind, or did not answer." in told


def test_dropped_groups_are_a_share_of_all(tmp_path):
    """8 groups a step are judged, 24 dropped."""
    metrics = [{"step": step, "kept": 8.0, "labels_dropped": 24.0 * step} for step in range(1, 11)]
    groups = [group(step, f"{step}.{i}", 0.5) for step in range(1, 11) for i in range(8)]
    told = said(numbers(tmp_path, metrics, groups), warning=True)
    assert "75% of the groups were not learned from: a score is NaN or infinite." in told


def test_a_source_whose_rejected_prompts_were_not_explored_has_no_pass_rate(tmp_path):
    metrics = [{"step": 1, "depo/kept/a": 4, "depo/rejected/a": 96, "depo/kept/b": 4, "depo/rejected/b": 0}]
    groups = [group(1, f"{s}{i}", 0.5, source=s) for s in "ab" for i in range(4)]
    rows = {row[0]: row for row in source_table(numbers(tmp_path, metrics, groups)).rows}
    assert rows["a"][2:5] == ["4%", "—", "—"]
    assert rows["b"][2:5] == ["100%", "0.50 ± 0.00", "0.50 ± 0.00"]


def test_time_adds_up_to_the_step(tmp_path):
    row = {"step": 1, "timing/ppo_train": 30.0, "timing/make_experience": 8.0, "timing/broadcast": 2.0}
    row |= {"time_step": 95.0, "time_blocked": 5.0}
    parts = {name: x.item() for name, x in numbers(tmp_path, [row]).time_S.items()}
    assert parts == {"training": 40, "blocked": 5, "rollout": 50}


def test_words_for_numbers():
    assert [percent(x) for x in (0, 0.004, 0.314, 0.999, 1, np.nan)] == ["0%", "<1%", "31%", ">99%", "100%", "—"]
    assert [points(x) for x in (0.02, -0.0101, 0.004)] == ["2 points", "1 point", "0.4 points"]


def test_settings_are_flat_and_compared(tmp_path):
    a = numbers(tmp_path / "a", [{"step": 1}], settings={"depo": {"x": None, "y": {"z": True}}, "launch": {}})
    b = numbers(tmp_path / "b", [{"step": 1}], settings={"depo": {"x": 3}})
    assert settings_rows([a, b]) == [["depo.x", "null", "3"], ["depo.y.z", "true", "—"], ["launch", "{}", "—"]]


# ── The command ──


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The page of one made run, and that of two."""
    root = tmp_path_factory.mktemp("made runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "DPI", 60)  # quick
        return write_pages(root)


def write_pages(root):
    made_run.write(root / "a")
    made_run.write(root / "b", seed=2, low=0.3, groups=False)
    with (root / "a/model/depo/groups.jsonl").open("a") as file:
        file.write('{"step": 41, "key": "00')  # the run is still writing
    assert cli.main(["report", str(root / "a")]) == 0
    assert cli.main(["report", str(root / "a"), str(root / "b"), "--out", str(root / "out")]) == 0
    return root / "a/model/depo/report/report.html", root / "out/report.html"


@pytest.mark.slow
def test_the_page_is_one_file_that_escapes_what_users_wrote(pages):
    for page in pages:
        text = page.read_text()
        assert "<script" not in text
        assert "&lt;script&gt;alert(1)&lt;_script&gt;" in text
        plain = re.sub(r"data:image/png;base64,[^\"]*", "", text)
        assert not re.search(r"(src|href|srcset)=\"(?!data:|\"|#)", plain.replace('srcset=""', ""))
        assert "http://" not in plain
        assert "https://" not in plain
        assert text.startswith("<!DOCTYPE html>")
        assert '<html lang="en">' in text
        assert text.count("<picture>") == text.count('<img class="print"') == 8
        assert text.count("<img ") == len(re.findall(r'alt="[^"]{20,}"', text)) == 16
        images = {path.name for path in page.parent.glob("*.png")}
        assert len(images) == 16
        assert {"signal.png", "signal-dark.png"} <= images


@pytest.mark.slow
def test_two_runs_are_laid_over_each_other(pages):
    text = pages[1].read_text()
    differences = text[text.index("Settings that differ") : text.index("<h2>Figures")]
    assert "depo.filter.low" in differences
    assert "depo.filter.high" not in differences
    assert "Key figures of each run" in text
    assert "Data sources of a" in text
    assert "Data sources of b" not in text
    assert "groups.jsonl is missing or empty" in text


def test_a_run_with_little_in_it_has_a_page(tmp_path, capsys):
    numbers(tmp_path, [{"step": 1, "kept": 4}])
    assert cli.main(["report", str(tmp_path)]) == 0
    page = Path(capsys.readouterr().out.splitlines()[-1])
    assert page == tmp_path / "depo/report/report.html"
    text = page.read_text()
    assert "Not drawn, because the files do not have the data: Groups with a signal," in text
    assert "<picture>" not in text


def test_errors_name_what_was_looked_for(tmp_path, capsys, monkeypatch):
    assert cli.main(["report", str(tmp_path)]) == 1
    assert "looked for depo/metrics.jsonl in this folder and in every folder below it" in capsys.readouterr().err
    (tmp_path / "depo").mkdir()
    (tmp_path / "depo/metrics.jsonl").write_text('{"step": 1')
    assert cli.main(["report", str(tmp_path)]) == 1
    assert "have no step yet" in capsys.readouterr().err
    numbers(tmp_path, [{"step": 1, "kept": 4}])
    (tmp_path / "file").touch()
    assert cli.main(["report", str(tmp_path), "--out", str(tmp_path / "file")]) == 1
    assert "Name another folder: --out DIR" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.delitem(sys.modules, "depo_plugin.report.page")
    monkeypatch.delattr("depo_plugin.report.page")
    assert cli.main(["report", str(tmp_path)]) == 1
    assert "pip install 'openrlhf-depo[report]'" in capsys.readouterr().err


# ── In a browser ──


@pytest.fixture(scope="module")
def browser():
    """Debian's Chromium, or the one that DEPO_CHROMIUM names."""
    api = pytest.importorskip("playwright.sync_api")
    path = Path(os.environ.get("DEPO_CHROMIUM", CHROMIUM))
    if not path.exists():
        pytest.skip(f"no {path}")
    with api.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=str(path), args=OPTIONS)
        yield browser
        browser.close()


# For each text on the page: its contrast with the nearest background that is not transparent, if it is below 4.5.
LOW_CONTRAST = """() => {
  const rgb = text => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(x => x / 255)
    .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
    .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
  const found = [];
  let seen = 0;
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const element = walk.currentNode.parentElement;
    if (!walk.currentNode.textContent.trim() || !element.checkVisibility()) continue;
    let behind = element;
    while (behind && rgb(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
    const back = behind ? rgb(getComputedStyle(behind).backgroundColor) : [255, 255, 255];
    const [a, b] = [light(rgb(getComputedStyle(element).color)), light(back)].sort((x, y) => y - x);
    seen += 1;
    if ((a + 0.05) / (b + 0.05) < 4.5) found.push(element.outerHTML.slice(0, 80));
  }
  return [seen, found];
}"""
# For each picture: whether it has loaded, and whether the dark, the light, or the print image is what is seen.
IMAGES = """() => [...document.querySelectorAll("picture img")].map(image => {
  const print = image.closest("figure").querySelector("img.print");
  const source = image.parentElement.querySelector("source");
  const seen = image.checkVisibility();
  const loaded = image.complete && image.naturalWidth > 0 && print.complete && print.naturalWidth > 0;
  return [loaded, seen && image.currentSrc === source.srcset, seen && image.currentSrc === image.src,
    print.checkVisibility() && print.src === image.src];
})"""


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1], ids=["one run", "two runs"])
@pytest.mark.parametrize("size", [(390, 844), (1280, 900)], ids=["phone", "desktop"])
def test_the_page_in_a_browser(browser, pages, which, size):
    page = browser.new_page(viewport={"width": size[0], "height": size[1]})
    said, requests = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(pages[which].as_uri())
    page.locator("summary").click()
    for media, scheme in (("screen", "light"), ("screen", "dark"), ("print", "dark")):
        page.emulate_media(media=media, color_scheme=scheme)
        on_screen = media == "screen"
        expected = [True, on_screen and scheme == "dark", on_screen and scheme == "light", not on_screen]
        # The browser takes the picture of another colour scheme a little later, and then decodes it.
        until = time.monotonic() + 10
        while (images := page.evaluate(IMAGES)) != [expected] * 8 and time.monotonic() < until:
            page.wait_for_timeout(20)
        assert images == [expected] * 8
        seen, low = page.evaluate(LOW_CONTRAST)
        assert seen > 100
        assert low == []
        if media == "screen":
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert said == []
    assert [url for url in requests if not url.startswith("data:")] == [pages[which].as_uri()]
    page.close()
