"""What is said where `vllm serve` does not start."""

import re
import sys

import pytest

from dam_vllm.server import Server, ServerError

LONG = "print('INFO a\\n' * 2000 + 'x' * 900 + ' why\\n'); exit(1)"
# Started or not, a slow machine says nothing in time.
SLOW = "not ready in 1 s: (INFO b|it said nothing)"


@pytest.mark.parametrize(
    ("code", "seconds", "told"),
    [
        (LONG, 300, "ended at start: x+ why"),
        ("exit(1)", 300, "ended at start: it said nothing"),
        ("import time; print('INFO b', flush=True); time.sleep(300)", 1, SLOW),
    ],
)
def test_a_failed_start_is_one_line_that_names_its_log(tmp_path, code, seconds, told):
    server = Server(tmp_path, timeout=seconds)
    server._command = [sys.executable, "-c", code]
    with pytest.raises(ServerError) as error, server:
        pass
    (line,) = str(error.value).splitlines()
    assert re.fullmatch(rf"vllm serve {told} \(its whole output: {server.log}\)", line)
    assert len(line) < 700
    assert (len(server.output()) > 10000) == (code == LONG)
