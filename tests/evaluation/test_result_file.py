"""Results that are kept as they come: continued, refused, never twice."""

from __future__ import annotations

import json

import pytest

from lit_gpt.evaluation.result_file import ResultFile
from lit_gpt.files import SaveError


def opened(path, existing="continue", **settings):
    return ResultFile(path, {"steps": 4, **settings}, key=lambda result: result["id"], existing=existing)


def test_results_are_kept_and_the_last_of_a_key_counts(tmp_path):
    path = tmp_path / "new" / "answers.jsonl"
    with opened(path) as file:
        assert not len(file)
        file.add({"id": 2, "text": "naïve"})
        file.add({"id": 1, "text": "a"})
    with opened(path) as file:
        assert 2 in file and 3 not in file
        file.add({"id": 2, "text": "b"})
        file.sort(lambda result: result["id"])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"id": 1, "text": "a"},
        {"id": 2, "text": "b"},
    ]


def test_a_torn_line_is_computed_again(tmp_path):
    path = tmp_path / "answers.jsonl"
    with opened(path) as file:
        file.add({"id": 1})
        file.add({"id": 2})
    path.write_bytes(path.read_bytes()[:-3])
    with opened(path) as file:
        assert 1 in file and 2 not in file
        file.add({"id": 2})
    assert path.read_text() == '{"id": 1}\n{"id": 2}\n'


def test_other_settings_are_refused_and_named(tmp_path):
    path = tmp_path / "answers.jsonl"
    with opened(path) as file:
        file.add({"id": 1})
    with pytest.raises(ValueError, match="other settings .steps 4 there, 8 here.: give another file, or --existing"):
        opened(path, steps=8)
    with opened(path, "overwrite", steps=8) as file:
        assert not len(file)
    assert path.read_text() == ""


def test_results_of_which_nothing_says_how_they_were_made_are_not_adopted(tmp_path, caplog):
    """Another program's, or another checkpoint's whose record was lost: only a typed word makes them this one's."""
    path = tmp_path / "answers.jsonl"
    path.write_text('{"id": 1}\n')
    with pytest.raises(ValueError, match="no answers.settings.json beside it, .* or --existing continue to count them"):
        opened(path, None)
    assert path.read_text() == '{"id": 1}\n' and not path.with_suffix(".settings.json").exists()
    with opened(path, "continue") as file:
        assert 1 in file
    assert "does not say how its results were made" in caplog.text
    # Now it says so.
    with opened(path, None) as file:
        assert 1 in file


def test_an_existing_file_can_be_refused(tmp_path):
    path = tmp_path / "answers.jsonl"
    with opened(path, "refuse") as file:
        file.add({"id": 1})
    with pytest.raises(ValueError, match="exists: give another file"):
        opened(path, "refuse")
    with pytest.raises(ValueError, match="choose from continue, refuse, overwrite"):
        opened(path, "perhaps")


def test_a_foreign_line_is_named(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text('{"id": 1}\n\n{"no": 1}\n')
    with pytest.raises(ValueError, match="answers.jsonl:3 is no result"):
        opened(path)


def test_a_second_writer_is_kept_out(tmp_path):
    path = tmp_path / "answers.jsonl"
    with opened(path), pytest.raises(ValueError, match="answers.jsonl is in use by another process"):
        opened(path)


def test_a_full_disk_is_named_with_the_file(tmp_path):
    """The file is closed on the way out, which must not say less than the write that failed."""
    path = tmp_path / "answers.jsonl"
    path.symlink_to("/dev/full")
    with pytest.raises(SaveError, match="cannot write .*answers.jsonl: No space left on device"), opened(path) as file:
        file.add({"id": 1})
