"""The table of a verification."""

from __future__ import annotations

from rich.table import Table

from promprune.package.manifest import CheckRecord, VerificationRecord
from promprune.terminal import console, plain

__all__ = ["checks_table", "print_verification"]


def checks_table(checks: tuple[CheckRecord, ...]) -> Table:
    """Return the table of all checks of a verification."""
    table = Table(title="Verification", title_justify="left", title_style="bold")
    table.add_column("check")
    table.add_column("measured", justify="right")
    table.add_column("wanted", justify="right")
    table.add_column("")
    for check in checks:
        failed = "[bold yellow]warning[/]" if check.advisory else "[bold red]FAILED[/]"
        verdict = "[green]ok[/]" if check.passed else failed
        name = f"{check.name} ({check.detail})" if check.detail else check.name
        table.add_row(plain(name), f"{check.measured:.3g}", f"{check.comparison} {check.limit:g}", verdict)
    return table


def print_verification(record: VerificationRecord) -> None:
    """Print the checks, the omitted checks, and the warnings."""
    console.print(checks_table(record.checks))
    for what in record.not_verified:
        console.print(f"not verified: {plain(what)}", soft_wrap=True)
    for warning in record.warnings:
        console.print(f"[yellow]warning[/]: {plain(warning)}", soft_wrap=True)
