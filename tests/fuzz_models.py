"""What can be wrong with a model: widths and heads, what brings it back from its steered file, how it is split."""

import copy
import json
import struct

from fuzz_mutations import TEXTS, a_number, bytes_entry, replace, size_key, spoilt, text_entry, value
from fuzz_seeds import ARRAY, CODES, STRING, Entry, some_file

# --- sizes


def widths_array(rng, inner=None, count=None):
    """A type and bytes: widths, one for each layer or not, in a type that fits or not."""
    inner = rng.choice([4, 5, 5, 5, 0, 1, 7, 10, 11]) if inner is None else inner
    count = rng.choice([0, 1, 2, 2, 3, 3, 4, 513, 100000]) if count is None else count
    code = CODES[inner]
    number = a_number(rng)
    values = [rng.choice([64, 64, 0, 96, 32, number]) for _ in range(min(count, 4))]
    values += [0] * (count - len(values))
    raw = b"".join(struct.pack("<Q", one % 2**64)[: struct.calcsize(code)] for one in values)
    return ARRAY, struct.pack("<IQ", inner, count) + raw


def widths(rng, file, seeds):
    replace(file, Entry(size_key(file, b"feed_forward_length"), *widths_array(rng)))


def heads(rng, file, seeds):
    key = rng.choice([b"attention.head_count", b"attention.key_length", b"rope.dimension_count"])
    kind = rng.choice([4, 4, 4, 10, 0, 5])
    number = rng.choice([1, 2, 3, 4, 8, 16, 32, 64, a_number(rng)])
    entry = Entry(size_key(file, key), kind, struct.pack("<Q", number)[: struct.calcsize(CODES[kind])])
    replace(file, Entry(entry.key, *value(rng)) if rng.random() < 0.2 else entry)


def family(rng, file, seeds):
    """The file says that it is of another family, and at times calls its keys so."""
    old, new = size_key(file, b""), rng.choice([b"llama", b"qwen2", b"deci", b"granite", b"gemma", b"phi3"])
    replace(file, text_entry(b"general.architecture", new))
    if rng.random() < 0.7:
        for one in file.entries:
            one.key = one.key.replace(old, new + b".") if one.key.startswith(old) else one.key


def importance(rng, file, seeds):
    """A key or a count of an importance matrix."""
    names = (b"imatrix.datasets", b"imatrix.chunk_count", b"imatrix.chunk_size", b"general.type")
    counts = [one for one in file.tensors if one.name.endswith(b".counts")]
    if counts and rng.random() < 0.5:
        rng.choice(counts).shape = [rng.choice([1, 2, 7, 256]), rng.choice([1, 3, 1 << 30])][: rng.choice([1, 2])]
        return
    replace(file, Entry(rng.choice(names), *value(rng, rng.choice([4, 4, 5, STRING, ARRAY]))))


# --- what brings the base back


def base_family(rng, file, seeds):
    text = rng.choice([b"llama", b"qwen2", b"deci", b"phi3", b"", *(one.encode() for one in TEXTS)])
    replace(file, text_entry(b"npti.base.architecture", text))


def base_tensors(rng, file, seeds):
    number = rng.choice([a_number(rng), len(file.tensors), len(file.tensors) - 1, len(file.tensors) + 1])
    replace(file, Entry(b"npti.base.tensors", 10, struct.pack("<Q", number % 2**64)))


def base_widths(rng, file, seeds):
    replace(file, Entry(b"npti.base.feed_forward_length", *widths_array(rng)))


def gate_biases(rng, file, seeds):
    old = file.entry(b"npti.base.gate_biases")
    data = old.raw[12:] if old is not None and old.kind == ARRAY else b""
    replace(file, bytes_entry(b"npti.base.gate_biases", rng.choice([spoilt(rng, data), rng.randbytes(64), b""])))


def base_count(rng, file, seeds):
    number = struct.pack("<i", rng.choice([0, 1, len(file.tensors), -1, 2**31 - 1]))
    replace(file, Entry(b"npti.base.split.tensors.count", *rng.choice([(5, number), value(rng)])))


def former_dropped(rng, file, seeds):
    ours = [one for one in file.entries if one.key.startswith(b"npti.base.")]
    if ours:
        file.entries.remove(rng.choice(ours))


def switched_off(rng, file, seeds):
    """The value that switches a neuron off, in a gate's bias or anywhere."""
    biases = [one for one in file.tensors if one.name.endswith(b"ffn_gate.bias")]
    if not file.tensors:
        return
    one = rng.choice(biases or file.tensors)
    at = one.offset + 4 * rng.randrange(32)
    file.data = file.data[:at] + struct.pack("<f", -1000.0) * rng.choice([1, 4]) + file.data[at + 4 :]


