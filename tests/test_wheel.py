"""The wheel holds everything that the three commands need, away from the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def scripts(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts of an environment that has the wheel, and this environment's other packages."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    site = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    uv = Path(sysconfig.get_path("scripts"), "uv")
    python = folder / "bin" / "python"
    install = [str(uv), "pip", "install", "--quiet", "--no-deps", "--python", str(python), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    # After the wheel's own: a .pth file that appends, so that the checkout's editable install is not among them.
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def run(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def test_data_files_are_in_it(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for name in (
        "pfedsecure/clip/tiny/tiny-clip.json",
        "pfedsecure/clip/tiny/tiny-clip.safetensors",
        "pfedsecure/demo_plan.toml",
        "pfedsecure/py.typed",
        "pfed_cli/demo/report.html.j2",
        "pfed_benchmarks/federation.py",
    ):
        assert name in names
    packages = {name.partition("/")[0] for name in names if not name.startswith("pfedsecure-")}
    assert packages == {"pfedsecure", "pfed_server", "pfed_client", "pfed_cli", "pfed_benchmarks"}


def test_every_module_of_the_checkout_is_in_it(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    homes = {"pfedsecure": ".", "pfed_server": "server", "pfed_client": "client", "pfed_cli": "cli"}
    missing = [
        str(file)
        for package, home in homes.items()
        for file in (ROOT / home / package).rglob("*.py")
        if file.relative_to(ROOT / home).as_posix() not in names
    ]
    assert missing == []


@pytest.mark.parametrize("script", ["pfed", "pfed-server", "pfed-client"])
def test_scripts_start(scripts: Path, tmp_path: Path, script: str) -> None:
    result = run([str(scripts / script), "--version"], tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().endswith("0.1.0")


def test_code_comes_from_the_wheel(scripts: Path, tmp_path: Path) -> None:
    show = "import pfedsecure, pfed_server, pfed_client; print(pfedsecure.__file__, pfed_server.__file__)"
    result = run([str(scripts / "python"), "-c", show], tmp_path)
    assert str(ROOT) not in result.stdout
    assert str(scripts.parent) in result.stdout


def test_benchmarks_are_installed(scripts: Path, tmp_path: Path) -> None:
    result = run([str(scripts / "pfed"), "bench", "--list"], tmp_path)
    assert "federation" in result.stdout.split(), result.stderr
