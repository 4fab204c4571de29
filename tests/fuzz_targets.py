"""Every parser of ours in one table: what it is called, an intact file for it, and what is done with a damaged one.

A target reads a file (or a text) of unknown origin. It may refuse it by an :class:`NptiError`; whatever it accepts has
to be whole, which the target itself asserts. ``fuzz_run.py`` mutates the files, in ``fuzz_coverage.py`` atheris does.
"""

import functools
import json
import math
import shutil
import sqlite3
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import fuzz_gguf
import fuzz_seeds
import numpy as np
from documents import sample_document
from imatrix import sums_for, write_legacy
from own_trait import write_trait
from safetensors.numpy import save

from npti_export.append_only import AppendOnly
from npti_export.bench import load_bench
from npti_export.bench.definition import read_definition
from npti_export.bench.imports import How, import_source
from npti_export.bench.lines import encodable
from npti_export.bench.making.folder import Folder, identity
from npti_export.bench.making.journal import Journal, Record
from npti_export.bench.making.parse import read_items, read_verdicts
from npti_export.bench.making.plan import Plan
from npti_export.bench.making.store import Store
from npti_export.bench.making.topics import read_topics
from npti_export.chat_template import check_template
from npti_export.compiler.kinds import parse_program
from npti_export.dial.index import load_dial, parse_mix, parse_poles
from npti_export.errors import NptiError, TraitError
from npti_export.evaluate.capability.tasks import read_passages, read_tasks
from npti_export.evaluate.card import check_card, section
from npti_export.evaluate.document import Estimate, Sweep, SweepPoint, read_document
from npti_export.evaluate.inventory.items import read_inventory
from npti_export.evaluate.judge.prompts import read_rating
from npti_export.evaluate.judge.spec import parse_judge
from npti_export.evaluate.judge.verdicts import Verdict, VerdictJournal
from npti_export.evaluate.supplements import AblationRecord, TrialRecord, TuningRecord, read_ablation, read_tuning
from npti_export.export.convert import plan_conversion
from npti_export.export.gguf import check_base
from npti_export.fingerprint import Fingerprint
from npti_export.generators.address import is_address, public_address
from npti_export.gguf.shards import read_model
from npti_export.inspection import inspect_file
from npti_export.models import ModelShape, gguf_source, resolve_model
from npti_export.profile import NeuronProfile, write_profile
from npti_export.profile_io import load_profile
from npti_export.recipe import load_recipe, recipe_from_json
from npti_export.report_page.page import render_page
from npti_export.rule import SteeringRule
from npti_export.rule_io import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CHECKPOINT_FILE,
    Provenance,
    SavedRule,
    adapter_tensors,
    decode_rule,
    encode_rule,
    load_rule,
    save_checkpoint_rule,
)
from npti_export.stats import ContrastStats, load_stats, save_stats
from npti_export.traits import parse_recorded, parse_trait, parse_whole
from npti_export.vectors import read_vector

LAYERS, WIDTH, HIDDEN = 2, 64, 32
Prepare = Callable[[Path], list[bytes]]


@dataclass(frozen=True)
class Target:
    """A parser.

    Attributes:
        kind: of file, by which it is mutated: ``json``, ``lines``, ``text``, ``safetensors``, ``zip`` or ``bytes``.
        file: name of the file that is damaged, in a folder of its own.
        prepare: puts whatever lies beside it into that folder and returns intact contents of the file.
        read: reads the file at a path; raises nothing but ``allowed``, asserts that what it accepts is whole.
        allowed: errors that it may raise.
    """

    kind: str
    file: str
    prepare: Prepare
    read: Callable[[Path], object]
    allowed: tuple[type[Exception], ...] = field(default=(NptiError,))


def _document(path):
    document = read_document(path)
    path.write_text(document.to_json(), encoding="utf-8")
    assert read_document(path) == document
    assert encodable(section(document))


def _page(path):
    page = render_page(read_document(path))
    assert encodable(page)
    assert page.count("<script") == 1  # ours


def _recipe(path):
    recipe = load_recipe(str(path))
    assert recipe_from_json(recipe.to_json()) == recipe
    assert encodable(recipe.to_json())


def _recipe_inside(path):
    recipe = recipe_from_json(path.read_bytes().decode("utf-8", "replace"))
    assert recipe_from_json(recipe.to_json()) == recipe


def _override(path):
    recipe = load_recipe("npti", [path.read_bytes().decode("utf-8", "replace")])
    assert recipe_from_json(recipe.to_json()) == recipe


