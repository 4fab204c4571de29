"""Pass 1: one form for equal rules, with nothing in it that does nothing."""

from __future__ import annotations

import numpy as np

from npti_export.rule import SteeringRule


def canonical(rule: SteeringRule) -> SteeringRule:
    """The same rule without negative zeros, shifts that float32 holds but silu cannot, and constants of nothing.

    Several traits were merged when the rule was composed: shifts and constants added, clamps united.
    """
    smallest = np.finfo(np.float32).tiny  # a gate bias below it would be flushed to 0 by some kernels
    shift = np.where(np.abs(rule.shift) < smallest, np.float32(0), rule.shift)
    constant = rule.constant if rule.constants else None
    return SteeringRule(shift, rule.clamp, constant)
