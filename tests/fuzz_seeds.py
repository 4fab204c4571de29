"""Small valid GGUF files to mutate, and their structure: written and taken apart without the package's reader."""

import json
import re
import struct
from dataclasses import dataclass, field

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from imatrix import sums_for
from imatrix import write_gguf as write_imatrix

from npti_export.compiler.exact import compile_exact
from npti_export.export.control_vector import write_control_vector
from npti_export.export.gguf import plan_bake, record, write_bake
from npti_export.files import sha256_file
from npti_export.fingerprint import Fingerprint
from npti_export.gguf.blocks import quantise
from npti_export.gguf.reader import mlp_widths
from npti_export.gguf.shards import named_shards, read_model, shard_paths
from npti_export.rule import SteeringRule
from npti_export.rule_io import Provenance, encode_rule

VOCABULARY = 40
CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


@dataclass
class Entry:
    """One metadata key; ``raw`` is what follows its type tag."""

    key: bytes
    kind: int
    raw: bytes
    key_length: int | None = None  # None: the true one

    def encode(self):
        length = len(self.key) if self.key_length is None else self.key_length
        return struct.pack("<Q", length) + self.key + struct.pack("<I", self.kind) + self.raw


@dataclass
class Tensor:
    name: bytes
    shape: list[int]
    kind: int
    offset: int
    name_length: int | None = None
    dims: int | None = None

    def encode(self):
        length = len(self.name) if self.name_length is None else self.name_length
        dims = len(self.shape) if self.dims is None else self.dims
        head = struct.pack("<Q", length) + self.name + struct.pack("<I", dims & 0xFFFFFFFF)
        return head + struct.pack(f"<{len(self.shape)}Q", *self.shape) + struct.pack("<IQ", self.kind, self.offset)


@dataclass
class File:
    """A GGUF in parts. ``size`` beyond the bytes is a hole at the end."""

    version: int
    entries: list[Entry]
    tensors: list[Tensor]
    alignment: int
    data: bytes
    counts: dict[str, int] = field(default_factory=dict)
    size: int = 0

    def encode(self):
        tensors, keys = self.counts.get("tensors", len(self.tensors)), self.counts.get("keys", len(self.entries))
        parts = [b"GGUF", struct.pack("<IQQ", self.version, tensors, keys)]
        parts += [entry.encode() for entry in self.entries] + [tensor.encode() for tensor in self.tensors]
        head = b"".join(parts)
        return head + b"\0" * (-len(head) % self.alignment) + self.data

    def entry(self, key):
        return next((one for one in self.entries if one.key == key), None)


def take_apart(data):
    """The parts of a valid file."""
    position = 4

    def number(code):
        nonlocal position
        (value,) = struct.unpack_from("<" + code, data, position)
        position += struct.calcsize("<" + code)
        return value

    def text():
        nonlocal position
        length = number("Q")
        position += length
        return data[position - length : position]

    version, tensor_count, key_count = number("I"), number("Q"), number("Q")
    entries, alignment = [], 32
    for _ in range(key_count):
        key, kind = text(), number("I")
        start = position
        if kind == STRING:
            text()
        elif kind == ARRAY:
            inner, count = number("I"), number("Q")
            for _ in range(count):
                text() if inner == STRING else number(CODES[inner])
        else:
            number(CODES[kind])
        entries.append(Entry(key, kind, data[start:position]))
        if key == b"general.alignment":
            (alignment,) = struct.unpack("<I", entries[-1].raw)
    tensors = []
    for _ in range(tensor_count):
        name, dims = text(), number("I")
        tensors.append(Tensor(name, [number("Q") for _ in range(dims)], number("I"), number("Q")))
    position += -position % alignment
    return File(version, entries, tensors, alignment, data[position:])


def some_file(rng, seeds):
    """The parts of a random seed, or of one of the files that it is split into."""
    return take_apart(rng.choice(rng.choice(list(seeds.values()))))


def write_base(
    path, gate="F32", up="F32", down="F32", hidden=32, width=64, layers=2, alignment=None, family="llama", biases=(),
    attention=False, **split,
):  # fmt: skip
    """The least that counts as a model of a family: norms, MLPs, one other matrix; and what belongs to the attention.

    ``width`` may be one for each layer; ``split`` goes to the writer.
    """
    rng = np.random.default_rng(0)
    writer = GGUFWriter(path, family, **split)
    widths = [width] * layers if isinstance(width, int) else width
    if alignment:
        writer.add_custom_alignment(alignment)
    writer.add_name("fuzzed")
    writer.add_license("mit")
    writer.add_block_count(len(widths))
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(width)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_token_list([f"t{number}" for number in range(VOCABULARY)])
    writer.add_token_types([1] * VOCABULARY)

    def matrix(name, rows, columns, kind):
        values = rng.normal(size=(rows, columns)).astype(np.float32)
        if kind != "F32":
            values = quantise(values, int(GGMLQuantizationType[kind]))
        writer.add_tensor(name, values, raw_dtype=GGMLQuantizationType[kind])

    def norm(name, size=hidden):
        writer.add_tensor(name, (1 + 0.1 * rng.normal(size=size)).astype(np.float32))

    matrix("token_embd.weight", VOCABULARY, hidden, "F32")
    for layer, neurons in enumerate(widths):
        norm(f"blk.{layer}.attn_norm.weight")
        for one in "qk" if attention else "":
            matrix(f"blk.{layer}.attn_{one}.weight", hidden, hidden, gate)
            norm(f"blk.{layer}.attn_{one}.bias")
        if not neurons:
            continue
        norm(f"blk.{layer}.ffn_norm.weight")
        matrix(f"blk.{layer}.ffn_gate.weight", neurons, hidden, gate)
        matrix(f"blk.{layer}.ffn_up.weight", neurons, hidden, up)
        matrix(f"blk.{layer}.ffn_down.weight", hidden, neurons, down)
        for stem in biases:
            norm(f"blk.{layer}.{stem}.bias", hidden if stem == "ffn_down" else neurons)
    norm("output_norm.weight")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def with_quirks(data):
    """Version 2, junk between the tensors and after the last: its steered file has to carry header and gaps."""
    file = take_apart(data)
    file.version = 2
    for number, tensor in enumerate(file.tensors):
        tensor.offset += file.alignment * number
    old = take_apart(data).tensors
    ends = [one.offset for one in old[1:]] + [len(file.data)]
    junk = bytes(range(1, 1 + file.alignment))
    file.data = b"".join(file.data[one.offset : end] + junk for one, end in zip(old, ends, strict=True))
    return file.encode()


