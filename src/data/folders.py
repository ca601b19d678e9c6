"""Datasets that are folders of images, one folder a class: found, downloaded or unpacked, then read."""

import logging
import lzma
import os
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from src.data.download import DownloadError, fetch
from src.data.source import ImageFile, Source, read_files
from src.preprocessing import Preprocessing

DONE = ".unpacked"
DEPTH = 3  # how far below an archive's top the class folders are looked for
MACOS = "__MACOSX"  # of attributes, not of files

logger = logging.getLogger(__name__)


def load_folders(config) -> Source:
    """Read ``data.location`` (a folder or an archive) with ``data.train_folder`` and ``data.test_folder`` in it.

    Without them its class folders lie at its top, and there is no test set. Raises DownloadError when it is not there,
    ValueError for a class folder that is empty or that only the test set has.
    """
    root = find_location(config)
    spec = Preprocessing(**config.preprocessing)
    train_root = find_folder(root, config.data.train_folder)
    class_names = list_classes(train_root)
    train, excluded = read_files(list_files(train_root, class_names), spec, f"{config.name} training")
    if config.data.test_folder is None:
        return Source(train, None, class_names, excluded)
    test_root = find_folder(root, config.data.test_folder)
    test, more = read_files(list_files(test_root, class_names), spec, f"{config.name} test")
    return Source(train, test, class_names, excluded + more)


def find_location(config) -> Path:
    """The folder that holds the dataset; an archive is fetched if need be and unpacked below ``data.directory``.

    ``data.location`` is looked for as it is, then in ``data.mirror``; ``data.url`` is the public source of the archive
    that it names. Raises DownloadError naming what was tried, ValueError when ``data.location`` is null.
    """
    data = config.data
    raw = Path(data.directory) / "raw"
    tried = local_paths(config)
    for path in tried:
        if path.is_dir():
            return path
        if path.is_file():
            return unpack(path, raw / _stem(path))
    name = Path(data.location).name
    url = data.url if names(data.url, name) else None
    if is_url(data.mirror):
        try:
            # data.md5 is of the archive at data.url, where there is one.
            archive = fetch(data.location, None if data.url else data.md5, raw / name, [data.mirror])
            return unpack(archive, raw / _stem(archive))
        except DownloadError as error:
            if not url:
                raise
            logger.warning("%s", error)
    if url:
        folder, name = url.rsplit("/", 1)
        return unpack(fetch(name, data.md5, raw / name, [folder]), raw / _stem(Path(name)))
    places = " or ".join(map(str, tried))
    if data.url or not data.homepage:
        raise DownloadError(
            f"data.location={data.location} does not exist (tried {places}); name the folder that holds your images"
        )
    raise DownloadError(
        f"{data.location} is not at {places} and cannot be downloaded from here; get it from {data.homepage} and name "
        f"the folder with the class folders: data.location=/path (or DATA_MIRROR=/folder that holds {data.location})"
    )


def local_paths(config) -> list[Path]:
    """Where ``data.location`` may be on this machine: as it is, then in ``data.mirror``. Raises ValueError for null."""
    data = config.data
    if data.location is None:
        raise ValueError(f"data.location is null, and data.dataset={data.dataset} needs it; name a folder or archive")
    paths = [Path(data.location)]
    if data.mirror and not is_url(data.mirror):
        paths.append(Path(data.mirror) / data.location)
    return paths


def is_url(mirror: str | None) -> bool:
    """Whether ``data.mirror`` is a URL, not a local folder."""
    return mirror is not None and mirror.startswith(("http://", "https://"))


def names(url: str | None, location: str) -> bool:
    """Whether a part of ``url`` is ``location``'s name, so that it is the public source of that and of nothing else."""
    return url is not None and _stem(Path(location)) in [_stem(Path(part)) for part in url.split("/")]


def _stem(path: Path) -> str:
    return path.name.split(".")[0]


