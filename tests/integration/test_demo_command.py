"""`zlora demo`, as users run it."""

import json
import subprocess
import sys
from pathlib import Path

from PIL import Image
from support.processes import clean_environ
from zlora_worker.demo.command import DOCUMENTS


def test_the_demo_draws_four_documents_and_a_contact_sheet(tmp_path: Path) -> None:
    """In an empty data folder, four documents succeed and each variant has a tile of the sheet.

    Settings for a real model do not change the demo. With `--json` the table is on stderr.
    """
    settings = {
        "ZLORA_HOME": str(tmp_path / "home"),
        "ZLORA_VAE": str(tmp_path / "a-vae"),
        "ZLORA_RESULT_BACKEND": "redis://127.0.0.1:1/0",
        "COLUMNS": "200",
    }
    zlora = str(Path(sys.executable).with_name("zlora"))

    ended = subprocess.run(
        [zlora, "demo", "--json", "--out", str(tmp_path / "out")],
        env=clean_environ(settings),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )

    assert ended.returncode == 0, ended.stderr
    rows = {line.split()[1]: line for line in ended.stderr.splitlines() if " SUCCESS " in line}
    assert tuple(rows) == DOCUMENTS
    for line in rows.values():
        with Image.open(tmp_path / line.split("│")[-2].strip()) as image:
            assert image.size == (64, 64)
    with Image.open(tmp_path / "out" / "contact-sheet.png") as sheet:
        tiles = [
            sheet.crop((12 + x * 268, 34 + y * 312, 268 + x * 268, 290 + y * 312))
            for y in range(4)
            for x in range(4)
        ]
    drawn = [tile.tobytes() for tile in tiles if len(tile.getcolors(1 << 16) or ()) > 100]
    assert len(drawn) == len(set(drawn)) == 9
    printed = json.loads(ended.stdout)
    assert printed["sheet"] == str(tmp_path / "out" / "contact-sheet.png")
    assert len([job for job in printed["jobs"] if job["result"]["base_intact"]]) == 9
