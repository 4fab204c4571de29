"""The model card: the README.md that goes with an export, for the Hub and for people."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from npti_export.traits import EVERYDAY, FACETS, TraitSpec, parse_recorded

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

# How the Hub files a model under its base. It takes every GGUF for a mere quantisation, which promises the base's
# behaviour in fewer bits; this one behaves differently and changes no type, so it is a fine-tune to whoever looks.
_RELATION = {"peft": "adapter", "checkpoint": "finetune", "gguf": "finetune", "control-vector": "adapter"}

# Names from the Hub's list of libraries; llama.cpp itself is not on it, only its Python binding.
_LIBRARY = {
    "peft": "peft",
    "checkpoint": "transformers",
    "gguf": "llama-cpp-python",
    "control-vector": "llama-cpp-python",
}

_NOUN = {
    "peft": "PEFT adapter",
    "checkpoint": "transformers checkpoint",
    "gguf": "GGUF file",
    "control-vector": "control vector of llama.cpp",
}

# What the Hub accepts as a licence; it refuses a card with any other.
_LICENSES = """
afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5
cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0
eupl-1.1 eupl-1.2 fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0 grok2-community h-research
intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit
mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openmdw-1.0 openmdw-1.1 openrail openrail++ osl-3.0 other pddl postgresql
unknown unlicense wtfpl zlib
"""


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)


def model_card(report: dict[str, Any], evaluation: str = "", results: Sequence[EvalResult] = ()) -> str:
    """The text of README.md for the export that a report describes: front matter and body.

    Args:
        report: of the main job.
        evaluation: a section on what the export does, see :mod:`npti_export.evaluate.card`.
        results: its figures for the front matter.
    """
    traits = [parse_recorded(text) for text in report["traits"]]
    sections = [
        _what(report, traits),
        _loading(report),
        _example(report["sample"]),
        _fidelity(report, evaluated=bool(evaluation)),
        evaluation,
        _limits(report, traits),
        _making(report),
    ]
    return f"---\n{_front_matter(report, traits, results)}\n---\n\n" + "\n\n".join(filter(None, sections)) + "\n"


def _front_matter(report: dict[str, Any], traits: list[TraitSpec], results: Sequence[EvalResult]) -> str:
    from huggingface_hub import ModelCardData

    kind, base = report["artifact"]["format"], report["model"]["id"]
    names = dict.fromkeys(spec.trait for spec in traits)
    big_five = ["big-five"] if FACETS.keys() & names.keys() else []
    tags = ["npti", "npti-export", "personality", "steering", *big_five, *names]
    data = ModelCardData(
        base_model=base,
        base_model_relation=_RELATION[kind] if base else None,
        # The Hub means the data that the model was made with; the base may speak more. Of one's own nobody said.
        language="en" if FACETS.keys() >= names.keys() else None,
        library_name=_LIBRARY[kind],
        pipeline_tag="text-generation",
        tags=tags,
        model_name=PurePath(report["artifact"]["path"]).name
        if results
        else None,  # the Hub wants a name for what has results
        eval_results=list(results) or None,
        **_license(report["model"]["license"], base),
    )
    return str(data.to_yaml(line_break="\n"))


def _license(name: str | None, base: str | None) -> dict[str, Any]:
    if name is None:
        return {}
    if name.lower() in _LICENSES.split():
        return {"license": name.lower()}
    slug = re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.")
    link = {"license_link": f"https://huggingface.co/{base}"} if base and _HUB_ID.fullmatch(base) else {}
    return {"license": "other", "license_name": slug or "unnamed", **link}


def _added(neurons: dict[str, Any]) -> str:
    widest, mean = neurons["extra_width"], neurons["extra_width_mean"]
    return f"{widest} neurons" if mean == widest else f"up to {widest} neurons ({mean:g} on average)"


def _what(report: dict[str, Any], traits: list[TraitSpec]) -> str:
    kind, neurons = report["artifact"]["format"], report["neurons"]
    meanings = {one["pole"]: one for one in report["poles"]}
    poles = "\n".join(f"- {_pole(spec, meanings)}" for spec in traits)
    if kind == "peft":
        how = "The adapter does this to the activations while the model runs; no weight of the base model is changed."
    elif kind == "control-vector":
        how = (
            "Of this, the file holds the constant part: what the rule adds to the residual stream of each layer on "
            "average, whatever the token. How near that comes to the rule itself is measured below."
        )
    elif neurons["extra_width"]:
        how = (
            f"This is written into the weights: each MLP has {_added(neurons)} more than the base model's "
            f"{neurons['width']}."
        )
    else:
        how = "This is written into the weights; no MLP is wider than before."
    return f"""\
# {_code(report["model"]["name"])} with a fixed personality

A {_NOUN[kind]} ({report["artifact"]["bytes"] / 1e6:.1f} MB) that steers {_code(report["model"]["name"])} towards

