"""A folder makes any contrast usable wherever one of the Big Five is."""

import dataclasses
import json
import shutil

import pytest
from jobs import QUICK, main_job
from own_trait import DEFINITION, command, write_trait

from npti_export.benches import bench_folder, load_benches
from npti_export.dial.index import load_dial, parse_mix, parse_poles
from npti_export.errors import AdapterError, BenchError, ProfileError, TraitError
from npti_export.export.card import model_card
from npti_export.job import Job
from npti_export.pipeline import run
from npti_export.profile import read_profile, write_profile
from npti_export.progress import Silent
from npti_export.rule_io import load_rule
from npti_export.traits import TraitSpec, parse_recorded, parse_trait, parse_whole


@pytest.fixture
def pirate(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_trait(tmp_path / "pirate")


def test_notation(pirate):
    spec = parse_trait("./pirate-:0.5")
    assert (spec.trait, spec.sign, spec.strength) == ("pirate", "-", 0.5)
    assert spec.folder.resolve() == pirate
    assert str(spec) == "pirate-:0.5"
    assert {spec: 1}[parse_trait("./pirate-:0.5")] == 1
    assert parse_trait(f"{pirate}+:1e-3").strength == 0.001
    assert parse_trait("./pirate/−").sign == "-"
    assert parse_whole("./pirate").trait == parse_whole("./pirate-").trait == "pirate"
    poles = parse_poles("./pirate+,calm")
    assert [spec.pole for spec in poles] == ["pirate+", "neuroticism-"]
    assert str(parse_recorded("pirate-:2.0")) == "pirate-:2.0"
    assert parse_mix("pirate+:0.5", {"pirate"}) == (TraitSpec("pirate", "+", 0.5),)


def test_a_folder_s_name_may_hold_signs_and_differ_from_the_trait_s(tmp_path):
    folder = write_trait(tmp_path / "a-b+c")
    assert parse_trait(f"{folder}-") == TraitSpec("pirate", "-", folder=folder)
    assert parse_whole(str(folder)).folder == folder
    with pytest.raises(TraitError, match="say which pole"):
        parse_trait(str(folder))


def test_windows_paths_are_read_as_paths(tmp_path, monkeypatch):
    # A backslash is part of a name here, so a folder of that very name stands for the drive's.
    monkeypatch.chdir(tmp_path)
    write_trait(tmp_path / r"C:\x\pirate")
    assert parse_trait(r"C:\x\pirate+:0.5") == TraitSpec("pirate", "+", 0.5, parse_trait(r"C:\x\pirate+").folder)
    assert parse_whole(r"C:\x\pirate").trait == "pirate"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("./parrot+", "there is no such folder"),
        ("./pirate", "say which pole"),
        ("./pirate+:0", "above 0"),
        ("./pirate+:-1", "above 0"),
        ("./bare+", "the folder has no trait.toml"),
        ("pirate+", "unknown"),
        ("./" + "x" * 5000 + "+", "there is no such folder"),
        ("./a\0b+", "there is no such folder"),
        ("/+", "no trait.toml"),
        ("~nobody-of-that-name/x+", "there is no such folder"),
    ],
)
def test_bad_notation(pirate, text, says):
    (pirate.parent / "bare").mkdir()
    with pytest.raises(TraitError) as error:
        parse_trait(text)
    assert says in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("name", ["openness", "calm"])
def test_our_names_are_taken(tmp_path, name):
    write_trait(tmp_path / "x", name)
    with pytest.raises(TraitError, match="choose another name") as error:
        parse_trait(f"{tmp_path / 'x'}+")
    assert "trait.toml: 'name' is" in str(error.value)


def test_a_name_with_a_space_is_refused(tmp_path):
    write_trait(tmp_path / "x", "sea dog")
    with pytest.raises(BenchError, match=r"trait\.toml: 'name'"):
        parse_trait(f"{tmp_path / 'x'}+")


def test_which_bench_is_read(pirate, tmp_path):
    bench = load_benches([parse_trait("./pirate+"), parse_trait("calm")])
    assert list(bench) == ["neuroticism", "pirate"]
    assert bench["pirate"].definition.poles.high.name == "piratical"
    place = tmp_path / "five"
    write_trait(place / "openness", definition=None, personas=PLAIN, questions=ASKED)
    assert load_benches([parse_trait("openness+")], place)["openness"].personas[0].text == "You are."
    assert load_benches([parse_trait("openness+")], place / "openness")["openness"].definition.name == "openness"
    assert bench_folder("./pirate") == ("pirate", bench_folder("./pirate")[1])
    assert bench_folder(str(place / "openness")) == ("openness", place / "openness")
    recorded = TraitSpec("pirate", "+")
    assert load_benches([recorded], folders=[pirate])["pirate"].digest == bench["pirate"].digest


