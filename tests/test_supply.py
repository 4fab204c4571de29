"""What is installed, and what we hand on: pins with hashes, licences, and a wheel that is built the same way twice."""

import ast
import configparser
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.parser import Parser
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

import pytest
from jobs import main_job
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from npti_export.version import __version__

ROOT = Path(__file__).parents[1]
OPEN = {
    "0BSD", "Apache-2.0", "BSD", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0", "CNRI-Python", "ISC", "MIT",
    "MIT-CMU", "MPL-2.0", "PSF-2.0", "Public Domain", "Zlib", "Apache-2.0 WITH LLVM-exception",
}  # fmt: skip


@pytest.fixture(scope="module")
def licences():
    spec = importlib.util.spec_from_file_location("make_licences", ROOT / "docs" / "make_licences.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def lock():
    """Name to version and hashes."""
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    entries = re.split(r"\n(?=[A-Za-z0-9])", "\n" + text)[1:]
    found = {}
    for entry in entries:
        requirement = Requirement(entry.partition("\\")[0].strip())
        (pin,) = requirement.specifier
        assert pin.operator == "=="
        found.setdefault(canonicalize_name(requirement.name), []).append(
            (pin.version, re.findall(r"--hash=sha256:([0-9a-f]{64})\b", entry))
        )
    return found


def pins():
    """What constraints.txt pins for the Pythons that the lock file is for, 3.11 and newer."""
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"python_version": "3.12"}):
                (pin,) = requirement.specifier
                yield canonicalize_name(requirement.name), pin.version


def test_every_pin_is_locked_with_its_hashes(lock):
    assert all(hashes for entries in lock.values() for _, hashes in entries)
    for name, version in pins():
        assert version in [found for found, _ in lock[name]], name
    assert len(lock) > 100


def test_what_we_depend_on_is_pinned():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [one for name, extra in project["optional-dependencies"].items() if name != "harness" for one in extra]
    pinned = dict(pins())
    for text in [*project["dependencies"], *extras]:
        requirement = Requirement(text)
        if requirement.name == "npti-export" or requirement.marker is not None:
            continue
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), text
    (jinja,) = (Requirement(one) for one in project["dependencies"] if one.startswith("jinja2"))
    assert not jinja.specifier.contains(Version("3.1.5"))  # its sandbox has known ways out


def test_licences_are_open_and_listed(licences):
    text = (ROOT / "docs" / "licences.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^ |]+) ([^|]+) \| ([^|]+) \| [^|]+ \|$", text, re.MULTILINE)
    listed = {name: (version, licence) for name, version, licence in rows if name != "package"}
    pinned = licences.pinned()
    assert listed.keys() == pinned.keys(), "run docs/make_licences.py"
    for name, (version, licence) in listed.items():
        assert version.split(" or ") == sorted(one.removeprefix("==") for one in pinned[name]), name
        for one in re.split(r" AND | OR ", licence):
            assert one.strip("()") in OPEN, (name, licence)
        try:
            installed = distribution(name).version
        except PackageNotFoundError:
            continue
        if installed.partition("+")[0] in version:
            assert licence == licences.stated(name), f"{name}: run docs/make_licences.py"


