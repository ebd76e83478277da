"""The findings of all phases as Markdown."""

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks import measure, report

LISTED = 15
"""Rows of a table of kernels; the JSON has more."""


def to_text(findings: Mapping[str, Any]) -> str:
    """What each phase found so far."""
    phases = findings["phases"]
    machine = phases.get("ceilings", {}).get("findings", {}).get("machine")
    head = measure.machine_line(machine) if machine else "machine not asked for"
    lines = [f"# Device: {head}", ""]
    if findings["scale"] == "tiny":
        lines += ["Small models: this shows that the program runs, and says nothing of speed.", ""]
    lines += [phase_table(phases)]
    for name, each in phases.items():
        lines += [f"## {name}", "", *section(name, each["findings"])]
    return "\n".join(lines)


def phase_table(phases: Mapping[str, Any]) -> str:
    """How each phase ended."""
    return report.table(
        ["phase", "seconds", "end"],
        [[name, each["seconds"], first_line(each["end"])] for name, each in phases.items()],
    )


def first_line(text: str) -> str:
    """A cell has one."""
    return text.partition("\n")[0].replace("|", "/")


def section(name: str, findings: Mapping[str, Any]) -> Iterator[str]:
    """Tables of a phase."""
    flat: list[list[report.Cell]] = []
    ways: list[list[report.Cell]] = []
    for label, value in findings.items():
        if label == "machine":
            continue
        if isinstance(value, Mapping) and "kernels" in value:
            yield from profile_tables(label, value)
        elif isinstance(value, Mapping) and "variants" in value:
            yield from variant_tables(label, value)
        elif name in ("shapes", "searched"):
            ways.append([label, *cells_of(value)])
        else:
            flat += [[f"{label}{path}", cell] for path, cell in leaves(value)]
    if flat:
        yield report.table([name, "value"], flat)
    if ways:
        yield report.table(["shape", "ways: ms, TFLOP/s, error"], ways)


def cells_of(ways: Mapping[str, Any]) -> Iterator[str]:
    """One cell: each way that a shape can be computed, with its figures."""
    words = []
    for way, found in ways.items():
        numbers = found.values() if isinstance(found, Mapping) else [found]
        shown = ", ".join(report.show(each) for each in numbers)
        words.append(f"{way}: {first_line(shown)[:60]}")
    yield "; ".join(words)


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, report.Cell]]:
    """Numbers and words of a tree, with where they stand."""
    if not isinstance(value, Mapping):
        yield path, first_line(value) if isinstance(value, str) else value
        return
    for name, inner in value.items():
        yield from leaves(inner, f"{path}, {name}")


def profile_tables(label: str, found: Mapping[str, Any]) -> Iterator[str]:
    """The whole call, then its slowest kernels and modules."""
    keys = ("replay_ms", "eager_ms", "kernel_ms", "linked_ms", "gaps_ms")
    yield report.table([label, *keys], [["", *(found[key] for key in keys)]])
    if not found["is_whole"]:
        yield "Incomplete: kernels of no known module took part.\n"
    yield report.table(
        [f"{label}: kernel", "µs", "launches"],
        [[name[:80], each["us"], each["count"]] for name, each in first(found["kernels"])],
    )
    yield report.table(
        [f"{label}: module", "µs", "expected", "launches"],
        [
            [name, each["us"], each.get("expected_us"), each["count"]]
            for name, each in first(found["modules"])
        ],
    )


def first(table: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Its first rows."""
    return [*table.items()][:LISTED]


def variant_tables(label: str, found: Mapping[str, Any]) -> Iterator[str]:
    """gain: of a switch alone over none, that is lost without it, or by which it adds to all.

    It counts above the noise.
    """
    variants = found["variants"]
    none, again, every = (variants.get(name, {}) for name in ("none", "none again", "all"))
    rows: list[list[report.Cell]] = []
    for name, each in variants.items():
        gain = None
        if name.startswith("all but ") and every:
            gain = each["ms"] - every["ms"]
        elif name.startswith("all and ") and every:
            gain = every["ms"] - each["ms"]
        elif none:
            gain = none["ms"] - each["ms"]
        rows.append([name, each["ms"], each["spread_ms"], gain, each["error"]])
    yield report.table([label, "ms", "spread", "gain", "error"], rows)
    if none and again:
        yield f"Noise: {abs(none['ms'] - again['ms']):.3g} ms between two runs without switches.\n"
    if "error" in found:
        yield f"Ended after {found['blocks']} rounds: {first_line(found['error'])}\n"
    for name, fault in found["faults"].items():
        yield f"- {name}: {first_line(fault)}\n"
