import json

import pytest

from dam_vllm.files import write_json


def test_json_in_a_new_folder(tmp_path):
    file = tmp_path / "new" / "a.json"
    write_json(file, {"rows": [1]})
    write_json(file, {"rows": [2]})
    assert json.loads(file.read_text()) == {"rows": [2]}
    assert list(file.parent.iterdir()) == [file]


def test_json_that_fails_leaves_the_old_file(tmp_path):
    file = tmp_path / "a.json"
    write_json(file, {"rows": [1]})
    with pytest.raises(TypeError):
        write_json(file, {"rows": [object()]})
    assert json.loads(file.read_text()) == {"rows": [1]}
    assert list(tmp_path.iterdir()) == [file]