def build(source, out, umask, epoch=None):
    """Wheel and sdist of a copy of the source, built offline."""
    pytest.importorskip("hatchling", reason="the build backend is not installed (extra dev)")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(out), "-t", "sdist", "-t", "wheel"]
    environment = {key: value for key, value in os.environ.items() if key != "SOURCE_DATE_EPOCH"}
    if epoch is not None:
        environment["SOURCE_DATE_EPOCH"] = epoch
    before = os.umask(umask)
    try:
        done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
    finally:
        os.umask(before)
    assert done.returncode == 0, done.stderr
    return {path.name: path for path in out.iterdir()}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The same files in two folders with other modes and dates."""
    if subprocess.run(["git", "rev-parse"], cwd=ROOT, capture_output=True).returncode:
        pytest.skip("not a checkout: there is nothing to say which files belong to it")
    tracked = subprocess.run(
        ["git", "ls-files", "-z", "-c", "-o", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True
    )
    names = [one for one in tracked.stdout.decode().split("\0") if one and (ROOT / one).is_file()]
    found = []
    for turn in range(2):
        folder = tmp_path_factory.mktemp(f"turn{turn}") / f"source{turn}"
        for name in names if turn == 0 else reversed(names):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes((ROOT / name).read_bytes())
            path.chmod(0o644 if turn == 0 else 0o600)
            os.utime(path, (10**9 + turn * 10**8, 10**9 + turn * 10**8))
        found.append(folder)
    return found


@pytest.fixture(scope="module")
def built(sources):
    """Built from both at other umasks, where nothing says what date it is."""
    return [build(one, one.parent / "dist", umask) for one, umask in zip(sources, (0o022, 0o077), strict=True)]


def of_kind(files, suffix):
    (path,) = (path for name, path in files.items() if name.endswith(suffix))
    return path


def test_wheel_and_sdist_are_built_the_same_way_twice(built):
    first, second = built
    assert sorted(first) == sorted(second) == [
        f"npti_export-{__version__}-py3-none-any.whl", f"npti_export-{__version__}.tar.gz"
    ]  # fmt: skip
    for name in first:
        digests = {hashlib.sha256(one[name].read_bytes()).hexdigest() for one in built}
        assert len(digests) == 1, name
    with zipfile.ZipFile(of_kind(first, ".whl")) as wheel:  # not the day of the build
        assert {one.date_time for one in wheel.infolist()} == {(2020, 2, 2, 0, 0, 0)}


def test_a_date_that_is_asked_for_changes_nothing_else(built, sources):
    """``SOURCE_DATE_EPOCH`` of whoever builds it."""
    dated = build(sources[0], sources[0].parent / "dated", 0o022, "1700000000")
    names = []
    for files in (built[0], dated):
        with zipfile.ZipFile(of_kind(files, ".whl")) as wheel:
            names.append([(one.filename, one.external_attr, wheel.read(one)) for one in wheel.infolist()])
            dates = {one.date_time[:3] for one in wheel.infolist()}
        with tarfile.open(of_kind(files, ".tar.gz")) as sdist:
            names.append([(one.name, one.mode, one.size) for one in sdist.getmembers()])
    assert dates == {(2023, 11, 14)}
    assert names[:2] == names[2:]


def test_what_the_wheel_holds(built):
    first = built[0]
    with zipfile.ZipFile(of_kind(first, ".whl")) as wheel:
        names = set(wheel.namelist())
        metadata = wheel.read(f"npti_export-{__version__}.dist-info/METADATA").decode()
    held = {path.relative_to(ROOT).as_posix() for path in (ROOT / "npti_export").rglob("*") if path.is_file()}
    assert {one for one in held if "__pycache__" not in one} <= names
    assert {f"npti_export/recipes/{path.name}" for path in (ROOT / "recipes").glob("*.toml")} <= names
    assert f"npti_export-{__version__}.dist-info/licenses/LICENSE" in names
    assert all(one.startswith(("npti_export/", f"npti_export-{__version__}.dist-info/")) for one in names)
    assert "License-Expression: Apache-2.0" in metadata
    with tarfile.open(of_kind(first, ".tar.gz")) as sdist:
        inside = {one.partition("/")[2] for one in sdist.getnames()}
    assert {"constraints.txt", "requirements.lock", "docs/licences.md", "tests/test_supply.py", "LICENSE"} <= inside


def requirements(wheel):
    """Distributions that a wheel asks for, by extra; those that it always asks for under ``""``."""
    with zipfile.ZipFile(wheel) as archive:
        metadata = Parser().parsestr(archive.read(f"npti_export-{__version__}.dist-info/METADATA").decode())
    found = {extra: set() for extra in ("", *metadata.get_all("Provides-Extra"))}
    for requirement in map(Requirement, metadata.get_all("Requires-Dist")):
        marker = str(requirement.marker or "")
        extra = re.search(r"extra == ['\"]([a-z]+)['\"]", marker)
        found[extra[1] if extra else ""].add(canonicalize_name(requirement.name))
    return found


def imports(path):
    """What a file imports that is neither Python's nor ours, and whether that is when it is itself imported."""

    def visit(node, at_once):
        for child in ast.iter_child_nodes(node):
            names = []
            if isinstance(child, ast.Import):
                names = [alias.name for alias in child.names]
            elif isinstance(child, ast.ImportFrom) and child.level == 0:
                names = [child.module]
            for name in {one.partition(".")[0] for one in names}:
                if name not in sys.stdlib_module_names and name != "npti_export":
                    yield name, at_once
            function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))
            for_types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            yield from visit(child, at_once and not function and not for_types)

    return set(visit(ast.parse(path.read_text(encoding="utf-8")), True))


