"""Every recording is read by a test."""

from pathlib import Path

import pytest
from golden_data import GOLDEN

SOURCES = {path.name: path.read_text("utf-8") for path in Path(__file__).parent.glob("test_*.py")}
RECORDINGS = sorted(path for path in GOLDEN.iterdir() if path.suffix != ".md")


@pytest.mark.parametrize("recording", RECORDINGS, ids=lambda path: path.name)
def test_a_test_reads_it(recording):
    loader = f'load_{recording.suffix[1:]}("{recording.stem}")'  # or the file itself, by its name
    assert any(loader in text or f'"{recording.name}"' in text for text in SOURCES.values())