def rule_tensors(rng, file, seeds):
    """A rule of well-formed tensors of the wrong types, lengths and values."""
    kinds = {
        "I32": 4,
        "F32": 4,
        "I64": 8,
        "U8": 1,
        "BOOL": 1,
        "F16": 2,
        "BF16": 2,
        "F64": 8,
        "I8": 1,
        "F8_E4M3": 1,
        "X": 4,
    }
    head, data = {}, b""
    for name, kind in (("shift_index", "I32"), ("shift_value", "F32"), ("clamp_index", "I32"), ("shape", "I32")):
        kind = rng.choice([kind, kind, *kinds])
        count = 2 if name == "shape" else rng.choice([0, 1, 5])
        numbers = [rng.choice([0, 1, 2, 64, -1, 2**31 - 1, 30000, 2**23, 0x7FC00000]) for _ in range(count)]
        content = b"".join(struct.pack("<q", one)[: kinds[kind]] for one in numbers)
        shape = rng.choice([[count], [count], [count], [1, count], [], [2**62, 4]])
        head[name] = {"dtype": kind, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(head).encode()
    replace(file, bytes_entry(b"npti.rule", struct.pack("<Q", len(text)) + text + data))


# --- how it is split: these change the list of a model's files, each ``[name, File]``


def split_number(rng, files, seeds):
    """A lie about which of how many, in one file."""
    _lie(rng, [rng.choice(files)], rng.choice([b"split.no", b"split.count", b"split.tensors.count"]))


def split_numbers(rng, files, seeds):
    """The same lie in all files."""
    _lie(rng, files, rng.choice([b"split.count", b"split.count", b"split.tensors.count"]))


def _lie(rng, files, key):
    kind = rng.choice([2, 2, 5, 5, 3, 4, 10, 0, 7, 1])
    number = rng.choice([0, 1, 2, 3, 4, 9, 22, 27, 65535, 2**32 - 1, a_number(rng)])
    said = kind, struct.pack("<Q", number)[: struct.calcsize(CODES[kind])]
    if rng.random() < 0.2:
        said = value(rng)
    for _, file in files:
        replace(file, Entry(key, *said))


def missing(rng, files, seeds):
    for _ in range(rng.choice([1, len(files) - 1])):
        if len(files) > 1:
            del files[rng.randrange(1, len(files))]


def renamed(rng, files, seeds):
    """One file, or all, under a name that llama.cpp does not look for."""
    old, new = rng.choice(
        [("-00001-", "-00002-"), ("-00002-", "-00009-"), ("case-", "Case-"), (".gguf", ".GGUF"), ("-of-", "_of_"),
         ("-00001-", "-٠٠٠٠١-"), ("-of-0000", "-of-9999"), ("-00001-", "-00000-"), ("case-", "-"), ("-00002-", "-2-")]
    )  # fmt: skip
    for one in rng.choice([files[:1], files[-1:], files]):
        if one[0].replace(old, new) not in [name for name, _ in files]:
            one[0] = one[0].replace(old, new)


def swapped(rng, files, seeds):
    one, other = rng.choice(files), rng.choice(files)
    one[1], other[1] = other[1], one[1]


def of_another_model(rng, files, seeds):
    """A file of another model in the place of one, whole or called a part of this."""
    one, other = rng.choice(files), some_file(rng, seeds)
    if rng.random() < 0.7:
        for entry in one[1].entries:
            if entry.key.startswith(b"split."):
                replace(other, entry)
    one[1] = other


def the_same_twice(rng, files, seeds):
    one, other = rng.choice(files), rng.choice(files)
    number = other[1].entry(b"split.no")
    other[1] = copy.deepcopy(one[1])
    if number is not None and rng.random() < 0.7:
        replace(other[1], number)


def tensor_moved(rng, files, seeds):
    """A tensor goes to another file: the model is the same, and its steered files must give both back."""
    one, other = rng.choice(files)[1], rng.choice(files)[1]
    if one is other or not one.tensors:
        return
    tensor = one.tensors.pop()
    end = len(other.data) + -len(other.data) % other.alignment
    data, one.data, tensor.offset = one.data[tensor.offset :], one.data[: tensor.offset], end
    other.tensors.append(tensor)
    other.data = other.data.ljust(end, b"\0") + data


def keys_everywhere(rng, files, seeds):
    """The first file's metadata in another, too, which no tool of llama.cpp writes."""
    file, first = rng.choice(files)[1], files[0][1]
    kept = {entry.key for entry in file.entries}
    file.entries += [entry for entry in first.entries if entry.key not in kept and entry.kind != STRING]
    if rng.random() < 0.5:
        file.entries.append(Entry(rng.choice([b"qwen2.x", b"llama.x", b"npti.x", b"general.x"]), *value(rng)))


SHAPES = (widths, heads, family, importance)
RECOVERY = (base_family, base_tensors, base_widths, gate_biases, base_count, former_dropped, switched_off, rule_tensors)
SPLIT = (
    split_number, split_numbers, missing, renamed, swapped, of_another_model, the_same_twice, tensor_moved,
    keys_everywhere,
)  # fmt: skip
