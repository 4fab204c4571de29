"""Makes the tuner known to PEFT; runs when ``peft`` is imported after ``npti_export``, or at once if it was before."""

from __future__ import annotations

import warnings
from types import ModuleType
from typing import Any

from npti_export.rule_io import PEFT_TYPE


def register(peft: ModuleType) -> None:
    """Add the type ``NPTI`` to PEFT's tables.

    An older PEFT without what the tuner needs is left alone with a warning: an import must not fail for it.
    """
    from peft.tuners.tuners_utils import BaseTuner

    if not hasattr(BaseTuner, "_remap_adapter_state_dict_for_load"):
        warnings.warn(
            f"peft {peft.__version__} is too old for npti adapters, they cannot be loaded: pip install 'peft>=0.21'",
            stacklevel=2,
        )
        return
    from peft.utils import PeftType, register_peft_method

    if PEFT_TYPE in PeftType.__members__:
        return
    _add_member(PeftType, PEFT_TYPE)

    from npti_export.adapter.config import NptiConfig
    from npti_export.adapter.model import NptiModel

    register_peft_method(name=PEFT_TYPE.lower(), config_cls=NptiConfig, model_cls=NptiModel, prefix=NptiModel.prefix)


def _add_member(enum: Any, name: str) -> None:
    """PEFT asks for a member of its enumeration and offers no way to add one; this is what ``Enum`` itself does."""
    member = str.__new__(enum, name)
    member._name_, member._value_ = name, name
    enum._member_map_[name] = member
    enum._value2member_map_[name] = member
    enum._member_names_.append(name)
    if name not in vars(enum):  # from Python 3.12 on, members are class attributes
        type.__setattr__(enum, name, member)
