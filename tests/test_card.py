"""The model card: front matter that the Hub understands, and text that foreign words cannot break."""

import copy
import re

import pytest
import yaml

from npti_export.export.card import model_card

FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})")
FORMATS = ("peft", "checkpoint", "gguf")

REPORT = {
    "version": "0.1.0",
    "trait": "calm:0.5 openness+",
    "traits": ["calm:0.5", "openness+"],
    "poles": [
        {"pole": "neuroticism-", "name": "calm", "description": "Even-tempered."},
        {"pole": "openness+", "name": "open", "description": "Curious."},
    ],
    "gamma": 1.1,
    "model": {
        "name": "SmolLM2-135M-Instruct",
        "fingerprint": "ab" * 32,
        "id": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "license": "apache-2.0",
    },
    "neurons": {"shift": 812, "clamp": 655, "width": 1536, "extra_width": 96, "extra_width_mean": 96.0},
    "fidelity": {
        "kl_rule_artifact": 0.00213,
        "kl_rule_base": 0.4321,
        "kl_runtime_floor": 0.00101,
        "top1": 0.9876,
        "max_logit_diff": 0.31,
        "positions": 1234.0,
        "limit": 0.005,
    },
    "artifact": {"format": "gguf", "path": "out/calm.gguf", "bytes": 95_400_000},
    "recipe": {"name": "smollm2", "rule": {}},
    "sample": {"question": "Tea or coffee?", "base": "Coffee.", "steered": "Whatever you have."},
}


def report(format_="gguf", **changes):
    made = copy.deepcopy(REPORT)
    made["artifact"]["format"] = format_
    for key, value in changes.items():
        section, _, field = key.partition("__")
        if field:
            made[section][field] = value
        else:
            made[section] = value
    return made


def split(card):
    """Front matter as data, and the body; by the rule that the Hub splits with."""
    from huggingface_hub import ModelCard

    match = re.match(r"---\n(.*?)\n---\n\n", card, re.DOTALL)
    data = yaml.safe_load(match[1])
    assert ModelCard(card).data.to_dict() == data
    return data, card[match.end() :]


def prose(body):
    """The lines outside of fenced code, where Markdown counts."""
    lines, fence = [], None
    for line in body.split("\n"):
        match = FENCE.match(line)
        if fence is None and match:
            fence = match[1]
        elif fence is None:
            lines.append(line)
        elif re.fullmatch(rf" {{0,3}}{re.escape(fence)}{re.escape(fence[0])}*\s*", line):
            fence = None
    assert fence is None, "a code block is left open"
    return lines


def code(body, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", body, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(
    ("format_", "relation", "library"),
    [
        ("peft", "adapter", "peft"),
        ("checkpoint", "finetune", "transformers"),
        ("gguf", "finetune", "llama-cpp-python"),
    ],
)
def test_front_matter(format_, relation, library):
    data, _ = split(model_card(report(format_)))
    assert data == {
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "base_model_relation": relation,
        "language": "en",
        "library_name": library,
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["npti", "npti-export", "personality", "steering", "big-five", "neuroticism", "openness"],
    }


def test_model_without_id_and_licence():
    data, body = split(model_card(report(model__id=None, model__license=None)))
    assert not {"base_model", "base_model_relation", "license", "license_name"} & set(data)
    assert "The base model's licence applies" in body
    assert "could not tell which one" in body
    assert "None" not in body


@pytest.mark.parametrize(
    ("given", "fields"),
    [
        ("Apache-2.0", {"license": "apache-2.0"}),
        ("llama3.2", {"license": "llama3.2"}),
        ("other", {"license": "other"}),
        ("Qwen RESEARCH License\n---\n", {"license": "other", "license_name": "qwen-research-license"}),
        ("§", {"license": "other", "license_name": "unnamed"}),
    ],
)
def test_licence_is_one_that_the_hub_takes(given, fields):
    data, body = split(model_card(report(model__license=given)))
    link = {"license_link": f"https://huggingface.co/{data['base_model']}"} if "license_name" in fields else {}
    assert {key: data[key] for key in data if key.startswith("license")} == fields | link
    assert "The base model's licence applies to this model, too. That is `" in body


def test_one_trait_twice_is_one_tag():
    data, _ = split(model_card(report(traits=["openness+", "openness-:0.25"])))
    assert data["tags"].count("openness") == 1


def test_what_it_is():
    _, body = split(model_card(REPORT))
    assert "- **neuroticism-** (calm, stable, relaxed), strength 0.5" in body
    assert "- **openness+** (curious, imaginative, creative), strength 1" in body
    for words in ("812 of them, strength γ = 1.1", "655 clamped", "recipe `smollm2`", "95.4 MB", "96 neurons more"):
        assert words in body
    assert "arxiv.org/abs/2410.12327" in body
    assert "ab" * 32 in body
    assert "npti-export 0.1.0" in body


