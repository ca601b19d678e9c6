"""DeepFashion in-shop (Liu et al. 2016, CVPR), which its authors give to those who sign: its folders, or a CSV."""

import csv
from collections.abc import Iterator
from pathlib import Path

from src.data.folders import files_below, find_location, local_paths, walk
from src.data.source import SHOWN, ImageFile, Source, read_files
from src.image_limits import EXTENSIONS
from src.preprocessing import Preprocessing

COLUMNS = ("path", "label", "item_id")
DEPARTMENTS = ("MEN", "WOMEN")


def load_deepfashion(config) -> Source:
    """Read ``data.location``: a folder ``img/MEN|WOMEN/<class>/<item>/*.jpg``, or a CSV with the columns path, label
    and item_id, its paths relative to it. There is no test set; prepare.py splits by item.

    Raises DownloadError when it is not there, ValueError for what cannot be read.
    """
    path = find_manifest(config)
    rows = read_manifest(path) if path else list_items(find_location(config))
    class_names = sorted({label for _, label, _ in rows})
    if len(class_names) < 2:
        raise ValueError(f"{config.data.location} has the classes {class_names}; at least two are needed")
    files = [ImageFile(file, class_names.index(label), item) for file, label, item in rows]
    train, excluded = read_files(files, Preprocessing(**config.preprocessing), config.name)
    return Source(train, None, class_names, excluded)


def find_manifest(config) -> Path | None:
    """``data.location`` or the same in ``data.mirror`` if it is a CSV that exists."""
    paths = local_paths(config)
    if paths[0].suffix.lower() != ".csv":
        return None
    for path in paths:
        if path.is_file():
            return path
    raise ValueError(f"data.location names {paths[0]}, which does not exist; write it with {', '.join(COLUMNS)}")


def read_manifest(path: Path) -> list[tuple[Path, str, str]]:
    """``(file, label, item)`` of each row. Raises ValueError for what is no such CSV, naming the line."""
    with path.open(newline="", encoding="utf-8-sig") as file:  # Excel begins it with a byte order mark
        reader = csv.DictReader(file, strict=True)
        try:
            return sorted(read_rows(reader, path))
        except csv.Error as error:  # line_num is still that of the row before
            raise ValueError(f"{path}, line {reader.line_num + 1}: {error}; look for a quote that is open") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is no UTF-8 ({error}); save it as CSV in UTF-8") from error


def read_rows(reader: csv.DictReader, path: Path) -> Iterator[tuple[Path, str, str]]:
    """What ``read_manifest`` returns, row by row."""
    if missing := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
        raise ValueError(f"{path} misses the columns {', '.join(missing)}; it needs {', '.join(COLUMNS)}")
    for row in reader:
        values = [(row[name] or "").strip() for name in COLUMNS]
        for name, value in zip(COLUMNS, values, strict=True):
            if not value:
                raise ValueError(f"{path}, line {reader.line_num}: {name} is empty")
            if "\n" in value or "\r" in value:
                raise ValueError(
                    f"{path}, line {reader.line_num}: {name} {value[:40]!r} has a line break; close its quotes"
                )
        yield path.parent / values[0], values[1], values[2]


def list_items(root: Path) -> list[tuple[Path, str, str]]:
    """``(file, label, item)`` of every image: the item is its folder, the class the folder above. Raises ValueError."""
    items, others, strays = walk_items(root)
    if not items:
        raise ValueError(f"{root} has no item folder such as WOMEN/Dresses/id_00000002; unpack In-shop's img.zip there")
    if strays:
        shown = ", ".join(map(str, strays[:SHOWN]))
        raise ValueError(f"{len(strays)} images are in no item folder: {shown}; put them into one such as id_00000002")
    check_classes(items, others)
    rows = []
    for folder in items:
        images = files_below(folder)
        if not images:
            raise ValueError(f"the item folder {folder} is empty; add its images or remove it")
        # The same number names different items of men and women.
        rows += [(image, folder.parent.name, "/".join(folder.parts[-3:])) for image in images]
    return rows


def walk_items(root: Path) -> tuple[list[Path], list[Path], list[Path]]:
    """Sorted: the item folders below ``root``, also behind links; the other folders above them or beside them; the
    images in those. Hidden files and folders are passed over. Raises OSError for a folder that cannot be listed."""
    items, others, strays = [], [], []
    for base, names, files in walk(root):
        folder = Path(base)
        items += [folder / name for name in names if name.startswith("id_")]
        names[:] = [name for name in names if not name.startswith("id_")]
        others.append(folder)
        strays += [folder / name for name in files if Path(name).suffix.lower() in EXTENSIONS]
    return sorted(items), sorted(others), sorted(strays)


def check_classes(items: list[Path], others: list[Path]) -> None:
    """Every folder beside a class folder, and every one in MEN or WOMEN, holds items. Raises ValueError."""
    parents = {item.parent.parent for item in items} | {folder for folder in others if folder.name in DEPARTMENTS}
    used = {folder for item in items for folder in item.parents}
    for folder in others:
        if folder.parent in parents and folder not in used:
            raise ValueError(
                f"the class folder {folder} has no item folder such as id_00000002; add its items or remove it"
            )
