"""A new version under traffic without a failed request, and back by itself when it is worse than the old one."""

import json
import time
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from urllib.parse import quote

from src.export.archive import MANIFEST, verify
from src.serving.golden import Item, answer_golden, compare
from src.serving.management import SLOW, Service, check_ready, count_ready, wait_ready
from src.serving.scaling import do_when_idle, unregister
from src.serving.store import Store

WARM_UP = 5  # rounds of the golden set before a version is judged and gets traffic
MORE_FAILURES = 0.01  # of all answers; a higher share of 5xx than before by more than this is worse
RETIRE = 30  # seconds to wait until nobody asks for the old version by its number


class RolloutError(RuntimeError):
    """The version was not rolled out, and the one before it serves; the message says why."""


def deploy(service: Service, archive: Path, store: Store, items: list[Item], watch: float, say: Callable) -> str:
    """Roll ``archive`` out and return its version.

    Raises ArchiveError, and RolloutError, NotReady, ValueError or OSError after going back; nothing of it is left in
    the store. So it is after Ctrl-C, or a signal that raises an exception; once ``archive`` serves for good, either
    ends the wait for the old version, which then stays registered.
    """
    digest = verify(archive)
    if archive.resolve().parent == store.folder.resolve():
        raise RolloutError(f"{archive} lies in the model store already; build it elsewhere, for example --output new")
    version = version_of(archive, service.model)
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
        record = partial(store.write, [*before, target.name])
        old = replace_default(service, target, version, record, say, items, watch)
    except BaseException:
        store.remove(target)
        raise
    retire_or_say(service, old, say)
    return version


def roll_back(service: Service, store: Store, say: Callable) -> str:
    """Serve the archive before the last deployed one again and return its version; raises as ``deploy``."""
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
    old = replace_default(service, before, version, partial(store.write, names[:-1]), say)
    retire_or_say(service, old, say)
    store.remove(store.folder / names[-1])
    return version


def version_of(archive: Path, model: str) -> str:
    """The version in a verified archive's manifest. Raises RolloutError when it is an archive of another model."""
    with zipfile.ZipFile(archive) as opened:
        named = json.loads(opened.read(MANIFEST))["model"]
    if named["modelName"] != model:
        raise RolloutError(f"{archive} holds the model {named['modelName']}, not {model}; name it with --model")
    return named["modelVersion"]


def replace_default(
    service: Service,
    archive: Path,
    version: str,
    record: Callable[[], None],
    say: Callable,
    items: list[Item] | None = None,
    watch: float = 0,
) -> str:
    """Register ``version``, judge it by ``items``, make it the default, watch it, ``record`` it.

    Returns the version before it, and goes back to that when anything fails.
    """
    old = service.describe()
    old_version, workers, begun = old["modelVersion"], max(1, count_ready(old)), count_answers(service)
    if version == old_version:
        raise RolloutError(f"version {version} serves already")
    try:
        if version not in service.versions():
            register(service, archive.name, version, workers)
            say(f"version {version} is registered and has {workers} READY worker{'s' if workers > 1 else ''}")
        if items:
            judge(service, items, old_version, version, say)
        before = failure_share(begun, count_answers(service))
        service.manage(f"/{quote(version)}/set-default", "PUT")
        say(f"version {version} is the default")
        if watch:
            observe(service, items, version, watch, before, say)
        record()
    except BaseException:  # and after Ctrl-C
        go_back(service, old_version, version, say)
        raise
    return old_version


def register(service: Service, name: str, version: str, workers: int) -> None:
    """Register an archive of the store, and wait until ``workers`` workers are READY.

    Not with TorchServe's default ``synchronous=true``: the thread that waits takes requests, whose clients wait too.
    """
    service.register(f"{quote(name)}&synchronous=false")
    service.manage(f"/{quote(version)}?min_worker={workers}&max_worker={workers}", "PUT", timeout=SLOW)
    wait_ready(service, SLOW, version)


def judge(service: Service, items: list[Item], old: str, new: str, say: Callable) -> None:
    """Warm ``new`` up and compare its answers on the golden set with those of ``old``. Raises RolloutError."""
    for _ in range(WARM_UP):
        answers = answer_golden(service, items, new)
    good, line = compare(items, answer_golden(service, items, old), answers)
    say(line)
    if not good:
        raise RolloutError(f"version {new} is worse than {old} on the {line}")


def observe(service: Service, items: list[Item], version: str, seconds: float, before: float, say: Callable) -> None:
    """Watch the new default: its workers, its answers, and the share of 5xx. Raises RolloutError or NotReady."""
    begun, deadline = count_answers(service), time.monotonic() + seconds
    while time.monotonic() < deadline:
        check_ready(service)
        for answer in answer_golden(service, items):
            if answer["model_version"] != version:
                raise RolloutError(f"the default address is answered by version {answer['model_version']}")
        time.sleep(0.2)
    ended = count_answers(service)
    after = failure_share(begun, ended)
    say(f"watched for {seconds:g} s: {ended[0] - begun[0]:.0f} answers, {after:.2%} of them 5xx, before {before:.2%}")
    if after > before + MORE_FAILURES:
        raise RolloutError(
            f"version {version} fails more often: {after:.2%} of the answers are 5xx, before {before:.2%}"
        )


def count_answers(service: Service) -> tuple[float, float]:
    """``(answers, those with 5xx)`` of the server since it started."""
    failed = service.total("Requests5XX")
    return failed + service.total("Requests2XX") + service.total("Requests4XX"), failed


def failure_share(begun: tuple[float, float], ended: tuple[float, float]) -> float:
    """The share of 5xx among the answers between two counts."""
    return (ended[1] - begun[1]) / max(1.0, ended[0] - begun[0])


def go_back(service: Service, old: str, new: str, say: Callable) -> None:
    """Make ``old`` the default and unregister ``new``."""
    if new in service.versions():
        service.manage(f"/{quote(old)}/set-default", "PUT")
        say(f"went back to version {old}")
        retire(service, new, say)


def retire_or_say(service: Service, version: str, say: Callable) -> None:
    """``retire``, or say that the version stays: the new one serves by now, whatever becomes of the old one."""
    try:
        retire(service, version, say)
    except (OSError, RuntimeError, SystemExit) as error:  # SystemExit: the command was told to end
        say(f"version {version} stays registered ({error}); later: {removal(service, version)}")


def removal(service: Service, version: str) -> str:
    """The command that unregisters a version."""
    return f"curl -X DELETE {service.management}/models/{service.model}/{version}"


def retire(service: Service, version: str, say: Callable) -> None:
    """Unregister a version that is no longer the default, once it has answered all it took."""

    def remove() -> bool:
        unregister(service, version)
        return True

    if not do_when_idle(service, version, RETIRE, remove):
        say(
            f"version {version} stays registered: it is still asked for by its number; "
            f"later: {removal(service, version)}"
        )
        return
    say(f"version {version} is unregistered")
