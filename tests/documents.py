"""Evaluations made by hand, for the report: a full one, one that lacks all it may lack, a hostile one."""

import functools
import math
import random

from npti_export.evaluate.document import (
    Agreement,
    Answer,
    CapabilityPart,
    Change,
    Condition,
    ContrastPart,
    Distribution,
    Document,
    Estimate,
    FluencyPart,
    InventoryPart,
    JudgePart,
    JudgeScores,
    LayerShape,
    ParetoPoint,
    Sweep,
    SweepPoint,
    Task,
)
from npti_export.report_page.page import render_page
from npti_export.traits import FACETS

TRAITS = list(FACETS)
TOPICS = ["work", "travel", "family", "money", "friends", "health", "housing", "sport", "music"]
# name, label, kind, gain, fluency
WAYS = [
    ("unsteered", "Unsteered", "base", None, -1.17),
    ("steered", "Steered (this file)", "steered", 0.071, -1.31),
    ("prompt-adjective", "Adjective prompt", "prompt", 0.052, -1.38),
    ("prompt-descriptive", "Descriptive prompt", "prompt", 0.084, -1.51),
    ("steered-prompt", "Steered + descriptive prompt", "steered", 0.112, -1.66),
    ("npti", "NPTI at γ 1.4", "baseline", 0.043, -1.62),
    ("dpn-le", "DPN-LE", "baseline", 0.037, -1.33),
    ("mean-shift", "Mean-difference vector", "baseline", 0.049, -1.36),
    ("lora", "LoRA on persona answers", "baseline", 0.066, -1.45),
    ("random", "Random neurons", "null", 0.002, -1.24),
]
CALM = [
    "I would put the kettle on first. There is little in this that cannot wait ten minutes, and most of it looks "
    "smaller once I am sitting down.",
    "Honestly, it would not keep me up. Things like this come round every few months; I have a list, I do the first "
    "item, and then I do the second.",
    "I'd ask what they meant before deciding to be hurt by it. Nine times out of ten there is a dull explanation, and "
    "the tenth time we can talk.",
]
PLAIN = [
    "There are several things to consider here. First, it is important to think about your options. You could speak to "
    "somebody you trust, make a plan, and take it step by step.",
    "I would try to understand the situation and then decide on the best course of action. It may help to write down "
    "what matters most to you.",
    "That depends on the circumstances. It is a good idea to communicate clearly, to listen, and to be patient with "
    "yourself and with others.",
]
SITUATIONS = [
    "Your train is cancelled an hour before an interview. What goes through your head?",
    "A colleague says in front of everyone that your figures are wrong. How do you react?",
    "You find a bill that you forgot to pay two months ago. What do you do next?",
    "Your neighbour's party is still loud at two in the morning. How does the night go on?",
    "The doctor asks you to come back for a second test. How do you spend the week until then?",
    "You spill coffee over a borrowed book. What do you say when you give it back?",
]


def near(mean, half=0.016, n=90):
    return Estimate(mean=mean, low=mean - half, high=mean + half * 1.1, n=n)


def change(base, steered, half, n=90):
    return Change(base=near(base, half, n), steered=near(steered, half, n), change=near(steered - base, half, n))


def condition(name, label, kind, gain, fluency):
    return Condition(
        name=name,
        label=label,
        kind=kind,
        contrast=near(0.004 + (gain or 0)),
        gain=None if gain is None else near(gain),
        fluency=near(fluency, 0.035),
        perplexity=Estimate(
            mean=math.exp(-fluency), low=math.exp(-fluency - 0.03), high=math.exp(0.03 - fluency), n=90
        ),
        repetition=near(0.02 + 0.05 * abs(fluency + 1.17), 0.008),
        distinct=near(0.91, 0.012),
        length=near(118, 7),
        seconds=21.4,
    )


def answers(count, rng):
    found = []
    for place in range(count):
        facet = FACETS["neuroticism"][place % 6]
        said = {}
        for name, _, kind, gain, _ in WAYS:
            texts = PLAIN if kind in ("base", "null") else CALM
            said[name] = " ".join(rng.sample(texts, 2)) + ("\n\n" + rng.choice(texts) if gain and gain > 0.05 else "")
        contrast = {name: round((gain or 0) + rng.gauss(0, 0.04), 4) for name, _, _, gain, _ in WAYS}
        question = f"{SITUATIONS[place % len(SITUATIONS)]}" + ("" if place < 6 else f" It is the {place}th day of it.")
        found.append(Answer(question=question, facet=facet, topic=TOPICS[place % 9], answers=said, contrast=contrast))
    return found


