"""Generate the Python side of the wire: `python proto/generate.py [OUTPUT_ROOT]`.

The output is committed so that users need no protocol compiler; a test generates it anew and compares. Without an
argument the files are written in place, under pfedsecure/wire/v1/.
"""

from __future__ import annotations

import shutil
import sys
import sysconfig
import tempfile
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

PROTO_ROOT = Path(__file__).resolve().parent


def generate(output: Path) -> list[Path]:
    """Write the modules of every proto file into the folder `output`; returns their paths, sorted."""
    sources = sorted(str(path.relative_to(PROTO_ROOT)) for path in PROTO_ROOT.rglob("*.proto"))
    plugin = shutil.which("protoc-gen-mypy", path=sysconfig.get_path("scripts"))
    if plugin is None:
        raise SystemExit("protoc-gen-mypy is missing; install the dev extra")
    with tempfile.TemporaryDirectory() as scratch:
        arguments = [
            "protoc",
            f"-I{PROTO_ROOT}",
            f"-I{files('grpc_tools').joinpath('_proto')}",
            f"--plugin=protoc-gen-mypy={plugin}",
            f"--python_out={scratch}",
            f"--grpc_python_out={scratch}",
            f"--mypy_out=quiet:{scratch}",
            *sources,
        ]
        if protoc.main(arguments):
            raise SystemExit("protoc failed")
        output.mkdir(parents=True, exist_ok=True)
        written = []
        for module in sorted(Path(scratch, "pfedsecure", "v1").iterdir()):
            # The wire's package is pfedsecure.v1, its Python home pfedsecure.wire.v1.
            text = module.read_text().replace("from pfedsecure.v1 import", "from pfedsecure.wire.v1 import")
            text = text.replace("import pfedsecure.v1.", "import pfedsecure.wire.v1.").replace(
                "from pfedsecure.v1.", "from pfedsecure.wire.v1."
            )
            if module.suffix == ".pyi":
                text = text.replace("pfedsecure.v1.", "pfedsecure.wire.v1.")
            target = output / module.name
            target.write_text(text)
            written.append(target)
    return written


if __name__ == "__main__":
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else PROTO_ROOT.parent
    for path in generate(root / "pfedsecure" / "wire" / "v1"):
        print(path)
