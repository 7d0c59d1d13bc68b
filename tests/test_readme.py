"""The README's promises: its example runs, its commands exist, its picture of the command line is the real one."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.M | re.S)
    return [code for name, code in fenced if name == language]


def test_the_example_runs(tmp_path):
    (code,) = blocks("python")
    assert len(code.strip().splitlines()) <= 12 and README[: README.index(code)].count("\n") < 30
    code += "\nassert sum(p.numel() for p in tinylora.adapter_parameters(model)) == 7\n"
    code += "assert all(p.any() for p in tinylora.adapter_parameters(model))\n"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "adapter" / "adapter.safetensors").stat().st_size < 4096


def test_the_shown_command_prints_what_is_shown():
    shown = next(b for b in blocks("") if b.startswith("$ tinylora params"))
    command, _, output = shown.partition("\n")
    done = subprocess.run(
        [sys.executable, "-m", "tinylora.cli", *command.split()[2:]], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.split() == output.split(), done.stdout + done.stderr


def test_commands_and_links_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"^make ([a-z-]+)", README, re.M)) <= targets
    assert set(re.findall(r"`make ([a-z-]+)`", README + (ROOT / "CONTRIBUTING.md").read_text())) <= targets
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "kernels" / "README.md"]
    for page in [*pages, ROOT / "bench" / "results" / "README.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(((?!http)[^)\s]+)\)", page.read_text()):
            where, _, heading = link.partition("#")
            target = page.parent / where if where else page
            assert target.exists(), f"{page}: {link}"
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.M) if heading else []
            assert not heading or heading in {h.lower().replace(" ", "-") for h in headings}, f"{page}: {link}"
