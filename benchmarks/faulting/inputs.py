"""Inputs of every kind, damaged: refused in one sentence, or used as what they now say."""

import json
import multiprocessing
import shutil
from collections.abc import Callable
from dataclasses import dataclass

from documents import sample_document
from imatrix import sums_for, write_legacy
from jobs import QUICK, main_job
from own_trait import write_trait

from npti_export.gguf.reader import read_gguf

from .damage import damaged
from .endings import ENDINGS, JOB, NAME, VERIFY
from .stops import ending_of

ASKED = [*QUICK, "--threads", "1"]
EVALUATED = ["--baselines", "none", "--no-prompts", "--questions", "1", "--answer-tokens", "4", "--personas", "1"]
EVALUATED += ["--threads", "1", "--skip", "cross-talk", "--skip", "capability"]


@dataclass(frozen=True)
class Input:
    """Something that commands read.

    Attributes:
        path: gives it, whole.
        commands: command lines that read it, by what they are called in the report; with ``{path}`` for it,
            ``{model}`` for the tiny model and ``{steered}`` for what the main job makes of that.
        intact: names in a folder that are nobody's input.
    """

    path: Callable
    commands: dict
    intact: tuple = ("README.md",)


def damaged_input(place, draw):
    """An input of the main job that is not what it was: base, profile, adapter, recipe."""
    return _used_damaged(place, draw, draw.choice(["base", "profile", "adapter", "recipe"]))


def damages(which):
    """A kind of fault: one input, not what it was."""

    def damage(place, draw):
        return _used_damaged(place, draw, which)

    damage.__doc__ = f"{which}, not what it was."
    return damage


def _used_damaged(place, draw, which):
    one, setting = INPUTS[which], place.setting
    source = one.path(setting)
    copy = target = place.root / source.name
    if source.is_dir():
        shutil.copytree(source, copy)
        target = draw.choice(sorted(path for path in copy.iterdir() if path.name not in one.intact))
    else:
        shutil.copy(source, copy)
    target.write_bytes(damaged(target.read_bytes(), draw))
    names = list(one.commands)
    name = names[0] if len(names) == 1 else draw.choice(names)
    ended = place.run(_filled(one.commands[name], setting, copy)).wait()
    place.said = f"{target.name}: {ended.sentence if ended.code else 'used'}"
    if ended.fault:
        place.wrong.append(f"{ended.fault}: {ended.said[-600:]}")
    elif ended.code not in (0, 2, 3, 5):
        place.wrong.append(f"exit {ended.code}: {ended.said[-600:]}")
    left = [] if ended.code in (0, 3) else list(place.out.iterdir())
    if place.leftovers() or left:
        place.wrong.append(f"something was left: {[*place.leftovers(), *left]}")
    label = which if len(names) == 1 else f"{which}, {name}"
    return [f"{label}: {'used' if ended.code == 0 else ending_of(ended)}"], ""


def _filled(command, setting, path):
    """A command line with the places that it names."""
    line = [one.replace("{path}", str(path)).replace("{model}", str(setting.model)) for one in command]
    return [one.replace("{steered}", str(setting.steered)) if "{steered}" in one else one for one in line]


def prepare(setting, kinds):
    """Use each input as it is, which is to go well."""
    for which in kinds:
        one = INPUTS[which]
        for name, command in one.commands.items():
            setting.used(f"{which}, {name}", _filled(command, setting, one.path(setting)))


def _trait(setting):
    return setting.made("pirate", lambda path: write_trait(path))


def _legacy(setting):
    return setting.made("old.dat", lambda path: write_legacy(path, sums_for(read_gguf(setting.model))))


def _evaluation(setting):
    return setting.made("r.json", lambda path: path.write_text(sample_document(questions=6).model_dump_json()))


def _inventory(setting):
    lines = [
        {"trait": trait, "facet": facet, "keyed": keyed, "text": text}
        for trait, facet, keyed, text in (
            ("extraversion", "gregariousness", "+", "I like to have people around me."),
            ("extraversion", "gregariousness", "-", "I would rather eat alone."),
            ("openness", "ideas", "+", "I enjoy a hard riddle."),
            ("openness", "ideas", "-", "I leave theories to others."),
        )
    ]
    return setting.made("items.jsonl", lambda path: path.write_text("".join(json.dumps(one) + "\n" for one in lines)))


