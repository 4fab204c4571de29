"""The library behind the command: one saved profile, three strengths, three files.

    npti-export identify --trait neuroticism --out neuroticism.safetensors
    python examples/compose.py neuroticism.safetensors

writes calm-0.5.gguf, calm-1.gguf and calm-1.5.gguf from the embedded default model.
"""

import sys
from pathlib import Path

from npti_export.compiler.exact import compile_exact
from npti_export.export.gguf import check_base, plan_bake, write_bake
from npti_export.files import atomic_output, sha256_file
from npti_export.gguf.reader import read_gguf
from npti_export.models import resolve_model
from npti_export.profile_io import load_profile
from npti_export.recipe import select_recipe
from npti_export.rule import build_rule
from npti_export.traits import parse_trait


def main(profile_path, folder="."):
    source = resolve_model(None)
    recipe = select_recipe(None, source.fingerprint, neurons=True)  # the one that steers what a profile found
    profile = load_profile(Path(profile_path), source.shape, "neuroticism")
    profile.check_model(source)
    base = read_gguf(source.path)
    check_base(base)
    digest = sha256_file(source.path)
    for strength in ("0.5", "1", "1.5"):
        spec = parse_trait(f"calm:{strength}")
        rule = build_rule(profile, spec, recipe)
        program = compile_exact(rule, recipe.compile.basis_units)
        plan = plan_bake(base, program, {"trait": str(spec), "gamma": recipe.rule.gamma}, digest)
        with atomic_output(Path(folder) / f"calm-{strength}.gguf") as temporary:
            write_bake(plan, temporary)
        print(f"calm-{strength}.gguf: {rule.shifted} shifts, {rule.clamped} clamps, {plan.extra} extra neurons a layer")


if __name__ == "__main__":
    main(*sys.argv[1:])
