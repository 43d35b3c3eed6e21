"""The package as a whole: what importing it does, what its files say of each other, and what they must not contain."""

import ast
import re
import subprocess
from pathlib import Path

import moejax

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "moejax").rglob("*.py"))


def printed(result: subprocess.CompletedProcess[str]) -> str:
    """The last line on stdout of a process that ended well."""
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1]


def imported_modules(source: Path) -> set[str]:
    """Every module named by an import statement of `source`, also those inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source} line {node.lineno}: imports are absolute here"
            names.add(node.module or "")
    return names


def test_version_is_written_once_and_is_in_the_changelog():
    assert re.fullmatch(r"\d+\.\d+\.\d+", moejax.__version__)
    assert re.search(rf"^## .*\b{re.escape(moejax.__version__)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert moejax.__version__ not in re.findall(
        r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE
    )


def test_import_starts_no_backend_and_changes_no_setting(run_python):
    code = """
import flax.nnx, jax
from jax._src import xla_bridge
before = dict(jax.config.values)
import moejax
changed = [name for name, value in jax.config.values.items() if before.get(name) != value]
print(xla_bridge.backends_are_initialized(), changed)
"""
    assert printed(run_python([code])) == "False []"


def test_import_pulls_in_no_command_line_library(run_python):
    # flax itself imports rich, so what counts is who asks, not what is loaded in the end.
    code = """
import builtins
real, asked = builtins.__import__, set()
def spy(name, globals=None, *rest, **named):
    if str((globals or {}).get("__name__", "")).startswith("moejax"):
        asked.add(name.partition(".")[0])
    return real(name, globals, *rest, **named)
builtins.__import__ = spy
import moejax
public = [getattr(moejax, name) for name in moejax.__all__]
print("jax" in asked, sorted(asked & {"argparse", "rich", "torch", "transformers", "matplotlib", "optax", "grain"}))
"""
    assert printed(run_python([code])) == "True []"


def test_torch_and_transformers_are_imported_only_by_the_script_of_another_process():
    script = ROOT / "moejax" / "benchmarks" / "transformers_child.py"
    importers = {
        str(source) for source in SOURCES if "moejax.benchmarks.transformers_child" in imported_modules(source)
    }
    assert importers == set()
    users = {
        str(source)
        for source in SOURCES
        for name in imported_modules(source)
        if re.match("(torch|transformers)\\b", name)
    }
    assert users == {str(script)}


def test_generate_stays_a_function_beside_the_module_of_its_name(run_python):
    code = """
import runpy, sys
import moejax, moejax.commands.main, moejax.commands.generate
sys.argv = ["generate", "--help"]
try:
    runpy.run_module("moejax.generate", run_name="__main__")
except SystemExit as leave:
    assert leave.code in (0, None), leave.code
print(type(moejax.generate).__name__)
"""
    assert printed(run_python([code])) == "function"


def test_nothing_imports_the_modules_that_only_forward_to_commands():
    fronts = {f"moejax.{path.stem}" for path in (ROOT / "moejax" / "commands").glob("*.py")} & {
        f"moejax.{path.stem}" for path in (ROOT / "moejax").glob("*.py") if path.stem != "__init__"
    }
    assert "moejax.generate" in fronts
    importers = {str(source): fronts & imported_modules(source) for source in SOURCES}
    assert {source: found for source, found in importers.items() if found} == {}


def test_readme_and_ci_run_the_same_two_commands():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"^```bash\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)).splitlines()
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for variable, word in (("readme_run", "moejax.generate"), ("readme_test", "pytest")):
        (command,) = re.findall(rf"^{variable}='(.*)'$", ci, re.MULTILINE)
        assert word in command
        assert command in blocks, f"the README does not say: {command}"


def test_files_name_no_machine_and_no_package_index():
    forbidden = re.compile(
        r"""(?<![\w./])/(?:root|work|home/\w+|Users/\w+)/   # a path of somebody's machine
            | --?(?:extra-)?(?:index-url|find-links)\b      # an option of pip that names an index
            | https?://\S+/(?:simple|packages)/             # a package index itself
        """,
        re.VERBOSE,
    )
    suffixes = {".py", ".md", ".toml", ".yaml", ".yml", ".json", ".ipynb", ".sh", ".cc", ".h"}
    folders = [ROOT / name for name in ("configs", "moejax", "notebooks", "tests")]
    files = [*ROOT.glob("*"), *(path for folder in folders for path in folder.rglob("*"))]
    texts = [path for path in files if path.suffix in suffixes and path != Path(__file__)] + [ROOT / ".ci" / "run"]
    assert ROOT / "README.md" in texts
    found = {str(path): match[0] for path in texts if (match := forbidden.search(path.read_text(encoding="utf-8")))}
    assert found == {}
