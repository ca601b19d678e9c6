"""A new version under traffic without a failed request, and back by itself when it is worse than the old one."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

from src.export.archive import MANIFEST, verify
from src.serving.golden import Item, answer_golden, compare
from src.serving.management import SLOW, Service, count_ready, wait_ready
from src.serving.retiring import curl, retire_or_say, with_valid_keys
from src.serving.scaling import describe_default
from src.serving.shares import Counts, count_answers, shares
from src.serving.store import Store
from src.serving.watching import RolloutError, Trial, Watch

WARM_UP = 5  # rounds of the golden set before a version is judged and gets traffic


class NotBack(RolloutError):
    """Nor could the one before it be made the default again; the message says how to do that."""


def deploy(service: Service, archive: Path, store: Store, items: list[Item], watch: Watch, say: Callable) -> str:
    """Roll ``archive`` out and return its version.

    Raises ArchiveError, and RolloutError, NotReady, ValueError or OSError after going back; nothing of it is left in
    the store or its record. So it is after Ctrl-C, or a signal that raises an exception; once ``archive`` serves for
    good, either ends the wait for the old version, which then stays registered. Raises NotBack when going back fails,
    too: the archive stays in the store, for it may be the default.
    """
    digest = verify(archive)
    if archive.resolve().parent == store.folder.resolve():
        raise RolloutError(f"{archive} lies in the model store already; build it elsewhere, for example --output new")
    version = version_of(archive, service.model)
    check_record(service, store)
    if version in service.versions():
        raise RolloutError(
            f"version {version} is registered already; give the new archive another: ./create_mar_archive.sh --version"
        )
    target, before = store.archive_of(version), store.deployed()
    if target.name in before:
        raise RolloutError(f"version {version} is kept for rollback; give the new archive another")
    say(f"verified {archive}: version {version}, sha256 {digest}")
    try:
        store.add(archive, digest, target)
        old = replace_default(service, store, target, version, [*before, target.name], say, items, watch)
    except NotBack:
        raise
    except BaseException:
        store.remove(target)
        raise
    retire_or_say(service, store.run, old, say)
    return version


def roll_back(service: Service, store: Store, say: Callable) -> str:
    """Serve the archive before the last deployed one again and return its version; raises as ``deploy``."""
    check_record(service, store)
    names = store.deployed()
    if not names:
        raise RolloutError(
            f"nothing was deployed ({store.record} does not exist), so there is no version to go back to"
        )
    before = store.folder / names[-2] if len(names) > 1 else store.served
    if not before.is_file():
        raise RolloutError(f"{before}, which served before, does not exist; deploy the version that is to serve")
    verify(before)
    version = version_of(before, service.model)
    old = replace_default(service, store, before, version, names[:-1], say, [], Watch(0))
    retire_or_say(service, store.run, old, say)
    store.remove(store.folder / names[-1])
    return version


def version_of(archive: Path, model: str) -> str:
    """The version in a verified archive's manifest. Raises RolloutError when it is an archive of another model."""
    with zipfile.ZipFile(archive) as opened:
        named = json.loads(opened.read(MANIFEST))["model"]
    if named["modelName"] != model:
        raise RolloutError(f"{archive} holds the model {named['modelName']}, not {model}; name it with --model")
    return named["modelVersion"]


def check_record(service: Service, store: Store) -> None:
    """Raises RolloutError when the default is a version that a deploy has left there without a record: it was killed
    before it could go back. Raises NotReady or OSError."""
    default, last = describe_default(service), store.deployed()[-1:]
    version = default["modelVersion"]
    if default["modelUrl"] != store.archive_of(version).name or default["modelUrl"] in last:
        return
    remedy = "./run_torchserve.sh with the options of the start brings back the one that is"
    for other, found in service.versions().items():
        if found["modelUrl"] in (last or [f"{service.model}.mar", store.served.name]):
            orders = (("PUT", f"{other}/set-default"), ("DELETE", version))
            remedy = "; ".join(curl(service, *order) for order in orders)
    raise RolloutError(
        f"version {version} is the default but not recorded as deployed: its deploy was killed. Go back first: {remedy}"
    )


def replace_default(
    service: Service,
    store: Store,
    archive: Path,
    version: str,
    names: list[str],
    say: Callable,
    items: list[Item],
    watch: Watch,
) -> str:
    """Register ``version``, judge it by ``items``, make it the default as ``watch`` says, record ``names`` as deployed.

    Returns the version before it, and goes back to that when anything fails. Raises NotBack when that fails, too.
    """
    old = describe_default(service)
    old_version, begun, asked, recorded = old["modelVersion"], count_answers(service), False, store.deployed()
    if version == old_version:
        raise RolloutError(f"version {version} serves already")
    try:
        service = with_valid_keys(service, store.run)
        workers = staff(service, archive.name, version, max(1, count_ready(old)))
        say(f"version {version} is registered and has {workers} READY worker{'s' if workers > 1 else ''}")
        own = judge(service, store.run, items, old_version, version, say) if items else 0
        before, asked = shares(count_answers(service).minus(begun).minus(Counts(own))), True
        Trial(service, store.run, items, old_version, version, say).introduce(watch, before)
        store.write(names)
    except BaseException as error:  # and after Ctrl-C
        try:
            go_back(service, store.run, old_version, version, say)
            if store.deployed() != recorded:
                store.write(recorded)
        except (OSError, RuntimeError, ValueError) as second:
            if asked:
                raise NotBack(
                    f"{error}; going back failed, too: {second}. Version {version} may be the default now, so its "
                    f"archive is kept; set {old_version} back: {curl(service, 'PUT', f'{old_version}/set-default')}"
                ) from error
            say(f"version {version} may stay registered ({second}); later: {curl(service, 'DELETE', version)}")
        raise
    return old_version


def staff(service: Service, name: str, version: str, wanted: int) -> int:
    """Register the archive ``name`` of the store, if it is not; wait until ``wanted`` workers are READY, or as many as
    it has; return how many. Raises NotReady or OSError.

    Not with TorchServe's default ``synchronous=true``: the thread that waits takes requests, whose clients wait too.
    """
    known = service.versions().get(version)
    if known is None:
        service.register(f"{quote(name)}&synchronous=false")
    workers = max(wanted, len(known["workers"]) if known else 0)  # none is taken away: they may be at work
    service.manage(f"/{quote(version)}?min_worker={workers}&max_worker={workers}", "PUT", timeout=SLOW)
    return wait_ready(service, SLOW, version)


def judge(service: Service, run: Path, items: list[Item], old: str, new: str, say: Callable) -> int:
    """Warm ``new`` up and compare its answers on the golden set with those of ``old``; return how many requests that
    took. Raises RolloutError."""
    for _ in range(WARM_UP):
        answers = answer_golden(with_valid_keys(service, run), items, new)
    good, line = compare(items, answer_golden(with_valid_keys(service, run), items, old), answers)
    say(line)
    if not good:
        raise RolloutError(f"version {new} is worse than {old} on the {line}")
    return (WARM_UP + 1) * len(items)


def go_back(service: Service, run: Path, old: str, new: str, say: Callable) -> None:
    """Make ``old`` the default and unregister ``new``. Raises OSError, RuntimeError or ValueError."""
    service = with_valid_keys(service, run)
    if new in service.versions():
        service.manage(f"/{quote(old)}/set-default", "PUT")
        say(f"went back to version {old}")
        retire_or_say(service, run, new, say)
