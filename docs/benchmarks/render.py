"""Makes every table and picture below results/ from the JSON files that lie there.

    python docs/benchmarks/render.py              rewrites the tables (.md)
    python docs/benchmarks/render.py --check      writes nothing; fails if a table differs from its JSON
    python docs/benchmarks/render.py --pictures   rewrites the pictures (.png) too

A JSON file is a run of `bnfast bench`, a run of `bnfast bench --model` (both rendered by bnfast's own reports), or a
list of tables with columns and rows. results/README.md lists all files, results/models.md all whole-model runs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bnfast.benchmark import figure, machine, model_figure, model_report, models, report
from bnfast.benchmark.peers import PEERS

RESULTS = Path(__file__).resolve().parent / "results"
INDEX = RESULTS / "index.json"
PEER_TITLES = {peer.name: peer.title for peer in PEERS}
PEAK = "memory"
NOTE = "<!-- Made by docs/benchmarks/render.py"


def load(path: Path) -> dict[str, Any]:
    """One result file. ValueError if it is of none of the three kinds."""
    data: dict[str, Any] = json.loads(path.read_text())
    if "tables" in data:
        kind = "tables"
    elif "model" in data.get("settings", {}):
        kind = "model"
    elif data.get("rows") and "peer" in data["rows"][0]:
        kind = "bench"
    else:
        raise ValueError(f"{path} must hold tables, a run of bnfast bench or a run of bnfast bench --model")
    return {**data, "kind": kind}


def result_files() -> list[Path]:
    """Every JSON file below a folder of the index, in the order of the index."""
    listed = [RESULTS / entry["folder"] for entry in json.loads(INDEX.read_text())]
    found = sorted(path for path in RESULTS.glob("*/*/*.json"))
    unknown = sorted({str(path.parent.relative_to(RESULTS)) for path in found if path.parent not in listed})
    if unknown:
        raise ValueError(f"{INDEX.name} must list every folder of results. Not listed: {', '.join(unknown)}")
    return sorted(found, key=lambda path: (listed.index(path.parent), path.name))


def model_spec(data: dict[str, Any]) -> models.Spec:
    """The model of a run. Runs from before `--framework` are of Keras models."""
    settings = data["settings"]
    return models.parse(
        settings["model"], settings["batch"], settings["size"], settings.get("framework", models.KERAS.name)
    )


def render(data: dict[str, Any]) -> str:
    """The Markdown of one result file."""
    if data["kind"] == "bench":
        return report.markdown(data["machine"], data["rows"], data["left_out"], PEER_TITLES)
    if data["kind"] == "model":
        return model_report.markdown(data["machine"], model_spec(data), data["rows"], data["left_out"])
    parts = [f"# {data['title']}", f"{data['machine']}. {data['date']}. Program: {data['program']}."]
    parts.append("\n".join(f"- {line}." for line in data["about"]))
    for table in data["tables"]:
        if "heading" in table:
            parts.append(f"## {table['heading']}")
        heads = [column["name"] for column in table["columns"]]
        formats = [column.get("format", "") for column in table["columns"]]
        lines = [[cell(value, form) for value, form in zip(row, formats, strict=True)] for row in table["rows"]]
        parts.append(report.markdown_table(heads, lines))
    return "\n\n".join(parts) + "\n"


def cell(value: Any, form: str) -> str:
    """`value` as the column's format wants it; "-" for null."""
    if value is None:
        return "-"
    return report.digits(value) if form == "digits" else format(value, form)


def title(data: dict[str, Any]) -> str:
    """What the index says of a result file."""
    if data["kind"] == "tables":
        return str(data["title"])
    if data["kind"] == "model":
        return model_spec(data).label
    sets = dict.fromkeys(row["set"] for row in data["rows"])
    return f"`bnfast bench`: {', '.join(sets)}"