def judge_part():
    scores = [2.1, 3.6, 3.2, 3.9, 4.3, 2.9, 2.8, 3.1, 3.5, 2.1]
    names = [name for name, *_ in WAYS]
    one = JudgeScores(
        judge="gpt-large",
        trait={name: near(score, 0.2) for name, score in zip(names, scores, strict=True)},
        fluency={name: near(4.7 - 0.2 * place / 3, 0.15) for place, name in enumerate(names)},
        unusable=3,
    )
    other = one.model_copy(update={"judge": "Qwen2.5-7B-Instruct-Q4_K_M", "unusable": 11})
    agreement = Agreement(judges=(one.judge, other.judge), what="trait", spearman=0.71, kappa=0.58, n=886,
                          spearman_interval=(0.66, 0.75), kappa_interval=(0.5, 0.64))  # fmt: skip
    return JudgePart(judges=[one, other], agreement=[agreement])


def pareto(rng):
    points = []
    for place in range(40):
        damage = 0.004 + 0.006 * place * rng.random() + 0.001 * place
        gain = 0.09 * (1 - math.exp(-damage / 0.04)) - 0.03 * rng.random()
        points.append((damage, gain, f"best, γ {0.4 + place / 40:.2f}, top {500 + 50 * place}"))
    best, front = -1.0, set()
    for _, gain, label in sorted(points):
        if gain > best:
            best = gain
            front.add(label)
    last = sorted(point for point in points if point[2] in front and point[0] < 0.1)[-1]
    return [
        ParetoPoint(label=label, gain=gain, damage=damage, fluency=-1.2 - damage, on_front=label in front,
                    chosen=label == last[2])
        for damage, gain, label in points
    ]  # fmt: skip


def sweeps():
    gains = [(0.4, 0.018), (0.6, 0.031), (0.8, 0.052), (1.0, 0.071), (1.2, 0.069), (1.4, 0.058), (1.6, 0.034)]
    gamma = [
        SweepPoint(value=value, gain=near(gain), fluency=near(-1.13 - 0.17 * value**2, 0.03),
                   kl_neutral=near(0.06 * value**2, 0.004))
        for value, gain in gains
    ]  # fmt: skip
    parts = [
        SweepPoint(value=name, gain=near(gain), fluency=near(fluency, 0.03))
        for name, gain, fluency in (("both", 0.071, -1.31), ("shift only", 0.044, -1.27), ("clamp only", 0.031, -1.22))
    ]
    prompts = [
        SweepPoint(value=name, gain=near(gain), fluency=near(fluency, 0.03))
        for name, gain, fluency in (("adjective", 0.049, -1.4), ("persona", 0.081, -1.55))
    ]
    found = {"gamma": gamma, "parts": parts, "prompt": prompts}
    return [Sweep(setting=setting, points=points) for setting, points in found.items()]


def bump(center, width):
    shape = [math.exp(-(((place / 8 - 0.5 - center) / width) ** 2)) for place in range(32)]
    return [value / sum(shape) for value in shape]


def sample_document(pole="neuroticism-", questions=90, **changes):
    """A full evaluation, as of the default model."""
    rng = random.Random(7)
    trait, sign = pole[:-1], 1 if pole.endswith("+") else -1
    conditions = [condition(*way) for way in WAYS]
    moved = {name: near(sign * 0.071 if name == trait else rng.gauss(0, 0.012), 0.011) for name in TRAITS}
    layers = [
        LayerShape(shift=int(70 * math.exp(-((place - 19) / 7) ** 2) + rng.randrange(14)),
                   clamp=int(52 * math.exp(-((place - 15) / 8) ** 2) + rng.randrange(12)),
                   constant=0.4 + 0.05 * place if place > 6 else 0.0)
        for place in range(30)
    ]  # fmt: skip
    values = {
        "version": "0.7.0",
        "artifact": {"path": "calm.gguf", "format": "gguf", "bytes": 104_857_600, "sha256": "9f" * 32},
        "model": {"name": "SmolLM2-135M-Instruct", "fingerprint": "3c" * 8, "id": "HuggingFaceTB/SmolLM2-135M-Instruct",
                  "license": "apache-2.0"},
        "traits": [pole],
        "poles": [{"pole": pole, "name": "calm", "description": "Stays level when things go wrong: unhurried, slow to "
                   "worry, quick to recover."}],
        "recipe": {"name": "best", "rule": {"gamma": 1.0, "shift": True, "clamp": True}, "identify": {"questions": 240,
                   "seed": 7}, "compile": {"program": "exact"}, "select": {"threshold": 0.1, "at_most": None}},
        "fidelity": {"kl_rule_base": 0.164, "kl_rule_artifact": 0.0061, "kl_runtime_floor": 0.0052, "top1": 0.971,
                     "max_logit_diff": 0.83, "positions": 1536, "limit": 0.0104},
        "settings": {"questions": questions, "answer_tokens": 128, "personas": 4, "seed": 7, "engine": "llama.cpp"},
        "seconds": {"answers": 214.0, "scores": 188.2, "capability": 61.5},
        "trait_contrast": ContrastPart(
            personas=4, base=near(0.004), steered=near(0.075), gain=near(0.071), null=near(0.002),
            beyond_null=near(0.069),
            share_of_prompt=0.845, share_interval=(0.61, 1.12),
            by_facet={facet: near(0.05 + 0.012 * place, 0.028, 15) for place, facet in enumerate(FACETS[trait])},
        ),
        "judge": judge_part(),
        "inventory": InventoryPart(
            source="own items, 12 a trait",
            traits={name: change(base, base + (sign * 0.9 if name == trait else 0.06), 0.22, 12)
                    for name, base in zip(TRAITS, (3.6, 3.8, 3.1, 3.9, 2.9), strict=True)},
        ),
        "fluency": FluencyPart(
            log_likelihood=change(-1.17, -1.31, 0.03), perplexity=change(3.222, 3.706, 0.11),
            repetition=change(0.021, 0.027, 0.006), distinct=change(0.917, 0.906, 0.011), length=change(121, 118, 6),
        ),
        "capability": CapabilityPart(
            kl_neutral=near(0.061, 0.004, 64),
            tasks=[
                Task(name="multiple choice", source="own, 60 items", metric="accuracy",
                     score=change(0.483, 0.467, 0.05, 60)),
                Task(name="arithmetic", source="own, 60 items", metric="exact match",
                     score=change(0.217, 0.2, 0.06, 60)),
                Task(name="recall", source="own, 40 items", metric="exact match", score=change(0.65, 0.65, 0.04, 40)),
            ],
        ),
        "cross_talk": moved,
        "baselines": {one.name: one for one in conditions[2:]},
        "conditions": conditions,
        "answers": answers(questions, rng),
        "layers": layers,
        "distribution": Distribution(edges=[place / 8 - 0.5 for place in range(33)], wanted=bump(1.1, 0.8),
                                     opposite=bump(0.4, 0.7)),
        "sweeps": sweeps(),
        "pareto": pareto(rng),
    }  # fmt: skip
    return Document(**(values | changes))


