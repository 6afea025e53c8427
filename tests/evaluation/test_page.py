import base64
import dataclasses
import re
from html.parser import HTMLParser

import pytest

from mxperts.errors import ArgumentError, MxpertsError
from mxperts.evaluation import Report, Windows, evaluate, evaluate_base, layer_errors, write_report

pytest.importorskip("matplotlib")

NASTY = "<script>alert('&')</script> $x$"
VOID = {"meta", "img", "link", "br", "hr"}


class Page(HTMLParser):
    """A page's tags, with the text in them, checked to be properly nested."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def of(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def text(self, tag: str) -> list[str]:
        return [data for name, data in self.texts if name == tag]


@pytest.fixture(scope="module")
def report(base_model, other_model, windows) -> Report:
    named = Windows.of(windows.ids.flatten().tolist(), context=24, decode=lambda ids: "<b>\x00\n" * len(ids))
    first, base = evaluate_base(base_model, named, name="bf16")
    others = [evaluate(other_model, named, base, name=name) for name in (NASTY, "w_mxfp4")]
    others.append(evaluate(base_model, named, base, name="equal"))
    layers = [layer_errors(base_model, other_model, windows, name=NASTY)]
    return Report(base=first, others=others, conditions={"text": NASTY, "versions": {"torch": "2"}}, layers=layers)


@pytest.fixture(scope="module")
def written(report, tmp_path_factory):
    return write_report(report, tmp_path_factory.mktemp("reports") / "out.html")


@pytest.fixture(scope="module")
def page(written) -> Page:
    return Page(written[0].read_text(encoding="utf-8"))


def test_page_and_pictures_are_written(written):
    folder = written[0].parent
    names = ["out.html", *(f"out-{name}.png" for name in ("divergence", "histogram", "router", "layers", "load"))]
    assert [file.name for file in written] == names
    assert sorted(p.name for p in folder.iterdir()) == sorted(names)  # nothing is left over
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in written[1:])


def test_nothing_comes_from_elsewhere(written, page):
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object")
        for name in ("src", "srcset", "href", "data", "action", "poster"):
            if name in attributes:
                assert attributes[name].startswith("#" if tag == "a" else "data:image/png;base64,"), (tag, name)
        assert not any(name.startswith("on") for name in attributes)
    (style,) = page.text("style")
    assert "url(" not in style
    assert "@import" not in style
    assert "http" not in written[0].read_text(encoding="utf-8")


def test_pictures_are_those_beside_it_and_have_a_text(written, page):
    data = {"light": [], "dark": []}  # one of which is shown
    for image in page.of("img"):
        assert len(image["alt"]) > 20
        data[image["class"]].append(base64.b64decode(image["src"].partition(",")[2]))
    assert data["light"] == [file.read_bytes() for file in written[1:]]
    assert all(png.startswith(b"\x89PNG") for png in data["dark"])
    assert len(data["dark"]) == len(data["light"])
    assert not set(data["dark"]) & set(data["light"])


def test_it_can_be_read_by_machines_and_all_people(page):
    assert page.of("html")[0]["lang"] == "en"
    assert len(page.of("caption")) == len(page.of("table")) > 5
    assert all(th["scope"] in ("col", "row") for th in page.of("th"))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert {a["href"].removeprefix("#") for a in page.of("a")} == set(ids)
    assert all(section["aria-labelledby"] in ids for section in page.of("section"))
    assert len(page.text("title")) == len(page.text("h1")) == 1


def test_what_the_models_and_texts_are_called_does_no_harm(written, page):
    text = written[0].read_text(encoding="utf-8")
    assert "<script" not in text
    assert "\x00" not in text
    assert any("<b>" in data for data in page.text("mark"))
    assert NASTY in "".join(page.text("summary"))


def test_the_scoreboard_has_the_figures(report, page):
    cells = page.text("td") + page.text("th")
    for row in report.rows:
        assert f"{row.expert_bits:.2f}" in cells
    names = [name for name in page.text("th") if name in {row.name for row in report.rows}]
    assert names[:4] == ["bf16", "equal", *(row.name for row in report.rows[2:])]  # by divergence
    assert "median" in cells
    assert "whole layer" in cells
    kl = report.rows[2].divergence.kl
    assert any(re.match(r"0\.\d+$", cell) and abs(float(cell) - kl.value) <= kl.stderr / 10 for cell in cells)


def test_worst_tokens_are_marked(report, page):
    assert len(page.of("mark")) == sum(len(row.worst) for row in report.rows) == 20
    assert "It does not differ from the base on any token." in page.text("p")
    assert any("Window" in caption for caption in page.text("caption"))


def test_dead_experts_are_named(report, tmp_path):
    (layer, load), *_ = report.base.load.items()
    base = dataclasses.replace(report.base, load={**report.base.load, layer: [0, *load[1:7], 0]})
    page = Page(
        write_report(dataclasses.replace(report, base=base), tmp_path / "a.html")[0].read_text(encoding="utf-8")
    )
    assert base.dead_experts[layer] == [0, 7]
    assert any(f"{layer}: 0, 7" in text for text in page.text("li"))


def test_the_same_report_gives_the_same_page_and_replaces_it(report, written, tmp_path):
    file = tmp_path / "out.html"
    file.write_text("old")
    assert [f.read_bytes() for f in write_report(report, file)] == [f.read_bytes() for f in written]


def test_a_base_alone_has_a_page_too(report, tmp_path):
    alone = Report(base=report.base, others=[], conditions={})
    files = write_report(alone, str(tmp_path / "alone.html"))
    assert [file.name for file in files] == ["alone.html", "alone-load.png"]
    assert "worst" not in {a["href"].removeprefix("#") for a in Page(files[0].read_text(encoding="utf-8")).of("a")}


def test_models_that_are_all_equal_have_no_divergence_to_draw(report, tmp_path):
    equal = [row for row in report.others if row.name == "equal"]
    files = write_report(Report(base=report.base, others=equal, conditions={}), tmp_path / "equal.html")
    assert [file.name for file in files[1:]] == ["equal-router.png", "equal-load.png"]


def test_what_cannot_be_written_is_refused(report, tmp_path):
    with pytest.raises(ArgumentError, match="there is no folder"):
        write_report(report, tmp_path / "missing" / "out.html")
    with pytest.raises(ArgumentError, match="it is a folder"):
        write_report(report, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_without_matplotlib(report, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(MxpertsError, match=r"mxperts\[plot\]"):
        write_report(report, tmp_path / "out.html")
    assert list(tmp_path.iterdir()) == []


def test_a_lower_bound_is_said_to_be_one(report, tmp_path):
    bounded = {"base_top_k": 8, "base_rest_mass": {"mean": 0.25, "max": 0.5}}
    equal = [row for row in report.others if row.name == "equal"]
    for conditions, said in (({}, 0), (bounded, 1)):
        files = write_report(Report(base=report.base, others=equal, conditions=conditions), tmp_path / "out.html")
        assert files[0].read_text(encoding="utf-8").count("KLD is a lower bound") == said
