"""What a user may say of KV pages on NVMe, and what is wrong with what cannot be together."""

import logging
from pathlib import Path

from headrace.cluster.engine_options import EngineOptions
from headrace.runtime.kv_log.intake import check_tenant
from headrace.runtime.kv_log.keys import KeyRing
from headrace.runtime.stage_config import TENANT, LogConfig
from headrace.scheduler.errors import HeadraceError
from headrace.scheduler.placement import Plan

log = logging.getLogger(__name__)


def check_kv_options(options: EngineOptions) -> None:
    """HeadraceError for the first thing that cannot be; takes no time and changes nothing."""
    if options.kv_directory is None:
        _check_absent(options)
        return
    if not options.kv_host_memory:
        raise HeadraceError(
            "--kv-directory needs --kv-host-memory: KV pages reach a drive through host RAM"
        )
    if not options.kv_disk:
        raise HeadraceError(
            "--kv-directory needs --kv-disk SIZE: the most bytes that each stage may keep there"
        )
    _check_keys(options)
    for name, value in (
        ("--kv-ttl", options.kv_ttl),
        ("--kv-daily-writes", options.kv_daily_writes),
    ):
        if value is not None and value <= 0:
            raise HeadraceError(f"{name} must be more than 0: leave it out for no limit")
    if options.kv_hot_window is not None and options.kv_hot_window < 0:
        raise HeadraceError("--kv-hot-window is a number of tokens: it must be at least 0")
    try:
        check_tenant(options.kv_tenant)
    except ValueError as error:
        raise HeadraceError(f"--kv-tenant: {error}") from None
    if options.address is None:
        _check_files(options.kv_directory, options.kv_key_file)


def _check_files(directory: Path, key_file: Path | None) -> None:
    if directory.exists() and not directory.is_dir():
        raise HeadraceError(f"--kv-directory {directory} is not a directory")
    if key_file is not None:
        if not key_file.absolute().parent.is_dir():
            raise HeadraceError(f"--kv-key-file {key_file}: there is no such folder: create it")
        KeyRing(key_file).close()  # says what is wrong with the file


def _check_absent(options: EngineOptions) -> None:
    for name, given in (
        ("--kv-disk", options.kv_disk),
        ("--kv-keep", options.kv_keep),
        ("--kv-key-file", options.kv_key_file),
        ("--kv-plaintext", options.kv_plaintext),
        ("--kv-tenant", options.kv_tenant != TENANT),
        ("--kv-ttl", options.kv_ttl is not None),
        ("--kv-daily-writes", options.kv_daily_writes is not None),
        ("--kv-hot-window", options.kv_hot_window is not None),
        ("--kv-write-through", options.kv_write_through),
    ):
        if given:
            raise HeadraceError(f"{name} is of --kv-directory DIR: give that, too, or leave it out")


def _check_keys(options: EngineOptions) -> None:
    if options.kv_key_file is not None and options.kv_plaintext:
        raise HeadraceError("--kv-plaintext encrypts nothing: leave it or --kv-key-file out")
    if options.kv_key_file is not None and not options.kv_keep:
        raise HeadraceError(
            "--kv-key-file is for pages that outlive the run: add --kv-keep, or leave it out and the"
            " key never leaves memory"
        )
    if options.kv_keep and options.kv_key_file is None and not options.kv_plaintext:
        raise HeadraceError(
            "--kv-keep needs --kv-key-file FILE, without which nobody could read the pages again"
            " (or --kv-plaintext, if all who can read the drive may read them)"
        )


def log_config(options: EngineOptions) -> LogConfig | None:
    """What stages are told of their logs; None where there are none."""
    if options.kv_directory is None:
        return None
    key_file = options.kv_key_file
    return LogConfig(
        directory=str(options.kv_directory.absolute()),
        cap=options.kv_disk,
        tenant=options.kv_tenant,
        key_file=None if key_file is None else str(key_file.absolute()),
        plaintext=options.kv_plaintext,
        keep=options.kv_keep,
        ttl=options.kv_ttl,
        daily_writes=options.kv_daily_writes,
    )


def log_keys(config: LogConfig | None) -> dict[str, bytes]:
    """Keys of all stages' logs that are in no file. The driver has them, too, so that a stage's pages can be
    read by the process that takes its place when it dies."""
    if config is None or config.plaintext or config.key_file is not None:
        return {}
    from headrace.runtime.kv_log.keys import new_key

    return {config.tenant: new_key()}


def log_kv(plan: Plan, hot_window: int | None) -> None:
    """Say what KV pages cost, and warn of a tier that is asked for and slower than computing, or than
    without it."""
    if hot_window is not None and not plan.window_pages:
        log.warning(
            "--kv-hot-window is of no use here, and nothing is read from the drive for it: host memory has"
            " room for all sequences that are worth decoding at once, or reading more would be slower, or"
            " --kv-host-memory or --kv-disk has no room for it"
        )
    if not plan.host_pages:
        return
    costs = plan.kv_costs
    log.info("a KV page costs %s", describe_costs(plan))
    for option, cost in (
        ("--kv-host-memory", costs.host_page),
        ("--kv-directory", costs.nvme_page if plan.nvme_pages else 0.0),
    ):
        if cost > costs.computed_page:
            log.warning(
                "%s is of no use here: to load a KV page takes %.2f ms, to compute it %.2f ms",
                option,
                cost * 1e3,
                costs.computed_page * 1e3,
            )


def describe_costs(plan: Plan) -> str:
    """What a page costs from where there is room for it, and to compute."""
    costs = plan.kv_costs
    parts = [f"{costs.host_page * 1e3:.2f} ms from host memory"]
    if plan.nvme_pages:
        parts.append(f"{costs.nvme_page * 1e3:.2f} ms from NVMe")
    return f"{', '.join(parts)}, {costs.computed_page * 1e3:.2f} ms to compute"
