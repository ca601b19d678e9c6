"""Files over HTTP or from a local folder: resumed, retried, verified."""

import hashlib
import logging
import shutil
from pathlib import Path

import requests
from requests.adapters import HTTPAdapter
from tqdm import tqdm
from urllib3.util import Retry

CHUNK = 1 << 13  # bytes; what has come of a chunk when the line breaks is lost
TIMEOUT = (10, 60)  # seconds to connect, seconds without a byte
RETRIES = Retry(
    total=4, backoff_factor=0.5, status_forcelist=(429, 500, 502, 503, 504), respect_retry_after_header=False
)

logger = logging.getLogger(__name__)


class DownloadError(RuntimeError):
    """No mirror had the file; the message lists what each one answered."""


def md5(path: Path) -> str:
    """MD5 of a file as hex. An integrity check, as the datasets' authors publish it; not a signature."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def fetch(name: str, checksum: str | None, target: Path, mirrors: list[str]) -> Path:
    """Bring file ``name`` with MD5 ``checksum`` to ``target``, from the first mirror that has it intact.
    None: nobody publishes one, and whatever comes whole is taken.

    ``mirrors``: URLs or local folders, tried in order. A file that is there and intact is left alone; a partial
    download goes on where it stopped. Raises DownloadError when every mirror failed.
    """
    if target.is_file() and checksum in (None, md5(target)):
        logger.info("%s is there and intact", target.name)
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".part")
    failures = []
    for mirror in mirrors:
        source = f"{mirror.rstrip('/')}/{name}"
        try:
            resumed = partial.is_file()
            _bring(source, partial)
            if resumed and checksum not in (None, md5(partial)):  # what lay there was not the beginning of this file
                partial.unlink()
                _bring(source, partial)
        except (requests.RequestException, OSError) as error:
            failures.append(f"  {source}: {error}")
            continue
        found = md5(partial)
        if checksum in (None, found):
            partial.replace(target)
            logger.info("%s from %s, MD5 %s", target.name, mirror, "verified" if checksum else f"{found}, not verified")
            return target
        failures.append(f"  {source}: its MD5 is {found}, expected {checksum}")
        partial.unlink()
    raise DownloadError(
        f"{name} could not be had from any mirror:\n"
        + "\n".join(failures)
        + "\nCheck the network, or name a local folder that holds it: DATA_MIRROR=/folder"
    )


def _bring(source: str, partial: Path) -> None:
    if source.startswith(("http://", "https://")):
        _download(source, partial)
    else:
        shutil.copyfile(source, partial)


def _download(url: str, partial: Path) -> None:
    """Append what is missing of ``url`` to ``partial``; a connection that drops is taken up again while bytes come."""
    with requests.Session() as session:
        session.mount("http://", HTTPAdapter(max_retries=RETRIES))
        session.mount("https://", HTTPAdapter(max_retries=RETRIES))
        while True:
            before = _size(partial)
            try:
                return _append(session, url, partial)
            except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError) as error:
                if _size(partial) <= before:
                    raise
                logger.warning("%s broke off (%s); going on from byte %d", url, error, _size(partial))


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _append(session: requests.Session, url: str, partial: Path) -> None:
    start = _size(partial)
    headers = {"Range": f"bytes={start}-", "Accept-Encoding": "identity"} if start else {"Accept-Encoding": "identity"}
    with session.get(url, headers=headers, stream=True, timeout=TIMEOUT) as answer:
        if answer.status_code == requests.codes.requested_range_not_satisfiable:
            return  # everything is there already; the checksum decides
        answer.raise_for_status()
        if answer.status_code != requests.codes.partial_content:
            start = 0  # the server ignores ranges: begin again
        total = start + int(answer.headers.get("Content-Length", 0))
        with (
            partial.open("ab" if start else "wb") as file,
            tqdm(total=total or None, initial=start, unit="B", unit_scale=True, desc=partial.stem) as bar,
        ):
            for chunk in answer.iter_content(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
