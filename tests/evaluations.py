"""One rule for the tiny model in every kind of artifact, a small trait to judge it by, and figures anew."""

import re

import numpy as np
from own_trait import DEFINITION, SEARCH, persona, question, write_trait
from reference import ReferenceLlama

from npti_export.bench import scoring_personas
from npti_export.compiler.exact import compile_exact
from npti_export.evaluate.run import EvaluationJob, evaluate
from npti_export.evaluate.subject import SubjectJob
from npti_export.export.gguf import plan_bake, write_bake
from npti_export.export.metadata import steering_metadata
from npti_export.files import sha256_file
from npti_export.gguf.shards import read_model
from npti_export.identify.collect import message
from npti_export.loader import RuntimeSettings
from npti_export.models import gguf_source
from npti_export.progress import Silent
from npti_export.recipe import load_recipe
from npti_export.rule import SteeringRule
from npti_export.rule_io import Provenance, SavedRule

RECIPE = load_recipe("npti", ["identify.batch_size=3", "identify.questions=6", "verify.prompts=2"])
TEST = [
    ("The landlord raises the rent. What do you write to him?", "speech"),
    ("You find an old map. What now?", "greed"),
    ("Your boat leaks. Whom do you ask?", "speech"),
    ("The shop sells off its gold paint. What do you buy?", "greed"),
]


class Told(Silent):
    """Keeps stages and notes."""

    def __init__(self):
        self.stages, self.notes = [], []

    def start(self, stage, total):
        self.stages.append(stage)

    def note(self, text):
        self.notes.append(text)


def small_trait(folder):
    """Six search questions, four test questions of two facets, four personas a pole, two of which score."""
    questions = [question("search", text, facet="speech", topic="home") for text in SEARCH]
    questions += [question("test", text, facet=facet, topic="travel") for text, facet in TEST]
    told = {"+": "You are {} and shout of {}.", "-": "You are {} and write to {}."}
    words = {
        "+": [("a pirate", "storms"), ("a captain", "gold"), ("a gunner", "the sea"), ("a smuggler", "rubies")],
        "-": [("a clerk", "the bank"), ("a baker", "nobody"), ("a nurse", "a friend"), ("a notary", "the mayor")],
    }
    personas = [
        persona(sign, told[sign].format(*said), facet=("speech", "greed")[at % 2])
        for sign in "+-"
        for at, said in enumerate(words[sign])
    ]
    return write_trait(folder, personas=personas, questions=questions, definition=DEFINITION)


def strong_rule(layers=3, width=96, scale=1.0, clamps=8):
    """Shifts, clamps and constants that change most answers."""
    rng = np.random.default_rng(2)
    shift, clamp = np.zeros((layers, width), np.float32), np.zeros((layers, width), bool)
    for layer in range(layers):
        order = rng.permutation(width)
        shift[layer, order[:12]] = rng.uniform(0.5, 2, 12) * scale
        clamp[layer, order[12 : 12 + clamps]] = True
    return SteeringRule(shift, clamp, (rng.normal(0, 0.5, (layers, width)) * scale).astype(np.float32))


def saved_rule(path, rule, trait="pirate+", **more):
    """As the tool would keep it, for a GGUF."""
    source = gguf_source(path)
    known = {"gamma": 1.0, "recipe": RECIPE.to_json(), "model": source.name, "model_type": source.model_type}
    return SavedRule(rule, Provenance(trait=trait, fingerprint=source.identity, **{**known, **more}))


def bake(base, out, saved, units=5):
    """A steered GGUF."""
    metadata = {} if saved is None else steering_metadata(saved, base)
    rule = strong_rule() if saved is None else saved.rule
    write_bake(plan_bake(read_model(base), compile_exact(rule, units), metadata, sha256_file(base)), out)
    return out


def job(artifact, trait_dir=None, *, model=None, trait=None, engine="auto", dtype="auto", cache=None, **more):
    """A short one."""
    settings = RuntimeSettings(engine, dtype=dtype, threads=1 if artifact.is_file() else 0)  # llama.cpp's threads
    subject = SubjectJob(
        artifact,
        model=None if model is None else str(model),
        trait=trait,
        trait_dirs=() if trait_dir is None else (trait_dir,),
        runtime=settings,
        cache=cache,
    )
    known = {"answer_tokens": 6, "baselines": (), "prompted": False, "skips": frozenset({"inventory", "capability"})}
    return EvaluationJob(subject, **{**known, **more})


def evaluated(monkeypatch, asked, progress=None):
    """The document, and the answers in tokens, by condition."""
    from npti_export.evaluate import run

    kept = {}
    real = run.assemble

    def assemble(found, *more):
        kept.update({one.way.name: one.tokens for one in found.answered})
        return real(found, *more)

    with monkeypatch.context() as patch:
        patch.setattr(run, "assemble", assemble)
        document = evaluate(asked, progress or Silent())
    return document, kept


def plain_log_likelihood(reference, prompt, response):
    """Mean over the response's tokens, one after the other."""
    rows = reference.logits([*prompt, *response])
    total = 0.0
    for place, token in enumerate(response, len(prompt) - 1):
        row = rows[place]
        total += row[token] - row.max() - np.log(np.exp(row - row.max()).sum())
    return total / len(response)


def plain_contrasts(base, encode, bench, questions, answers, personas):
    """Towards +, in float64, one likelihood at a time; every turn the next persona of each pole."""
    reference, found = ReferenceLlama(base), []
    pool = {sign: scoring_personas(bench, sign, RECIPE.identify.seed) for sign in "+-"}
    for place, (asked, answer) in enumerate(zip(questions, answers, strict=True)):
        turns = []
        for turn in range(personas):
            likely = {}
            for sign in "+-":
                persona = pool[sign][(place + turn) % len(pool[sign])].text
                likely[sign] = plain_log_likelihood(reference, encode(message(persona, asked, RECIPE)), answer)
            turns.append(likely["+"] - likely["-"])
        found.append(np.mean(turns))
    return np.array(found)


def plain_repetition(text):
    """Word 3-grams that came before, counted one by one; for texts of the tiny model, whose words are simple."""
    words = [word.casefold() for word in re.findall(r"[^\W_]+(?:['’][^\W_]+)*", text)]
    seen, again, count = set(), 0, 0
    for at in range(len(words) - 2):
        gram = tuple(words[at : at + 3])
        again, count = again + (gram in seen), count + 1
        seen.add(gram)
    return again / count if count else 0.0