def index_page(files: list[Path]) -> str:
    """results/README.md: every result by machine, folder and date."""
    lines = []
    for entry in json.loads(INDEX.read_text()):
        cpu, folder = entry["folder"].split("/")
        here = [path for path in files if path.parent == RESULTS / entry["folder"]]
        links = [f"[{title(load(path))}]({path.relative_to(RESULTS).with_suffix('.md')})" for path in here]
        lines.append([cpu, folder, entry["date"], entry["about"], "; ".join(links)])
    table = report.markdown_table(["machine", "commit", "date", "what", "tables"], lines)
    intro = (
        "A folder is named after the commit that recorded the results. The code that was measured is that commit's, or"
        " its parent's if the commit holds only figures. A new folder needs a line in `index.json`."
    )
    return f"# All results\n\n{intro}\n\n[Whole models at a glance](models.md).\n\n{table}\n"


def models_page(files: list[Path]) -> str:
    """results/models.md: one row per whole-model run of Keras's, everything over Keras's layer."""
    heads = ["machine", "model", "Keras's step, ms", "op", "numpy_function", "TF fused op", "left out", "predict: op"]
    heads += ["predict: fold", "predict: left out", "memory: op", "memory: numpy_function"]
    wanted = [("bnfast-op", "train"), ("bnfast-numpy_function", "train"), ("tf-fused", "train"), ("left-out", "train")]
    wanted += [("bnfast-op", "predict"), ("bnfast-fold", "predict"), ("left-out", "predict")]
    wanted += [("bnfast-op", PEAK), ("bnfast-numpy_function", PEAK)]
    lines = []
    for path in files:
        data = load(path)
        if data["kind"] != "model" or model_spec(data).framework is not models.KERAS:
            continue
        rows = {(row["variant"], row["what"]): row for row in data["rows"]}
        link = f"[{model_spec(data).label}]({path.relative_to(RESULTS).with_suffix('.md')})"
        step = report.digits(1e3 * rows["keras", "train"]["seconds"])
        ratios = [cell(rows[key]["ratio"] if key in rows else None, ".2f") for key in wanted]
        lines.append([path.parent.parent.name, link, step, *ratios])
    intro = "Times and peak memory over Keras's: below 1 is better. Times are medians of the ratios within a round."
    return f"# Whole models at a glance\n\n{intro}\n\n{report.markdown_table(heads, lines)}\n"


def pages() -> Iterator[tuple[Path, str]]:
    """Every generated page and its text."""
    files = result_files()
    for path in files:
        yield path.with_suffix(".md"), f"{NOTE} from {path.name}. -->\n\n{render(load(path))}"
    yield RESULTS / "README.md", f"{NOTE}. -->\n\n{index_page(files)}"
    yield RESULTS / "models.md", f"{NOTE}. -->\n\n{models_page(files)}"


def differing() -> list[Path]:
    """The generated pages that are missing or differ from their data, and tables of which no data exists."""
    expected = dict(pages())
    stale = [page for page, text in expected.items() if not page.exists() or page.read_text() != text]
    return stale + sorted(set(RESULTS.rglob("*.md")) - set(expected))


def draw() -> None:
    """Rewrite the pictures of all runs of `bnfast bench` and `bnfast bench --model`."""
    for path in result_files():
        data = load(path)
        if data["kind"] == "bench":
            figure.save(path.with_suffix(".png"), data["rows"], PEER_TITLES, machine.sentence(data["machine"]))
        elif data["kind"] == "model":
            about = machine.sentence(data["machine"])
            model_figure.save(path.with_suffix(".png"), data["rows"], model_spec(data), about)


def main() -> int:
    """Run the command line; the exit status."""
    parser = argparse.ArgumentParser(description="Make the tables and pictures below results/ from their JSON files.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a table differs from its JSON")
    parser.add_argument("--pictures", action="store_true", help="rewrite the pictures too (needs matplotlib)")
    arguments = parser.parse_args()
    if arguments.check:
        stale = differing()
        for page in stale:
            print(f"{page.relative_to(RESULTS.parent)} differs from its data: run python docs/benchmarks/render.py")
        return 1 if stale else 0
    for page, text in pages():
        page.write_text(text)
    if arguments.pictures:
        draw()
    return 0


if __name__ == "__main__":
    sys.exit(main())
