"""The measured errors as tables: `python -m parity.ledger LEDGER.json docs/parity.md`."""

import importlib.metadata
import json
import statistics
import sys
from pathlib import Path

FORWARD = "forward"


def versions() -> dict[str, str]:
    """Returns the versions of what was compared."""
    return {name: importlib.metadata.version(name) for name in ("jax", "flax", "torch", "numpy")}


def device_name(platform: str) -> str:
    """Names the device that flax_vae ran on."""
    import jax

    return platform if platform == "cpu" else f"{platform} ({jax.devices()[0].device_kind})"


def by_case(rows: list[dict]) -> dict[str, dict[str, dict]]:
    """Sorts rows into case -> dtype -> worst error forward and of the gradients, and the ratios to torch."""
    table: dict[str, dict[str, dict]] = {}
    for row in rows:
        cell = table.setdefault(row["case"], {}).setdefault(
            row["dtype"], {"forward": None, "gradients": None, "ratios": []}
        )
        side = "forward" if row["part"] == FORWARD else "gradients"
        cell[side] = max(cell[side] or 0.0, row["max"])
        if "ratio" in row:
            cell["ratios"].append(row["ratio"])
    return table


def cell_texts(cells: dict[str, dict]) -> list[str]:
    """Returns the columns of one case: float64 errors, then error and ratio in float32 and bfloat16."""
    texts = []
    for dtype in ("float64", "float32", "bfloat16"):
        cell = cells.get(dtype, {"forward": None, "gradients": None, "ratios": []})
        texts += ["-" if cell[side] is None else f"{cell[side]:.1e}" for side in ("forward", "gradients")]
        if dtype != "float64":
            texts.append(f"{statistics.median(cell['ratios']):.2f}" if cell["ratios"] else "-")
    return texts


def summary(rows: list[dict]) -> list[str]:
    """Returns the lines that the suite prints at its end: one a case, then one a dtype."""
    table = by_case(rows)
    width = max(map(len, table))
    lines = [f"{'':{width}}  {'float64':^17}  {'float32':^24}  {'bfloat16':^24}"]
    columns = ["forward", "gradient", "forward", "gradient", "ratio", "forward", "gradient", "ratio"]
    lines.append(f"{'case':{width}}  " + " ".join(f"{text:>8}" for text in columns))
    for case, cells in table.items():
        lines.append(f"{case:{width}}  " + " ".join(f"{text:>8}" for text in cell_texts(cells)))
    return [*lines, "", *totals(rows)]


def totals(rows: list[dict]) -> list[str]:
    """Returns a sentence a dtype: how many cases, the worst error, the ratios of our error to torch's."""
    lines = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        of_dtype = [row for row in rows if row["dtype"] == dtype]
        worst = max(of_dtype, key=lambda row: row["max"])
        cases = len({row["case"] for row in of_dtype})
        line = f"{dtype}: {cases} cases, worst relative error {worst['max']:.1e} ({worst['case']}, {worst['part']})"
        if ratios := [row["ratio"] for row in of_dtype if "ratio" in row]:
            line += f"; our error / torch's: median {statistics.median(ratios):.2f}, largest {max(ratios):.2f}"
        lines.append(line)
    return lines


def markdown(record: dict) -> str:
    """Renders a ledger as the page docs/parity.md."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    head = [
        "case",
        "f64 forward",
        "f64 gradients",
        "f32 forward",
        "f32 gradients",
        "f32 ratio",
        "bf16 forward",
        "bf16 gradients",
        "bf16 ratio",
    ]
    lines = [
        "# Parity, as measured",
        "",
        f"On {record['device']} with {versions}. Written by `pytest parity/ --ledger ledger.json` and",
        "`python -m parity.ledger ledger.json docs/parity.md`.",
        "",
        "Truth is `torch_ref` in float64 on the CPU. Errors are the largest difference divided by the largest true",
        "value, worst over outputs (forward), or over the input's and every parameter's gradient. The ratio is the",
        "median of our rms error over torch's own in the same precision: 1 means that both round equally well.",
        "",
        *(f"- {line}" for line in totals(record["rows"])),
        "",
        "| " + " | ".join(head) + " |",
        "|---|" + "---:|" * (len(head) - 1),
        *(f"| {case} | " + " | ".join(cell_texts(cells)) + " |" for case, cells in by_case(record["rows"]).items()),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m parity.ledger LEDGER.json OUT.md")
    Path(sys.argv[2]).write_text(markdown(json.loads(Path(sys.argv[1]).read_text())))
