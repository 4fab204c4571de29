"""The page that lies in a dial's directory, and what the command says at its end."""

from __future__ import annotations

from typing import Any

from npti_export.dial.index import Adapter, Dial, curl_command, server_command
from npti_export.traits import TraitSpec, parse_recorded

_PAGE = """# A dial of {model}

Personality sliders, set anew by each request, for a stock llama-server. Made by npti-export {version}.
`{base}` is the model with extra neurons that change nothing ({unsteered}); the other
files are LoRA adapters that use them. `npti-export strip {base} --out model.gguf` gives the model back.

```
{server}
```

```
{curl}
```

`npti-export dial request . {mix}` prints the `lora` part for any mix.

- Each pole has a `shift` adapter, whose scale is its strength (0.5, 1, 1.5 …), and mostly a `clamp` adapter, whose
  scale is 1 as soon as the pole is on. Ids are places in `index.json`.
{overlaps}- Send `lora` with every request, `[{{"id": 0, "scale": 0}}]` for none. After one without it, or with an empty
  list, the server goes on from what it cached of steered text, and keeps doing so. Where a client cannot be made to
  send it, start the server with `--no-cache-prompt`.

Measured on held-out questions and the steered answers to them, KL in nats per token; "moved" is the rule against the
unsteered model, "error" the rule against the dial at strength 1.

| pole | neurons shifted | clamped | moved | error | limit |
|---|---|---|---|---|---|
{rows}
"""
_OVERLAPS = """- An `overlap` adapter holds what its poles clamp in common, which would else count twice. When all of
  them are on, its scale is -1 (two poles), 1 (three), -1 (four) …; this dial mixes up to {mixed} poles that overlap.
"""


def dial_page(index: dict[str, Any]) -> str:
    """README.md of a dial with this index."""
    dial, mix = _dial(index), _example(index)
    overlaps = any(one.kind == "overlap" for one in dial.adapters)
    rows = []
    for pole, one in index["poles"].items():
        neurons, fidelity = one["neurons"], one["fidelity"]
        values = [pole, str(neurons["shift"]), str(neurons["clamp"]), f"{fidelity['kl_rule_base']:.3g}"]
        values += [f"{fidelity[name]:.2g}" for name in ("kl_rule_artifact", "limit")]
        rows.append(f"| {' | '.join(values)} |")
    return _PAGE.format(
        model=index["model"]["name"],
        version=index["version"],
        base=dial.base,
        unsteered=_unsteered(index),
        server=server_command(dial),
        curl=curl_command(dial, mix),
        mix=",".join(map(str, mix)),
        overlaps=_OVERLAPS.format(mixed=dial.mixed) if overlaps else "",
        rows="\n".join(rows),
    )


def closing_lines(index: dict[str, Any], folder: str) -> list[str]:
    """What was made, and how it is used."""
    dial, mix, sizes = _dial(index), _example(index), index["bytes"]
    measured = [*index["poles"].items(), *((one["traits"], one) for one in index["mixes"])]
    adapters = (sizes["all"] - sizes["base"]) / 1e6
    return [
        *(f"{name}: {_faithful(one['fidelity'])}" for name, one in measured),
        f"all at zero: {_unsteered(index)}",
        f"wrote {folder}: {dial.base} {sizes['base'] / 1e6:.1f} MB (unsteered {sizes['unsteered'] / 1e6:.1f} MB, "
        f"MLPs wider by {index['extra_width']} at most, {index['extra_width_mean']:g} on average), "
        f"{len(dial.adapters)} adapters, {adapters:.1f} MB",
        "",
        f"cd {folder} && {server_command(dial)}",
        "",
        curl_command(dial, mix),
    ]


def _faithful(fidelity: dict[str, float]) -> str:
    return (
        f"moved KL {fidelity['kl_rule_base']:.3g}, faithful to KL {fidelity['kl_rule_artifact']:.2g} "
        f"(limit {fidelity['limit']:.2g}, the runtime's own noise {fidelity['kl_runtime_floor']:.2g})"
    )


def _unsteered(index: dict[str, Any]) -> str:
    found = index["unsteered"]
    return "bitwise the model's logits" if found["bitwise"] else f"KL {found['kl']:.2g} to the model"


def _dial(index: dict[str, Any]) -> Dial:
    adapters = [
        Adapter(one["kind"], tuple(one.get("traits") or [one["trait"]]), one["file"]) for one in index["adapters"]
    ]
    return Dial(index["base"], tuple(adapters), index["mixed"])


def _example(index: dict[str, Any]) -> list[TraitSpec]:
    """The first pole, and another trait's at full strength if there is one."""
    first, *others = map(parse_recorded, index["poles"])
    other = next(([spec] for spec in others if spec.trait != first.trait), [])
    return [TraitSpec(first.trait, first.sign, 0.7), *other]
