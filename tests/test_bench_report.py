"""The report: which records it takes, what its page shows first, and the README's section."""

import json
import sys
from html.parser import HTMLParser

import pytest
from bench_records import header, layer, network, pair, timed, write

from bench import __main__ as bench
from bench.record import ROOT
from bench.report import records, words

LABELS = ("1x1 64->64 56px", "3x3 64->64 56px", "7x7 /2 3->64 224px")
NASTY = "<script>alert(1)</script> | `x`\n<!-- bench:end --> not installed"
README = "# Title\n\nbefore\n<!-- bench:start -->\nold\n<!-- bench:end -->\nafter\n"


@pytest.fixture
def folder(tmp_path):
    """Three layers, of which two lose; a network that loses to OpenVINO; a peer that fails and one that is missing."""
    kept = tmp_path / "records"
    kept.mkdir()
    fast, slow = layer(LABELS[0], resnet18=2), layer(LABELS[1], resnet18=1, resnet50=3)
    rows = [*pair("layers", fast, 4, 8), *pair("layers", layer(LABELS[2], resnet50=1), 6, 3)]
    write(kept / "layers.jsonl", header("layers"), *rows, *pair("layers", slow, 10, 9))
    rows = [*pair("models", network(), 100, 150), timed("models", network(), "openvino", 80, 100)]
    for system, status, reason in (("onnxruntime", "missing", NASTY), ("compile", "failed", "no compiler")):
        rows.append({"suite": "models", "case": network(), "system": system, "status": status, "reason": reason})
    write(kept / "models.jsonl", header("models"), *rows)
    row = {"suite": "memory", "case": network(mode="training"), "status": "ok"}
    numbers = {"eager": {"peak_mb": 400, "kept_mb": 200}, "fused_resnet": {"peak_mb": 300, "kept_mb": 150}}
    rows = [{**row, "system": system, **found} for system, found in numbers.items()]
    write(kept / "memory.jsonl", header("memory"), *rows)
    return kept