def rule_for(widths, seed=0, per_layer=(8, 8)):
    """A random rule for MLPs of these widths: how many neurons of each are shifted, how many clamped."""
    rng = np.random.default_rng(seed)
    shift, clamp = np.zeros((len(widths), max(widths)), np.float32), np.zeros((len(widths), max(widths)), bool)
    for layer, width in enumerate(widths):
        chosen = rng.permutation(width)
        shift[layer, chosen[: per_layer[0]]] = 0.75
        clamp[layer, chosen[per_layer[0] : sum(per_layer)]] = True
    return SteeringRule(shift, clamp)


def steer(base, out, layout="uniform"):
    """A steered file, or as many as the base has, with all that the command writes into one."""
    header = read_model(base)
    rule = rule_for(mlp_widths(header))
    if layout == "ragged":
        rule.shift[0], rule.clamp[0] = 0, False
    metadata = said_of(rule, base)
    digests = [sha256_file(part.path) for part in header.parts]
    write_bake(plan_bake(header, compile_exact(rule, 4), metadata, digests, layout), out)
    record(shard_paths(out, len(digests))[0], {key: 0.25 for key in metadata if key.startswith("fidelity.")})


def said_of(rule, base):
    """The metadata about a rule."""
    about = Provenance("calm", 1.0, "{}", "fuzzed", "llama", Fingerprint("0" * 64, "1" * 64, "2" * 64), None, "mit")
    return {
        "version": "0.1.0",
        "trait": about.trait,
        "gamma": 1.0,
        "recipe": "{}",
        "model.fingerprint": about.fingerprint.float32,
        "base.name": base.name,
        "neurons.shift": rule.shifted,
        "neurons.clamp": rule.clamped,
        "provenance": json.dumps(about.to_dict() | {"recipe": "", "fidelity": {}}, sort_keys=True),
        "rule": encode_rule(rule),
        "fidelity.kl_rule_artifact": float("nan"),
        "fidelity.top1": float("nan"),
    }


def write_seeds(folder):
    """All of them, by name, as the bytes of each of their files."""
    write_base(folder / "float.gguf")
    write_base(folder / "mixed.gguf", "Q8_0", "F16", "Q4_1", alignment=64)
    write_base(folder / "kquant.gguf", "Q4_K", "Q6_K", "Q5_K", hidden=256, width=256)
    (folder / "quirks.gguf").write_bytes(with_quirks((folder / "mixed.gguf").read_bytes()))
    write_base(folder / "codebook.gguf", "IQ4_XS", "TQ2_0", "IQ3_XXS", hidden=256, width=256)
    write_base(folder / "micro.gguf", "NVFP4", "MXFP4", "MXFP4", hidden=64)
    write_base(folder / "biases.gguf", "Q8_0", "F16", "BF16", biases=("ffn_gate", "ffn_up", "ffn_down"))
    write_base(folder / "qwen2.gguf", "Q4_0", "F32", "Q5_1", family="qwen2", attention=True)
    write_base(folder / "deci.gguf", "F32", "F32", "Q8_0", family="deci", width=[64, 0, 96], biases=("ffn_gate",))
    parts = {"split_max_tensors": 9, "attention": True}
    write_base(folder / "split.gguf", biases=("ffn_gate",), **parts)
    write_base(folder / "empty.gguf", family="qwen2", small_first_shard=True, **parts)
    names = [path.name.partition("-")[0].removesuffix(".gguf") for path in sorted(folder.glob("*.gguf"))]
    for name in sorted(set(names)):
        first = next(folder.glob(f"{name}-00001-of-*.gguf"), folder / f"{name}.gguf")
        steer(first, shard_paths(folder / f"{name}-steered.gguf", len(named_shards(first)))[0])
    for name in ("mixed", "qwen2"):
        steer(folder / f"{name}.gguf", folder / f"{name}-ragged-steered.gguf", "ragged")
    directions = np.random.default_rng(0).normal(size=(3, 32)).astype(np.float32)
    rule = rule_for([64] * 4)
    write_control_vector(folder / "vector-steered.gguf", directions, "llama", said_of(rule, folder / "float.gguf"))
    for name in ("kquant", "float", "codebook"):
        write_imatrix(folder / f"{name}-matrix.gguf", sums_for(read_model(folder / f"{name}.gguf")))
    experts = {"blk.0.ffn_up_exps.weight": (np.ones((3, 32), np.float32), np.array([512, 0, 1]))}
    write_imatrix(folder / "experts-matrix.gguf", experts)
    seeds = {}
    for path in sorted(folder.glob("*.gguf")):
        seeds.setdefault(re.sub(r"(-\d{5}-of-\d{5})?\.gguf$", "", path.name), []).append(path.read_bytes())
    return {name: tuple(files) for name, files in seeds.items()}
