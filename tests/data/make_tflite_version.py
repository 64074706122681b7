"""Makes `tflite-version/` and `tflite-version.npz`, so that tests of LiteRT need no exporter: 2 GB of libraries.

EDGE_FL_TFLITE_PYTHON=/path/to/python/with/export-tflite python -m tests.data.make_tflite_version
"""

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

from fl_server.inference import open_graph
from fl_server.packaging.export import export_architecture
from fl_server.packaging.package import Tools, package_version
from fl_server.packaging.tflite import build_exporter
from models.contract.manifest import MANIFEST_NAME, Lineage, build_manifest
from tests.data.strokes import definition

DATA = Path(__file__).parent


def main() -> None:
    images = np.asarray(load_digits().data, np.float32).reshape(-1, 1, 8, 8)
    version_dir = DATA / "tflite-version"
    shutil.rmtree(version_dir, ignore_errors=True)
    with tempfile.TemporaryDirectory() as scratch:
        architecture = export_architecture(definition, Path(scratch, "architecture"), seed=0)
        manifest = package_version(
            architecture,
            parameters=architecture.load_initial_parameters(),
            version=1,
            calibration=images[:200],
            tools=Tools(
                measure=lambda _inference, _float: None, tflite=build_exporter(f"{DATA / 'strokes.py'}:definition")
            ),
            lineage=Lineage(),
            privacy=None,
            out_dir=version_dir,
        )
    for path in version_dir.iterdir():  # served only: what trains is left out
        if path.name != manifest.inference_name:
            path.unlink()
    served = replace(manifest, training=None, files={manifest.inference_name: manifest.files[manifest.inference_name]})
    (version_dir / MANIFEST_NAME).write_bytes(build_manifest(served))
    rows = images[200:232]
    logits = open_graph(version_dir / manifest.inference_name).run({"image": rows})["logits"]
    np.savez_compressed(DATA / "tflite-version.npz", image=rows, logits=logits)


if __name__ == "__main__":
    main()