def test_width_by_format():
    assert "no weight of the base model is changed" in model_card(report("peft", neurons__extra_width=0))
    assert "no MLP is wider" in model_card(report("checkpoint", neurons__extra_width=0))
    assert "each MLP has up to 96 neurons (40.5 on average) more" in model_card(report(neurons__extra_width_mean=40.5))


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("id_", ["org/base", None])
def test_code_compiles(format_, id_):
    _, body = split(model_card(report(format_, model__id=id_, artifact__path='/a/b/we"ird\\.gguf')))
    blocks = code(body, "python")
    assert blocks
    for block in blocks:
        compile(block, format_, "exec")


def test_loading():
    peft = model_card(report("peft"))
    (first, second) = code(peft, "python")
    assert first.index("import npti_export") < first.index("from peft import PeftModel")
    assert 'from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")' in first
    assert "strength=0.5" in second
    assert "KeyError: 'NPTI'" in peft
    assert "pip install npti-export" in peft
    (checkpoint,) = code(model_card(report("checkpoint")), "python")
    assert "AutoModelForCausalLM" in checkpoint
    (gguf,) = code(model_card(report("gguf")), "python")
    assert 'Llama("calm.gguf"' in gguf
    assert "npti" not in checkpoint + gguf


def test_fidelity():
    _, body = split(model_card(REPORT))
    for value in ("0.0021", "at most 0.005", "0.001 ", "0.432", "98.8%", "0.31", "1234 tokens"):
        assert value in body
    rows = [line for line in body.split("\n") if line.startswith("|")]
    assert len(rows) == 7
    assert {line.count("|") for line in rows} == {4}


def test_fidelity_not_measured():
    _, body = split(model_card(report(fidelity=None)))
    assert "This was not measured" in body
    assert "|---" not in body


def test_limits():
    _, body = split(model_card(REPORT))
    for words in ("not a guarantee", "fluency and capability", "not a psychological assessment", "English"):
        assert words in body
    assert "Do not present it as a person" in body


def test_sample():
    _, body = split(model_card(REPORT))
    assert code(body, "text") == ["Tea or coffee?\n", "Coffee.\n", "Whatever you have.\n"]
    _, body = split(model_card(report(sample=None)))
    assert "## One example" not in body
    assert "\n\n\n" not in body


MALICE = [
    "---\nlicense: mit\n---\n",
    "# heading\n## another",
    "<script>alert(1)</script>\n<img src=x onerror=y>",
    "```\n# out\n```",
    "``````text\n# out\n``````\n~~~\n",
    "```\r# out\r```",
    "\n\n---\n\n| a | b |\n|---|---|",
    "[link](javascript:x) ![image](https://example.org/x.png)",
    "a ` <b> ` c",
    "",
    "`" * 40,
]


@pytest.mark.parametrize("text", MALICE)
def test_sample_cannot_break_out(text):
    plain_data, plain_body = split(model_card(REPORT))
    data, body = split(model_card(report(sample={"question": text, "base": text, "steered": text})))
    assert data == plain_data
    assert prose(body) == prose(plain_body)
    assert body.count(text.strip()) >= 3  # quoted as it came


@pytest.mark.parametrize("text", MALICE)
def test_names_cannot_break_out(text):
    """A base model's name and licence come from its file, which is anyone's."""
    plain_data, plain_body = split(model_card(REPORT))
    changed = report(model__name=text, model__license=text or " ", trait=text, artifact__path=f"x/{text}.gguf")
    changed["recipe"]["name"] = text
    data, body = split(model_card(changed))
    any_license = dict.fromkeys(("license", "license_name", "license_link"), 0)
    assert {**data, **any_license} == {**plain_data, **any_license}
    assert data["license_link"] == f"https://huggingface.co/{plain_data['base_model']}"
    assert re.fullmatch(r"[a-z0-9.-]+", data["license_name"])
    lines, plain_lines = prose(body), prose(plain_body)
    assert len(lines) == len(plain_lines)
    for line in lines:
        outside = re.sub(r"`[^`]*`", "", line)
        assert "`" not in outside
        assert "<" not in outside
        assert "javascript" not in outside


def test_base_id_cannot_end_the_front_matter():
    data, _ = split(model_card(report(model__id="a/b\n---\nlicense: mit")))
    assert data["base_model"] == "a/b\n---\nlicense: mit"


def test_a_rule_that_only_adds_constants_speaks_of_no_shifted_neuron():
    _, body = split(model_card(report(neurons__shift=0, neurons__clamp=0, neurons__constant=46080)))
    assert "gets a constant added to its input (46080 neurons in all" in body
    assert "shifted up" not in body
    _, both = split(model_card(report(neurons__constant=12)))
    assert "shifted up" in both
    assert "A constant is added at the inputs of the down projections, too (12 neurons)." in both
