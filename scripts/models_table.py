"""The tables of docs/models.md from records of measure_models.py.

python models_table.py FOLDER      with MODEL-DTYPE-BATCH.json

Where there is MODEL-DTYPE-BATCH-alone.json with our peak memory, it is that one's.
"""

import argparse
import json
import math
from pathlib import Path

ORDER = ("resnet50", "mobilenet_v2", "vgg16", "unet", "ssd300", "convnext_tiny")
TIMES = (
    "model", "dtype", "batch", "im2win", "in a graph", "TVM", "ratio", "PyTorch", "in a graph",
    "ratio", "torch.compile", "in a graph", "ratio",
)  # fmt: skip
PEAKS = ("model", "dtype", "batch", "im2win", "TVM", "PyTorch", "torch.compile")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    rows, peaks, ratios = [], [], {"TVM": [], "PyTorch": [], "torch.compile": []}
    folder = parser.parse_args().folder
    found = [path for path in folder.glob("*.json") if not path.stem.endswith("-alone")]
    for path in sorted(found, key=place):
        entries = implementations(path)
        alone = path.with_stem(f"{path.stem}-alone")
        if alone.exists():
            take_peak(entries, implementations(alone))
        name = path.stem.rsplit("-", 2)
        rows.append([*name, *cells(entries, ratios)])
        peaks.append([*name, *peaks_of(entries)])
    show(TIMES, rows)
    for name, found in ratios.items():
        if not found:
            continue
        mean = math.exp(sum(map(math.log, found)) / len(found))
        faster = sum(ratio > 1 for ratio in found)
        print(
            f"{name}: geomean {mean:.2f}x ({min(found):.2f}x to {max(found):.2f}x), "
            f"faster on {faster} of {len(found)}"
        )
    print("\nMiB")
    show(PEAKS, peaks)


def show(head, rows):
    print("| " + " | ".join(head) + " |")
    print("| --- | --- |" + " ---: |" * (len(head) - 2))
    for row in rows:
        print("| " + " | ".join(row) + " |")


def implementations(path):
    record = json.loads(path.read_text())
    return {entry["name"]: entry for entry in record["model"]["implementations"]}


def take_peak(entries, alone):
    """Ours, where it was measured: what failed has none."""
    peak = alone.get("im2win", {}).get("peak_bytes")
    if peak is not None:
        entries.setdefault("im2win", {})["peak_bytes"] = peak


def place(path):
    name, dtype, batch = path.stem.rsplit("-", 2)
    return dtype, ORDER.index(name), int(batch)


def cells(entries, ratios):
    """Those of one record; a ratio is of the best of both sides, in a graph or not."""
    times = {n: e["times"]["steady"]["median_us"] for n, e in entries.items() if "times" in e}
    groups = {
        "im2win": ("im2win", "im2win graph"),
        "TVM": ("tvm", "tvm graph"),
        "PyTorch": ("torch nchw", "torch nhwc", "torch nchw graph", "torch nhwc graph"),
        "torch.compile": ("torch.compile", "torch.compile graph"),
    }
    best = {
        group: min(times[name] for name in names if name in times)
        for group, names in groups.items()
        if any(name in times for name in names)
    }

    def time(*names):
        found = [times[name] for name in names if name in times]
        return f"{min(found):.0f}" if found else "-"

    def ratio(group):
        if group not in best or "im2win" not in best:
            return "-"
        ratios[group].append(best[group] / best["im2win"])
        return f"{ratios[group][-1]:.2f}x"

    return [
        time("im2win"), time("im2win graph"), time("tvm", "tvm graph"), ratio("TVM"),
        time("torch nchw", "torch nhwc"), time("torch nchw graph", "torch nhwc graph"),
        ratio("PyTorch"),
        time("torch.compile"), time("torch.compile graph"), ratio("torch.compile"),
    ]  # fmt: skip


def peaks_of(entries):
    """The least of each side, in MiB; what a call takes beside weights and inputs."""

    def peak(*names):
        found = [entries[name].get("peak_bytes") for name in names if name in entries]
        found = [n for n in found if n is not None]
        return f"{min(found) / 2**20:.0f}" if found else "-"

    return peak("im2win"), peak("tvm"), peak("torch nchw", "torch nhwc"), peak("torch.compile")


if __name__ == "__main__":
    main()
