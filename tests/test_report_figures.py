"""What the figures of a report show: the artists' values against the evaluation's, not the pixels."""

import io
import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from documents import WAYS, bare_document, near, sample_document
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from npti_export.errors import EvaluationError
from npti_export.evaluate.document import Distribution, LayerShape, SweepPoint
from npti_export.report_page import figures_effect as effect
from npti_export.report_page import figures_rule as rule
from npti_export.report_page.gallery import pictures
from npti_export.report_page.svg import inline_svg, png_bytes, standalone_svg
from npti_export.report_page.theme import DARK, LIGHT, PHONE, Look, contrast_ratio
from npti_export.report_page.wording import best_prompt
from npti_export.traits import FACETS

DOCUMENT = sample_document(questions=1)
TRAITS = list(FACETS)


def artist(figure, gid):
    (found,) = figure.findobj(lambda one: one.get_gid() == gid)
    return found


def has(figure, gid):
    return bool(figure.findobj(lambda one: one.get_gid() == gid))


def xy(figure, gid):
    return [list(values) for values in artist(figure, gid).get_data()]


def texts(figure):
    return [one.get_text() for one in figure.findobj(lambda one: hasattr(one, "get_text"))]


def test_layers_show_neurons_of_both_poles_and_the_constant():
    figure = rule.layers_figure(DOCUMENT.layers)
    for place, layer in enumerate(DOCUMENT.layers):
        up, down = artist(figure, f"shift-{place}"), artist(figure, f"clamp-{place}")
        assert up.get_height() == layer.shift
        assert down.get_height() == -layer.clamp
        assert up.get_x() + up.get_width() / 2 == pytest.approx(place)
        assert up.get_facecolor() != down.get_facecolor()
    assert xy(figure, "constant") == [list(range(30)), [layer.constant for layer in DOCUMENT.layers]]
    plain = rule.layers_figure([LayerShape(shift=3, clamp=0, constant=0.0)])
    assert artist(plain, "shift-0").get_height() == 3
    assert not has(plain, "constant")
    only = rule.layers_figure([LayerShape(shift=0, clamp=0, constant=2.0)])
    assert has(only, "constant")
    assert not has(only, "shift-0")


def test_distribution_shows_both_poles():
    figure = rule.distribution_figure(DOCUMENT.distribution)
    for name in ("wanted", "opposite"):
        values, edges, _ = artist(figure, name).get_data()
        np.testing.assert_array_equal(values, getattr(DOCUMENT.distribution, name))
        np.testing.assert_array_equal(edges, DOCUMENT.distribution.edges)
    with pytest.raises(EvaluationError, match="edge"):
        rule.distribution_figure(Distribution(edges=[0, 1], wanted=[1, 0], opposite=[1, 0]))


def test_sweep_has_the_prompt_as_a_line():
    points = DOCUMENT.sweeps[0].points
    assert best_prompt(DOCUMENT).name == "prompt-descriptive"  # not the steered model's prompt, which does more
    prompt = DOCUMENT.sweeps[2].points[1]
    assert prompt.gain.mean != best_prompt(DOCUMENT).gain.mean  # which was asked something else
    (picture,) = [one for one in pictures(DOCUMENT) if one.name == "sweep"]
    assert set(artist(picture.draw(Look()), "prompt-gain").get_ydata()) == {prompt.gain.mean}
    assert "On the ablation's own questions; the dashed line is the better prompt on the same ones." in picture.caption
    about = {"sweeps": {"questions": 24, "split": "search", "note": "It is another's."}}
    without = DOCUMENT.model_copy(update={"sweeps": DOCUMENT.sweeps[:2], "settings": about})
    (picture,) = [one for one in pictures(without) if one.name == "sweep"]
    assert not has(picture.draw(Look()), "prompt-gain")
    assert picture.caption.endswith(
        "On 24 search questions of the ablation; no prompt was measured on them. It is another's."
    )
    shuffled = [points[3], SweepPoint(value="none", gain=near(9), fluency=near(9)), *points[:3], *points[4:]]
    figure = rule.sweep_figure(shuffled, prompt)
    for name in ("gain", "fluency"):
        assert xy(figure, name) == [[one.value for one in points], [getattr(one, name).mean for one in points]]
        assert set(artist(figure, f"prompt-{name}").get_ydata()) == {getattr(prompt, name).mean}
    assert not has(rule.sweep_figure(points, None), "prompt-gain")
    with pytest.raises(EvaluationError, match="two settings"):
        rule.sweep_figure(points[:1], prompt)