def _definition(path):
    found = read_definition(path.parent)
    assert all(map(encodable, [found.name, found.description, found.poles.high.name, found.poles.low.name]))
    assert json.loads(found.model_dump_json())["name"] == found.name


def _bench(path):
    bench = load_bench("pirate", path.parent)
    assert bench.pole("+")
    assert bench.split("test")
    assert all(encodable(one.text) and one.text.strip() for one in (*bench.personas, *bench.questions))


def _profile(path):
    profile = load_profile(path, ModelShape(LAYERS, WIDTH, HIDDEN))
    for name in ("p_plus", "p_minus", "a95_plus", "a95_minus"):
        values = getattr(profile, name)
        assert values.dtype == np.float32
        assert np.isfinite(values).all()
    if path.suffix != ".json":
        assert 0 <= min(profile.p_plus.min(), profile.p_minus.min()) <= max(profile.p_plus.max(), 0) <= 1
        write_profile(profile, path, force=True)
        assert np.array_equal(load_profile(path, ModelShape(LAYERS, WIDTH, HIDDEN)).delta, profile.delta)
    json.dumps(inspect_file(path))


def _stats(path):
    stats, progress = load_stats(path)
    assert isinstance(progress, dict)
    shape = stats.plus.active.shape
    for one in (stats.plus, stats.minus):
        assert one.active.shape == one.largest.shape == one.histogram.shape[:2] == shape
        assert one.tokens >= 0
        assert one.active.dtype == np.int64
    assert stats.spread.products.shape == (3, *shape)
    assert stats.spread.mixed.shape == (4, *shape)
    save_stats(path, stats + stats, progress)


def _rule(path):
    """An adapter, a steered checkpoint: the rule is whole, and comes back from its short form."""
    saved = load_rule(path.parent)
    assert np.isfinite(saved.rule.shift).all()
    assert saved.rule.shift.shape == saved.rule.clamp.shape
    assert np.array_equal(decode_rule(encode_rule(saved.rule), "it").shift, saved.rule.shift)
    for trait in saved.about.trait.split():
        parse_recorded(trait)
    json.dumps(inspect_file(path.parent))


def _constant(path):
    base = path.parent / "base.gguf"
    found = read_vector(path, gguf_source(base), any_model=False)
    assert found.constant.shape == (LAYERS, WIDTH)
    assert np.isfinite(found.constant).all()


def _dial(path):
    dial = load_dial(path.parent)
    assert all(Path(one).name == one for one in (dial.base, *(one.file for one in dial.adapters)))
    try:
        scales = [dial.scales(parse_mix(pole, {pole[:-1]})) for pole in dial.poles]
    except TraitError:
        return
    assert all(len(one) == len(dial.adapters) and all(map(math.isfinite, one)) for one in scales)


def _verdicts(path):
    journal = VerdictJournal(path)
    try:
        for one in journal._known.values():
            assert one.rating is None or 1 <= one.rating <= 5
        journal.add("0" * 64, "judge", "trait", Verdict(3.0))
    finally:
        journal.close()


def _answers(path):
    journal = Journal(path)
    try:
        for one in journal.records(0):
            assert isinstance(one.text, str)
            assert isinstance(one.order, int)
    finally:
        journal.close()


def _plan_of(folder):
    return Plan("questions", read_definition(folder), (("search", 8), ("test", 2)), "writer")


def _plan(path):
    root = path.parent / "build"
    shutil.rmtree(root, ignore_errors=True)
    (root / "work").mkdir(parents=True)
    (root / "work" / "plan.json").write_bytes(path.read_bytes())
    (root / "work" / "answers.jsonl").write_bytes(b"")
    with Folder(root).opened(_plan_of(path.parent), force=False):
        pass


def _plan_folder(folder):
    shutil.rmtree(folder)
    write_trait(folder)
    return [json.dumps(identity(_plan_of(folder)), indent=1).encode()]


def _store(path):
    for name in (f"{path.name}-wal", f"{path.name}-shm", f"{path.name}-journal"):
        path.with_name(name).unlink(missing_ok=True)
    store = Store(path)
    try:
        store.keep(0, "search", 0, 0, "How do you spend an evening alone at home?")
        store.finish_order()
        store.commit()
        list(store.items())
        list(store.rejects())
    finally:
        store.close()


def _inventory(path):
    for item in read_inventory(path):
        assert item.keyed in ("+", "-")
        assert item.text.strip()
        assert encodable(item.text)