{poles}

The personality is in the model, not in a system prompt. {_method(report)}
{how}"""


def _method(report: dict[str, Any]) -> str:
    neurons, recipe = report["neurons"], f"by the recipe {_code(report['recipe']['name'])}"
    constant = neurons.get("constant", 0)
    if not neurons["shift"] and not neurons["clamp"]:
        if _constants(report) == [_MATCHING]:
            return (
                "Each layer gets a constant that moves the residual stream, on average, as personas of the pole\n"
                f"move it (strength γ = {_gamma(report)}), {recipe}."
            )
        return (
            f"Each MLP's down projection gets a constant added to its input ({constant} neurons in all, strength\n"
            f"γ = {_gamma(report)}), {recipe}."
        )
    also = f" A constant is added at the inputs of the down projections, too ({constant} neurons)." if constant else ""
    return (
        "Neurons that fire more often when the model\n"
        f"plays the wanted pole are shifted up ({neurons['shift']} of them, strength γ = {_gamma(report)}), those of\n"
        f"the opposite pole are kept from firing ({neurons['clamp']} clamped), {recipe}.{also}"
    )


def _pole(spec: TraitSpec, meanings: dict[str, dict[str, str]]) -> str:
    if spec.trait not in FACETS:
        meaning = meanings[spec.pole]
        return (
            f"**{spec.pole}** ({meaning['name']}), strength {spec.strength:g}, by its author's definition: "
            f"{_code(meaning['description'])}"
        )
    names = [name for name, pole in EVERYDAY.items() if pole == spec.pole][:3]
    return f"**{spec.pole}** ({', '.join(names)}), strength {spec.strength:g}"


def _loading(report: dict[str, Any]) -> str:
    text = {
        "peft": _load_peft,
        "checkpoint": _load_checkpoint,
        "gguf": _load_gguf,
        "control-vector": _load_control_vector,
    }[report["artifact"]["format"]]
    return "## How to load it\n\n" + text(report)


def _load_peft(report: dict[str, Any]) -> str:
    base = _string(report["model"]["id"] or "path/to/the/base/model")
    return f"""\
```
pip install npti-export
```

```python
import npti_export  # before PEFT reads the adapter
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({base})
model = AutoModelForCausalLM.from_pretrained({base})
model = PeftModel.from_pretrained(model, "this/repository")
```

`"this/repository"` is the id of this repository on the Hub, or a folder with its files. The import teaches PEFT this
type of adapter. Without it PEFT stops with `KeyError: 'NPTI'`: install npti-export and import it first.

For a weaker or stronger personality, and to take it off again, leave the last line out and attach a folder with these
files:

```python
attached = npti_export.attach(model, "path/to/the/folder", strength=0.5)  # until attached.detach()
```"""


def _load_control_vector(report: dict[str, Any]) -> str:
    name = PurePath(report["artifact"]["path"]).name
    return f"""\
With the GGUF of the base model that it was made for (another quantisation of it will do):

```
llama-server -m base.gguf --control-vector {name}
llama-cli -m base.gguf --control-vector-scaled {name}:0.5
```"""


def _load_checkpoint(_report: dict[str, Any]) -> str:
    return """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("this/repository")
model = AutoModelForCausalLM.from_pretrained("this/repository")
```

`"this/repository"` is the id of this repository on the Hub, or a folder with its files. Nothing of npti-export is
needed, and no remote code is run.

The personality lives in MLP biases (`mlp_bias` in `config.json`), and a server must use them. vLLM does, by its source;
SGLang's own llama class drops them without a word: start it with `--model-impl transformers`, which by its source keeps
them."""


def _load_gguf(report: dict[str, Any]) -> str:
    name = PurePath(report["artifact"]["path"]).name
    return f"""\
Any program built on llama.cpp runs it as it is, `llama-cli -m` for one. From Python, with llama-cpp-python:

```python
from llama_cpp import Llama

