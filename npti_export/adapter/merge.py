"""``merge_and_unload``: the stock model, wider, that holds the rule in its weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from npti_export.adapter.layer import NptiLayer
from npti_export.adapter.target import Target
from npti_export.attached import AttachedActivation
from npti_export.compiler.exact import compile_exact
from npti_export.errors import AdapterError
from npti_export.export.as_llama import check_expressible
from npti_export.export.checkpoint import model_weights, plan_checkpoint
from npti_export.rule import SteeringRule

_CLAMP_UNITS = 4  # as in the recipes


def merged_model(target: Target, adapters: list[str], unload: Callable[[], Any]) -> nn.Module:
    """See :meth:`npti_export.adapter.model.NptiModel.merge_and_unload`; ``unload`` gives the model without wrappers."""
    from transformers import LlamaForCausalLM

    check_expressible(target.model.config, "merge_and_unload")
    _refuse_others(target)
    if len(set(getattr(target.model, "hf_device_map", {}).values())) > 1:
        raise AdapterError(
            "merge_and_unload: the model is spread over several devices; load it on one, or use --format checkpoint"
        )
    program = compile_exact(rule_of(target, adapters), _CLAMP_UNITS)
    base = unload()
    plan = plan_checkpoint(base.config, model_weights(base), program)
    weights = {tensor.name: tensor.make().to(base.device) for shard in plan.shards for tensor in shard}
    if plan.config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    plan.config._attn_implementation = base.config._attn_implementation
    with torch.device("meta"):
        merged = LlamaForCausalLM(plan.config)
    merged.load_state_dict(weights, strict=True, assign=True)
    return _finished(merged, base)


def _finished(merged: Any, base: Any) -> nn.Module:
    """What a model has beside its weights: buffers that are computed, generation settings, its mode."""
    merged.tie_weights()
    with torch.device(base.device):
        merged.model.rotary_emb = type(merged.model.rotary_emb)(merged.config)
    merged.generation_config = base.generation_config
    done: nn.Module = merged.train(base.training).requires_grad_(False)
    return done


def rule_of(target: Target, adapters: list[str]) -> SteeringRule:
    """What adapters in a model add up to, their strengths included.

    Raises:
        AdapterError: one of them steers the response only, or none changes anything.
    """
    shifts, clamps, constants = [], [], []
    for module in target.activations():
        shares = [share for share in module.shares(adapters) if share.strength] if isinstance(module, NptiLayer) else []
        if any(share.where != "all" for share in shares):
            raise AdapterError("an adapter that steers the response only cannot be merged: weights steer everywhere")
        shift, constant, clamp = np.zeros(target.width), np.zeros(target.width), np.zeros(target.width, np.bool_)
        for share in shares:
            shift += share.shift.detach().double().cpu().numpy() * share.strength
            clamp |= share.clamp.cpu().numpy() != 0
            if share.constant is not None:
                constant += share.constant.detach().double().cpu().numpy() * share.strength
        shifts.append(shift)
        clamps.append(clamp)
        constants.append(constant)
    rule = SteeringRule(np.stack(shifts).astype(np.float32), np.stack(clamps), np.stack(constants).astype(np.float32))
    if rule.changed == 0:
        raise AdapterError(f"nothing to merge: the adapters {', '.join(adapters) or '(none active)'} change no neuron")
    return rule


def _refuse_others(target: Target) -> None:
    if any(isinstance(module, AttachedActivation) for module in target.activations()):
        raise AdapterError("merge_and_unload: a rule is attached to this model beside its adapters; detach it first")
    for name, module in target.model.named_modules():
        if isinstance(module, BaseTunerLayer) and not isinstance(module, NptiLayer):
            raise AdapterError(
                f"{name}: holds an adapter of another kind ({type(module).__name__}); merge or delete that one first"
            )
