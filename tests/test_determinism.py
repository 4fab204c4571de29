"""The same inputs, seed and versions give the same bytes: in other processes, from empty caches, under other names."""

import pytest
from jobs import main_job, npti_process

from npti_export.files import sha256_file

BOTH = ["--set", "rule.matched=0.5", "--set", "identify.matched_questions=2", "--threads", "1"]


@pytest.fixture(scope="module")
def one_and_another(tiny, tmp_path_factory):
    """Two runs that share nothing but the base: hash seeds, folders, caches and names differ."""
    import os

    made = []
    for seed, name in (("1", "model.gguf"), ("31337", "other name.gguf")):
        folder = tmp_path_factory.mktemp(f"run{seed}")
        environment = {**os.environ, "NPTI_CACHE": str(folder / "cache"), "PYTHONHASHSEED": seed}
        environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        more = ["--save-profile", "p.safetensors", *BOTH]
        done = npti_process(*main_job(tiny, name, *more), environment=environment, cwd=folder)
        assert done.returncode == 0, done.stderr
        assert "going on" not in done.stderr
        made.append((folder, folder / name))
    return made


def test_the_same_gguf(one_and_another):
    (_, one), (_, other) = one_and_another
    assert one.read_bytes() == other.read_bytes()


def test_the_same_profile_and_caches(one_and_another):
    (one, _), (other, _) = one_and_another
    assert (one / "p.safetensors").read_bytes() == (other / "p.safetensors").read_bytes()
    kept = [{path.name: sha256_file(path) for path in folder.glob("cache/*/*.safetensors")} for folder in (one, other)]
    assert kept[0] == kept[1]
    assert len(kept[0]) == 2  # statistics, and the constant of the pole
