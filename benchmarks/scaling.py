"""What a request costs as work grows: ``python benchmarks/scaling.py``

Connections from 1 to 512, workers from 1 to 4, images from 28 pixels to 12 megapixels, file formats. Prints the tables
and writes docs/scaling.md. Needs an idle machine; takes about 8 minutes.
"""

import argparse
import functools
import io
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from PIL import Image

from benchmarks.load import Measurement, measure, require_wrk, test_images
from benchmarks.machine import describe_machine
from benchmarks.pages import table, write_page
from benchmarks.servers import Server, running, stop_servers_on_sigterm
from benchmarks.torchserve import Setting, build_archive, prepare
from src.inference import Predictor

PAGE = ROOT / "docs" / "scaling.md"
CONNECTIONS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
WORKERS = (1, 2, 3, 4)
SIZES = ((28, 28), (64, 64), (128, 128), (256, 256), (512, 512), (1024, 1024), (2000, 1500), (4000, 3000))
FORMATS = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp", "BMP": "image/bmp", "TIFF": "image/tiff",
           "GIF": "image/gif"}  # fmt: skip
FORMAT_SIZE = (256, 256)
FEW = 4  # connections for the images that are large
FIGURES = ("requests/s", "p50 ms", "p95 ms", "p99 ms", "errors", "memory MB")
TABLES = ("connections", "workers", "sizes", "formats")


def enlarge(png: bytes, size: tuple[int, int], kind: str) -> bytes:
    """A photo of ``size``: the test image enlarged, in RGB, with the faint noise of a camera, as a file."""
    picture = Image.open(io.BytesIO(png)).convert("RGB").resize(size, Image.Resampling.BICUBIC)
    noise = np.random.default_rng(0).integers(0, 4, (size[1], size[0], 1), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(picture) // 2 + noise).save(buffer, kind)
    return buffer.getvalue()


def figures(load: Callable[..., Measurement], server: Server, images: list[bytes], **options) -> list[str]:
    """The cells of FIGURES; measured when the server has answered all that an earlier load left."""
    server.settle()
    found = load(server.launch.url, images, **options)
    rate = found.requests_per_second
    latencies = (f"{value:.1f}" for value in (found.p50_ms, found.p95_ms, found.p99_ms))
    return [
        f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}",
        *latencies,
        str(found.errors),
        f"{server.memory() / 1e6:.0f}",
    ]


def tabulate(
    wanted: list[str], server: Server, load: Callable[..., Measurement], images: list[bytes]
) -> dict[str, str]:
    """The tables that one server answers for, by title."""
    measured = functools.partial(figures, load, server)
    tables = {}
    if "connections" in wanted:
        rows = [[str(count), *measured(images, connections=count)] for count in CONNECTIONS]
        tables["Connections"] = table(("connections", *FIGURES), rows)
    if "sizes" in wanted:
        rows = []
        for size in SIZES:
            for kind in ("JPEG", "PNG"):
                data = enlarge(images[0], size, kind)
                found = measured([data], connections=FEW, content_type=FORMATS[kind])
                rows.append([f"{size[0]}x{size[1]} {kind}", f"{len(data) / 1e3:,.1f}", *found])
        tables[f"Image sizes, {FEW} connections"] = table(("image", "kB", *FIGURES), rows)
    if "formats" in wanted:
        rows = []
        for kind, content_type in FORMATS.items():
            data = enlarge(images[0], FORMAT_SIZE, kind)
            found = measured([data], connections=FEW, content_type=content_type)
            rows.append([kind, f"{len(data) / 1e3:,.1f}", *found])
        tables[f"Formats, {FORMAT_SIZE[0]}x{FORMAT_SIZE[1]}, {FEW} connections"] = table(
            ("format", "kB", *FIGURES), rows
        )
    return tables


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES, metavar="TABLE", help=", ".join(TABLES))
    parser.add_argument("--workers", type=int, default=2, help="where they do not vary; default: %(default)s")
    parser.add_argument("--warmup", type=float, default=20, help="seconds; default: %(default)s")
    parser.add_argument("--seconds", type=float, default=7, help="of each measurement; default: %(default)s")
    parser.add_argument("--no-page", action="store_true", help="do not write docs/scaling.md; --tables never does")
    arguments = parser.parse_args(argv)
    require_wrk()
    stop_servers_on_sigterm()
    build_archive()
    images, source = test_images()
    expected = Predictor.load(ROOT / "models" / "best_model").predict(images[:1])[0].predicted_class

    def load(url: str, bodies: list[bytes], **options) -> Measurement:
        return measure(url, bodies, seconds=arguments.seconds, **options)

    tables, rows = {}, []
    for workers in sorted({*(WORKERS if "workers" in arguments.tables else ()), arguments.workers}):
        setting = Setting({"minWorkers": workers, "maxWorkers": workers})
        with tempfile.TemporaryDirectory() as folder:
            launch, _ = prepare(setting, Path(folder))
            with running(launch, images[0], expected) as server:
                if arguments.warmup:
                    measure(launch.url, images, connections=64, seconds=arguments.warmup)
                if "workers" in arguments.tables:
                    found = figures(load, server, images, connections=64)
                    rows.append([str(workers), *found, f"{server.cold_start:.1f}"])
                if workers == arguments.workers:
                    tables |= tabulate(arguments.tables, server, load, images)
    if rows:
        tables["Workers, 64 connections"] = table(("workers", *FIGURES, "cold start s"), rows)
    lines = [*describe_machine(), f"- Load: wrk on the same cores, {source}; {arguments.workers} workers if not said"]
    lines += [f"- {arguments.warmup:g} s of warm-up, {arguments.seconds:g} s measured"]
    lines += ["- Memory: PSS of Java and its workers after the load; cold start: to the first correct answer"]
    for title, text in tables.items():
        lines += ["", f"## {title}", "", text]
    print("\n".join(lines))
    if set(arguments.tables) == set(TABLES) and not arguments.no_page:
        write_page(PAGE, "scaling.py", lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
