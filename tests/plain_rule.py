"""The induction rule inside a transformers MLP, written out: the reference for adapters and attachments.

It replaces the forward pass of each MLP, neuron by neuron for the clamps, and shares no code with the package.
"""

from contextlib import contextmanager

import torch


def plain_forward(mlp, x, shift, clamp, rows=None, constant=None):
    """One gated MLP with the rule; ``rows`` [batch, length] bool limits it to some positions."""
    if hasattr(mlp, "gate_up_proj"):
        gate, up = mlp.gate_up_proj(x).chunk(2, dim=-1)
    else:
        gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    function = mlp.activation_fn if hasattr(mlp, "activation_fn") else mlp.act_fn
    function = getattr(function, "base_layer", function)
    a = function(gate)
    steered = a.clone()
    for neuron in clamp.nonzero()[0]:
        steered[..., neuron] = torch.minimum(steered[..., neuron], torch.zeros((), dtype=a.dtype))
    steered = (steered.to(torch.float32) + torch.from_numpy(shift)).to(a.dtype)
    if rows is not None:
        steered = torch.where(rows[..., None], steered, a)
    inner = steered * up
    if constant is not None:
        moved = (inner.to(torch.float32) + torch.from_numpy(constant)).to(inner.dtype)
        inner = moved if rows is None else torch.where(rows[..., None], moved, inner)
    return mlp.down_proj(inner)


@contextmanager
def plain_rule(model, rule, rows=None):
    """Within the block ``model`` (a causal LM) obeys the rule."""
    mlps = [layer.mlp for layer in model.model.layers]
    for index, mlp in enumerate(mlps):
        added = None if rule.constant is None else rule.constant[index]
        mlp.forward = lambda x, mlp=mlp, i=index, c=added: plain_forward(mlp, x, rule.shift[i], rule.clamp[i], rows, c)
    try:
        yield
    finally:
        for mlp in mlps:
            del mlp.forward


@torch.inference_mode()
def logits(model, ids, **more):
    return model(input_ids=ids, **more).logits
