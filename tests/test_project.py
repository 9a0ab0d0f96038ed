"""The project itself: versions, requirements, notebooks, and the package that `pip install .` makes."""
import ast
import configparser
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
NOTEBOOKS = sorted(p for p in NBS.rglob("*.ipynb") if not any(part[0] in "._" for part in p.relative_to(NBS).parts))
EXPERIMENTS = [p for p in NOTEBOOKS if p.is_relative_to(NBS / "experiments")]
MACHINE_PATH = re.compile(r"(?:^|[^A-Za-z0-9_.])(/(?:work|root|home)/[^\s\"'`,)]*)", re.M)
BUILT = {".git", ".venv", "_proc", "_docs", "build", "dist", "runs", "__pycache__", ".pytest_cache",
         ".ipynb_checkpoints", ".quarto", ".snakemake"}
settings = configparser.ConfigParser(delimiters=["="])
settings.read(ROOT / "settings.ini", encoding="utf-8")
settings = settings["DEFAULT"]


def project_files() -> list[Path]:
    "Every file that is tracked or would be; without git, every file that is not built."
    git = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    if (ROOT / ".git").exists() and shutil.which("git"):
        run = subprocess.run(git, cwd=ROOT, capture_output=True, text=True)
        if run.returncode == 0:
            return [p for n in sorted(set(run.stdout.split("\0")) - {""}) if (p := ROOT / n).is_file()]
    found = []
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [f for f in folders if f not in BUILT and not f.endswith(".egg-info")]
        found += [p for n in names if (p := Path(folder, n)).is_file()]
    return sorted(found)


def cells(path: Path, kind: str) -> list[dict]:
    "The cells of one kind of a notebook, their sources joined."
    found = [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == kind]
    return [c | {"source": "".join(c["source"])} for c in found]


def name(path: Path) -> str:
    "A notebook's path within nbs/, to name a test by."
    return path.relative_to(NBS).as_posix()


def test_one_version():
    "settings.ini, the package and the installed distribution agree."
    import flowrepro
    assert settings["version"] == flowrepro.__version__ == importlib.metadata.version("flowrepro"), (
        "install again: rm .venv/.installed*; make install")


def test_constraints_are_exact_and_complete():
    "Every constraint is one exact version, and every requirement of settings.ini has one that satisfies it."
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    loose = [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!+]+", line)]
    assert not loose, f"not exact: {loose}"
    pins = {canonicalize_name(n): v for n, v in (line.split("==") for line in lines)}
    assert len(pins) == len(lines), "a package is pinned twice"
    for text in " ".join(settings[k] for k in settings if k.endswith("requirements")).split():
        need = Requirement(text)
        pin = pins.get(canonicalize_name(need.name))
        assert pin and need.specifier.contains(pin, prereleases=True), f"{text} is not met by constraints.txt ({pin})"


def test_quarto_file_is_shared():
    "nbdev and Quarto read one file: nbs/_quarto.yml is a relative link to the top-level one."
    assert (NBS / "_quarto.yml").is_symlink() and os.readlink(NBS / "_quarto.yml") == "../_quarto.yml"


def test_sidebar_lists_every_notebook():
    "Every notebook in the sidebar exists, and every notebook is in the sidebar."
    text = yaml.safe_dump(yaml.safe_load((ROOT / "_quarto.yml").read_text())["website"]["sidebar"])
    assert sorted(re.findall(r"[\w./-]+\.ipynb", text)) == sorted(map(name, NOTEBOOKS))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_notebook_form(path):
    """Code cells are short, their outputs without stderr; the title cell holds nothing but title, summary and
    settings (the docs drop the rest)."""
    for cell in cells(path, "code"):
        lines = [line for line in cell["source"].splitlines() if line.strip()]
        assert len(lines) <= 43, f"a cell of {len(lines)} lines, beginning {lines[0]!r}"
        wide = [line for line in lines if len(line) > 120 and not line.startswith("#|")]
        assert not wide, f"more than 120 characters: {wide[0]!r}"
        assert not [o for o in cell["outputs"] if o.get("name") == "stderr"], (
            f"warnings or progress bars under the cell beginning {lines[0]!r}; run: make outputs")
    title = next((c["source"] for c in cells(path, "markdown") if re.search(r"^# \S", c["source"], re.M)), "")
    assert title, "no title cell (# Title)"
    extra = [line for line in title.strip().splitlines() if line.strip() and not re.match(r"# |> |- [\w-]+: ", line)]
    assert not extra, f"text in the title cell is lost in the docs; give it its own cell: {extra}"
    assert "> " in title, "the title cell has no summary (> one sentence)"


