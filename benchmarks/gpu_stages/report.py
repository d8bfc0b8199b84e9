"""Turn the results of all stages into a report in Markdown. Imports no torch."""

from __future__ import annotations

from typing import Any

Results = dict[str, dict[str, Any]]


def markdown(results: Results) -> str:
    """Return the report. results: by name of the stage, as `gpu.py` stores them."""
    parts = ["# GPU benchmark", "", *_head(results)]
    parts += _end_to_end(results)
    for name in ("ceilings", "loss", "attention", "optimizer", "reduction"):
        if results.get(name, {}).get("values"):
            parts += ["", f"## {name.capitalize()}", "", *_rows(results[name]["values"])]
    for name, result in results.items():
        if name.startswith("profile") and result.get("values"):
            parts += _profile(name, result["values"])
        if name.startswith("save") and result.get("values"):
            parts += ["", f"## {name.capitalize()}", "", *_rows(result["values"])]
    parts += _tests(results)
    parts += _stages(results)
    return "\n".join(parts) + "\n"


def _head(results: Results) -> list[str]:
    values = results.get("environment", {}).get("values", {})
    if not values:
        return ["The environment was not recorded."]
    gpus = values.get("gpus", [])
    names = ", ".join(f"{gpu['name']} ({gpu['memory GiB']} GiB)" for gpu in gpus) or "no GPU"
    versions = {**values.get("versions", {}), "cuDNN": values.get("cudnn"), **values.get("packages", {})}
    shown = ", ".join(f"{name} {number}" for name, number in versions.items() if number)
    return [f"{names}; {values.get('processors')} processors; {shown}."]


def _rows(values: dict[str, Any]) -> list[str]:
    """Return a table with a row for each number; numbers in dictionaries get a column each if they all do."""
    nested = {key: value for key, value in values.items() if isinstance(value, dict)}
    flat = {key: value for key, value in values.items() if not isinstance(value, dict | list)}
    lines = []
    if flat:
        lines += ["| | |", "|---|--:|", *(f"| {key} | {_number(value)} |" for key, value in flat.items())]
    if nested:
        columns = list(dict.fromkeys(column for value in nested.values() for column in value))
        lines += ["", f"| | {' | '.join(columns)} |", "|---|" + "--:|" * len(columns)]
        for key, value in nested.items():
            lines.append(f"| {key} | {' | '.join(_number(value.get(column, '')) for column in columns)} |")
    return lines


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def speeds(results: Results) -> dict[str, dict[str, Any]]:
    """Return the numbers of each end-to-end stage, with MFU and the share of the measured matmul ceiling."""
    peak = results.get("environment", {}).get("values", {}).get("peak bf16 TFLOP/s")
    ceiling = results.get("ceilings", {}).get("values", {}).get("best TFLOP/s", {}).get("bf16")
    found = {}
    for name, result in results.items():
        values = result.get("values", {})
        if name.partition(":")[0] not in ("end_to_end", "scaling") or "tokens/s per GPU" not in values:
            continue
        teraflops = values["tokens/s per GPU"] * values["FLOP per token"] / 1e12
        found[name] = {
            "tokens/s per GPU": values["tokens/s per GPU"],
            "ms per step": values["ms per step"],
            "MFU": f"{teraflops / peak:.1%}" if peak else "",
            "of matmul ceiling": f"{teraflops / ceiling:.1%}" if ceiling else "",
            "peak GiB": values["peak GiB"],
            "s to first step": values["seconds to the end of the first step"],
        }
    return found


def _end_to_end(results: Results) -> list[str]:
    found = speeds(results)
    if not found:
        return []
    text = "Name: size, system, precision, sequences per pass x passes per step. MFU: share of the dense bf16 peak."
    return ["", "## Training", "", text, *_rows(found)]


def _profile(name: str, values: dict[str, Any]) -> list[str]:
    lines = ["", f"## {name.capitalize()}", "", *_rows({k: v for k, v in values.items() if k != "largest"})]
    if values.get("largest"):
        lines += ["", "| kernel | ms per step | share | calls |", "|---|--:|--:|--:|"]
        for row in values["largest"]:
            kernel = row["kernel"].replace("|", "\\|")[:100]
            lines.append(f"| `{kernel}` | {row['ms per step']} | {row['share']:.1%} | {row['calls per step']:g} |")
    return lines


def _tests(results: Results) -> list[str]:
    values = results.get("tests", {}).get("values", {})
    if not values:
        return []
    lines = ["", "## Tests", "", f"{values.get('summary')} (exit code {values.get('exit code')})"]
    for name, text in values.get("failures", {}).items():
        lines += ["", f"* {name}", "", "```", text, "```"]
    return lines


def _stages(results: Results) -> list[str]:
    lines = ["", "## Stages", "", "| stage | result | seconds |", "|---|---|--:|"]
    for name, result in results.items():
        lines.append(f"| {name} | {result['status']} | {result['seconds']:.0f} |")
    notes = [(name, note) for name, result in results.items() for note in result.get("notes", [])]
    if notes:
        lines += ["", "Notes:", "", *(f"* {name}: {note}" for name, note in notes)]
    failed = [(name, result["error"]) for name, result in results.items() if result.get("error")]
    for name, error in failed:
        lines += ["", f"{name}:", "", "```", error, "```"]
    return lines
