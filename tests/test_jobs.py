"""What is handed to a cluster."""

from __future__ import annotations

import os
import secrets
import socket
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


@pytest.mark.ray
@pytest.mark.slow
def test_a_cluster_that_asks_for_a_token_is_joined_by_its_address(tmp_path: Path) -> None:
    image = tmp_path / "a.raw"
    image.write_bytes(bytes(4096) * 3)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    clean |= {"RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    bin = Path(sys.executable).parent
    start = [
        str(bin / "ray"),
        "start",
        "--head",
        "--block",
        "--num-cpus=1",
        "--include-dashboard=false",
        f"--port={port}",
    ]
    cluster = subprocess.Popen(
        start, env=clean | {"RAY_AUTH_MODE": "token"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert cluster.stdout is not None
        assert any("Ray runtime started" in line for line in cluster.stdout)
        address = clean | {"RAY_ADDRESS": f"127.0.0.1:{port}"}
        command = [str(bin / "ksmdist"), "run", str(image), "-o", str(tmp_path / "run"), "--json"]
        done = subprocess.run(command, env=address, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert '"engine": "ray"' in done.stdout
        wrong = subprocess.run(
            [*command[:-3], "-o", str(tmp_path / "other")],
            env=address | {"RAY_AUTH_TOKEN": secrets.token_hex(32)},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert wrong.returncode == 1
        assert "RAY_AUTH_MODE and the token" in wrong.stderr
        assert not (tmp_path / "other").exists()
    finally:
        cluster.terminate()
        cluster.wait(30)
