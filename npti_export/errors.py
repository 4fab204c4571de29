"""Every error that the library raises on purpose.

The command line turns each into one line on stderr and the class's ``exit_code``; nothing else
converts them. A message names the file or field at fault and how to mend it.
"""


def shortened(value: object, longest: int = 60) -> str:
    """How a value of unknown length is shown in a message: its repr, cut to ``longest`` characters."""
    # The slice keeps a string of megabytes from being escaped in full, as a character may become ten.
    text = repr(value[: longest + 1] if isinstance(value, str) else value)
    return text if len(text) <= longest else text[:longest] + "…"


class NptiError(Exception):
    """Base of all errors raised on purpose; one sentence, fit to be shown to a user."""

    exit_code = 2


class TraitError(NptiError):
    """A trait that does not parse or is not known."""


class RecipeError(NptiError):
    """A recipe with an unknown key, a bad value or no such name."""


class BenchError(NptiError):
    """Personas or questions that are missing, empty or malformed."""


class ModelError(NptiError):
    """A model that is missing, damaged or cannot be handled."""


class ArchitectureError(ModelError):
    """A model family that the requested output does not support."""


class GGUFError(ModelError):
    """A GGUF file that is truncated, malformed or of an unsupported version."""


class ProfileError(NptiError):
    """A neuron profile that is damaged, selects nothing, or belongs to another model."""


class DamagedError(NptiError):
    """A file that was kept for a later run and is not what was written; it is made again."""


class AdapterError(NptiError):
    """An adapter or steered file whose rule is missing, damaged or of another model, or cannot do what is asked."""


class VectorError(NptiError):
    """A control vector or constant that is damaged, changes nothing, or belongs to another model."""


class CompileError(NptiError):
    """A budget or fidelity that no program meets."""


class EvaluationError(NptiError):
    """An evaluation, a judge, an inventory or a task that is damaged, or that cannot be done with this model."""


class ClusterError(NptiError):
    """A Ray that is missing, a cluster that is not there or too small, or workers that died time and again."""


class HubError(NptiError):
    """A repository or token that the Hub does not take, or an upload that broke off."""


class OutputError(NptiError):
    """An output path that exists already or cannot be written."""


class DiskFullError(OutputError):
    """Not enough room for the output."""

    exit_code = 4


class FidelityError(NptiError):
    """The written file does not do what the rule says; it is kept aside, not delivered."""

    exit_code = 3
