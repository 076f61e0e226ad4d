"""mergekit in a virtual environment of its own: what it is asked to do, in its own YAML."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from _merges import Case

VERSION = "0.1.5"
TORCH = "2.13.0"


def install(venv: Path) -> Path:
    """Make the environment unless it is there; return it."""
    if not (venv / "bin" / "mergekit-yaml").exists():
        print(f"installing mergekit {VERSION} in {venv}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        pip = [venv / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, f"torch=={TORCH}"], check=True)  # first: what depends on it would choose another build
        subprocess.run([*pip, f"mergekit=={VERSION}"], check=True)
    return venv


def versions(venv: Path) -> dict[str, str]:
    """Return the versions of what the environment merges with."""
    script = (
        "import importlib.metadata as m, json, platform; "
        "v = {p: m.version(p) for p in ('mergekit', 'torch', 'transformers', 'safetensors')}; "
        "print(json.dumps(v | {'python': platform.python_version()}))"
    )
    found: dict[str, str] = json.loads(subprocess.check_output([venv / "bin" / "python", "-c", script], text=True))
    return found


def command(venv: Path, case: Case, models: Mapping[str, Path], out: Path, *, exact: bool = False) -> list[str | Path]:
    """Return the command of a merge, its configuration written beside `out`; `exact`: float32 arithmetic."""
    raw = not (models["base"] / "config.json").exists()
    places = {name: folder / "model.safetensors" if raw else folder for name, folder in models.items()}
    config = out.with_suffix(".yaml")
    config.write_text(json.dumps(configuration(case, places, exact=exact), indent=2))  # JSON is YAML
    program = "mergekit-pytorch" if raw else "mergekit-yaml"
    return [venv / "bin" / program, config, out, "--quiet"]


def configuration(case: Case, places: Mapping[str, Path], *, exact: bool) -> dict[str, object]:
    """Return mergekit's configuration of a case."""
    config: dict[str, object] = {
        "merge_method": case.method,
        "out_dtype": "bfloat16",  # arcee_fusion would write float32
        "models": [{"model": str(places[name])} for name in case.sources],
        "parameters": dict(case.peer),
    }
    if case.peer_base:
        config["base_model"] = str(places[case.peer_base])
    if exact:
        config["dtype"] = "float32"
    return config