@pytest.fixture
def readme(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(README)
    return path


class Page(HTMLParser):
    """Rows of tables as (class, text) cells, with whether they are folded; what is loaded; tags."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.loaded, self.tags, self.ids, self._cell, self._folds = [], [], [], [], False, 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.ids.append(attrs.get("id", ""))
        self.loaded += [attrs[key] for key in ("src", "href", "xlink:href", "srcset", "data") if key in attrs]
        self._folds += tag == "details"
        if tag == "tr":
            self.rows.append((self._folds > 0, []))
        if tag in ("td", "th"):
            self._cell = True
            self.rows[-1][1].append([attrs.get("class", ""), ""])

    def handle_endtag(self, tag):
        self._folds -= tag == "details"
        self._cell = self._cell and tag not in ("td", "th")

    def handle_data(self, data):
        if self._cell:
            self.rows[-1][1][-1][1] += data.strip()

    def of(self, *firsts, folded=False):
        return [cells for fold, cells in self.rows if fold == folded and cells[0][1].startswith(firsts)]


def page(folder, out):
    assert bench.main(["report", str(folder), "--out", str(out)]) == 0
    text = (out / "index.html").read_text()
    return text, Page(text)


def test_broken_files_are_named_and_skipped(folder, capsys):
    good = timed("models", network(batch=2), "eager", 1, 1)
    (folder / "empty.jsonl").write_text("")
    (folder / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    (folder / "words.jsonl").write_text(json.dumps(header("models")) + "\nno json\n" + json.dumps(good) + "\n")
    write(folder / "foreign.jsonl", header("models", format=7), good)
    write(folder / "headless.jsonl", good, good)
    write(folder / "rowless.jsonl", header("models"), {"speed": 3})
    cut = write(folder / "cut.jsonl", header("models"), timed("models", network(batch=8), "eager", 1, 1), good)
    cut.write_text(cut.read_text()[:-40])
    (device,), problems = records.load([folder])
    why = {"binary": "utf-8", "empty": "empty", "foreign": "format 7", "headless": "first line", "rowless": "line 2"}
    for (name, reason), said in zip({**why, "words": "line 2"}.items(), problems[:1] + problems[2:], strict=True):
        assert said.startswith(f"{name}.jsonl: skipped: ")
        assert reason in said
    assert problems[1].startswith("cut.jsonl: line 3")
    assert [case.fields["batch"] for case in device.of("models")] == [8, 1]
    assert bench.main(["report", str(folder), "--readme", str(folder / "absent.md"), "--check"]) == 2
    said = capsys.readouterr().err
    assert all(problem in said for problem in problems)


def test_later_run_wins(folder):
    later = header("models", date="2026-01-03", time="09:00:00")
    write(folder / "a-later.jsonl", later, *pair("models", network(device="cpu:0"), 50, 100))
    (device,), _ = records.load([folder])
    (case,) = device.of("models")
    assert case.value("fused_resnet", "median_ms") == 50
    assert case.ratio("eager") == 2
    assert case.ratio("openvino") == pytest.approx(0.8)  # of its own run
    assert (case.mixed("eager"), case.mixed("openvino")) == (False, True)


def test_run_over_fewer_networks_keeps_the_users_of_a_layer(folder):
    write(folder / "z.jsonl", header("layers", time="11:00:00"), *pair("layers", layer(LABELS[1], resnet50=3), 5, 9))
    (device,), _ = records.load([folder])
    case = next(case for case in device.of("layers") if case.fields["layer"]["label"] == LABELS[1])
    assert {name: len(users) for name, users in case.fields["used_by"].items()} == {"resnet18": 1, "resnet50": 3}


def test_losing_rows_come_first_and_are_marked(folder, tmp_path):
    text, found = page(folder, tmp_path / "out")
    rows = found.of(*LABELS)
    assert [cells[0][1] for cells in rows] == [LABELS[1], LABELS[2], LABELS[0]]  # 4 x 1 ms, 1 x 3 ms, nothing lost
    assert [cells[6] for cells in rows] == [["loss", "0.90"], ["loss", "0.50"], ["num", "2.00"]]
    assert [cells[7][1] for cells in rows] == ["4.00", "3.00", ""]
    assert "1 of 3 layer problems are faster than eager; median 0.90, worst 0.50 (7x7 /2 3-&gt;64 224px)" in text
    totals = [cells for cells in found.of("resnet18", "resnet50") if len(cells) == 7 and cells[3][1] in ("3", "4")]
    # 25 / (2 x 4 + 10) and 30 / (3 x 10 + 6)
    assert [[cells[4][1], *cells[6]] for cells in totals] == [["18.0", "num", "1.39"], ["36.0", "loss", "0.83"]]


def test_long_tables_fold_and_losses_stay_outside(tmp_path):
    rows = [row for i in range(30) for row in pair("layers", layer(f"layer-{i}", resnet50=1), 10, 9 if i == 17 else 20)]
    broken = {"case": layer("layer-broken", resnet50=1), "system": "fused_resnet", "status": "wrong", "reason": "off"}
    record = write(tmp_path / "many.jsonl", header("layers"), *rows, {"suite": "layers", **broken})
    text, found = page(record, tmp_path / "out")
    assert [cells[0][1] for cells in found.of("layer-")] == ["layer-broken", "layer-17"]
    assert len(found.of("layer-", folded=True)) == 31
    assert "1 layer problem without a result of fused_resnet" in text


def test_page_needs_nothing_else_and_escapes_what_it_shows(folder, tmp_path):
    text, found = page(folder, tmp_path / "out")
    assert all(link.startswith("#") for link in found.loaded)
    assert "@import" not in text
    assert "http" not in text
    assert not {"script", "link", "pre"} & set(found.tags)
    assert text.count("&lt;script&gt;alert(1)") == 1
    suites = ("models", "training", "layers", "ops", "memory", "startup", "accuracy", "runs", "without")
    assert [key.rpartition("-")[2] for key in found.ids if key.rpartition("-")[2] in suites] == list(suites)
    assert text.count("Not measured on this device.") == 4  # training, ops, startup, accuracy


def test_figures_are_drawn(folder, tmp_path):
    text, _ = page(folder, tmp_path / "out")
    images = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert [name.partition("threads-")[2] for name in images] == [
        "layers-roofline-batch-2.png", "memory-training.png", "models-ratios.png",
    ]  # fmt: skip
    assert all(path.stat().st_size > 10_000 for path in (tmp_path / "out").glob("*.png"))
    assert text.count("<svg") == 3
    assert "openvino 0.80, fused is slower" in text


@pytest.mark.parametrize(
    ("show", "value", "text"),
    [(words.number, 12345.6, "12,346"), (words.number, 0.99999, "1.00"), (words.number, 0.14891, "0.149"),
     (words.ratio, 0.999, "0.99"), (words.ratio, 2 / 3, "0.67"), (words.share, 1.001, "1.01")],
)  # fmt: skip
def test_rounding_hides_no_loss(show, value, text):
    assert show(value) == text


def test_no_matplotlib(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert bench.main(["report", str(folder), "--out", str(tmp_path / "out")]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


def test_readme_section(folder, tmp_path, readme, capsys):
    arguments = ["report", str(folder), "--out", str(tmp_path / "out"), "--readme", str(readme)]
    assert bench.main([*arguments, "--check"]) == 1
    assert readme.read_text() == README
    assert not (tmp_path / "out").exists()
    assert "not what the records say" in capsys.readouterr().err
    assert bench.main(arguments) == 0
    first = readme.read_text()
    assert first.startswith("# Title\n\nbefore\n<!-- bench:start -->\n")
    assert first.endswith("\n<!-- bench:end -->\nafter\n")
    assert first.count("<!-- bench:end -->") == 1
    assert "| resnet50 | 1 | fp32 | 6.67 | 12.5 | 10.0 | **0.80** (openvino) |" in first
    said = " ".join(first.split())
    assert "1 of 3 problems faster than eager, median **0.90**, best 2.00, worst **0.50** (7x7 /2 3->64 224px)" in said
    assert "peak 300 MB (0.75 of eager's), kept for backward 150 MB (0.75 of eager's)" in said
    assert "onnxruntime missing (1 of 1 in models): &lt;script>alert(1)&lt;/script> \\| \\`x\\`" in said
    assert "Test &lt;b>CPU&lt;/b>" in said
    assert bench.main(arguments) == 0
    assert readme.read_text() == first
    assert bench.main([*arguments, "--check"]) == 0


@pytest.mark.parametrize("text", ["no markers", "<!-- bench:end --><!-- bench:start -->", README + README])
def test_readme_without_markers(folder, tmp_path, readme, capsys, text):
    readme.write_text(text)
    assert bench.main(["report", str(folder), "--out", str(tmp_path / "out"), "--readme", str(readme)]) == 2
    assert "README" in capsys.readouterr().err
    assert readme.read_text() == text


@pytest.mark.parametrize("name", ["absent.jsonl", ""])
def test_nothing_to_report_on(tmp_path, capsys, name):
    assert bench.main(["report", str(tmp_path / name), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "no records to report on" in said
    assert name in said
    assert not (tmp_path / "out").exists()


def test_text_is_the_section(folder, capsys):
    assert bench.main(["report", str(folder), "--text"]) == 0
    assert "fused_resnet" in capsys.readouterr().out


def test_readme_of_this_repository_is_what_its_records_say():
    """Every number of the README is one of a record that is kept beside it."""
    assert bench.main(["report", "--check"]) == 0


def test_other_records_leave_the_readme_alone(folder, tmp_path):
    path = ROOT / "README.md"
    before = path.read_text()
    assert bench.main(["report", str(folder), "--out", str(tmp_path / "out")]) == 0
    assert path.read_text() == before
