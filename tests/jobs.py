"""Running the command line as a process of its own."""

import subprocess
import sys

COMMAND = [sys.executable, "-c", "from npti_export.cli import main; main()"]
# Small enough for a tiny random model, and no profile of a pole may come out empty.
QUICK = ["--questions", "6", "--max-new-tokens", "8", "--batch-size", "4"]
QUICK += ["--set", "select.at_least=20", "--set", "select.at_most=20", "--set", "verify.prompts=2"]
QUICK += ["--set", "verify.answer_tokens=8"]


def npti(*arguments, environment, cwd, **options):
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, env=environment, cwd=cwd, **options
    )


def main_job(tiny, out, *more):
    return ["--trait", "extraversion+", "--model", tiny, "--recipe", "npti", *QUICK, "--out", out, *more]
