"""The command that writes a run for other programs: `export`."""

from pathlib import Path
from typing import Annotated

from nearfar.app.commands.declare import AsJson, RunFolder, command, option
from nearfar.app.show import show


@command("export runs/photos --onnx photos-onnx", "export runs/photos --onnx photos-onnx --json")
def export(
    run: RunFolder,
    onnx: Annotated[Path, option("The folder to write.", "--onnx", metavar="DIR")],
    as_json: AsJson = False,
    overwrite: Annotated[bool, option("Replace --onnx if it exists.", "--overwrite")] = False,
) -> None:
    """Write a run as ONNX, with its threshold, test vectors and an example that needs no torch."""
    from nearfar.app.export import export_onnx

    show(export_onnx(run, onnx, overwrite=overwrite), as_json)