PLAIN = [{"pole": sign, "text": "You are."} for sign in "+-"]
ASKED = [{"split": split, "text": "What now?"} for split in ("search", "test")]


def test_which_bench_is_not_read(pirate, tmp_path):
    place = write_trait(tmp_path / "five" / "openness", definition=None, personas=PLAIN, questions=ASKED).parent
    other = write_trait(tmp_path / "other")
    own, recorded, openness = parse_trait("./pirate+"), TraitSpec("pirate", "+"), parse_trait("openness+")
    cases = [
        (([recorded],), "name the folder that defines it by --trait-dir ./pirate"),
        (([own], None, [pirate]), "for which no folder is needed"),
        (([recorded], None, [pirate, other]), "is a second folder of pirate"),
        (([own, parse_trait("./other-")],), "both define pirate"),
        (([own], place), "none of the Big Five is asked for"),
        (([openness, parse_trait("calm")], place), "has no folder neuroticism/"),
        (([openness, parse_trait("calm")], place / "openness"), "holds one trait"),
        (([openness], tmp_path / "none"), "there is no such folder"),
    ]
    for arguments, says in cases:
        with pytest.raises((TraitError, BenchError)) as error:
            load_benches(*arguments)
        assert says in str(error.value), says


def test_the_digest_is_of_the_definition_too(tmp_path):
    spec = parse_trait(f"{write_trait(tmp_path / 'a')}+")
    digest = load_benches([spec])["pirate"].digest
    toml = spec.folder / "trait.toml"
    toml.write_text("# a comment changes nothing\n" + toml.read_text())
    assert load_benches([spec])["pirate"].digest == digest
    toml.write_text(DEFINITION.format(name="pirate").replace("Wants gold", "Wants rum"))
    changed = load_benches([spec])["pirate"].digest
    assert changed != digest
    questions = spec.folder / "questions.jsonl"
    questions.write_text(questions.read_text().replace("ladder", "boat"))
    assert load_benches([spec])["pirate"].digest not in (digest, changed)


@pytest.fixture(scope="module")
def made(make_tiny, tmp_path_factory):
    """A steered GGUF of a trait of one's own mixed with one of ours, its report and its profile."""
    folder = tmp_path_factory.mktemp("own")
    trait = write_trait(folder / "pirate")
    identified = ["--model", make_tiny(), "--recipe", "npti", *QUICK, "--threads", "1"]
    command("identify", "--trait", trait, "--out", folder / "pirate.safetensors", *identified)
    arguments = [*main_job(make_tiny(), folder / "m.gguf"), "--threads", "1", "--trait", f"{trait}-:0.5"]
    command(*arguments, "--profile", folder / "pirate.safetensors", "--report", folder / "report.json")
    return folder, json.loads((folder / "report.json").read_text())


def test_the_whole_job(made):
    folder, report = made
    assert report["traits"] == ["extraversion+", "pirate-:0.5"]
    assert report["poles"][1] == {
        "pole": "pirate-",
        "name": "landlubberly",
        "description": "Somebody who talks like a clerk.",
    }
    assert report["fidelity"]["kl_rule_base"] > 10 * report["fidelity"]["kl_rule_artifact"]
    assert report["sample"]["base"] != report["sample"]["steered"]
    bench = load_benches([TraitSpec("pirate", "+")], folders=[folder / "pirate"])["pirate"]
    assert report["profiles"]["pirate"]["bench"] == bench.digest
    assert load_rule(folder / "m.gguf").about.trait == "extraversion+ pirate-:0.5"


def test_the_card_speaks_of_it(made):
    card = model_card(made[1])
    assert "- **pirate-** (landlubberly), strength 0.5, by its author's definition: `Somebody who talks" in card
    assert "- big-five\n- extraversion\n- pirate\n" in card
    assert "language: en" not in card
    assert "The personas and questions of pirate do not come with npti-export" in card
    alone = made[1] | {"traits": ["pirate-:0.5"], "trait": "pirate-:0.5"}
    assert "big-five" not in model_card(alone)