@functools.cache
def sample_page():
    """A page with all that there is, two evaluations beside it."""
    return render_page(sample_document(), [sample_document(pole, questions=0) for pole in ("openness+", "openness-")])


@functools.cache
def hostile_page():
    return render_page(hostile_document())


def bare_document():
    """Nothing that may be missing is there."""
    part = sample_document(questions=0)
    conditions = part.conditions[:2]
    return part.model_copy(
        update={
            "recipe": None,
            "fidelity": {},
            "poles": [],
            "judge": None,
            "inventory": None,
            "cross_talk": None,
            "capability": CapabilityPart(kl_neutral=near(0.061, 0.004, 64), tasks=[]),
            "trait_contrast": part.trait_contrast.model_copy(
                update={
                    "null": None,
                    "beyond_null": None,
                    "share_of_prompt": None,
                    "share_interval": None,
                    "by_facet": {},
                }
            ),
            "baselines": {},
            "conditions": conditions,
            "layers": [],
            "distribution": None,
            "sweeps": [],
            "pareto": [],
        }
    )


HOSTILE = [
    "</script><script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "\"'><svg onload=document.title='owned'>",
    "</style></svg></title><iframe srcdoc='<script>parent.document.title=1</script>'>",
    "{{ 7 * 1191 }}{% raw %} ${7*1191} $x_1$ \\frac & &amp; <!-- ]]>",
    "‮txet desrever‬ שלום مرحبا 🙂👩‍👩‍👧 \u2028\u2029 line",
    "\x00\x07\x1b[31m\ufffe bell",
    "javascript:document.title='owned' " + "w" * 400,
]


def hostile_document():
    """A full evaluation whose every free text, keys included, is an attack or a nuisance."""
    turn = iter(range(10**9))
    renamed = {}

    def text(key=""):
        return f"{HOSTILE[next(turn) % len(HOSTILE)]} {key}"

    def spoil(value, name="", free=False):
        if isinstance(value, str):
            return value if name in FIXED else renamed.setdefault(value, text(value)) if name == "name" else text()
        if isinstance(value, list):
            return [spoil(one, name) for one in value]
        if not isinstance(value, dict):
            return value
        if free and not FIELDS & set(value):
            return {renamed.setdefault(key, text(key)): spoil(one, free=True) for key, one in value.items()}
        return {key: spoil(one, key, key in FREE) for key, one in value.items()}

    whole = sample_document(questions=8).model_dump(mode="json")
    spoilt = spoil(whole)
    spoilt["fidelity"] = whole["fidelity"] | {HOSTILE[0]: 1.0}
    return Document.model_validate(spoilt)


FIXED = {"kind", "what", "setting"}  # from a list of ours, or looked for by the report
FIELDS = {"mean", "log_likelihood", "kind", "change"}  # of parts that are no free dictionaries
FREE = {
    "artifact", "model", "recipe", "settings", "seconds", "by_facet", "cross_talk", "baselines", "answers", "contrast",
    "traits", "trait", "fluency",
}  # fmt: skip
