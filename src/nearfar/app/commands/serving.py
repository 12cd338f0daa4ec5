"""The command that shows a run to others: `serve`."""

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from nearfar.app.commands.declare import RunFolder, command, option
from nearfar.app.errors import InputError


@command("serve runs/photos", "serve runs/photos --gallery staff.gallery --port 0")
def serve(
    run: RunFolder,
    gallery: Annotated[
        Path | None, option("Also search this gallery, written by enroll.", metavar="GALLERY")
    ] = None,
    port: Annotated[int, option("Port on 127.0.0.1; 0 for any that is free.", "--port")] = 8000,
) -> None:
    """Compare items and search a gallery in a browser on this computer, or by JSON."""
    if not 0 <= port <= 65535:
        raise InputError(f"--port must lie between 0 and 65535, got {port}.")

    from nearfar.app.gallery.answers import searchable
    from nearfar.app.serve import Answers, open_door
    from nearfar.app.train.run import read_run

    found = read_run(run)
    answers = Answers(found, searchable(found, gallery, None) if gallery else None)
    with open_door(answers, port) as door:
        typer.echo(f"{run} is at {door.url} for this computer; Ctrl-C stops it")
        with suppress(KeyboardInterrupt):
            door.serve_forever()
    answers.busy.acquire(timeout=10)  # torch must not be cut off in the middle
    typer.echo("stopped")