def test_pareto_front_is_a_line_and_the_choice_a_star():
    figure = rule.pareto_figure(DOCUMENT.pareto)
    damage, gain = xy(figure, "front")
    assert sorted(zip(damage, gain, strict=True)) == [*zip(damage, gain, strict=True)]
    assert set(damage) == {one.damage for one in DOCUMENT.pareto if one.on_front}
    assert len(xy(figure, "tried")[0]) == sum(not one.on_front for one in DOCUMENT.pareto)
    (chosen,) = (one for one in DOCUMENT.pareto if one.chosen)
    assert xy(figure, "chosen") == [[chosen.damage], [chosen.gain]]
    assert any(chosen.label in text for text in texts(figure))


@pytest.mark.parametrize("width", [PHONE, 9])
def test_conditions_show_gain_and_fluency_with_intervals(width):
    figure = effect.conditions_figure(DOCUMENT.conditions, Look(width=width))
    assert not has(figure, "gain-0")  # the unsteered model gains nothing on itself
    for row, one in enumerate(DOCUMENT.conditions):
        for name in ("gain", "fluency"):
            value = getattr(one, name)
            if value is None:
                continue
            mark = artist(figure, f"{name}-{row}")
            assert xy(figure, f"{name}-{row}") == [[value.mean], [row]]
            spans = [list(line.get_xdata()) for line in mark.axes.lines if list(line.get_ydata()) == [row, row]]
            assert spans == [[value.low, value.high]]
    labels = [one.get_text() for one in figure.axes[0].get_yticklabels()]
    assert labels[1] == "Steered (this file)"
    assert all(label in ways[1] or label.endswith("…") for label, ways in zip(labels, WAYS, strict=True))
    low, high = figure.axes[0].get_ylim()
    assert low > high  # the first condition is on top


def test_tradeoff_and_facets():
    figure = effect.tradeoff_figure(DOCUMENT.conditions)
    for place, one in enumerate(DOCUMENT.conditions):
        assert xy(figure, f"tradeoff-{place}") == [[one.fluency.mean], [one.gain.mean if one.gain else 0]]
    assert "10  Random neurons" in texts(figure)
    with pytest.raises(EvaluationError, match="gain"):
        effect.tradeoff_figure(DOCUMENT.conditions[:1])
    facets = DOCUMENT.trait_contrast.by_facet
    figure = effect.facets_figure(facets)
    assert [xy(figure, f"facet-{row}")[0][0] for row in range(6)] == [one.mean for one in facets.values()]


def test_cross_talk_tells_what_was_meant_to_move():
    shuffled = dict(reversed(DOCUMENT.cross_talk.items()))
    figure = effect.cross_talk_figure(shuffled, {"neuroticism"})
    assert [one.get_text() for one in figure.axes[0].get_yticklabels()] == TRAITS
    for row, trait in enumerate(TRAITS):
        assert xy(figure, f"cross-{row}")[0] == [DOCUMENT.cross_talk[trait].mean]
        meant = artist(figure, f"cross-{row}").get_color() == LIGHT.wanted
        assert meant == (trait == "neuroticism")


def test_matrix_has_a_row_an_evaluation():
    poles = [trait + sign for trait in TRAITS for sign in "+-"]
    documents = [sample_document(pole, questions=0) for pole in poles]
    figure = effect.cross_talk_matrix([*documents, bare_document()])
    top = max(abs(value.mean) for one in documents for value in one.cross_talk.values())
    for row, one in enumerate(documents):
        for column, trait in enumerate(TRAITS):
            cell, value = artist(figure, f"cell-{row}-{column}"), one.cross_talk[trait]
            colour = LIGHT.wanted if value.mean >= 0 else LIGHT.opposite
            wanted = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
            assert cell.get_facecolor() == pytest.approx((*wanted, effect.STRONGEST * abs(value.mean) / top))
            assert cell.get_x() < column < cell.get_x() + cell.get_width()
            assert cell.get_y() < row < cell.get_y() + cell.get_height()
    assert not has(figure, "cell-10-0")  # without cross-talk
    assert texts(figure).count("+0.071*") == 5
    assert texts(figure).count("−0.071*") == 5
    with pytest.raises(EvaluationError, match="cross-talk"):
        effect.cross_talk_matrix([bare_document()])


