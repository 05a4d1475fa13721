import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def tracked():
    return subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()


def test_the_wheel_holds_the_library_and_nothing_else(tmp_path):
    for name in tracked():
        if (ROOT / name).is_file():
            (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "tree" / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    subprocess.run([*command, str(tmp_path / "tree")], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    files = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert files == {name for name in tracked() if name.startswith("hybridlm/")}


def test_train_and_eval_never_import_each_other_and_the_library_imports_neither():
    for name in tracked():
        top = name.split("/")[0]
        if top in ("hybridlm", "train", "eval") and name.endswith(".py"):
            text = (ROOT / name).read_text()
            for other in {"train", "eval"} - {top}:
                assert f"import {other}" not in text, name
                assert f"from {other}" not in text, name


def test_no_test_folder_is_a_package():
    assert not [name for name in tracked() if name.startswith("tests/") and name.endswith("__init__.py")]