model = Llama({_string(name)}, n_ctx=2048)
messages = [{{"role": "user", "content": "What would you do with a free day?"}}]
print(model.create_chat_completion(messages)["choices"][0]["message"]["content"])
```

Nothing of npti-export is needed. `npti-export strip` takes the personality out again and gives back the base file, bit
for bit."""


def _example(sample: dict[str, str] | None) -> str:
    if sample is None:
        return ""
    return f"""\
## One example

Not selected, and quoted as it came. The question:

{_quote(sample["question"])}

The unsteered model:

{_quote(sample["base"])}

This one:

{_quote(sample["steered"])}"""


def _fidelity(report: dict[str, Any], *, evaluated: bool) -> str:
    fidelity, noun = report["fidelity"], _NOUN[report["artifact"]["format"]]
    shows = "The next section says" if evaluated else "It does not say"
    if fidelity is None:
        return f"""\
## Is it faithful?

This was not measured: nobody has checked that the {noun} does what the method prescribes."""
    return f"""\
## Is it faithful?

The {noun} was compared with the method's rule, applied directly to the base model in float32, over
{fidelity["positions"]:.0f} tokens of answers to held-out questions. KL is the Kullback-Leibler divergence of the
next-token distributions, in nats per token.

| measure | value | meaning |
|---|---|---|
| KL to the rule | {fidelity["kl_rule_artifact"]:.2g} | how far this export is from the rule; had to be at most \
{fidelity["limit"]:.2g} |
| KL of the runtime | {fidelity["kl_runtime_floor"]:.2g} | noise of the program that runs it, without steering |
| KL to the base model | {fidelity["kl_rule_base"]:.3g} | how far the rule moves the unsteered model |
| top-1 agreement | {fidelity["top1"]:.1%} | how often rule and export find the same token likeliest |
| worst logit | {fidelity["max_logit_diff"]:.2g} | the largest difference of any logit |

This says that the export does what the rule says. {shows} how well the personality shows."""


def _limits(report: dict[str, Any], traits: list[TraitSpec]) -> str:
    own = sorted({spec.trait for spec in traits} - FACETS.keys())
    texts = "The personas and questions that it was made with are English. Other languages are untested."
    if own:
        texts = (
            f"The personas and questions of {', '.join(own)} do not come with npti-export, and how good they are was "
            "not examined. Languages other than theirs are untested."
        )
    name = report["model"]["license"]
    if name is None:
        terms = "npti-export could not tell which one that is: look it up before you use or share this model."
    else:
        terms = f"That is {_code(name)}."
    return f"""\
## Intended use and limits

For research on personality in language models, for fiction, games and dialogue where a lasting tone is wanted.

- The personality is a tendency, not a guarantee: single answers may show none of it, or its opposite.
- Steering costs fluency and capability. Test this model on your own task, next to the unsteered one.
- The traits are labels for ways of writing. This is not a psychological assessment, neither of the model nor of
  anyone who talks to it, and must not be used as one.
- Do not present it as a person: whoever talks to it must be able to know that it is a language model.
- {texts}
- All limits and biases of the base model are still there. Steering may also weaken what it was taught to refuse.
- The base model's licence applies to this model, too. {terms} npti-export, which made it, is Apache-2.0; no code of it
  or of what it depends on is in this export."""


def _constants(report: dict[str, Any]) -> list[str]:
    """How the constants came about, by the rules of the poles that are exported."""
    recipe = report["recipe"]
    rules = [
        recipe.get("rule", {}) | recipe.get("poles", {}).get(parse_recorded(text).pole, {}).get("rule", {})
        for text in report["traits"]
    ]
    ways = {"matched": _MATCHING, "constant": _MEANS}
    return [how for key, how in ways.items() if any(rule.get(key) for rule in rules)]


_NPTI = """by the method NPTI (Neuron-based Personality Trait Induction,
[arXiv 2410.12327](https://arxiv.org/abs/2410.12327)): the base model answers questions under personas of both poles,
the neurons that fire more under one of them are its neurons, and a fixed rule shifts or clamps these."""
_MATCHING = """by matching: the base model answers questions under personas of the wanted pole
and reads these answers under personas of both poles and under the plain questions. What the personas change in the
residual stream is given to the plain model as a constant for each layer."""
_MEANS = """from the means of what each down projection reads while the base model answers
questions under personas of both poles: their difference is added (as DPN-LE,
[arXiv 2604.27929](https://arxiv.org/abs/2604.27929), does)."""


def _making(report: dict[str, Any]) -> str:
    model, neurons = report["model"], report["neurons"]
    how = [_NPTI] if neurons["shift"] or neurons["clamp"] else []
    if neurons.get("constant"):
        how += _constants(report)
    base = _code(model["id"] or model["name"])
    return f"""\
## How it was made

With npti-export {report["version"]}, {" And ".join(how)} Nothing was trained.

- Base model: {base}
- Its fingerprint (SHA-256 over its norm weights): {_code(model["fingerprint"])}
- Traits: {_code(report["trait"])}
- Recipe: {_code(report["recipe"]["name"])}, γ = {_gamma(report)}"""


def _gamma(report: dict[str, Any]) -> str:
    return "mixed" if report["gamma"] is None else f"{report['gamma']:g}"


def _code(text: str) -> str:
    """Foreign text as an inline code span, in which no markup counts."""
    return "`" + (" ".join(text.split()).replace("`", "'") or "unknown") + "`"


def _string(text: str) -> str:
    """Foreign text as a Python string literal on one line."""
    return json.dumps(text, ensure_ascii=False)


def _quote(text: str) -> str:
    """Foreign text as a fenced block that it cannot close: the fence is longer than any run of backticks in it."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    text = text.strip().replace("<!-- npti-export", "<!- - npti-export")  # no mark of an evaluation's section
    return f"{fence}text\n{text}\n{fence}"
