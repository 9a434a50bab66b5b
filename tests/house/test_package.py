"""The package itself: light to import, movable under another name, exports what it promises."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sun

PACKAGE = Path(sun.__file__).parent

BLOCKED = """
import sys
for name in ("diffusers", "transformers", "accelerate", "peft", "numpy.testing", "PIL"):
    sys.modules[name] = None
"""


def python(code: str, *path: Path) -> str:
    """Run code in a fresh interpreter that sees only the given folders besides the installed packages."""
    environment = {"PYTHONPATH": ":".join(map(str, path)), "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_core_needs_torch_and_safetensors_alone():
    code = (
        BLOCKED
        + "import sun, sun.layers, sun.attention; print(sun.SunAdapter, sun.SunFileError, sun.trailing_timesteps(4))"
    )
    assert "[999, 749, 499, 249]" in python(code, PACKAGE.parent)


def test_import_alone_loads_nothing_heavy():
    loaded = python("import sun, sys; print([m for m in ('torch', 'diffusers') if m in sys.modules])", PACKAGE.parent)
    assert loaded == "[]"


def test_package_works_under_another_name(tmp_path):
    """ComfyUI loads a pack under a name made from its path."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "renamed").symlink_to(PACKAGE, target_is_directory=True)
    code = BLOCKED + "sys.modules['sun'] = None\nfrom renamed import SunAdapter; print(SunAdapter.__module__)"
    assert python(code, tmp_path / "other") == "renamed.adapter"


@pytest.mark.parametrize("file", sorted(p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.py")))
def test_imports_are_relative_and_point_one_way(file):
    tree = ast.parse((PACKAGE / file).read_text(encoding="utf-8"))
    absolute = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    absolute |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module and n.level == 0}
    roots = {name.split(".")[0] for name in absolute}
    assert not roots & {"sun", "comfy", "nodes", "folder_paths", "modules", "gradio"}


def test_promised_names_exist():
    for name in sun.__all__:
        assert getattr(sun, name) is not None
    assert set(sun.__all__) <= set(dir(sun))
    with pytest.raises(AttributeError, match="nothing"):
        _ = sun.nothing


def test_weights_are_tracked_where_the_package_keeps_them_and_nowhere_else() -> None:
    """A file that a test or a command left behind would stay in everybody's clone."""
    kinds = ("*.safetensors", "*.ckpt", "*.pt", "*.pth", "*.bin", "*.onnx")
    listed = subprocess.run(["git", "ls-files", "--", *kinds], cwd=PACKAGE.parent, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("not a clone")
    found = [Path(line) for line in listed.stdout.decode().splitlines()]
    assert [path for path in found if path.parts[:2] not in (("sun", "models"), ("tests", "data"))] == []