def test_what_needs_no_questions_asks_for_no_folder(made, tmp_path, capsys, make_tiny):
    folder, _ = made
    command("inspect", folder / "m.gguf")
    assert "pirate-:0.5" in capsys.readouterr().out
    command("inspect", folder / "pirate.safetensors")
    assert "pirate" in capsys.readouterr().out
    command("strip", folder / "m.gguf", "--out", tmp_path / "base.gguf")
    assert (tmp_path / "base.gguf").read_bytes() == make_tiny().read_bytes()


def test_verify_and_from_ask_for_the_folder(made, tmp_path, capsys):
    folder, report = made
    for arguments in (["verify", folder / "m.gguf"], ["--from", folder / "m.gguf", "--out", tmp_path / "again.gguf"]):
        with pytest.raises(TraitError, match=r"pirate: is not one of the shipped traits.*--trait-dir \./pirate"):
            command(*arguments, "--threads", "1")
        assert command(*arguments, "--threads", "1", "--trait-dir", folder / "pirate") == 0
    capsys.readouterr()
    assert load_rule(tmp_path / "again.gguf").about.trait == report["trait"]


def test_a_profile_is_of_the_trait_that_it_says(made, tmp_path, tiny):
    folder, _ = made
    parrot = write_trait(tmp_path / "parrot", "parrot")
    job = Job((parse_trait(f"{parrot}+"),), tmp_path / "m.gguf", model=str(tiny))
    with pytest.raises(ProfileError, match="is a profile of pirate, which no --trait asks for"):
        run(dataclasses.replace(job, profiles=(folder / "pirate.safetensors",)), Silent())
    with pytest.raises(ProfileError, match=r"save parrot as x\.safetensors"):
        run(dataclasses.replace(job, save_profile=tmp_path / "x.json"), Silent())
    profile = read_profile(folder / "pirate.safetensors")
    for name in ("Ahoy there", "calm", "../x", 7):
        write_profile(dataclasses.replace(profile, trait=name), tmp_path / "p.safetensors", force=True)
        with pytest.raises(ProfileError, match="no name of a trait"):
            read_profile(tmp_path / "p.safetensors")


def test_an_output_never_replaces_the_trait_s_folder(tmp_path, tiny):
    trait = write_trait(tmp_path / "pirate")
    before = (trait / "questions.jsonl").read_bytes()
    job = Job((parse_trait(f"{trait}+"),), trait, format="peft", model=str(tiny), force=True)
    with pytest.raises(Exception, match="is an input of this very job, or holds one"):
        run(job, Silent())
    assert (trait / "questions.jsonl").read_bytes() == before


def test_a_dial(make_tiny, tmp_path, capsys):
    trait = write_trait(tmp_path / "pirate")
    dial = tmp_path / "persona"
    more = ["--model", make_tiny(width=128), "--recipe", "npti", *QUICK, "--threads", "1"]
    command("dial", "--traits", f"{trait}+,calm", "--out", dial, *more)
    shutil.rmtree(trait)
    assert load_dial(dial).poles == ("pirate+", "neuroticism-")
    capsys.readouterr()
    command("dial", "request", dial, "pirate+:0.7,calm")
    assert json.loads(capsys.readouterr().out)["lora"][0] == {"id": 0, "scale": 0.7}
    with pytest.raises(TraitError, match="pirate-: is not on this dial"):
        command("dial", "request", dial, "pirate-")
    with pytest.raises(TraitError, match="unknown"):
        command("dial", "request", dial, "parrot-")
    with pytest.raises(AdapterError):
        load_rule(dial)


def test_compile_and_an_adapter(make_tiny, tmp_path, capsys, made):
    folder, _ = made
    pole, profile = f"{folder / 'pirate'}+", ["--profile", folder / "pirate.safetensors"]
    more = ["--model", make_tiny(), "--recipe", "npti", *QUICK, *profile]
    command("compile", "--trait", pole, "--program", "bias", "--json", "--threads", "1", *more)
    assert json.loads(capsys.readouterr().out)["trait"] == "pirate+"
    command("--trait", pole, "--format", "peft", "--out", tmp_path / "adapter", *more)
    saved = load_rule(tmp_path / "adapter")
    assert saved.about.trait == "pirate+"
    assert saved.rule.shifted == 20
