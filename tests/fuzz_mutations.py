"""What can be wrong with a GGUF: each mutation damages one file in one way, knowing its structure."""

import json
import math
import struct

from fuzz_seeds import ARRAY, CODES, STRING, Entry, Tensor, some_file

NUMBERS = [0, 1, 2, 3, 31, 32, 33, 63, 64, 255, 256, 65535, 2**20, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40]
NUMBERS += [2**60, 2**61, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1]
SIZES = (b"block_count", b"embedding_length", b"feed_forward_length", b"expert_count")
GENERAL = (b"general.architecture", b"general.name", b"general.alignment", b"general.license")
STEMS = ("ffn_gate", "ffn_up", "ffn_down", "ffn_norm", "attn_norm", "attn_q", "attn_k")
TEXTS = ["", "\0", "llama", "gemma", "a\nb", "\x1b[2J", "..", "/", "é" * 40, "\u202e", "1" * 5000, "deci", "GGUF"]


def a_number(rng):
    return rng.choice(NUMBERS) if rng.random() < 0.7 else rng.getrandbits(rng.choice([4, 8, 16, 33, 64]))


def value(rng, kind=None):
    """A random value with its type tag: scalar, string or array, at times a lie about its length."""
    kind = rng.choice([*CODES, STRING, ARRAY, ARRAY, 13, 2**31]) if kind is None else kind
    if kind in CODES:
        return kind, rng.choice([bytes(8), b"\xff" * 8, struct.pack("<Q", a_number(rng))])[
            : struct.calcsize(CODES[kind])
        ]
    if kind == STRING:
        data = rng.choice([*(text.encode() for text in TEXTS), b"\xff\xfe", b"x" * rng.choice([70, 70000, 1 << 20])])
        return kind, struct.pack("<Q", lie(rng, len(data))) + data
    inner, count = rng.choice([*CODES, STRING, ARRAY]), rng.choice([0, 1, 2, 100])
    width = 8 if inner == STRING else 12 if inner == ARRAY else struct.calcsize(CODES[inner])
    return kind, struct.pack("<IQ", inner, lie(rng, count)) + rng.randbytes(width * count if inner in CODES else 0) + (
        bytes(width * count) if inner not in CODES else b""
    )


def lie(rng, truth):
    return truth if rng.random() < 0.7 else a_number(rng)


def text_entry(key, text):
    return Entry(key, STRING, struct.pack("<Q", len(text)) + text)


def bytes_entry(key, data):
    return Entry(key, ARRAY, struct.pack("<IQ", 0, len(data)) + data)


def replace(file, entry):
    """Put an entry in the place of that of the same key, or at the end."""
    old = file.entry(entry.key)
    if old is None:
        file.entries.append(entry)
    else:
        file.entries[file.entries.index(old)] = entry


def size_key(file, key):
    """A key under the architecture of the file, as far as it has one."""
    one = file.entry(b"general.architecture")
    return (one.raw[8:40] if one is not None and one.kind == STRING else b"llama") + b"." + key


def needed(rng, file):
    return rng.choice([*GENERAL, *(size_key(file, key) for key in SIZES)])


# --- metadata


def counts(rng, file, seeds):
    file.counts[rng.choice(["keys", "tensors"])] = (
        rng.choice([a_number(rng), len(file.entries) + rng.choice([-1, 1])]) % 2**64
    )


def version(rng, file, seeds):
    file.version = rng.choice([0, 1, 2, 3, 4, 0x03000000, 2**32 - 1])


def key_length(rng, file, seeds):
    rng.choice(file.entries).key_length = a_number(rng)


def key_text(rng, file, seeds):
    rng.choice(file.entries).key = rng.choice([text.encode() for text in TEXTS] + [b"\xff", b"k" * 70000])


def key_type(rng, file, seeds):
    """Another type with a value to match, most often of a key that is needed."""
    one = rng.choice(file.entries)
    if rng.random() < 0.7:
        one = file.entry(needed(rng, file)) or one
    one.kind, one.raw = value(rng)


