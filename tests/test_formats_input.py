"""Bad input to the options of the formats: one line, exit code 2, nothing written."""

import pytest
from jobs import npti

BAD = [
    (["--from", "a", "--trait", "calm", "--out", "o"], "--trait makes a rule, and --from brings one"),
    (["--from", "a", "--gamma", "1", "--out", "o"], "--gamma makes a rule"),
    (["--from", "nowhere", "--out", "o"], "there is no such file or directory"),
    (["--from", "a"], "no --out"),
    (["--trait", "calm", "--out", "o", "--format", "onnx"], "'onnx' is not one of"),
    (["--trait", "calm", "--out", "o", "--push-to-hub", "no-owner"], "no-owner"),
    (["--trait", "calm", "--out", "o.gguf", "--checkpoint-dtype", "float16"], "--checkpoint-dtype"),
    (["--trait", "calm", "--out", "o.gguf", "--private"], "--private"),
    (["--trait", "calm", "--out", "o", "--format", "peft", "--base", "b.gguf"], "--base"),
    (["--trait", "calm", "--out", "o.gguf", "--where", "response"], "--format peft"),
    (["--trait", "calm", "--format", "peft", "--out", "."], "exists already"),
    (["verify", "nowhere"], "there is no such file or directory"),
    (["verify", "x.txt"], "holds no rule"),
]


@pytest.mark.parametrize(
    ("arguments", "says"), BAD, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_bad_input(arguments, says, cli_environment, tmp_path):
    (tmp_path / "x.txt").write_text("hello")
    done = npti(*arguments, environment=cli_environment, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert says in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["x.txt"]