def _import(source):
    def read(path):
        out = path.parent.parent / "out" if source == "layout" else path.parent / "trait"
        shutil.rmtree(out, ignore_errors=True)
        if source == "text":
            write_trait(out)
        found = import_source(path.parents[1] if source == "layout" else path, out, How(), skip_bad=False, force=True)
        assert sum(sum(counts.values()) for counts in found.counts.values()) > 0
        for file in out.rglob("*.jsonl"):
            for line in file.read_text(encoding="utf-8").split("\n"):
                assert not line or isinstance(json.loads(line), dict)

    return read


def _text_folder(folder):
    write_trait(folder / "trait")
    return [b"How do you do?\nWhat is that?\n"]


def _layout(folder):
    (folder / "search").mkdir()
    (folder / "test").mkdir()
    line = json.dumps({"Openness": "You love art.", "Openness_reversed": "You avoid art."})
    (folder / "description.json").write_text(line + "\n")
    (folder / "search" / "Openness.json").write_text('{"question": "What do you paint?"}\n')
    return [b'{"question": "What do you see?"}\n{"question": "And then?"}\n']


def _tasks(path):
    for one in read_tasks(path).questions:
        assert one.options[one.right] == one.answer
        assert encodable(one.text)


def _model(path):
    source = resolve_model(str(path.parent))
    assert (source.shape.layers, source.shape.hidden) == (LAYERS, HIDDEN)
    assert source.shape.width > 0
    plan_conversion(source, ("convert_hf_to_gguf.py",), trust_remote_code=False)


def _model_folder(file):
    def prepare(folder):
        config = {
            "model_type": "llama",
            "num_hidden_layers": LAYERS,
            "hidden_size": HIDDEN,
            "intermediate_size": WIDTH,
            "hidden_act": "silu",
            "num_attention_heads": 4,
            "vocab_size": 40,
        }
        rng = np.random.default_rng(0)
        norms = ("input_layernorm", "post_attention_layernorm")
        tensors = {
            f"model.layers.{layer}.{norm}.weight": rng.normal(size=HIDDEN).astype(np.float32)
            for layer in range(LAYERS)
            for norm in norms
        }
        tensors["model.norm.weight"] = np.ones(HIDDEN, np.float32)
        tensors["model.embed_tokens.weight"] = np.ones((40, HIDDEN), np.float32)
        weights = "model-00001-of-00001.safetensors"
        contents = {
            "config.json": json.dumps(config, indent=1).encode(),
            "tokenizer_config.json": b'{"chat_template": "{{ messages[0].content }}", "bos_token": "<s>"}',
            "README.md": b"---\nlicense: mit\n---\n# A model\n",
            weights: save(tensors),
            "model.safetensors.index.json": json.dumps({"weight_map": dict.fromkeys(tensors, weights)}).encode(),
        }
        for name, data in contents.items():
            (folder / name).write_bytes(data)
        return [contents[file]]

    return prepare


def about():
    """A provenance."""
    prints = Fingerprint("0" * 64, "1" * 64, "2" * 64)
    return Provenance("openness+ calm:0.5", 1.0, load_recipe("npti").to_json(), "tiny", "llama", prints, None, "mit")


def rule():
    """A rule with all that a rule can have."""
    found = fuzz_seeds.rule_for([WIDTH] * LAYERS)
    constant = np.random.default_rng(1).normal(size=(LAYERS, WIDTH)).astype(np.float32)
    return SteeringRule(found.shift, found.clamp, constant)


def _adapter(file):
    def prepare(folder):
        saved = SavedRule(rule(), about())
        config = {
            "peft_type": "NPTI",
            "layers": LAYERS,
            "width": WIDTH,
            "strength": 1.0,
            "where": "all",
            "constant": True,
            "base_model_name_or_path": "tiny",
            "provenance": saved.about.to_dict(),
        }
        contents = {
            ADAPTER_CONFIG: json.dumps(config, indent=1).encode(),
            ADAPTER_WEIGHTS: save(adapter_tensors(saved)),
        }
        for name, data in contents.items():
            (folder / name).write_bytes(data)
        return [contents[file]]

    return prepare


def _checkpoint(folder):
    save_checkpoint_rule(SavedRule(rule(), about()), folder)
    return [(folder / CHECKPOINT_FILE).read_bytes()]


def _inner_rule(path):
    decoded = decode_rule(path.read_bytes(), str(path))
    assert np.isfinite(decoded.shift).all()


