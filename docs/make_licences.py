"""Write docs/licences.md: the licences of everything that constraints.txt pins, as the installed packages state them.

    python docs/make_licences.py

Packages that are not installed here keep the line that they have.
"""

import re
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "licences.md"
HEAD = """\
# Licences

npti-export is Apache-2.0 ([LICENSE](../LICENSE)). Its wheel holds no code of others. What it installs, in the versions
of [constraints.txt](../constraints.txt), under the licences that these packages state themselves; made by
`docs/make_licences.py`, and compared with the installed packages by `tests/test_supply.py`.

Files that npti-export writes hold the base model's weights and our numbers, none of this code: what applies to them is
the base model's licence. Where it is known, model cards and `npti-export inspect` say it, and a steered GGUF keeps its
base's `general.license`.

| package | licence | needed by |
|---|---|---|
"""
EXTRAS = ("bench", "convert", "dev", "fuzz", "ray")
# What some packages write in place of an SPDX expression.
SPDX = {
    "MIT License": "MIT", "Apache Software License": "Apache-2.0", "BSD License": "BSD", "Apache": "Apache-2.0",
    "Apache 2.0": "Apache-2.0", "Apache License 2.0": "Apache-2.0", "Apache 2.0 License": "Apache-2.0",
    "Apache2": "Apache-2.0", "Apache License, Version 2.0": "Apache-2.0", "BSD 3-Clause": "BSD-3-Clause",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0", "Python Software Foundation License": "PSF-2.0",
    "PSF": "PSF-2.0", "ISC License (ISCL)": "ISC", "The MIT License (MIT)": "MIT",
    "3-Clause BSD License": "BSD-3-Clause",
}  # fmt: skip


# Packages that state none, or put a whole text in its place; read in their licence files.
READ = {
    "atheris": "Apache-2.0", "contourpy": "BSD-3-Clause", "cycler": "BSD-3-Clause", "jinja2": "BSD-3-Clause",
    "kiwisolver": "BSD-3-Clause", "mpmath": "BSD-3-Clause", "scipy": "BSD-3-Clause", "sentencepiece": "Apache-2.0",
    "sympy": "BSD-3-Clause",
}  # fmt: skip


def stated(name):
    """The licence that an installed package states; None if it is not installed."""
    if name in READ:
        return READ[name]
    try:
        about = distribution(name).metadata
    except PackageNotFoundError:
        return None
    if about.get("License-Expression"):
        return about["License-Expression"]
    classified = [
        one.rpartition(" :: ")[2] for one in about.get_all("Classifier") or [] if one.startswith("License ::")
    ]
    found = [SPDX.get(one, one) for one in classified if one != "OSI Approved"]
    if found and found != ["BSD"]:
        return " AND ".join(sorted(set(found)))
    line = (about.get("License") or "").strip().split("\n")[0].strip()
    return SPDX.get(line, line if 0 < len(line) < 60 else None) or " AND ".join(found) or "not stated"


def pinned():
    """Names in constraints.txt, with the versions that are pinned."""
    pins = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            pins.setdefault(canonicalize_name(requirement.name), []).append(str(requirement.specifier))
    return pins


def closure(extras):
    """Names of what npti-export needs with some extras, as far as it is installed."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = list(project["dependencies"])
    for extra in extras:
        wanted += [one for one in project["optional-dependencies"][extra] if not one.startswith("npti-export")]
    found, todo = set(), [(Requirement(one), "") for one in wanted]
    while todo:
        requirement, extra = todo.pop()
        name = canonicalize_name(requirement.name)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        if name in found and not requirement.extras:
            continue
        found.add(name)
        try:
            below = distribution(name).requires or []
        except PackageNotFoundError:
            continue
        for one in ("", *requirement.extras):
            todo += [(Requirement(text), one) for text in below]
    return found


def rows():
    """Name, version, licence, and what needs it, of each pinned package."""
    always, parts = closure(()), {extra: closure((extra,)) for extra in EXTRAS}
    text = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else ""
    known = dict(re.findall(r"^\| ([^ ]+) [^|]*\| ([^|]+) \|", text, re.MULTILINE))
    for name, versions in sorted(pinned().items()):
        by = "always" if name in always else ", ".join(one for one in EXTRAS if name in parts[one]) or "some platforms"
        version = " or ".join(sorted({one.removeprefix("==") for one in versions}))
        yield name, version, stated(name) or known.get(name, "not stated"), by


def page():
    """The page's text."""
    return HEAD + "".join(f"| {name} {version} | {licence} | {by} |\n" for name, version, licence, by in rows())


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
