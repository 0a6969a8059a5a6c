"""evaluation/gallery.py: the page that plays a run's samples over its steps."""

import json

from evaluation.gallery import CAPTIONS, write_gallery


def test_folders_that_training_did_not_write_are_no_columns(tmp_path):
    """`tools.sample RUN --ema` and copies by hand put theirs beside training's own."""
    for name in ("step00000000", "step00000600", "step00000600_ema", "step00000600.bak"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "00_a.mp4").touch()
        (tmp_path / name / CAPTIONS).write_text(json.dumps({"00_a": f"caption of {name}"}))
    page = write_gallery(tmp_path, "run").read_text()
    assert page.count("<th>step ") == 2 and "step 600" in page
    assert "_ema" not in page and ".bak" not in page
