"""Every parser of ours in one table: what it is called, an intact file for it, and what is done with a damaged one.

A target reads a file (or a text) of unknown origin. It may refuse it by an error of ours; whatever it accepts has to be
whole, which the target itself asserts. ``fuzz_run.py`` mutates the files, in ``fuzz_coverage.py`` atheris does.
``test_fuzz_reach.py`` says which functions of the package read anything, and that a target reaches each.
"""

from fuzz_targets import benches, evaluations, ggufs, kept, loaded, models, recipes, rules, spoken
from fuzz_targets.target import Target

_GROUPS = (evaluations, recipes, benches, rules, kept, models, loaded, ggufs, spoken)
TARGETS: dict[str, Target] = {name: target for group in _GROUPS for name, target in group.TARGETS.items()}
assert len(TARGETS) == sum(len(group.TARGETS) for group in _GROUPS), "two targets of one name"
