"""Coverage-guided fuzzing of one parser, by atheris (extra ``fuzz``).

    python tests/fuzz_coverage.py TARGET -max_total_time=60 [what else libFuzzer takes]
    python tests/fuzz_coverage.py --list

The targets are those of ``fuzz_targets``; intact files are the corpus to start from, and mutations are libFuzzer's
own and ours in turn. An input that raises anything but an error of ours, takes more than 10 s of processor time (100 by
the clock) or 2 GB ends the run and is kept in the working directory; ``python tests/fuzz_coverage.py TARGET FILE``
tries it again.
"""

import os
import random
import sys
import tempfile
import time
import warnings
from contextlib import suppress
from pathlib import Path

SECONDS, PATIENCE, MEGABYTES = 10, 100, 2048
LONGEST = 1 << 16  # bytes of an input


def run(name, options):
    """Fuzz a target; does not return."""
    import atheris

    with atheris.instrument_imports(include=["npti_export"], enable_loader_override=False):
        import fuzz_bytes
        import fuzz_run
        from fuzz_targets import TARGETS
    warnings.simplefilter("ignore")
    folder = Path(tempfile.mkdtemp(prefix="npti-fuzz-"))
    path, seeds = fuzz_run.prepared(name, folder)
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, data in enumerate(seeds):
        (corpus / str(number)).write_bytes(data)
    target = TARGETS[name]

    def one(data):
        fuzz_run._fresh(path, data)
        started = time.process_time()
        with suppress(*target.allowed):
            target.read(path)
        took = time.process_time() - started
        assert took < SECONDS, f"took {took:.1f} s"

    def mutate(data, longest, seed):
        rng = random.Random(seed)
        if rng.random() < 0.5:
            return atheris.Mutate(data, longest)
        try:
            return fuzz_bytes.KINDS[target.kind](rng, bytes(data), seeds)[:longest]
        except Exception:  # of a mutator that wants a file that is intact so far
            return fuzz_bytes.bytes_(rng, bytes(data) or b"0", seeds)[:longest]

    limits = [f"-timeout={PATIENCE}", f"-rss_limit_mb={MEGABYTES}", f"-max_len={max(LONGEST, *map(len, seeds))}"]
    places = [] if any(Path(one).is_file() for one in options) else [str(corpus)]
    atheris.Setup([sys.argv[0], *limits, *options, *places], one, custom_mutator=mutate)
    atheris.Fuzz()


def main():
    arguments = sys.argv[1:]
    try:
        import atheris  # noqa: F401
    except ImportError:
        print("atheris is not installed: pip install -c constraints.txt 'npti-export[fuzz]'", file=sys.stderr)
        sys.exit(2)
    if arguments[:1] in ([], ["--list"], ["--help"]):
        from fuzz_targets import TARGETS

        print(__doc__ if arguments[:1] != ["--list"] else "\n".join(TARGETS))
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    run(arguments[0], arguments[1:])


if __name__ == "__main__":
    main()