def unpack(archive: Path, target: Path) -> Path:
    """Unpack a tar or zip into ``target``, once, and return it. Raises ValueError for a damaged or unsafe archive."""
    status = archive.stat()
    stamp = f"{archive.name} {status.st_size} {status.st_mtime_ns}"
    done = target / DONE
    if done.is_file() and done.read_text() == stamp:
        return target
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    logger.info("unpacking %s", archive)
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as content:
                # A zip's absolute paths and ".." are dropped here.
                content.extractall(target)  # noqa: S202  # nosec B202
        else:
            with tarfile.open(archive) as content:
                unpack_files(content, target.resolve())
    # zipfile's RuntimeError: a password, or a compression that Python does not know.
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError) as error:
        raise ValueError(
            f"{archive} cannot be unpacked ({error}); fetch it again, or unpack it and name its folder (data.location)"
        ) from error
    done.write_text(stamp)
    return target


def unpack_files(content: tarfile.TarFile, target: Path) -> None:
    """The plain files of a tar; links and devices hold no image. Raises TarError for a path that leads elsewhere.

    Debian 12's Python, 3.11.2, has not yet the filters of ``extractall``.
    """
    for member in content:
        place = (target / member.name).resolve()
        if not place.is_relative_to(target):
            raise tarfile.TarError(f"{member.name} leads out of its folder")
        if member.isfile():
            place.parent.mkdir(parents=True, exist_ok=True)
            with content.extractfile(member) as source, place.open("wb") as file:
                shutil.copyfileobj(source, file)
        elif member.isdir():
            place.mkdir(parents=True, exist_ok=True)


def find_folder(root: Path, name: str | None) -> Path:
    """``root``/``name``, or the one folder of that name at most DEPTH levels below. Raises ValueError.

    Without a name ``root``, or for an archive that was made of one folder what lies in that.
    """
    if name is None:
        return below_lone_folders(root) if (root / DONE).is_file() else root
    if Path(name).is_absolute():
        raise ValueError(f"{name} is an absolute path; data.train_folder and data.test_folder are relative to {root}")
    for depth in range(DEPTH):
        found = sorted(path for path in root.glob("*/" * depth + name) if path.is_dir())
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(f"{root} has several folders {name!r}: {', '.join(map(str, found))}; name one")
    raise ValueError(f"{root} has no folder {name!r}; set data.train_folder and data.test_folder to those it has")


def folders_in(root: Path) -> list[Path]:
    """The folders in ``root``, sorted, but for hidden ones and the one that macOS adds to a zip."""
    return sorted(
        path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".") and path.name != MACOS
    )


def below_lone_folders(root: Path) -> Path:
    """``root``, or the folder below it that holds several folders, where each above it holds that way alone."""
    inside = folders_in(root)
    return below_lone_folders(inside[0]) if len(inside) == 1 and folders_in(inside[0]) else root


def list_classes(root: Path) -> list[str]:
    """The names of the class folders, sorted. Raises ValueError when there are fewer than two."""
    names = [path.name for path in folders_in(root)]
    if len(names) < 2:
        raise ValueError(f"{root} has the class folders {names}; at least two are needed, each holding its images")
    return names


def walk(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """``os.walk``, also behind links, but for hidden files and folders. Raises OSError for a folder that cannot be
    listed."""

    def fail(error: OSError) -> None:
        raise error

    for base, names, files in os.walk(folder, onerror=fail, followlinks=True):
        names[:] = visible(names)
        yield base, names, visible(files)


def visible(names: list[str]) -> list[str]:
    """Those that do not begin with a dot."""
    return [name for name in names if not name.startswith(".")]


def files_below(folder: Path) -> list[Path]:
    """What lies in ``folder`` and below it, also behind links, sorted, but for hidden files and folders; also what
    cannot be read.

    Raises OSError for a folder that cannot be listed; a missing one holds nothing.
    """
    found = walk(folder) if folder.is_dir() else ()
    return sorted(Path(base, name) for base, _, files in found for name in files)


def list_files(root: Path, class_names: list[str]) -> list[ImageFile]:
    """Every file below the class folders of ``root``, sorted; what is hidden is no image and is passed over.

    Raises ValueError for a folder that is no class, a class without a folder, and a class without a file.
    """
    found = list_classes(root)
    if unknown := sorted(set(found) - set(class_names)):
        raise ValueError(f"{root} has the unknown classes {', '.join(unknown)}; known: {', '.join(class_names)}")
    files = []
    for label, name in enumerate(class_names):
        paths = files_below(root / name)
        if not paths:
            raise ValueError(f"the class folder {root / name} is empty or missing; add images or remove the class")
        files += [ImageFile(path, label) for path in paths]
    return files
