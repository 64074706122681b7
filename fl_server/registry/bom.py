"""What a version consists of and what is claimed of it, as a CycloneDX 1.6 document (ML-BOM); pure.

Everything in it comes from the manifest, so that the same version has the same document on every machine.
"""

import uuid
from datetime import UTC, datetime
from typing import Any

import msgspec

from models.contract.encoding import build_canonical
from models.contract.manifest import MANIFEST_NAME, FileEntry, ModelManifest, Quality
from models.contract.privacy import PrivacyStatement
from models.tensors.spec import TensorSpec

BOM_NAME = "bom.cdx.json"
_PREFIX = "edge-fl"  # of the properties that CycloneDX has no field for


def build_bom(manifest: ModelManifest, entry: FileEntry, *, created_at: float) -> bytes:
    """Return the document of one version.

    Args:
        manifest: Of the version.
        entry: Digest and size of the manifest itself, which define the version.
        created_at: When it was registered, in seconds since 1970.
    """
    reference = _build_reference(manifest.model, manifest.version)
    files = {MANIFEST_NAME: entry} | manifest.all_files
    return build_canonical(
        {
            "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
            "bomFormat": "CycloneDX",
            "specVersion": "1.6",
            "serialNumber": uuid.uuid5(uuid.NAMESPACE_OID, entry.digest).urn,
            "version": 1,
            "metadata": {
                "timestamp": datetime.fromtimestamp(created_at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
                "tools": {"components": [{"type": "application", "name": _PREFIX}]},
                "component": _build_model(manifest, entry, reference),
            },
            "components": [
                {"type": "file", "bom-ref": f"{reference}/{name}", "name": name, "hashes": _build_hashes(file)}
                for name, file in sorted(files.items())
            ],
            "dependencies": [{"ref": reference, "dependsOn": [f"{reference}/{name}" for name in sorted(files)]}],
        }
    )


def _build_model(manifest: ModelManifest, entry: FileEntry, reference: str) -> dict[str, Any]:
    lineage = manifest.lineage
    component: dict[str, Any] = {
        "type": "machine-learning-model",
        "bom-ref": reference,
        "name": manifest.model,
        "version": str(manifest.version),
        "hashes": _build_hashes(entry),
        "modelCard": _build_card(manifest),
        "properties": _build_properties("lineage", lineage)
        + _build_properties("privacy", manifest.privacy)
        + _build_properties("quality", manifest.quality),
    }
    if lineage.parent_version is not None:
        parent = {"type": "machine-learning-model", "name": manifest.model, "version": str(lineage.parent_version)}
        component["pedigree"] = {"ancestors": [parent]}
    return component


def _build_card(manifest: ModelManifest) -> dict[str, Any]:
    parameters: dict[str, Any] = {
        "inputs": [{"format": _describe(spec)} for spec in manifest.inputs],
        "outputs": [{"format": _describe(spec)} for spec in manifest.outputs],
    }
    if manifest.training is not None:
        parameters["approach"] = {"type": "supervised"}
    card: dict[str, Any] = {"modelParameters": parameters}
    if manifest.quality is not None:
        card["quantitativeAnalysis"] = {"performanceMetrics": _build_metrics(manifest.quality)}
    if manifest.privacy is not None:
        card["considerations"] = {"ethicalConsiderations": [_build_privacy(manifest.privacy)]}
    return card


def _build_metrics(quality: Quality) -> list[dict[str, str]]:
    held_out = f"{quality.samples} samples held out by the coordinator"
    return [
        {"type": quality.metric, "value": str(quality.value), "slice": held_out},
        {"type": f"{quality.metric} of the float model", "value": str(quality.float_value), "slice": held_out},
    ]


def _build_privacy(privacy: PrivacyStatement) -> dict[str, str]:
    return {
        "name": f"what the model tells of each {privacy.unit}: {privacy.trust_model}",
        "mitigationStrategy": f"{privacy.mechanism}: epsilon {privacy.epsilon} at delta {privacy.delta} ({privacy.accountant})",
    }


def _build_properties(group: str, statement: Any) -> list[dict[str, str]]:
    fields: dict[str, Any] = msgspec.to_builtins(statement) or {}
    return [
        {"name": f"{_PREFIX}:{group}:{name}", "value": str(value)}
        for name, value in fields.items()
        if value is not None
    ]


def _build_hashes(entry: FileEntry) -> list[dict[str, str]]:
    return [{"alg": "SHA-256", "content": entry.digest}]


def _build_reference(model: str, version: int) -> str:
    return f"{model}@{version}"


def _describe(spec: TensorSpec) -> str:
    return f"{spec.name}: {spec.dtype}[{', '.join(map(str, spec.shape))}]"