def test_figures_on_the_strongest_cell_can_be_read():
    for theme in (LIGHT, DARK):
        for colour in (theme.wanted, theme.opposite):
            mixed = [
                round(
                    effect.STRONGEST * int(colour[start : start + 2], 16)
                    + (1 - effect.STRONGEST) * int(theme.surface[start : start + 2], 16)
                )
                for start in (1, 3, 5)
            ]
            assert contrast_ratio(theme.ink, "#{:02x}{:02x}{:02x}".format(*mixed)) >= 4.5


def captions(document):
    return {one.name: one.caption for one in pictures(document)}


def test_radar_is_of_the_answers_or_else_of_the_inventory():
    figure = effect.radar_figure(DOCUMENT)
    assert set(xy(figure, "base")[1]) == {0}
    assert xy(figure, "steered")[1][:5] == [DOCUMENT.cross_talk[trait].mean for trait in TRAITS]
    assert xy(figure, "steered")[0][:5] == pytest.approx([2 * math.pi * place / 5 for place in range(5)])
    assert captions(DOCUMENT)["radar"].startswith("Moves of the answers towards each + pole")
    without = DOCUMENT.model_copy(update={"cross_talk": None})
    figure = effect.radar_figure(without)
    for name in ("base", "steered"):
        radii = [getattr(DOCUMENT.inventory.traits[trait], name).mean for trait in TRAITS]
        assert xy(figure, name)[1] == [*radii, radii[0]]
    assert figure.axes[0].get_ylim() == (1, 5)
    assert "goes by their order, not by the item" in captions(without)["radar"]
    with pytest.raises(EvaluationError, match="neither"):
        effect.radar_figure(without.model_copy(update={"inventory": None}))


def test_captions_say_what_steers():
    layer = LayerShape(shift=0, clamp=0, constant=2.0)
    constants = DOCUMENT.model_copy(update={"layers": [layer, layer, LayerShape(shift=0, clamp=0, constant=0.0)]})
    assert captions(constants)["layers"] == "No neuron is shifted or clamped; a constant is added in 2 of 3 layers."
    assert "Those of neuroticism− that NPTI would shift, as no rule shifts any;" in captions(constants)["distribution"]
    neurons = DOCUMENT.model_copy(update={"layers": [LayerShape(shift=1200, clamp=3, constant=0.0)]})
    assert captions(neurons)["layers"] == "1,200 neurons are shifted and 3 clamped, in 1 layers."
    assert captions(neurons)["distribution"].startswith("Those that the rule shifts;")
    both = neurons.model_copy(update={"layers": [LayerShape(shift=1, clamp=0, constant=2.0), layer]})
    assert captions(both)["layers"] == (
        "1 neurons are shifted and 0 clamped, in 2 layers; a constant is added in 2 of them."
    )
    for changes in (
        {"settings": {"pole": "neuroticism+"}},
        {"settings": {"pole": "neuroticism-"}, "poles": [{"pole": "neuroticism-"}, {"pole": "openness+"}]},
    ):
        other = captions(neurons.model_copy(update=changes))["distribution"]
        assert "that NPTI would shift, as the rule is not of this pole alone;" in other


@pytest.mark.parametrize(
    "picture", pictures(DOCUMENT, [sample_document("openness+", questions=0)]), ids=lambda one: one.name
)
def test_no_text_is_cut_off(picture):
    """On a desk and on a phone, by the metrics of the widest common font."""
    for width in (picture.width, PHONE):
        figure = picture.draw(Look(width=width))
        renderer = FigureCanvasAgg(figure).get_renderer()
        across, down = figure.bbox.width + 1, figure.bbox.height + 1
        root = ElementTree.fromstring(inline_svg(figure, "a", "b"))
        drawn = {one.text for one in root.iter() if one.tag.endswith("}text")}  # not the ticks beyond an axis
        assert len(drawn) > 5
        for one in figure.findobj(Text):
            if one.get_text() in drawn:
                box = one.get_window_extent(renderer)
                assert -1 <= box.x0 <= box.x1 <= across, (width, one)
                assert -1 <= box.y0 <= box.y1 <= down, (width, one)


