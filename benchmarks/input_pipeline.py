"""How fast the input pipeline is beside the training step: ``python benchmarks/input_pipeline.py``.

Prints images/s of loading and augmenting alone, of a training step alone, and their ratio: the pipeline is the
bottleneck when it is below 1. Takes the config and overrides as src/training/train.py does.
"""

import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from src.config import config_parser, parse_config
from src.data.datamodule import ImageDataModule, load_class_names, load_data_info
from src.models import ImageClassifier, build_network
from src.training.fitting import architecture_args
from src.training.optimization import build_optimizer

SECONDS = 10.0  # of each measurement, in turns of one second


def main(argv: list[str] | None = None) -> int:
    _, config = parse_config(config_parser(__doc__.splitlines()[0]), argv)
    data = ImageDataModule(config)
    data.setup("fit")
    info = load_data_info(config.paths.metrics)
    classes = len(load_class_names(config.data.directory))
    network = build_network(
        config.model.architecture, config.preprocessing.channels, classes, **architecture_args(config)
    )
    model = ImageClassifier(network, info["mean"], info["std"]).to(memory_format=torch.channels_last)
    optimizer = build_optimizer(model, config.training)

    def batches():
        while True:
            for images, labels in data.train_dataloader():
                yield data.augmentation(images), labels

    pipeline = batches()
    images, labels = next(pipeline)

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    step()
    rates = {"pipeline": [], "training step": []}
    for _ in range(int(SECONDS)):
        for name, work in (("pipeline", lambda: next(pipeline)), ("training step", step)):
            count, start = 0, time.perf_counter()
            while time.perf_counter() - start < 1:
                work()
                count += 1
            rates[name].append(count * len(labels) / (time.perf_counter() - start))
    medians = {name: sorted(values)[len(values) // 2] for name, values in rates.items()}
    for name, rate in medians.items():
        print(f"{name:<16}{rate:>12,.0f} images/s")
    print(f"{'ratio':<16}{medians['pipeline'] / medians['training step']:>12.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
