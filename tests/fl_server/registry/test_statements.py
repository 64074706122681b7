"""The documents beside a version, read as a stranger reads them: by the formats' own schema and by signature."""

import base64
import json
from decimal import Decimal
from importlib.resources import files

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from fl_server.errors import ServerError
from fl_server.registry.registry import Registry
from fl_server.registry.statements import open_statement_key, write_statements
from models.contract.encoding import build_digest
from models.contract.manifest import FileEntry, Lineage, ModelManifest, Quality, build_manifest
from models.contract.privacy import PrivacyStatement, Unit
from models.tensors.spec import TensorSpec

QUALITY = Quality(
    metric="accuracy",
    value=Decimal("0.91"),
    samples=300,
    float_value=Decimal("0.92"),
    logit_deviation=Decimal("0.02"),
)
PRIVACY = PrivacyStatement(
    unit=Unit.SAMPLE,
    epsilon=Decimal("7.96"),
    delta=Decimal("0.001"),
    mechanism="DP-SGD",
    accountant="RDP",
    expected_cohort=8,
    trust_model="protects each record",
)


@pytest.fixture
def version(tmp_path):
    (tmp_path / "v4").mkdir()
    (tmp_path / "v4/inference.onnx").write_bytes(b"graph")
    manifest = ModelManifest(
        model="digits",
        version=4,
        runtime="onnx",
        inputs=(TensorSpec("x", ("batch", 2), "float32"),),
        outputs=(TensorSpec("y", ("batch", 2), "float32"),),
        files={"inference.onnx": FileEntry(digest=build_digest(b"graph"), size_bytes=5)},
        lineage=Lineage(parent_version=3, run="run-1", round=2),
        privacy=PRIVACY,
        quality=QUALITY,
    )
    (tmp_path / "v4/manifest.json").write_bytes(build_manifest(manifest))
    with Registry(tmp_path / "registry") as registry:
        return registry.create_model_version(tmp_path / "v4")


def open_key(folder):
    return open_statement_key(folder / "statements.pem", folder / "statements.pub.pem")


def read_statement(version, public_path):
    """Return the signed statement; raises InvalidSignature."""
    bundle = json.loads((version.directory / "model.sig").read_bytes())
    assert bundle["mediaType"] == "application/vnd.dev.sigstore.bundle.v0.3+json"
    envelope = bundle["dsseEnvelope"]
    payload, kind = base64.b64decode(envelope["payload"]), envelope["payloadType"]
    signed = b"DSSEv1 %d %s %d %s" % (len(kind), kind.encode(), len(payload), payload)
    public = load_pem_public_key(public_path.read_bytes())
    public.verify(base64.b64decode(envelope["signatures"][0]["sig"]), signed, ec.ECDSA(SHA256()))
    return json.loads(payload)


def test_bundle_signs_every_file_of_the_folder_but_itself(version, tmp_path):
    write_statements(version, open_key(tmp_path))
    statement = read_statement(version, tmp_path / "statements.pub.pem")
    resources = {resource["name"]: resource["digest"] for resource in statement["predicate"]["resources"]}
    found = {path.name: build_digest(path.read_bytes()) for path in version.directory.iterdir()}
    del found["model.sig"]
    assert resources == found
    assert {"bom.cdx.json", "manifest.json", "inference.onnx"} == set(found)
    whole = build_digest(b"".join(bytes.fromhex(digest) for digest in resources.values()))
    assert statement["subject"] == [{"name": "digits-4", "digest": {"sha256": whole}}]


def test_statements_are_made_once_and_again_for_a_new_key(version, tmp_path):
    write_statements(version, open_key(tmp_path))
    before = (version.directory / "model.sig").read_bytes()
    write_statements(version, open_key(tmp_path))
    assert (version.directory / "model.sig").read_bytes() == before
    (version.directory / "model.sig").write_bytes(before.replace(b'"payload":"e', b'"payload":"\xff'))
    write_statements(version, open_key(tmp_path))
    assert read_statement(version, tmp_path / "statements.pub.pem"), "a damaged one is made anew"

    (tmp_path / "statements.pub.pem").rename(tmp_path / "old.pub.pem")
    (tmp_path / "statements.pem").unlink()
    write_statements(version, open_key(tmp_path))
    assert read_statement(version, tmp_path / "statements.pub.pem")
    with pytest.raises(InvalidSignature):
        read_statement(version, tmp_path / "old.pub.pem")


def test_key_is_its_owners_alone_and_another_kind_of_file_is_refused(tmp_path):
    open_key(tmp_path)
    assert (tmp_path / "statements.pem").stat().st_mode & 0o777 == 0o600
    (tmp_path / "statements.pem").write_text("nonsense")
    with pytest.raises(ServerError, match=r"statements\.pem"):
        open_key(tmp_path)


def test_bill_of_materials_says_files_lineage_quality_and_privacy(version, tmp_path):
    write_statements(version, open_key(tmp_path))
    bom = json.loads((version.directory / "bom.cdx.json").read_bytes())
    model = bom["metadata"]["component"]
    assert (model["name"], model["version"], model["hashes"][0]["content"]) == ("digits", "4", version.manifest_digest)
    assert model["pedigree"]["ancestors"][0]["version"] == "3"
    assert model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"][0]["value"] == "0.91"
    properties = {item["name"]: item["value"] for item in model["properties"]}
    assert (properties["edge-fl:lineage:run"], properties["edge-fl:lineage:round"]) == ("run-1", "2")
    assert properties["edge-fl:privacy:epsilon"] == "7.96"
    assert {part["name"] for part in bom["components"]} == {"inference.onnx", "manifest.json"}


def test_bill_of_materials_is_valid_by_the_schema_of_cyclonedx(version, tmp_path):
    pytest.importorskip("cyclonedx", reason="cyclonedx-python-lib is not installed: pip install 'edge-fl[dev]'")
    from jsonschema import Draft7Validator
    from referencing import Registry as Schemas
    from referencing import Resource

    folder = files("cyclonedx.schema._res")
    names = ("bom-1.6", "spdx", "jsf-0.82")
    schema, *others = (json.loads((folder / f"{name}.SNAPSHOT.schema.json").read_text()) for name in names)
    known = Schemas().with_resources((other["$id"], Resource.from_contents(other)) for other in others)
    write_statements(version, open_key(tmp_path))
    bom = json.loads((version.directory / "bom.cdx.json").read_bytes())
    Draft7Validator(schema, registry=known, format_checker=Draft7Validator.FORMAT_CHECKER).validate(bom)
