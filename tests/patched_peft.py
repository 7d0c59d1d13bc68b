"""A pytest plugin: `-p patched_peft` runs PEFT's own tests with PEFT patched, and says at the end what ran where."""

import tinylora
from tinylora.integrations.peft import counts


def pytest_configure(config):
    tinylora.patch_peft()


def pytest_terminal_summary(terminalreporter):
    terminalreporter.section("patch_peft: calls by the way they went")
    for kind, found in counts().items():
        for reason, n in sorted(found.items(), key=lambda item: -item[1]):
            terminalreporter.write_line(f"{kind:9} {n:8} {reason}")