def undeclared(required):
    """Imports that would fail where nothing but the wheel's requirements is installed, a line each."""
    distributions = {"tomli": ["tomli"], "lm_eval": ["lm-eval"], **packages_distributions()}  # not on every machine
    optional = {extra: required[extra] - required[""] for extra in ("bench", "ray", "harness")}
    for path in sorted((ROOT / "npti_export").rglob("*.py")):
        for name, at_once in sorted(imports(path)):
            owners = {canonicalize_name(one) for one in distributions.get(name, [])}
            if owners & required[""]:
                continue
            extras = [extra for extra, names in optional.items() if owners & names]
            if not extras:
                yield f"{path.name}: {name} is of no distribution that the wheel asks for"
            elif at_once or f"npti-export[{extras[0]}]" not in path.read_text(encoding="utf-8"):
                yield f"{path.name}: {name} is of the extra {extras[0]}, whose absence is not said"


def test_what_is_imported_is_asked_for(built):
    required = requirements(of_kind(built[0], ".whl"))
    assert len(required[""]) > 20
    assert list(undeclared(required)) == []
    assert any("yaml is of no" in one for one in undeclared({**required, "": required[""] - {"pyyaml"}}))
    assert any("openai is of no" in one for one in undeclared({**required, "bench": set()}))
    moved = {**required, "": required[""] - {"click"}, "bench": required["bench"] | {"click"}}
    assert any("click is of the extra bench" in one for one in undeclared(moved))


def test_the_build_backend_is_the_pinned_one():
    import tomllib

    (needed,) = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]["requires"]
    assert needed == f"hatchling=={dict(pins())['hatchling']}"


def script_of(archive, folder, python):
    """The console script of a wheel's entry point, as pip makes it."""
    entries = configparser.ConfigParser()
    entries.read_string(archive.read(f"npti_export-{__version__}.dist-info/entry_points.txt").decode())
    ((name, target),) = entries["console_scripts"].items()
    module, _, function = target.partition(":")
    path = folder / f"{name}.py"
    path.write_text(f"import sys\nfrom {module} import {function}\nsys.exit({function}())\n")
    return [python, path]


def test_the_wheel_works_outside_the_source_tree(built, tiny, tmp_path):
    """In an environment of its own, which borrows what we depend on, with nothing of this folder in sight."""
    wheel = of_kind(built[0], ".whl")
    venv.create(tmp_path / "env", symlinks=os.name != "nt")
    python = tmp_path / "env" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip())
    with zipfile.ZipFile(wheel) as archive:  # what pip does, which would need the network
        archive.extractall(site)
        script = script_of(archive, python.parent, python)
    ours = {str(ROOT), str(ROOT / "tests")}
    borrowed = [one for one in sys.path if one.endswith(("site-packages", "dist-packages")) and one not in ours]
    (site / "borrowed.pth").write_text("".join(f"{one}\n" for one in borrowed))
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "NPTI"))}
    environment = kept | {"OMP_NUM_THREADS": "1", "NPTI_CACHE": str(tmp_path / "cache")}
    away = tmp_path / "away"
    away.mkdir()

    def command(*arguments):
        return subprocess.run(
            [*script, *map(str, arguments)], cwd=away, env=environment, capture_output=True, text=True
        )

    where = "import npti_export; print(npti_export.__file__)"
    found = subprocess.run([python, "-c", where], cwd=away, env=environment, capture_output=True, text=True)
    assert Path(found.stdout.strip()).is_relative_to(site), found.stderr
    done = command("--version")
    assert (done.returncode, __version__ in done.stdout) == (0, True), done.stderr
    done = command("--help")
    assert done.returncode == 0, done.stderr
    assert "fixed personality" in done.stdout
    assert command("traits").returncode == 0
    assert command("bench", "stats", "openness").returncode == 0
    done = command(*main_job(tiny, "calm.gguf"))
    assert done.returncode == 0, done.stderr
    done = command("inspect", "calm.gguf", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["npti.trait"] == "extraversion+"