def _profile_folder(folder):
    rng = np.random.default_rng(0)
    p, q, a, b = (rng.random((LAYERS, WIDTH)).astype(np.float32) for _ in range(4))
    profile = NeuronProfile("openness", p, q, a, b, "0" * 64, {"model": "tiny", "questions": 3}, matched_plus=a - b)
    write_profile(profile, folder / "p.safetensors", force=True)
    return [(folder / "p.safetensors").read_bytes()]


def _published(folder):
    rows = {str(layer): [[layer, neuron, 0.25, 0.5, 1.5] for neuron in (1, 5)] for layer in range(LAYERS)}
    for name in ("Openness_dict.json", "Openness_reversed_dict.json"):
        (folder / name).write_text(json.dumps(rows))
    return [json.dumps(rows).encode()]


def _stats_folder(folder):
    save_stats(folder / "s.safetensors", ContrastStats.empty(LAYERS, 5), {"done": 3})
    return [(folder / "s.safetensors").read_bytes()]


def _with_trait(file, *names):
    """A trait's folder around the file; its own content by name."""

    def prepare(folder):
        shutil.rmtree(folder)
        write_trait(folder)
        return [(folder / name).read_bytes() for name in names or (file,)]

    return prepare


def _with_base(data):
    def prepare(folder):
        fuzz_seeds.write_base(folder / "base.gguf")
        return [data]

    return prepare


def _plain(*contents):
    return lambda folder: [one if isinstance(one, bytes) else one.encode() for one in contents]


def _journal(value):
    """Three lines as they are kept, with their checksums."""

    def made(folder):
        kept = AppendOnly(Path(folder) / "made.jsonl")
        for _ in range(3):
            kept.append(value)
        kept.close()
        data = kept.path.read_bytes()
        kept.path.unlink()
        return [data]

    return made


def _near(mean=0.1):
    return Estimate(mean=mean, low=mean - 0.1, high=mean + 0.1, n=9)


_ABOUT = {
    "model": {"name": "tiny", "fingerprint": "0" * 64},
    "pole": "openness+",
    "recipe": "npti",
    "settings": {"seed": 0},
    "base_fluency": -1.0,
}


def _tuning(folder):
    trial = TrialRecord(
        number=0, label="a", select={"threshold": 0.1}, rule={"gamma": 1.0}, gain=_near(), damage=_near(),
        fluency=_near(), within=True,
    )  # fmt: skip
    record = TuningRecord(
        **_ABOUT, budget={"damage": 0.1}, trials=[trial], failed=0, pareto=sample_document().pareto, confirmation=None
    )
    return [record.to_json().encode()]


def _ablation(folder):
    points = [SweepPoint(value=1.0, gain=_near(), fluency=_near())]
    return [AblationRecord(**_ABOUT, sweeps=[Sweep(setting="gamma", points=points)], notes=["x"]).to_json().encode()]


def _xlsx(folder):
    import openpyxl

    book = openpyxl.Workbook()
    for row in (["text", "trait", "keyed"], ["I love art.", "Openness", "+"], ["I avoid art.", "O", "-"]):
        book.active.append(row)
    book.save(folder / "i.xlsx")
    return [(folder / "i.xlsx").read_bytes()]


def _store_folder(folder):
    store = Store(folder / "s.sqlite")
    store.begin_turn(0, [(0, 3)])
    store.keep(0, "search", 0, 7, "What do you do when a plan falls through at the last minute?")
    store.reject(0, 0, 7, "words", "too short", "Why?", keep=True)
    store.finish_order()
    store.commit()
    store.close()
    with sqlite3.connect(folder / "s.sqlite") as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return [(folder / "s.sqlite").read_bytes()]


def _legacy(folder):
    fuzz_seeds.write_base(folder / "base.gguf")
    write_legacy(folder / "m.dat", sums_for(read_model(folder / "base.gguf")))
    return [(folder / "m.dat").read_bytes()]


def _dial_folder(folder):
    adapters = [
        {"id": 0, "trait": "openness+", "kind": "shift", "file": "openness+.shift.gguf"},
        {"id": 1, "trait": "openness+", "kind": "clamp", "file": "openness+.clamp.gguf"},
        {"id": 2, "trait": "extraversion-", "kind": "shift", "file": "extraversion-.shift.gguf"},
        {"id": 3, "traits": ["openness+", "extraversion-"], "kind": "overlap", "file": "both.overlap.gguf"},
    ]
    return [json.dumps({"npti_dial": 1, "base": "base.gguf", "adapters": adapters, "mixed": 2}, indent=1).encode()]


