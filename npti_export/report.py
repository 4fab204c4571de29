"""The report: a JSON file for machines, a summary for people."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npti_export.files import atomic_output

if TYPE_CHECKING:
    from rich.console import Console

_BLOCKS = " ▁▂▃▄▅▆▇█"


def peak_rss_mb() -> float | None:
    """The largest resident size of this process so far, in MB; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1e6 if sys.platform == "darwin" else 1e3), 1)  # bytes on macOS, KiB elsewhere


def save_report(report: dict[str, Any], path: Path, *, force: bool) -> None:
    """Write the report as JSON, atomically.

    Raises:
        OutputError: it exists and ``force`` is not set.
    """
    with atomic_output(path, force=force) as temporary:
        temporary.write_text(json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def render(report: dict[str, Any], console: Console) -> None:
    """Print the summary of a main job."""
    from rich.markup import escape
    from rich.table import Table

    fidelity, artifact, neurons, seconds = (report[key] for key in ("fidelity", "artifact", "neurons", "seconds"))
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    width = f"MLP width {neurons['width']}{_added(neurons)}"
    base = f", base {artifact['base_bytes'] / 1e6:.1f} MB" if "base_bytes" in artifact else ""
    constants = f", {neurons['constant']} with a constant" if "constant" in neurons else ""
    gamma = "" if report["gamma"] is None else f", gamma {report['gamma']:g}"
    rows = {
        "trait": f"{report['trait']}  (recipe {report['recipe']['name']}{gamma})",
        "neurons": f"{neurons['shift']} shifted, {neurons['clamp']} clamped{constants}; {width}",
        "  shifted by layer": sparkline(neurons["shift_per_layer"]),
        "  clamped by layer": sparkline(neurons["clamp_per_layer"]),
        **_fidelity_rows(fidelity, fidelity["limit"], artifact["format"]),
        "size": f"{artifact['bytes'] / 1e6:.1f} MB{base}",
        "time": ", ".join(f"{stage} {value:.1f} s" for stage, value in seconds.items() if value >= 0.05),
        "memory": "unknown" if report["peak_rss_mb"] is None else f"{report['peak_rss_mb']:.0f} MB at peak",
    }
    if isinstance(artifact["sha256"], str):
        rows["sha256"] = artifact["sha256"]
    for name, value in rows.items():
        table.add_row(name, escape(value))
    console.print(table)
    if report["sample"] is not None:
        _render_sample(report["sample"], console)
    console.print(f"[bold green]wrote[/bold green] {escape(artifact['path'])}")


def render_verdict(verdict: dict[str, Any], console: Console) -> None:
    """Print what ``verify`` measured."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    rows = {
        "artifact": f"{verdict['artifact']} ({verdict['format']})",
        "trait": verdict["trait"],
        "model": verdict["model"],
        **_fidelity_rows(verdict["fidelity"], verdict["limit"], verdict["format"]),
    }
    for name, value in rows.items():
        table.add_row(name, escape(value))
    console.print(table)
    if verdict["fault"]:
        console.print(f"[bold red]not faithful[/bold red]: {escape(verdict['fault'])}")
    else:
        good = "nearer to the rule than the model" if verdict["format"] == "control-vector" else "faithful"
        console.print(f"[bold green]{good}[/bold green]")


def render_vector(report: dict[str, Any], console: Console) -> None:
    """Print what ``bake-vector`` did and measured."""
    from rich.markup import escape
    from rich.table import Table

    vector, found, artifact = report["vector"], report["fidelity"], report["artifact"]
    noise = f"limit {report['limit']:.2g}; the runtime's own noise is {found['kl_runtime_floor']:.2g}"
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    rows = {
        "vector": f"{vector['path']} ({vector['kind']}), scale {vector['scale']:g}",
        "biases": f"in {vector['layers']} layers",
        "model": report["model"],
        "moved": f"KL {found['kl_vector_base']:.3g} nats per token from the unsteered model",
        "faithful": f"KL {found['kl_vector_artifact']:.2g} to the vector ({noise}), top-1 agreement "
        f"{found['top1']:.1%}, worst logit off by {found['max_logit_diff']:.2g}, {found['positions']:.0f} tokens",
        "size": f"{artifact['bytes'] / 1e6:.1f} MB",
    }
    for name, value in rows.items():
        table.add_row(name, escape(value))
    console.print(table)
    console.print(f"[bold green]wrote[/bold green] {escape(artifact['path'])}")


def _fidelity_rows(fidelity: dict[str, float], limit: float, kind: str) -> dict[str, str]:
    name, moved = "faithful", f"KL {fidelity['kl_rule_base']:.3g} nats per token from the unsteered model"
    if kind == "control-vector":  # it is the rule's constant part, and nobody should take it for the rule
        name, moved = "in part", f"the rule: {moved}"
    return {
        "moved": moved,
        name: f"KL {fidelity['kl_rule_artifact']:.2g} to the rule (limit {limit:.2g}; the runtime's own noise is "
        f"{fidelity['kl_runtime_floor']:.2g}), top-1 agreement {fidelity['top1']:.1%}, "
        f"worst logit off by {fidelity['max_logit_diff']:.2g}, {fidelity['positions']:.0f} tokens",
    }


def _added(neurons: dict[str, Any]) -> str:
    widest, mean = neurons["extra_width"], neurons["extra_width_mean"]
    if widest in (0, mean):
        return f" + {widest}" if widest else ""
    return f" + {widest} at most, {mean:g} on average"


def _render_sample(sample: dict[str, str], console: Console) -> None:
    from rich.columns import Columns
    from rich.markup import escape
    from rich.panel import Panel

    console.print(f"\n[bold]{escape(sample['question'])}[/bold]")
    width = max(40, console.width // 2 - 1)
    panels = [Panel(escape(sample[name].strip()), title=name, width=width) for name in ("base", "steered")]
    console.print(Columns(panels))


def sparkline(values: list[int]) -> str:
    """One bar a value, and the range in figures."""
    top = max(*values, 1)
    bars = "".join(_BLOCKS[-(-value * (len(_BLOCKS) - 1) // top)] for value in values)
    return f"{bars}  {min(values)} to {max(values)}"


def render_programs(found: dict[str, Any], console: Console, *, every_pass: bool) -> None:
    """Print what programs cost and lose, see :func:`npti_export.explain.explain`."""
    from rich.table import Table

    width = found["width"]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("program", "pass") if every_pass else ("program",):
        table.add_column(name)
    for name in ("units a layer", "widest", "extra width", "biased layers", "worst clamp", "predicted error", "KL"):
        table.add_column(name, justify="right")
    for program in found["programs"]:
        steps = program["steps"] if every_pass else program["steps"][-1:]
        for number, step in enumerate(steps):
            extra = -(-step["widest"] // found["block"]) * found["block"]
            last = number == len(steps) - 1
            kl = f"{program['kl']:.2g}" if last and "kl" in program else ""
            names = [program["program"] if number == 0 else ""] + [step["name"]] * every_pass
            cost = [f"{step['units']:.1f}", str(step["widest"]), f"{extra} ({extra / width:.1%})", str(step["biases"])]
            worst = f"{step['worst']:.2g}" if step["worst"] else ""
            table.add_row(*names, *cost, worst, f"{step['error']:.2%}", kl)
    console.print(f"[bold]{found['trait']}[/bold], MLP width {width}, neurons in blocks of {found['block']}")
    console.print(table)
    console.print("worst clamp: largest error at gates up to ±60; predicted error: what is left of what a rule changes")
    if any("kl" in program for program in found["programs"]):
        console.print("KL: from rule to program, MLPs in float32, nats per token")
