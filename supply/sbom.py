"""A bill of materials (CycloneDX 1.6, JSON) of a wheel of ksmdist: what it needs to run, as constraints.txt pins it.

    python -m supply.sbom dist   writes dist/ksmdist-VERSION.cdx.json for the wheel in dist, and dist/SHA256SUMS

The same commit gives the same bytes: the time is SOURCE_DATE_EPOCH's, the serial number is made of all else. Hashes
of a component are those of each file that its pin allows (a wheel a platform, a source archive). Licences are those
that the installed packages name.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import HashAlgorithm, HashType, Property
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentScope, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL
from packaging.utils import parse_wheel_filename

from supply.audit import licence_of
from supply.pins import LOCKS, ROOT, Pin, Wanted, read_pins, runtime

__all__ = ["bill", "main"]

_FACTORY = LicenseFactory()


def bill(wheel: Path, wanted: Sequence[Wanted], epoch: int) -> str:
    """The bill of a wheel as JSON text; epoch: seconds since 1970 that it is dated."""
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    name, version, _, _ = parse_wheel_filename(wheel.name)
    root = _component(Pin(name, str(version), "", (digest,)), ComponentType.APPLICATION, None)
    bom = Bom(serial_number=UUID(int=0))
    bom.metadata.timestamp = datetime.fromtimestamp(epoch, UTC)
    bom.metadata.component = root
    parts: dict[str, list[Component]] = {}
    for one in wanted:
        scope = ComponentScope.OPTIONAL if one.optional else ComponentScope.REQUIRED
        parts[one.name] = [_component(pin, ComponentType.LIBRARY, scope) for pin in one.pins]
    for made in parts.values():
        bom.components.update(made)
    bom.register_dependency(root, [part for one in wanted if one.direct for part in parts[one.name]])
    for one in wanted:
        for component in parts[one.name]:
            bom.register_dependency(component, [part for need in one.needs for part in parts[need]])
    text = _written(bom)
    bom.serial_number = UUID(bytes=hashlib.sha256(text.encode()).digest()[:16], version=4)
    return _written(bom)


def _written(bom: Bom) -> str:
    return JsonV1Dot6(bom).output_as_string(indent=1) + "\n"


def _component(pin: Pin, kind: ComponentType, scope: ComponentScope | None) -> Component:
    licence = licence_of(pin.name)
    purl = PackageURL("pypi", name=pin.name, version=pin.version)
    return Component(
        name=pin.name,
        version=pin.version,
        type=kind,
        scope=scope,
        bom_ref=str(purl),
        purl=purl,
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=content) for content in pin.hashes],
        licenses=[_FACTORY.make_from_string(licence)] if licence else [],
        properties=[Property(name="ksmdist:marker", value=pin.marker)] if pin.marker else [],
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the bill and the checksums of the one wheel in a folder."""
    (folder,) = map(Path, sys.argv[1:] if arguments is None else arguments)
    (wheel,) = folder.glob("ksmdist-*.whl")
    epoch = int(os.environ.get("SOURCE_DATE_EPOCH", "0"))
    version = wheel.name.split("-")[1]
    out = folder / f"ksmdist-{version}.cdx.json"
    out.write_text(bill(wheel, runtime(read_pins(ROOT / LOCKS[0])), epoch), encoding="utf-8")
    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in sorted((wheel, out))]
    (folder / "SHA256SUMS").write_text("".join(sums), encoding="utf-8")
    print(f"{wheel}\n{out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
