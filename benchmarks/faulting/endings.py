"""Commands that write something: files, sets of files, folders. Each is broken in the same ways."""

from collections.abc import Callable
from dataclasses import dataclass

from jobs import QUICK, main_job

from npti_export.files import sha256_file

NAME = "model.gguf"
JOB = ["--threads", "1", "--set", "rule.matched=0.5", "--set", "identify.matched_questions=2"]
JOB += ["--set", "compile.calibration_tokens=64"]
NEURONS = [*QUICK, "--threads", "1"]
WEAKER = ("--gamma", "0.5")


@dataclass(frozen=True)
class Ending:
    """A command and what it writes.

    Attributes:
        name: of it.
        outputs: what it writes in its folder: names, or patterns of names; a folder counts with all that is in it.
        command: gives the command line.
        opened_by: of several outputs the one without which the others count as nothing; empty for a folder or file.
        older: more arguments, which make an older output that ``--force`` replaces; none where any file will do.
        together: whether its files belong together, so that old and new ones may not be mixed.
        stays: whether the same output that is there already is no reason to refuse.
    """

    name: str
    outputs: tuple[str, ...]
    command: Callable
    opened_by: str = ""
    older: tuple[str, ...] = WEAKER
    together: bool = True
    stays: bool = False

    def found(self, folder):
        """SHA-256 of each file that it wrote there, by its name."""
        tops = [path for pattern in self.outputs for path in folder.glob(pattern)]
        inside = [path for top in tops for path in (top.rglob("*") if top.is_dir() else [top])]
        found = {path: sha256_file(path) for path in inside if path.is_file() and ".partial" not in str(path)}
        found |= {top: "empty" for top in tops if top.is_dir() and not any(top.iterdir())}
        return {str(path.relative_to(folder)): digest for path, digest in found.items()}


def _gguf(setting):
    return [*main_job(setting.model, NAME), *JOB]


def _adapter(setting):
    return [*main_job(setting.model, "adapter"), *JOB, "--format", "peft"]


def _checkpoint(setting):
    return [*main_job(setting.model, "checkpoint"), *JOB, "--format", "checkpoint"]


def _vector(setting):
    return [*main_job(setting.model, "vector.gguf"), *JOB, "--format", "control-vector"]


def _saved(setting):
    return [*_gguf(setting), "--save-profile", "profile.safetensors"]


def _split(setting):
    return [*main_job(setting.split, NAME), *JOB]


def _quantised(setting):
    return [*_gguf(setting), "--requantize", "Q8_0"]


def _weighed(setting):
    return [*_gguf(setting), "--requantize", "Q4_0", "--imatrix", setting.imatrix]


def _dial(setting):
    poles = ["--traits", "extraversion+,extraversion-", "--model", setting.wide, "--recipe", "npti"]
    return ["dial", *poles, *NEURONS, "--out", "dial"]


def _profiles(setting):
    traits = ["--trait", "extraversion", "--trait", "openness", "--model", setting.model, "--recipe", "npti"]
    return ["identify", *traits, *NEURONS, "--out", "profiles"]


def _baked_vector(setting):
    return ["bake-vector", setting.vector, "--model", setting.model, "--out", NAME, *VERIFY]


def _stripped(setting):
    return ["strip", setting.steered, "--out", NAME]


VERIFY = ["--threads", "1", "--set", "verify.prompts=2", "--set", "verify.answer_tokens=8"]
MAIN = Ending("gguf", (NAME,), _gguf, older=())
ENDINGS = {
    one.name: one
    for one in (
        MAIN,
        Ending("peft", ("adapter",), _adapter),
        Ending("checkpoint", ("checkpoint",), _checkpoint),
        Ending("control vector", ("vector.gguf",), _vector, older=()),
        Ending("saved profile", (NAME, "profile.safetensors"), _saved, NAME, together=False),
        Ending("split", ("model-*-of-*.gguf",), _split, "model-00001-of-00005.gguf"),
        Ending("requantised", (NAME,), _quantised, older=()),
        Ending("weighed", (NAME,), _weighed, older=()),
        Ending("dial", ("dial",), _dial),
        Ending("profiles", ("profiles",), _profiles, "profiles/extraversion.safetensors", ("--seed", "1"), stays=True),
        Ending("baked vector", (NAME,), _baked_vector, older=()),
        Ending("stripped", (NAME,), _stripped, older=()),
    )
}
