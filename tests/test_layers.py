"""The shape of the project: which way imports point, what a wheel holds, and that no folder hides another's package."""

import ast
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the bottom up; a layer may import those before it and itself.
LAYERS = (
    "kernels",
    "ops",
    "adapters",
    "nn",
    "tasks",
    "recipes",
    "generation",
    "analysis",
    "evolution",
    "integrations",
    "cli_train",
    "cli",
    "__main__",
)


def layer_of(module: str) -> int | None:
    """The layer of a module of ours, None for anybody else's; the package itself lies above all of them."""
    parts = module.split(".")
    if parts[0] != "tinylora":
        return None
    if len(parts) == 1:
        return len(LAYERS)
    return LAYERS.index(parts[1])  # ValueError for a file that has no layer


def imported(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (
                f"{node.module}.{alias.name}" if node.module == "tinylora" else node.module for alias in node.names
            )


def python_files(folder: str):
    return sorted((ROOT / folder).rglob("*.py"))


def test_imports_point_downward():
    for path in python_files("tinylora"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        own = layer_of(name)
        for module in imported(path):
            target = None if module == "tinylora.__version__" else layer_of(module)  # which is there before all else
            assert target is None or target <= own, f"{path.relative_to(ROOT)} imports {module}, which lies above it"


def test_kernels_stand_alone_and_hide_nothing():
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would hide Hugging Face's kernels package"
    for path in python_files("kernels"):
        foreign = {m.split(".")[0] for m in imported(path)} - {"torch", "triton"} - set(sys.stdlib_module_names)
        assert not foreign, f"{path.relative_to(ROOT)} imports {foreign}: kernels import torch, triton and each other"
    for path in (*python_files("tinylora"), *python_files("bench"), *python_files("tests")):
        assert not any(m.split(".")[0] == "kernels" for m in imported(path)), f"{path}: write tinylora.kernels"


def test_others_libraries_are_imported_in_integrations_alone_and_inside_functions():
    others = {"transformers", "peft", "trl", "bitsandbytes", "accelerate"}
    for path in python_files("tinylora"):
        tree = ast.parse(path.read_text())
        top = {n for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom) for n in _roots(node)}
        anywhere = {m.split(".")[0] for m in imported(path)}
        assert not top & others, f"{path.relative_to(ROOT)} imports {top & others} at import time"
        assert path.parent.name == "integrations" or not anywhere & others, path.relative_to(ROOT)


def _roots(node):
    return (
        [a.name.split(".")[0] for a in node.names]
        if isinstance(node, ast.Import)
        else [(node.module or "").split(".")[0]]
    )


def run(*command, cwd, **env):
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, capture_output=True, text=True, timeout=300, env=os.environ | env
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    tracked = run("git", "ls-files", "-zco", "--exclude-standard", cwd=ROOT).split("\0")
    for name in filter(None, tracked):  # what a clone would hold, so that the checkout gets no build/ folder
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        folder,
        source,
        cwd=folder,
    )
    (built,) = folder.glob("*.whl")
    return built


IMPORT_ALL = """
import importlib, pkgutil, sys, tinylora, tinylora.kernels
for module in pkgutil.walk_packages(tinylora.__path__, "tinylora."):
    if not module.name.startswith("tinylora.kernels."):
        importlib.import_module(module.name)
import torch
layer = tinylora.Linear.from_linear(torch.nn.Linear(8, 8), tinylora.TinyLoraConfig())
assert layer(torch.randn(2, 8)).shape == (2, 8)
from tinylora.kernels import tiles
assert tiles.table((9, 0)), "the launch shapes that were tuned are not installed"
print(tinylora.__file__, list(tinylora.kernels.__path__)[0])
"""


def test_the_wheel_holds_what_it_must_and_works_elsewhere(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    code = {n for n in names if n.endswith(".py")}
    expected = {str(p.relative_to(ROOT)) for p in python_files("tinylora")}
    expected |= {f"tinylora/{p.relative_to(ROOT)}" for p in python_files("kernels")}
    assert code == expected
    assert {str(p.relative_to(ROOT)) for p in (ROOT / "tinylora" / "recipes").glob("*.json")} <= names
    assert {f"tinylora/{p.relative_to(ROOT)}" for p in (ROOT / "kernels" / "tables").glob("*.json")} <= names
    assert any(n.endswith("licenses/LICENSE") for n in names) and any(n.endswith("entry_points.txt") for n in names)
    where = run(sys.executable, "-c", IMPORT_ALL, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site")).split()
    assert where == [str(tmp_path / "site/tinylora/__init__.py"), str(tmp_path / "site/tinylora/kernels")]


def test_works_from_an_uninstalled_checkout(tmp_path):
    where = run(sys.executable, "-S", "-c", f"import sys; sys.path += {sys.path!r}\n{IMPORT_ALL}", cwd=ROOT).split()
    assert where == [str(ROOT / "tinylora/__init__.py"), str(ROOT / "kernels")]


@pytest.fixture(scope="module")
def with_hugging_faces_kernels(tmp_path_factory):
    """A folder for PYTHONPATH with the real `kernels` distribution, under a version that transformers accepts.

    Out of its range (0.18.2 up to 0.19 in transformers 5.23) transformers ignores the package, and nothing could
    break. The newest that exists is 0.17.2, so it is relabelled.
    """
    site = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), "kernels==0.17.2"]
    if subprocess.run(pip, capture_output=True).returncode:
        pytest.skip("kernels==0.17.2 cannot be downloaded here")
    (info,) = site.glob("kernels-*.dist-info")
    metadata = info / "METADATA"
    metadata.write_text(metadata.read_text().replace("Version: 0.17.2", "Version: 0.18.2"))
    info.rename(site / "kernels-0.18.2.dist-info")
    return site


IMPORT_THEIRS = "import transformers, peft, kernels; transformers.Qwen2ForCausalLM; print(kernels.__file__)"


@pytest.mark.parametrize("init", [False, True], ids=["ours", "control: with __init__.py"])
def test_transformers_and_peft_are_unharmed_at_our_root(init, with_hugging_faces_kernels, tmp_path):
    """`import transformers, peft` from the repository root with Hugging Face's `kernels` installed.

    The control has an __init__.py in its kernels/ and must be seen to fail: otherwise this test could not.
    """
    root = ROOT
    if init:
        root = tmp_path
        (root / "kernels").mkdir()
        (root / "kernels" / "__init__.py").touch()
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_THEIRS],
        cwd=root,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(with_hugging_faces_kernels)},
    )
    if init:
        assert done.returncode != 0 and "from 'kernels'" in done.stderr, done.stderr[-2000:]
    else:
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.strip() == str(with_hugging_faces_kernels / "kernels" / "__init__.py")


def test_every_mutant_still_fits_its_source():
    """`make mutants` runs for an hour, and a replacement that finds nothing ends it."""
    from mutants import MUTANTS

    lost = [(m.file, m.old) for m in MUTANTS if (ROOT / m.file).read_text().count(m.old) <= m.nth]
    assert len(MUTANTS) > 100 and not lost
