"""Pictures of a run: training curves, confusion matrix, calibration."""

import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np


def save_history(history: list[dict[str, float]], path: Path) -> None:
    """One CSV row an epoch, as ``dvc plots`` reads it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(name for row in history for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        writer.writerows(history)


def plot_history(history: list[dict[str, float]], folder: Path) -> list[Path]:
    """loss.png, accuracy.png and f1.png: training and validation by epoch. An axis ends where the first tenth of the
    epochs would begin to hide the rest."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    learnt = "training (what is minimised: augmented, smoothed)"  # validation's loss is plain cross-entropy
    plain = "training (augmented)"
    for name, title, training in (("loss", "Loss", learnt), ("accuracy", "Accuracy", plain), ("f1", "Macro F1", plain)):
        figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
        late = []
        for split, label in (("train", training), ("val", "validation")):
            points = [(row["epoch"], row[f"{split}_{name}"]) for row in history if f"{split}_{name}" in row]
            axes.plot(*zip(*points, strict=True) if points else ([], []), marker=".", label=label)
            late += [value for _, value in points[len(points) // 10 :]]
        axes.set(title=title, xlabel="epoch")
        if late:
            margin = 0.05 * (max(late) - min(late)) or 0.01
            axes.set_ylim(min(late) - margin, max(late) + margin)
        axes.grid(alpha=0.3)
        axes.legend()
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=120)
        plt.close(figure)
    return paths


def literal(names: list[str]) -> list[str]:
    """``names`` as Matplotlib shows them unchanged: between two dollars it would read a formula."""
    return [name.replace("$", r"\$") for name in names]


def plot_confusion(matrix: np.ndarray, class_names: list[str], path: Path) -> None:
    """``matrix``: int (classes, classes), rows are true classes. Shares by row as colour, counts as text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    size = min(max(5.0, 0.7 * len(class_names)), 24.0)  # inches
    figure, axes = plt.subplots(figsize=(size + 1, size), layout="constrained")
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    ticks = range(len(class_names))
    small = min(10.0, 60 * size / len(class_names))  # points: a line a class
    names = literal(class_names)
    axes.set_xticks(ticks, names, rotation=45 if small == 10 else 90, ha="right", fontsize=small)
    axes.set_yticks(ticks, names, fontsize=small)
    axes.set(xlabel="predicted", ylabel="true", title="Confusion matrix (test images)")
    if len(class_names) <= 25:
        for row in ticks:
            for column in ticks:
                colour = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, matrix[row, column], ha="center", va="center", color=colour, fontsize=8)
    figure.colorbar(picture, ax=axes, label="share of the true class")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_reliability(counts: np.ndarray, confidence: np.ndarray, accuracy: np.ndarray, path: Path) -> None:
    """The calibration curve of ``reliability``: accuracy over confidence, and how many images each bin holds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure, (curve, histogram) = plt.subplots(
        2, 1, figsize=(5, 6), height_ratios=(3, 1), sharex=True, layout="constrained"
    )
    curve.plot([0, 1], [0, 1], color="gray", linestyle="--", label="perfect")
    used = counts > 0
    curve.plot(confidence[used], accuracy[used], marker="o", label="model")
    curve.set(title="Calibration (test images)", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    curve.grid(alpha=0.3)
    curve.legend()
    edges = np.linspace(0, 1, len(counts) + 1)
    histogram.bar(edges[:-1], counts, width=np.diff(edges), align="edge", edgecolor="white")
    histogram.set(xlabel="confidence", ylabel="images", yscale="symlog")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def save_confusion_pairs(true: np.ndarray, predicted: np.ndarray, class_names: list[str], path: Path) -> None:
    """A CSV of (actual, predicted) names, as the ``confusion`` template of ``dvc plots`` reads it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["actual", "predicted"])
        writer.writerows((class_names[t], class_names[p]) for t, p in zip(true, predicted, strict=True))


def plot_formats(rows: list[tuple[str, float, float]], path: Path) -> None:
    """A bar of images/s for each ``(name, images per second, accuracy)``, the accuracy written on it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(figsize=(7, 1 + 0.6 * len(rows)), layout="constrained")
    bars = axes.barh([name for name, _, _ in rows], [speed for _, speed, _ in rows])
    axes.bar_label(bars, [f"{speed:,.0f}  (accuracy {accuracy:.4f})" for _, speed, accuracy in rows], padding=3)
    axes.set(xlabel="images/s, one thread", xlim=(0, 1.6 * max(speed for _, speed, _ in rows)))
    axes.invert_yaxis()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_images(images: list[np.ndarray], titles: list[str], path: Path) -> None:
    """A row of images, each uint8 (C, H, W) with C 1 or 3, under their titles."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure, row = plt.subplots(1, len(images), figsize=(1.8 * len(images), 2.2), layout="constrained", squeeze=False)
    for axes, image, title in zip(row[0], images, literal(titles), strict=True):
        axes.imshow(image.transpose(1, 2, 0), cmap="gray" if len(image) == 1 else None, vmin=0, vmax=255)
        axes.set_title(title, fontsize=8)
        axes.axis("off")
    figure.savefig(path, dpi=120)
    plt.close(figure)