def test_svg_is_the_same_every_time_and_fits_into_a_page():
    figures = {one.name: one for one in pictures(DOCUMENT, [DOCUMENT])}
    assert len(figures) == 10
    known = {colour for _, colour in LIGHT.roles()}
    for name in ("layers", "tradeoff", "radar"):
        first, again = (inline_svg(figures[name].draw(Look()), name, 'a "b" <c>') for _ in range(2))
        assert first == again
        root = ElementTree.fromstring(first)
        assert root.get("role") == "img"
        assert root.get("aria-label") == 'a "b" <c>'
        assert "width" not in root.attrib
        ids = [one.get("id") for one in root.iter() if "id" in one.attrib]
        assert len(ids) == len(set(ids)) > 3
        assert all(one.startswith(f"{name}-") for one in ids)
        assert set(re.findall(r"(?:href=\"|url\()#([^\")]+)", first)) <= set(ids)
        assert not re.search(r"<(style|metadata|script|image)\b|<!|<\?|DejaVu|font: ", first.replace("svg:", ""))
        assert set(re.findall(r"#[0-9a-f]{6}\b", first)) <= known  # nothing keeps a colour of its own in the dark
        assert len(re.findall(r"var\(--fig-[a-z]+, #", first)) == len(re.findall(r"#[0-9a-f]{6}\b", first))


def test_a_file_of_its_own_turns_dark():
    text = standalone_svg(rule.pareto_figure(DOCUMENT.pareto), "pareto", "<trials>")
    root = ElementTree.fromstring(text)
    (style,) = (one for one in root.iter() if one.tag.endswith("}style"))
    assert f'[style*="stroke: {LIGHT.wanted}"]{{stroke:{DARK.wanted} !important}}' in style.text
    assert f"stroke: {LIGHT.wanted}" in text.partition("</style>")[2]
    assert "&lt;trials&gt;</title>" in text
    assert "width" in root.attrib


def test_labels_are_no_markup():
    label = "$x_1$ $\\frac <b> \x00 \ud800 ‮abc"
    figure = effect.facets_figure({label: near(1)})
    root = ElementTree.fromstring(inline_svg(figure, "facets", label))
    said = [one.text for one in root.iter() if one.tag.endswith("}text")]
    assert "$x_1$ $\\frac <b> � � abc" in said
    assert root.get("aria-label") == "$x_1$ $\\frac <b> � � abc"


def test_png_is_the_same_every_time_on_its_own_ground():
    from PIL import Image

    for theme in (LIGHT, DARK):
        look = Look(theme, 3)
        first, again = (png_bytes(effect.facets_figure({"a": near(1)}, look), look) for _ in range(2))
        assert first == again
        image = Image.open(io.BytesIO(first)).convert("RGB")
        assert image.width == 600
        assert "#{:02x}{:02x}{:02x}".format(*image.getpixel((1, 1))) == theme.surface


def test_nothing_of_matplotlib_is_changed():
    import matplotlib

    before = dict(matplotlib.rcParams)
    effect.facets_figure({"a": near(1)})
    assert dict(matplotlib.rcParams) == before


def _linear(colour):
    values = np.array([int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)])
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


# Machado, Oliveira and Fernandes 2009, severity 1: protanopia, deuteranopia, tritanopia, in linear RGB.
BLINDNESS = [
    [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
]


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_colours_can_be_read_and_told_apart(theme):
    for name, colour in theme.roles():
        if name not in ("surface", "grid"):
            assert contrast_ratio(colour, theme.surface) >= 4.5, name
    assert len(dict(theme.roles())) == len(set(dict(theme.roles()).values()))
    for matrix in BLINDNESS:
        seen = [np.asarray(matrix) @ _linear(colour) for colour in (theme.wanted, theme.opposite)]
        assert np.abs(seen[0] - seen[1]).max() > 0.2
    assert contrast_ratio("#000000", "#ffffff") == pytest.approx(21)
    assert contrast_ratio("#767676", "#ffffff") == pytest.approx(4.54, abs=0.01)