def key_tag(rng, file, seeds):
    """Another type tag on the same bytes."""
    rng.choice(file.entries).kind = rng.choice([*CODES, STRING, ARRAY, 13, 2**32 - 1])


def needed_number(rng, file, seeds):
    kind, size = rng.choice([(4, 4), (5, 4), (10, 8), (11, 8), (4, 4), (0, 1)])
    replace(file, Entry(size_key(file, rng.choice(SIZES[:3])), kind, struct.pack("<Q", a_number(rng))[:size]))


def alignment(rng, file, seeds):
    number = rng.choice([0, 1, 2, 7, 8, 32, 48, 64, 4096, 1 << 20, 1 << 21, 1 << 31])
    kind = rng.choice([4, 4, 4, 10, 5, 7, STRING])
    raw = value(rng, STRING)[1] if kind == STRING else struct.pack("<Q", number)[: struct.calcsize(CODES[kind])]
    replace(file, Entry(b"general.alignment", kind, raw))


def key_dropped(rng, file, seeds):
    file.entries.remove(rng.choice(file.entries))


def key_twice(rng, file, seeds):
    file.entries.insert(rng.randrange(len(file.entries)), rng.choice(file.entries))


def array_lies(rng, file, seeds):
    arrays = [one for one in file.entries if one.kind == ARRAY]
    if arrays:
        one = rng.choice(arrays)
        inner, count = struct.unpack_from("<IQ", one.raw)
        inner = rng.choice([inner, *CODES, STRING, ARRAY, 77])
        one.raw = struct.pack("<IQ", inner, lie(rng, count)) + one.raw[12:]


def nested_array(rng, file, seeds):
    depth = rng.choice([1, 2, 1000, 100000])
    raw = struct.pack("<IQ", ARRAY, 1) * depth + struct.pack("<IQB", 0, 1, 7)
    file.entries.append(Entry(b"nested", ARRAY, raw))


def huge_string(rng, file, seeds):
    where = rng.choice([b"general.name", b"general.architecture", b"k" * rng.choice([1, 65535, 65536, 1 << 20])])
    replace(file, text_entry(where, rng.choice([b"n", b"\0", "ü".encode()]) * rng.choice([0, 1 << 16, 1 << 20])))


def many_keys(rng, file, seeds):
    number = rng.choices([300, 20000], [20, 1])[0]
    file.entries += [Entry(b"%d" % one, 0, b"\1") for one in range(number)]
    if rng.random() < 0.5:
        file.entries += file.entries[-1:]


def a_key(rng, file, seeds):
    file.entries.append(Entry(rng.choice([needed(rng, file), b"npti.x", b"npti.fidelity.kl", b"z"]), *value(rng)))


# --- tensors


def tensor_dropped(rng, file, seeds):
    file.tensors.remove(rng.choice(file.tensors))


def tensor_twice(rng, file, seeds):
    one = rng.choice(file.tensors)
    file.tensors.append(Tensor(one.name, list(one.shape), one.kind, one.offset))


def tensor_renamed(rng, file, seeds):
    layer = rng.choice(["0", "1", "2", "-1", "00", "x", "", "999999999999", "1.0", "٣"])
    names = [
        f"blk.{layer}.{rng.choice(STEMS)}.{rng.choice(['weight', 'bias'])}",
        "ffn_down.weight",
        "xffn_up.weight",
        *TEXTS,
    ]
    rng.choice(file.tensors).name = rng.choice(names).encode()


def tensor_added(rng, file, seeds):
    """One more, well-formed, with a name that may be taken for one of an MLP."""
    shape = rng.choice([[1], [32], [32, 1], [1, 1, 1, 1], [64, 32], [32, 64]])
    name = f"blk.{rng.choice([0, 1, 2, 7, -1])}.{rng.choice(STEMS)}.{rng.choice(['weight', 'bias', 'scale'])}"
    file.tensors.append(Tensor(name.encode(), shape, 0, len(file.data)))
    count = 4
    for one in shape:
        count *= one
    file.data += bytes(count + -count % file.alignment)


