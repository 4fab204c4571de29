"""Importance matrices written and used without the package's code: the formats as llama.cpp's sources have them."""

import ctypes
import struct

import numpy as np
from gguf import GGUFWriter

CHUNK = 512  # tokens of a chunk, llama-imatrix's default


class _Writer(GGUFWriter):
    def add_architecture(self):
        """llama-imatrix writes none."""


def sums_for(header, seed=0, without=()):
    """Sums of squares and counts, by tensor, of every matrix of the layers of a model: some columns matter far more."""
    rng = np.random.default_rng(seed)
    found = {}
    for tensor in header.tensors:
        if len(tensor.shape) > 1 and tensor.name.startswith("blk.") and tensor.name not in without:
            matrices = tensor.shape[2] if len(tensor.shape) > 2 else 1
            sums = np.exp(3 * rng.normal(size=(matrices, tensor.shape[0]))).astype(np.float32) * 1000
            found[tensor.name] = (sums, rng.integers(1, 40, matrices) * CHUNK)
    return found


def write_gguf(path, sums, chunks=30, datasets=("calibration.txt",), more=()):
    """As ``save_imatrix`` of tools/imatrix/imatrix.cpp does; ``more`` are tensors beside."""
    writer = _Writer(path, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", list(datasets))
    writer.add_uint32("imatrix.chunk_count", chunks)
    writer.add_uint32("imatrix.chunk_size", CHUNK)
    for name, (values, counts) in sums.items():
        writer.add_tensor(f"{name}.in_sum2", np.ascontiguousarray(values, np.float32))
        writer.add_tensor(f"{name}.counts", np.asarray(counts, np.float32)[:, None])
    for name, values in more:
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_legacy(path, sums, chunks=30, dataset=b"calibration.txt"):
    """As ``save_imatrix_legacy`` does; ``chunks`` and ``dataset`` may be left out by None."""
    parts = [struct.pack("<i", len(sums))]
    for name, (values, counts) in sums.items():
        calls = -(-int(max(counts)) // CHUNK)
        scaled = np.where(counts[:, None] == 0, 1.0, values / np.maximum(counts, 1)[:, None]) * calls
        parts += [struct.pack("<i", len(name)), name.encode(), struct.pack("<ii", calls, values.size)]
        parts.append(scaled.astype("<f4").tobytes())
    if chunks is not None:
        parts.append(struct.pack("<i", chunks))
    if dataset is not None:
        parts.append(struct.pack("<i", len(dataset)) + dataset)
    path.write_bytes(b"".join(parts))
    return path


def mean_squares(sums):
    """What llama-quantize makes of the sums of a GGUF: a division in float32, and ones where nothing was counted."""
    return {
        name: np.concatenate(
            [
                row / np.float32(count) if count else np.ones(len(row), np.float32)
                for row, count in zip(values, counts, strict=True)
            ]
        )
        for name, (values, counts) in sums.items()
    }


def quantised_by_llama(source, target, file_type, values, keys, threads=2, buffer=0):
    """``llama_model_quantize`` as llama-quantize calls it: ``values`` by tensor, ``keys`` of text and numbers."""
    import llama_cpp as llama

    params = llama.llama_model_quantize_default_params()
    params.ftype = getattr(llama, f"LLAMA_FTYPE_MOSTLY_{file_type}")
    params.nthread, params.max_buf_size = threads, buffer
    if values is not None:
        buffers = {name: (ctypes.c_float * one.size)(*one.ravel().tolist()) for name, one in values.items()}
        rows = [llama.llama_model_imatrix_data(name.encode(), one, len(one)) for name, one in buffers.items()]
        params.imatrix = (llama.llama_model_imatrix_data * (len(rows) + 1))(
            *rows, llama.llama_model_imatrix_data(None, None, 0)
        )
        overrides = (llama.llama_model_kv_override * (len(keys) + 1))()
        for place, (key, value) in enumerate(keys.items()):
            overrides[place].key = f"quantize.imatrix.{key}".encode()
            overrides[place].tag = 3 if isinstance(value, str) else 0
            if isinstance(value, str):
                overrides[place].value.val_str = value.encode()
            else:
                overrides[place].value.val_i64 = value
        params.kv_overrides = overrides
    assert llama.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)) == 0
    return target
