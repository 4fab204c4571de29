"""An imported folder stands for the shipped bench in every command that identifies."""

import json

import pytest
from jobs import QUICK
from own_trait import command, write_jsonl

from npti_export.bench import load_bench
from npti_export.bench.imports import How, import_source
from npti_export.bench.published_layout import export_layout
from npti_export.dial.index import load_dial
from npti_export.profile import read_profile


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imported")
    export_layout([load_bench("extraversion")], folder / "npti", force=False)
    asked = [{"question": f"The {thing} is gone. What now?"} for thing in ("key", "cat", "bus", "milk", "moon", "job")]
    write_jsonl(folder / "npti" / "search" / "Extraversion.json", asked)
    import_source(folder / "npti", folder / "bench", How(), skip_bad=False, force=False)
    return folder / "bench"


def test_identify_and_the_main_job(imported, make_tiny, tmp_path):
    more = ["--bench", imported, "--model", make_tiny(), "--recipe", "npti", *QUICK, "--threads", "1"]
    command("identify", "--trait", "extraversion", "--out", tmp_path / "p.safetensors", *more)
    bench = load_bench("extraversion", imported / "extraversion")
    assert read_profile(tmp_path / "p.safetensors").origin["bench"] == bench.digest
    assert bench.digest != load_bench("extraversion").digest
    out = ["--out", tmp_path / "m.gguf", "--report", tmp_path / "r.json"]
    command("--trait", "extraversion+", *more, *out)
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["profiles"]["extraversion"]["bench"] == bench.digest
    assert report["sample"]["question"] in {one.text for one in bench.test()}
    assert report["sample"]["base"] != report["sample"]["steered"]


def test_compile_and_dial(imported, make_tiny, tmp_path, capsys):
    more = ["--bench", imported, "--recipe", "npti", *QUICK, "--threads", "1"]
    command("compile", "--trait", "extraversion-", "--program", "bias", "--json", "--model", make_tiny(), *more)
    assert json.loads(capsys.readouterr().out)["trait"] == "extraversion-"
    command("dial", "--traits", "extraversion+", "--out", tmp_path / "d", "--model", make_tiny(width=128), *more)
    assert load_dial(tmp_path / "d").poles == ("extraversion+",)
