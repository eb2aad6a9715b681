"""Files of JSON lines that users wrote: what is read, and the one error for whatever is wrong."""

import gzip
import json

import pytest

from depo_plugin import json_lines
from depo_plugin.estimator import prior

ODD = "a\u2028b\u0085c\x0bd"  # str.splitlines() would split this text in four


def test_lines_end_at_line_feeds_alone(tmp_path):
    """Texts with other line ends, a byte order mark, Windows line ends, and empty lines."""
    rows = [{"prompt": ODD}, {"prompt": "b"}]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode())
    assert list(json_lines.read(path)) == [(1, rows[0]), (3, rows[1])]
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert list(json_lines.read(packed)) == list(json_lines.read(path))


def test_what_depo_score_writes_of_odd_texts_is_read_as_a_prior(tmp_path):
    path = tmp_path / "scores.jsonl"
    path.write_text(json.dumps({"prompt": ODD, "label": "1", "pass_rate": 0.5, "n": 4}, ensure_ascii=False) + "\n")
    assert prior.read(str(path)) == [prior.KnownRate(ODD, "1", 0.5, 4.0)]


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n', "line 2: not JSON"),
        ("a.jsonl", b'{}\n{"a": ' + b"[" * 100_000 + b"\n", "line 2: not JSON"),
        ("a.jsonl", b'{}\n{"a": ' + b"9" * 5000 + b"}\n", "line 2: not JSON"),
        ("a.jsonl", b"{}\n[1]\n", r"line 2: not an object but \[1\]"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', "after line .: not UTF-8"),
        ("a.gz", gzip.compress(b'{"a": 1}\n' * 9, mtime=0)[:-9], r"not a whole \.gz file"),
        ("a.gz", b'{"a": 1}\n', r"not a whole \.gz file"),
    ],
    ids=["half a line", "too deep", "too long", "a list", "Latin-1", "half a file", "no gzip"],
)
def test_the_error_names_the_file_and_the_line(tmp_path, name, data, said):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(json_lines.LineError, match=f"^{path}, .*{said}"):
        list(json_lines.read(path))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({}, "line 7: no field 'prompt'"),
        ({"prompt": ["a"]}, r"line 7: prompt must be text, not \[\"a\"\]"),
        ({"prompt": "a", "n": None}, "line 7: .*NoneType"),
        ({"prompt": "a", "n": "many"}, "line 7: .*many"),
    ],
)
def test_a_field_that_cannot_be_used_is_named(tmp_path, row, said):
    with pytest.raises(json_lines.LineError, match=said), json_lines.fields(tmp_path, 7):
        (json_lines.text(row, "prompt"), float(row["n"]))
