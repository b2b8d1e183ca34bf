"""Trips stay short: from a loop to the model, and of a training row from its file to the loss."""

from __future__ import annotations

from tests.house.trips import LOOPS, measured

MOST_FRAMES, MOST_FILES = 3, 8


def test_few_frames_stand_between_a_loop_and_the_model_and_few_files_form_a_row():
    frames, files = measured()
    assert set(frames) == set(LOOPS)
    assert all(0 < len(chain) <= MOST_FRAMES for chain in frames.values()), frames
    assert "align/training/objectives.py" in files and len(files) <= MOST_FILES, files