def tensor_name_length(rng, file, seeds):
    rng.choice(file.tensors).name_length = a_number(rng)


def tensor_dims(rng, file, seeds):
    rng.choice(file.tensors).dims = rng.choice([0, 1, 2, 3, 4, 5, 2**31, 2**32 - 1])


def tensor_shape(rng, file, seeds):
    one = rng.choice([tensor for tensor in file.tensors if tensor.shape] or [file.tensors[0]])
    if not one.shape or rng.random() < 0.3:
        one.shape = rng.choice([one.shape[::-1], [*one.shape, 1], one.shape[:1], [math.prod(one.shape), 1], [0], []])
    else:
        one.shape[rng.randrange(len(one.shape))] = a_number(rng)


def tensor_overflow(rng, file, seeds):
    """Sizes whose product is small, or nothing, in 64 bits."""
    rng.choice(file.tensors).shape = rng.choice(
        [[2**32, 2**32], [2**63, 2], [2**62, 4, 1, 8], [2**16] * 4, [32, 2**59]]
    )


def tensor_type(rng, file, seeds):
    rng.choice(file.tensors).kind = rng.choice([*range(44), 2**31, 2**32 - 1])


def tensor_offset(rng, file, seeds):
    one, other = rng.choice(file.tensors), rng.choice(file.tensors)
    one.offset = rng.choice([a_number(rng), other.offset, (one.offset + 32) % 2**64, one.offset // 2, 2**64 - 32])


def tensors_swapped(rng, file, seeds):
    """Every tensor where the next one was: legal only where the sizes allow it."""
    offsets = [one.offset for one in file.tensors]
    for one, offset in zip(file.tensors, offsets[1:] + offsets[:1], strict=True):
        one.offset = offset


def many_tensors(rng, file, seeds):
    number = rng.choices([200, 5000], [20, 1])[0]
    start = len(file.data)
    step = max(file.alignment, 32)
    file.tensors += [Tensor(b"t%d" % one, [1], 0, start + step * one) for one in range(number)]
    file.data += bytes(step * number) if step * number < 1 << 20 else b""


def not_finite(rng, file, seeds):
    """Norms and weights that are NaN or infinite."""
    one = rng.choice(file.tensors)
    junk = rng.choice(
        [b"\xff\xff\xff\x7f", b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff" * 4, b"\x00\x7c\x00\x7e", b"\x01\x00\x80\x7f"]
    )
    length = rng.choice([4, 64, 4096, 1 << 16])
    data = bytearray(file.data)
    data[one.offset : one.offset + length] = (junk * length)[: len(data[one.offset : one.offset + length])]
    file.data = bytes(data)


def with_hole(rng, file, seeds):
    """A hole of gigabytes at the end, so that lying lengths fit in the file."""
    file.size = rng.choice([1 << 24, 1 << 30, 3 << 30])
    rng.choice([counts, key_length, tensor_shape, array_lies, key_type, tensor_offset])(rng, file, seeds)


def whole_other_data(rng, file, seeds):
    file.data = rng.choice([b"", rng.randbytes(len(file.data)), some_file(rng, seeds).data])


# --- what steered files carry


def steering_value(rng, file, seeds):
    ours = [one for one in file.entries if one.key.startswith(b"npti.")]
    if ours:
        one = rng.choice(ours)
        one.kind, one.raw = value(rng, rng.choice([None, one.kind]))


def base_bytes(rng, file, seeds):
    number = rng.choice([a_number(rng), len(file.data), len(file.data) + rng.randrange(4096)])
    replace(file, Entry(b"npti.base.bytes", 10, struct.pack("<Q", number % 2**64)))


def base_width(rng, file, seeds):
    replace(file, Entry(b"npti.base.feed_forward_length", 10, struct.pack("<Q", a_number(rng))))


def base_header(rng, file, seeds):
    """A stored header that is damaged like any other, or of another file."""
    inner = some_file(rng, seeds)
    for _ in range(rng.choice([0, 1, 2]) if inner.tensors else 0):
        rng.choice(INNER)(rng, inner, seeds)
    inner.data = b""
    replace(file, bytes_entry(b"npti.base.header", spoilt(rng, inner.encode())))


def base_gaps(rng, file, seeds):
    replace(file, bytes_entry(b"npti.base.gaps", rng.randbytes(rng.choice([0, 1, 31, 64, 5000]))))


def rule_bytes(rng, file, seeds):
    one = file.entry(b"npti.rule")
    if one is not None and one.kind == ARRAY:
        replace(file, bytes_entry(one.key, spoilt(rng, one.raw[12:])))


def provenance(rng, file, seeds):
    one = file.entry(b"npti.provenance")
    if one is None or one.kind != STRING:
        return
    try:
        about = json.loads(one.raw[8:])
    except (ValueError, RecursionError):
        return
    odd = [None, 0, -1, 1e999, [], {}, "", "x" * 70000, "\ud800", [[]], True, "calm+", "nobody", "calm:0", "calm:nan"]
    whole = ["", "null", "[]", "{}", "[" * 100000, '{"a":' * 50000, "1" * 5000, '"x"', "NaN", "\ufeff{}"]
    if rng.random() < 0.4 or not isinstance(about, dict) or not about:
        text = rng.choice(whole)
    else:
        about[rng.choice([*about, "new"])] = rng.choice(odd)
        text = json.dumps(about)
    replace(file, text_entry(one.key, text.encode()))


def base_name(rng, file, seeds):
    replace(file, text_entry(b"npti.base.name", rng.choice(TEXTS).encode()))


def spoilt(rng, data):
    """Bytes with a few of them changed, removed or added."""
    data = bytearray(data)
    for _ in range(rng.choice([0, 1, 1, 3])):
        at = rng.randrange(len(data) + 1)
        length = rng.choice([1, 4, 8, 100])
        way = rng.randrange(4)
        if way == 0:
            data[at : at + length] = rng.randbytes(length)
        elif way == 1:
            del data[at : at + length]
        elif way == 2:
            data[at:at] = rng.choice([bytes(length), b"\xff" * length])
        else:
            data[at : at + 8] = struct.pack("<Q", a_number(rng))
    return bytes(data)


# --- bytes


def flipped(rng, data, head):
    for _ in range(rng.choice([1, 2, 8])):
        data[rng.randrange(head)] ^= 1 << rng.randrange(8)


def truncated(rng, data, head):
    del data[rng.randrange(rng.choice([head, len(data)])) :]


def extended(rng, data, head):
    data += rng.choice([bytes, rng.randbytes])(rng.choice([1, 31, 5000]))


def overwritten(rng, data, head):
    """A number where there may be a length."""
    at = rng.randrange(head)
    data[at : at + 8] = struct.pack("<Q", a_number(rng))[: rng.choice([1, 4, 8])]


def cut_out(rng, data, head):
    at = rng.randrange(head)
    del data[at : at + rng.choice([1, 8, 64, 1000])]


def repeated(rng, data, head):
    at = rng.randrange(head)
    data[at:at] = data[at : at + rng.choice([1, 8, 64, 1000])]


KEYS = (
    counts, version, key_length, key_text, key_type, key_tag, needed_number, alignment, key_dropped, key_twice,
    array_lies, nested_array, huge_string, many_keys, a_key,
)  # fmt: skip
TENSORS = (
    tensor_dropped, tensor_twice, tensor_renamed, tensor_added, tensor_name_length, tensor_dims, tensor_shape,
    tensor_overflow, tensor_type, tensor_offset, tensors_swapped, many_tensors, not_finite, with_hole, whole_other_data,
)  # fmt: skip
STEERING = (
    steering_value, base_bytes, base_width, base_header, base_gaps, rule_bytes, provenance, base_name,
)  # fmt: skip
INNER = tuple(one for one in KEYS + TENSORS if one not in (many_keys, many_tensors, huge_string, with_hole))
STRUCTURAL = KEYS + TENSORS + STEERING
BYTES = (flipped, truncated, extended, overwritten, cut_out, repeated)
