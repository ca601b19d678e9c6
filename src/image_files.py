"""Image files on the disk: which ones a path means, their bytes, and what a model says of them."""

import os
import stat
from pathlib import Path

from src.image_limits import EXTENSIONS
from src.inference.predictor import Prediction, Predictor, attempt
from src.preprocessing import ImageError

LIST_EXTENSION = ".txt"
MAX_BYTES = 256_000_000  # of a file; uncompressed, 20 million pixels of four 16-bit channels are 160 MB


def find_images(source: Path) -> tuple[Path, list[str]]:
    """``(folder, names)`` of the images that ``source`` means: a folder, a file list or one image.

    Raises FileNotFoundError when it is none of these or holds no image, OSError when it cannot be read.
    """
    if source.is_dir():
        return source, list_images(source)
    kind = source.suffix.lower() if source.is_file() else None
    if kind == LIST_EXTENSION:
        return source.parent, read_list(source)
    if kind in EXTENSIONS:
        return source.parent, [source.name]
    raise FileNotFoundError(
        f"--input_path {source} is not a folder, nor a file that exists and ends with {LIST_EXTENSION} (a file list) "
        f"or {', '.join(sorted(EXTENSIONS))} (an image)"
    )


def list_images(folder: Path) -> list[str]:
    """Paths below ``folder``, relative to it and sorted, of the files with an image's extension.

    Files and folders whose names start with a dot are passed over. Raises FileNotFoundError when there is no image,
    OSError when one folder cannot be listed.
    """
    found = []
    for parent, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            (Path(parent) / name).relative_to(folder).as_posix()
            for name in names
            if os.path.splitext(name)[1].lower() in EXTENSIONS and not name.startswith(".")
        ]
    if not found:
        raise FileNotFoundError(f"no image in {folder}; the extensions known are {', '.join(sorted(EXTENSIONS))}")
    return sorted(found)


def _raise(error: OSError) -> None:
    raise error


def read_list(path: Path) -> list[str]:
    """The lines of a file list as they stand, without the empty ones. Raises FileNotFoundError when none is left."""
    # A file's name may hold bytes that are no text.
    lines = path.read_text(encoding="utf-8-sig", errors="surrogateescape").split("\n")
    names = [line for line in (line.removesuffix("\r") for line in lines) if line.strip()]
    if not names:
        raise FileNotFoundError(f"no image in {path}; write one path a line, relative to {path.parent}")
    return names


def read_image(path: Path) -> bytes:
    """The bytes of a file. Raises ImageError when it cannot be read, is no plain file or has over MAX_BYTES."""
    if "\0" in str(path):  # a line of a file list may hold anything
        raise ImageError("unreadable", "this is no path: it holds a null byte")
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ImageError("unreadable", "this is no plain file")
        if status.st_size > MAX_BYTES:
            raise ImageError("too_large", f"the file has {status.st_size} bytes, the limit is {MAX_BYTES}")
        return path.read_bytes()
    except OSError as error:
        raise ImageError("unreadable", f"the file cannot be read: {error.strerror}") from error


def answer_files(predictor: Predictor, folder: Path, names: list[str]) -> list[Prediction | ImageError]:
    """Prediction or ImageError for each file; a file that cannot be opened is an ImageError too."""
    return predictor.predict(attempt(read_image, folder / name) for name in names)
