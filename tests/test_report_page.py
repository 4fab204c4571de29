"""The page of a report as text: what it says, that nothing in it is anyone else's markup, and how it is written."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest
from documents import HOSTILE, bare_document, change, hostile_document, hostile_page, near, sample_document, sample_page
from jobs import npti

from npti_export.errors import EvaluationError, OutputError
from npti_export.evaluate.document import CapabilityPart, Task, read_document
from npti_export.report_page import tables
from npti_export.report_page.delivery import NAMES, write_report
from npti_export.report_page.gallery import pictures
from npti_export.report_page.page import render_page
from npti_export.report_page.verdict import findings, summary
from npti_export.report_page.wording import clean, minus, number, percent

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Elements, attributes and text of a page; elements must close in the order in which they open."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.open, self.said, self.scripts, self.headings = [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif self.open and self.open[-1] != "style":
            self.said.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self):
        return " ".join(" ".join(self.said).split())


@pytest.fixture(scope="module")
def sample():
    return sample_document()


@pytest.fixture(scope="module")
def page(sample):
    return Page(sample_page())


@pytest.fixture(scope="module")
def bare():
    return Page(render_page(bare_document()))


@pytest.fixture(scope="module")
def hostile():
    return hostile_page()


def test_page_opens_with_the_verdict_and_holds_every_figure(page, sample):
    assert not page.open
    start = page.text[: page.text.index("Every way to get this personality")]
    for words in (
        "Does the personality show? Yes +0.071",
        "clear of zero",
        "84% (61% to 112%) of what the better persona prompt does",
        "no less than with the prompt",
        "3.22 → 3.71",
        "arithmetic 22% → 20%",
        "0.0061 KL to the rule",
    ):
        assert words in start
    labels = {one["aria-label"] for one in page.all("svg") if one.get("role") == "img"}
    for picture in pictures(sample):
        assert picture.label in labels
        assert picture.title in page.text
    assert {picture.name for picture in pictures(sample, [sample])} == set(NAMES)
    for one in sample.answers:
        assert one.question in page.text
    assert "Steered + descriptive prompt" in page.text
    assert "rule.gamma 1" in page.text
    assert sample.artifact["sha256"] in page.text


def test_page_can_be_found_through_without_eyes(page):
    assert page.headings[0] == 1
    assert page.headings.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(page.headings, page.headings[1:], strict=False))
    ids = [one["id"] for _, one in page.elements if "id" in one]
    assert len(ids) == len(set(ids))
    for _, one in page.elements:
        for name in ("aria-labelledby", "for"):
            assert one.get(name, ids[0]) in ids
    assert all(one["href"][1:] in ids for one in page.all("a"))
    assert len(page.all("caption")) == len(page.all("table")) > 8
    assert {one["scope"] for one in page.all("th")} == {"col", "row"}
    for one in page.all("svg"):
        assert one.get("role") == "img" or one.get("aria-hidden") == "true"


def test_what_is_missing_is_left_out_and_said(bare):
    assert not bare.open
    names = {one.get("id") for one in bare.all("figure")}
    assert names == {"figure-conditions", "figure-tradeoff"}
    for words in (
        "No picture “Where the rule steers”: the evaluation names no layers",
        "No picture “Activations of the pole's neurons”: the evaluation has no histogram",
        "No judge model rated these answers.",
        "No inventory was answered.",
        "No test of skill was run.",
        "The evaluation keeps no answers.",
        "The file was not compared with its rule.",
        "No recipe is recorded.",
        "Is it still clever? Not tested",
    ):
        assert words in bare.text


def test_the_policy_lets_only_our_script_run(page, hostile):
    for one in (page, Page(hostile)):
        (script,) = one.scripts
        (policy,) = (m["content"] for m in one.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"script-src 'sha256-{digest}'" in policy
        assert policy.startswith("default-src 'none';")
    assert page.scripts == Page(hostile).scripts


def test_every_string_of_a_file_is_text_and_never_markup(hostile, page):
    found = Page(hostile)
    assert not found.open
    assert {tag for tag, _ in found.elements} <= {tag for tag, _ in page.elements}
    assert len(found.all("script")) == 1
    assert not {"img", "iframe"} & {tag for tag, _ in found.elements}
    for tag, attributes in found.elements:
        for name, value in attributes.items():
            assert not name.startswith("on")
            assert not (name in ("href", "xlink:href") and value[:1] != "#" and value != "data:,"), (tag, value)
            assert name not in ("src", "srcdoc", "action", "formaction")
    for attack in HOSTILE:
        assert " ".join(clean(attack).split()) in found.text
    assert "8337" not in hostile  # nothing was evaluated
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufffe]", hostile)


def test_hostile_comparisons_too():
    found = Page(render_page(bare_document(), [hostile_document()]))
    assert len(found.all("script")) == 1
    assert not {"img", "iframe"} & {tag for tag, _ in found.elements}
    assert "</script><script>document.title='owned'</script>" in found.text
    assert "They are of 2 different models" in found.text


def changed(part, **changes):
    return sample_document(questions=0).model_copy(update={part: changes["to"]})


def levels(document):
    return [one.level for one in findings(document)]


def test_verdict_by_cases():
    good = sample_document(questions=0)
    assert levels(good) == ["good"] * 4
    assert summary(good) == (
        "The personality shows, the model stays fluent, keeps its skills, and the file does what the rule says."
    )
    contrast = good.trait_contrast
    none = contrast.model_copy(update={"gain": near(0.001)})
    assert findings(changed("trait_contrast", to=none))[0].answer == "Not shown"
    assert summary(changed("trait_contrast", to=none)) == "The file does not show neuroticism−."
    other = contrast.model_copy(update={"gain": near(-0.09)})
    assert findings(changed("trait_contrast", to=other))[0].answer == "No, the other way"
    null = contrast.model_copy(update={"null": near(0.05)})
    assert levels(changed("trait_contrast", to=null))[0] == "fair"
    chance = contrast.model_copy(update={"beyond_null": near(0.01, 0.02)})
    assert levels(changed("trait_contrast", to=chance))[0] == "fair"
    assert "The gain beyond that" in findings(changed("trait_contrast", to=chance))[0].detail
    worse = good.fluency.model_copy(update={"log_likelihood": change(-1.17, -1.6, 0.03)})
    assert levels(changed("fluency", to=worse))[1] == "fair"  # less fluent than the prompt's -1.51
    broken = worse.model_copy(update={"perplexity": change(3.2, 9.0, 0.1)})
    assert levels(changed("fluency", to=broken))[1] == "bad"
    stutter = good.fluency.model_copy(update={"repetition": change(0.02, 0.3, 0.01)})
    assert "repeats itself" in findings(changed("fluency", to=stutter))[1].answer
    for score, level in (
        (change(0.5, 0.45, 0.02), "fair"),
        (change(0.5, 0.3, 0.02), "bad"),
        (change(0.5, 0.3, 0.5), "unknown"),
        (change(0.5, 0.5, 0.05), "good"),
    ):
        task = Task(name="sums", source="own", metric="accuracy", score=score)
        document = changed("capability", to=CapabilityPart(kl_neutral=near(0.06, 0.01), tasks=[task]))
        assert levels(document)[2] == level
    moved = CapabilityPart(kl_neutral=near(0.3), tasks=good.capability.tasks)
    assert levels(changed("capability", to=moved))[2] == "fair"
    assert levels(changed("fidelity", to=good.fidelity | {"kl_rule_artifact": 0.011}))[3] == "bad"
    assert levels(bare_document()) == ["good", "fair", "unknown", "unknown"]


def test_gauges_are_to_scale():
    shows, _, _, faithful = findings(sample_document(questions=0))
    (prompt, _), zero = shows.gauge.marks[-1], shows.gauge.start
    assert shows.gauge.length / (prompt - zero) == pytest.approx(0.071 / 0.084)
    assert faithful.gauge.length / faithful.gauge.marks[0][0] == pytest.approx(0.0061 / 0.0104)
    assert faithful.gauge.spread is None


def test_tables_hold_every_estimate_with_its_interval():
    document = sample_document(questions=0)
    table = tables.conditions(document.conditions)
    assert [row[0].text for row in table.rows][1] == "2  Steered (this file)"
    assert (table.rows[1][1].text, table.rows[1][1].note) == ("+0.071", "+0.055 to +0.089")
    assert table.rows[0][1].text == "–"
    assert table.marked == {1}
    judged, agreed = tables.judges(document)
    assert [len(row) for row in judged.rows] == [5] * 10
    assert judged.rows[3][1].text == "3.90"
    assert agreed.rows[0][2].text == "0.71"
    assert tables.inventory(document).rows[4][3].text == "−0.90"
    assert tables.sweeps(document)[1].rows[1][0].text == "shift only"
    assert len(tables.overview([document, document]).rows) == 2
    assert {row[0].text for row in tables.pareto(document).rows} == {
        one.label for one in document.pareto if one.on_front
    }


def test_numbers_as_people_read_them():
    assert number(-0.0004, 3, sign=True) == "0.000"
    assert number(0.0004, 3) == "4.0e−04"
    assert number(-1.5, 1) == "−1.5"
    assert number(1e9, 1) == "1.0e+09"
    assert number(float("nan")) == number(None) == "–"
    assert percent(-1e-18, 1, sign=True) == "0.0%"
    assert percent(0.845) == "84%"
    assert minus("calm-") == "calm−"


def test_the_same_evaluation_gives_the_same_page(bare):
    assert render_page(bare_document()) == render_page(bare_document())


@pytest.fixture
def written(tmp_path):
    moved = sample_document(questions=0).cross_talk
    few = bare_document().model_copy(update={"cross_talk": moved})
    for name, document in (("calm", few), ("open", few.model_copy(update={"traits": ["openness+"]}))):
        (tmp_path / f"{name}.json").write_text(document.to_json(), encoding="utf-8")
    return tmp_path


def test_command_writes_page_and_pictures(written, cli_environment):
    done = npti("report", "calm.json", "open.json", "--html", "all.html", "--figures", "figures",
                environment=cli_environment, cwd=written)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "wrote all.html" in done.stdout
    assert "15 pictures" in done.stdout
    text = (written / "all.html").read_text(encoding="utf-8")
    assert 'id="figure-matrix"' in text
    assert "openness+" in text
    names = {path.name for path in (written / "figures").iterdir()}
    assert names == {
        f"{name}{end}"
        for name in (*NAMES[:2], "cross-talk", "radar", "matrix")
        for end in (".svg", ".png", "-dark.png")
    }
    done = npti("report", "calm.json", environment=cli_environment, cwd=written)
    assert (done.returncode, "--html" in done.stderr) == (2, True)
    done = npti("report", "calm.json", "--html", "all.html", environment=cli_environment, cwd=written)
    assert (done.returncode, "--force" in done.stderr) == (2, True)
    assert "Traceback" not in done.stderr


def test_nothing_is_overwritten_or_left_half(written):
    calm, page, folder = written / "calm.json", written / "r.html", written / "mine"
    with pytest.raises(OutputError, match="drawn from"):
        write_report([calm], html=calm, figures=None, force=True)
    page.write_text("mine")
    with pytest.raises(OutputError, match="--force"):
        write_report([calm], html=page, figures=None)
    folder.mkdir()
    (folder / "thesis.tex").write_text("mine")
    with pytest.raises(OutputError, match="holds more"):
        write_report([calm], html=None, figures=folder, force=True)
    broken = json.loads(calm.read_text()) | {"answers": "none"}
    (written / "broken.json").write_text(json.dumps(broken))
    with pytest.raises(EvaluationError, match=r"broken.json.*'answers'"):
        write_report([calm, written / "broken.json"], html=page, figures=None, force=True)
    assert page.read_text() == "mine"
    assert {path.name for path in written.iterdir()} == {"calm.json", "open.json", "r.html", "mine", "broken.json"}


def test_numbers_that_are_none_are_refused(written):
    text = (written / "calm.json").read_text(encoding="utf-8")
    (written / "nan.json").write_text(
        text.replace('"kl_neutral": {\n      "mean": 0.061', '"kl_neutral": {\n      "mean": NaN'), encoding="utf-8"
    )
    with pytest.raises(EvaluationError, match=r"nan.json: not an evaluation .*not JSON compliant"):
        read_document(written / "nan.json")