@pytest.mark.parametrize("path", EXPERIMENTS, ids=name)
def test_experiment_has_parameters(path):
    "papermill needs exactly one cell tagged `parameters`."
    tagged = [c for c in cells(path, "code") if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1


def unused_imports(code: str) -> set[str]:
    "Names that a module, or a function in it, imports and never says again."
    tree, found = ast.parse(code), set()
    for scope in (tree, *(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef))):
        imports = [n for n in ast.walk(scope) if isinstance(n, (ast.Import, ast.ImportFrom))]
        made = {(a.asname or a.name).split(".")[0] for n in imports for a in n.names}
        found |= made - {n.id for n in ast.walk(scope) if isinstance(n, ast.Name)}
    return found


def test_nothing_is_imported_in_vain():
    assert unused_imports("import a, b\nfrom c import d as e, f\nb.x, e") == {"a", "f"}
    assert unused_imports("def f():\n    from a import b\n\ndef g():\n    from a import b\n    return b") == {"b"}
    modules = [p for folder in ("flowrepro", "tests", "tools") for p in (ROOT / folder).glob("*.py")
               if p.name not in ("__init__.py", "_modidx.py")]
    assert len(modules) > 40 and {str(p): found for p in modules if (found := unused_imports(p.read_text()))} == {}


def test_no_machine_paths():
    "No file names a folder of the machine it was written on."
    found = []
    for path in project_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}: {p}" for p in MACHINE_PATH.findall(text)]
    assert not found


@pytest.mark.parametrize("text, hit", [
    ("see /" + "work/main", True), ("'/" + "home/me/x'", True), ("/" + "root/x", True),
    ("https://example.org/" + "home/x", False), ("../" + "work/x", False), ("a/" + "root/b", False)])
def test_machine_path_pattern(text, hit):
    "The pattern finds absolute paths and leaves addresses and relative paths alone."
    assert bool(MACHINE_PATH.search(text)) == hit


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    "The wheel that `pip install .` makes from a clean copy of the project, unpacked."
    tmp = tmp_path_factory.mktemp("wheel")
    for path in project_files():
        copy = tmp / "copy" / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copy)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
           "--disable-pip-version-check"]
    run = subprocess.run([*pip, "-w", str(tmp), str(tmp / "copy")], cwd=tmp, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    zipfile.ZipFile(next(tmp.glob("*.whl"))).extractall(tmp / "site")
    return tmp / "site"


def test_wheel_is_complete(wheel):
    "Every file of flowrepro/, modules and data alike, is in the wheel."
    package = {p.relative_to(ROOT).as_posix() for p in project_files() if p.is_relative_to(ROOT / "flowrepro")}
    packed = {p.relative_to(wheel).as_posix() for p in wheel.rglob("*") if p.is_file()}
    missing = {p for p in package if "__pycache__" not in p} - packed
    assert not missing, f"not in the wheel: {sorted(missing)}; name them as package data in setup.py"


def test_wheel_imports_elsewhere(wheel, tmp_path):
    "The package and all its modules import from another folder, out of the wheel alone."
    code = ("import flowrepro, importlib, pkgutil\n"
            "for m in pkgutil.iter_modules(flowrepro.__path__): importlib.import_module(f'flowrepro.{m.name}')\n"
            "print(flowrepro.__version__, flowrepro.__file__)")
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(wheel)},
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    version, file = run.stdout.strip().splitlines()[-1].split(maxsplit=1)
    assert version == settings["version"] and Path(file).is_relative_to(wheel)


def test_help_is_quick(tmp_path):
    "`flowrepro --help` answers within a second and does not import torch (best of three)."
    code = ("import sys; sys.argv = ['flowrepro', '--help']\n"
            "from flowrepro.cli import main\n"
            "try: main()\n"
            "except SystemExit as end: assert not end.code, end.code\n"
            "print('heavy:', sorted({'torch', 'timm', 'pandas', 'matplotlib', 'scipy'} & set(sys.modules)))")
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
        times.append(time.perf_counter() - start)
        assert run.returncode == 0, run.stderr[-2000:]
    assert "usage" in run.stdout.lower() and "heavy: []" in run.stdout, run.stdout[-500:]
    assert min(times) < 1, f"{min(times):.2f} s"


def test_source_distribution(tmp_path):
    "Holds what setup.py reads."
    copy = shutil.copytree(ROOT, tmp_path / "project", symlinks=True,
                           ignore=shutil.ignore_patterns(*BUILT, "results", "tests", "*.egg-info"))
    subprocess.run([sys.executable, "-c", "from setuptools.build_meta import build_sdist; build_sdist('dist')"],
                   cwd=copy, check=True, capture_output=True)
    with tarfile.open(next((copy / "dist").glob("*.tar.gz"))) as archive:
        assert {"settings.ini", "constraints.txt", "README.md", "pyproject.toml", "flowrepro/workflow/experiments.yml",
                "flowrepro/experiments/run.ipynb"} <= {
            n.split("/", 1)[1] for n in archive.getnames() if "/" in n}
