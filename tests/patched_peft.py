"""A pytest plugin: `-p patched_peft` runs PEFT's own tests with PEFT patched, and says at the end what ran where."""

import pytest

import tinylora
from tinylora.integrations.peft import FAST, counts


def pytest_configure(config):
    tinylora.patch_peft()


def pytest_sessionfinish(session):
    if session.exitstatus == 0 and slow():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def slow() -> list[str]:
    """What was called and never took the operator: every test would pass by PEFT's own forward, too."""
    return [kind for kind, found in counts().items() if any(found.values()) and not found[FAST]]


def pytest_terminal_summary(terminalreporter):
    terminalreporter.section("patch_peft: calls by the way they went")
    for kind, found in counts().items():
        for reason, n in sorted(found.items(), key=lambda item: -item[1]):
            terminalreporter.write_line(f"{kind:9} {n:8} {reason}")
    for kind in slow():
        terminalreporter.write_line(f"FAILED: no call of {kind} took the operator")