def _gguf(name):
    """A reader of GGUF files; ``fuzz_gguf.py`` gives it many more files, and mutations of their structure."""

    def read(path):
        work = path.parent / "work"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        fuzz_gguf.TARGETS[name](path, work)

    return read


@functools.cache
def _gguf_seeds():
    with tempfile.TemporaryDirectory() as folder:
        return {name: parts[0] for name, parts in fuzz_seeds.write_seeds(Path(folder)).items() if len(parts) == 1}


def _gguf_files(kind):
    """Those of a kind: ``steered``, ``matrix``, ``vector`` or ``base``."""

    def prepare(folder):
        if kind == "base":
            return [data for name, data in _gguf_seeds().items() if "steered" not in name and "matrix" not in name]
        return [data for name, data in _gguf_seeds().items() if kind in name]

    return prepare


def _overlaps(path):
    """What the reader accepts lies inside the file, and no two tensors share a byte."""
    header = read_model(path)
    ends = 0
    for one in sorted(header.parts[0].tensors, key=lambda tensor: tensor.offset):
        assert one.offset >= max(ends, header.parts[0].data_start), one.name
        ends = one.offset + one.nbytes
        assert ends <= path.stat().st_size, one.name
    check_base(header, "uniform")


def _text(parse):
    return lambda path: parse(path.read_bytes().decode("utf-8", "replace"))


def _address(text):
    assert isinstance(public_address(text), str)
    if is_address(text):
        assert text.lower().startswith("http")
        assert "@" not in public_address(text).partition("/")[0]


def _rating(text):
    found = read_rating(text)
    assert found is None or found in (1, 2, 3, 4, 5)


def _items(text):
    assert len(read_items(text, 3)) <= 6
    assert len(read_verdicts(text, 3)) == 3


def _template(path):
    check_template(path.read_bytes().decode("utf-8", "replace"), str(path))


CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}{{ '<|im_start|>system\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] | trim + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_SAID = ("1. One?\n2. Two?", '["One?", "Two?"]', '{"verdicts": [{"question": 1, "differ": true}]}')
_ITEMS = (
    '{"text": "I love art.", "trait": "openness", "keyed": "+"}\n{"text": "I avoid art.", "trait": "O", "keyed": -1}\n'
)
_TASK = (
    '{"question": "2 + 2?", "options": ["3", "4"], "answer": "4"}\n'
    '{"question": "1 + 1?", "options": ["2", "4"], "answer": "2"}\n'
)
_RECORD = vars(Record(0, "1. What now?", verdicts=[True, None]))
_VERDICT = {"key": "a" * 64, "judge": "j", "what": "trait", "rating": 3}
_CONSTANT = json.dumps({"layers": LAYERS, "width": WIDTH, "constant": [[0, 1, 0.5], [1, 63, -2.5]]})
_HALF = np.full((LAYERS, WIDTH), 0.5, np.float32)
_RECIPE = 'extends = "npti"\nname = "mine"\n[rule]\ngamma = 0.7\n[poles."openness+"]\nselect = { threshold = 0.2 }\n'

TARGETS = {
    "evaluation": Target("json", "e.json", lambda folder: [sample_document(questions=6).to_json().encode()], _document),
    "report-page": Target("json", "e.json", lambda folder: [sample_document(questions=2).to_json().encode()], _page),
    "tuning": Target("json", "t.json", _tuning, lambda path: read_tuning(path).to_json()),
    "ablation": Target("json", "a.json", _ablation, lambda path: read_ablation(path).to_json()),
    "recipe": Target("text", "r.toml", _plain(_RECIPE), _recipe),
    "recipe-json": Target("json", "r.json", lambda folder: [load_recipe("npti").to_json().encode()], _recipe_inside),
    "override": Target("text", "o.txt", _plain("rule.gamma=0.7", "select.at_most=none"), _override),
    "trait.toml": Target("text", "trait.toml", _with_trait("trait.toml"), _definition),
    "personas": Target("lines", "personas.jsonl", _with_trait("personas.jsonl"), _bench),
    "questions": Target("lines", "questions.jsonl", _with_trait("questions.jsonl"), _bench),
    "profile": Target("safetensors", "p.safetensors", _profile_folder, _profile),
    "published": Target("json", "Openness_dict.json", _published, _profile),
    "stats": Target("safetensors", "s.safetensors", _stats_folder, _stats),
    "adapter-config": Target("json", ADAPTER_CONFIG, _adapter(ADAPTER_CONFIG), _rule),
    "adapter-weights": Target("safetensors", ADAPTER_WEIGHTS, _adapter(ADAPTER_WEIGHTS), _rule),
    "checkpoint": Target("json", CHECKPOINT_FILE, _checkpoint, _rule),
    "rule": Target("safetensors", "rule.bin", lambda folder: [encode_rule(rule())], _inner_rule),
    "constant-json": Target("json", "c.json", _with_base(_CONSTANT.encode()), _constant),
    "constant": Target("safetensors", "c.safetensors", _with_base(save({"constant": _HALF})), _constant),
    "dial": Target("json", "index.json", _dial_folder, _dial),
    "verdicts": Target("lines", "v.jsonl", _journal(_VERDICT), _verdicts),
    "answers": Target("lines", "a.jsonl", _journal(_RECORD), _answers),
    "plan": Target("json", "plan.json", _plan_folder, _plan),
    "store": Target("bytes", "s.sqlite", _store_folder, _store),
    "inventory-jsonl": Target("lines", "i.jsonl", _plain(_ITEMS), _inventory),
    "inventory-csv": Target("text", "i.csv", _plain("text,trait,keyed\nI love art.,O,+\nI hide.,E,-\n"), _inventory),
    "inventory-xlsx": Target("zip", "i.xlsx", _xlsx, _inventory),
    "layout": Target("lines", "test/Openness.json", _layout, _import("layout")),
    "plain-text": Target("text", "q.txt", _text_folder, _import("text")),
    "tasks-jsonl": Target("lines", "t.jsonl", _plain(_TASK), _tasks),
    "tasks-csv": Target("text", "t.csv", _plain("question,option1,option2,answer\nOne?,1,2,1\nTwo?,3,4,4\n"), _tasks),
    "passages": Target("lines", "p.jsonl", _plain('{"text": "Rain is water."}\n'), read_passages),
    "topics": Target("text", "t.txt", _plain("work\nfriends\n"), read_topics),
    "config.json": Target("json", "config.json", _model_folder("config.json"), _model),
    "tokenizer_config": Target("json", "tokenizer_config.json", _model_folder("tokenizer_config.json"), _model),
    "weight-index": Target(
        "json", "model.safetensors.index.json", _model_folder("model.safetensors.index.json"), _model
    ),
    "weights": Target(
        "safetensors", "model-00001-of-00001.safetensors", _model_folder("model-00001-of-00001.safetensors"), _model
    ),
    "model-card": Target("text", "README.md", _model_folder("README.md"), _model),
    "card": Target("text", "card.md", _plain("# Card\n<!-- npti-export evaluation -->\n"), check_card),
    "chat-template": Target("text", "t.jinja", _plain(CHATML), _template),
    "imatrix-dat": Target("bytes", "m.dat", _legacy, _gguf("importance")),
    "overlaps": Target("bytes", "m.gguf", _gguf_files("base"), _overlaps),
    **{
        f"gguf-{name}": Target("bytes", "m.gguf", _gguf_files(kind), _gguf(name))
        for name, kind in {
            "read": "base",
            "source": "base",
            "inspect": "base",
            "rule": "mixed-steered",
            "bake": "base",
            "strip": "mixed-steered",
            "requantise": "float",
            "importance": "matrix",
            "directions": "vector",
        }.items()
    },
    "trait": Target("text", "t", _plain("agreeableness+:0.5", "calm", "./pirate+"), _text(parse_trait)),
    "whole-trait": Target("text", "t", _plain("openness", "./pirate"), _text(parse_whole)),
    "mix": Target("text", "t", _plain("extraversion+:0.7,calm", "calm,moody:2"), _text(parse_mix)),
    "poles": Target("text", "t", _plain("extraversion+,calm", "all"), _text(parse_poles)),
    "judge": Target("text", "t", _plain("http://127.0.0.1:8080/v1=qwen", "judge.gguf"), _text(parse_judge)),
    "address": Target("text", "t", _plain("http://127.0.0.1:8080/v1", "https://[::1]:1/v1"), _text(_address), ()),
    "program": Target("text", "t", _plain("budget:5%", "lowrank:4", "kl:0.1", "exact"), _text(parse_program)),
    "rating": Target("text", "t", _plain('{"rating": 4}', "Rating: 3/5"), _text(_rating), ()),
    "items": Target("text", "t", _plain(*_SAID), _text(_items), ()),
}
