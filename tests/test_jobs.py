"""What is handed to a cluster."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]


def test_scan_is_thin_and_answers() -> None:
    script = ROOT / "jobs" / "scan.py"
    assert len(script.read_text().splitlines()) <= 25
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "IMAGE..." in done.stdout


@pytest.mark.ray
def test_rays_loader_takes_cluster_yaml() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    validate_config(prepare_config(config))
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    (ray_version,) = [line.split("==")[1].split()[0] for line in pins if line.startswith("ray==")]
    assert config["docker"]["image"] == f"rayproject/ray:{ray_version}-py311"
