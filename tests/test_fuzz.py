"""The fuzzer finds nothing in ours, and finds what is planted."""

import textwrap

import fuzz_gguf
import fuzz_models
import fuzz_mutations


def test_thousands_of_malformed_files():
    """The command line of fuzz_gguf.py runs it for longer."""
    tally = fuzz_gguf.campaign(seed=11, seconds=40, cases=2500, save=None)
    assert tally.faults == [], "\n".join(tally.faults)
    assert tally.cases >= 300
    ours = fuzz_models.SHAPES + fuzz_models.RECOVERY + fuzz_models.SPLIT
    assert len(tally.kinds) > 0.8 * len(fuzz_mutations.STRUCTURAL + fuzz_mutations.BYTES + ours)
    for name in fuzz_gguf.TARGETS:  # neither refuses everything nor takes everything
        assert tally.targets[name]["accepted"] > 10, name
        assert tally.targets[name]["GGUFError"] > 100, name


def test_planted_faults_are_found(tmp_path):
    """One of each kind in a reader of its own, each at a case of its own."""
    (tmp_path / "planted.py").write_text(
        textwrap.dedent("""
        import os
        from npti_export.errors import GGUFError

        calls = 0

        def target_planted(path, folder):
            global calls
            calls += 1
            if calls == 1:
                return [1, 2][len(path.name)]
            if calls == 2:
                return bytearray(1 << 29)
            if calls == 3:
                raise GGUFError("something is wrong")
            if calls == 4:
                raise GGUFError(f"{path}: two\\nlines")
            if calls == 5:
                (folder / ".litter").write_bytes(b"")
            if calls == 6:
                os.abort()
        """)
    )
    found = []
    # The child that takes over from one that crashed counts from one again, hence 1 to 6 and 1 to 2.
    tally = fuzz_gguf.campaign(seed=3, seconds=60, cases=8, also=tmp_path / "planted.py", save=tmp_path / "kept")
    for number, says in enumerate(
        ("IndexError at planted.py", "MemoryError", "does not name the file", "cannot be printed", "left behind",
         "crashed (exit code -6)", "IndexError at planted.py", "MemoryError")
    ):  # fmt: skip
        found += [line for line in tally.faults if f"case {number} " in line and says in line]
    assert len(found) == len(tally.faults) == 8, "\n".join(tally.faults)
    assert len(list((tmp_path / "kept").iterdir())) == 8
    assert "8 cases, 8 faults" in tally.table()


def test_a_hang_is_found(tmp_path):
    (tmp_path / "planted.py").write_text(
        "import time\nseen = []\ndef target_hang(path, folder):\n    time.sleep(300 * len(seen))\n    seen.append(1)\n"
    )
    tally = fuzz_gguf.campaign(seed=3, seconds=60, cases=2, also=tmp_path / "planted.py", silence=3)
    assert len(tally.faults) == 1
    assert "case 1 " in tally.faults[0]
    assert "hung for 3 s" in tally.faults[0]


def test_a_case_is_always_the_same_file(tmp_path):
    seeds = fuzz_gguf.fuzz_seeds.write_seeds(tmp_path)
    for name, parts in seeds.items():
        for data in () if name.startswith("quirks") else parts:  # whose padding is not zeros
            assert fuzz_gguf.fuzz_seeds.take_apart(data).encode()[: len(data)] == data
    assert [fuzz_gguf.make_case(seeds, 5, number) for number in range(50)] == [
        fuzz_gguf.make_case(seeds, 5, number) for number in range(50)
    ]
    assert len({tuple(fuzz_gguf.make_case(seeds, 5, number).files.values()) for number in range(50)}) > 45