def _dial(setting):
    return setting.written("dial", ENDINGS["dial"])


def _directory(setting):
    """The tiny model as a transformers directory, made by a process of its own: this one runs no model."""

    def write(path):
        process = multiprocessing.get_context("fork").Process(target=_write_directory, args=(setting.model, path))
        process.start()
        process.join()
        assert process.exitcode == 0

    return setting.made("directory", write)


def _write_directory(model, path):
    from transformers import AutoTokenizer, LlamaForCausalLM

    loaded = LlamaForCausalLM.from_pretrained(model.parent, gguf_file=model.name, dtype="float32")
    weights = loaded.state_dict()
    del loaded.config.quantization_config
    plain = LlamaForCausalLM(loaded.config)
    plain.load_state_dict(weights)
    plain.save_pretrained(path)
    AutoTokenizer.from_pretrained(model.parent, gguf_file=model.name).save_pretrained(path)


_OF_MODEL = [*main_job("{model}", NAME), *JOB]
_WEIGHED = [*_OF_MODEL, "--requantize", "Q4_0", "--imatrix", "{path}"]
INPUTS = {
    "base": Input(lambda setting: setting.model, {"job": [*main_job("{path}", NAME), *JOB]}),
    "profile": Input(lambda setting: setting.profile, {"job": [*_OF_MODEL, "--profile", "{path}"]}),
    "adapter": Input(
        lambda setting: setting.adapter,
        {"job": ["--from", "{path}", "--model", "{model}", "--out", NAME, *VERIFY]},
    ),
    "recipe": Input(lambda setting: setting.recipe, {"job": [*_OF_MODEL, "--recipe", "{path}"]}),
    "trait": Input(
        _trait,
        {
            "job": ["--trait", "{path}+", "--model", "{model}", "--recipe", "npti", *ASKED, "--out", NAME],
            "stats": ["bench", "stats", "{path}"],
        },
    ),
    "imatrix": Input(lambda setting: setting.imatrix, {"job": _WEIGHED}),
    "imatrix.dat": Input(_legacy, {"job": _WEIGHED}),
    "vector": Input(
        lambda setting: setting.vector,
        {"bake-vector": ["bake-vector", "{path}", "--model", "{model}", "--out", NAME, *VERIFY]},
    ),
    "steered GGUF": Input(
        lambda setting: setting.steered,
        {
            "strip": ["strip", "{path}", "--out", NAME],
            "inspect": ["inspect", "{path}"],
            "verify": ["verify", "{path}", *VERIFY],
            "--from": ["--from", "{path}", "--format", "peft", "--out", "again", *VERIFY],
            "evaluate --base": ["evaluate", "{path}", "--base", "{model}", "--trait", "extraversion+", "--json",
                                "found.json", *EVALUATED, "--skip", "inventory"],
        },
    ),
    "evaluation": Input(_evaluation, {"report": ["report", "{path}", "--html", "all.html"]}),
    "inventory": Input(
        _inventory,
        {
            "evaluate": ["evaluate", "{steered}", "--inventory", "{path}", "--json", "found.json", *EVALUATED],
            "import": ["bench", "import", "{path}", "--out", "imported"],
        },
    ),
    "dial": Input(
        _dial,
        {
            "request": ["dial", "request", "{path}", "extraversion+:0.7"],
            "inspect": ["inspect", "{path}"],
            "strip": ["strip", "{path}/base.gguf", "--out", NAME],
        },
    ),
    "directory": Input(
        _directory,
        {
            "job": ["--trait", "extraversion+", "--model", "{path}", "--recipe", "npti", *QUICK, "--format", "peft",
                    "--out", "adapter"],
            "with --base": [*main_job("{path}", NAME), *QUICK, "--base", "{model}"],
        },
    ),
}  # fmt: skip
MAIN_INPUTS = ("base", "profile", "adapter", "recipe")
OTHERS = tuple(name for name in INPUTS if name not in MAIN_INPUTS)
