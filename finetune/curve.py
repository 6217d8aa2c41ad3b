"""The picture of a run: `run_dir/loss.png`, drawn from its metrics files."""

import json
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The records of a metrics file; none if it is not there."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def draw_losses(run_dir: Path) -> Path | None:
    """Draw the loss and its terms over the steps, training as lines and evaluation as dots."""
    train = read_metrics(run_dir / "metrics.train.jsonl")
    evaluation = read_metrics(run_dir / "metrics.eval.jsonl")
    if not train:
        return None
    names = ["loss", *(name for name in train[0] if name.endswith("_loss"))]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, name in enumerate(names):
        color, label = f"C{number}", name.replace("_", " ")
        points = [(record["step"], record[name]) for record in train if record.get(name) is not None]
        axes.plot(*zip(*points, strict=True), color=color, label=f"{label} (training)")
        points = [(record["step"], record[name]) for record in evaluation if record.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), "o:", color=color, label=f"{label} (evaluation)", markersize=5)
    axes.set(xlabel="step", ylabel="nats per token", title=run_dir.name, ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    FigureCanvasAgg(figure).print_png(str(run_dir / "loss.png"))
    return run_dir / "loss.png"
