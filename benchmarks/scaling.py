"""What a request costs as work grows: ``python benchmarks/scaling.py``

Connections from 1 to 512, workers from 1 to 4, images from 28 pixels to 12 megapixels, file formats. Prints the tables
and writes docs/scaling.md. Needs an idle machine.
"""

import argparse
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
from benchmarks.servers import running, stop_servers_on_sigterm
from benchmarks.tables import table
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
FIGURES = ("requests/s", "p50 ms", "p95 ms", "p99 ms", "errors")
TABLES = ("connections", "workers", "sizes", "formats")


def enlarge(png: bytes, size: tuple[int, int], kind: str) -> bytes:
    """A photo of ``size``: the test image enlarged, in RGB, with the faint noise of a camera, as a file."""
    picture = Image.open(io.BytesIO(png)).convert("RGB").resize(size, Image.Resampling.BICUBIC)
    noise = np.random.default_rng(0).integers(0, 4, (size[1], size[0], 1), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(picture) // 2 + noise).save(buffer, kind)
    return buffer.getvalue()


def figures(found: Measurement) -> list[str]:
    """The cells of FIGURES."""
    latencies = (f"{value:.1f}" for value in (found.p50_ms, found.p95_ms, found.p99_ms))
    return [f"{found.requests_per_second:,.0f}", *latencies, str(found.errors)]


def tabulate(wanted: list[str], url: str, load: Callable[..., Measurement], images: list[bytes]) -> dict[str, str]:
    """The tables that one server answers for, by title."""
    tables = {}
    if "connections" in wanted:
        rows = [[str(count), *figures(load(url, images, connections=count))] for count in CONNECTIONS]
        tables["Connections"] = table(("connections", *FIGURES), rows)
    if "sizes" in wanted:
        rows = []
        for size in SIZES:
            for kind in ("JPEG", "PNG"):
                data = enlarge(images[0], size, kind)
                found = load(url, [data], connections=FEW, content_type=FORMATS[kind])
                rows.append([f"{size[0]}x{size[1]} {kind}", f"{len(data) / 1e3:,.1f}", *figures(found)])
        tables[f"Image sizes, {FEW} connections"] = table(("image", "kB", *FIGURES), rows)
    if "formats" in wanted:
        rows = []
        for kind, content_type in FORMATS.items():
            data = enlarge(images[0], FORMAT_SIZE, kind)
            found = load(url, [data], connections=FEW, content_type=content_type)
            rows.append([kind, f"{len(data) / 1e3:,.1f}", *figures(found)])
        tables[f"Formats, {FORMAT_SIZE[0]}x{FORMAT_SIZE[1]}, {FEW} connections"] = table(
            ("format", "kB", *FIGURES), rows
        )
    return tables


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES, metavar="TABLE", help=", ".join(TABLES))
    parser.add_argument("--workers", type=int, default=2, help="where they do not vary; default: %(default)s")
    parser.add_argument("--warmup", type=float, default=20, help="seconds; default: %(default)s")
    parser.add_argument("--seconds", type=float, default=8, help="of each measurement; default: %(default)s")
    parser.add_argument("--no-page", action="store_true", help="do not write docs/scaling.md")
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
                    found = figures(load(launch.url, images, connections=64))
                    rows.append([str(workers), *found, f"{server.memory() / 1e6:.0f}"])
                if workers == arguments.workers:
                    tables |= tabulate(arguments.tables, launch.url, load, images)
    if rows:
        tables["Workers, 64 connections"] = table(("workers", *FIGURES, "memory MB"), rows)
    lines = [*describe_machine(), f"- Load: wrk on the same cores, {source}; {arguments.workers} workers if not said"]
    lines += [f"- {arguments.warmup:g} s of warm-up, {arguments.seconds:g} s measured"]
    for title, text in tables.items():
        lines += ["", f"## {title}", "", text]
    print("\n".join(lines))
    if not arguments.no_page:
        command = " ".join(["benchmarks/scaling.py", *sys.argv[1:]])
        PAGE.write_text("\n".join(["# Cost as work grows", "", f"Written by `python {command}`.", "", *lines]) + "\n")
        print(f"wrote {PAGE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
