import pytest

from dam_vllm.bench import checks
from dam_vllm.options import OptionError


def test_lengths_are_sorted_and_unique():
    assert checks.lengths_option("1024,512,1024", 128, 65536) == [512, 1024]


@pytest.mark.parametrize(
    ("check", "values", "said"),
    [
        (checks.lengths_option, ("100", 128, 1024), "--lengths is '100'.*multiples of 128"),
        (checks.lengths_option, ("2048", 128, 1024), "--lengths is '2048'.*up to 1024"),
        (checks.lengths_option, ("", 128, 1024), "--lengths is ''"),
        (checks.lengths_option, ("1k", 128, 1024), "--lengths is '1k'"),
        (checks.pages_option, ("16",), "--pages is '16'.*multiples of 32 up to 512"),
        (checks.pages_option, ("0", "--page"), "--page is '0'"),
        (checks.densities_option, ("0.1,1.5",), "--densities is '0.1,1.5'.*above 0 up to 1"),
        (checks.densities_option, ("x",), "--densities is 'x'"),
        (checks.window_option, (0,), "--window is 0.*from 1 to 8192"),
        (checks.heads_option, (10, 4, 64), "--heads is 10.*multiple of --kv-heads, 4"),
        (checks.heads_option, (8, 4, 60), "--head-size is 60.*one of 32, 64"),
        (checks.dynamic_option, (9, 8), "--dynamic is 9.*from 0 to 8 KV heads"),
    ],
)
def test_a_bad_value_is_refused_by_name(check, values, said):
    with pytest.raises(OptionError, match=said):
        check(*values)
