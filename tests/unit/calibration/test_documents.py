import json

import pytest

from dam_vllm.calibration.errors import CalibrationError
from dam_vllm.calibration.texts import read_documents


def test_a_file_is_one_document(tmp_path):
    (tmp_path / "a.log").write_text("some text\n")
    assert read_documents(str(tmp_path / "a.log"), "text", 9) == ["some text\n"]


def test_a_folder_gives_its_texts_once_each(tmp_path):
    for name, text in {"a.txt": "1", "b.md": "2", "c.py": "3", "d.bin": "4", "e.txt": "1"}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "blank.txt").write_text(" \n")
    assert read_documents(str(tmp_path), "text", 9) == ["1", "2", "3"]
    assert read_documents(str(tmp_path), "text", 2) == ["1", "2"]


def test_jsonl_by_field(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"body": text}) + "\n\n" for text in "ab"))
    assert read_documents(str(file), "body", 9) == ["a", "b"]
    with pytest.raises(CalibrationError, match=r"--field 'text' is no text in .*:1.*holds: body"):
        read_documents(str(file), "text", 9)


def test_bad_sources_are_named(tmp_path):
    (tmp_path / "bad.jsonl").write_text("{\n")
    for name in ("bad.txt", "binary.jsonl"):
        (tmp_path / name).write_bytes(b"\xff\xfe")
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("bad.jsonl", "bad.jsonl:1 is no JSON"),
        ("bad.txt", r"--data \S*bad.txt is no UTF-8 text"),
        ("binary.jsonl", r"--data \S*binary.jsonl is no UTF-8 text"),
        ("empty", "holds no .txt, .md, .py file"),
    ):
        with pytest.raises(CalibrationError, match=message):
            read_documents(str(tmp_path / name), "text", 9)


def test_data_sets_are_tried_last(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load(name, **options):
        if name != "known":
            raise ConnectionError("no network")
        return iter([{"text": "x"}, {"text": "y"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_documents("known", "text", 1) == ["x"]
    with pytest.raises(CalibrationError, match="'other' is no file or folder, and no data set"):
        read_documents("other", "text", 1)
