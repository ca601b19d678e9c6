"""The limit that no server can pass: decode, inference and encode in a loop, in WORKERS processes at once.

``python -m benchmarks.peers.in_process FOLDER SECONDS WORKERS BATCH`` prints one line of JSON; FOLDER holds images.
"""

import json
import multiprocessing
import sys
import time
from pathlib import Path

import numpy as np
import orjson

from benchmarks.peers.model import load_predictor


def loop(images: list[bytes], seconds: float, batch: int, started, counts) -> None:
    """Answer ``images`` in batches for ``seconds`` and put the number of images a second into ``counts``."""
    predictor = load_predictor()
    pixels = np.empty((batch, *predictor.config.preprocessing.shape), np.uint8)
    started.wait(120)
    begin, done = time.perf_counter(), 0
    while (now := time.perf_counter()) - begin < seconds:
        for index in range(batch):
            predictor.decode(images[(done + index) % len(images)], pixels[index])
        for row in predictor.probabilities(pixels):
            orjson.dumps(vars(predictor.label(row)))
        done += batch
    counts.put(done / (now - begin))


def main() -> None:
    folder, seconds, workers, batch = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    images = [path.read_bytes() for path in sorted(folder.iterdir())]
    context = multiprocessing.get_context("spawn")  # a fork of a process that has run torch may hang
    started, counts = context.Barrier(workers), context.Queue()
    processes = [context.Process(target=loop, args=(images, seconds, batch, started, counts)) for _ in range(workers)]
    for process in processes:
        process.start()
    rates = [counts.get(timeout=seconds + 180) for _ in processes]
    for process in processes:
        process.join(30)
    print(json.dumps({"requests_per_second": sum(rates)}))


if __name__ == "__main__":
    main()
